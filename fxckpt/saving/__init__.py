"""From the tensors of a run to a committed checkpoint.

    inventory.py  every tensor by name, and what cannot be stored
    plan.py       which tensor lies where, and which engine layer it belongs to
    saver.py      begins checkpoints, and ends all of it
    in_flight.py  one checkpoint between its first emit and its end
    guard.py      notices tensors that change while they are copied
    flights.py    all that are in flight, waits for them, what became of them; the thread that trains, which waits
    committer.py  what the thread that commits does with each; the slot that the next one is written in
    stores.py     what is asked of a store; the store that writes nothing
    tracing.py    a picture of all this for Perfetto

The loop of the thread that commits is ``fxckpt/store/commit_loop.py``; a monitor's process runs it too.
"""
