"""A slot: one trial's adapter, optimiser and place in its data, and when it is to be evaluated or ended."""

import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorasweep.config.spec import TrialSpec
from lorasweep.errors import ConfigError
from lorasweep.hardware import matmul_peak
from lorasweep.hardware.device import dtype_of
from lorasweep.lora import adapter
from lorasweep.models import quantization
from lorasweep.packing import dropout, packed_pass
from lorasweep.tasks.batches import epochs, step_counts
from lorasweep.tasks.task import Example
from lorasweep.training import checkpoint, optimizer
from lorasweep.training.base_traits import BaseTraits
from lorasweep.training.best import Best
from lorasweep.training.events import EvalEvent, Job
from lorasweep.training.first_token import Place
from lorasweep.training.loss_scale import LossScale

START_STEPS = 5
"""Steps whose mean loss is a trial's start loss."""

LEAST_START = 0.01
"""What a start loss counts for at least: a trial that begins near zero may rise."""

PATIENCE = 20
"""Steps in a row with a loss over the limit that end a trial."""

log = logging.getLogger(__name__)


@dataclass
class LossLimit:
    """Tells when a trial's loss stays far over its start."""

    first: list[float] = field(default_factory=list)
    over: int = 0
    """Steps in a row, up to now."""

    def reason(self, loss: float, ratio: float | None) -> str:
        """Take in a step's loss; return why the trial is to end, or nothing."""
        if len(self.first) < START_STEPS:
            self.first.append(loss)
            return ""
        start = statistics.fmean(self.first)
        self.over = self.over + 1 if ratio is not None and loss > ratio * max(start, LEAST_START) else 0
        if self.over < PATIENCE:
            return ""
        return f"the loss stayed over {ratio:g} times its start ({start:.2g}) for {PATIENCE} steps; last {loss:.3g}"


@dataclass
class Slot:
    """A place for one trial on the shared base."""

    job: Job
    attached: adapter.Attached
    layers: packed_pass.Layers
    optimizer: Any
    batches: Iterator[list[Example]]
    steps_per_epoch: int
    total_steps: int
    peak_rate: float
    """The highest learning rate of its course."""
    alone: str
    """Why no other trial may share its forward passes, if so."""
    best: Best
    base_bits: int
    """Of a base that LoftQ quantised."""
    first_token: Place | None
    """From where on it computes the first token alone."""
    flops_a_token: int
    """Of a step's linear layers: what a trial's share of a common pass goes by."""
    step: int = 0
    train_s: float = 0.0
    eval_s: float = 0.0
    prefix_saved_s: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "eval": 0.0})
    """What kept states of frozen layers saved, an estimate."""
    packing_saved_s: float | None = None
    """What sharing passes saved, an estimate; None where both ways were not timed."""
    energy_j: float = 0.0
    """Of training; 0 where the driver does not tell."""
    last: EvalEvent | None = None
    stopped: str = ""
    """Why it ends before its last step, complete, if so."""
    limit: LossLimit = field(default_factory=LossLimit)
    pruned: str = ""
    """Why the trial is to end, if it is."""
    failed: str = ""
    """Why it cannot go on, if so."""
    scale: LossScale | None = None
    """In fp16."""
    _sealed: dict[int, tuple[EvalEvent, Tensor]] = field(default_factory=dict)
    """The last and the best evaluation, with what checkpoints hold of them, by step."""

    @property
    def verdict(self) -> tuple[str, str]:
        """Return the state in which the trial ends, and why."""
        if self.failed:
            return "FAIL", self.failed
        return ("PRUNED", self.pruned) if self.pruned else ("COMPLETE", self.stopped)

    @property
    def number(self) -> int:
        return self.job.number

    @property
    def spec(self) -> TrialSpec:
        return self.job.spec

    def is_due(self) -> bool:
        """Tell whether to evaluate now: after this step, and not done yet."""
        wanted = self.is_evaluated_anyway or self.step in self.job.eval_steps
        before = -1 if self.total_steps == 0 else 0  # a trial that trains nothing is evaluated as it begins
        return wanted and self.step > (self.last.step if self.last else before)

    @property
    def is_evaluated_anyway(self) -> bool:
        """Whether the trial is evaluated after this step by its own settings, not for a pruner alone."""
        every = self.spec.train.eval_every or self.steps_per_epoch
        return self.step % every == 0 or self.step == self.total_steps

    @property
    def is_over(self) -> bool:
        return bool(self.failed or self.pruned or self.stopped) or self.step == self.total_steps

    def evaluated(self, found: EvalEvent) -> None:
        """Take in an evaluation."""
        self.last = found
        if not found.is_asked_by_pruner:
            trained = self.attached.trained()
            self.stopped = self.best.take(found, trained, is_last=self.step == self.total_steps)

    def take_kept(self) -> EvalEvent | None:
        """Let the adapter be the one that the trial keeps; return the evaluation that this is of."""
        if not self.best.keeps or self.best.kept is None:
            return self.last
        self.best.put_back(self.attached.trained())
        return self.best.kept

    def begin_step(self) -> None:
        """Begin the step's dropout."""
        self.layers.stream.at(self.spec.train.seed, self.step)
        self.train(True)

    def train(self, on: bool) -> None:
        """Switch dropout: of the adapters alone, or of the base too where the trial asks for it."""
        self.layers.stream.on = on
        if self.spec.model.base_dropout:
            self.attached.peft_model.train(on)

    def spared(self, seconds: float) -> None:
        """Take in what a step saved by sharing its pass."""
        self.packing_saved_s = (self.packing_saved_s or 0.0) + seconds

    def unscale(self) -> bool:
        """Take the loss scale out of the gradients; return False where they overflowed: do the step again."""
        return self.scale is None or self.scale.unscale(self.attached.parameters())

    def update(self, rate: float, norm: float) -> None:
        """Clip a gradient of this norm, step and clear."""
        self.optimizer.clip(norm, self.spec.train.max_grad_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self, device: torch.device) -> dict[str, Any]:
        """Return all that the trial needs to go on."""
        return {
            "step": self.step,
            "train_s": self.train_s,
            "eval_s": self.eval_s,
            "prefix_saved_s": dict(self.prefix_saved_s),
            "packing_saved_s": self.packing_saved_s,
            "energy_j": self.energy_j,
            "pruned": self.pruned,
            "limit": asdict(self.limit),
            "scale": asdict(self.scale) if self.scale else None,
            "stopped": self.stopped,
            "last": self.last and self._sealed_of(self.last),
            "best": self._best_state(),
            "tensors": checkpoint.copied(self.attached.trained()),
            "initial": checkpoint.copied(self.attached.initial),
            "base_bits": self.base_bits,
            "optimizer": self.optimizer.state_dict(),
            "random": checkpoint.random_state(device) if self.spec.model.base_dropout else {},
        }

    def _best_state(self) -> dict[str, Any] | None:
        """Return what a checkpoint holds of the best evaluation: itself, where it is not the last one."""
        kept = self.best.kept
        if kept is None:
            return None
        return {"kept": None if kept is self.last else self._sealed_of(kept), **self.best.state()}

    def _sealed_of(self, found: EvalEvent) -> Tensor:
        """Return an evaluation for a checkpoint: sealed once, as its predictions are many."""
        if found.step not in self._sealed or self._sealed[found.step][0] is not found:
            self._sealed = {step: pair for step, pair in self._sealed.items() if pair[0] in (self.last, self.best.kept)}
            self._sealed[found.step] = found, checkpoint.sealed(vars(found))
        return self._sealed[found.step][1]

    def restore(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what `state` gave, with the A and B that the adapter began with already in it."""
        with torch.no_grad():
            for name, parameter in self.attached.trained().items():
                parameter.copy_(saved["tensors"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.pruned = saved["step"], saved["pruned"]
        self.train_s, self.eval_s = saved["train_s"], saved["eval_s"]
        self.prefix_saved_s |= saved.get("prefix_saved_s", {})
        self.packing_saved_s = saved.get("packing_saved_s")
        self.energy_j = saved.get("energy_j", 0.0)
        self.limit = LossLimit(**saved["limit"])
        self.scale = LossScale(**saved["scale"]) if saved.get("scale") else None
        self.stopped = saved.get("stopped", "")
        self.last = EvalEvent(**checkpoint.opened(saved["last"])) if saved["last"] is not None else None
        best = saved.get("best")  # earlier versions kept the last one
        if best is not None:
            kept = self.last if best["kept"] is None else EvalEvent(**checkpoint.opened(best["kept"]))
            assert kept is not None, "it was the last one"
            self.best.restore(best, kept)
        checkpoint.set_random_state(saved["random"], device)


@dataclass
class Step:
    """A step that a slot is about to take."""

    slot: Slot
    examples: list[Example]
    loss: float = 0.0
    """Mean over the step's supervised items, in the end."""
    tokens: int = 0
    seconds: float = 0.0
    """This trial's share."""
    joules: float = 0.0
    """Likewise; 0 where the driver does not tell."""

    @property
    def length(self) -> int:
        return max(map(len, self.examples))

    def parts(self, micro: int) -> list[list[Example]]:
        """Return the micro batches."""
        return [self.examples[i : i + micro] for i in range(0, len(self.examples), micro)]

    def begin(self) -> None:
        """Forget what was done of the step."""
        self.slot.optimizer.zero_grad()
        self.loss, self.tokens, self.seconds, self.joules = 0.0, 0, 0.0, 0.0


def new_slot(
    job: Job,
    attached: adapter.Attached,
    examples: Sequence[Example],
    peak_rate: float,
    saved: Mapping[str, Any] | None,
    device: torch.device,
    traits: BaseTraits,
    best: Best,
) -> Slot:
    """Return the slot of a trial whose adapter was just made, to begin or to go on from what `Slot.state` gave."""
    if saved:
        adapter.begin_from(attached, saved["initial"])
    lacking = quantization.lacking(job.spec, device)
    if lacking:
        raise ConfigError(lacking)
    stream = dropout.DropoutStream(device)
    layers = packed_pass.layers(attached, stream)
    place = traits.first_token
    first = place if place and not job.spec.model.base_dropout and not place.inside(layers.whole) else None
    train = job.spec.train
    per_epoch, total = step_counts(train, len(examples))
    slot = Slot(
        job=job,
        attached=attached,
        layers=layers,
        optimizer=optimizer.optimizer(attached.named, job.spec),
        batches=epochs(examples, train.batch_size, train.seed, saved["step"] if saved else 0),
        steps_per_epoch=per_epoch,
        total_steps=total,
        peak_rate=peak_rate,
        alone=packed_pass.alone_reason(job.spec)
        or traits.alone
        or packed_pass.scattered_reason(layers, traits.scattered),
        best=best,
        base_bits=adapter.quantised_bits(attached),
        first_token=first,
        flops_a_token=matmul_peak.flops_a_token(attached.base.model, first.once(attached.swap.places) if first else ()),
        scale=LossScale() if dtype_of(train, device) == torch.float16 else None,
    )
    slot.train(False)
    if saved:
        slot.restore(saved, device)
    return slot


def fits(saved: Mapping[str, Any], attached: adapter.Attached) -> bool:
    """Tell whether an adapter made here is the one of the checkpoint; data-driven ranks and LoftQ may differ."""
    shapes = {n: p.shape for n, p in attached.trained().items()}
    same = shapes == {n: t.shape for n, t in saved["tensors"].items()}
    if not same or saved["base_bits"] != adapter.quantised_bits(attached):
        log.warning("the adapter's start came out otherwise than before (another machine?); the trial starts afresh")
        return False
    return True
