#!/bin/sh
# A newcomer's first hour, timed: clone, pip install ., the tutorial's plain script, its eight lines changed, a kill, the same command.
#
#   sh tools/newcomer.sh                        everything from the package index, torch too
#   sh tools/newcomer.sh --system-site-packages torch, numpy and cffi are those that PYTHON (python3) has
#
# Everything is taken from the tutorial as it stands in the clone, its commands included. Leaves nothing behind.
set -eu

PYTHON=${PYTHON:-python3}
HERE=$(cd "$(dirname "$0")/.." && pwd)
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
unset PYTHONPATH

now() { date +%s; }
START=$(now)
step() { echo "$(($(now) - START)) s  $*"; }

step "git clone"
git clone -q "$HERE" "$FOLDER/fxckpt"
cd "$FOLDER/fxckpt"

step "a virtual environment, and pip install ."
"$PYTHON" -m venv "$FOLDER/venv"
PATH="$FOLDER/venv/bin:$PATH"
if [ "${1:-}" = --system-site-packages ]; then
    # A link to what PYTHON has: venv's own option would look behind a virtual environment that PYTHON is itself of.
    "$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$("$FOLDER/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system.pth"
    pip install -q --disable-pip-version-check --no-deps .
else
    pip install -q --disable-pip-version-check .
fi

step "the script of the tutorial, as it was before fxckpt"
mkdir "$FOLDER/mine"
python tools/tutorial_scripts.py "$FOLDER/mine"
cd "$FOLDER/mine"

step "the eight lines changed; killed once a checkpoint of the second epoch is there"
python -u resumed.py > first.log 2>&1 &
TRAINING=$!
until grep -q "^epoch 1:" first.log; do
    kill -0 "$TRAINING" 2> /dev/null || { cat first.log; exit 1; }
    sleep 0.2
done
kill -KILL "$TRAINING"
wait "$TRAINING" || true
cat first.log
fxckpt ls ckpt
fxckpt verify ckpt

step "the same command again"
python -u resumed.py > second.log 2>&1 || { cat second.log; exit 1; }
cat second.log
if grep -q "^epoch 0:" second.log; then
    echo "it began anew"
    exit 1
fi
mv last.pt resumed.pt

step "the plain script, for its bits"
python -u plain.py > plain.log 2>&1 || { cat plain.log; exit 1; }
python - << 'END'
import torch

def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [each for one in inner for each in tensors(one)]

resumed, plain = tensors(torch.load("resumed.pt")), tensors(torch.load("last.pt"))
same = len(resumed) == len(plain) > 30 and all(torch.equal(a, b) for a, b in zip(resumed, plain))
print("the same bits as the plain script" if same else "OTHER BITS")
raise SystemExit(not same)
END
step "done"
