"""What a user may name as a directory: "~" and variables are expanded, and what only looks like a local path is refused."""

from __future__ import annotations

import os
import re

from fxckpt.errors import SetupError

_URL = re.compile("([A-Za-z][A-Za-z0-9+.-]+):/")  # one slash: pathlib makes it of two
_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[^}]*\})")


def local_path(given: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> str:
    """The path that ``given`` means, relative to where the script is now. Raises SetupError for a URL and for a variable that is
    not set: each would become a directory of that name, and the checkpoints would not be where they are looked for."""
    path = os.path.expandvars(os.fsdecode(given))
    if (url := _URL.match(path)) is not None:
        raise SetupError(
            f"{path!r} is a URL, and checkpoints are written to a local directory ({url[1]}: is no disk with fsync and rename). "
            "Name a local one, and copy finished checkpoints from there, or mount the other as a file system"
        )
    if (variable := _VARIABLE.search(path)) is not None:
        raise SetupError(
            f"{path!r} names a variable, {variable[0]}, that is not set in this process's environment: set it, or name the "
            "directory itself"
        )
    return os.path.expanduser(path)
