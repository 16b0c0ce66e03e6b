"""lorasweep from Python: run a trial, read a study, take its best model.

import lorasweep
result = lorasweep.run(["lora.r=16", "train.epochs=1"])
trials = lorasweep.load_study("outputs/rank")
model, tokenizer = lorasweep.load_best("outputs/rank")
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame
from lorasweep.config.measures import MEASURES
from lorasweep.errors import ConfigError
from lorasweep.runner import launch, launchers, plan
from lorasweep.runner.interrupt import EXIT_INTERRUPTED
from lorasweep.runner.request import Request
from lorasweep.serving import winner
from lorasweep.study.result import read_result, result_of
from lorasweep.study.study import Study


def run(overrides: Sequence[str]) -> dict[str, Any]:
    """Run one trial here, as a new study; return what its result.json holds, and the study's `folder`.

    Look at `state` first: a trial may have failed.

    Raises ConfigError for settings that are wrong or that mean several trials, KeyboardInterrupt where it was stopped.
    """
    if isinstance(overrides, str):
        raise ConfigError([f"run: takes a list of overrides, got a string; write run(['{overrides}'])"])
    planned = plan.plan(Request.of(list(overrides)))
    if len(planned.queue) != 1:
        raise ConfigError(
            [f"run: takes one trial, these overrides mean {len(planned.queue)}; use python -m lorasweep -m for a study"]
        )
    study = launch.make(planned)
    if launch.run_made(study, planned, launchers.here) == EXIT_INTERRUPTED:
        raise KeyboardInterrupt(f"stopped; go on with: python -m lorasweep resume {study.folder}")
    found = read_result(study.folder / "0")
    assert found is not None, "a trial that has ended leaves a result"
    return found.to_dict() | {"folder": str(study.folder)}


def load_study(folder: str | Path) -> "DataFrame":
    """Return a study's trials as a table, one a row: number, state, what was swept, metric, costs.

    `metric` is the metric that ranks them, whose name is in `.attrs["metric"]`; `eval_*` and `test_*` are all of them.
    Raises ConfigError where there is no study.
    """
    import pandas as pd

    study = Study.open(Path(folder).resolve())
    table = pd.DataFrame([_row(study, trial) for trial in study.trials()])
    table.attrs |= {"metric": study.meta.metric, "maximize": study.meta.maximize, "study": study.meta.name}
    return table


def _row(study: Study, trial: Any) -> dict[str, Any]:
    result = result_of(trial, study.trial_folder(trial.number))
    row = {"number": result.number, "state": result.state}
    row |= {key: result.params_swept.get(key) for key in study.meta.swept}
    row["metric"] = result.metric.value if result.metric else None
    row["trainable"] = result.trainable
    row["seconds"] = None if result.train_s is None else result.device_s
    row |= {name: getattr(result, name) for name in MEASURES}
    row |= {f"eval_{k}": v for k, v in (result.metrics or {}).items()}
    row |= {f"test_{k}": v for k, v in (result.test or {}).items()}
    return row | {"reason": result.reason, "rerun": result.rerun}


def load_best(folder: str | Path, trial: int | None = None, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Return the best trial's peft model in evaluation mode, on a GPU where there is one, and its tokenizer.

    Numbers that it gives are in the data's units. `trial` names another one, and `trust_remote_code` lets code run
    that comes with its base. Raises ConfigError where it has left no
    adapter.
    """
    study = Study.open(Path(folder).resolve())
    loaded = winner.load(study.trial_folder(winner.pick(study, trial)), trusted=trust_remote_code)
    import torch

    with torch.no_grad():
        loaded.task.finish(loaded.model)
    return loaded.model, loaded.tokenizer
