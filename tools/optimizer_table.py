"""Write the generated table of docs/optimizers.md anew: run every optimizer of torch.optim beside PyTorch's own."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def main() -> None:
    """Replace what lies between the two marks."""
    import torch
    from optimizer_cases import table

    torch.set_num_threads(1)
    path = ROOT / "docs" / "optimizers.md"
    text = path.read_text()
    head, _, rest = text.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        sys.exit(f"{path} has lost its marks {BEGIN} and {END}")
    made = table(lambda name: print(name, file=sys.stderr, flush=True))
    path.write_text(f"{head}{BEGIN}\n{made}\n{END}{tail}")


if __name__ == "__main__":
    main()
