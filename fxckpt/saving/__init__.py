"""From the tensors of a run to a committed checkpoint: names, layout, what is in flight, the committer."""
