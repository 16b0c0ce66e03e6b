"""A seventh task and an outside metric, each from one file: trained, packed, reported, exported, and answering."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import outside

from lorasweep import tasks
from lorasweep.cli import main
from lorasweep.config import registry
from lorasweep.errors import ConfigError
from lorasweep.serving import predict
from lorasweep.study import example_scores, significance
from lorasweep.study.study import Study
from lorasweep.tasks.task import Task

SMALL = ["train.max_steps=3", "train.eval_every=3", "train.batch_size=4", "tracking=none"]

BALANCED = """
import numpy as np
from lorasweep.tasks.metric import Metric, by_row, combination

@combination
def balanced(weights_RN, first, second):
    predicted, true = np.asarray(first), np.asarray(second)
    recalls = []
    for label in np.unique(true):
        there = true == label
        recalls.append((weights_RN[:, there] @ (predicted[there] == label)) / weights_RN[:, there].sum(1))
    return np.nanmean(recalls, axis=0)

balanced_accuracy = Metric("balanced_accuracy", by_row(lambda p: (p["prediction"], p["label"])), balanced)
"""


def rows_in(folder: Path) -> Path:
    rows = [
        {"question": f"What is number {i}?", "choices": [f"one {i}", f"two {i % 7}", "none"], "answer": i % 3}
        for i in range(60)
    ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder / "rows.jsonl"


def study(folder: Path, model: Path, *words: str) -> Study:
    assert main.main([*words, f"model.pretrained={model}", *SMALL, f"outputs={folder}", "study=s"]) == 0
    return Study.open(folder / "s")


@pytest.fixture
def seventh() -> Iterator[type[Task]]:
    """Register the task for one test: imported with this file it would be among the tasks of all others."""
    from support.multiple_choice import MultipleChoice

    yield tasks.register(MultipleChoice)
    del registry.TASKS._entries[MultipleChoice.name]


def test_seventh_task_trains_alone_and_packed_is_reported_exported_and_answers(tiny_bert, tmp_path, seventh):
    assert tasks.kind("MULTIPLE_CHOICE") is seventh
    data = ["task_type.name=MULTIPLE_CHOICE", "data=jsonl", f"data.path={rows_in(tmp_path)}"]
    alone = study(tmp_path / "alone", tiny_bert, *data, "lora.r=2")
    packed = study(tmp_path / "packed", tiny_bert, "-m", *data, "lora.r=2,4", "train.slots=2")
    assert len(packed.trials()) == 2
    parts = [example_scores.read(s.trial_folder(0)) for s in (alone, packed)]
    assert parts[0] is not None and parts[1] is not None and parts[0].value == parts[1].value
    interval = significance.interval(parts[0])
    assert interval.low <= parts[0].value <= interval.high
    assert main.main(["report", str(packed.folder)]) == 0
    report = (packed.folder / "report.md").read_text()
    assert "eval accuracy" in report and str(interval) in report
    assert main.main(["export", str(packed.folder), "--to", str(tmp_path / "out")]) == 0
    assert "multiple-choice" in (tmp_path / "out" / "README.md").read_text()
    loaded = predict.load(packed.trial_folder(0))
    found = predict.answers(loaded, [{"question": "What is number 3?", "choices": ["one 3", "two 3", "none"]}] * 2)
    assert found[0] == found[1] and found[0]["choice"] in ("one 3", "two 3", "none")


def test_metric_of_an_outside_package_ranks_trials_and_has_intervals(tiny_bert, tmp_path, monkeypatch):
    points = {"lorasweep.metrics": {"SEQ_CLS.balanced_accuracy": "outside_balanced:balanced_accuracy"}}
    outside.install(monkeypatch, tmp_path / "site", "outside_balanced", BALANCED, points)
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(80)))
    words = ["data=csv", f"data.path={tmp_path / 'a.csv'}", "task_type.primary=balanced_accuracy"]
    made = study(tmp_path, tiny_bert, *words)
    parts = example_scores.read(made.trial_folder(0))
    assert parts is not None and (parts.metric, parts.kind) == ("balanced_accuracy", "balanced")
    assert made.meta.metric == "balanced_accuracy" and significance.interval(parts).holds(parts.value)


def test_outside_metric_that_does_not_load_is_told_before_training(monkeypatch, tmp_path):
    points = {"lorasweep.metrics": {"SEQ_CLS.odd": "outside_gone:odd"}}
    outside.install(monkeypatch, tmp_path / "site", "outside_gone", "import no_such_module", points)
    with pytest.raises(ConfigError, match=r"SEQ_CLS\.odd comes from outside_gone 1\.0"):
        tasks.make(tasks.TaskSpec(name="SEQ_CLS")).metrics([])
