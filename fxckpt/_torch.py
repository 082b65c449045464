"""The one module that touches private APIs of torch, each with the reason, each with a feature test.

Feature tests: ``tests/test_torch_private.py``.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import functools
import glob
import inspect
import operator
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode

from fxckpt.disguise import disguised
from fxckpt.errors import SetupError

# ---- optimizers (used by graph/update.py, optimizer.py) --------------------------------------------------------

GROUP_BOOKKEEPING = frozenset(
    {"params", "param_names", "initial_lr", "swa_lr", "base_momentum", "max_momentum", "max_lr", "min_lr"}
)
"""Entries of a group that no optimizer's arithmetic reads: its parameters, and what schedulers leave there."""


def unhooked_step(opt: torch.optim.Optimizer):
    """The plain function behind ``type(opt).step``, without the hook wrapper and without the grad-mode wrapper.

    ``Optimizer.__init__`` puts ``profile_hook_step`` on the class (marked ``hooked``); under it most optimizers have
    ``_use_grad_for_differentiable``, which would ask Dynamo for a graph break. Both keep ``__wrapped__``.
    """
    step = plain_class(opt).step
    while hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    return step


def settings_of(opt: torch.optim.Optimizer) -> frozenset[str]:
    """The entries of a parameter group that a class of ``torch.optim`` can read: what it takes, and what it has as defaults.
    Users keep more in their groups: a name, a factor for a scheduler, tables."""
    return (_arguments_of(plain_class(opt)) | opt.defaults.keys()) - GROUP_BOOKKEEPING


@functools.cache
def _arguments_of(cls: type) -> frozenset[str]:
    return frozenset(inspect.signature(cls.__init__).parameters)


def stock_step(opt: torch.optim.Optimizer):
    """The stock step as a user would call it, less the hooks (they fire once, in our own wrapper)."""
    step = plain_class(opt).step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def modes_active() -> bool:
    """Does a mode of this thread see operators (a FLOP counter, a device context)? Other threads do not have it.

    The depths of the two stacks are private; the public way to push a mode has no public way to ask.
    """
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


@functools.cache
def _thread_counts() -> tuple[Callable[[int], None], Callable[[int], int] | None] | None:
    """What sets how many threads kernels of the calling thread use: OpenMP's function, and MKL's, which gives back the value
    before it. None where ATen runs on something else.

    ``torch.set_num_threads`` does not do: it also changes what threads that start later get.
    """
    path = glob.glob(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.*"))
    library = ctypes.CDLL(path[0]) if path else None
    openmp, mkl = (getattr(library, name, None) for name in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"))
    if openmp is None or "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    openmp.argtypes, openmp.restype = [ctypes.c_int], None
    if not torch.backends.mkl.is_available():
        return openmp, None
    if mkl is None:
        return None
    mkl.argtypes, mkl.restype = [ctypes.c_int], ctypes.c_int
    return openmp, mkl


def can_use_one_core() -> bool:
    """Does :func:`one_core` work with this build of torch?"""
    return _thread_counts() is not None


@contextlib.contextmanager
def one_core():
    """Kernels that this thread runs inside use no other thread. Other threads keep what they have.

    A thread that opens a parallel region gets a team of its own; more threads than cores then make OpenMP sleep at
    every barrier of the process (libgomp throttles its spinning), which takes 20 times as long.
    """
    before, (openmp, mkl) = torch.get_num_threads(), _thread_counts()
    openmp(1)
    mkl_before = mkl(1) if mkl is not None else 0
    try:
        yield
    finally:
        openmp(before)
        if mkl is not None:
            mkl(mkl_before)


set_grad_mode: Callable[[bool], None] = torch._C._set_grad_enabled
"""What ``torch.no_grad`` calls on its way in and out: those seven Python calls take 40 µs when their code is cold."""


def plain_class(opt: torch.optim.Optimizer) -> type:
    """The class the user made: the first one of the MRO that is not ours."""
    return next(c for c in type(opt).__mro__ if "_fxckpt_base" not in c.__dict__)


def is_stock(opt: torch.optim.Optimizer) -> bool:
    """Is it an optimizer of ``torch.optim`` itself, and not of a class that only has its name or derives from it?"""
    cls = plain_class(opt)
    return cls is getattr(torch.optim, cls.__name__, None)


def inner_hooks(opt: torch.optim.Optimizer) -> bool:
    """Are hooks registered, on ``opt`` or for all optimizers, that the step of one of its base classes would call too?

    ``Optimizer.__init__`` marks each step that it wraps with ``hooked``.
    """
    cls = plain_class(opt)
    inner = [step for c in cls.__mro__ if (step := vars(c).get("step")) is not None and step is not cls.step]
    return _has_hooks(opt) and any(getattr(step, "hooked", False) for step in inner)


def _has_hooks(opt: torch.optim.Optimizer) -> bool:
    """Are hooks of ``step`` registered, on ``opt`` or for all optimizers? Nothing public lists them."""
    return bool(
        opt._optimizer_step_pre_hooks
        or opt._optimizer_step_post_hooks
        or optimizer._global_optimizer_pre_hooks
        or optimizer._global_optimizer_post_hooks
    )


def hooked(function: Callable) -> Callable:
    """Wrap ``function`` as ``Optimizer.__init__`` wraps ``step``: a region for profilers, and pre and post hooks, once each.

    With no hook and no profiler none of that is to be done, and PyTorch's wrapper would take a fifth of a millisecond for it
    after a backward pass, when its code is cold. (An ``ExecutionTraceObserver`` without a profiler cannot be seen: its trace
    lacks the region.) Private: ``Optimizer.profile_hook_step``, the flags of profilers (one is a thread's own, one the legacy
    profiler does not set), and the mark ``hooked``, without which ``__setstate__`` wraps a second time and hooks fire twice
    (seen after ``load_state_dict``).
    """
    full, profiler = torch.optim.Optimizer.profile_hook_step(function), torch.autograd.profiler
    by_daemon = "KINETO_USE_DAEMON" in os.environ  # profiles begin from outside then, and set no flag

    @functools.wraps(function)
    def wrapper(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if profiler._is_profiler_enabled or torch.autograd._profiler_enabled() or by_daemon or _has_hooks(self):
            return full(self, *args, **kwargs)
        out = function(self, *args, **kwargs)
        if _has_hooks(self):  # registered meanwhile, by a closure
            for hook in (*self._optimizer_step_post_hooks.values(), *optimizer._global_optimizer_post_hooks.values()):
                hook(self, (self, *args), kwargs)
        return out

    wrapper.hooked = True
    return wrapper


def untraced(function: Callable) -> Callable:
    """``torch.compiler.disable``, at no cost while nothing is compiled: it takes a tenth of a millisecond when its code is
    cold, as it is after a backward pass.

    Dynamo sees a frame only while a callback is set. The attribute is what it looks for where it would inline a call, and
    ``skip_code`` keeps it from the frame itself; all three are private. Without them: ``torch.compiler.disable`` itself.
    """
    disabled = torch.compiler.disable(function)
    try:
        from torch._C._dynamo.eval_frame import get_eval_frame_callback
        from torch._dynamo.eval_frame import skip_code
    except ImportError:
        return disabled

    @functools.wraps(function)
    def quick(*args: Any, **kwargs: Any) -> Any:
        if get_eval_frame_callback() is None:
            return function(*args, **kwargs)
        return disabled(*args, **kwargs)

    quick._torchdynamo_disable, quick._torchdynamo_disable_msg = True, None
    skip_code(quick.__code__)
    return quick


def rebind_scheduler_wrapper(opt: torch.optim.Optimizer) -> bool:
    """Make a step wrapper that an LR scheduler put on the *instance* call the class's new step; True if there was one.

    ``LRScheduler.__init__`` stores a wrapper around the old function in ``opt.step``. Deleting it makes the scheduler
    warn that the step was overridden; so another one takes its place that keeps its mark and sets its flag.
    Raises SetupError if ``step`` was replaced on the instance by something else.
    """
    current = opt.__dict__.get("step")
    if current is None:
        return False
    if not getattr(current, "_wrapped_by_lr_sched", False):
        raise SetupError(
            f"opt.step of this {type(opt).__name__} was replaced by {current!r}; fxckpt cannot see the "
            "steps through it. Call compile_step before that wrapper is installed."
        )
    owner = weakref.ref(opt)

    @functools.wraps(type(opt).step)
    def step(*args, **kwargs):
        this = owner()
        this._opt_called = True
        return type(this).step(this, *args, **kwargs)

    step._wrapped_by_lr_sched = True
    opt.step = step
    return True


def count_skipped_attempts(scaler: Any, opt: torch.optim.Optimizer, skipped: Callable[[], None]) -> None:
    """Call ``skipped()`` each time ``scaler`` decides, on an inf, not to call ``opt.step()`` at all.

    ``GradScaler._maybe_opt_step`` is where that is decided. The class of this one instance is swapped for a subclass, as the
    optimizer's is; pickles and copies of it are of the plain class.
    """
    scaler.__class__ = _watched_class(type(scaler))
    scaler.__dict__.setdefault("_fxckpt_watchers", []).append((opt, skipped))


@functools.cache
def _watched_class(base: type) -> type:
    """A scaler's class that tells its watchers."""

    def maybe(self, optimizer, optimizer_state, *args, **kwargs):
        told = [skipped for watched, skipped in self._fxckpt_watchers if watched is optimizer]
        found = sum(v.item() for v in optimizer_state["found_inf_per_device"].values()) if told else 0
        out = base._maybe_opt_step(self, optimizer, optimizer_state, *args, **kwargs)
        for skipped in told if found else ():
            skipped()
        return out

    return disguised(base, {"_maybe_opt_step": maybe})


def default_implementation(param: torch.Tensor) -> str:
    """What an optimizer picks when neither ``foreach`` nor ``fused`` is given: see ``_default_to_fused_or_foreach``."""
    from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices

    return "foreach" if param.device.type in _get_foreach_kernels_supported_devices() else "single"


@dataclass(frozen=True)
class FakeTrace:
    """What ``trace_fake`` found: the graph, the branches taken on symbolic numbers, and who those symbols are."""

    graph: fx.Graph
    branches: list[tuple[Any, bool]]  # sympy expression, and how it was decided
    symbols: dict[Any, fx.Node]  # sympy symbol -> the node that reads it (``item()``)


def trace_fake(fn: Callable, args: Sequence[torch.Tensor], script: Sequence[bool] = ()) -> FakeTrace:
    """``make_fx`` of ``fn`` on fake copies of ``args``; ``item()`` gives symbolic doubles.

    A branch on such a number cannot be decided while tracing: ``script`` says how, first branch first, and what it does
    not say is taken as true. ``make_fx`` itself would raise GuardOnDataDependentSymNode, and knows no way to be told.
    """
    import sympy
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

    branches: dict[Any, bool] = {}

    class Scripted(ShapeEnv):
        def evaluate_expr(self, orig_expr, *args, **kwargs):
            if orig_expr in branches:
                return sympy.true if branches[orig_expr] else sympy.false
            try:
                return super().evaluate_expr(orig_expr, *args, **kwargs)
            except GuardOnDataDependentSymNode:
                if not isinstance(orig_expr, (sympy.core.relational.Relational, sympy.logic.boolalg.BooleanFunction)):
                    raise
                branches[orig_expr] = script[len(branches)] if len(branches) < len(script) else True
                return sympy.true if branches[orig_expr] else sympy.false

    mode = FakeTensorMode(shape_env=Scripted(allow_scalar_outputs=True), static_shapes=True)
    fakes = [mode.from_tensor(t.detach()) for t in args]
    with mode, torch.no_grad():
        graph = make_fx(fn)(*fakes).graph
    symbols = {
        value.node.expr: node
        for node in graph.nodes
        if isinstance(value := node.meta.get("val"), (torch.SymFloat, torch.SymInt, torch.SymBool))
        and node.op == "call_function"
        and isinstance(value.node.expr, sympy.Symbol)
    }
    return FakeTrace(graph, list(branches.items()), symbols)


def branch_node(graph: fx.Graph, expression: Any, symbols: dict[Any, fx.Node]) -> fx.Node:
    """Compute a sympy ``expression`` at the end of ``graph``, in Python numbers; raises KeyError for an unknown symbol.

    torch writes its own deferred asserts into graphs this way; nothing public turns such an expression into nodes.
    """
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    tracer = fx.proxy.GraphAppendingTracer(graph)
    known = {symbol: fx.Proxy(symbols[symbol], tracer) for symbol in expression.free_symbols}
    with graph.inserting_before(output):
        return sympy_interp(PythonReferenceAnalysis, known, expression).node


class _NumbersIntoTensors(TorchFunctionMode):
    """``torch.as_tensor`` of a symbol: it would ask for the symbol's value, ``scalar_tensor`` takes it as it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.as_tensor and isinstance(args[0], (torch.SymFloat, torch.SymInt)):
            return torch.scalar_tensor(args[0], **{"dtype": torch.get_default_dtype(), **kwargs})
        return func(*args, **kwargs)


@contextlib.contextmanager
def symbolic_numbers(opt: torch.optim.Optimizer):
    """While this lasts, the step of ``opt``'s class can compute with symbols where Python would want their values.

    ``max`` and ``min`` branch, ``torch.sym_max`` is one node of a graph; they are replaced in the class's own module, and
    only in modules of ``torch.optim``.
    """
    names = unhooked_step(opt).__globals__
    if not names["__name__"].startswith("torch.optim."):
        yield
        return
    assert "max" not in names and "min" not in names

    def either(symbolic, builtin):
        def extreme(*values, **options):
            plain = len(values) == 2 and all(isinstance(v, (int, float, torch.SymInt, torch.SymFloat)) for v in values)
            if not plain or options:
                return builtin(*values, **options)
            first, second = values
            if isinstance(first, float) and isinstance(second, torch.SymFloat):
                first = torch.SymFloat(second.node.wrap_float(first))  # or they change places, and max(1.0, nan) is 1.0
            return symbolic(first, second)

        return extreme

    names["max"], names["min"] = either(torch.sym_max, builtins.max), either(torch.sym_min, builtins.min)
    try:
        with _NumbersIntoTensors():
            yield
    finally:
        del names["max"], names["min"]


@functools.cache
def fake_mode() -> Any:
    """The mode in which stand-ins live: tensors with type, shape, strides and device, and no memory.

    ``FakeTensorMode`` is private, and the only thing that computes what an operator would return without running it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that looks like ``tensor`` and has no memory."""
    with fake_mode():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def is_stand_in(value: Any) -> bool:
    """Was it made by ``stand_in``, or by an operator from such a one?"""
    return isinstance(value, _fake_tensor())


@functools.cache
def _fake_tensor() -> type:
    from torch._subclasses.fake_tensor import FakeTensor

    return FakeTensor


@functools.cache
def _watchers() -> tuple[type, type]:
    """The two modes of ``watched``; ``TorchDispatchMode`` has no public name."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchFunctionMode):
        def __init__(self, called: Callable):
            super().__init__()
            self.called = called

        def __torch_function__(self, func, types, args=(), kwargs=None):
            return self.called(func, args, kwargs or {})

    class Operators(TorchDispatchMode):
        def __init__(self, dispatched: Callable):
            super().__init__()
            self.dispatched = dispatched

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return self.dispatched(func, args, kwargs or {})

    return Calls, Operators


@contextlib.contextmanager
def watched(called: Callable, dispatched: Callable):
    """While this lasts, every call of PyTorch's Python functions goes to ``called(func, args, kwargs)``, attributes of tensors
    among them, and every operator that runs to ``dispatched(func, args, kwargs)``; they return what the caller gets.

    A function that ``torch.compile`` made raises RuntimeError meanwhile, before Dynamo sees it: it would find the modes, give
    up, and run that function eagerly ever after. FX's own mark of a trace under way is what such functions ask.
    """
    calls, operators = _watchers()
    mark = fx._symbolic_trace
    before, mark._is_fx_tracing_flag = mark._is_fx_tracing_flag, True
    try:
        with calls(called), operators(dispatched):
            yield
    finally:
        mark._is_fx_tracing_flag = before


def symbolic_float(tensor: torch.Tensor, positive: bool | None):
    """``tensor.item()`` as a symbol; its sign, when given, is asserted so that ``if momentum != 0`` can be decided."""
    value = tensor.item()
    if positive is not None:
        torch._check(value != 0)
        torch._check(value > 0 if positive else value < 0)
    return value


def inductor_kernel(fn: Callable, example: Sequence[torch.Tensor]) -> tuple[list[str], str, tuple]:
    """The C++ that Inductor writes for ``fn`` on ``example``, sequential, and what it would be called with.

    Returns the C types of the kernel's arguments, its source (one function named ``kernel``), and the arguments of its
    call: tensors of ``example`` (the very same memory) and lengths. Sizes stay symbolic. Nothing is compiled, and
    ``example`` is not changed. Raises ValueError where Inductor does not make exactly one kernel of it.

    ``AsyncCompile.cpp_pybinding`` is where generated C++ goes to the compiler; its wrapper checks every argument in
    Python at each call, which costs more than updating 64x64 elements, so only the kernel is taken.
    """
    from torch._inductor import config, standalone_compile
    from torch._inductor.async_compile import AsyncCompile
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        gm = make_fx(fn, tracing_mode="symbolic")(*example)
    inputs = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    calls: list[tuple[list[str], str, tuple]] = []
    original = AsyncCompile.cpp_pybinding

    def capture(this: Any, argtypes: list[str], source: str) -> Callable:
        def kernel(*args: Any) -> Any:
            if _capturing:
                return _capturing[-1].append((argtypes, source, args))
            # Inductor keeps the modules that it wrote; should the same one serve somebody else, it must do its work.
            function = original(this, argtypes, source)
            return getattr(function, "result", lambda: function)()(*args)

        return kernel

    AsyncCompile.cpp_pybinding = capture
    try:
        with config.patch({"cpp.threads": 1, "cpp_wrapper": False}):
            compiled = standalone_compile(gm, inputs, dynamic_shapes="from_graph")
    finally:
        AsyncCompile.cpp_pybinding = original
    _capturing.append(calls)
    try:
        compiled(*example)
    finally:
        _capturing.pop()
    if len(calls) != 1:
        raise ValueError(f"Inductor made {len(calls)} kernels of it")
    return calls[0]


_capturing: list[list] = []  # where the kernels of inductor_kernel note their calls


@functools.cache
def _cpp_cache() -> type:
    """Inductor's compiler driver with its flags for kernels: cached on disk by source, shared between processes."""
    from torch._inductor.codecache import CppCodeCache

    class Kernels(CppCodeCache):
        cache: dict[str, Any] = {}  # noqa: RUF012 (the base has one of its own too)
        cpp_compile_command_flags = {"include_pytorch": False, "shared": True}  # noqa: RUF012

    return Kernels


def cache_folder() -> str:
    """Where Inductor keeps what it made, ``$TORCHINDUCTOR_CACHE_DIR`` or its default; there is no public name for it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def compiler_settings() -> tuple:
    """All that decides what :func:`load_cpp` makes of a source, but the source: Inductor's settings for C++, the variables
    it and compilers read, and what this processor can do, for which the code is made."""
    from torch._inductor import config

    chosen = sorted((k, repr(v)) for k, v in config.get_config_copy().items() if k.startswith("cpp"))
    variables = [(k, os.environ.get(k)) for k in ("CXX", "CXXFLAGS", "CPATH", "ATEN_CPU_CAPABILITY")]
    try:
        with open("/proc/cpuinfo") as file:
            processor = sorted({line for line in file if line.startswith(("flags", "Features", "model name"))})
    except OSError:
        processor = [torch.backends.cpu.get_cpu_capability()]
    return chosen, variables, processor


def load_cpp(source: str) -> Any:
    """Compile C++ with Inductor's flags (vector units, OpenMP, its headers) and load it; a ``ctypes.CDLL``."""
    return _cpp_cache().load(source)


# ---- the backend (used by backend.py, graph/joint.py, graph/names.py) ----------------------------------

_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "CheckpointWrapper", "_checkpoint_wrapped_module"),
)


def wrapped_module(module: torch.nn.Module) -> torch.nn.Module | None:
    """The model inside torch's own wrapper ``module``, or None if it is no wrapper.

    The attributes that hold it are private; the types are looked up only where their module is imported already.
    """
    for where, name, attribute in _WRAPPERS:
        kind = getattr(sys.modules.get(where), name, None)
        if kind is not None and isinstance(module, kind):
            return getattr(module, attribute)
    return None


def own_buffers(module: torch.nn.Module, persistent: bool) -> list[tuple[str, torch.Tensor]]:
    """The module's own buffers that ``state_dict`` holds, or the others; nothing public tells them apart."""
    skipped = module._non_persistent_buffers_set
    own = module.named_buffers(recurse=False, remove_duplicate=False)
    return [(name, tensor) for name, tensor in own if (name not in skipped) == persistent]


def called_modules() -> list[torch.nn.Module]:
    """The modules whose call is under way on this thread, outermost first.

    Read from the stack, since no API tells a backend which model it compiles. ``Module.__call__`` is a frame
    of its own in front of every forward, hooked or compiled, so other methods of a module (a trainer's) do
    not count.
    """
    code = torch.nn.Module.__call__.__code__
    frame, found = inspect.currentframe(), []
    while frame is not None:
        if frame.f_code is code:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found[::-1]


def graph_input(node: fx.Node, example: Any) -> tuple[Any, Any]:
    """``(live object, Dynamo's source or None)`` of a placeholder; valid during the backend call only.

    ``grapharg`` is Dynamo's record of the input. It still holds the live parameter where the example does
    not: DDP's splits are compiled with fake examples. In the second split an activation has no ``grapharg``.
    """
    arg = node.meta.get("grapharg")
    if arg is None:
        return example, None
    return arg.example, arg.source


def source_name(source: Any) -> str:
    """Dynamo's path to an input, as text; a method in 2.11, a property in 2.13."""
    return source.name() if callable(source.name) else source.name


def compiling_scope() -> dict[str, dict[str, Any]] | None:
    """Locals and globals of the frame that Dynamo compiles right now, by the names its sources use; None outside."""
    from torch._dynamo.symbolic_convert import tls

    tx = getattr(tls, "current_tx", None)
    return None if tx is None else {"L": tx.output.local_scope, "G": tx.output.global_scope}


def compiled_module() -> weakref.ref | None:
    """The module whose method Dynamo compiles right now: the ``self`` of that frame. None where there is none.

    With ``block.compile()`` this is the block; the outermost module being called is the whole model.
    """
    scope = compiling_scope()
    owner = None if scope is None else scope["L"].get("self")
    return weakref.ref(unwrap_model(owner)) if isinstance(owner, torch.nn.Module) else None


def first_module(source: Any, scope: dict[str, dict[str, Any]] | None) -> torch.nn.Module | None:
    """The outermost module on the path ``source``, followed in ``scope``; None where it cannot be followed."""
    steps = []
    while source is not None:
        steps.append(source)
        source = getattr(source, "base", None)
    value = _start(steps.pop(), scope)
    while not isinstance(value, torch.nn.Module) and value is not None and steps:
        value = _follow(value, steps.pop())
    return value if isinstance(value, torch.nn.Module) else None


def _start(source: Any, scope: dict[str, dict[str, Any]] | None) -> Any:
    if scope is None:
        return None
    if hasattr(source, "local_name"):
        return scope["L"].get(source.local_name)
    return scope["G"].get(getattr(source, "global_name", None))


def _follow(value: Any, step: Any) -> Any:
    if hasattr(step, "member"):
        return getattr(value, step.member, None)
    if not hasattr(step, "index"):
        return value  # a source that only marks what its base is
    try:
        return value[step.index]
    except (TypeError, LookupError):
        return None


def compile_under_way() -> tuple[int | None, weakref.ref | None]:
    """``(frame, token)``: a recompile keeps the frame and has another token; DDP's splits of a compile share both.

    ``torch.compiler`` offers no name for either. The frame's number starts again at 0 after
    ``torch._dynamo.reset()``; the token is Dynamo's context of this one compile.
    """
    current = torch._guards.CompileContext.current_compile_id()
    context = torch._guards.TracingContext.try_get()
    return getattr(current, "frame_id", None), None if context is None else weakref.ref(context)


def input_index(desc: Any) -> int | None:
    """Dynamo's placeholder index behind an AOTAutograd input descriptor, through subclass and view unpacking.

    The descriptors are AOTAutograd's only record of which placeholder of the joint graph is which input.
    """
    while desc is not None:
        if type(desc).__name__ == "PlainAOTInput":
            return desc.idx
        desc = getattr(desc, "base", None) or getattr(desc, "base_of", None)
    return None


def gradient_of(desc: Any) -> int | None:
    """Dynamo's placeholder index of the input whose gradient an AOTAutograd output is; None for other outputs."""
    while type(desc).__name__ == "SubclassGetAttrAOTOutput":
        desc = desc.base
    return input_index(desc.grad_of) if type(desc).__name__ == "GradAOTOutput" else None


def is_view(node: fx.Node) -> bool:
    """Whether the node's result may share memory with its input: by the alias sets of the operator's schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.target is operator.getitem
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def joint_pass(read: Callable[[fx.Graph], None], users: Any) -> Any:
    """A ``joint_custom_pre_pass`` that shows the joint graph to ``read``, then runs the user's own pass or passes.

    Inductor has one slot for such a pass, and hashes its ``uuid()`` into the cache keys. Ours never changes
    the graph, so its part is a constant; a user's pass without a uuid turns the caches off, as it does
    without us.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    chain = tuple(users) if isinstance(users, (list, tuple)) else () if users is None else (users,)

    class JointPass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            read(graph)
            for user in chain:
                user(graph)

        def uuid(self) -> Any | None:
            ids = tuple(user.uuid() if isinstance(user, CustomGraphPass) else None for user in chain)
            return ("fxckpt-reads-joint", *ids) if all(ids) else None

    return JointPass()


def inductor(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    options: dict,
    read: Callable[[fx.Graph], None] | None = None,
) -> Callable[..., Any]:
    """Compile exactly as ``torch.compile(backend="inductor", mode=mode, options=options)`` does.

    ``_TorchCompileInductorWrapper`` is what that call makes: it checks the options and turns them and the
    mode into config patches. ``read`` joins those patches, so they also hold when the backward is compiled
    later.
    """
    import torch._inductor.config as config

    wrapper = torch._TorchCompileInductorWrapper(mode, options, None)
    if read is not None:
        user = wrapper.config.get("joint_custom_pre_pass", config.joint_custom_pre_pass)
        wrapper.config["joint_custom_pre_pass"] = joint_pass(read, user)
    return wrapper(gm, example_inputs)


def other_compiler(
    compiler: str | Callable,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    options: dict,
    read: Callable[[fx.Graph], None] | None = None,
) -> Callable[..., Any]:
    """Compile with another backend, as ``torch.compile(backend=compiler)`` does.

    ``lookup_backend`` is what turns a name into a backend. The joint pass is set around the call, for
    compilers that use Inductor's front end.
    """
    from torch._dynamo.backends.registry import lookup_backend

    kwargs = {k: v for k, v in {"mode": mode, "options": options}.items() if v and v != "default"}
    function = lookup_backend(compiler)
    if read is None:
        return function(gm, example_inputs, **kwargs)
    import torch._inductor.config as config

    with config.patch(joint_custom_pre_pass=joint_pass(read, config.joint_custom_pre_pass)):
        return function(gm, example_inputs, **kwargs)


def reset_cudagraphs() -> None:
    """What ``torch._dynamo.reset()`` asks of an Inductor backend: forget the CUDA graphs it recorded."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


# ---- modules (used by inventory.py, run.py) ---------------------------------------------------------------------


def unwrap_model(model: torch.nn.Module) -> torch.nn.Module:
    """The user's module inside all wrappers, found by type and not by cutting text from names."""
    while (inner := wrapped_module(model)) is not None:
        model = inner
    return model


def every_module(module: torch.nn.Module, name: str = ""):
    """``(name, module)`` of every place where a module stands, under several names if it stands there several times.

    Wrappers inside the model (``torch.compile(block)`` in a list of blocks) take no part in names, so that a checkpoint does
    not depend on what was compiled. ``named_children`` would leave out what stands twice in one parent.
    """
    module = unwrap_model(module)
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from every_module(child, f"{name}.{key}" if name else key)


def named_parameters(model: torch.nn.Module):
    """``(name, parameter)`` of every parameter, ties included, by the names of ``every_module``."""
    for prefix, module in every_module(model):
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{prefix}.{name}" if prefix else name, param


def named_buffers(model: torch.nn.Module):
    """``(name, buffer, persistent)`` of every buffer, ties included, by the names of ``every_module``."""
    for prefix, module in every_module(model):
        for persistent in (True, False):
            for name, buffer in own_buffers(module, persistent):
                yield f"{prefix}.{name}" if prefix else name, buffer, persistent


def extra_state_modules(model: torch.nn.Module):
    """``(name, module)`` of modules that keep more than tensors in their state dict (``get_extra_state``)."""
    for name, module in every_module(model):
        if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
            yield name, module


def is_transformed(tensor: torch.Tensor) -> bool:
    """Does the tensor belong to a transform of ``torch.func``? Such a one has no memory; nothing public tells."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def version(tensor: torch.Tensor) -> int:
    """How often the tensor, or another view of its memory, was changed in place. Inference tensors do not count: always 0."""
    return 0 if tensor.is_inference() else tensor._version


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Is it a subclass that keeps its values in inner tensors (DTensor, torchao's quantized states)?"""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return type(tensor) not in (torch.Tensor, torch.nn.Parameter) and is_traceable_wrapper_subclass(tensor)


def gradient_accumulator(param: torch.Tensor):
    """The autograd node that adds a gradient to ``param.grad``; DDP hooks it the same way.

    A hook on the tensor itself is visible to Dynamo; one on this node is not. It lives only while somebody holds it.
    """
    with torch.inference_mode(False), torch.enable_grad():
        return param.view_as(param).grad_fn.next_functions[0][0]


def world_size() -> int:
    """Ranks of this job: torch.distributed's if it runs, else what the launcher says."""
    import os

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's rank; 0 outside a distributed job."""
    import os

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))
