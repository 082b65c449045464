"""The package's module state, all of it: which module keeps what for the whole process, and why."""

from __future__ import annotations

MODULE_STATE = {
    "fxckpt.graph.model.book:traces": "what the compiler has shown, by parameter identity: it compiles before a run exists",
    "fxckpt.graph.ops:_PORTS": "the number by which a StepGraph's ops find their run (weak)",
    "fxckpt.graph.ops:_STEP_PORTS": "the number by which ``optimizer_step`` finds its run (weak)",
    "fxckpt.graph.ops:_LISTENER": "the run whose region's backward is under way: ``layer_ready`` tells it",
    "fxckpt.optim.programs:_shared_programs": "traced updates, which further runs of the same optimizer use again",
    "fxckpt.optim.helper_thread:helper": "the second thread for calls of many small tensors, started at first use",
    "fxckpt.run.run:live_runs": "the runs that are alive (weak): for load() without arguments, and for the end of the process",
    "fxckpt.graph.update.inductor:_compiled": "updates that Inductor compiled, by what they depend on",
    "fxckpt.engine.io:_running": "the file operation that each thread is in, for messages about a disk that hangs",
    "fxckpt.engine.ring:_rings": "memory shared with monitors (weak), which a forked child lets go of",
    "fxckpt.store.lock:_held": "directories that this process has locked, for a second store of the same process",
    "fxckpt.store.lock:_locks": "locks of directories (weak), none of which is a forked child's",
    "fxckpt.ranks.replication.wire:_sockets": "open sockets to other ranks (weak), which a forked child closes",
    "fxckpt.monitor.link:_links": "open sockets to monitors (weak), which a forked child closes",
    "fxckpt.compat.modules:_inner": "by class of a module (weak), the attribute in which it holds a model that it wraps",
    "fxckpt.compat.inductor:_capturing": "where Inductor's kernels note their calls while one is taken out",
}
"""``module:name`` of each mutable object at module level. A test looks for others."""
