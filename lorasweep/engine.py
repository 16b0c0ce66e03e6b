"""The training loop: trials in slots on one frozen base, one optimiser step of each at a time; yields what happens.

It knows neither Optuna nor MLflow. Whoever iterates decides what an event leads to; a slot is freed when the iteration
goes on after its TrialEnded.
"""

import inspect
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from lorasweep import adapter, pack
from lorasweep.errors import Unstable
from lorasweep.model import Base
from lorasweep.spec import TrainSpec, TrialSpec
from lorasweep.tasks import Example, Prediction, Task

MEGABATCH = 50
"""Batches of similar length are formed within this many batches of random order, as HF's group_by_length does."""


LOOK_AT = 32
"""Training batches that a data-driven initialisation sees."""


@dataclass(frozen=True)
class TrialBegan:
    number: int
    total_steps: int
    attached: adapter.Attached


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
class Slot:
    """A place for one trial on the shared base."""

    number: int
    spec: TrialSpec
    attached: adapter.Attached
    optimizer: torch.optim.Optimizer
    parameters: list[torch.nn.Parameter]
    batches: Iterator[list[Example]]
    steps_per_epoch: int
    total_steps: int
    stream: pack.DropoutStream
    step: int = 0
    train_s: float = 0.0
    eval_s: float = 0.0
    pruned: str = field(default="")


class Engine:
    """Trains trials that share a base, a task and a data set."""

    def __init__(self, base: Base, task: Task, prepared: Prepared) -> None:
        self.base = base
        self.task = task
        self.prepared = prepared
        self.device = next(base.model.parameters()).device
        self.slots: list[Slot] = []

    def run(self, source: Callable[[], tuple[int, TrialSpec] | None]) -> Generator[Event, None, None]:
        """Train trials from `source` until it gives None, and yield their events."""
        while (given := source()) is not None:
            slot = self._admit(*given)
            self.slots.append(slot)
            try:
                yield TrialBegan(number=slot.number, total_steps=slot.total_steps, attached=slot.attached)
                yield from self._train(slot)
            finally:
                self.slots.remove(slot)
                pack.uninstall(slot.attached.peft_model)
                adapter.detach(slot.attached)

    def prune(self, number: int, reason: str) -> None:
        """End a running trial after its current step."""
        for slot in self.slots:
            if slot.number == number:
                slot.pruned = reason

    def _admit(self, number: int, spec: TrialSpec) -> Slot:
        attached = adapter.attach(
            self.base, spec.lora, spec.task_type, spec.train.seed, lambda: self._first_inputs(spec.train)
        )
        stream = pack.DropoutStream(self.device)
        pack.install(attached.peft_model, stream)
        parameters = attached.parameters()
        per_epoch, total = step_counts(spec.train, len(self.prepared.train))
        return Slot(
            number=number,
            spec=spec,
            attached=attached,
            optimizer=_optimizer(attached.peft_model, spec),
            parameters=parameters,
            batches=epochs(self.prepared.train, spec.train.batch_size, spec.train.seed),
            steps_per_epoch=per_epoch,
            total_steps=total,
            stream=stream,
        )

    def _first_inputs(self, train: TrainSpec) -> list[dict[str, torch.Tensor]]:
        """Return the model inputs of the trial's first batches, for initialisations that look at data."""
        batches = itertools.islice(epochs(self.prepared.train, train.batch_size, train.seed), LOOK_AT)
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
        every = slot.spec.train.eval_every or slot.steps_per_epoch
        state, reason = "COMPLETE", ""
        while slot.step < slot.total_steps:
            try:
                yield self._step(slot)
            except Unstable as error:
                state, reason = "PRUNED", str(error)
                break
            if slot.step % every == 0 or slot.step == slot.total_steps:
                yield self._evaluate(slot)
            if slot.pruned:
                state, reason = "PRUNED", slot.pruned
                break
        yield TrialEnded(slot.number, slot.step, state, reason, slot.train_s, slot.eval_s, slot.attached)

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
        return EvalEvent(slot.number, slot.step, slot.step / slot.steps_per_epoch, metrics, predictions, took)


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


def epochs(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches without end: each epoch holds every example once, in batches of similar length, in random order."""
    lengths = [len(e) for e in examples]
    for epoch in range(2**31):
        random = torch.Generator().manual_seed(pack.mixed(seed, epoch))
        order = torch.randperm(len(examples), generator=random).tolist()
        span = batch_size * MEGABATCH
        order = [
            i
            for start in range(0, len(order), span)
            for i in sorted(order[start : start + span], key=lengths.__getitem__, reverse=True)
        ]
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for i in torch.randperm(len(batches), generator=random).tolist():
            yield [examples[j] for j in batches[i]]


def step_counts(train: TrainSpec, examples: int) -> tuple[int, int]:
    """Return the optimiser steps an epoch and in all."""
    per_epoch = math.ceil(examples / train.batch_size)
    return per_epoch, train.max_steps or math.ceil(per_epoch * train.epochs)


def learning_rate(train: TrainSpec, step: int, total: int) -> float:
    """Return the rate of the 0-based `step`, as transformers' schedules have it."""
    warm = math.ceil(total * train.warmup_ratio)
    if step < warm:
        return train.learning_rate * step / max(1, warm)
    if train.lr_scheduler_type == "constant":
        return train.learning_rate
    done = (step - warm) / max(1, total - warm)
    if train.lr_scheduler_type == "cosine":
        return train.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
    return train.learning_rate * max(0.0, 1 - done)


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
