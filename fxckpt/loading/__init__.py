"""``load``: a checkpoint back into the live objects of a run, or weights into a model."""
