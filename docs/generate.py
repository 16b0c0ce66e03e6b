"""Write the pages here that say what the code says: python docs/generate.py. A test compares them with it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from lorasweep.config import keys
from lorasweep.config.fields import texts_below_fields
from lorasweep.config.measures import MEASURES
from lorasweep.study import result
from lorasweep.study.result import TrialResult

HERE = Path(__file__).parent

OUTPUTS = {
    "NAME/": "A folder for each study.",
    "mlflow.db, .mlflow.db.lock, mlartifacts/": "MLflow's store, unless `tracking.uri` names another.",
    ".tokens/": "Encoded examples, which studies share. `clean` removes them; who needs them makes them again.",
    ".bases/": "Configs of base models with links to their weights, for the models in MLflow.",
}

STUDY = {
    "study.json": "What the study is: name, question, what varies, the metric, every `search.*` key.",
    "journal.log, journal.lock": "The queue, by Optuna: state, point, owner and evaluations of each trial. "
    "With `search.storage` the database has it.",
    "claim.lock": "Held for a moment by the worker that takes a trial.",
    "0/, 1/, 2/": "A folder for each trial, and so on.",
    "report.html, report.md": "The report: one page that needs no network, and the same as text.",
    "best.yaml": "The best configuration, for `python -m lorasweep --sweep outputs/NAME/best.yaml`.",
    "mlflow.json, .mlflow.lock": "What MLflow is to hold of the study, and who sends it. `sync` goes by it.",
    "model.json": "The winner's id in MLflow, where it was logged as a model.",
}

TRIAL = {
    "config.yaml": "Every key with its value, written before the first step.",
    "run.json": "Overrides, rerun line, seed, git commit, versions of packages, machine, when it began, and of its "
    "data the fingerprint, the rows of each split, those left out, and notes.",
    "log.txt": "What happened, with times; the traceback of a failed trial.",
    "metrics.jsonl": "A line for each logged step and each evaluation. MLflow is filled from it.",
    "mlflow.json, .mlflow.lock": "What MLflow is to hold of the trial, and who sends it. `sync` goes by it.",
    "checkpoint.pt": "What a trial needs to go on, as long as it runs.",
    "adapter/": "The adapter in peft's format. `tracking.save_adapters` says whose stay.",
    "task.json": "What the task learned from the data, such as classes. `predict` and `export` read it.",
    "examples.txt": "A few rows of the eval split with the model's answers, for a person to read.",
    "predictions.parquet": "Of each row of the eval split the loss, the answer and its part in the metric: intervals "
    "and comparisons are made from it.",
    "evaluations/": "Of each evaluation, the rows' parts in the metric, a file a step: the trial keeps the best one.",
    "test_predictions.parquet": "The same of the test split, of the study's winner alone.",
    "result.json": "What the trial came to, key by key below.",
}

KINDS = {int: "whole number", float: "number", str: "string", bool: "true or false", list: "list", dict: "object"}

HEAD = """# What a study leaves

`python docs/generate.py` writes this page.
"""

PARTS = """
A file whose name ends in `.part` was being written when its process was killed.
"""

RESULT = """
## `result.json`

Written whole when a trial ends; the winner's again, with `test`. A key that is not always there is there when there is
something to say. Null is a number that could not be measured.

A cost is what reports show quality against and what `search.objectives` may make small. MLflow has what is marked as
metrics of the trial's run, and `params` as `params_lora`, `params_total` and so on. The study's storage keeps what is
marked: a report has that where the trial ran on a machine whose disk is not at hand.
"""


def main() -> None:
    (HERE / "files.md").write_text(files_page(), encoding="utf8")
    (HERE / "keys.md").write_text(keys.page(), encoding="utf8")


def files_page() -> str:
    """Return docs/files.md: what a study leaves on disk, and result.json key by key."""
    head = ["key", "what it is", "unit", "always", "cost", "MLflow", "storage"]
    lines = [HEAD, "## `outputs/`\n", *listing(OUTPUTS), "\n## `outputs/NAME/`: a study\n", *listing(STUDY), PARTS]
    lines += ["## `outputs/NAME/0/`: a trial\n", *listing(TRIAL), RESULT, *table(head, rows(TrialResult))]
    return "\n".join(lines) + "\n"


def listing(files: Mapping[str, str]) -> Iterator[str]:
    """Yield a table of files."""
    named = ((", ".join(f"`{name}`" for name in names.split(", ")), text) for names, text in files.items())
    return table(["file or folder", "what it holds"], named)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = list(head)
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def rows(cls: type[Any], inside: str = "") -> Iterator[list[str]]:
    """Yield a row of the table for each field of a dataclass, and after it those of the dataclass that it holds."""
    hints, texts = get_type_hints(cls), texts_below_fields(result)
    for field in fields(cls):
        held = next((t for t in get_args(hints[field.name]) if is_dataclass(t)), None)
        measure = MEASURES.get(field.name) if not inside or field.name == "trainable" else None
        flags = [measure.is_cost, measure.in_mlflow, measure.in_storage] if measure else [False] * 3
        ticks = ["yes" if flag else "" for flag in (field.default is MISSING and not inside, *flags)]
        text = f"{texts[cls.__name__, field.name]} ({kind(hints[field.name])})"
        yield [f"`{inside}{field.name}`", text, measure.unit if measure else "", *ticks]
        if isinstance(held, type):
            yield from rows(held, f"{field.name}.")


def kind(hint: Any) -> str:
    """Return what JSON has for a type, in words."""
    options = [t for t in get_args(hint) if t is not type(None)] if type(None) in get_args(hint) else [hint]
    words = [KINDS.get(get_origin(t) or t, "object") for t in options]
    return " or ".join([*words, "null"] if len(words) < len(get_args(hint)) and words != ["object"] else words)


if __name__ == "__main__":
    main()
