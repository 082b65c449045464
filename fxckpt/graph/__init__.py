"""Everything about graphs: what the compiler shows of the model, and the StepGraph that runs its update.

    model/          names.py     FQNs of parameters and buffers, free of wrappers
                    forward.py   Dynamo's forward graph, read: first uses and data flow of the parameters
                    joint.py     what one backend call shows (JointTrace)
                    book.py      all of them merged (TraceBook); known.py the models that they belong to
                    arrivals.py  the order in which gradients arrive in the first backward
                    layers.py    the order in which gradients become final and why, layers, and the edges between them
    update/         trace.py     the optimizer's step, traced for one parameter
                    hoist.py     the scalars taken out of it; specialize.py the whole way from a step to a Program
                    foreach.py, tensor_scalars.py, inductor.py   a body over lists, with tensor scalars, compiled
    contract.py     what a pass is: requires, provides; passes.py is the list of all passes, in their order
    schedule.py     the passes that write the step: updates, fences, emits; step_graph.py is the result
    ops.py, draw.py the ops behind fences and emits; pictures of the layers

Nothing here knows of files.
"""
