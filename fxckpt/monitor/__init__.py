"""``writer="monitor"``: a process beside the trainer that does all writing, and is the only one that commits.

    client.py     the trainer's end: starts the process; stands in for the ``Store``
    process.py    the process: feeds the engine with what was posted, commits what was handed over
    wire.py       messages between the two, and errors in them
    limits.py     what the process cannot survive here, to warn of at start

Bytes go through shared memory (``csrc/monitor/ring.h``), everything else through one socket pair. A checkpoint is *handed over*
when all its bytes lie in the shared memory or on the disk and its record was sent: from then on the trainer is not needed.
``docs/monitor.md`` says what is guaranteed and what is not.
"""
