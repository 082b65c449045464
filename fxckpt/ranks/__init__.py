"""What the ranks of one job say to each other, over the process group's store: no collective, and no wait without a limit.

agreement.py   one load: what each rank says, all ranks hear
heart.py       tells the others that this rank lives while it loads
choice.py      which checkpoint all of them start from, by what they said
"""

from fxckpt.ranks.agreement import Agreement
from fxckpt.ranks.choice import Key, Said, described, newest_common, none_was_common, stores_digest
from fxckpt.ranks.heart import Heart

__all__ = ["Agreement", "Heart", "Key", "Said", "described", "newest_common", "none_was_common", "stores_digest"]
