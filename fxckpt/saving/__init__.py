"""From the tensors of a run to a committed checkpoint."""
