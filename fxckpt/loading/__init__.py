"""``load``: a checkpoint back into the live objects of a run, or weights into a model.

load.py         choose, check, verify, apply
target.py       what is restored into
choose.py       which checkpoint is meant
schema.py       what a record holds beside tensors, checked before anything live is touched
match.py        which stored tensor goes where, and what does not fit
apply.py        the bytes, the optimizers' states, extras, buffers, frozen parameters
late_owners.py  tensors that wait for the compiler to show whose they are
"""
