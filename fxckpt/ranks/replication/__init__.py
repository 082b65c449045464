"""Replicas of checkpoints on another rank's disk, for ranks with stores on disks of their own: a disk or a host may be lost.

hosts.py        which host a rank is on, and who keeps whose replica
wire.py         one connection: proofs, small messages, bytes
transfer.py     one checkpoint over it, checked as it arrives
keeper.py       takes in what others send, gives out what lies here
sender.py       sends this rank's own, on a thread of its own
replication.py  all of it, of one run

Which step is sent is said in ``common.py``: all ranks send the same one, else none would be common to all replicas.
"""

from fxckpt.ranks.replication.hosts import keeper_of, own_host
from fxckpt.ranks.replication.replication import Replication
from fxckpt.ranks.replication.wire import SECRET, Lost, Refused

__all__ = ["SECRET", "Lost", "Refused", "Replication", "keeper_of", "own_host"]
