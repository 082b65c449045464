"""Steps of optimizers that add elements up, with tensors at chosen places of memory; what they lead to.

``python tests/support/sums.py THREADS OFFSET``: a checksum for each case, of a fresh process.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator, Sequence

import torch

MATRICES = [(64, 64), (200, 300), (1000, 257), (64, 8192), (8192, 64)]
OTHERS = [(100, 20, 3, 3), (70_000,), (5,), (3, 2000, 50)]

CASES: dict[str, tuple[Sequence[tuple[int, ...]], Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]] = {
    "Muon": (MATRICES, lambda params: torch.optim.Muon(params, lr=1e-2)),
    "Muon, nesterov=False": (MATRICES, lambda params: torch.optim.Muon(params, lr=1e-2, nesterov=False)),
    "Adafactor": ([*MATRICES, *OTHERS], lambda params: torch.optim.Adafactor(params, lr=1e-2, foreach=False)),
    "Adafactor, foreach": ([*MATRICES, *OTHERS], lambda params: torch.optim.Adafactor(params, lr=1e-2, foreach=True)),
}


def placed(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy, so many elements behind the beginning of an allocation."""
    room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)
    return room.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


def checksum(case: str, dtype: torch.dtype, offset: int) -> int:
    """Of parameters and state after three steps; the state, too, lies elsewhere from the second on."""
    shapes, make = CASES[case]
    g = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.randn(shape, generator=g).to(dtype)
        tensor = tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor
        return placed(tensor, offset)

    params = [torch.nn.Parameter(drawn(shape)) for shape in shapes]
    opt = make(params)
    for _ in range(3):
        for param in params:
            param.grad = drawn(tuple(param.shape))
        opt.step()
        for state in opt.state.values():
            state |= {
                key: placed(value, offset) for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim()
            }
    crc = 0
    for tensor in [*params, *(value for state in opt.state.values() for _, value in sorted(state.items()))]:
        if isinstance(tensor, torch.Tensor):
            crc = zlib.crc32(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes(), crc)
    return crc


def checksums(threads: int, offset: int) -> Iterator[tuple[str, int]]:
    """All cases, in two types."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            yield f"{case}, {dtype}", checksum(case, dtype, offset)
    torch.set_num_threads(before)


if __name__ == "__main__":
    for name, crc in checksums(int(sys.argv[1]), int(sys.argv[2])):
        print(name, crc, sep=": ", flush=True)
