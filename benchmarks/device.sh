#!/bin/sh
# Everything that needs an NVIDIA GPU, in one call, without a network, in under ten minutes: builds the engine, runs the
# tests marked cuda (a journal's steps made again are among them), then benchmarks/gpu.py. Results go to $OUT, or benchmarks/results/.
#
#   PYTHON=...    a Python with torch (a CUDA build, 2.11 or newer), numpy, cffi, setuptools; pytest and safetensors for the
#                 tests
#   MINUTES=7     for the benchmark
#   DISK=.        the disk to measure; about 40 GB
#   REHEARSE=1    without a GPU: a tiny model in host memory, as if it lay on a device that the tests' fake driver plays
#                 (or FXCKPT_CUDA_DRIVER, if that names one); no figure means anything then
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
REHEARSE=${REHEARSE:-}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

"$PYTHON" - "$REHEARSE" <<'CHECK'
import sys, torch
rehearsal = bool(sys.argv[1])
if not rehearsal and not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device (REHEARSE=1 tries this script without one)")
print(torch.__version__, "rehearsal without a device" if rehearsal else torch.cuda.get_device_name())
CHECK

# ---- the engine ----

# The compiler that setuptools will use, and Python's headers: does an extension compile?
cc=${CC:-$("$PYTHON" -c 'import sysconfig; print((sysconfig.get_config_var("CC") or "cc").split()[0])')}
include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
compiles() { printf '#include <Python.h>\n' | $cc -I"$include" -x c -fsyntax-only - 2>"$scratch/compiler"; }

if has "cffi, setuptools" && compiles; then
    # Out of reach of pyproject.toml, whose license field setuptools before 77 does not understand.
    ln -s "$PWD/csrc" "$PWD/fxckpt" "$PWD/setup.py" "$scratch"
    (cd "$scratch" && "$PYTHON" setup.py -q build_ext --inplace)
else
    echo "cffi or setuptools is missing, or '$cc' cannot compile an extension: using the engine that was built elsewhere"
    head -3 "$scratch/compiler" 2>/dev/null || true
fi
"$PYTHON" -c 'from fxckpt.engine._lib import load; load(); print("engine: good")'

# ---- tests, figures ----

if [ -n "$REHEARSE" ] && [ -z "${FXCKPT_CUDA_DRIVER:-}" ]; then
    export FXCKPT_CUDA_DRIVER="$scratch/libfakecuda.so"
    $cc -std=c11 -D_GNU_SOURCE -O1 -pthread -fPIC -shared -fvisibility=hidden tests/engine/c/fake_cuda.c -o "$FXCKPT_CUDA_DRIVER"
fi

tests=0
if has "pytest, safetensors"; then
    "$PYTHON" -m pytest -q -p no:cacheprovider -m cuda tests/engine/test_on_gpu.py || tests=$?
    if [ -n "$REHEARSE" ]; then
        "$PYTHON" -m pytest -q -p no:cacheprovider tests/engine/test_cuda.py tests/journal/test_on_devices.py || tests=$?
    fi
else
    echo "pytest or safetensors is missing: THE TESTS DID NOT RUN"
    tests=77
fi

"$PYTHON" benchmarks/gpu.py ${REHEARSE:+--rehearse} --minutes "${MINUTES:-7}" --dir "${DISK:-.}" --json "$OUT/gpu.json" \
    --trace "$OUT/gpu-trace.json" || tests=$?
exit "$tests"
