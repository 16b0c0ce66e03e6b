"""The house: a room imports only from rooms before it, no file of a room is in a circle, libraries have owners."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "lorasweep"

ROOMS = [
    "errors",
    "files",
    "credentials",
    "console",
    "config",
    "search",
    "hardware",
    "data",
    "tasks",
    "models",
    "lora",
    "packing",
    "memory",
    "training",
    "study",
    "tracking",
    "serving",
    "report",
    "runner",
    "api",
    "cli",
    "__main__",
    "__init__",
    "flavor",
]
"""Packages and files at the door, in reading order. flavor is where older MLflow models look for their loader."""

OWNERS = {
    "hydra": {"config", "search", "runner"},
    "omegaconf": {"config", "runner"},
    "optuna": {"search", "study", "report", "runner"},
    "mlflow": {"tracking", "serving"},
    "peft": {"lora", "packing"},
    "datasets": {"data"},
    "rich": {"console"},
    "bitsandbytes": {"models", "lora", "training"},
    "pynvml": {"hardware"},
}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        name = name.removesuffix(".__init__") if name != "__init__" else name
        found[name] = ast.parse(path.read_text(encoding="utf8"))
    return found


def imports(tree: ast.Module) -> set[str]:
    """Return full names: `from lorasweep import api` gives lorasweep.api."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def inner(full: str, known: set[str]) -> str | None:
    """Return the module of ours that a full name lies in."""
    name = full.removeprefix("lorasweep.")
    while name:
        if name in known:
            return name
        name = name.rpartition(".")[0]
    return None


def room(name: str) -> str:
    return name.split(".")[0]


def edges() -> Iterator[tuple[str, str]]:
    """Yield pairs of modules of which the first imports the second, lazily or not."""
    trees = modules()
    for name, tree in trees.items():
        for full in imports(tree):
            other = inner(full, set(trees)) if full.startswith("lorasweep.") else None
            if other and other != name:
                yield name, other


def test_every_room_has_its_place():
    assert {room(name) for name in modules()} == set(ROOMS)


def test_rooms_import_only_from_earlier_ones():
    wrong = [f"{a} imports {b}" for a, b in edges() if ROOMS.index(room(a)) < ROOMS.index(room(b))]
    assert wrong == []


def test_no_file_is_in_a_circle():
    graph: dict[str, set[str]] = {}
    for a, b in edges():
        graph.setdefault(a, set()).add(b)
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize("library", OWNERS)
def test_outside_library_has_few_owners(library):
    users = {room(n) for n, tree in modules().items() if any(i.split(".")[0] == library for i in imports(tree))}
    assert users == OWNERS[library]
