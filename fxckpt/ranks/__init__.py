"""What the ranks of one job agree on, by messages over the process group's store: no collective, and no wait without a limit."""

from fxckpt.ranks.agreement import Agreement, newest_common

__all__ = ["Agreement", "newest_common"]
