"""The twenty loops of ``scripts/``, compiled: updates inside the backward change no bit, and are made where nothing can tell.

Each ends with the bits that it has without fxckpt, on the same compiled code. ``FXCKPT_IN_BACKWARD`` says how many kills are to
be tried of all loops that are armed (none, and one loop instead of twenty; ``make in-backward``: 200).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from loop_runs import Loop

KILLS = int(os.environ.get("FXCKPT_IN_BACKWARD", "0"))
BEGINS = "import compiled_loops\ncompiled_loops.begin()\n"
SCRIPTS = Path(__file__).parent / "scripts"

CLIPPED, ADDED_UP = "is changed between backward and opt.step", "added up over several backwards"
SEVERAL, OF_ITS_OWN = "several optimizers make one run", "not one that is traced and split"
UNARMED = {
    "dcgan": SEVERAL, "diffusion": ADDED_UP, "dqn": CLIPPED, "forward_forward": SEVERAL, "lookahead": OF_ITS_OWN,
    "lora": ADDED_UP, "mingpt": CLIPPED, "nanogpt": ADDED_UP, "ppo": CLIPPED, "reinforce": "ran forward", "sac": SEVERAL,
    "sam": "do not come through opt.step", "timm_like": CLIPPED, "unet": CLIPPED,
    "word_language_model": "no backward of a region that was compiled",
}  # fmt: skip
"""Why no layer of these loops is updated inside a backward."""

ARMED = sorted({path.stem for path in SCRIPTS.glob("*.py")} - UNARMED.keys())


def run(fork_server, folder, name, updates, **variables):
    """The loop with its updates there."""
    folder.mkdir()
    return Loop(fork_server, (SCRIPTS / f"{name}.py").read_text(), folder, BEGINS, UPDATES=updates, **variables)


@pytest.mark.parametrize("name", [*ARMED, *UNARMED] if KILLS else ["vae"])
def test_a_compiled_loop_ends_with_the_same_bits_wherever_its_updates_are_made(name, fork_server, tmp_path):
    plain = run(fork_server, tmp_path / "plain", name, "after_backward", FXCKPT_DISABLE="1").whole()
    inside = run(fork_server, tmp_path / "inside", name, "in_backward").whole()
    if KILLS:
        assert run(fork_server, tmp_path / "after", name, "after_backward").whole() == plain
    assert inside == plain, "updates inside the backward changed the bits"
    assert inside.committed > inside.dropped and not plain.committed
    if name in UNARMED:
        assert inside.armed == 0 and inside.why
        assert [why for why in inside.why if not re.search(UNARMED[name], why)] == []
    else:
        assert inside.armed > 0 and inside.why == ("",)


@pytest.mark.skipif(not KILLS, reason="make in-backward: kills of loops that are armed")
@pytest.mark.parametrize("name", ARMED)
def test_an_armed_loop_killed_at_random_ends_with_the_same_bits(name, fork_server, tmp_path, counted):
    loop = run(fork_server, tmp_path / "loop", name, "in_backward")
    whole = loop.whole()
    for seed, resumed in loop.killed_anew(max(1, KILLS // 3 // len(ARMED)), 3, whole.backwards):
        assert resumed.lines == whole.lines, f"seed {seed}: resumed, it ended otherwise"
        counted("kills of loops with updates inside the backward", 3)
