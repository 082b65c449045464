"""What an optimizer keeps beside its parameters' state and its groups: attributes, other optimizers, its own ``state_dict``."""
