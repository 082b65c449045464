"""What the ranks of one job say to each other, over the process group's store: no collective, and no wait without a limit.

agreement.py   one load: what each rank says, all ranks hear
heart.py       tells the others that this rank lives while it loads
choice.py      which checkpoint all of them start from, by what they said
common.py      while they train: a step that all have is kept, by promises and decisions
peers.py       the thread that sends both
replication/   sends what all have to another rank's disk
ending.py      at which step all take their last checkpoint, when a signal asks them to end

Where all write into one directory, a part of each checkpoint each:

first.py       rank 0's store: it alone commits, and gives up what is old
other.py       the store of every other rank
rendezvous.py  what they say to each other;  words.py  what there is to say
briefs.py      what each says of its part, in short;  taken.py  the parts, whose records rank 0 reads where that will not do
alike.py       what must be the same on all of them;  replicas.py  what is the same, but for a bit that flipped
"""

from fxckpt.ranks.agreement import Agreement
from fxckpt.ranks.choice import Key, Said, described, holders, key_of, newest_common, none_was_common, safe, stores_digest
from fxckpt.ranks.common import least_kept
from fxckpt.ranks.ending import Ending
from fxckpt.ranks.first import FirstStore
from fxckpt.ranks.messages import Messages, named
from fxckpt.ranks.other import OtherStore
from fxckpt.ranks.peers import Peers
from fxckpt.ranks.rendezvous import Rendezvous

__all__ = [
    "Agreement", "Ending",
    "FirstStore",
    "Key", "Messages", "OtherStore", "Peers", "Rendezvous", "Said", "described", "holders", "key_of", "least_kept", "named",
    "newest_common", "none_was_common", "safe", "stores_digest",
]  # fmt: skip
