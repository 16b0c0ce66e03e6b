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
from lorasweep.errors import ConfigError
from lorasweep.runner import launch, launchers, plan
from lorasweep.runner.interrupt import EXIT_INTERRUPTED
from lorasweep.serving import winner
from lorasweep.study.result import read_result
from lorasweep.study.study import Study

COSTS = ("adapter_mb", "peak_gib", "worker_peak_gib", "tokens_per_s", "steps")
"""Keys of result.json that become columns as they are."""


def run(overrides: Sequence[str]) -> dict[str, Any]:
    """Run one trial here, in a study of its own; return what its result.json holds, and the study's `folder`.

    Look at `state` first: a trial may have failed.

    Raises ConfigError for settings that are wrong or that mean several trials, KeyboardInterrupt where it was stopped.
    """
    if isinstance(overrides, str):
        raise ConfigError([f"run: takes a list of overrides, got a string; write run(['{overrides}'])"])
    planned = plan.plan(list(overrides))
    if len(planned.queue) != 1:
        raise ConfigError(
            [f"run: takes one trial, these overrides mean {len(planned.queue)}; use python -m lorasweep -m for a study"]
        )
    if launch.run_study(planned, launchers.here) == EXIT_INTERRUPTED:
        raise KeyboardInterrupt(f"stopped; go on with: python -m lorasweep resume {planned.folder}")
    found = read_result(planned.folder / "0")
    assert found is not None, "a trial that has ended leaves a result"
    return found | {"folder": str(planned.folder)}


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
    result = winner.result(study, trial.number)
    swept = trial.user_attrs.get("swept", trial.params)
    ended = "train_s" in result
    row = {"number": trial.number, "state": trial.state.name}
    row |= {key: swept.get(key) for key in study.meta.swept}
    row |= {
        "metric": result.get("metric", {}).get("value"),
        "trainable": result.get("params", {}).get("trainable"),
        "seconds": result["train_s"] + result["eval_s"] if ended else None,
    }
    row |= {key: result.get(key) for key in COSTS}
    row |= {
        f"{split}_{k}": v
        for split, key in (("eval", "metrics"), ("test", "test"))
        for k, v in result.get(key, {}).items()
    }
    return row | {"reason": result.get("reason") or "", "rerun": result.get("rerun", "")}


def load_best(folder: str | Path, trial: int | None = None) -> tuple[Any, Any]:
    """Return the best trial's peft model in evaluation mode, on a GPU where there is one, and its tokenizer.

    `trial` names another one. Raises ConfigError where it has left no adapter.
    """
    study = Study.open(Path(folder).resolve())
    loaded = winner.load(study.trial_folder(winner.pick(study, trial)))
    return loaded.model, loaded.tokenizer
