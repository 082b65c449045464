"""One training run: the cycle of steps, what is captured when, names and layer numbers."""
