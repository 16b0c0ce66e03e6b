"""The house: files import only from earlier ones, and each outside library has few owners."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "lorasweep"

ORDER = [
    "errors",
    "rules",
    "spec",
    "compose",
    "condition",
    "dimension",
    "space",
    "corpus",
    "readers",
    "data",
    "tasks.task",
    "tasks.generation",
    "tasks.head",
    "tasks.causal_lm",
    "tasks.seq_cls",
    "tasks.seq_2_seq_lm",
    "tasks.token_cls",
    "tasks.question_ans",
    "tasks.feature_extraction",
    "tasks",
    "scores",
    "stats",
    "fetch",
    "device",
    "quant",
    "model",
    "lora_config",
    "swap",
    "adapter",
    "transfer",
    "pack",
    "packed",
    "recompute",
    "loss_scale",
    "schedule",
    "checkpoint",
    "events",
    "stack",
    "first_token",
    "peak",
    "flat",
    "slots",
    "kept",
    "prefix",
    "meter",
    "memory",
    "pace",
    "evaluate",
    "retry",
    "energy",
    "engine",
    "tokens",
    "group",
    "ledger",
    "system",
    "mirror",
    "sender",
    "tracking",
    "search",
    "storage",
    "lease",
    "meta",
    "race",
    "study",
    "provenance",
    "display",
    "interrupt",
    "outcome",
    "answer",
    "repeats",
    "learned",
    "winner",
    "predict",
    "flavor",
    "registry",
    "running",
    "worker",
    "clean",
    "report",
    "evidence",
    "cost",
    "figure",
    "landscape",
    "charts",
    "summary",
    "page",
    "check",
    "sweeper",
    "steer",
    "export",
    "api",
    "cli",
    "__main__",
    "__init__",
]

OWNERS = {
    "hydra": {"compose", "dimension", "sweeper", "cli"},
    "omegaconf": {"compose", "sweeper"},
    "optuna": {"search", "storage", "race", "study", "evidence", "clean"},
    "mlflow": {"flavor", "registry", "mirror"},
    "peft": {"adapter", "lora_config", "pack"},
    "datasets": {"data", "readers"},
    "rich": {"display"},
    "bitsandbytes": {"quant"},
    "pynvml": {"energy"},
}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        name = name.removesuffix(".__init__") if name != "__init__" else name
        found[name] = ast.parse(path.read_text(encoding="utf8"))
    return found


def imports(tree: ast.Module) -> set[str]:
    """Return full names: `from lorasweep import data` gives lorasweep.data."""
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


def test_files_import_only_from_earlier_ones():
    trees = modules()
    assert set(trees) <= set(ORDER), set(trees) - set(ORDER)
    wrong = []
    for name, tree in trees.items():
        for full in imports(tree):
            if full.startswith("lorasweep."):
                other = inner(full, set(trees))
                if other and other != name and ORDER.index(other) > ORDER.index(name):
                    wrong.append(f"{name} imports {other}")
    assert wrong == []


@pytest.mark.parametrize("library", OWNERS)
def test_outside_library_has_few_owners(library):
    users = {n for n, tree in modules().items() if any(i.split(".")[0] == library for i in imports(tree))}
    assert users, f"nobody imports {library}: the rule is dead"
    assert users <= OWNERS[library]
