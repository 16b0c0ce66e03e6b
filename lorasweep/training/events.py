"""What goes into the engine, a trial to run, and what comes out: what happens to trials, in order."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasweep.config.spec import TrialSpec
from lorasweep.lora.adapter import Attached
from lorasweep.tasks.task import Prediction


@dataclass(frozen=True)
class Job:
    """A trial to run."""

    number: int
    spec: TrialSpec
    eval_steps: frozenset[int] = frozenset()
    """Optimiser steps to evaluate after, besides train.eval_every, the ends of epochs and the last step."""
    checkpoint: Path | None = None
    """What `Engine.checkpoint` wrote, to go on from; a missing or damaged file starts afresh."""
    start_from: Path | None = None
    """Folder of another trial's saved adapter, whose tensors a fresh trial takes over where shapes allow."""
    metric: str | None = None
    """What tells the best evaluation; None takes the task's own."""
    maximize: bool | None = None
    """Whether more of it is better; None knows it of the task's metrics."""


@dataclass(frozen=True)
class TrialBegan:
    number: int
    total_steps: int
    attached: Attached
    """On the base until the iteration goes on."""
    peak_rate: float
    """The highest learning rate of its course."""
    flops_a_token: int = 0
    """Of a step's linear layers."""
    step: int = 0
    """Where it goes on; 0 for a fresh trial."""
    carried: dict[str, Any] = field(default_factory=dict)
    """What the caller gave with the checkpoint."""
    last: "EvalEvent | None" = None
    """The last evaluation before the checkpoint."""
    notes: tuple[str, ...] = ()
    """What a person may want to know of the start."""


@dataclass(frozen=True)
class StepEvent:
    number: int
    step: int
    total_steps: int
    loss: float
    """Mean over the step's supervised items, nats, before the update."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    train_s: float
    """Seconds of training since the trial began, evaluation left out."""


@dataclass(frozen=True)
class EvalEvent:
    number: int
    step: int
    epoch: float
    metrics: dict[str, float]
    predictions: list[Prediction]
    eval_s: float
    is_asked_by_pruner: bool = False
    """Whether a pruner alone asked for it: it is not kept, and patience does not count it."""


@dataclass(frozen=True)
class TrialEnded:
    number: int
    step: int
    state: str
    """COMPLETE, also where patience was at its end, PRUNED where the loss went out of bounds or the caller asked for
    it, or FAIL where it does not fit."""
    reason: str
    train_s: float
    eval_s: float
    attached: Attached
    """On the base until the iteration goes on."""
    prefix_saved_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds of "train" and "eval" that kept states of frozen layers saved, an estimate."""
    packing_saved_s: float | None = None
    """Seconds of training that sharing passes saved, an estimate; None where both ways were not timed."""
    energy_j: float | None = None
    """Joules of its share of the training passes, evaluation left out; None where the driver does not tell."""
    kept: EvalEvent | None = None
    """The evaluation that its adapter is of: with train.keep=best the best, else the last; None before the first."""


Event = TrialBegan | StepEvent | EvalEvent | TrialEnded
