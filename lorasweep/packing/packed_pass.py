"""Several trials in one forward pass: each computes with its own adapter on its own rows of a batch.

The frozen product of a layer is done once for all rows. Low-rank updates of trials with equally many rows are stacked.
Whatever is no plain linear layer with an adapter (heads, embeddings, experts, DoRA, norms with own biases) runs on each
trial's rows by itself. Shapes: N rows times tokens, I inputs, O outputs, R rank, K trials.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorasweep.config.spec import TrialSpec
from lorasweep.errors import Unpackable
from lorasweep.lora import adapter, module_swap
from lorasweep.lora.adapter import Attached
from lorasweep.models import quantization
from lorasweep.models.row_order import Place
from lorasweep.packing import fused_linear
from lorasweep.packing.dropout import DropoutStream
from lorasweep.packing.fused_linear import PackedForward, Plan, Run, Update, is_plain, update
from lorasweep.tasks.task import Batch

OWN_BYTES = 2**26
"""PiSSA and OLoRA trials keep the base weights that they changed up to so many bytes each; what is larger is made when
the trial computes alone, and by their A and s B beside others."""

READ = 64
"""Rows whose product with a weight costs what taking up another weight does: so much is worth sparing it."""

WASTE = 0.05
"""Ranks are padded to stack updates while that adds at most this share to a layer's products."""


def alone_reason(spec: TrialSpec) -> str:
    """Return why a trial cannot share a forward pass, or nothing."""
    if spec.model.base_dropout:
        return "model.base_dropout draws from random numbers that all rows share"
    if spec.lora.full:
        return "lora.full trains every weight of the base"
    return ""


@dataclass
class Layers:
    """What one trial has for the base's modules; made while it is on the base."""

    stream: DropoutStream
    plain: dict[nn.Module, Update] = field(default_factory=dict)
    """Of linear modules whose update can be added to the output."""
    whole: dict[nn.Module, nn.Module] = field(default_factory=dict)
    """What computes in a module's place."""
    weights: dict[nn.Module, dict[str, Tensor]] = field(default_factory=dict)
    """Parameters in place of the module's."""
    own: dict[nn.Module, Tensor] = field(default_factory=dict)
    """Base weights that the initialisation changed: LoftQ's, and W_res of PiSSA and OLoRA where it is kept."""
    start: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """A and s B that PiSSA and OLoRA took out of the weight: W_res x = W x - s B A x."""

    @property
    def modules(self) -> set[nn.Module]:
        return {*self.plain, *self.whole, *self.weights}


def layers(attached: Attached, stream: DropoutStream) -> Layers:
    """Sort out what an adapter does to each module, and let its dropout draw from the stream."""
    fused_linear.install(attached.peft_model, stream)
    out = Layers(stream)
    names = {module: name for name, module in attached.peft_model.named_modules()}
    for place in attached.swap.places:
        if is_plain(place.own):
            own: Any = place.own
            out.plain[place.base] = update(own)
            name = names[own]
            if f"{name}.lora_A.weight" in attached.initial:
                A_RI, B_OR = (attached.initial[f"{name}.lora_{part}.weight"] for part in "AB")
                out.start[place.base] = A_RI, own.scaling["default"] * B_OR
        else:
            out.whole[place.base] = place.own
    in_base = {place.base: names[place.own] for place in attached.swap.places}
    kept = sum(m.weight.numel() * m.weight.element_size() for m in out.start) <= OWN_BYTES
    for weight in attached.swap.weights:
        if weight.key == "bias" or weight.module not in out.plain:
            out.weights.setdefault(weight.module, {})[weight.key] = weight.own
        elif kept or weight.module not in out.start:
            out.own[weight.module] = weight.own
        else:
            weight.make = functools.partial(adapter.residual, attached, in_base[weight.module])
    return out


@dataclass(frozen=True)
class Part:
    """A trial's rows of a batch."""

    layers: Layers
    rows: slice
    lengths: Mapping[int, int]
    """Padded length of the batch -> the length that the trial's rows would be padded to by themselves."""

    @property
    def count(self) -> int:
        return self.rows.stop - self.rows.start


def scattered_reason(layers: Layers, scattered: Collection[nn.Module]) -> str:
    """Return why a trial with these layers cannot share a pass on a model with such modules, or nothing."""
    found = next((module for module in layers.modules if module in scattered), None)
    return f"{type(found).__name__} does not see a batch's rows one below the other" if found is not None else ""


def parts(members: Sequence[Layers], batch: Batch) -> list[Part]:
    """Return which rows are whose; `members` are in the order of the batch's groups."""
    out = []
    for i, (layers, rows) in enumerate(zip(members, batch.groups, strict=True)):
        out.append(Part(layers, rows, {padded: own[i] for padded, own in batch.lengths.items()}))
    return out


_NOTHING: Mapping[nn.Module, Mapping[Place, bool]] = {}


class Pass:
    """A forward pass of several trials. While it is on, the base's modules compute for each row as its trial would."""

    def __init__(self, trials: Sequence[Part], holders: Mapping[nn.Module, Mapping[Place, bool]] = _NOTHING) -> None:
        """`holders` tells which of a module's arguments hold rows; of others the size tells."""
        self.trials, self.holders = list(trials), holders
        self.total = sum(p.count for p in trials)
        self.inside: set[nn.Module] = set()
        """Modules that are computing for one trial now."""

    @contextmanager
    def on(self) -> Iterator[None]:
        """Give the modules that any trial changes a forward of ours, and theirs back at the end."""
        with ExitStack() as undo:
            for part in self.trials:
                undo.enter_context(part.layers.stream.padded(part.count, part.lengths))
            for module in set().union(*(p.layers.modules for p in self.trials)):
                before = module.__dict__.get("forward")
                undo.callback(module_swap.give_back, module, before)
                module.__dict__["forward"] = self._forward(module, module.forward)
            yield

    def place(self) -> tuple[list[Part], int, set[nn.Module]]:
        """Return for whom it computes now, for `go_to`."""
        return self.trials, self.total, set(self.inside)

    def go_to(self, place: tuple[list[Part], int, set[nn.Module]]) -> None:
        self.trials, self.total, inside = place
        self.inside = set(inside)

    def _forward(self, module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        is_linear = quantization.is_linear(module)

        def is_simple() -> bool:
            return is_linear and not any(
                module in p.layers.whole or p.layers.weights.get(module, {}).keys() - {"bias"} for p in self.trials
            )

        always = is_simple()

        def forward(*args: Any, **kwargs: Any) -> Any:
            if module in self.inside:
                return own(*args, **kwargs)
            if always or is_simple():
                return self._linear(module, args[0] if args else kwargs["input"])
            return self._one_by_one(module, own, args, kwargs)

        return forward

    # --- trials one by one -------------------------------------------------------------------------------------------

    def _one_by_one(self, module: nn.Module, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        trials, total = self.trials, self.total
        self._check_rows(module, [*args, *kwargs.values()])
        counts, outputs = [p.count for p in trials], []
        known = self.holders.get(module, {})
        shares = _shared_out(args, counts, known, (0,))
        named_shares = {k: _shared_out(a, counts, known, (1, k)) for k, a in kwargs.items()}
        try:
            for i, (part, given) in enumerate(zip(trials, shares, strict=True)):
                named = {k: share[i] for k, share in named_shares.items()}
                self.trials, self.total = [replace(part, rows=slice(0, part.count))], part.count
                outputs.append(self._alone(module, own, part.layers, given, named))
        finally:
            self.trials, self.total = trials, total
        return _joined(outputs, counts)

    def _check_rows(self, module: nn.Module, given: Sequence[Any]) -> None:
        """Raise Unpackable where a module's first tensor holds neither all trials' rows nor one row for all."""
        x = next((a for a in given if isinstance(a, Tensor) and a.dim()), None)
        if x is None or len(x) in (1, self.total) or (len(x) % self.total == 0 and self._is_flat(x)):
            return
        raise Unpackable(f"{type(module).__name__} sees {list(x.shape)} for {self.total} rows of several trials")

    def _is_flat(self, x: Tensor) -> bool:
        """Tell whether a matrix has as many rows for each text as tokens: all tokens, one text below the other."""
        return x.dim() == 2 and len(x) // self.total in (1, *self.trials[0].lengths)

    def _alone(self, module: nn.Module, own: Callable[..., Any], one: Layers, args: Any, kwargs: Any) -> Any:
        if module in one.plain:
            return self._linear(module, args[0] if args else kwargs["input"])
        self.inside.add(module)
        try:
            compute = one.whole.get(module, own)
            held = (
                module_swap.aliases(module) if hasattr(compute, "parameter_name") else {}
            )  # peft's adapter of parameters
            for key, weight in one.weights.get(module, {}).items():
                held[key] = weight.to(module.get_parameter(key).dtype)
            with module_swap.holding(module, held):
                return compute(*args, **kwargs)
        finally:
            self.inside.discard(module)

    # --- linear layers -----------------------------------------------------------------------------------------------

    def _linear(self, module: Any, x: Tensor) -> Tensor:
        """Return the layer's output for all rows, the frozen product done once."""
        each = x.numel() // x.shape[-1] // self.total
        if len(x) % self.total or (len(x) != self.total and not self._is_flat(x)):
            raise Unpackable(f"{type(module).__name__} sees {list(x.shape)} for {self.total} rows of several trials")
        runs, masks, trained = [], [], []
        for members in self._stacks(module):
            updates = [p.layers.plain[module] for p in members]
            scales, mask = _dropped(members, updates, x, self.total)
            runs.append(Run(slice(members[0].rows.start * each, members[-1].rows.stop * each), scales))
            masks.append(mask)
            trained += [u.A_RI.to(x.dtype) for u in updates] + [u.B_OR.to(x.dtype) for u in updates]
        own, starts, biases = [], [], []
        for part in self.trials:
            at, one = slice(part.rows.start * each, part.rows.stop * each), part.layers
            if self._has_own(module, at, one):
                own.append((at, one.own[module]))
            elif module in one.start:
                A_RI, B_OR = one.start[module]
                starts.append((at, A_RI.to(x.dtype), B_OR.to(x.dtype)))
            biases.append((at, one.weights[module]["bias"] if module in one.weights else module.bias))
        if all(bias is module.bias for _, bias in biases):
            biases = []
        plan = Plan(runs, own, starts, [at for at, _ in biases])
        trained += [bias.to(x.dtype) for _, bias in biases]
        return PackedForward.apply(
            x, quantization.reader(module), None if biases else module.bias, plan, masks, *trained
        )

    def _has_own(self, module: Any, at: slice, one: Layers) -> bool:
        """Tell whether rows take a product with their trial's weight. Where that is W less the start, they may share
        the frozen product and have the start taken from it: the fewer rows, the more a weight costs.
        """
        if module not in one.own or module not in one.start:
            return module in one.own
        A_RI, B_OR = one.start[module]
        spent = (at.stop - at.start) * (A_RI.numel() + B_OR.numel())
        return len(self.trials) == 1 or spent > READ * quantization.size(module)

    def _stacks(self, module: Any) -> Iterator[list[Part]]:
        """Yield neighbours whose updates are done in one product: as many rows each, and ranks about equal."""
        size = quantization.size(module) / (module.in_features + module.out_features)
        stack: list[Part] = []
        ranks: list[int] = []
        for part in self.trials:
            if module not in part.layers.plain:
                if stack:
                    yield stack
                stack, ranks = [], []
                continue
            rank = len(part.layers.plain[module].A_RI)
            grown = [*ranks, rank]
            padding = max(grown) * len(grown) - sum(grown)
            if stack and (stack[0].count != part.count or padding > WASTE * (size * len(grown) + sum(grown))):
                yield stack
                stack, grown = [], [rank]
            stack, ranks = [*stack, part], grown
        if stack:
            yield stack


def _dropped(
    members: Sequence[Part], updates: Sequence[Update], x: Tensor, total: int
) -> tuple[tuple[float, ...], Tensor | None]:
    """Return what each update is multiplied by, and which of its inputs stay: those of all members, or None for all."""
    shares = [u.p if m.layers.stream.on else 0.0 for m, u in zip(members, updates, strict=True)]
    scales = tuple(u.s / (1 - p) for u, p in zip(updates, shares, strict=True))
    if not any(shares):
        return scales, None
    masks = []
    for part, p in zip(members, shares, strict=True):
        stream, own = part.layers.stream, _of(x, part.rows, total)
        masks.append(stream.keep(own, p) if p else torch.ones_like(own, dtype=stream.mask_dtype(x)))
    return scales, masks[0] if len(masks) == 1 else torch.cat(masks)


def _of(x: Tensor, rows: slice, total: int) -> Tensor:
    """Return a trial's rows of a layer's input, which may hold several vectors a row, one below the other."""
    each = len(x) // total
    return x[rows.start * each : rows.stop * each]


def _shared_out(value: Any, counts: Sequence[int], known: Mapping[Place, bool], place: Place) -> Sequence[Any]:
    """Return each trial's share of an argument: its rows, where it holds the rows of all trials; else the same for all.

    Where nothing is known of a place, as of a mask that only padded batches have, the size tells: an entry a row,
    or the tokens of all rows.
    """
    total = sum(counts)
    if isinstance(value, tuple):
        shares = [_shared_out(v, counts, known, (*place, i)) for i, v in enumerate(value)]
        return [*zip(*shares, strict=True)] or [()] * len(counts)
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) % total or not len(value):
        return [value] * len(counts)
    each = len(value) // total
    if known.get(place, each == 1 or value.dim() == 2):
        return value.split([n * each for n in counts])
    return [value] * len(counts)


def _joined(outputs: Sequence[Any], counts: Sequence[int]) -> Any:
    """Return the outputs of all trials one below the other; what is not made of rows has to be repeated first."""
    first = outputs[0]
    if first is None:
        return None
    if isinstance(first, tuple):
        return tuple(_joined(column, counts) for column in zip(*outputs, strict=True))
    if not isinstance(first, Tensor) or not first.dim():
        raise Unpackable(f"a module gives {type(first).__name__}, which cannot be put together for several trials")
    filled = [out.expand(n, *out.shape[1:]) if len(out) % n else out for out, n in zip(outputs, counts, strict=True)]
    return torch.cat(filled)
