"""One process: claims trials, feeds the engine, writes what happens to the folder, MLflow and the study.

An ended trial's result.json is written first, then its MLflow run ends, then the study is told; a worker killed in
between leaves a trial that the next owner only has to tell.
"""

import errno
import logging
import math
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorasweep.config import compose
from lorasweep.config.spec import TrialSpec
from lorasweep.console import Display, short
from lorasweep.errors import ConfigError, DiskFull, LostLease, StorageDown
from lorasweep.hardware import device, matmul_peak
from lorasweep.lora import adapter
from lorasweep.memory import estimate, out_of_memory
from lorasweep.models import base_model
from lorasweep.packing import pass_cost
from lorasweep.runner import interrupt, outcome
from lorasweep.runner.trial_run import Running
from lorasweep.search import pruners, samplers
from lorasweep.study import example_scores, lease, provenance
from lorasweep.study.lease import Beat
from lorasweep.study.meta import Claimed
from lorasweep.study.result import Reload, TrialResult, read_result, result_of, write_result
from lorasweep.study.study import Study
from lorasweep.tasks import batches, task_state
from lorasweep.tracking import outbox, runs
from lorasweep.training import checkpoint, engine, workload
from lorasweep.training.engine import Engine, EvalEvent, Job, StepEvent, TrialBegan, TrialEnded

POLL_S = 1.0
"""Seconds between looks at what was asked to stop."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
LITTLE = 2**20
"""Bytes left on a disk that is as good as full."""


class Worker:
    """Runs a study's trials until the queue is empty. A group's base is loaded once and kept while it is in use."""

    def __init__(
        self, study: Study, loaded: Mapping[str, workload.Workload] | None = None, *, divides: bool = False
    ) -> None:
        """`divides` says that workers of this machine have a part of its threads each: the last ones get all."""
        self.study = study
        self._divides = divides
        self._sharing = study.search.workers
        """Workers that the threads are divided among now."""
        self.display = Display(alone=study.search.workers == 1)
        self._loaded = dict(loaded or {})
        self._running: dict[int, Running] = {}
        self._held: Running | None = None
        """A trial that waits for its group."""
        self._reported: dict[int, EvalEvent] = {}
        """Evaluations that the pruner has not judged yet."""
        self._trainer: Engine | None = None
        self._throughput = matmul_peak.Throughput()
        self._group = ""
        """What is loaded."""
        self._limits: dict[str, out_of_memory.Limits] = {}
        """What has turned out to fit, by group."""
        self._groups: dict[tuple[str, ...], str] = {}
        """Of trials that were looked at while they waited."""
        self._stops: dict[str, str] = {}
        self._interrupts = interrupt.Interrupts()
        self._claiming: int | None = None
        """A trial that is ours and not yet open."""
        self._said = 0.0
        self._began = time.perf_counter()
        self._idle_s = 0.0

    def run(self) -> None:
        """Claim and run trials until none is waiting or a stop is asked for."""
        self._listen()
        with interrupt.heard() as self._interrupts, Beat(self._listen, POLL_S):
            try:
                while (self._running or not self._stopping()) and self._run_some():
                    pass
            finally:
                self._let_go()
                self._said = 0.0
                self._listen()
                lease.end(self.study.owner)
                self.display.close()

    def _run_some(self) -> bool:
        """Run the next trials that share a group; return False when nothing waits."""
        with self._contained(None):
            if self._trainer is None:
                self._held = self._held or self._take()
                if self._held is None:
                    return False
                self._group = workload.key(self._held.spec)
                self._trainer = self._engine(self._held.spec)
            self._follow(self._trainer)
        if not self._running:
            self._trainer = None
        return True

    def _stopping(self) -> bool:
        return self._interrupts.count > 0 or "all" in self._stops

    def _listen(self) -> None:
        """Read what was asked to stop, and give a sign of life now and then."""
        try:
            self._stops = self.study.stops()
            if time.monotonic() - self._said > self.study.search.lease_s / 6 or not self._said:
                self._said = time.monotonic()
                if self._divides:
                    self._sharing = self.study.sharing()
                running = list(self._running.values())
                shown = {r.number: {"step": r.step, "of": r.total_steps, "loss": r.loss} for r in running}
                self.study.beat(shown, busy_s=time.perf_counter() - self._began - self._idle_s, idle_s=self._idle_s)
        except (OSError, StorageDown) as error:
            logging.getLogger("lorasweep.worker").warning("no sign of life could be written: %s", error)

    # --- claiming ----------------------------------------------------------------------------------------------------

    def _take(self) -> Running | None:
        """Claim a trial and open its folder, or return None when nothing waits."""
        while True:
            began = time.perf_counter()
            settle(self.study)
            self._claiming = self.study.claim(self._shares if workload.varies(self.study.meta.swept) else None)
            if self._claiming is None:
                return None
            claimed = self.study.drawn(self._claiming, self._configured)
            self._idle_s += time.perf_counter() - began
            folder = self.study.trial_folder(claimed.number)
            folder.mkdir(parents=True, exist_ok=True)
            running = self._open(claimed, folder)
            self._claiming = None
            if running is not None:
                return running

    def _shares(self, overrides: list[str]) -> bool:
        """Tell whether a waiting trial can use the base that is loaded."""
        line = tuple(overrides)
        if line not in self._groups:
            try:
                self._groups[line] = workload.key(self.study.spec(overrides))
            except ConfigError:  # it will say so when it is its turn
                self._groups[line] = "none"
        return self._groups[line] == self._group

    def _open(self, claimed: Claimed, folder: Path) -> Running | None:
        """Return the trial ready to run; None where it turned out to be over already, or cannot be."""
        name = " ".join(f"{k}={short(v)}" for k, v in claimed.swept.items()) or "default"
        before = read_result(folder)
        spec = self.study.spec(claimed.overrides)
        running = Running(self.study, claimed, spec, folder, name)
        self.display.begin(claimed.number, name)
        if before is not None:
            self._tell(running, before)
            return None
        provenance.write(folder, spec)
        return None if self._never(running) else running

    def _never(self, running: Running) -> bool:
        """End a trial that needs more memory than the study allows, before it is loaded; return whether it did."""
        spec = replace(running.spec, search=self.study.search)
        if spec.search.max_memory_gib is None:
            return False
        work = self._workload(spec)
        why = estimate.hopeless(spec, work.task, work.tokenizer, work.examples)
        if why:
            self._finish(running, running.result("PRUNED", why, never_begun=True))
        return bool(why)

    def _configured(self, key: str) -> Any:
        """Return the value that a key has in the study's fixed configuration."""
        section, _, name = key.partition(".")
        return compose.settings(self.study.space.fixed)[section][name]

    def _let_go(self) -> None:
        """Give back a trial that was claimed for another group and never began."""
        if self._held is not None:
            held, self._held = self._held, None
            with suppress(OSError, StorageDown, LostLease):  # it goes back when this worker is known to be gone
                self.study.give_back(held.number)
            held.close()

    # --- running -----------------------------------------------------------------------------------------------------

    def _source(self) -> Job | None:
        """Return the next trial of the group that is loaded."""
        running, self._held = self._held or self._next(), None
        if running is None:
            return None
        if workload.key(running.spec) != self._group:
            self._held = running
            return None
        self._running[running.number] = running
        return self._job(running)

    def _next(self) -> Running | None:
        """Claim a trial to run beside those that run, unless it is another worker's turn."""
        if self._stopping():
            return None
        if self._running and self.study.search.workers > 1:
            left = self.study.waiting() + self.study.running()
            if len(self._running) >= math.ceil(left / self.study.search.workers):
                return None
        return self._take()

    def _follow(self, trainer: Engine) -> None:
        """Handle the engine's events; after a stop, save and give back what runs."""
        events = trainer.run(self._source)
        try:
            for event in events:
                running = self._running[event.number]
                with self._contained(running):
                    self._handle(running, event, trainer)
                if not trainer.is_looking:
                    self._judge(trainer)
                if self._divides and not running.spec.train.deterministic and device.divide_threads(self._sharing):
                    self._throughput.peak = matmul_peak.peak_of(trainer.base.model)
                if self._stopping():
                    for running in list(self._running.values()):
                        with self._contained(running):
                            self._suspend(running, trainer)
                    return
                for number in self._running:
                    if str(number) in self._stops:
                        trainer.prune(number, self._stops[str(number)])
        finally:
            events.close()

    @contextmanager
    def _contained(self, running: Running | None) -> Iterator[None]:
        """End a trial, and no other, where something of it raises; without one, the trials that are to blame.

        Raises DiskFull and StorageDown: nothing is wrong with the trials.
        """
        try:
            yield
        except LostLease as lost:
            self._claiming = None
            if running is not None:
                self._drop(running, str(lost))
        except (DiskFull, StorageDown):
            raise
        except Exception as error:
            if _no_space(error, self.study.folder):
                raise DiskFull(
                    f"{self.study.folder}: cannot write ({error}); free space, then: "
                    f"python -m lorasweep resume {self.study.folder}"
                ) from error
            trace = runs.redact(traceback.format_exc())
            if isinstance(error, ConfigError):  # the last line is the reason
                trace = f"{trace}\n{runs.redact('; '.join(error.problems))}"
            if running is None and self._claiming is not None:
                number, self._claiming = self._claiming, None
                self._fail_unopened(number, trace)
                return
            for trial in self._blamed() if running is None else [running]:
                self._fail(
                    trial, f"{trace}\n{self._too_large(trial)}" if out_of_memory.is_out_of_memory(error) else trace
                )

    def _too_large(self, running: Running) -> str:
        """Return why a trial found no room: what it needs, what there is."""
        work, base = self._workload(running.spec), self._trainer.base if self._trainer else None
        return out_of_memory.refusal(
            running.spec, base, work.task, work.tokenizer, work.examples, running.spec.train.rows
        )

    def _blamed(self) -> list[Running]:
        """Return the trials that an error of the engine ended: the one that could not begin, or else all that run."""
        if not self._running and self._held is not None:
            held, self._held = self._held, None
            return [held]
        running = list(self._running.values())
        return [r for r in running if r.counts is None] or running

    def _job(self, running: Running) -> Job:
        work = self._workload(running.spec)
        _, total = batches.step_counts(running.spec.train, len(work.examples["train"]))
        origin = running.claimed.start_from
        return Job(
            running.number,
            running.spec,
            eval_steps=pruners.rungs(self.study.search, total),
            checkpoint=running.folder / checkpoint.CHECKPOINT,
            start_from=None if origin is None else self.study.trial_folder(origin) / "adapter",
        )

    def _engine(self, spec: TrialSpec) -> Engine:
        work = self._workload(spec)
        base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
        limits = self._limits.setdefault(workload.key(spec), out_of_memory.Limits())
        self._throughput.peak = matmul_peak.peak_of(base.model)
        slow = matmul_peak.slow(device.device_of(spec.train), device.dtype_of(spec.train, device.device_of(spec.train)))
        if slow:
            self.display.say(f"train.precision={spec.train.precision}: {slow}")
        auto_slots = pass_cost.UNMEASURED if samplers.learns(self.study.search) else None
        return Engine(base, work.task, work.prepared(), self.study.folder, limits, auto_slots)

    def _workload(self, spec: TrialSpec) -> workload.Workload:
        wanted = workload.key(spec)
        if wanted not in self._loaded:
            self._loaded[wanted] = workload.workload(spec).keep()
        return self._loaded[wanted]

    # --- events ------------------------------------------------------------------------------------------------------

    def _handle(self, running: Running, event: engine.Event, trainer: Engine) -> None:
        match event:
            case TrialBegan():
                self._begin(running, event, trainer)
            case StepEvent():
                self._step(running, event, trainer)
            case EvalEvent():
                self._evaluated(running, event, trainer)
            case TrialEnded():
                self._end(running, event, trainer)

    def _begin(self, running: Running, event: TrialBegan, trainer: Engine) -> None:
        running.counts = adapter.counts(event.attached)
        running.step, running.total_steps, running.last = event.step, event.total_steps, event.last
        running.flops = event.flops_a_token
        running.tokens = event.carried.get("tokens", 0)
        running.began -= event.carried.get("wall_s", 0.0)
        work = self._workload(running.spec)
        run = running.track(event.step, event.last.step if event.last else 0)
        if not event.step:
            run.params(running.spec, running.claimed.swept)
            run.dataset(work.data, running.spec)
        running.log.info("%d steps, %s, data %s", event.total_steps, running.counts, work.data.fingerprint[:12])
        for note in (*work.data.notes, *work.task.notes, *event.notes):
            running.log.info("%s", note)
        if event.step:
            running.log.info("goes on from step %d", event.step)
        if event.last is not None:
            self._report(running, event.last, trainer)
        verdict = self.study.verdict(running.number)
        if verdict:  # its worker died between the pruner's word and the end
            trainer.prune(running.number, verdict)

    def _step(self, running: Running, event: StepEvent, trainer: Engine) -> None:
        running.tokens += event.tokens
        running.step, running.loss = event.step, event.loss
        if event.step % running.spec.tracking.log_every == 0 or event.step == event.total_steps:
            values = {
                "train_loss": event.loss,
                "learning_rate": event.learning_rate,
                "grad_norm": event.grad_norm,
                "tokens_per_s": running.tokens / event.train_s,
            }
            running.track().metrics(event.step, values)
        if running.train_s is not None:
            seconds = event.train_s - running.train_s
            self._throughput.took(event.tokens, event.tokens * running.flops, seconds)
            running.offered += seconds * self._throughput.peak
            running.offered_s += seconds
        running.train_s = event.train_s
        self.display.step(event.number, event.step, event.total_steps, event.loss, self._throughput)
        if time.monotonic() - running.saved > self.study.search.checkpoint_s:
            self._checkpoint(running, trainer)

    def _evaluated(self, running: Running, event: EvalEvent, trainer: Engine) -> None:
        running.last = event
        primary = self.study.meta.metric
        values = {"epoch": event.epoch, outbox.OBJECTIVE: event.metrics[primary]}
        values |= {f"eval_{k}": v for k, v in event.metrics.items()}
        running.track().metrics(event.step, values)
        running.log.info("step %d: %s", event.step, event.metrics)
        first = {primary: event.metrics[primary]}
        self.display.evaluated(event.number, event.step, first | event.metrics)
        self._report(running, event, trainer)

    def _report(self, running: Running, event: EvalEvent, trainer: Engine) -> None:
        """Tell the study the primary metric."""
        name = self.study.meta.metric
        value = event.metrics[name]
        if not math.isfinite(value):
            trainer.prune(running.number, f"{name} is {value} at step {event.step}")
            return
        self.study.report(running.number, event.step, value)
        if event.step == running.step < running.total_steps:  # not one that it was judged by before its checkpoint
            self._reported[running.number] = event

    def _judge(self, trainer: Engine) -> None:
        """End the trials that the pruner wants to end, once all that are evaluated now have reported."""
        reported, self._reported = self._reported, {}
        for number, event in reported.items():
            running = self._running.get(number)
            if running is None:
                continue
            with self._contained(running):
                if self.study.should_prune(number, running.total_steps):
                    name = self.study.meta.metric
                    verdict = f"{self.study.search.pruner}: {name} {event.metrics[name]:.4f} at step {event.step}"
                    self.study.condemn(number, verdict)
                    trainer.prune(number, verdict)

    def _checkpoint(self, running: Running, trainer: Engine) -> None:
        """Save what the trial needs to go on; MLflow may then hold the points up to here."""
        self.study.ensure_ours(running.number)
        carried = {"tokens": running.tokens, "wall_s": time.perf_counter() - running.began}
        try:
            step = trainer.checkpoint(running.number, running.folder / checkpoint.CHECKPOINT, carried)
        except FileNotFoundError as error:  # the next owner has tidied our half-written file away
            raise LostLease(f"trial {running.number}: {error}") from error
        self.study.checkpointed(running.number, step)
        running.covered(step)
        running.saved = time.monotonic()

    def _end(self, running: Running, event: TrialEnded, trainer: Engine) -> None:
        """Save the adapter, load it again, write result.json and tell the study."""
        if event.state == "FAIL":
            self._fail(running, event.reason)
            return
        assert running.counts is not None
        work, last = self._workload(running.spec), running.last
        adapter_mb = adapter.save(event.attached, running.folder / "adapter")
        task_state.write(running.folder, work.task)
        reached = matmul_peak.rate(running.flops, running.tokens, event.train_s + event.prefix_saved_s["train"])
        offered = running.offered / running.offered_s if running.offered else matmul_peak.peak_of(trainer.base.model)
        result = running.result(
            event.state,
            event.reason,
            metric=outcome.metric_of(last, self.study.meta.metric) if last else None,
            metrics=last.metrics if last else None,
            baseline=work.task.baseline(work.data, "eval") if last else None,
            params=outcome.sizes(running.counts),
            data_fingerprint=work.data.fingerprint,
            reload=self._leave_answers(running, last, event.state, trainer) if last else None,
            steps=event.step,
            adapter_mb=adapter_mb,
            train_s=event.train_s,
            eval_s=event.eval_s,
            peak_gib=self._need(running, work, trainer.base.missing),
            worker_peak_gib=outcome.worker_gib(trainer.device),
            prefix_saved_s=sum(event.prefix_saved_s.values()),
            packing_saved_s=event.packing_saved_s,
            tokens_per_s=running.tokens / event.train_s if event.train_s else 0.0,
            flops_per_s=reached,
            matmul_share=reached / offered,
            energy_j=event.energy_j,
        )
        self._finish(running, result)

    def _leave_answers(self, running: Running, last: EvalEvent, state: str, trainer: Engine) -> Reload | None:
        """Write what the model answered; return how the saved adapter compares where that is asked for."""
        work, primary = self._workload(running.spec), self.study.meta.metric
        outcome.write_examples(running.folder / "examples.txt", last, work)
        example_scores.write(running.folder, work.task, primary, last.predictions, work.data.splits["eval"])
        if not running.spec.tracking.reload_check or state != "COMPLETE":
            return None
        found = outcome.reload(running.folder / "adapter", running.spec, last, work, trainer, primary)
        if not found.same:
            running.log.error("the saved adapter is not the trained one: %s", found)
            self.display.say(
                f"trial={running.number} WARNING: the saved adapter scores differently when loaded: {found}"
            )
        return found

    def _need(self, running: Running, work: workload.Workload, missing: tuple[str, ...]) -> float | None:
        """Return the GiB that the trial needs by itself; None where that cannot be counted, which ends no trial."""
        try:
            return estimate.solo_gib(running.spec, work.task, work.tokenizer, work.examples, missing)
        except estimate.UNCOUNTED as error:
            running.log.warning("peak_gib is not known: %s", error)
            return None

    # --- endings -----------------------------------------------------------------------------------------------------

    def _finish(self, running: Running, result: TrialResult) -> None:
        """Write result.json, end the MLflow run, tell the study; in this order, so that what is told is there."""
        self.study.ensure_ours(running.number)
        if result.params is not None:
            running.log_result(result)
        write_result(running.folder, result)
        self._tell(running, result)

    def _tell(self, running: Running, result: TrialResult) -> None:
        """End the MLflow run and tell the study what stands in result.json."""
        running.end_run(result)
        state, values = running.told(result)
        self.study.tell(running.number, state, values, result.stored())
        shown = f"{result.metric.name}={result.metric.value:.4f} " if result.metric else ""
        detail = f"{shown}train_s={result.train_s or 0.0:.1f}"
        self.display.end(running.number, state, f"{detail} reason={result.reason!r}" if result.reason else detail)
        running.log.info("%s %s", state, result.reason)
        (running.folder / checkpoint.CHECKPOINT).unlink(missing_ok=True)
        self._forget(running)

    def _fail(self, running: Running, error: str) -> None:
        running.log.error("%s", error)
        last = error.strip().splitlines()[-1]
        try:
            self._finish(running, running.result("FAIL", last, traceback=error))
        except LostLease as lost:
            self._drop(running, str(lost))

    def _fail_unopened(self, number: int, error: str) -> None:
        """Fail a trial whose point could not be drawn or composed."""
        folder, last = self.study.trial_folder(number), error.strip().splitlines()[-1]
        folder.mkdir(parents=True, exist_ok=True)
        result = TrialResult(number=number, state="FAIL", reason=last, overrides=[], params_swept={}, traceback=error)
        write_result(folder, result)
        self.study.tell(number, "FAIL", None, result.stored())
        self.display.say(f"trial={number} state=FAIL reason={last!r}")

    def _suspend(self, running: Running, trainer: Engine) -> None:
        """Save a trial that is to go on later and put it back into the queue."""
        self._checkpoint(running, trainer)
        running.track().close("KILLED")
        self.study.give_back(running.number)
        self.display.end(running.number, "WAITING", f"saved at step {running.step}/{running.total_steps}")
        running.log.info("saved at step %d, put back", running.step)
        self._forget(running)

    def _drop(self, running: Running, why: str) -> None:
        """Forget a trial that another worker has now."""
        self.display.end(running.number, "LOST", why)
        if running.run is not None:
            running.run.leave()
        self._forget(running)

    def _forget(self, running: Running) -> None:
        running.close()
        self._running.pop(running.number, None)
        if self._trainer is not None:
            self._trainer.drop(running.number)


# --- a worker as a launcher starts it --------------------------------------------------------------------------------


def settle(study: Study) -> None:
    """Put back what dead workers had; leave a result for a trial whose workers died too often."""
    for number in study.reclaim():
        trial, folder = study.trial(number), study.trial_folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        write_result(folder, result_of(trial, folder))


def is_fatal(error: Exception | None) -> bool:
    """Return whether launching again would end the same way."""
    return isinstance(error, DiskFull | ConfigError | StorageDown)


_prepared: dict[str, dict[str, workload.Workload]] = {}
"""Data that this process has read already, by study folder."""


def prepare(study: Study, loaded: Mapping[str, workload.Workload]) -> None:
    """Keep data for the workers that run in this process; others find the tokens on disk."""
    _prepared[str(study.folder)] = {key: work.keep() for key, work in loaded.items()}


def run_worker(folder: str, divide: bool) -> None:
    """Run the study's trials in this process, with its part of the threads if they are to be divided."""
    study = Study.open(Path(folder))
    every = study.first_spec().model.device_map is not None
    with device.own(study.search.workers, every, divide=divide) as divides:
        Worker(study, _prepared.get(folder), divides=divides).run()
    runs.flush()


def _no_space(error: Exception, folder: Path) -> bool:
    """Return whether an error is the disk's; torch tells a full disk as a RuntimeError of its own."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return True
    return isinstance(error, OSError | RuntimeError) and shutil.disk_usage(folder).free < LITTLE
