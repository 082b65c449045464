"""The rooms of the package: imports go one way, and nothing goes round in a circle. Sources are read, not imported."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from repository import ROOT

ROOMS = (
    {"terminal"},
    {"errors", "_registry"},
    {"compat", "engine"},
    {"store"},
    {"importing", "ranks"},
    {"config", "data", "graph", "monitor", "cli"},
    {"optim"},
    {"saving"},
    {"journal"},
    {"run"},
    {"loading", "handle"},
    {"checkpointed"},
    {"compiled_optimizer", "loop", "torch_backend"},
    {"dcp", "hf", "lightning", "titan"},
    {"__init__", "__main__"},
)
"""A room imports from those above it, and from itself."""

FORBIDDEN = {
    "data": {"store", "engine", "_registry"},
    "graph": {"store", "engine"},
    "monitor": {"compat", "config", "graph"},
    "cli": {"compat", "config", "graph"},
}
"""Rooms above it that a room must not know all the same."""

PROCESSES = {("compiled_optimizer", "monitor"), ("__main__", "cli"), ("cli", "loading")}
"""Who starts what is a program of its own; and commands have steps of a journal made again, which takes torch, where one is
asked for."""


@cache
def files() -> Mapping[str, ast.Module]:
    """Every file of the package by its module's name, parsed."""
    found = {}
    for path in sorted((ROOT / "fxckpt").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts if parts[-1] != "__init__" or len(parts) == 2 else parts[:-1])] = ast.parse(path.read_text())
    return found


def room(module: str) -> str:
    """``graph`` of ``fxckpt.graph.model.joint``."""
    return module.split(".")[1] if "." in module else "__init__"


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that a file imports, at its top or later, for types or for real."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("fxckpt"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fxckpt"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in files() else str(node.module)


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's components of more than one node)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
            low[node] = min(low[node], low[other] if other in stack else low[node])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def test_imports_go_one_way_between_rooms():
    level = {name: at for at, names in enumerate(ROOMS) for name in names}
    wrong = []
    for module, tree in files().items():
        here = room(module)
        assert here in level, f"{module} is in no room of the list"
        for other in map(room, imported(tree)):
            lower = level[other] < level[here] and other not in FORBIDDEN.get(here, ())
            if other != here and not lower and (here, other) not in PROCESSES:
                wrong.append(f"{module} imports from {other}")
    assert wrong == []


def test_the_map_of_rooms_names_every_file():
    """But those of rooms that have one file a command, a subject of torch, or a part of the rehearsal."""
    words = set(re.findall(r"\w+", (ROOT / "ARCHITECTURE.md").read_text()))
    listed = (each for each in files() if not re.match(r"fxckpt\.(cli|compat|optim\.rehearsal)\.", each))
    assert {each.rpartition(".")[2] for each in listed} - words == {"__main__"}


def test_no_files_import_each_other_in_a_circle():
    edges = {module: set(imported(tree)) - {module} for module, tree in files().items()}
    packages = {module for module in edges if any(other.startswith(module + ".") for other in edges)}
    # A package that names its files imports them for its users; they do not import it.
    assert circles({a: {b for b in bs if b not in packages} for a, bs in edges.items()}) == []


def test_no_classes_hold_each_other_in_a_circle():
    names = {n.name for tree in files().values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    edges: dict[str, set[str]] = {}
    for tree in files().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                edges.setdefault(node.name, set()).update(held(node) & names - {node.name})
    assert circles(edges) == []


def held(node: ast.ClassDef) -> set[str]:
    """Names in the types of a class's fields, and of the arguments that it is made from."""
    types: list[ast.expr] = []
    for each in ast.walk(node):
        if isinstance(each, ast.AnnAssign):
            types.append(each.annotation)
        elif isinstance(each, ast.FunctionDef) and each.name == "__init__":
            types += [a.annotation for a in [*each.args.args, *each.args.kwonlyargs] if a.annotation is not None]
    return {word for each in types for word in re.findall(r"[A-Za-z_]\w*", ast.unparse(each))}


def test_the_store_imports_no_torch_when_it_is_imported():
    for module, tree in files().items():
        if room(module) in ("store", "monitor", "engine", "errors"):
            top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
            assert not [n for n in top if "torch" in ast.unparse(n).split()[1].split(".")[0]], module


def test_the_c_sources_know_no_python():
    sources = list((ROOT / "csrc").rglob("*.[ch]"))
    assert sources
    assert [p.name for p in sources if re.search(r"#include\s*[<\"]Python\.h", p.read_text())] == []


def test_every_object_at_module_level_that_changes_is_in_the_registry():
    from fxckpt._registry import MODULE_STATE

    found = {f"{module}:{name}" for module, tree in files().items() for name in mutable(tree)}
    assert found == set(MODULE_STATE)


LASTING = {"dict", "list", "set", "deque", "WeakSet", "WeakValueDictionary", "WeakKeyDictionary", "defaultdict"}


@functools.cache
def classes_that_change() -> set[str]:
    """Names of our own classes, but for those whose objects are frozen."""
    classes = [n for t in files().values() for n in ast.walk(t) if isinstance(n, ast.ClassDef)]
    return {n.name for n in classes if "frozen=True" not in ast.unparse(n)}


def mutable(tree: ast.Module) -> Iterator[str]:
    """Names of what is assigned at module level and changes later: empty containers, and objects of our own classes."""
    own = classes_that_change()
    for node in tree.body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        value = node.value
        empty = isinstance(value, (ast.Dict, ast.List, ast.Set)) and not list(ast.iter_child_nodes(value))[:-1]
        made = isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1].split("[")[0]
        if empty or (made in LASTING and not value.args) or made in own:
            yield ast.unparse(target)


@pytest.mark.parametrize("path", sorted((ROOT / "fxckpt").rglob("*.py")), ids=lambda p: p.stem)
def test_every_file_and_every_class_says_in_its_first_line_what_it_is_for(path: Path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    silent = [n.name for n in tree.body if isinstance(n, ast.ClassDef) and not ast.get_docstring(n)]
    assert silent == []
