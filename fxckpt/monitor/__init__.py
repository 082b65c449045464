"""``writer="monitor"``: a process beside the trainer that does all writing, and is the only one that commits.

    client.py       in the trainer: stands in for the ``Store``, and keeps a monitor running
    link.py         its end of the socket: messages, questions and answers
    launch.py       starts the process, makes the memory that both share, knows what ends both at once
    process.py      the process: carries out what the trainer asks, feeds the engine with what was posted, ends after it
    checkpoints.py  what is under way there: written, handed over, committed
    wire.py         messages between the two, and errors in them

Bytes go through shared memory (``csrc/monitor/ring.h``), everything else through one socket pair. A checkpoint is *handed over*
when all its bytes lie in the shared memory or on the disk and its record was sent: from then on the trainer is not needed.
``docs/monitor.md`` says what is guaranteed and what is not.
"""
