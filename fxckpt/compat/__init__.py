"""Everything private of torch that fxckpt touches, one file a subject, each part with its reason and a feature test in
``tests/project/test_torch_private.py``. What this torch has not is said here, before one of these files is imported."""

from __future__ import annotations

from fxckpt.compat.features import check

check()
