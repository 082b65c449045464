"""``load``: a checkpoint back into the live objects of a run, or weights into a model.

load.py    choose, check, verify, apply
target.py  what is restored into
schema.py  what a record holds beside tensors, checked before anything live is touched
match.py   which stored tensor goes where, and what does not fit
apply.py   the bytes, the optimizers' states, extras, buffers, what is frozen, tensors whose owners show themselves later
"""
