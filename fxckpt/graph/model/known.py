"""The models that compiled graphs belong to, and the names of what is in them."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from fxckpt.graph.model import names
from fxckpt.graph.model.joint import JointTrace, is_frozen


class KnownModels:
    """The models that were seen, held weakly, and by reference what belongs to no model that could be found.

    ``of`` in a method: only of models that own one of these parameters.
    """

    def __init__(self, lock: threading.RLock):
        self._lock = lock  # the book's
        self._models: list[weakref.ref[nn.Module]] = []
        self._loose: dict[str, list[tuple[TensorWeakRef, str]]] = defaultdict(list)

    def add(self, trace: JointTrace) -> None:
        """Take in the models of a new trace; one that is part of another is not kept."""
        for root in (found for ref in trace.roots if (found := ref()) is not None):
            parts = {id(m) for m in root.modules()}
            others = [other for other in self.alive() if id(other) not in parts]
            inside = any(root is m for other in others for m in other.modules())
            self._models = [weakref.ref(m) for m in (others if inside else [*others, root])]
        if not trace.roots:
            self._loose["params"] += [(ref, param.name) for ref, param in trace.params]
            self._loose["buffers"] += trace.buffers
            self._loose["frozen"] += trace.frozen

    def alive(self) -> list[nn.Module]:
        """The models, less those that died."""
        return [model for ref in self._models if (model := ref()) is not None]

    def names(self) -> list[tuple[str, nn.Parameter]]:
        """Each parameter of the models that were seen, with its FQN; with two models, a name may be there twice."""
        return self._all(names.named_parameters, "params", None)

    def name_of(self, param: Tensor) -> str | None:
        """The FQN of ``param``, also where no graph has used it (an ``nn.LSTM`` is never compiled)."""
        return self.names_by_id().get(id(param))

    def names_by_id(self) -> dict[int, str]:
        """``name_of`` for all parameters at once: finding them takes a walk through the models, however many are asked for."""
        return {id(param): name for name, param in self.names()}

    def buffers(self, of: Iterable[Tensor] | None = None) -> list[tuple[str, Tensor]]:
        """The buffers ``state_dict`` would hold, as they are now."""
        return self._all(names.named_buffers, "buffers", of)

    def transient(self, of: Iterable[Tensor] | None = None) -> list[tuple[str, Tensor]]:
        """The buffers ``state_dict`` would leave out."""
        return self._all(partial(names.named_buffers, persistent=False), "transient", of)

    def frozen(self, of: Iterable[Tensor] | None = None) -> list[tuple[str, nn.Parameter]]:
        """The parameters that do not require grad."""
        return [(name, p) for name, p in self._all(names.named_parameters, "frozen", of) if is_frozen(p)]

    def _all(self, read: Callable[[nn.Module], list[Any]], loose: str, of: Iterable[Tensor] | None) -> list[Any]:
        wanted = None if of is None else {id(t) for t in of}
        with self._lock:
            models = [m for m in self.alive() if wanted is None or any(id(p) in wanted for p in m.parameters())]
            found = {id(t): (name, t) for ref, name in self._loose[loose] if (t := ref()) is not None}
            found |= {id(t): (name, t) for model in models for name, t in read(model)}
        return list(found.values())
