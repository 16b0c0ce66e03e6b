"""A study's trials as a table, the best one, and how to run it again."""

import shlex
from collections.abc import Mapping
from typing import Any

from lorasweep import display, outcome
from lorasweep.study import Study


def results(study: Study) -> list[dict[str, Any]]:
    """Return the result.json of every trial that has one, by number."""
    found = (outcome.read(study.trial_folder(trial.number)) for trial in study.trials())
    return [r for r in found if r is not None]


def show(study: Study, test: Mapping[str, float], outputs: str) -> None:
    """Print the table, the winner with its rerun line, and the line that opens the UI."""
    meta = study.meta
    columns = ["trial", *meta.swept, f"eval {meta.metric}", "trainable", "seconds", "adapter MB", "state"]
    rows = [_row(r, meta.swept) for r in results(study)]
    display.table(f"study {meta.name}", columns, rows)
    best = study.best()
    if best is not None:
        result = outcome.read(study.trial_folder(best.number))
        if result is None:  # it ran on a machine without our disk
            print(f"\nbest: trial {best.number}, eval {meta.metric} {best.values[0]:.4f}")
            return
        print(f"\nbest: trial {best.number}, eval {meta.metric} {best.values[0]:.4f}{_beside(result['baseline'])}")
        if test:
            known = {k: v for k, v in test.items() if k in result["baseline"]}
            print(f"its test {meta.metric}: {test[meta.metric]:.4f}{_beside(known)} (read once, after choosing)")
        print(f"run it again: {result['rerun']}")
        print(f"its adapter:  {display.shown(study.trial_folder(best.number) / 'adapter')}")
    if meta.mlflow_parent:
        where = [] if outputs == "./outputs" else [f"outputs={outputs}"]
        print(f"compare in MLflow: {shlex.join(['python', '-m', 'lorasweep', 'ui', *where])}")


def _row(result: Mapping[str, Any], swept: list[str]) -> list[str]:
    done = "params" in result
    return [
        str(result["number"]),
        *[display.short(result["params_swept"].get(k)) for k in swept],
        f"{result['metric']['value']:.4f}" if "metric" in result else "-",
        f"{result['params']['trainable']:,}" if done else "-",
        f"{result['train_s'] + result['eval_s']:.1f}" if done else "-",
        f"{result['adapter_mb']:.2f}" if done else "-",
        result["state"] + (f" ({result['reason']})" if result["reason"] else ""),
    ]


def _beside(baseline: Mapping[str, float]) -> str:
    """Return the trivial answers' scores in brackets, to be read beside a trial's."""
    if not baseline:
        return ""
    return " (" + ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in baseline.items()) + ")"
