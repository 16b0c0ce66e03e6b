"""Gradients of several trials: in one pass of the base where that pays and memory allows, else in smaller ones."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from lorasweep.config.spec import TrialSpec
from lorasweep.errors import Unpackable
from lorasweep.hardware.energy import Energy
from lorasweep.memory import out_of_memory
from lorasweep.models.base_model import Base
from lorasweep.packing import gradient_checkpointing, packed_pass, pass_cost
from lorasweep.tasks.task import Batch, Task
from lorasweep.training import prefix_cache
from lorasweep.training.base_traits import BaseTraits
from lorasweep.training.slot import Slot, Step
from lorasweep.training.workload import Prepared

ALONE = "a layer cannot compute for several trials at once"

log = logging.getLogger(__name__)


class Passes:
    """Forward and backward passes of the trials on one base."""

    def __init__(
        self,
        base: Base,
        task: Task,
        prepared: Prepared,
        traits: BaseTraits,
        prefix: prefix_cache.Prefix,
        limits: out_of_memory.Limits,
        seat: Callable[[Slot | None], None],
    ) -> None:
        """`seat` lets the base compute with a trial's adapter, or, given None, with nobody's. `limits` are kept up."""
        self.base, self.task, self.prepared = base, task, prepared
        self.traits, self.prefix, self.limits, self.seat = traits, prefix, limits, seat
        self.device = next(base.model.parameters()).device
        self.energy = Energy(sorted({p.device for p in base.model.parameters()}, key=str))
        self.overhead: float = math.inf
        """What a pass costs by itself, in tokens; infinite: all trials always share one."""

    def shared(self, todo: Sequence[Step]) -> list[list[Step]]:
        """Return which steps share a pass. Those that compute the first token alone draw dropout for it alone, whoever
        is beside them.
        """
        shared: list[list[Step]] = []
        for whole in (False, True):
            some = [s for s in todo if (s.slot.first_token is None) == whole]
            sizes = [(len(s.examples), s.length) for s in some]
            groups = pass_cost.passes(sizes, self.overhead, self.limits.most)
            shared += [sorted(map(some.__getitem__, group), key=_place) for group in groups]
        return shared

    def gradients(self, group: list[Step]) -> None:
        """Leave each trial's gradient with its parameters. Where memory runs out, fewer trials share a pass, then each
        takes fewer rows; a trial that does not fit so either has failed.
        """
        todo = [group]
        while todo:
            some = todo.pop(0)
            why = self._tried(some)
            if not why:
                todo += _overflowed(some)
                continue
            for step in some:
                step.begin()
            if len(some) > 1:
                half = len(some) // 2 if why != ALONE else 1
                self.limits.share_less(half, why)
                todo = [some[i : i + half] for i in range(0, len(some), half)] + todo
            elif self.task.divisible and self.limits.less(some[0].slot.spec.train):
                todo.insert(0, some)
            else:
                some[0].slot.failed = self.refusal(some[0].slot.spec)

    def refusal(self, spec: TrialSpec) -> str:
        """Return why a trial that ran out of memory cannot go on."""
        rows, base = self.limits.micro(spec.train), self.base
        return out_of_memory.refusal(spec, base, self.task, base.tokenizer, self.prepared.examples, rows)

    @contextlib.contextmanager
    def computing(self, slots: Sequence[Slot], batch: Batch, together: bool, back: bool = True) -> Iterator[None]:
        """Let the base compute for these trials, there and `back`: layers may compute again in the backward pass."""
        parts = packed_pass.parts([s.layers for s in slots], batch)
        shared = packed_pass.Pass(parts, self.traits.holders) if together else None
        with contextlib.ExitStack() as inside:
            inside.enter_context(self.prefix.reused(slots, batch))
            if self.traits.first_token and all(s.first_token for s in slots):
                inside.enter_context(self.traits.first_token.used())
            if shared is not None:
                inside.enter_context(shared.on())
            if back and any(s.spec.train.gradient_checkpointing for s in slots):
                streams, own = [s.layers.stream for s in slots], any(s.spec.model.base_dropout for s in slots)
                inside.enter_context(gradient_checkpointing.on(self.base.model, streams, shared, own))
            yield

    def _tried(self, group: list[Step]) -> str:
        """Take the steps in one pass after another; return why that did not do, if so."""
        together = len(group) > 1
        self.seat(None if together else group[0].slot)
        try:
            return out_of_memory.attempt(lambda: self._backward(group, together))
        except Unpackable as error:
            log.warning("%s", error)
            return ALONE

    def _backward(self, group: list[Step], together: bool) -> None:
        parts = [s.parts(self.limits.micro(s.slot.spec.train)) for s in group]
        for step in group:
            step.slot.begin_step()
        for i in range(max(map(len, parts))):
            began, _ = time.perf_counter(), self.energy.used()
            active = [(s, p[i]) for s, p in zip(group, parts, strict=True) if i < len(p)]
            batch = self.task.collate([p for _, p in active], self.prepared.pad_id, self.device)
            with self.computing([s.slot for s, _ in active], batch, together):
                rows_B = self.task.row_losses(self.base.model, batch)
                losses = []
                for (step, _), rows in zip(active, batch.groups, strict=True):
                    losses.append(rows_B[rows].sum() / sum(e.supervised for e in step.examples))
                pairs = zip(losses, active, strict=True)
                scaled = [loss * s.slot.scale.value if s.slot.scale else loss for loss, (s, _) in pairs]
                sum(scaled[1:], scaled[0]).backward()
            values = torch.stack(losses).tolist()  # waits for the device
            took, joules = time.perf_counter() - began, self.energy.used()
            costs = [len(part) * max(1, step.slot.flops_a_token) for step, part in active]  # 0: nothing linear in it
            for (step, _), loss, tokens, cost in zip(active, values, batch.tokens, costs, strict=True):
                step.loss += loss
                step.tokens += tokens
                step.seconds += took * cost / sum(costs)
                step.joules += joules * cost / sum(costs)
        for step in group:
            step.slot.train(False)


def _overflowed(group: Sequence[Step]) -> list[list[Step]]:
    """Take the loss scales out of the gradients; return the steps to be done again, each by itself."""
    again = [step for step in group if math.isfinite(step.loss) and not step.slot.unscale()]
    for step in again:
        step.begin()
    return [[step] for step in again]


def _place(step: Step) -> tuple[int, bool, int]:
    """Sort a pass by this: rows that one product can take, of the frozen weight or of A and B, are neighbours."""
    return len(step.examples), bool(step.slot.layers.own), step.slot.spec.lora.r
