"""What a task learned of its data (the classes, the range of the scores), beside the adapter: enough to use it later.

<trial>/config.yaml   the trial's settings
<trial>/task.json     what the task learned
<trial>/adapter/      the adapter in peft's format
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lorasweep import tasks
from lorasweep.config import spec
from lorasweep.config.spec import TrialSpec
from lorasweep.data import dataset
from lorasweep.errors import ConfigError
from lorasweep.tasks.task import Task

NAME = "task.json"
CONFIG = "config.yaml"


def write(folder: Path, task: Task) -> None:
    """Write what a fitted task learned into a trial's folder."""
    facts = {name: getattr(task, name) for name in (*task.state, "found")}
    (folder / NAME).write_text(json.dumps(facts, indent=1), encoding="utf8")


def settings(folder: Path) -> TrialSpec:
    """Return the settings that a trial's folder holds. Raises ConfigError where there are none, or unfit ones."""
    path = folder / CONFIG
    try:
        tree: Any = yaml.safe_load(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise ConfigError(
            [f"{path}: is not there; the trial has not begun, or ran on a machine without our disk"]
        ) from None
    state = folder / NAME
    if state.exists():
        tree["data"] |= json.loads(state.read_text(encoding="utf8")).get("found", {})
    found, problems = spec.trial_spec(tree, ())
    if found is None:
        raise ConfigError(problems, str(path))
    return found


def task_of(folder: Path, trial: TrialSpec, **changed: Any) -> Task:
    """Return the trial's task, fitted, with other settings where `changed` names task_type's keys.

    Where the folder does not say what it learned, the data are read again. Raises ConfigError where they are gone.
    """
    task = tasks.make(replace(trial.task_type, **changed))
    columns = task.columns(trial.data)
    path = folder / NAME
    if path.exists():
        task.restore(json.loads(path.read_text(encoding="utf8")))
        return task
    problems = task.fit(dataset.load(trial.data, columns, task.builtin, trial.task_type.problem_type))
    if problems:
        raise ConfigError(problems)
    return task
