"""What this torch has not is said when fxckpt first needs torch: by name, with what will not work."""

from __future__ import annotations

import ast
import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from repository import ROOT, python_path

from fxckpt.compat.features import NEEDED, TRIED, USEFUL, check, has

LISTED = [path for parts in (NEEDED, USEFUL) for paths in parts.values() for path in paths]


def private(path: str) -> bool:
    return any(name.startswith("_") and not name.startswith("__") for name in path.split("."))


def named_in(tree: ast.Module) -> Iterator[str]:
    """Paths under torch that a file imports or takes attributes of."""
    known = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            known |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
        elif isinstance(node, ast.Import):
            known |= {each.asname: each.name for each in node.names if each.asname and each.name.startswith("torch.")}
    yield from known.values()
    for node in ast.walk(tree):
        names, inner = [], node
        while isinstance(inner, ast.Attribute):
            names.append(inner.attr)
            inner = inner.value
        if names and isinstance(inner, ast.Name) and inner.id in known:
            yield ".".join([known[inner.id], *reversed(names)])


def fresh_python(code: str) -> str:
    """What another interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": python_path()}, text=True, capture_output=True, timeout=99
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def used() -> set[str]:
    """The private parts of torch that the files of ``compat`` name."""
    files = (ROOT / "fxckpt" / "compat").glob("*.py")
    return {path for file in files for path in named_in(ast.parse(file.read_text())) if private(path)}


def test_every_private_part_that_is_used_is_looked_for_and_no_other():
    def covers(listed: str, path: str) -> bool:
        return path == listed or path.startswith(f"{listed}.") or listed.startswith(f"{path}.")

    assert sorted(path for path in used() if not any(covers(listed, path) for listed in LISTED)) == []
    public = {"torch.utils._python_dispatch", "torch.utils._sympy"}
    assert sorted(each for each in LISTED if not any(covers(each, path) for path in used() - public)) == []


def test_this_torch_has_them_all_seen_in_the_source_and_when_imported():
    assert [path for path in LISTED if not has(path)] == []
    code = f"""
import sys
from fxckpt.compat.features import has
print([path for path in {LISTED} if not has(path)], "torch._inductor" in sys.modules)
"""
    assert fresh_python(code).strip() == "[] False"


@pytest.mark.parametrize(
    "path", ["torch._no.such", "torch._C._no_such", "torch._inductor.codecache.NoSuchCache", "torch.utils._sympy.interp.no_such"]
)
def test_a_part_that_is_gone_is_found_to_be_gone(path, monkeypatch):
    assert not has(path)
    monkeypatch.delitem(sys.modules, path.rpartition(".")[0], raising=False)
    assert not has(path)


def test_without_a_useful_part_one_line_says_what_will_not_work(caplog):
    with caplog.at_level(logging.WARNING, "fxckpt"):
        check({}, {"one thing": ["torch._C._no_such", "torch.nn.Linear"]})
    assert [record.getMessage() for record in caplog.records] == [
        f"torch {torch.__version__} is not one that this fxckpt knows (tried: {TRIED[0]} to {TRIED[1]}): "
        "one thing will not work without torch._C._no_such"
    ]


def test_without_a_needed_part_the_import_is_refused_with_the_way_out():
    code = """
import torch
del torch._C._current_graph_task_id
import fxckpt
try:
    fxckpt.compile_step
except fxckpt.SetupError as error:
    print(error)
"""
    assert "checkpoints would need torch._C._current_graph_task_id. Install a torch" in fresh_python(code)


def test_the_versions_that_are_named_are_those_that_are_installed_and_allowed():
    assert f'"torch>={TRIED[0]}"' in (ROOT / "pyproject.toml").read_text()
    assert re.search(rf"^torch=={re.escape(TRIED[1])}\.", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f'torch: ["=={TRIED[0]}.0", ">={TRIED[0]}"]' in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
