"""The training loop: trials in slots on one frozen base, in one forward and backward pass; yields what happens.

It knows neither Optuna nor MLflow. Whoever iterates decides what an event leads to; a slot is freed when the iteration
goes on after its TrialEnded, and the next trial takes it while the others go on. Between two events a trial can be
saved, to go on later as if nothing had happened.
"""

import contextlib
import functools
import inspect
import itertools
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorasweep.config.spec import TrialSpec
from lorasweep.errors import ConfigError, Unpackable, Unstable
from lorasweep.hardware.energy import Energy
from lorasweep.lora import adapter, transfer
from lorasweep.memory import estimate, out_of_memory
from lorasweep.models import row_order
from lorasweep.models.base_model import Base
from lorasweep.packing import gradient_checkpointing, packed_pass, pass_cost
from lorasweep.tasks.batches import epochs
from lorasweep.tasks.task import Batch, Example, Prediction, Task, lengths_of
from lorasweep.training import checkpoint, evaluation, first_token, optimizer, prefix_cache
from lorasweep.training.events import EvalEvent, Event, Job, StepEvent, TrialBegan, TrialEnded
from lorasweep.training.optimizer import learning_rate
from lorasweep.training.slot import Slot, Step, fits, new_slot
from lorasweep.training.workload import Prepared

LOOK_AT = 32
"""Training batches, or as many examples in larger ones, that a data-driven initialisation sees."""

ALONE = "a layer cannot compute for several trials at once"

log = logging.getLogger(__name__)


class Engine:
    """Trains trials that share a base, a task and a data set."""

    def __init__(
        self,
        base: Base,
        task: Task,
        prepared: Prepared,
        scratch: Path | None = None,
        limits: out_of_memory.Limits | None = None,
        auto_slots: int | None = None,
    ) -> None:
        """`scratch` is a folder for what memory does not hold; `limits` are what earlier trials of this base have shown
        to fit, and are kept up. `auto_slots` is what train.slots=auto means at most; None measures it.
        """
        self.base = base
        self.task = task
        self.prepared = prepared
        self.device = next(base.model.parameters()).device
        probes = _probes(prepared.train)
        self._alone = self._dependence(probes)
        self._scattered = self._scattered_modules(probes)
        self.prefix = prefix_cache.Prefix(base.model, scratch, off=bool(self._alone))
        self.first_token = self._first_token(probes)
        self.energy = Energy(sorted({p.device for p in base.model.parameters()}, key=str))
        self.slots: list[Slot] = []
        self.width: int | None = None
        """Slots in all; None until the first trial is there."""
        self.overhead: float = math.inf
        """What a pass costs by itself, in tokens; infinite: all trials always share one."""
        self.limits = limits or out_of_memory.Limits()
        self._auto_slots = auto_slots
        self._comparison: pass_cost.Comparison | None = None
        """Where the number of slots was left to us."""
        self._free = True
        """Whether a slot was freed since `source` had nothing."""

    def run(self, source: Callable[[], Job | None]) -> Generator[Event, None, None]:
        """Train trials from `source`, as many at once as there are slots, and yield their events.

        `source` is asked whenever a slot is free; after a None, when the next trial has ended. Where a trial cannot
        begin, the exception comes out with the others still in their slots: another `run` goes on with them. Raises
        ConfigError for a checkpoint of another trial, and for a start_from without an adapter.
        """
        admitting = False
        try:
            self._free = True
            while True:
                admitting = True
                yield from self._fill(source)
                admitting = False
                if not self.slots:
                    return
                ended = yield from self._look()
                if not ended:
                    yield from self._steps()
        except Exception:
            if not admitting:
                self.clear()
            raise
        except BaseException:
            self.clear()
            raise

    # --- what the base is like: tried before any trial is on it ------------------------------------------------------

    def _first_token(self, probes: list[Example]) -> first_token.Place | None:
        """Return from where on the model reads the first token alone, if so."""
        if not self.task.one_answer or len(probes) < 2:
            return None
        return first_token.find(self.base.model, self._batch(probes).inputs)

    def _dependence(self, probes: list[Example]) -> str:
        """Return why no two trials may share a pass: they would pad each other's texts, and that would show."""
        if self.task.padding_side == "left":
            return "texts are padded on the left, which only a trial alone is"
        if len(probes) < 2:
            return ""
        batches = [self._batch([e]) for e in probes]
        if not self._is_row_dependent(batches, self._batch(probes)):
            return ""
        reason = f"{type(self.base.model).__name__} answers a text otherwise beside a longer one"
        log.warning("%s: trials train alone, and what batch a text is in shows in its score", reason)
        return reason

    def _is_row_dependent(self, alone: list[Batch], together: Batch) -> bool:
        model, task = self.base.model, self.task
        if model.get_output_embeddings() is None:
            pairs = zip(*((b.inputs, *b.others) for b in (*alone, together)), strict=True)
            answer = row_order.of_model(model)
            return any(row_order.depends_on_padding(answer, texts[:-1], texts[-1]) for texts in pairs)
        batches = {id(b.inputs): b for b in (*alone, together)}  # all logits would not fit: their losses tell
        return row_order.depends_on_padding(
            lambda inputs: [task.row_losses(model, batches[id(inputs)])], [b.inputs for b in alone], together.inputs
        )

    def _scattered_modules(self, probes: list[Example]) -> set[torch.nn.Module]:
        if not probes:
            return set()
        return row_order.scattered(self.base.model, self._batch(probes[:1]).inputs)

    def _batch(self, examples: list[Example]) -> Batch:
        return self.task.collate([examples], self.prepared.pad_id, self.device)

    @property
    def is_looking(self) -> bool:
        """Whether trials are still to be evaluated before any goes on: the time to prune is when all of them were."""
        return any(s.is_due() and not s.failed for s in self.slots)

    def prune(self, number: int, reason: str) -> None:
        """End a running trial after its current step."""
        for slot in self.slots:
            if slot.number == number:
                slot.pruned = reason

    def drop(self, number: int) -> None:
        """Forget a running trial, without an event."""
        for slot in [s for s in self.slots if s.number == number]:
            self._remove(slot)

    def clear(self) -> None:
        """Forget all running trials."""
        for slot in list(self.slots):
            self.drop(slot.number)

    def checkpoint(self, number: int, path: Path, carried: Mapping[str, Any]) -> int:
        """Write all that a running trial needs to go on, and `carried`, plain data of the caller's; return its step.

        To be called between two events. A failed write leaves the file as it was.
        """
        (slot,) = [s for s in self.slots if s.number == number]
        state = {"identity": self._identity(slot.job), "carried": checkpoint.plain(carried)}
        checkpoint.write(path, state | slot.state(self.device))
        return slot.step

    def _identity(self, job: Job) -> dict[str, Any]:
        return checkpoint.identity(job.number, job.spec, len(self.prepared.train))

    # --- beginning and ending ----------------------------------------------------------------------------------------

    def _fill(self, source: Callable[[], Job | None]) -> Iterator[Event]:
        """Give the free slots to new trials. One that has to run alone lets none in beside it."""
        while self._free and len(self.slots) < (self.width or 1) and not any(s.alone for s in self.slots):
            job = source()
            if job is None:
                self._free = False
                return
            yield self._admit(job)
            if self.width is None and self.slots:
                self._measure(self.slots[0])

    def _admit(self, job: Job) -> TrialBegan:
        """Give the trial a slot: afresh, from another's adapter, or from where it was."""
        saved = checkpoint.read(job.checkpoint, self._identity(job)) if job.checkpoint else None
        spec = job.spec
        wrong = transfer.problems(spec, job.start_from) if job.start_from is not None else []
        if wrong:  # the machine that launched us may be another, and could not tell
            raise ConfigError(wrong)
        self._seat(None)
        inputs = functools.partial(self._first_inputs, spec)
        attached = adapter.attach(self.base, spec.lora, spec.task_type, spec.train.seed, inputs)
        try:
            saved = saved if saved is not None and fits(saved, attached) else None
            notes = (transfer.take_over(attached, job.start_from),) if job.start_from and saved is None else ()
            slot = new_slot(
                job, attached, self.prepared.train, saved, self.device, self.first_token, self._alone, self._scattered
            )
        except BaseException:
            adapter.detach(attached)
            raise
        self.slots.append(slot)
        carried = saved["carried"] if saved else {}
        return TrialBegan(
            slot.number, slot.total_steps, attached, slot.flops_a_token, slot.step, carried, slot.last, notes
        )

    def _seat(self, slot: Slot | None) -> None:
        """Let the base compute with this trial's adapter; with None, with nobody's."""
        for other in self.slots:
            if other is not slot:
                other.attached.take_off()
        if slot is not None:
            slot.attached.put_on()

    def _remove(self, slot: Slot) -> None:
        self._seat(None)  # what the base holds would stop training
        self.slots.remove(slot)
        adapter.detach(slot.attached)
        self._free = True

    def _look(self) -> Generator[Event, None, bool]:
        """Evaluate and end what is due; return whether a trial ended."""
        before = list(self.slots)
        for group in self._evaluations([s for s in before if s.is_due()]):
            present = [s for s in group if s in self.slots]
            if present:
                yield from self._evaluate(present)
        for slot in before:
            if slot in self.slots and (slot.failed or slot.pruned or slot.step == slot.total_steps):
                self._seat(slot)
                state, reason = slot.verdict
                yield TrialEnded(
                    slot.number,
                    slot.step,
                    state,
                    reason,
                    slot.train_s,
                    slot.eval_s,
                    slot.attached,
                    slot.prefix_saved_s,
                    slot.packing_saved_s,
                    slot.energy_j if self.energy.is_known else None,
                )
                if slot in self.slots:
                    self._remove(slot)
        return self.slots != before

    def _measure(self, slot: Slot) -> None:
        """Learn what a pass costs by itself, and from that how many trials are to share one."""
        if slot.alone:
            return  # the next trial may tell
        wanted = slot.spec.train.fixed_slots
        if slot.spec.train.deterministic:  # no clock decides
            self.width = wanted or 1
            return
        self.width = wanted
        if wanted == 1:
            return
        self._seat(slot)

        def timed() -> None:
            self.overhead = self.pass_cost(slot.first_token)

        if out_of_memory.attempt(timed):
            self.overhead = 0.0
        slot.optimizer.zero_grad()
        if wanted is None:
            width = self._auto_slots or pass_cost.width(self.overhead, slot.spec.train, self.prepared.train)
            self.width = self._that_fit(slot.spec, width) if width > 1 else 1
            self._comparison = pass_cost.Comparison()

    def pass_cost(self, place: first_token.Place | None) -> float:
        """Return what a pass of the trial on the base costs by itself, in tokens. Leaves gradients behind."""
        some = self.prepared
        with place.used() if place else contextlib.nullcontext():
            return pass_cost.overhead(self.base.model, self.task, some.train, some.pad_id, self.device)

    def _that_fit(self, spec: TrialSpec, most: int) -> int:
        base = self.base
        return estimate.slots_that_fit(spec, self.task, base.tokenizer, self.prepared.examples, base.missing, most)

    def _first_inputs(self, spec: TrialSpec) -> list[dict[str, torch.Tensor]]:
        """Return the model inputs of the trial's first examples, for initialisations that look at data.

        A batch holds as many examples as the initialisation has to see at once: a pooler sees one row an example, and
        peft's eva waits for ever for a module that sees fewer. Raises ConfigError where there are not so many examples.
        """
        train, examples = spec.train, self.prepared.train
        init = spec.lora.init
        least = init.sees(spec.lora)
        if len(examples) < least:
            raise ConfigError(
                [
                    f"lora.init_lora_weights: {init.name} needs {init.sees_rule} = {least} training examples, got "
                    f"{len(examples)}"
                ]
            )
        size = max(train.batch_size, least)
        count = max(2, LOOK_AT * train.batch_size // size)
        whole = (b for b in epochs(examples, size, train.seed) if len(b) >= least)
        batches = itertools.islice(whole, count)
        made = [self.task.collate([b], self.prepared.pad_id, self.device) for b in batches]
        if self.base.model.config.is_encoder_decoder:  # makes its decoder's inputs from the labels
            made = [replace(b, inputs={**b.inputs, "labels": b.labels}) for b in made]
        known = inspect.signature(self.base.model.forward).parameters
        read = []
        for batch in made:
            inputs = {name: tensor for name, tensor in batch.inputs.items() if name in known}
            read.append({"attention_mask": torch.ones_like(batch.inputs["input_ids"])} | inputs)
        return read

    # --- steps -------------------------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[StepEvent]:
        """Take one step of each trial; of one that has to run alone, before all others."""
        slots = [s for s in self.slots if s.alone][:1] or self.slots
        todo, compared = [Step(s, next(s.batches)) for s in slots], self._comparison if len(slots) > 1 else None
        together = compared is None or compared.together(tuple(s.number for s in slots))
        for group in self._passes(todo) if together else [[step] for step in todo]:
            self._gradients(group)
            there = [s for s in group if s.slot in self.slots and not s.slot.failed]
            for step, norm in zip(there, self._norms(there), strict=True):
                if step.slot not in self.slots:  # dropped since
                    continue
                try:
                    event = self._take(step, norm)
                except Unstable as error:
                    step.slot.pruned = str(error)
                    continue
                yield event
        if compared is not None:
            compared.took(together, sum(s.seconds for s in todo), sum(s.tokens for s in todo))
            spared = compared.spared if together else None
            if spared is not None:
                for step in todo:
                    step.slot.spared(spared * step.tokens)

    def _passes(self, todo: list[Step]) -> list[list[Step]]:
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

    def _gradients(self, group: list[Step]) -> None:
        """Leave each trial's gradient with its parameters. Where memory runs out, fewer trials share a pass, then each
        takes fewer rows; a trial that does not fit so either has failed.
        """
        todo = [group]
        while todo:
            some = todo.pop(0)
            why = self._tried(some)
            if not why:
                todo += self._overflowed(some)
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
                some[0].slot.failed = self._refused(some[0].slot.spec)

    def _overflowed(self, group: list[Step]) -> list[list[Step]]:
        """Take the loss scales out of the gradients; return the steps to be done again, each by itself."""
        again = [step for step in group if math.isfinite(step.loss) and not step.slot.unscale()]
        for step in again:
            step.begin()
        return [[step] for step in again]

    def _tried(self, group: list[Step]) -> str:
        """Take the steps in one pass after another; return why that did not do, if so."""
        together = len(group) > 1
        self._seat(None if together else group[0].slot)
        try:
            return out_of_memory.attempt(lambda: self._backward(group, together))
        except Unpackable as error:
            log.warning("%s", error)
            return ALONE

    def _refused(self, spec: TrialSpec) -> str:
        rows, base = self.limits.micro(spec.train), self.base
        return out_of_memory.refusal(spec, base, self.task, base.tokenizer, self.prepared.examples, rows)

    def _backward(self, group: list[Step], together: bool) -> None:
        parts = [s.parts(self.limits.micro(s.slot.spec.train)) for s in group]
        for step in group:
            step.slot.begin_step()
        for i in range(max(map(len, parts))):
            began, _ = time.perf_counter(), self.energy.used()
            active = [(s, p[i]) for s, p in zip(group, parts, strict=True) if i < len(p)]
            batch = self.task.collate([p for _, p in active], self.prepared.pad_id, self.device)
            with self._computing([s.slot for s, _ in active], batch, together):
                rows_B = self.task.row_losses(self.base.model, batch)
                losses = []
                for (step, _), rows in zip(active, batch.groups, strict=True):
                    losses.append(rows_B[rows].sum() / sum(e.supervised for e in step.examples))
                pairs = zip(losses, active, strict=True)
                scaled = [loss * s.slot.scale.value if s.slot.scale else loss for loss, (s, _) in pairs]
                sum(scaled[1:], scaled[0]).backward()
            values = torch.stack(losses).tolist()  # waits for the device
            took, joules = time.perf_counter() - began, self.energy.used()
            costs = [len(part) * step.slot.flops_a_token for step, part in active]
            for (step, _), loss, tokens, cost in zip(active, values, batch.tokens, costs, strict=True):
                step.loss += loss
                step.tokens += tokens
                step.seconds += took * cost / sum(costs)
                step.joules += joules * cost / sum(costs)
        for step in group:
            step.slot.train(False)

    @contextlib.contextmanager
    def _computing(self, slots: list[Slot], batch: Batch, together: bool, back: bool = True) -> Iterator[None]:
        """Let the base compute for these trials, there and `back`: layers may compute again in the backward pass."""
        shared = packed_pass.Pass(packed_pass.parts([s.layers for s in slots], batch)) if together else None
        with contextlib.ExitStack() as inside:
            inside.enter_context(self.prefix.reused(slots, batch))
            if self.first_token and all(s.first_token for s in slots):
                inside.enter_context(self.first_token.used())
            if shared is not None:
                inside.enter_context(shared.on())
            if back and any(s.spec.train.gradient_checkpointing for s in slots):
                streams, own = [s.layers.stream for s in slots], any(s.spec.model.base_dropout for s in slots)
                inside.enter_context(gradient_checkpointing.on(self.base.model, streams, shared, own))
            yield

    def _norms(self, steps: list[Step]) -> list[float]:
        """Return the norms of the trials' gradients; each pays an equal part of the wait."""
        began = time.perf_counter()
        found = optimizer.norms([s.slot.optimizer for s in steps])
        for step in steps:
            step.slot.train_s += (time.perf_counter() - began) / len(steps)
        return found

    def _take(self, step: Step, norm: float) -> StepEvent:
        """Take the step whose gradient is there, of this norm. Raises Unstable where that is not finite."""
        began, slot = time.perf_counter(), step.slot
        train = slot.spec.train
        loss = step.loss
        rate = learning_rate(train, slot.step, slot.total_steps)
        self._update(slot, rate, norm)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise Unstable(f"the loss is {loss} and the gradient's norm {norm} at step {slot.step}")
        slot.step += 1
        slot.pruned = slot.pruned or slot.limit.reason(loss, train.max_loss_ratio)
        slot.train_s += step.seconds + time.perf_counter() - began
        slot.energy_j += step.joules
        return StepEvent(slot.number, slot.step, slot.total_steps, loss, rate, norm, step.tokens, slot.train_s)

    def _update(self, slot: Slot, rate: float, norm: float) -> None:
        slot.update(rate, norm)

    def _evaluations(self, due: list[Slot]) -> list[list[Slot]]:
        """Return which trials are evaluated in the same passes: where a pass's own cost is much, as in training."""
        sizes = {s.spec.train.eval_batch_size for s in due}
        if len(due) < 2 or len(sizes) > 1 or self.task.spec.generate or any(s.alone for s in due):
            return [[slot] for slot in due]
        some = self.prepared.eval
        tokens = sum(map(len, some)) / len(some) * min(*sizes, len(some))
        most = self.limits.most if pass_cost.pays(self.overhead, tokens) else 1
        return [due[i : i + most] for i in range(0, len(due), most)]

    def _evaluate(self, slots: list[Slot]) -> Iterator[EvalEvent]:
        """Evaluate, in smaller batches where memory runs out; a trial that does not fit so has failed."""
        began, some, train = time.perf_counter(), self.prepared, slots[0].spec.train
        self._seat(slots[0] if len(slots) == 1 else None)
        found: list[list[Prediction]] = []

        def evaluated(rows: int) -> None:
            def within(batch: Batch) -> contextlib.AbstractContextManager[None]:
                return self._computing(slots, batch, len(slots) > 1, back=False)

            sized = replace(train, eval_batch_size=rows)
            model, examples = self.base.model, some.eval
            found[:] = evaluation.predict_for(len(slots), model, self.task, examples, sized, some.pad_id, within)

        try:
            fits = self.limits.evaluated(train, evaluated)
        except Unpackable as error:
            self.limits.share_less(1, str(error))
            fits = False
        if not fits and len(slots) > 1:
            for slot in slots:
                if slot in self.slots:
                    yield from self._evaluate([slot])
            return
        if not fits:
            slots[0].failed = self._refused(slots[0].spec)
            return
        took = (time.perf_counter() - began) / len(slots)
        for slot, own in zip(slots, found, strict=True):
            if slot not in self.slots:
                continue
            slot.eval_s += took
            epoch = slot.step / slot.steps_per_epoch
            slot.last = EvalEvent(slot.number, slot.step, epoch, self.task.metrics(own), own, took)
            yield slot.last


def _probes(examples: Sequence[Example]) -> list[Example]:
    """Return the shortest example of at least two tokens, a middle one and the longest."""
    lengths = lengths_of(examples)
    order = sorted((i for i, n in enumerate(lengths) if n > 1), key=lengths.__getitem__)
    if not order:
        return []
    chosen = list({lengths[i]: i for i in (order[0], order[len(order) // 2], order[-1])}.values())
    found = [examples[i] for i in (chosen if len(chosen) > 1 else order[:2])]
    return found[:2] if len(found) == max(map(len, found)) else found  # not as many as tokens


def _place(step: Step) -> tuple[int, bool, int]:
    """Sort a pass by this: rows that one product can take, of the frozen weight or of A and B, are neighbours."""
    return len(step.examples), bool(step.slot.layers.own), step.slot.spec.lora.r
