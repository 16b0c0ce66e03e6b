"""What a worker does with events: evaluations are reported and judged, a result is there before the study is told."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.studies import study_of

from lorasweep import tasks
from lorasweep.config import compose
from lorasweep.config.spec import TaskSpec
from lorasweep.console import Display
from lorasweep.errors import LostLease
from lorasweep.runner.endings import Endings
from lorasweep.runner.events import Events
from lorasweep.runner.failures import Failures
from lorasweep.runner.trial_run import Running
from lorasweep.runner.worker import Worker
from lorasweep.study.queue import Queue
from lorasweep.study.result import Metric, Params
from lorasweep.study.study import Study
from lorasweep.study.trial import Trial
from lorasweep.training.events import EvalEvent


class Trainer:
    """Remembers which trials were to end."""

    def __init__(self) -> None:
        self.pruned: dict[int, str] = {}

    def prune(self, number: int, reason: str) -> None:
        self.pruned[number] = reason


def open_next(study: Study) -> Running:
    """Claim a trial and open its folder, as a worker does."""
    number = study.claim()
    assert number is not None
    folder = study.trial_folder(number)
    folder.mkdir()
    (folder / "config.yaml").touch()
    return Running(study, Trial(number, compose.compose_trial(["tracking=none"])), folder)


def handlers(study: Study) -> tuple[Endings, Events, list[int]]:
    forgotten: list[int] = []
    display = Display(alone=True)
    for trial in study.trials():
        display.begin(trial.number, f"trial {trial.number}")
    endings = Endings(study, display, lambda running: forgotten.append(running.number))
    failures = Failures(study.folder, endings, str)
    task = tasks.make(TaskSpec(name="SEQ_CLS"))
    return endings, Events(study, display, endings, failures, lambda spec: SimpleNamespace(task=task)), forgotten


def evaluated(number: int, step: int, accuracy: float) -> EvalEvent:
    return EvalEvent(number, step, 0.5, {"accuracy": accuracy, "loss": 1.0}, [], 0.1)


def test_evaluation_is_reported_and_the_pruner_asked_once_all_have_reported(tmp_path):
    study = study_of(tmp_path, [2, 4], pruner="threshold", lower=0.5, min_complete=0)
    running = {r.number: r for r in (open_next(study), open_next(study))}
    _, events, _ = handlers(study)
    trainer = Trainer()
    for number, accuracy in ((0, 0.3), (1, 0.7)):
        running[number].step, running[number].total_steps = 2, 10
        events.handle(running[number], evaluated(number, 2, accuracy), trainer)
    assert trainer.pruned == {}
    events.judge(running, trainer)
    assert trainer.pruned == {0: "threshold: accuracy 0.3000 at step 2"}
    assert study.queue.verdict(0) and not study.queue.verdict(1)
    assert study.trial(1).intermediate_values == {2: 0.7}


def test_metric_that_is_no_number_ends_the_trial(tmp_path):
    study = study_of(tmp_path, [2])
    running = open_next(study)
    _, events, _ = handlers(study)
    trainer = Trainer()
    events.handle(running, evaluated(0, 2, math.nan), trainer)
    assert trainer.pruned == {0: "accuracy is nan at step 2"}
    assert study.trial(0).intermediate_values == {}


def test_result_is_there_before_the_study_is_told(tmp_path, monkeypatch):
    study = study_of(tmp_path, [2])
    running = open_next(study)
    endings, _, forgotten = handlers(study)
    metric = Metric(name="accuracy", value=0.7, maximize=True)
    result = running.result("COMPLETE", "", metric=metric, params=Params(trainable=5), steps=3, train_s=1.0, eval_s=0.5)

    def killed(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Queue, "tell", killed)
    with pytest.raises(KeyboardInterrupt):
        endings.finish(running, result)
    assert json.loads((running.folder / "result.json").read_text())["metric"]["value"] == 0.7
    assert forgotten == []
    monkeypatch.undo()
    endings.tell(running, result)
    assert (study.trial(0).values, forgotten) == ([0.7], [0])
    assert study.trial(0).user_attrs["device_s"] == 1.5 and study.trial(0).user_attrs["trainable"] == 5


def test_failed_trial_keeps_its_trace_and_the_last_line_is_the_reason(tmp_path):
    study = study_of(tmp_path, [2])
    running = open_next(study)
    endings, _, forgotten = handlers(study)
    endings.fail(running, "Traceback\nRuntimeError: out of luck\n")
    written = json.loads((running.folder / "result.json").read_text())
    assert (written["state"], written["reason"]) == ("FAIL", "RuntimeError: out of luck")
    assert written["traceback"].startswith("Traceback")
    assert (study.trial(0).state.name, forgotten) == ("FAIL", [0])


def test_failure_of_a_trial_that_another_worker_has_leaves_nothing(tmp_path, monkeypatch):
    study = study_of(tmp_path, [2])
    running = open_next(study)
    endings, _, forgotten = handlers(study)

    def lost(*_) -> None:
        raise LostLease("given away")

    monkeypatch.setattr(Queue, "ensure_ours", lost)
    endings.fail(running, "RuntimeError: out of luck")
    assert not (running.folder / "result.json").exists() and forgotten == [0]


def test_trial_that_cannot_be_drawn_fails_and_the_next_is_taken(tmp_path, monkeypatch):
    study = study_of(tmp_path, [2, 4])
    drawn = Study.drawn

    def broken(self, number, *identity):
        if number == 0:
            raise ValueError("no point is left")
        return drawn(self, number, *identity)

    monkeypatch.setattr(Study, "drawn", broken)
    taken = Worker(study)._take()
    assert taken is not None and taken.number == 1
    assert (study.trial(0).state.name, study.trial(0).user_attrs["reason"]) == ("FAIL", "ValueError: no point is left")
    assert Path(study.trial_folder(0) / "result.json").exists()
