"""The description of a study in MLflow."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from lorasweep.study.meta import find_meta
from lorasweep.study.result import read_result
from lorasweep.tracking import outbox


def answer(folder: Path, metrics: Mapping[str, float]) -> str:
    """Return a study's question, its answer, and how to see and repeat it, in Markdown; "" without a winner."""
    study = find_meta(folder)
    if "best_trial" not in metrics or study is None:
        return ""
    number, name = int(metrics["best_trial"]), study.metric
    best, run = read_result(folder / str(number)), outbox.load(folder / str(number))
    point = best.params_swept if best else {}
    swept = ", ".join(f"`{k}={v}`" for k, v in point.items()) or "the configuration as it is"
    trial = f"[trial {number}](#/runs/{run.run_id})" if run and run.run_id else f"trial {number}"
    tested = f", test {name} {metrics[f'test_{name}']:.4f}" if f"test_{name}" in metrics else ""
    where = shlex.quote(f"{study.outputs.rstrip('/')}/{study.name}".removeprefix("./"))
    command = shlex.join(["python", "-m", "lorasweep", "-m", *study.overrides])
    lines = [
        f"**Question**: {study.question}" if study.question else "",
        f"**Best**: {swept}, {trial}, eval {name} {metrics[f'best_eval_{name}']:.4f}{tested}",
        f"**Run it again**: `{best.rerun}`" if best and best.rerun else "",
        f"**The whole study**: `{command}`",
        f"**Report**: `python -m lorasweep report {where}`, and under Artifacts where it was made",
        f"**Compare**: tick the runs below this one and press Compare; `{outbox.OBJECTIVE}` is their eval {name}",
    ]
    return "\n\n".join(line for line in lines if line)
