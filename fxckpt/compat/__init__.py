"""Everything private of torch that fxckpt touches, one file a subject, each part with its reason and a feature test in
``tests/project/test_torch_private.py``."""
