#!/bin/sh
# Says, before anything is downloaded, what this machine lacks to build the engine and to run torch.compile on CPU.
# Usage: tools/check_toolchain.sh [PYTHON]. Exit status 1, and one line for each missing thing with what to install.
set -u
python=${1:-python3}
missing=0

lacks() {
    printf 'missing: %s\n    install: %s\n' "$1" "$2" >&2
    missing=1
}

compiles() { # compiles COMPILER LANGUAGE HEADER [FLAG]: can COMPILER (words, as CC may hold flags) include HEADER?
    printf '#include <%s>\n' "$3" | $1 -x "$2" -fsyntax-only ${4:+"$4"} - 2>/dev/null
}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    lacks "Python 3.10 or newer ('$python' is not one)" "python3, or name one: make PYTHON=/path/to/python3"
    exit 1
fi
minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    lacks "Python's venv module" "python$minor-venv (Debian, Ubuntu); it comes with python3 elsewhere"
fi

# The compiler setuptools will use: CC, else the one this Python was built with.
cc=${CC:-$("$python" -c 'import sysconfig; print((sysconfig.get_config_var("CC") or "cc").split()[0])')}
cxx=${CXX:-g++} # what torch.compile calls
if compiles "$cc" c stdio.h; then
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    if ! compiles "$cc" c Python.h "-I$include"; then
        lacks "Python's C headers (Python.h)" "python$minor-dev (Debian, Ubuntu), python3-devel (Fedora, RHEL)"
    fi
else
    lacks "a C compiler with its C library headers ('$cc' does not work)" \
        "build-essential (Debian, Ubuntu), gcc glibc-devel (Fedora, RHEL); or set CC"
fi
if ! compiles "$cxx" c++ vector; then
    lacks "a C++ compiler, which torch.compile uses on CPU ('$cxx' does not work)" \
        "build-essential (Debian, Ubuntu), gcc-c++ (Fedora, RHEL); or set CXX"
fi
exit $missing
