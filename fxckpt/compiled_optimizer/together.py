"""The ranks of a job open their stores together: one for all of them where all name one directory."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Sequence
from typing import Any, TypedDict

from fxckpt.compat.ranks import default_store, rank, world_size
from fxckpt.errors import RanksDisagree, SetupError
from fxckpt.ranks import Agreement, FirstStore, OtherStore, Rendezvous
from fxckpt.ranks.replication import SECRET, Replication, keeper_of, own_host
from fxckpt.store.identity import read_store_id
from fxckpt.store.lock import wait_for_monitor

log: logging.Logger = logging.getLogger("fxckpt")

APPEARS = 5.0
"""Seconds until what another machine wrote must be seen: network file systems keep what they know of a directory for a while."""


class Opened(TypedDict):
    """What rank 0 says when it has opened the store. ``found``: the checkpoints in it. ``error``: why it could not."""

    store: str
    found: int
    error: str


def agreement_here(call: str = "fxckpt.compile_step()") -> Agreement | None:
    """How the ranks agree on their stores; None for one process, or where they cannot talk."""
    if world_size() == 1 or (found := default_store()) is None:
        return None
    return Agreement(found[0], rank(), world_size(), found[1], call=call)


def open_together(
    directory: str, options: dict[str, Any], on_divergence: str, every: int | str, journal: int | str = 1
) -> FirstStore | OtherStore | None:
    """This rank's side of the store of all ranks, opened; None: there is one process, or each rank names a directory of its own.
    ``options`` are those of ``Store``. Raises SetupError if some ranks name one and others not, or take checkpoints at other
    steps; RanksDisagree if another rank cannot open it."""
    if (agreement := agreement_here()) is None:
        return None
    with agreement:
        said: list[str] = agreement.exchange("directory", os.path.realpath(directory))
        if len(set(said)) == agreement.world:
            return None
        if len(set(said)) > 1:
            raise SetupError(f"either all ranks name one directory, or each one of its own. These are neither:{_listed(said)}")
        steps: list[int | str] = agreement.exchange("every", every)
        if len(set(steps)) > 1:
            raise SetupError(f"ranks that write one store together need the same every=, on all of them:{_listed(steps)}")
        lengths: list[int | str] = agreement.exchange("journal", journal)
        if len(set(lengths)) > 1:
            raise SetupError(f"ranks that write one store together need the same journal=, on all of them:{_listed(lengths)}")
        rendezvous = Rendezvous(agreement.store, agreement.rank, agreement.world, f"{agreement.prefix}/parts")
        if agreement.rank == 0:
            return _first(agreement, FirstStore(directory, rendezvous, on_divergence=on_divergence, **options))
        return _other(agreement, rendezvous, directory, options)


def replicate(directory: str, keep: int, part: tuple[int, int]) -> Replication | None:
    """Has this rank's checkpoints kept by another rank, too, once all ranks call this; None, and a warning, in a job of one rank.
    ``keep``: how many of them; ``part``: of the store. Raises SetupError where the ranks cannot talk, or write one store."""
    if world_size() == 1:
        log.warning("fxckpt: replicas=1 needs other ranks, and this is a job of one: there are no replicas")
        return None
    if part[1] > 1:
        raise SetupError(
            f"all ranks write one store in {directory}, and replicas=1 is for ranks with a store each, on disks of their own: "
            f"name another directory on every rank (f'.../rank{{rank}}'), or leave replicas= out"
        )
    if (agreement := agreement_here("fxckpt.compile_step(replicas=1)")) is None:
        raise SetupError("replicas=1 needs a process group with a store: call torch.distributed.init_process_group() before "
                         "compile_step, on every rank")  # fmt: skip
    with agreement:
        secret = secrets.token_hex(SECRET) if agreement.rank == 0 else ""
        said: list[list[str]] = agreement.exchange("host", [own_host(), secret])
        hosts = [host for host, _ in said]
        found = Replication(directory, keep, agreement.rank, hosts)
        try:
            found.start(bytes.fromhex(said[0][1]), agreement.exchange("port", found.port))
        except BaseException:
            found.close()
            raise
    keeper = keeper_of(agreement.rank, hosts)
    if len(set(hosts)) > 1:
        log.info("fxckpt: replicas of rank %d's checkpoints go to rank %d on %s", agreement.rank, keeper, hosts[keeper])
    elif agreement.rank == 0:
        log.warning("fxckpt: all ranks are on one host, %s: a replica is in the same failure domain as its checkpoint, and both "
                    "may be lost together", hosts[0])  # fmt: skip
    return found


def _listed(said: Sequence[object]) -> str:
    """What each rank said, a line a rank."""
    return "".join(f"\n  rank {at}: {each}" for at, each in enumerate(said))


def _first(agreement: Agreement, store: FirstStore) -> FirstStore:
    """Rank 0 opens it, and tells the others."""
    error: Exception | None = None
    try:
        wait_for_monitor(store.open)
    except Exception as caught:
        error = caught
    own: Opened = {"store": store.store_id, "found": store.found, "error": "" if error is None else str(error)}
    try:
        agreement.exchange("opened", own)
        if error is not None:
            raise error
        _check_all(agreement.exchange("ready", ""))
        store.forget_ranks(agreement.world)
    except BaseException:
        store.close()
        raise
    return store


def _other(agreement: Agreement, rendezvous: Rendezvous, directory: str, options: dict[str, Any]) -> OtherStore:
    """Another rank opens its part of it."""
    opened: Opened = agreement.exchange("opened", None)[0]
    if opened["error"]:
        raise RanksDisagree(f"rank 0 could not open {directory}: {opened['error']}")
    store = OtherStore(directory, rendezvous, max_async=options["max_async"], fresh=options["fresh"], found=opened["found"])
    error: Exception | None = None
    try:
        _check_same(directory, opened["store"], agreement.rank)
        store.open()
    except Exception as caught:
        error = caught
    try:
        said = agreement.exchange("ready", "" if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        _check_all(said)
    except BaseException:
        store.close()
        raise
    return store


def _check_all(said: list[str]) -> None:
    """Raise RanksDisagree if one could not open its part."""
    if failed := [f"\n  rank {at}: {why}" for at, why in enumerate(said) if why]:
        raise RanksDisagree("other ranks could not open the store, so this one does not train:" + "".join(failed))


def _check_same(directory: str, store_id: str, rank: int) -> None:
    """Raise SetupError unless this rank sees rank 0's store there."""
    ended = time.monotonic() + APPEARS
    while (found := read_store_id(directory) if os.path.isdir(directory) else None) != store_id:
        if time.monotonic() > ended:
            raise SetupError(
                f"all ranks name {directory}, but rank {rank} does not see the store there that rank 0 has opened (it sees "
                f"{found or 'none'}): it is on another disk. Name a directory that all machines share, or one for each rank: "
                f"f'.../rank{{rank}}'"
            )
        time.sleep(0.05)
