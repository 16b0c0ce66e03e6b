"""What an ended trial leaves: its numbers, its answers, its adapter loaded again; and the winner's test score."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch

from lorasweep.config.spec import TrialSpec
from lorasweep.credentials import redact
from lorasweep.errors import ConfigError
from lorasweep.lora import adapter
from lorasweep.memory import out_of_memory
from lorasweep.models import base_model
from lorasweep.study import example_scores
from lorasweep.study.result import Metric, Params, Reload, TrialResult, result_of, write_result
from lorasweep.study.study import Study
from lorasweep.tasks.task import Prediction, Task
from lorasweep.training import evaluation, workload
from lorasweep.training.engine import Engine, EvalEvent

SHOWN_EXAMPLES = 8
"""Rows of the eval split that a trial leaves with the model's answers, for a person to read."""

MOST_SAID = 400
"""Characters of an error that are said where the winner has no test score."""

RELOADED_ROWS = 128
"""Rows of the eval split that a saved adapter is tried on, beside those with generated answers; all of a large one
would be paid for twice."""

LEAST_LOSS = 0.01
"""What a loss counts for at least there: near zero, rounding is a large part of it."""

RELOAD_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative difference of the eval loss between the trial and its adapter loaded again, by the base's number
format: plain peft multiplies A and B in fp32, we in the base's format."""


def metric_of(last: EvalEvent, task: Task, primary: str) -> Metric:
    """Return the metric that ranks the trials, as of a trial's last evaluation."""
    return Metric(name=primary, value=last.metrics[primary], maximize=task.metric(primary).maximize)


def sizes(counts: adapter.Counts, *, is_trained: bool = True) -> Params:
    """Return the numbers of parameters; none trains where no step was taken."""
    if not is_trained:
        return Params(lora=0, bias=0, modules_to_save=0, total=counts.total, trainable=0, trainable_pct=0.0)
    share = 100 * counts.trainable / counts.total
    return Params(**asdict(counts), trainable=counts.trainable, trainable_pct=share)


def write_examples(path: Path, last: EvalEvent, work: workload.Workload) -> None:
    """Write a few rows of the eval split and what the model answers."""
    records = work.data.splits["eval"]
    first = {p["row"]: p for p in reversed(last.predictions)}
    lines = []
    for row in sorted(first)[:SHOWN_EXAMPLES]:
        record = "\n".join(f"{k}: {str(v)[:500]}" for k, v in records[row].items())
        lines.append(f"{record}\nanswer: {work.task.readable(records[row], first[row])}\n")
    path.write_text("\n".join(lines), encoding="utf8")


def reload(
    folder: Path, spec: TrialSpec, last: EvalEvent, work: workload.Workload, trainer: Engine, primary: str
) -> Reload:
    """Evaluate the adapter saved in `folder` with plain peft on a base loaded afresh, and compare: on all rows of a
    small eval split, on some of a large one. A metric that such rows have not is None.
    """
    began = time.perf_counter()
    rows = some_rows(last.predictions, RELOADED_ROWS)
    some = [e for e in trainer.prepared.eval if e.row in rows]
    fresh = base_model.load(spec.model, spec.train, trainer.task, work.tokenizer)
    reloaded = adapter.reload(folder, fresh, spec.lora, spec.task_type).base_model.model
    predictions = evaluation.predict(reloaded, trainer.task, some, spec.train, trainer.prepared.pad_id)
    metrics = trainer.task.metrics(predictions)
    before = trainer.task.metrics([p for p in last.predictions if p["row"] in rows])
    gap = abs(metrics["loss"] - before["loss"]) / max(LEAST_LOSS, abs(before["loss"]))
    known = math.isfinite(metrics[primary]) and math.isfinite(before[primary])
    return Reload(
        rows=len(rows),
        metric=metrics[primary] if known else None,
        difference=metrics[primary] - before[primary] if known else None,
        loss_relative_difference=gap,
        same=gap <= RELOAD_TOLERANCE[trainer.base.model.dtype],
        seconds=time.perf_counter() - began,
    )


def some_rows(predictions: Sequence[Prediction], most: int) -> set[int]:
    """Return rows spread evenly over a split, `most` at most, and those whose answers were generated."""
    rows = sorted({p["row"] for p in predictions})
    return {*rows[:: math.ceil(len(rows) / most)], *(p["row"] for p in predictions if "text" in p)}


def score_winner(study: Study, loaded: Mapping[str, workload.Workload]) -> dict[str, float]:
    """Return the best trial's metrics on the test split, which is read here and nowhere else.

    {} without a winner, and, with the reason printed, where this machine cannot load it: it may have launched a study
    for others.
    """
    best = study.best()
    folder = study.trial_folder(best.number) if best is not None else None
    if best is None or folder is None or not (folder / "adapter").is_dir():  # it ran on a machine without our disk
        return {}
    result = result_of(best, folder)
    if result.test is not None:
        return result.test
    try:
        return _scored(study, result, folder, best.user_attrs["overrides"], loaded)
    except Exception as error:  # memory, a damaged adapter: table and report do without this score
        said = "; ".join(error.problems) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        out_of_memory.free()
        print(f"the test split was not read: {redact(said)[:MOST_SAID]}; `resume` tries again, here or elsewhere")
        return {}


def _scored(
    study: Study,
    result: TrialResult,
    folder: Path,
    overrides: Sequence[str],
    loaded: Mapping[str, workload.Workload],
) -> dict[str, float]:
    """Evaluate the adapter in `folder` on the test split; keep the scores in result.json."""
    spec = study.spec(overrides)
    work = loaded.get(workload.key(spec)) or workload.workload(spec)
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    adapted = adapter.reload(folder / "adapter", base, spec.lora, spec.task_type).base_model.model
    found = evaluation.predict(adapted, work.task, work.examples["test"], spec.train, work.tokenizer.pad_token_id)
    found = [p | {"split": "test"} for p in found]
    records = work.data.splits["test"]
    example_scores.write(folder, work.task, study.meta.metric, found, records, example_scores.TEST_NAME)
    scores = work.task.metrics(found) | work.task.baseline(work.data, "test")
    write_result(folder, replace(result, test=scores, test_fingerprint=work.data.test_fingerprint))
    return scores


def worker_gib(device: torch.device) -> float:
    """Return the highest memory use of this worker so far, GiB: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # which Windows has not

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
