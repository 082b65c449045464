"""Who begins a step in the middle of compiled code, and what it asks of those who see its layers come."""

from __future__ import annotations

from typing import Protocol

import torch

from fxckpt.optim.bindings import BoundParam

INSTEAD = 'Use updates="after_backward" for such a loop'


class Begins(Protocol):
    """See ``ArmedStep``."""

    def begin(self, mask: list[bool]) -> list[torch.Tensor | None]:
        """Begin a step of the parameters of ``mask``; what comes back is the list that it will read gradients from."""

    def left(self, why: str) -> None:
        """The one that was begun will not be ended."""


class Inside(Protocol):
    """See ``InBackward`` and ``InGraph``. ``open``: a step was begun, which ``opt.step()`` ends; ``complete``: what began it is
    over."""

    open: bool
    complete: bool

    def consumed(self) -> dict[int, BoundParam]:
        """The parameters that were updated already, by index. Raises SetupError if the loop did what the step must not miss."""

    def refuse_rest(self) -> None:
        """Raises SetupError if ``opt.step()`` would make the rest of a step that was left."""

    def observe(self, unusual: str | None) -> None:
        """``opt.step()`` begins, or ends what was begun; ``unusual``: how it was called, if it was in an unusual way."""

    def ended(self) -> None:
        """The step is over."""

    def leave(self, why: str) -> None:
        """The step that is open will not be ended."""
