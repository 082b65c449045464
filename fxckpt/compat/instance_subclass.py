"""Give an object a class that does more and looks like its own; the object stays the same, whoever else has it.

What is swapped is the class of one instance (as FSDP2's ``fully_shard`` does with modules), so nothing is patched globally.
"""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from typing import Any


def instance_subclass(base: type, body: Mapping[str, Any]) -> type:
    """A subclass of ``base`` with the members of ``body``; ``base`` itself if it is one already.

    Pickles and copies are of ``base``, without the attributes whose names begin with ``_fxckpt_``.
    """
    if "_fxckpt_base" in base.__dict__:
        return base

    def reduce_ex(self: Any, protocol: int) -> tuple[Any, ...]:
        state = self.__getstate__()
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if not str(key).startswith("_fxckpt_")}
        return copyreg._reconstructor, (base, object, None), state  # type: ignore[attr-defined]  # as object's own does

    looks = {"__doc__": base.__doc__, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), {**looks, "_fxckpt_base": base, "__reduce_ex__": reduce_ex, **body})
