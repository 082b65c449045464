"""The directory a run checkpoints into: what is in it, who may write it, and in which order. Nothing here imports torch."""
