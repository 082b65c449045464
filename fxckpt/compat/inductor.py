"""Inductor: compiling a model's graph, reading its joint graph, and taking one kernel out of it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from fxckpt.errors import SetupError

Reader = Callable[[fx.Graph], None]
"""Is shown the joint graph."""


def inductor_kernel(fn: Callable[..., Any], example: Sequence[torch.Tensor]) -> tuple[list[str], str, tuple[Any, ...]]:
    """The C++ that Inductor writes for ``fn`` on ``example``, sequential, and what it would be called with.

    Returns the C types of the kernel's arguments, its source (one function named ``kernel``), and the arguments of its call:
    tensors of ``example`` (the very same memory) and lengths. Sizes stay symbolic. Nothing is compiled, and ``example`` is not
    changed. Raises ValueError where Inductor does not make exactly one kernel of it.

    ``AsyncCompile.cpp_pybinding`` is where generated C++ goes to the compiler; its wrapper checks every argument in Python at
    each call, which costs more than updating 64x64 elements, so only the kernel is taken.
    """
    from torch._inductor import config, standalone_compile
    from torch._inductor.async_compile import AsyncCompile
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        gm = make_fx(fn, tracing_mode="symbolic")(*example)
    inputs = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    calls: list[tuple[list[str], str, tuple]] = []
    owner: Any = AsyncCompile
    original = owner.cpp_pybinding

    def capture(this: Any, argtypes: list[str], source: str) -> Callable:
        def kernel(*args: Any) -> Any:
            if _capturing:
                return _capturing[-1].append((argtypes, source, args))
            # Inductor keeps the modules that it wrote; should the same one serve somebody else, it must do its work.
            function = original(this, argtypes, source)
            return getattr(function, "result", lambda: function)()(*args)

        return kernel

    owner.cpp_pybinding = capture
    try:
        with config.patch({"cpp.threads": 1, "cpp_wrapper": False}):
            compiled = standalone_compile(gm, inputs, dynamic_shapes="from_graph")
    finally:
        owner.cpp_pybinding = original
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
def _cpp_cache() -> Any:
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


def compiler_settings() -> tuple[Any, ...]:
    """All that decides what :func:`load_cpp` makes of a source, but the source: Inductor's settings for C++, the variables it and
    compilers read, and what this processor can do, for which the code is made."""
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


def joint_pass(read: Reader, users: Any) -> Any:
    """A ``joint_custom_pre_pass`` that shows the joint graph to ``read``, then runs the user's own pass or passes. Inductor has
    one slot for such a pass, and hashes its ``uuid()`` into the cache keys. Ours never changes the graph, so its part is a
    constant; a user's pass without a uuid turns the caches off, as it does without us."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    chain = users if isinstance(users, (list, tuple)) else [users] if users is not None else []

    class JointPass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            read(graph)
            for user in chain:
                user(graph)

        def uuid(self) -> Any | None:
            ids = tuple(user.uuid() if isinstance(user, CustomGraphPass) else None for user in chain)
            return ("fxckpt-reads-joint", *ids) if all(ids) else None

    return JointPass()


def compile_with_inductor(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    options: dict[str, Any],
    read: Reader | None = None,
    more: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Callable[..., Any]:
    """Compile exactly as ``torch.compile(backend="inductor", mode=mode, options=options)`` does. ``_TorchCompileInductorWrapper``
    is what that call makes: it checks the options and turns them and the mode into config patches. ``read`` joins those patches,
    so they also hold when the backward is compiled later; so does what ``more`` makes of them."""
    import torch._inductor.config as config

    try:
        wrapper: Any = torch._TorchCompileInductorWrapper(mode, options, None)
    except Exception as error:
        raise refused(f"torch.compile(backend=fxckpt.backend): {error}") from None
    if read is not None:
        user = wrapper.config.get("joint_custom_pre_pass", config.joint_custom_pre_pass)
        wrapper.config["joint_custom_pre_pass"] = joint_pass(read, user)
    if more is not None:
        wrapper.config.update(more(wrapper.config))
    return wrapper(gm, example_inputs)


@functools.cache
def _refusal() -> Any:
    """See ``refused``."""
    from torch._dynamo.exc import ShortenTraceback

    class Refused(ShortenTraceback, SetupError):
        """What a backend does not take."""

    return Refused


def refused(what: str) -> Exception:
    """The SetupError that a backend is to raise. ``torch.compile(backend="inductor")`` raises a RuntimeError for a mode or an
    option that it does not know, for it makes the wrapper above; of any other backend it keeps mode and options until the first
    call, and looks at nothing but its name. Dynamo turns what a backend raises into ``BackendCompilerFailed``, but for errors
    of this base."""
    return _refusal()(what, first_useful_frame=None)


def compile_with_backend(
    compiler: str | Callable[..., Any],
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    options: dict[str, Any],
    read: Reader | None = None,
) -> Callable[..., Any]:
    """Compile with another backend, as ``torch.compile(backend=compiler)`` does. ``lookup_backend`` is what turns a name into a
    backend. The joint pass is set around the call, for compilers that use Inductor's front end."""
    from torch._dynamo.backends.registry import lookup_backend

    kwargs = {k: v for k, v in {"mode": mode, "options": options}.items() if v and v != "default"}
    function: Any = lookup_backend(compiler)
    if read is None:
        return function(gm, example_inputs, **kwargs)
    import torch._inductor.config as config

    with config.patch(joint_custom_pre_pass=joint_pass(read, config.joint_custom_pre_pass)):
        return function(gm, example_inputs, **kwargs)


def compile_with(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    options: dict[str, Any] | None,
    more: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Callable[..., Any]:
    """Compile with Inductor, or what ``options={"inner": compiler}`` names; nothing is read. ``more``: see
    ``compile_with_inductor``."""
    options = dict(options or {})
    inner = options.pop("inner", "inductor")
    if inner == "inductor":
        return compile_with_inductor(gm, example_inputs, mode, options, more=more)
    return compile_with_backend(inner, gm, example_inputs, mode, options)


def reset_cudagraphs() -> None:
    """What ``torch._dynamo.reset()`` asks of an Inductor backend: forget the CUDA graphs it recorded."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()
