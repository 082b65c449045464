"""Which host a rank is on, and which other rank keeps its replica."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

VARIABLE = "FXCKPT_HOST"
"""Where the environment says by which name or address other hosts reach this one; else it is the host's name."""

LOOPBACK = "127.0.0.1"


def own_host() -> str:
    """The name by which others reach this host, which is the failure domain of all ranks on it."""
    return os.environ.get(VARIABLE) or socket.gethostname()


def keeper_of(rank: int, hosts: Sequence[str]) -> int:
    """Who keeps the replica of this rank, by all ranks' ``hosts``: the first one on another host, counted from as many ranks on
    as there are on its own; where all are on one host, the next rank. There are two ranks at least."""
    world, local = len(hosts), sum(host == hosts[rank] for host in hosts)
    order = [(rank + local + number) % world for number in range(world)]
    return next((other for other in order if hosts[other] != hosts[rank]), (rank + 1) % world)


def address_of(other: str, own: str) -> str:
    """Where a rank on host ``other`` is reached from host ``own``."""
    return LOOPBACK if other == own else other
