"""One process: claims trials and feeds the engine, whose events go to the folder, MLflow, the study and the screen.

An ended trial's result.json is written first, then its MLflow run ends, then the study is updated; a worker killed in
between leaves a trial that the next owner only has to tell.
"""

import logging
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lorasweep.config.spec import TrialSpec
from lorasweep.console import Display
from lorasweep.errors import ConfigError, DiskFull, KnownPoint, LostLease, StorageDown
from lorasweep.files import CHECKPOINT
from lorasweep.hardware import device, matmul_peak
from lorasweep.memory import estimate, out_of_memory
from lorasweep.runner import interrupt, reclaim, room
from lorasweep.runner.endings import Endings
from lorasweep.runner.events import Events
from lorasweep.runner.failures import Failures
from lorasweep.runner.model_identity import ModelIdentity
from lorasweep.runner.trial_run import Running
from lorasweep.search import pruners
from lorasweep.study import lease, provenance
from lorasweep.study.lease import Beat
from lorasweep.study.result import read_result
from lorasweep.study.study import Study
from lorasweep.study.trial import Trial
from lorasweep.tasks import batches
from lorasweep.tracking import runs
from lorasweep.training import workload
from lorasweep.training.engine import Engine, Job

POLL_S = 1.0
"""Seconds between looks at what was asked to stop."""
AWAIT_S = 0.2
"""Seconds between looks whether the results are there that the next draw waits for."""
HURRIED_S = 2.0
"""Wait for MLflow where the machine is about to be taken away; `sync` and `resume` send the rest."""


class Worker:
    """Runs a study's trials until the queue is empty. A group's base is loaded once and kept while it is in use."""

    def __init__(
        self, study: Study, loaded: Mapping[str, workload.Workload] | None = None, *, divides: bool = False
    ) -> None:
        """`divides` says that workers of this machine have a part of its threads each: the last ones get all."""
        self.study = study
        self.display = Display(alone=study.search.workers == 1)
        self._endings = Endings(study, self.display, self._forget)
        self._failures = Failures(study.folder, self._endings, self._too_large)
        self._events = Events(study, self.display, self._endings, self._failures, self._workload)
        self._identity = ModelIdentity(self._workload)
        self._divides = divides
        self._sharing = study.search.workers
        """Workers that the threads are divided among now."""
        self._loaded = dict(loaded or {})
        self._running: dict[int, Running] = {}
        self._held: Running | None = None
        """A trial that waits for its group."""
        self._trainer: Engine | None = None
        self._group = ""
        """What is loaded."""
        self._limits: dict[str, out_of_memory.Limits] = {}
        """What has turned out to fit, by group."""
        self._groups: dict[tuple[str, ...], str] = {}
        """Of trials that were looked at while they waited."""
        self._stops: dict[str, str] = {}
        self._interrupts = interrupt.Interrupts()
        self._said = 0.0
        self._began = time.perf_counter()
        self._idle_s = 0.0
        self._first_began: float | None = None
        """When the first trial began, once the model was loaded."""

    def run(self) -> None:
        """Claim and run trials until none is waiting or a stop is asked for."""
        self._listen()
        with interrupt.heard() as self._interrupts, Beat(self._listen, POLL_S):
            try:
                while (self._running or not self._stopping()) and self._run_some():
                    pass
            except DiskFull:
                self._give_all_back()
                raise
            finally:
                self._let_go()
                self._said = 0.0
                self._listen()
                lease.end(self.study.owner)
                self.display.close()

    def _run_some(self) -> bool:
        """Run the next trials that share a group; return False when nothing waits."""
        with self._failures.of_engine(self._blamed):
            if self._trainer is None:
                self._held = self._held or self._take()
                if self._held is None:
                    return self._awaits_results()
                self._group = workload.key(self._held.spec)
                self._trainer = self._engine(self._held.spec)
            self._follow(self._trainer)
        if not self._running:
            self._trainer = None
        return True

    def _awaits_results(self) -> bool:
        """Wait a moment for what other workers' trials come to; return whether this worker's next trial needs it."""
        if not self.study.awaits_results():
            return False
        time.sleep(AWAIT_S)
        self._idle_s += AWAIT_S
        return True

    def _stopping(self) -> bool:
        return self._interrupts.count > 0 or "all" in self._stops

    def _listen(self) -> None:
        """Read what was asked to stop, and give a sign of life now and then."""
        try:
            self._stops = self.study.signals.stops()
            if time.monotonic() - self._said > self.study.search.lease_s / 6 or not self._said:
                self._said = time.monotonic()
                if self._divides:
                    self._sharing = self.study.sharing()
                running = list(self._running.values())
                shown = {r.number: {"step": r.step, "of": r.total_steps, "loss": r.loss} for r in running}
                busy_s = time.perf_counter() - self._began - self._idle_s
                self.study.signals.beat(shown, busy_s, self._idle_s, self._first_began)
        except (OSError, StorageDown) as error:
            logging.getLogger("lorasweep.worker").warning("no sign of life could be written: %s", error)

    # --- claiming ----------------------------------------------------------------------------------------------------

    def _take(self) -> Running | None:
        """Claim a trial and open its folder, or return None when nothing waits."""
        while True:
            began = time.perf_counter()
            reclaim.settle(self.study)
            number = self.study.claim(self._shares if workload.varies(self.study.meta.swept) else None)
            if number is None:
                return None
            with self._failures.of_claim(number):
                try:
                    trial = self.study.drawn(number, self._identity)
                except KnownPoint as known:
                    self.display.say(str(known))
                    continue
                self._idle_s += time.perf_counter() - began
                running = self._open(trial, self.study.trial_folder(number))
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

    def _open(self, trial: Trial, folder: Path) -> Running | None:
        """Return the trial ready to run; None where it turned out to be over already, or cannot be."""
        folder.mkdir(parents=True, exist_ok=True)
        room.tidy(folder)
        before = read_result(folder)
        running = Running(self.study, trial, folder)
        self.display.begin(trial.number, running.name)
        if before is not None:
            self._endings.tell(running, before)
            return None
        provenance.write(folder, trial.spec)
        return None if self._never(running) else running

    def _never(self, running: Running) -> bool:
        """End a trial that needs more memory than the study allows, before it is loaded; return whether it did."""
        spec = replace(running.spec, search=self.study.search)
        if spec.search.max_memory_gib is None:
            return False
        work = self._workload(spec)
        why = estimate.hopeless(spec, work.task, work.tokenizer, work.examples)
        if why:
            self._endings.finish(running, running.result("PRUNED", why, never_begun=True))
        return bool(why)

    def _give_all_back(self) -> None:
        """Put what runs back into the queue, as far as the disk takes that: it is not to blame."""
        for running in list(self._running.values()):
            with suppress(OSError, StorageDown, LostLease):
                self.study.queue.give_back(running.number)
            self._endings.drop(running, "it goes back to the queue: the disk is full")

    def _let_go(self) -> None:
        """Give back a trial that was claimed for another group and never began."""
        if self._held is not None:
            held, self._held = self._held, None
            with suppress(OSError, StorageDown, LostLease):  # it goes back when this worker is known to be gone
                self.study.queue.give_back(held.number)
            held.close()

    # --- running -----------------------------------------------------------------------------------------------------

    def _source(self) -> Job | None:
        """Return the next trial of the group that is loaded."""
        running, self._held = self._held or self._next(), None
        if running is None:
            return None
        is_beside = bool(self._running)
        if workload.key(running.spec) != self._group or (is_beside and running.trial.is_suspect):
            self._held = running
            return None
        self._running[running.number] = running
        self._said = 0.0  # so that a death is put down to those that ran
        return self._job(running)

    def _next(self) -> Running | None:
        """Claim a trial to run beside those that run, unless it is another worker's turn."""
        if self._stopping() or any(r.trial.is_suspect for r in self._running.values()):
            return None
        if self._running and self.study.search.workers > 1:
            left = self.study.queue.waiting() + self.study.queue.running()
            if len(self._running) >= math.ceil(left / self.study.search.workers):
                return None
        return self._take()

    def _follow(self, trainer: Engine) -> None:
        """Handle the engine's events; after a stop, save and give back what runs."""
        events = trainer.run(self._source)
        looked = time.monotonic()
        try:
            for event in events:
                if self.study.search.workers > 1 and time.monotonic() - looked > POLL_S:
                    looked = time.monotonic()
                    trainer.ask_again()  # others' trials may have ended that the next draw waits for
                running = self._running[event.number]
                self._first_began = self._first_began or time.time()
                with self._failures.of_trial(running):
                    self._events.handle(running, event, trainer)
                if not trainer.is_looking:
                    self._events.judge(self._running, trainer)
                if self._divides and not running.spec.train.deterministic and device.divide_threads(self._sharing):
                    self._events.throughput.peak = matmul_peak.peak_of(trainer.base.model)
                if self._stopping():
                    for running in list(self._running.values()):
                        with self._failures.of_trial(running):
                            self._events.suspend(running, trainer)
                    return
                for number in self._running:
                    if str(number) in self._stops:
                        trainer.prune(number, self._stops[str(number)])
        finally:
            events.close()

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
        origin = running.trial.start_from
        return Job(
            running.number,
            running.spec,
            eval_steps=pruners.rungs(self.study.search, total, running.spec.train.warmup_ratio),
            checkpoint=running.folder / CHECKPOINT,
            start_from=None if origin is None else self.study.trial_folder(origin) / "adapter",
            metric=self.study.meta.metric,
            maximize=self.study.meta.maximize,
        )

    def _engine(self, spec: TrialSpec) -> Engine:
        work = self._workload(spec)
        for other in self._loaded.values():  # one base at a time
            if other is not work:
                other.base = None
        base = work.take_base(spec)
        limits = self._limits.setdefault(workload.key(spec), out_of_memory.Limits())
        self._events.throughput.peak = matmul_peak.peak_of(base.model)
        slow = matmul_peak.slow(device.device_of(spec.train), device.dtype_of(spec.train, device.device_of(spec.train)))
        if slow:
            self.display.say(f"train.precision={spec.train.precision}: {slow}")
        return Engine(base, work.task, work.prepared(), self.study.folder, limits)

    def _workload(self, spec: TrialSpec) -> workload.Workload:
        wanted = workload.key(spec)
        if wanted not in self._loaded:
            self._loaded[wanted] = workload.workload(spec).keep()
        return self._loaded[wanted]

    def _forget(self, running: Running) -> None:
        self._running.pop(running.number, None)
        if self._trainer is not None:
            self._trainer.drop(running.number)


# --- a worker as a launcher starts it --------------------------------------------------------------------------------


_prepared: dict[str, dict[str, workload.Workload]] = {}
"""Data, and a base, that this process has read already, by study folder."""


def prepare(loaded: Mapping[str, workload.Workload], folder: str) -> None:
    """Keep data for the workers that run in this process; others find the tokens on disk."""
    _prepared[folder] = {key: work.keep() for key, work in loaded.items()}


def prepared(folder: str) -> Mapping[str, workload.Workload]:
    """Return the data that this process keeps for a study."""
    return _prepared.get(folder, {})


def run_worker(folder: str, divide: bool, trusted: bool = False) -> None:
    """Run the study's trials in this process, with its share of the threads where workers divide them."""
    study = Study.open(Path(folder), trusted=trusted)
    every = study.first_spec().model.device_map is not None
    with device.own(study.search.workers, every, divide=divide) as divides:
        Worker(study, prepared(folder), divides=divides).run()
    runs.flush(HURRIED_S if interrupt.is_heard() else runs.EXIT_S)
