"""Studies whose trials end without training, and settings with which real ones end in seconds."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lorasweep.config.spec import SearchSpec, TaskSpec
from lorasweep.search import space
from lorasweep.study import example_scores
from lorasweep.study.meta import Entry, StudyMeta
from lorasweep.study.result import Metric, Params, TrialResult, write_result
from lorasweep.study.study import Study
from lorasweep.tasks import make

SMALL = [
    "train.max_steps=4",
    "train.eval_every=2",
    "train.batch_size=8",
    "data.max_train_samples=64",
    "data.max_eval_samples=32",
]
"""Settings with which a trial on a tiny model takes a second."""

SPACE, _ = space.read(["lora.r=2,4,8,16", "train.epochs=1"])
ROWS = 400


def study_of(folder: Path, ranks: list[int], *, maximize: bool = True, **search) -> Study:
    name = f"s{time.monotonic_ns()}"
    meta = StudyMeta(
        name=name,
        swept=SPACE.keys,
        overrides=[],
        metric="accuracy" if maximize else "loss",
        maximize=maximize,
        created="",
        space=SPACE.describe(),
        search=asdict(SearchSpec(**search)),
    )
    return Study.create(folder / name, meta, [Entry(SPACE.line({"lora.r": r}), {"lora.r": r}) for r in ranks])


def _predictions(value: float, shift: int) -> list[dict]:
    right = np.roll(np.arange(ROWS) < round(value * ROWS), shift)
    return [
        {"row": i, "loss": value + 0.01 * (i % 5), "supervised": 1, "prediction": int(ok), "label": 1}
        for i, ok in enumerate(right)
    ]


def end(
    study: Study,
    value: float,
    *,
    trainable: int = 100,
    train_s: float = 1.0,
    shift: int = 0,
    eval_rows: str = "",
    groups: int = 0,
    test: float | None = None,
    baseline: float | None = None,
    more: Sequence[float] = (),
    evaluations: Sequence[np.ndarray] = (),
) -> int:
    """End the next trial with a share of right answers (or a mean loss); `shift` says which examples are right.

    `evaluations` are which examples were right at each of its evaluations. `test` is the same as `value` on the test
    split, `baseline` what the majority reaches on both, `more` the values of further objectives.
    """
    number = study.claim()
    assert number is not None
    folder = study.trial_folder(number)
    folder.mkdir()
    kind = study.meta.metric
    task = make(TaskSpec(name="SEQ_CLS"))
    task.classes = ["no", "yes"]
    records = [{"group": i % groups} if groups else {} for i in range(ROWS)]
    example_scores.write(folder, task, kind, _predictions(value, shift), records)
    for step, right in enumerate(evaluations, 1):
        at_step = [{"row": i, "prediction": int(ok), "label": 1} for i, ok in enumerate(right)]
        study.queue.report(number, step, float(right.mean()))
        example_scores.write_evaluation(folder, step, task.metric(kind).parts(at_step))
    if test is not None:
        example_scores.write(folder, task, kind, _predictions(test, shift), records, example_scores.TEST_NAME)
    trivial = {} if baseline is None else {f"majority_{kind}": baseline}
    known = study.trial(number).user_attrs
    result = TrialResult(
        number=number,
        state="COMPLETE",
        reason="",
        overrides=known["overrides"],
        params_swept=known["swept"],
        rerun=f"rerun {number}",
        metric=Metric(name=kind, value=value, maximize=study.meta.maximize),
        params=Params(trainable=trainable),
        eval_fingerprint=eval_rows,
        baseline=trivial or None,
        test=None if test is None else {kind: test, **trivial},
        train_s=train_s,
        eval_s=0.1,
        adapter_mb=trainable / 10,
        peak_gib=1.0,
    )
    write_result(folder, result)
    study.queue.tell(number, "COMPLETE", [value, *more], result.stored())
    return number
