#!/bin/sh
# Everything that needs an NVIDIA GPU, in one call, without a network, in under ten minutes: builds the engine, runs the
# tests marked cuda, then benchmarks/gpu.py. Results go to $OUT, or benchmarks/results/.
#
#   PYTHON=...    a Python with torch (a CUDA build, 2.11 or newer), numpy, cffi, setuptools; pytest and safetensors for the
#                 tests
#   MINUTES=7     for the benchmark
#   DISK=.        the disk to measure; about 40 GB
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"; print(torch.__version__, torch.cuda.get_device_name())'
if "$PYTHON" -c 'import cffi, setuptools' 2>/dev/null; then
    "$PYTHON" setup.py -q build_ext --inplace
else
    echo "cffi or setuptools is missing: using the engine that was built elsewhere"
fi
"$PYTHON" -c 'from fxckpt.engine._lib import load; load(); print("engine: good")'

tests=0
if "$PYTHON" -c 'import pytest, safetensors' 2>/dev/null; then
    "$PYTHON" -m pytest -q -p no:cacheprovider -m cuda tests/engine/test_on_gpu.py || tests=$?
else
    echo "pytest or safetensors is missing: THE TESTS DID NOT RUN"
    tests=77
fi

"$PYTHON" benchmarks/gpu.py --minutes "${MINUTES:-7}" --dir "${DISK:-.}" --json "$OUT/gpu.json" --trace "$OUT/gpu-trace.json"
exit "$tests"
