"""How fast trials go on this machine: a few steps are timed before a study begins, and what that makes of a trial.

A trial is its start, its training tokens, its evaluations and the reload of what it saved, each at a measured pace.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from lorasweep.config.spec import TrialSpec
from lorasweep.errors import Unpackable
from lorasweep.models.base_model import Base
from lorasweep.packing import packed_pass, pass_cost
from lorasweep.runner.outcome import RELOADED_ROWS
from lorasweep.tasks.batches import epochs, step_counts
from lorasweep.tasks.task import Example, lengths_of
from lorasweep.training import workload
from lorasweep.training.engine import Engine, EvalEvent, Job, StepEvent, TrialBegan
from lorasweep.training.workload import Pace, Prepared, Workload

STEPS = 4
"""Optimiser steps that are timed at most; the first is slower than the others."""
LONG_S = 6.0
"""Seconds after which no further step is timed."""
EVAL_ROWS, WRITTEN_ROWS = 32, 4
"""Rows of eval that are timed, and such for which text is written."""

Kind = Callable[[TrialSpec], str]
"""Of trials that compute alike."""


def measure(spec: TrialSpec, work: Workload, base: Base, load_s: float) -> Pace:
    """Return the pace of trials like this one; their base was loaded in `load_s` seconds."""
    order = epochs(work.examples["train"], spec.train.batch_size, spec.train.seed)
    batches = list(islice(order, STEPS))
    asked = _asked(work.examples["eval"])
    rows = _spread(asked, WRITTEN_ROWS) if asked else _spread(work.examples["eval"], EVAL_ROWS)
    prepared = Prepared([e for batch in batches for e in batch], rows, work.tokenizer.pad_token_id)
    train = dataclasses.replace(
        spec.train, max_steps=0 if spec.train.max_steps == 0 else len(batches), eval_every=None, slots=1, epochs=1
    )
    jobs = iter([Job(0, dataclasses.replace(spec, train=train))])
    made = Engine(base, work.task, prepared)
    began, start_s, eval_s = time.perf_counter(), 0.0, 0.0
    times, tokens = [0.0], [0]
    events = made.run(lambda: next(jobs, None))
    for event in events:
        match event:
            case TrialBegan():
                start_s = time.perf_counter() - began
            case StepEvent():
                times.append(event.train_s)
                tokens.append(event.tokens)
                if event.train_s > LONG_S:
                    made.prune(0, "that is enough")
            case EvalEvent():
                eval_s = event.eval_s / len(rows)
    first = 1 if len(times) > 2 else 0
    timed = sum(tokens[first + 1 :])
    train_s = (times[-1] - times[first]) / timed if timed else 0.0
    overhead = _overhead(made, spec) if timed else 0.0
    if not eval_s:  # a forward pass is about a third of a step
        eval_s = train_s * sum(lengths_of(rows)) / len(rows) / 3
    return Pace(start_s, load_s, train_s, timed / max(1, len(times) - 1 - first), overhead, eval_s)


def _overhead(made: Engine, spec: TrialSpec) -> float:
    """Return what a pass costs by itself, in tokens; 0 where passes are not shared."""
    if spec.train.fixed_slots == 1 or spec.train.deterministic or packed_pass.alone_reason(spec) or made.traits.alone:
        return 0.0
    try:
        found = made.pass_cost(None)
    except (RuntimeError, Unpackable):  # no memory for it: the trials will find out
        return 0.0
    finally:
        made.base.model.zero_grad(set_to_none=True)
    return found if math.isfinite(found) else 0.0


def _asked(examples: Sequence[Example]) -> list[Example]:
    """Return the examples for which text is written."""
    return [e for e in examples if e.info and isinstance(e.info, tuple | list) and e.supervised > 1][:64]


def _spread(examples: Sequence[Example], most: int) -> list[Example]:
    lengths = lengths_of(examples)
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    return [examples[i] for i in order[:: math.ceil(len(order) / most)]]


def trials_s(specs: Sequence[TrialSpec], loaded: Mapping[str, Workload], kind: Kind, trials: int) -> list[float | None]:
    """Return how long trial of a study of `trials` will take; None where none of its kind was timed."""
    return [_trial_s(spec, loaded[workload.key(spec)], kind, trials) for spec in specs]


def _trial_s(spec: TrialSpec, work: Workload, kind: Kind, trials: int) -> float | None:
    pace = work.paces.get(kind(spec)) or next(iter(work.paces.values()), None)
    if pace is None:
        return None
    examples = work.examples
    lengths = lengths_of(examples["train"])
    per_epoch, steps = step_counts(spec.train, len(lengths))
    tokens = steps * sum(lengths) / per_epoch
    evaluations = math.ceil(steps / (spec.train.eval_every or per_epoch)) or 1
    if not spec.lora.target_modules and not spec.lora.full:  # states of frozen layers are kept after the first time
        tokens, evaluations = min(tokens, sum(lengths)), 1
    shared = pass_cost.MOST if spec.train.fixed_slots is None else spec.train.fixed_slots
    width = min(shared, trials) if pass_cost.pays(pace.overhead, pace.step_tokens) else 1
    alone = pace.step_tokens + pace.overhead
    share = (pace.step_tokens + pace.overhead / width) / alone if alone else 1.0
    rows = len(examples["eval"])
    total = pace.start_s + tokens * pace.train_s * share + evaluations * rows * pace.eval_s
    if spec.tracking.reload_check and not spec.lora.full:
        total += pace.load_s + min(rows, RELOADED_ROWS) * pace.eval_s
    return total
