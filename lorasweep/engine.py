"""The training loop: trials in slots on one frozen base, one optimiser step of each at a time; yields what happens.

It knows neither Optuna nor MLflow. Whoever iterates decides what an event leads to; a slot is freed when the iteration
goes on after its TrialEnded. Between two events a trial can be saved, to go on later as if nothing had happened.
"""

import functools
import inspect
import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lorasweep import adapter, checkpoint, pack, transfer
from lorasweep.errors import ConfigError, Unstable
from lorasweep.model import Base
from lorasweep.schedule import epochs, learning_rate, step_counts
from lorasweep.spec import TrainSpec, TrialSpec
from lorasweep.tasks import Example, Prediction, Task

LOOK_AT = 32
"""Training batches, or as many examples in larger ones, that a data-driven initialisation sees."""

START_STEPS = 5
"""A trial's start loss is the mean over so many steps."""

LEAST_START = 0.01
"""What a start loss counts for at least: a trial that begins near zero may rise."""

PATIENCE = 20
"""A trial ends when its loss was over the limit for so many steps in a row."""

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class TrialBegan:
    number: int
    total_steps: int
    attached: adapter.Attached
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


@dataclass(frozen=True)
class TrialEnded:
    number: int
    step: int
    state: str
    """COMPLETE, or PRUNED where the loss went out of bounds or the caller asked for it."""
    reason: str
    train_s: float
    eval_s: float
    attached: adapter.Attached
    """Still on the base until the iteration goes on."""


Event = TrialBegan | StepEvent | EvalEvent | TrialEnded


@dataclass
class Prepared:
    """A data set as a task's examples, ready for any trial that shares the base."""

    train: Sequence[Example]
    eval: Sequence[Example]
    pad_id: int


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
    optimizer: torch.optim.Optimizer
    parameters: list[torch.nn.Parameter]
    batches: Iterator[list[Example]]
    steps_per_epoch: int
    total_steps: int
    stream: pack.DropoutStream
    base_bits: int
    """Of a base that LoftQ quantised."""
    step: int = 0
    train_s: float = 0.0
    eval_s: float = 0.0
    last: EvalEvent | None = None
    limit: LossLimit = field(default_factory=LossLimit)
    pruned: str = ""
    """Why the trial is to end, if it is."""

    @property
    def number(self) -> int:
        return self.job.number

    @property
    def spec(self) -> TrialSpec:
        return self.job.spec

    def is_due(self) -> bool:
        """Tell whether to evaluate now: after this step, and not done yet."""
        every = self.spec.train.eval_every or self.steps_per_epoch
        wanted = self.step % every == 0 or self.step == self.total_steps or self.step in self.job.eval_steps
        return wanted and self.step > (self.last.step if self.last else 0)


class Engine:
    """Trains trials that share a base, a task and a data set."""

    def __init__(self, base: Base, task: Task, prepared: Prepared) -> None:
        self.base = base
        self.task = task
        self.prepared = prepared
        self.device = next(base.model.parameters()).device
        self.slots: list[Slot] = []

    def run(self, source: Callable[[], Job | None]) -> Generator[Event, None, None]:
        """Train trials from `source` until it gives None, and yield their events.

        Raises ConfigError for a checkpoint of another trial, and for a start_from without an adapter.
        """
        while (job := source()) is not None:
            saved = checkpoint.read(job.checkpoint, self._identity(job)) if job.checkpoint else None
            spec = job.spec
            inputs = functools.partial(self._first_inputs, spec)
            attached = adapter.attach(self.base, spec.lora, spec.task_type, spec.train.seed, inputs)
            try:
                yield self._admit(job, attached, saved)
                yield from self._train(self.slots[-1])
            finally:
                self.slots = [s for s in self.slots if s.attached is not attached]
                pack.uninstall(attached.peft_model)
                adapter.detach(attached)

    def prune(self, number: int, reason: str) -> None:
        """End a running trial after its current step."""
        for slot in self.slots:
            if slot.number == number:
                slot.pruned = reason

    def checkpoint(self, number: int, path: Path, carried: Mapping[str, Any]) -> int:
        """Write all that a running trial needs to go on, and `carried`, plain data of the caller's; return its step.

        To be called between two events. A failed write leaves the file as it was.
        """
        (slot,) = [s for s in self.slots if s.number == number]
        state = {
            "identity": self._identity(slot.job),
            "carried": checkpoint.plain(carried),
            "step": slot.step,
            "train_s": slot.train_s,
            "eval_s": slot.eval_s,
            "pruned": slot.pruned,
            "limit": asdict(slot.limit),
            "last": checkpoint.plain(vars(slot.last)) if slot.last else None,
            "tensors": checkpoint.copied(slot.attached.trained()),
            "initial": checkpoint.copied(slot.attached.initial),
            "base_bits": slot.base_bits,
            "optimizer": slot.optimizer.state_dict(),
            "random": checkpoint.random_state(self.device) if slot.spec.model.base_dropout else {},
        }
        checkpoint.write(path, state)
        return slot.step

    def _identity(self, job: Job) -> dict[str, Any]:
        return checkpoint.identity(job.number, job.spec, len(self.prepared.train))

    def _admit(self, job: Job, attached: adapter.Attached, saved: Mapping[str, Any] | None) -> TrialBegan:
        """Give the trial a slot: afresh, from another's adapter, or from where it was."""
        saved = saved if saved is not None and _fits(saved, attached) else None
        notes = (transfer.take_over(attached, job.start_from),) if job.start_from and saved is None else ()
        stream = pack.DropoutStream(self.device)
        pack.install(attached.peft_model, stream)
        train, done = job.spec.train, saved["step"] if saved else 0
        per_epoch, total = step_counts(train, len(self.prepared.train))
        slot = Slot(
            job=job,
            attached=attached,
            optimizer=_optimizer(attached.peft_model, job.spec),
            parameters=attached.parameters(),
            batches=epochs(self.prepared.train, train.batch_size, train.seed, done),
            steps_per_epoch=per_epoch,
            total_steps=total,
            stream=stream,
            base_bits=adapter.quantised_bits(attached),
        )
        _training(slot, False)
        if saved:
            self._restore(slot, saved)
        self.slots.append(slot)
        carried = saved["carried"] if saved else {}
        return TrialBegan(slot.number, total, attached, slot.step, carried, slot.last, notes)

    def _restore(self, slot: Slot, saved: Mapping[str, Any]) -> None:
        adapter.begin_from(slot.attached, saved["initial"])
        with torch.no_grad():
            for name, parameter in slot.attached.trained().items():
                parameter.copy_(saved["tensors"][name])
        slot.optimizer.load_state_dict(saved["optimizer"])
        slot.step, slot.pruned = saved["step"], saved["pruned"]
        slot.train_s, slot.eval_s = saved["train_s"], saved["eval_s"]
        slot.limit = LossLimit(**saved["limit"])
        slot.last = EvalEvent(**saved["last"]) if saved["last"] else None
        checkpoint.set_random_state(saved["random"], self.device)

    def _first_inputs(self, spec: TrialSpec) -> list[dict[str, torch.Tensor]]:
        """Return the model inputs of the trial's first examples, for initialisations that look at data.

        A batch holds as many examples as eva looks for directions: a pooler sees one row an example, and peft waits for
        ever for a module that sees fewer. Raises ConfigError where there are not so many examples.
        """
        train, examples = spec.train, self.prepared.train
        size = max(train.batch_size, spec.lora.eva_directions)
        if len(examples) < spec.lora.eva_directions:
            raise ConfigError(
                [f"lora.init_lora_weights: eva needs r * eva_rho = {size} training examples, got {len(examples)}"]
            )
        count = max(2, LOOK_AT * train.batch_size // size)
        whole = (b for b in epochs(examples, size, train.seed) if len(b) >= spec.lora.eva_directions)
        batches = itertools.islice(whole, count)
        made = [self.task.collate([b], self.prepared.pad_id, self.device) for b in batches]
        if self.base.model.config.is_encoder_decoder:  # makes its decoder's inputs from the labels
            made = [replace(b, inputs={**b.inputs, "labels": b.labels}) for b in made]
        known = inspect.signature(self.base.model.forward).parameters
        return [
            {"attention_mask": torch.ones_like(b.inputs["input_ids"])}
            | {k: v for k, v in b.inputs.items() if k in known}
            for b in made
        ]

    def _train(self, slot: Slot) -> Iterator[Event]:
        while True:
            if slot.is_due():
                yield self._evaluate(slot)
            if slot.pruned or slot.step == slot.total_steps:
                break
            try:
                event = self._step(slot)
            except Unstable as error:
                slot.pruned = str(error)
                break
            yield event
        state = "PRUNED" if slot.pruned else "COMPLETE"
        yield TrialEnded(slot.number, slot.step, state, slot.pruned, slot.train_s, slot.eval_s, slot.attached)

    def _step(self, slot: Slot) -> StepEvent:
        began = time.perf_counter()
        train = slot.spec.train
        examples = next(slot.batches)
        supervised = sum(e.supervised for e in examples)
        micro = train.micro_batch_size or train.batch_size
        model = slot.attached.peft_model.base_model.model
        _training(slot, True)
        slot.stream.at(train.seed, slot.step)
        loss, tokens = 0.0, 0
        for start in range(0, len(examples), micro):
            batch = self.task.collate([examples[start : start + micro]], self.prepared.pad_id, self.device)
            part = self.task.row_losses(model, batch).sum() / supervised
            part.backward()
            loss += part.item()
            tokens += batch.tokens
        _training(slot, False)
        rate = learning_rate(train, slot.step, slot.total_steps)
        norm = self._update(slot, rate)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise Unstable(f"the loss is {loss} and the gradient's norm {norm} at step {slot.step}")
        slot.step += 1
        slot.pruned = slot.pruned or slot.limit.reason(loss, train.max_loss_ratio)
        slot.train_s += time.perf_counter() - began
        return StepEvent(slot.number, slot.step, slot.total_steps, loss, rate, norm, tokens, slot.train_s)

    def _update(self, slot: Slot, rate: float) -> float:
        """Clip, step and clear; return the gradient's norm before clipping."""
        limit = slot.spec.train.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(slot.parameters, limit))
        for group in slot.optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        slot.optimizer.step()
        slot.optimizer.zero_grad(set_to_none=True)
        return norm

    def _evaluate(self, slot: Slot) -> EvalEvent:
        began = time.perf_counter()
        model = slot.attached.peft_model.base_model.model
        predictions = predict(model, self.task, self.prepared.eval, slot.spec.train, self.prepared.pad_id)
        metrics = self.task.metrics(predictions)
        took = time.perf_counter() - began
        slot.eval_s += took
        epoch = slot.step / slot.steps_per_epoch
        slot.last = EvalEvent(slot.number, slot.step, epoch, metrics, predictions, took)
        return slot.last


@torch.inference_mode()
def predict(
    model: torch.nn.Module, task: Task, examples: Sequence[Example], train: TrainSpec, pad_id: int
) -> list[Prediction]:
    """Return the predictions of all examples in their own order; batches go by length, so that little is padding."""
    device = next(model.parameters()).device
    order = sorted(examples, key=len, reverse=True)
    size = train.eval_batch_size
    out: list[Prediction] = []
    for start in range(0, len(order), size):
        out += task.predict(model, task.collate([order[start : start + size]], pad_id, device))
    return sorted(out, key=lambda p: p["row"])


def _fits(saved: Mapping[str, Any], attached: adapter.Attached) -> bool:
    """Tell whether an adapter made here is the one of the checkpoint; data-driven ranks and LoftQ may differ."""
    shapes = {n: p.shape for n, p in attached.trained().items()}
    same = shapes == {n: t.shape for n, t in saved["tensors"].items()}
    if not same or saved["base_bits"] != adapter.quantised_bits(attached):
        log.warning("the adapter's start came out otherwise than before (another machine?); the trial starts afresh")
        return False
    return True


def _training(slot: Slot, on: bool) -> None:
    """Switch dropout: of the adapters alone, or of the base too where the trial asks for it."""
    if slot.spec.model.base_dropout:
        slot.attached.peft_model.train(on)
    else:
        pack.train(slot.attached.peft_model, on)


def _optimizer(peft_model: torch.nn.Module, spec: TrialSpec) -> torch.optim.Optimizer:
    """Return AdamW over what trains: vectors without weight decay, and B faster than A with LoRA+."""
    train, faster = spec.train, spec.lora.loraplus_lr_ratio
    sorted_out: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            decay = train.weight_decay if parameter.dim() > 1 else 0.0
            ratio = faster if ".lora_B." in name or ".lora_embedding_B." in name else 1.0
            sorted_out.setdefault((decay, ratio), []).append(parameter)
    groups = [{"params": p, "weight_decay": d, "lr_ratio": r} for (d, r), p in sorted_out.items()]
    return torch.optim.AdamW(
        groups,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=True,
    )
