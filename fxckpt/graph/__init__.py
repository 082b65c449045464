"""Everything about graphs: what the compiler shows of the model, and the StepGraph that runs its update."""
