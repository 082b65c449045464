"""What ``fxckpt.titan`` needs of torchtitan 0.3, written from its interface: ``make test`` has no torchtitan."""
