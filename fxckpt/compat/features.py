"""Looks, when fxckpt first needs torch, whether this torch has the private parts that the files beside this one use.

A part that is gone is said at once and by name, with what will not work without it; nothing does less in silence. Modules of
torch that take seconds to import are looked at in their source.
"""

from __future__ import annotations

import logging
import operator
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from fxckpt.errors import SetupError

log: logging.Logger = logging.getLogger("fxckpt")

TRIED: tuple[str, str] = ("2.11", "2.13")
"""The oldest and the newest torch that all tests have passed with."""

NEEDED: Mapping[str, Sequence[str]] = {
    "checkpoints": (
        "torch._C._autograd._profiler_enabled",
        "torch._C._current_graph_task_id",
        "torch._C._disabled_torch_function_impl",
        "torch._C._functorch.is_functorch_wrapped_tensor",
        "torch._C._len_torch_dispatch_stack",
        "torch._C._len_torch_function_stack",
        "torch._C._set_grad_enabled",
        "torch._guards.CompileContext.current_compile_id",
        "torch._guards.TracingContext.try_get",
        "torch.optim.optimizer._global_optimizer_post_hooks",
        "torch.optim.optimizer._global_optimizer_pre_hooks",
        "torch.utils._python_dispatch.is_traceable_wrapper_subclass",
    ),
    "one update for each layer": (
        "torch._check",
        "torch._subclasses.fake_tensor.FakeTensor",
        "torch._subclasses.fake_tensor.FakeTensorMode",
        "torch.fx._symbolic_trace",
        "torch.utils._foreach_utils._get_foreach_kernels_supported_devices",
        "torch.utils._python_dispatch.TorchDispatchMode",
        "torch.utils._sympy.interp.sympy_interp",
        "torch.utils._sympy.reference.PythonReferenceAnalysis",
    ),
    "fxckpt.batches": (
        "torch.utils.data._utils.pin_memory.pin_memory",
        "torch.utils.data._utils.worker._IterableDatasetStopIteration",
        "torch.utils.data.dataloader._BaseDataLoaderIter",
        "torch.utils.data.dataloader._MultiProcessingDataLoaderIter",
        "torch.utils.data.dataloader._SingleProcessDataLoaderIter",
    ),
}
"""By what cannot be without them. The package is not imported without these."""

USEFUL: Mapping[str, Sequence[str]] = {
    "fxckpt.backend": (
        "torch._TorchCompileInductorWrapper",
        "torch._dynamo.backends.registry.lookup_backend",
        "torch._dynamo.exc.ShortenTraceback",
        "torch._dynamo.symbolic_convert.tls",
        "torch._inductor.cudagraph_trees.reset_cudagraph_trees",
        "torch._inductor.custom_graph_pass.CustomGraphPass",
    ),
    'updates="in_backward"': (
        "torch.Tensor._make_wrapper_subclass",
        "torch._C._will_engine_execute_node",
        "torch._dynamo.compiled_autograd.compiled_autograd_enabled",
        "torch._inductor.custom_graph_pass.CustomSchedulerPass",
        "torch.autograd.Variable._execution_engine",
        "torch.utils._pytree.tree_leaves",
    ),
    "FSDP2 and tensor parallelism": ("torch.distributed.tensor._utils.compute_local_shape_and_global_offset",),
    "load() in a job of several ranks": ("torch.distributed.distributed_c10d._get_default_store",),
    "torch.compile around a function with a step in it": (
        "torch._C._dynamo.eval_frame.get_eval_frame_callback",
        "torch._dynamo.eval_frame.skip_code",
        "torch.amp.autocast_mode._enter_autocast",
        "torch.amp.autocast_mode._exit_autocast",
    ),
    "update='inductor', the default where no foreach= or fused= is given": (
        "torch._inductor.async_compile.AsyncCompile",
        "torch._inductor.codecache.CppCodeCache",
        "torch._inductor.config",
        "torch._inductor.runtime.cache_dir_utils.cache_dir",
        "torch._inductor.standalone_compile",
    ),
}
"""By what will not work without them, while all else does."""


def check(needed: Mapping[str, Sequence[str]] = NEEDED, useful: Mapping[str, Sequence[str]] = USEFUL) -> None:
    """Raises SetupError if a needed part is gone; warns of each useful one."""
    oldest, newest = TRIED
    about = f"torch {torch.__version__} is not one that this fxckpt knows (tried: {oldest} to {newest})"
    lines = [f"{what} will not work without {part}" for what, part in _gone(useful)]
    if lines:
        log.warning("%s: %s", about, "; ".join(lines))
    lines = [f"{what} would need {part}" for what, part in _gone(needed)]
    if lines:
        raise SetupError(f"{about}: {'; '.join(lines)}. Install a torch between these, or a newer fxckpt")


def _gone(parts: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    return ((what, path) for what, paths in parts.items() for path in paths if not has(path))


def has(path: str) -> bool:
    """Is there such an attribute? Of a module that is not imported yet: does its source make or import the name?"""
    names = path.split(".")
    for at in range(len(names), 0, -1):
        module, rest = ".".join(names[:at]), names[at:]
        if module in sys.modules:
            return not rest or _found(sys.modules[module], rest)
        source = _source(module)
        if source is not None:
            return not rest or _makes(source.read_text(encoding="utf-8"), rest[0])
    return False


def _found(value: object, names: Sequence[str]) -> bool:
    try:
        operator.attrgetter(".".join(names))(value)
    except AttributeError:
        return False
    return True


def _source(module: str) -> Path | None:
    """The file of a module of torch."""
    base = Path(torch.__file__).parent.joinpath(*module.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _makes(source: str, name: str) -> bool:
    """Does this source define, assign or import the name at its top?"""
    made = rf"^(?:class|def|async def) {name}\b|^{name}\s*[:=]|^(?:from \S+ )?import [^\n(]*\b{name}\b|^    {name},?$"
    return re.search(made, source, re.MULTILINE) is not None
