"""The frozen prefix: what the first layers, those that no trial of a pass changes, make of a text is computed once.

A text's hidden states after these layers are kept, in memory first and then on disk, and later passes begin there: in
training and in evaluation, for all trials that share the base. A text is known by its tokens, so that no split, task or
trial has to be told apart. Where the model is not built as expected, nothing is kept.
Shapes: B rows, T tokens, D hidden.
"""

import functools
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasweep.lora.module_swap import give_back
from lorasweep.models import layer_stack
from lorasweep.models.layer_stack import Inputs
from lorasweep.tasks.task import Batch
from lorasweep.training.slot import Slot
from lorasweep.training.tensor_store import Key, Store

LOOK_AT = 20
"""Batches read after which reading has to have been faster than computing."""

log = logging.getLogger(__name__)


class _Enough(Exception):
    """Ends a forward pass whose later layers nobody needs."""

    def __init__(self, output: Any) -> None:
        self.output = output


# --- keeping and reading ---------------------------------------------------------------------------------------------


@dataclass
class Text:
    """A batch's rows of one text."""

    inputs: Inputs
    keys: list[Key]
    lengths: list[int]


@dataclass
class Cost:
    """What it took to compute and to read the states of a number of layers."""

    computed_s: float = 0.0
    computed: int = 0
    """Tokens."""
    read_s: float = 0.0
    read: int = 0
    reads: int = 0

    @property
    def a_token(self) -> float:
        return self.computed_s / self.computed if self.computed else 0.0

    @property
    def pays(self) -> bool:
        return self.reads < LOOK_AT or self.read_s < self.a_token * self.read


@dataclass
class Prefix:
    """Keeps a base model's states after its first layers; made while no trial is on the model."""

    model: Any
    folder: Path | None = None
    """Where files may be made; None keeps within memory."""
    off: bool = False
    """Whether nothing may be kept, as of a model whose states depend on the padding beside a text."""
    store: Store = field(init=False)
    costs: dict[int, Cost] = field(default_factory=dict)
    """By number of layers."""
    _usable: dict[int, bool] = field(default_factory=dict)
    _stack: layer_stack.Stack | None = None
    _first: set[nn.Module] = field(default_factory=set)
    """Modules of what seems to be the first layer: where a trial changes one, nothing else has to be known."""

    def __post_init__(self) -> None:
        self.store = Store(self.folder)
        self._layers = layer_stack.outermost(self.model)
        self._around = [*layer_stack.holders(self.model, self._layers), *self._layers]
        self._first = set(self._layers[0].modules()) if self._layers else set(self.model.modules())
        self._more = layer_stack._without_cache(self.model)

    @contextmanager
    def reused(self, slots: Sequence[Slot], batch: Batch) -> Iterator[None]:
        """Let a forward pass of these trials, whose rows are the batch's groups in order, begin behind the layers that
        none of them changes. To be entered before anything else that changes the base's forward.
        """
        depth = self.depth(slots, batch)
        if not depth:
            yield
            return
        began = time.perf_counter()
        texts = [self._text(depth, inputs) for inputs in (batch.inputs, *batch.others)]
        known = [list(map(self.store.__contains__, t.keys)) for t in texts]
        spent = time.perf_counter() - began
        if not all([self._fill(depth, t) for t in texts]):
            yield
            return
        cost = self.costs[depth]
        before = cost.read_s
        rows = {id(t.inputs["input_ids"]): t for t in texts}
        with self._standing_in(depth, {i: functools.partial(self._read, depth, t) for i, t in rows.items()}):
            yield
        cost.read_s += spent
        cost.reads += 1
        self._count(slots, batch, depth, texts, known, cost.read_s - before)

    def _count(
        self, slots: Sequence[Slot], batch: Batch, depth: int, texts: list[Text], known: list[list[bool]], spent: float
    ) -> None:
        """Note what each trial was spared."""
        cost = self.costs[depth]
        part = "eval" if torch.is_inference_mode_enabled() else "train"
        for slot, rows in zip(slots, batch.groups, strict=True):
            tokens = 0
            for t, k in zip(texts, known, strict=True):
                tokens += sum(itertools.compress(t.lengths[rows], k[rows]))
            share = (rows.stop - rows.start) / len(batch.rows)
            slot.prefix_saved_s[part] += tokens * cost.a_token - share * spent
        if not cost.pays:
            self._usable[depth] = False
            log.info("the states after %d layers are no longer kept: to read them takes longer than them", depth)

    # --- how many layers ---------------------------------------------------------------------------------------------

    def depth(self, slots: Sequence[Slot], batch: Batch) -> int:
        """Return how many of the first layers give the same for all these trials as for the base alone."""
        self.store.budget = int(min(s.spec.train.prefix_cache_gib for s in slots) * 2**30)
        if (
            self.off
            or not all(layer_stack.wanted(s.spec) for s in slots)
            or layer_stack.is_special(self.model.config, self._around)
        ):
            return 0
        changed = set().union(*(s.layers.modules for s in slots))
        if changed & self._first:
            return 0
        if self._stack is None:
            with _bare(slots):
                self._stack = layer_stack.read(self.model, {**layer_stack.rows(batch.inputs), **self._more})
            if self._stack is None:
                log.info("%s: no layers are known to run in order; nothing is kept", type(self.model).__name__)
                self._first = set(self.model.modules())
                return 0
        found = self._stack.unchanged(changed)
        if found and found not in self._usable:
            with _bare(slots):
                self._usable[found] = self._agrees(found, {**layer_stack._row(batch.inputs, 1), **self._more})
        return found if found and self._usable[found] else 0

    @torch.no_grad()
    def _agrees(self, depth: int, inputs: Inputs) -> bool:
        """Tell whether the model answers the same when its first layers are left out and their states put in."""
        expected = layer_stack.answers(self.model(**inputs))
        try:
            states_BTD = self._until(depth, inputs)
            self._until(depth, {**inputs, "input_ids": inputs["input_ids"].flip(1)})  # leave nothing of them behind
            with self._standing_in(depth, {id(inputs["input_ids"]): lambda: list(states_BTD)}):
                found = layer_stack.answers(self.model(**inputs))
        except (LookupError, TypeError, AttributeError, ValueError) as error:  # later layers miss what these leave them
            log.info("%s needs its first %d layers: %s", type(self.model).__name__, depth, error)
            return False
        same = all(layer_stack.near(a, b) for a, b in zip(expected, found, strict=True))
        if not same:
            log.info("%s answers otherwise without its first %d layers", type(self.model).__name__, depth)
        return bool(expected) and same

    # --- states ------------------------------------------------------------------------------------------------------

    def _text(self, depth: int, inputs: Inputs) -> Text:
        ids_BT = inputs["input_ids"]
        mask_BT = inputs.get("attention_mask")
        lengths = mask_BT.sum(1).tolist() if mask_BT is not None else [ids_BT.shape[1]] * len(ids_BT)
        read = torch.stack(
            [inputs[n] for n in sorted(inputs) if n != "attention_mask" and not layer_stack.is_decoders(n)], 1
        )
        rows = read.cpu().numpy()
        digests = [
            hashlib.blake2b(row[:, :n].tobytes(), digest_size=16).digest() for row, n in zip(rows, lengths, strict=True)
        ]
        return Text(inputs, [(depth, d) for d in digests], lengths)

    @torch.no_grad()
    def _fill(self, depth: int, text: Text) -> bool:
        """Compute and keep what is not there; return False where something finds no room."""
        missing = list({key: i for i, key in enumerate(text.keys) if key not in self.store}.values())
        if not missing:
            return True
        if self.store.full:
            return False
        began, cost = time.perf_counter(), self.costs.setdefault(depth, Cost())
        longest = max(text.lengths[i] for i in missing)
        part = {k: v[missing] if layer_stack.is_decoders(k) else v[missing, :longest] for k, v in text.inputs.items()}
        states_BTD = self._until(depth, {**part, **self._more}).cpu()
        cost.computed_s += time.perf_counter() - began
        cost.computed += sum(text.lengths[i] for i in missing)
        kept = [
            self.store.put(text.keys[i], s_TD[: text.lengths[i]]) for i, s_TD in zip(missing, states_BTD, strict=True)
        ]
        return all(kept)

    def _until(self, depth: int, inputs: Inputs) -> Tensor:
        """Return the states after the first `depth` layers; later layers are not computed."""
        assert self._stack is not None

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            raise _Enough(output)

        hook = self._stack.layers[depth - 1].register_forward_hook(stop)
        try:
            self.model(**inputs)
        except _Enough as enough:
            return layer_stack.hidden(enough.output)
        finally:
            hook.remove()
        raise AssertionError("the layer did not run")

    def _read(self, depth: int, text: Text) -> list[Tensor]:
        self.costs[depth].read += sum(text.lengths)
        return [self.store.get(key) for key in text.keys]

    # --- the forward pass --------------------------------------------------------------------------------------------

    @contextmanager
    def _standing_in(self, depth: int, texts: Mapping[int, Callable[[], list[Tensor]]]) -> Iterator[None]:
        """Give the first layers a forward that computes nothing, for passes over the token ids whose identity is in
        `texts`: the last one returns the states that it maps to. Passes over others (generation) go as always.
        """
        assert self._stack is not None
        run = _Run(texts, self.costs.setdefault(depth, Cost()))
        with ExitStack() as undo:
            for holder in self._stack.holders:
                undo.callback(holder.register_forward_pre_hook(run.see, with_kwargs=True).remove)
            for i, layer in enumerate(self._stack.layers[:depth]):
                undo.callback(give_back, layer, layer.__dict__.get("forward"))
                layer.__dict__["forward"] = run.forward(layer.forward, i, i == depth - 1, self._stack.more)
            yield


@dataclass
class _Run:
    """A forward pass that leaves layers out."""

    texts: Mapping[int, Callable[[], list[Tensor]]]
    cost: Cost
    states: Callable[[], list[Tensor]] | None = None
    """Of the text that the model reads now, where it is one of `texts`."""
    rest: tuple[Any, ...] = ()
    """What the first layer hands on beside its hidden states."""

    def see(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and not ids.is_floating_point():
            self.states = self.texts.get(id(ids))

    def forward(self, own: Callable[..., Any], i: int, last: bool, more: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.states is None:
                return own(*args, **kwargs)
            hidden_BTD = args[0] if args else kwargs["hidden_states"]
            if more and i == 0:
                self.rest = own(*_first(args, len(hidden_BTD)), **_first(kwargs, len(hidden_BTD)))[1:]
            output = self._padded(self.states(), hidden_BTD) if last else hidden_BTD
            return (output, *self.rest) if more else output

        return forward

    def _padded(self, states: list[Tensor], like_BTD: Tensor) -> Tensor:
        began = time.perf_counter()
        out_BTD = torch.zeros(like_BTD.shape, dtype=states[0].dtype)
        for place_TD, state_TD in zip(out_BTD, states, strict=True):
            place_TD[: len(state_TD)] = state_TD
        out_BTD = out_BTD.to(like_BTD.device)
        self.cost.read_s += time.perf_counter() - began
        return out_BTD


def _first(given: Any, rows: int) -> Any:
    """Return arguments cut to the first row of the hidden states and masks among them."""
    if isinstance(given, dict):
        return {k: _first(v, rows) for k, v in given.items()}
    if isinstance(given, tuple):
        return tuple(_first(v, rows) for v in given)
    return given[:1] if isinstance(given, Tensor) and given.dim() > 2 and len(given) == rows else given


@contextmanager
def _bare(slots: Sequence[Slot]) -> Iterator[None]:
    """Take the trial that is on the base off it for a while."""
    there = [s for s in slots if s.attached.swap.is_on]
    for slot in there:
        slot.attached.take_off()
    try:
        yield
    finally:
        for slot in there:
            slot.attached.put_on()
