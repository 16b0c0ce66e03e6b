"""The description of a study in MLflow."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from lorasweep.tracking import outbox


def answer(folder: Path, metrics: Mapping[str, float]) -> str:
    """Return a study's question, its answer, and how to see and repeat it, in Markdown; "" without a winner."""
    if "best_trial" not in metrics:
        return ""
    study = outbox.read_study(folder)
    number, name = int(metrics["best_trial"]), study["metric"]
    best, run = outbox.read_result(folder / str(number)), outbox.load(folder / str(number))
    swept = ", ".join(f"`{k}={v}`" for k, v in best.get("params_swept", {}).items()) or "the configuration as it is"
    trial = f"[trial {number}](#/runs/{run.run_id})" if run and run.run_id else f"trial {number}"
    tested = f", test {name} {metrics[f'test_{name}']:.4f}" if f"test_{name}" in metrics else ""
    where = shlex.quote(f"{study['outputs'].rstrip('/')}/{study['name']}".removeprefix("./"))
    command = shlex.join(["python", "-m", "lorasweep", "-m", *study["overrides"]])
    lines = [
        f"**Question**: {study['question']}" if study["question"] else "",
        f"**Best**: {swept}, {trial}, eval {name} {metrics[f'best_eval_{name}']:.4f}{tested}",
        f"**Run it again**: `{best['rerun']}`" if "rerun" in best else "",
        f"**The whole study**: `{command}`",
        f"**Report**: `python -m lorasweep report {where}`, and under Artifacts where it was made",
        f"**Compare**: tick the runs below this one and press Compare; `{outbox.OBJECTIVE}` is their eval {name}",
    ]
    return "\n\n".join(line for line in lines if line)
