"""The training loop: trials in slots on one frozen base, in one forward and backward pass; yields what happens.

It knows neither Optuna nor MLflow. Whoever iterates decides what an event leads to; a slot is freed when the iteration
goes on after its TrialEnded, and the next trial takes it while the others go on. Between two events a trial can be
saved, to go on later as if nothing had happened.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorasweep.config.spec import TrialSpec
from lorasweep.errors import ConfigError, Unpackable, Unstable
from lorasweep.lora import adapter, transfer
from lorasweep.memory import estimate, out_of_memory
from lorasweep.models.base_model import Base
from lorasweep.packing import pass_cost
from lorasweep.tasks.task import Batch, Prediction, Task
from lorasweep.training import base_traits, checkpoint, evaluation, first_token, optimizer, prefix_cache
from lorasweep.training.best import Best
from lorasweep.training.events import EvalEvent, Event, Job, StepEvent, TrialBegan, TrialEnded
from lorasweep.training.first_inputs import first_inputs
from lorasweep.training.learning_rate import peak
from lorasweep.training.optimizer import learning_rate
from lorasweep.training.passes import Passes
from lorasweep.training.slot import Slot, Step, fits, new_slot
from lorasweep.training.workload import Prepared


class Engine:
    """Trains trials that share a base, a task and a data set."""

    def __init__(
        self,
        base: Base,
        task: Task,
        prepared: Prepared,
        scratch: Path | None = None,
        limits: out_of_memory.Limits | None = None,
    ) -> None:
        """`scratch` is a folder for what memory does not hold; `limits` are what earlier trials of this base have shown
        to fit, and are kept up.
        """
        self.base = base
        self.task = task
        self.prepared = prepared
        self.traits = base_traits.tried(base.model, task, prepared)
        self.prefix = prefix_cache.Prefix(base.model, scratch, off=bool(self.traits.alone))
        known = limits or out_of_memory.Limits()
        self.passes = Passes(base, task, prepared, self.traits, self.prefix, known, self._seat)
        self.device = self.passes.device
        self.slots: list[Slot] = []
        self.width: int | None = None
        """Slots in all; None until the first trial is there."""
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

    @property
    def limits(self) -> out_of_memory.Limits:
        """What has turned out to fit."""
        return self.passes.limits

    @property
    def is_looking(self) -> bool:
        """Whether trials are still to be evaluated before any goes on: the time to prune is when all of them were."""
        return any(s.is_due() and not s.failed for s in self.slots)

    def ask_again(self) -> None:
        """Ask `source` for a trial before the next one ends, if a slot is free."""
        self._free = True

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
        inputs = functools.partial(first_inputs, spec, self.base, self.task, self.prepared)
        attached = adapter.attach(self.base, spec.lora, spec.task_type, spec.train.seed, inputs)
        try:
            saved = saved if saved is not None and fits(saved, attached) else None
            notes = (transfer.take_over(attached, job.start_from),) if job.start_from and saved is None else ()
            rate = peak(spec, self.task, self.base.model)
            best = self._best(job)
            slot = new_slot(job, attached, self.prepared.train, rate, saved, self.device, self.traits, best)
        except BaseException:
            adapter.detach(attached)
            raise
        self.slots.append(slot)
        carried = saved["carried"] if saved else {}
        return TrialBegan(
            slot.number,
            slot.total_steps,
            attached,
            slot.peak_rate,
            slot.flops_a_token,
            slot.step,
            carried,
            slot.last,
            notes,
        )

    def _best(self, job: Job) -> Best:
        train, metric = job.spec.train, job.metric or job.spec.task_type.primary or self.task.primary
        maximize = self.task.metric(metric).maximize if job.maximize is None else job.maximize
        return Best(metric, maximize, train.keep == "best", train.patience)

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
            if slot in self.slots and slot.is_over:
                self._seat(slot)
                state, reason = slot.verdict
                kept = slot.take_kept()
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
                    slot.energy_j if self.passes.energy.is_known else None,
                    kept,
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
            self.passes.overhead = self.pass_cost(slot.first_token)

        if out_of_memory.attempt(timed):
            self.passes.overhead = 0.0
        slot.optimizer.zero_grad()
        if wanted is None:
            width = pass_cost.width(self.passes.overhead, slot.spec.train, self.prepared.train)
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

    # --- steps -------------------------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[StepEvent]:
        """Take one step of each trial; of one that has to run alone, before all others."""
        slots = [s for s in self.slots if s.alone][:1] or self.slots
        todo, compared = [Step(s, next(s.batches)) for s in slots], self._comparison if len(slots) > 1 else None
        together = compared is None or compared.together(tuple(s.number for s in slots))
        for group in self.passes.shared(todo) if together else [[step] for step in todo]:
            self.passes.gradients(group)
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
        rate = learning_rate(train, slot.peak_rate, slot.step, slot.total_steps)
        self._update(slot, rate, norm)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise Unstable(f"the loss is {loss} and the gradient's norm {norm} at step {slot.step}")
        slot.step += 1
        slot.pruned = slot.pruned or slot.limit.reason(loss, self.task.loss_ratio(train.max_loss_ratio))
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
        most = self.limits.most if pass_cost.pays(self.passes.overhead, tokens) else 1
        return [due[i : i + most] for i in range(0, len(due), most)]

    def _evaluate(self, slots: list[Slot]) -> Iterator[EvalEvent]:
        """Evaluate, in smaller batches where memory runs out; a trial that does not fit so has failed."""
        began, some, train = time.perf_counter(), self.prepared, slots[0].spec.train
        self._seat(slots[0] if len(slots) == 1 else None)
        found: list[list[Prediction]] = []

        def evaluated(rows: int) -> None:
            def within(batch: Batch) -> contextlib.AbstractContextManager[None]:
                return self.passes.computing(slots, batch, len(slots) > 1, back=False)

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
            slots[0].failed = self.passes.refusal(slots[0].spec)
            return
        took = (time.perf_counter() - began) / len(slots)
        for slot, own in zip(slots, found, strict=True):
            if slot not in self.slots:
                continue
            slot.eval_s += took
            epoch = slot.step / slot.steps_per_epoch
            for_pruner = not slot.is_evaluated_anyway
            event = EvalEvent(slot.number, slot.step, epoch, self.task.metrics(own), own, took, for_pruner)
            slot.evaluated(event)
            yield event
