"""A trainer that is killed when it has handed two checkpoints over: ``python dying_trainer.py STORE ACKS LOG ITEMS``.

Its monitor is stopped meanwhile, so that nothing of the two is on the disk when the trainer is dead. Prints the monitor's
process id, for whom wakes it up. The operations of both go behind those that the log has.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import instruments
from storing import recorded_monitors, start

from fxckpt.engine import io


def main(root: Path, acks: Path, log: Path, items: int) -> None:
    instruments.record(log, append=True)
    with recorded_monitors(log):
        trainer = start(root, acks, keep=1, items=items, writer="monitor")
    print(trainer.store.pid, flush=True)
    trainer.save(1)
    slots = [trainer.store.acquire(), trainer.store.acquire()]
    trainer.store.acquire = lambda name: slots.pop(0)
    os.kill(trainer.store.pid, signal.SIGSTOP)
    flying = {step: trainer.begin(step) for step in (2, 3)}
    for step, (slot, checkpoint) in flying.items():
        assert checkpoint.durable(10), "posted"
        trainer.store.commit(slot, trainer.record(step, checkpoint), trainer.state(step))
    io.mkdir(acks / "dead")
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
