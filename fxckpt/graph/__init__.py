"""Everything about graphs: what the compiler shows of the model, and the StepGraph that runs its update.

    names.py     FQNs of parameters and buffers, free of wrappers
    forward.py   Dynamo's forward graph, read: first uses and data flow of the parameters
    joint.py     one backend call (JointTrace), and all of them merged (TraceBook)
    layers.py    the order in which gradients become final, layers, and the edges between them
    draw.py      the layer graph as text, dot and SVG
    update.py    the optimizer's step, traced; hoist.py takes the scalars out, inductor.py compiles what is left
    rewrite.py   scalars, fences, updates and emits: the StepGraph

Nothing here knows of files.
"""
