"""What the compiler shows of the model: names, first uses, the order in which gradients become final."""
