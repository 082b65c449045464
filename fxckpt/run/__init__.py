"""One training run: its steps, its boundaries, and what a record holds of it."""
