"""A pass that goes on with another number of ranks than it began with: where each stands in the order that all share."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from fxckpt.errors import SetupError

log: logging.Logger = logging.getLogger("fxckpt")

PLACE = frozenset({"num_replicas", "rank", "num_samples", "total_size"})
"""What a ``DistributedSampler`` keeps of whose share it is: as the script makes it, whatever a checkpoint has."""


def moved(loader: DataLoader[Any], state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of a loader, for this rank of so many as there are now.

    A ``DistributedSampler`` puts all indices into one order and gives every ``num_replicas``-th to a rank: when each of ``n``
    ranks has handed out ``p`` batches, those are the first ``n * p`` batches' samples of that order. So each of ``m`` ranks goes
    on at its batch ``n * p / m``; where that is a fraction, some samples are seen again. Raises SetupError for a sampler whose
    order is its own.
    """
    sampler, before = loader.sampler, state["samplers"].get("sampler", {}).get("attributes", {})
    if not isinstance(sampler, DistributedSampler) or not state["running"]:
        return state
    was, now, size = before.get("num_replicas", sampler.num_replicas), sampler.num_replicas, loader.batch_size
    if was == now:
        return state
    of_torch = type(sampler).__iter__ is DistributedSampler.__iter__ and type(loader.batch_sampler) is BatchSampler
    if not of_torch or size is None:
        raise SetupError(
            f"the pass over this {type(loader).__name__} began with {was} ranks, and there are {now}: which samples were seen "
            f"only its {type(sampler).__name__} knows. Go on with {was} ranks, or from a checkpoint between two passes"
        )
    seen = min(state["position"] * size, before["num_samples"]) * was
    position = seen // (size * now)
    again = seen - position * size * now
    log.warning("fxckpt: a pass began with %d ranks and goes on with %d, behind the %d samples that were seen%s", was, now, seen,
                f"; {again} of them are seen again" if again else "")  # fmt: skip
    found = {**state, "position": position, "order": None}
    if "workers" in state:
        found["workers"] = {**state["workers"], "position": position, "next": position % max(loader.num_workers, 1)}
    return found
