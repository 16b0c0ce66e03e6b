"""What a command needs torch for, as functions of plain values: called in a process that has torch, or right here.

Nothing here imports torch before it is called.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasweep.training.workload import Workload

from lorasweep.runner.findings import Findings
from lorasweep.runner.points import Points

Begin = Callable[..., Callable[[], Any]]
"""(function, its arguments): begins a call and returns how its answer is waited for."""

_looked_at: "dict[str, Workload]" = {}
"""What the last pre-flight of this process has loaded, until a study takes it."""


def has_torch() -> bool:
    """Return whether this process does itself what needs torch: it has it, as in a notebook, or can hand it to no
    other one, as on Windows.
    """
    return "torch" in sys.modules or os.name != "posix"


def here(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Call a function in this process, at once."""
    answer = function(*arguments)
    return lambda: answer


def look(asked: Points, is_here: bool, keep: bool) -> Findings:
    """Return what the pre-flight finds. With `keep`, what it has loaded is kept, for who trains in this process.

    Raises ConfigError with the problems of all trials.
    """
    from lorasweep.hardware import device
    from lorasweep.runner import preflight, rehearsal, trial_pace

    _looked_at.clear()
    specs = asked.specs
    loaded = preflight.preflight(specs, is_here, keep)
    found = preflight.findings(specs, loaded, asked.space.keys, is_here)
    trials_s = trial_pace.trials_s(specs, loaded, rehearsal.kind, len(asked.entries))
    divided = is_here and device.device_of(specs[0].train).type == "cpu"
    found = replace(found, trials_s=trials_s, divided=divided)
    if keep:
        _looked_at.update(loaded)
    return found


def look_here(asked: Points, is_here: bool, keep: bool) -> Findings:
    """The same for a command that trains in this process, if it has a single worker."""
    return look(asked, is_here, keep and asked.specs[0].search.workers == 1)


def loaded() -> "dict[str, Workload]":
    """Return what the last pre-flight of this process has kept, once."""
    taken = dict(_looked_at)
    _looked_at.clear()
    return taken


def adopt(folder: str) -> None:
    """Keep for the workers of this process what its last pre-flight has loaded for this study."""
    taken = loaded()
    if taken:
        from lorasweep.runner import worker

        worker.prepare(taken, folder)


def score(folder: str, trusted: bool) -> dict[str, float]:
    """Return the winner's metrics on the test split, read from its result where they stand there."""
    from lorasweep.runner import outcome, worker
    from lorasweep.study.study import Study

    return outcome.score_winner(Study.open(Path(folder), trusted=trusted), worker.prepared(folder))


def log_winner(folder: str, trusted: bool) -> str:
    """Log the winner as an MLflow model; return what was done."""
    from lorasweep.serving import model_registry
    from lorasweep.study.study import Study

    study = Study.open(Path(folder), trusted=trusted)
    return model_registry.log_winner(study, study.first_spec())
