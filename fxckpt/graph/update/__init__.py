"""What the optimizer's step becomes: traced, its scalars hoisted out, the rest compiled or run over lists."""
