"""The description of a study in MLflow."""

import shlex
from pathlib import Path

from lorasweep import console
from lorasweep.study.meta import STUDY, find_meta
from lorasweep.study.result import RESULT, read_result
from lorasweep.tracking import outbox
from lorasweep.tracking.outbox import Ledger


def answer(folder: Path, ended: Ledger) -> str:
    """Return a study's question, its answer, and how to see and repeat it, in Markdown; "" without a winner."""
    study = find_meta(folder)
    if "best_trial" not in ended.summary or study is None:
        return ""
    number, name = int(ended.summary["best_trial"]), study.metric
    best, run = read_result(folder / str(number)), outbox.load(folder / str(number))
    trial = f"[trial {number}](#/runs/{run.run_id})" if run and run.run_id else f"trial {number}"
    where = shlex.quote(study.place)
    command = console.command(shlex.join(["python", "-m", "lorasweep", "-m", *study.overrides]), folder / STUDY)
    again = console.command(best.rerun, folder / str(number) / RESULT) if best else ""
    lines = [
        f"**Question**: {study.question}" if study.question else "",
        f"**Answer**: {ended.answer}" if ended.answer else "",
        f"**Best run**: {trial}",
        f"**Run it again**: `{again}`" if again else "",
        f"**The whole study**: `{command}`",
        f"**Report**: `python -m lorasweep report {where}`, and under Artifacts where it was made",
        f"**Compare**: tick the runs below this one and press Compare; `{outbox.OBJECTIVE}` is their eval {name}",
    ]
    return "\n\n".join(line for line in lines if line)
