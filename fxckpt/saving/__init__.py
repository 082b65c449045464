"""From the tensors of a run to a committed checkpoint.

    inventory.py    every tensor by name, and what cannot be stored
    plan.py         which tensor lies where, and which engine layer it belongs to
    saver.py        begins checkpoints, and ends all of it
    slot_supply.py  where the next one is written
    in_flight.py    one checkpoint between its first emit and its end
    guard.py        notices tensors that change while they are copied
    flights.py      all that are in flight, how many there may be, waiting for them; the thread that trains
    committer.py    what the thread that commits does with each
    tally.py        what became of them, counted; failures reported once
    stores.py       what is asked of a store; the store that writes nothing
    tracing.py      a picture of all this for Perfetto

The loop of the thread that commits is ``fxckpt/store/commit_loop.py``; a monitor's process runs it too.
"""
