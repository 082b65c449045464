"""Builds the C engine. Everything else about the project is in pyproject.toml."""

from __future__ import annotations

from setuptools import setup
from setuptools.command.build_ext import build_ext

HELP = """
The engine of fxckpt could not be compiled (the compiler's message is above). It needs a C11 compiler and the
headers of this Python.
    Debian, Ubuntu:  apt install gcc libc6-dev python3-dev
    Fedora:          dnf install gcc python3-devel
"""


class BuildEngine(build_ext):
    """build_ext that says what to install when the compiler or a header is missing."""

    def build_extension(self, ext) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            raise SystemExit(f"{error}\n{HELP}") from error


setup(
    cffi_modules=["fxckpt/engine/build.py:ffibuilder"],
    cmdclass={"build_ext": BuildEngine},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
