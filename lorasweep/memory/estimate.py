"""How much memory a trial will need, before its model is loaded: its own forward and backward pass runs on the meta
device, and what is alive is counted. So any architecture, adapter and option is counted as it computes.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import psutil
import torch
from torch import Tensor

from lorasweep.config.fields import Affects
from lorasweep.config.spec import TrainSpec, TrialSpec
from lorasweep.errors import ConfigError
from lorasweep.hardware import container
from lorasweep.hardware.device import device_of, dtype_of
from lorasweep.lora import adapter
from lorasweep.memory.meter import META, Meter, fused_attention
from lorasweep.models import base_model, finished_head, layer_stack, quantization
from lorasweep.packing import dropout, gradient_checkpointing, packed_pass
from lorasweep.tasks.batches import MEGABATCH, step_counts
from lorasweep.tasks.task import Batch, Example, Task, lengths_of

GIB = 2**30

MOMENTS = {"fp32": 2.0, "8bit": (2 + 2 * 4 / 256) / 4}
"""Bytes that the optimiser keeps for each trained one: two moments, in 8 bits with a scale for each 256."""

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "kept states")

UNCOUNTED = (RuntimeError, ConfigError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""What an estimate may raise: a model on the meta device meets code that was never meant for it."""

Examples = Mapping[str, Sequence[Example]]
"""The splits `train` and `eval`."""


@dataclass(frozen=True)
class Estimate:
    """GiB of tensors at the worst moment; Python and its libraries come on top. All tokens count, those too that a
    classifier of the first one leaves out of its last layer.
    """

    parts: Mapping[str, float]
    """What is alive at the peak of training, by PARTS. Kept states are there where the device has no memory of its
    own: they lie in the machine's."""
    phases: Mapping[str, float]
    """The peak of each phase: start, training, evaluation, and reload where the saved adapter is loaded again."""
    kept: float
    """States of layers that no trial changes, in the machine's memory; at most train.prefix_cache_gib."""
    counted: bool
    """Whether the pass itself was counted; else the inputs and outputs of linear layers."""

    @property
    def gib(self) -> float:
        return max(self.phases.values())


def solo_gib(
    spec: TrialSpec, task: Task, tokenizer: Any, examples: Examples, missing: tuple[str, ...] | None = None
) -> float:
    """Return what a trial by itself needs to train and to be evaluated, whoever shares its passes.

    A pass is counted for two ranks of trials that are alike otherwise; memory grows with the rank in a straight line,
    so that the others take no time.
    """
    known = _by_rank.setdefault(_key(replace(spec, lora=replace(spec.lora, r=1)), 1, missing), {})
    r = spec.lora.r
    if r not in known and (len(known) < 2 or spec.lora.rank_pattern):
        known[r] = estimate(spec, task, tokenizer, examples, missing=missing).phases
    if r in known:
        return max(known[r][name] for name in SOLO)
    low, high = min(known), max(known)
    share = (r - low) / (high - low)
    return max(known[low][name] + share * (known[high][name] - known[low][name]) for name in SOLO)


SOLO = ("start", "training", "evaluation")
"""Phases that are a trial's own; the reload check is ours."""

_by_rank: dict[str, dict[int, Mapping[str, float]]] = {}
"""Of trials that differ in their rank alone: the phases at the ranks that were counted."""


def estimate(
    spec: TrialSpec,
    task: Task,
    tokenizer: Any,
    examples: Examples,
    *,
    slots: int = 1,
    missing: tuple[str, ...] | None = None,
) -> Estimate:
    """Return what `slots` trials like this one need that share their passes.

    `missing` are the modules that the checkpoint lacks; None takes the heads for them. Raises ConfigError where there
    is no such model.
    """
    key = _key(spec, slots, missing)
    if key not in _known:
        _known[key] = _estimate(spec, task, tokenizer, examples, slots, missing)
    return _known[key]


_known: dict[str, Estimate] = {}


def _key(spec: TrialSpec, slots: int, missing: tuple[str, ...] | None) -> str:
    """Return what an estimate depends on: neither on rates, nor on seeds."""
    settings = spec.affecting(Affects.MEMORY)
    settings["lora"] |= {
        "lora_dropout": spec.lora.lora_dropout > 0,
        "init_lora_weights": [spec.lora.changes_base, spec.lora.rounds_base],
    }
    return json.dumps([settings, slots, missing], sort_keys=True)


def _estimate(
    spec: TrialSpec, task: Task, tokenizer: Any, examples: Examples, slots: int, missing: tuple[str, ...] | None
) -> Estimate:
    base = base_model.skeleton(spec.model, task, tokenizer)
    there = device_of(spec.train)
    base.model.to(dtype_of(spec.train, there))
    base.missing = finished_head.heads(base.model) if missing is None else missing
    trials = _Trials(spec, base, task, slots)
    counted = True
    try:
        parts, evaluation = trials.counted(examples)
    except RuntimeError:  # what the model does depends on values (experts), and there are none
        parts, evaluation, counted = trials.rough(examples), Counter(), False
    finally:
        trials.leave()
    kept = trials.kept(examples)
    here = kept if there.type == "cpu" else 0
    parts["kept states"] = here
    best = trials.kept_best(examples) if there.type == "cpu" else 0
    parts["adapters"] += best
    beside = evaluation["activations"] + evaluation["logits"] + here
    own = max(trials.held, trials.residuals)
    phases = {
        "start": trials.at_last_start,
        "training": parts.total(),
        "evaluation": trials.weights + own + trials.trained * 2 + best + trials.moments + beside,
    }
    if spec.tracking.reload_check and not spec.lora.full:
        phases["reload"] = phases["evaluation"] + trials.weights
    return Estimate(
        {name: parts[name] / GIB for name in PARTS},
        {name: size / GIB for name, size in phases.items()},
        kept / GIB,
        counted,
    )


def slots_that_fit(
    spec: TrialSpec, task: Task, tokenizer: Any, examples: Examples, missing: tuple[str, ...], most: int
) -> int:
    """Return how many trials like this one fit beside each other in what the device has free, its base already there:
    1 to `most`; `most` where that cannot be counted.
    """
    try:
        one = estimate(spec, task, tokenizer, examples, missing=missing)
        free = free_gib(device_of(spec.train)) + one.parts["weights"]
        if one.gib * most <= free:
            return most
        two, three = (estimate(spec, task, tokenizer, examples, slots=n, missing=missing) for n in (2, 3))
    except UNCOUNTED:
        return most
    fit = most
    for phase, gib in two.phases.items():  # one trial by itself may hold what several do not
        each = max(three.phases[phase] - gib, 1e-9)
        fit = min(fit, 2 + int((free - gib) / each) if gib <= free else 1)
    return fit


def hopeless(spec: TrialSpec, task: Task, tokenizer: Any, examples: Examples) -> str:
    """Return why a trial need not begin under search.max_memory_gib, or nothing."""
    most = spec.search.max_memory_gib
    if most is None:
        return ""
    if spec.train.micro_batch_size == "auto" and task.divisible:
        spec = replace(spec, train=replace(spec.train, micro_batch_size=1))
    found = estimate(spec, task, tokenizer, examples)
    if found.gib <= most:
        return ""
    phase = max(found.phases, key=lambda name: found.phases[name])
    return f"needs about {found.gib:.2f} GiB ({phase}), more than search.max_memory_gib={most:g}: never begun"


def free_gib(device: torch.device) -> float:
    """Return what is free on the device, or in the machine or its container where the device uses main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / GIB
    available = psutil.virtual_memory().available
    limit = container.memory()
    return (available if limit is None else min(available, limit.free)) / GIB


def told(train: TrainSpec) -> str:
    """Return what a device has, and what of it is free, in words."""
    device = base_model.device_of(train)
    total, limit = psutil.virtual_memory().total, container.memory()
    if limit is not None:
        total = min(total, limit.limit)
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
    return f"the {device.type} has {total / GIB:.1f} GiB, {free_gib(device):.1f} free"


class _Trials:
    """Trials in slots on a base of the meta device."""

    def __init__(self, spec: TrialSpec, base: base_model.Base, task: Task, slots: int) -> None:
        self.spec, self.base, self.task = spec, base, task
        self.weights = _bytes([*base.model.parameters(), *base.model.buffers()])
        self.linear = [m for m in base.model.modules() if isinstance(m, base_model.LINEAR)]
        small = [base.model.get_submodule(name) for name in base.small]
        self.spared = round(sum(m.weight.nbytes - quantization.kept_bytes(m, spec.model) for m in small))
        """Bytes that quantised weights take less."""
        self.read_back = max((quantization.read_bytes(m, spec.model) for m in small), default=0)
        """Bytes of the quantised weight that is in use."""
        self.weights -= self.spared
        self.matrices = _bytes(p for p in base.model.parameters() if p.dim() == 2)
        self.seats = [self._seat() for _ in range(slots)]
        self.trained = sum(_bytes(attached.parameters()) for attached, _ in self.seats)

    def _seat(self) -> tuple[adapter.Attached, packed_pass.Layers]:
        """Return one more adapter, beside the base; with a plain initialisation, shapes are the same."""
        plain = replace(self.spec.lora, init_lora_weights=True)
        attached = adapter.attach(self.base, plain, self.spec.task_type, 0)
        stream = _NoDraws(device_of(self.spec.train))
        layers = packed_pass.layers(attached, stream)
        stream.on = True
        attached.take_off()
        return attached, layers

    def leave(self) -> None:
        for attached, _ in self.seats:
            adapter.detach(attached)

    @property
    def moments(self) -> int:
        kind = "8bit" if self.spec.train.optimizer.endswith("8bit") else "fp32"
        return round(MOMENTS[kind] * self.trained)

    @property
    def copies(self) -> int:
        """Bytes of the base's weights that are kept while the adapter is initialised."""
        if self.spec.lora.full:
            return self.weights
        return self.matrices if self._changes_weights else 0

    @property
    def _changes_weights(self) -> bool:
        """Whether the initialisation does: one that rounds leaves a quantised base as it is."""
        lora = self.spec.lora
        return lora.changes_base or (lora.rounds_base and self.spec.model.quantization == "none")

    @property
    def residuals(self) -> int:
        """Bytes of a trial's weights in place of the base's while it computes by itself."""
        if not self._changes_weights:
            return 0
        places = self.seats[0][0].swap.places
        return _bytes(
            p.base.weight for p in places if isinstance(p.base, base_model.LINEAR) and hasattr(p.own, "lora_A")
        )

    @property
    def held(self) -> int:
        """Bytes of such weights of all trials in a pass: those of plain layers need not be kept."""
        if not self.residuals:
            return 0
        plain = _bytes(module.weight for module in self.seats[0][1].plain)
        spared = len(self.seats) > 1 and self.spec.lora.changes_base and plain > packed_pass.OWN_BYTES
        return (self.residuals - plain * spared) * len(self.seats)

    @property
    def at_last_start(self) -> int:
        """Bytes when the last adapter is initialised, beside the others."""
        others = (self.held + self.trained + self.moments) * (len(self.seats) - 1) // len(self.seats)
        return self.weights + self.copies + self.residuals + self.trained + others

    def counted(self, examples: Examples) -> tuple[Counter[str], Counter[str]]:
        """Return bytes by kind at the peak of training, and at that of evaluation."""
        train = self.spec.train
        rows = min(train.rows, len(examples["train"]))
        batch = self._batch([widest(examples["train"], rows)] * len(self.seats))
        with fused_attention(), Meter(_words(self.base.model)) as meter:
            self._hold(meter)
            meter.begin()
            with self._together(batch):
                self.task.row_losses(self.base.model, batch).sum().backward()
            parts = Counter(meter.peak)
            meter.begin()
            rows = min(train.eval_batch_size, len(examples["eval"]))
            batch = self._batch([widest(examples["eval"], rows)] * len(self.seats))
            for _, own in self.seats:
                own.stream.on = False
            with self._together(batch), torch.no_grad():
                self.task.row_losses(self.base.model, batch)
            evaluation = Counter(meter.peak)
        for found in (parts, evaluation):
            found["weights"] -= self.spared
            found["activations"] += self.read_back
        parts["optimizer"] = self.moments
        parts["weights"] += self.held
        return parts, evaluation

    def kept_best(self, examples: Examples) -> int:
        """Return the bytes of what trained as it was at the best evaluation, in the machine's memory."""
        train = self.spec.train
        an_epoch, steps = step_counts(train, len(examples["train"]))
        return self.trained if train.keep == "best" and steps > (train.eval_every or an_epoch) else 0

    def kept(self, examples: Examples) -> int:
        """Return the bytes that the states of the examples take which layers give that no trial changes."""
        if not layer_stack.wanted(self.spec):
            return 0
        changed = set().union(*(layers.modules for _, layers in self.seats))
        one = self._batch([examples["train"][:1]])
        try:
            with fused_attention(), Meter():
                size = layer_stack.bytes_a_token(self.base.model, changed, one.inputs)
        except RuntimeError:  # what the model does depends on values, and there are none
            return 0
        lengths = lengths_of(examples["train"])
        _, steps = step_counts(self.spec.train, len(lengths))
        seen = min(1.0, steps * self.spec.train.batch_size / len(lengths))
        tokens = seen * sum(lengths) + sum(lengths_of(examples["eval"]))
        return round(min(self.spec.train.prefix_cache_gib * GIB, size * tokens * (1 + len(one.others))))

    def _hold(self, meter: Meter) -> None:
        """Count what is allocated before a pass; gradients stay from step to step."""
        meter.hold("weights", [*self.base.model.parameters(), *self.base.model.buffers()])
        for attached, _ in self.seats:
            for parameter in attached.parameters():
                parameter.grad = torch.empty_like(parameter)
                meter.hold("gradients", [parameter.grad])
            meter.hold("adapters", attached.parameters())

    @contextmanager
    def _together(self, batch: Batch) -> Iterator[None]:
        """Let the base compute for the trials, as the engine does."""
        layers = [own for _, own in self.seats]
        shared = packed_pass.Pass(packed_pass.parts(layers, batch)) if len(layers) > 1 else None
        with ExitStack() as inside:
            if shared is None:
                self._seated(0)
            else:
                inside.enter_context(shared.on())
            if self.spec.train.gradient_checkpointing:
                inside.enter_context(gradient_checkpointing.on(self.base.model, [own.stream for own in layers], shared))
            yield

    def _seated(self, index: int) -> None:
        self.seats[index][0].put_on()

    def _batch(self, groups: Sequence[Sequence[Example]]) -> Batch:
        return self.task.collate(groups, self.base.tokenizer.pad_token_id, "cpu")

    def rough(self, examples: Examples) -> Counter[str]:
        """Return bytes by kind, the activations as the inputs and outputs of all linear layers, and the adapted weights
        of experts, which peft makes whole for each pass.
        """
        rows = min(self.spec.train.rows, len(examples["train"])) * len(self.seats)
        tokens = rows * max(lengths_of(examples["train"]))
        width = next(self.base.model.parameters()).element_size()
        through = sum(sum(m.weight.shape) for m in self.linear)
        own: list[Any] = list(chain.from_iterable(p.own.modules() for p in self.seats[0][0].swap.places))
        experts = sum(m.get_param().nbytes for m in own if hasattr(m, "parameter_name"))
        return Counter(
            weights=self.weights + self.held,
            adapters=self.trained,
            gradients=self.trained,
            optimizer=self.moments,
            activations=tokens * through * width + experts * len(self.seats),
        )


class _NoDraws(dropout.DropoutStream):
    """The masks of a trial's device, without values: the meta device has no random numbers."""

    def _drawn(self, like: Tensor, p: float) -> Tensor:
        numbers = torch.empty(like.shape, dtype=torch.int16, device=META)
        mask = torch.empty(like.shape, dtype=self.mask_dtype(like), device=META)
        return torch.ge(numbers, 0, out=mask)


def widest(examples: Sequence[Example], rows: int) -> list[Example]:
    """Return a batch as the longest example will meet it: batches hold examples of similar length."""
    order = sorted(examples, key=lambda e: (len(e), e.supervised), reverse=True)
    step = max(1, len(order) // (MEGABATCH * rows))
    return order[::step][:rows]


def _words(base: Any) -> int:
    return int(getattr(base.config.get_text_config(), "vocab_size", 0) or 0)


def _bytes(tensors: Any) -> int:
    """Return the size of tensors, shared ones once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
