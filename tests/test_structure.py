"""The house: a room imports only from rooms before it, no file of a room is in a circle, libraries have owners."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent / "lorasweep"

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
    "peft": {"lora"},
    "datasets": {"data"},
    "rich": {"console"},
    "bitsandbytes": {"models", "lora", "training"},
    "pynvml": {"hardware"},
}


TESTED_IN = {
    "cli/test_commands.py": {"cli.parser", "cli.training", "cli.tools"},
    "cli/test_main.py": {"errors", "runner.hydra_sweeper", "runner.trial_run", "study.provenance", "training.events"},
    "cli/test_steering.py": {"cli.find", "cli.going_on", "runner.by_hand", "runner.worker"},
    "config/test_compose.py": {"config.overrides", "config.sweep_file"},
    "config/test_registry.py": {"data.readers"},
    "config/test_spec.py": {"config.fields"},
    "first_contact/test_tables.py": {"data.class_folders", "data.word_rows"},
    "first_contact/test_models.py": {
        "models.finished_head",
        "models.token_limits",
        "models.weight_files",
        "runner.rehearsal",
    },
    "lora/test_inits.py": {"lora.eva", "lora.loftq", "models.layer_stack", "training.first_inputs"},
    "lora/test_adapter.py": {"lora.module_swap"},
    "lora/test_round_trip.py": {"lora.peft_notices", "training.evaluation"},
    "memory/test_estimate.py": {"memory.meter", "runner.check"},
    "models/test_target_modules.py": {"models.module_kinds"},
    "models/test_quantization.py": {"models.base_model", "runner.findings", "runner.preflight"},
    "packing/test_packed_pass.py": {"packing.dropout", "training.engine"},
    "report/test_search_figures.py": {
        *("report.cost", "report.figure", "report.parameter_figures", "report.study_data", "report.tables"),
    },
    "runner/test_cleanup.py": {"cli.results"},
    "runner/test_killed_workers.py": {"runner.reclaim"},
    "runner/test_events.py": {"runner.endings"},
    "runner/test_forecast.py": {"runner.trial_pace"},
    "runner/test_worker_process.py": {"runner.torch_calls"},
    "search/test_samplers.py": {"search.pruners", "search.study_view"},
    "search/test_space.py": {"search.condition", "search.dimension"},
    "serving/test_export.py": {"serving.winner", "serving.export_proof", "models.fetch"},
    "serving/test_mlflow_model.py": {"flavor", "tasks.task_state"},
    "study/test_answer.py": {"report.terminal", "study.candidate", "study.settling"},
    "study/test_wording.py": {"study.next_run"},
    "study/test_repeats.py": {
        "runner.launch",
        "runner.plan",
        "runner.points",
        "runner.request",
        "runner.resume",
        "study.repeat_rounds",
    },
    "study/test_drawing.py": {"study.same_point"},
    "study/test_result.py": {"config.measures"},
    "study/test_significance.py": {"study.example_scores"},
    "study/test_study.py": {
        "study.budget",
        "study.direction",
        "study.lease",
        "study.meta",
        "study.owners",
        "study.pruning",
        "study.queue",
        "study.signals",
        "study.storage",
    },
    "tasks/test_causal_lm.py": {"tasks.generation", "tasks.lm_head", "data.chats", "data.text_blocks"},
    "tasks/test_seq_2_seq_lm.py": {"data.builtin", "tasks.task"},
    "tasks/test_token_cache.py": {"data.dataset", "training.workload"},
    "tasks/test_token_cls.py": {"data.conll", "data.table"},
    "test_credentials.py": {"config.paths"},
    "tracking/test_mlflow_store.py": {
        *("tracking.outbox", "tracking.runs", "tracking.sender", "tracking.study_description"),
    },
    "training/test_checkpoint.py": {"tasks.batches", "training.slot"},
    "training/test_first_token.py": {"training.base_traits"},
    "training/test_growth.py": {"training.passes"},
    "training/test_precision.py": {"training.loss_scale"},
    "training/test_prefix_cache.py": {"training.tensor_store"},
}
"""Where a module is tested that has no test of its own name."""

UNTESTED = {
    *("data.carve", "data.columns", "data.csv_table", "data.fields", "data.files", "data.json_table", "data.kinds"),
    *("data.labels", "data.split_files", "tasks.token_lengths", "tasks.too_long", "tasks.chat_template"),
}
"""Modules that only tests of others pass through. None is to be added."""


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


def test_every_module_has_a_test_of_its_name_or_says_where_it_is_tested():
    """tests/<room>/test_<noun>.py, or a line of TESTED_IN."""
    elsewhere = UNTESTED.union(*TESTED_IN.values())
    assert [file for file in TESTED_IN if not (TESTS / file).is_file()] == []
    assert elsewhere <= modules().keys(), "modules that are gone"
    untested = []
    for name in modules():
        folder, _, noun = name.replace(".", "/").rpartition("/")
        is_room = (ROOT / name.replace(".", "/")).is_dir() or noun.startswith("__")
        if not is_room and name not in elsewhere and not (TESTS / folder / f"test_{noun}.py").is_file():
            untested.append(name)
    assert not untested, f"write tests/<room>/test_<noun>.py, or say in TESTED_IN where these are tested: {untested}"


def test_no_test_imports_another_test_file():
    """What two test files share stands in tests/support or in conftest.py."""
    wrong = []
    for path in TESTS.rglob("*.py"):
        names = imports(ast.parse(path.read_text(encoding="utf8")))
        wrong += [
            f"{path.name} imports {name}" for name in names if name.split(".")[0].startswith(("test_", "conftest"))
        ]
    assert wrong == []


def task_names() -> set[str]:
    """Return the names of our tasks, which conf/task_type holds."""
    found = (ROOT.parent / "conf" / "task_type").glob("*.yaml")
    return {yaml.safe_load(path.read_text(encoding="utf8"))["task_type"]["name"] for path in found}


def test_only_a_tasks_own_room_knows_it_by_name():
    """Else a new task would have to be written into more than its file. What docstrings tell is not looked at."""
    names, wrong = task_names(), []
    for module, tree in modules().items():
        told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        strings = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        wrong += [
            f"{module}:{node.lineno}: {node.value}"
            for node in strings
            if room(module) != "tasks" and id(node) not in told and names & set(re.findall(r"\w+", node.value))
        ]
    assert len(names) == 6 and wrong == []


def test_only_a_tasks_own_room_imports_its_class():
    files = {f"tasks.{path.stem}" for path in (ROOT.parent / "conf" / "task_type").glob("*.yaml")}
    wrong = [f"{a} imports {b}" for a, b in edges() if b in files and room(a) != "tasks"]
    assert wrong == []
