"""One training run.

run.py          Run: puts the parts together, and is what ``opt.ckpt`` asks
stepping.py     one ``opt.step()``: begins a checkpoint that is due, updates, emits; says once what runs it
closing.py      the step that was made and is not complete yet; when it closes
capture.py      what goes into a record, and when it is taken
arrangement.py  names, order, layer numbers and the layout in files
emitting.py     the port behind a StepGraph's ops: waits for copies, hands layers to the engine
hooks.py        what autograd and a GradScaler tell
clock.py        how many attempts, updates and iterations; when a checkpoint is due; what the run may do now
extra_state.py  random generators, schedulers, loaders: their state, and back
signals.py      a last checkpoint when a signal ends the process
"""
