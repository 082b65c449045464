"""Make what another program saved the first checkpoint of a new store: a file of torch.save or safetensors, a folder of Hugging
Face, a directory of torch.distributed.checkpoint.

No code in it is run. A file of torch.save holds a state dict, or a dict with one under "model" (or "state_dict") and perhaps
"optimizer". DIR must have no checkpoints. The checkpoint is of step 0: fxckpt.load() in a script begins with these weights.
"""

from __future__ import annotations

import argparse
import os

from fxckpt.cli import common
from fxckpt.importing import import_checkpoint
from fxckpt.importing.source import FLOATS

HELP = "begin a store with what torch.save, safetensors, Hugging Face or DCP wrote"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a file or a directory of one of these formats")
    kinds = "make the model's floating point numbers of this type (default: as they are)"
    parser.add_argument("--dtype", choices=sorted(FLOATS.values()), help=kinds)
    parser.add_argument("dir", metavar="DIR", help="the store to begin")


def run(args: argparse.Namespace) -> int:
    total = 2 * common.size_of(args.source) if os.path.exists(args.source) else 0
    with common.Progress("importing", total) as progress:
        done = import_checkpoint(args.source, args.dir, dtype=args.dtype, progress=progress.advance)
    if args.json:
        common.print_json({"path": str(done.path), "source": str(done.source), "format": done.format, "tensors": done.tensors,
                           "nbytes": done.nbytes, "optimizers": done.optimizers, "left_out": done.left_out})  # fmt: skip
        return common.OK
    with_state = f" and the state of {done.optimizers} optimizer{'s' * (done.optimizers > 1)}" if done.optimizers else ""
    common.say(f"{done.format}: {done.tensors} tensors{with_state}, {common.human(done.nbytes)}, in {done.path}")
    for name, why in done.left_out.items():
        common.say(f"not taken: {name}: {why}")
    return common.OK
