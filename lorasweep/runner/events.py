"""What happens to a worker's trials: the engine's events go to their folders, MLflow, the study and the screen."""

import math
import time
from collections.abc import Callable, Mapping

from lorasweep.config.spec import TrialSpec
from lorasweep.console import Display
from lorasweep.errors import LostLease
from lorasweep.files import CHECKPOINT
from lorasweep.hardware import matmul_peak
from lorasweep.lora import adapter, peft_config
from lorasweep.memory import estimate
from lorasweep.runner import outcome
from lorasweep.runner.endings import Endings
from lorasweep.runner.failures import Failures
from lorasweep.runner.trial_run import Running
from lorasweep.study import example_scores, provenance
from lorasweep.study.result import Reload
from lorasweep.study.study import Study
from lorasweep.tasks import task_state
from lorasweep.tracking import outbox
from lorasweep.training import learning_rate
from lorasweep.training.engine import Engine, EvalEvent, Event, StepEvent, TrialBegan, TrialEnded
from lorasweep.training.workload import Workload


class Events:
    """Handles the engine's events."""

    def __init__(
        self,
        study: Study,
        display: Display,
        endings: Endings,
        failures: Failures,
        workload_of: Callable[[TrialSpec], Workload],
    ) -> None:
        self.study = study
        self.display = display
        self.throughput = matmul_peak.Throughput()
        self._endings = endings
        self._failures = failures
        self._workload = workload_of
        self._reported: dict[int, EvalEvent] = {}
        """Evaluations that the pruner has not judged yet."""

    def handle(self, running: Running, event: Event, trainer: Engine) -> None:
        """Write down an event of a trial that runs."""
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
        running.flops, running.peak_rate = event.flops_a_token, event.peak_rate
        running.tokens = event.carried.get("tokens", 0)
        running.began -= event.carried.get("wall_s", 0.0)
        work = self._workload(running.spec)
        run = running.track(event.step, event.last.step if event.last else 0)
        if not event.step:
            run.params(running.spec, running.swept)
            run.dataset(work.data, running.spec)
        running.log.info("%d steps, %s, data %s", event.total_steps, running.counts, work.data.fingerprint[:12])
        presets = peft_config.notes(running.spec.lora, running.spec.task_type, work.skeleton)
        notes = (*work.data.notes, *work.notes, *work.task.notes, *presets, *event.notes)
        rate = learning_rate.said(running.spec, work.task, work.skeleton.model)
        notes = (*notes, rate) if rate else notes
        provenance.add_data(running.folder, work.data, notes)
        for note in notes:
            running.log.info("%s", note)
        if event.step:
            running.log.info("goes on from step %d", event.step)
        if event.last is not None:
            self._report(running, event.last, trainer)
        verdict = self.study.queue.verdict(running.number)
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
            self.throughput.took(event.tokens, event.tokens * running.flops, seconds)
            running.offered += seconds * self.throughput.peak
            running.offered_s += seconds
        running.train_s = event.train_s
        self.display.step(event.number, event.step, event.total_steps, event.loss, self.throughput)
        if time.monotonic() - running.saved > self.study.search.checkpoint_s / 2**running.trial.killed:
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
        if running.spec.train.keep == "best" and not event.is_asked_by_pruner:
            work = self._workload(running.spec)
            example_scores.write_evaluation(
                running.folder, event.step, work.task.metric(primary).parts(event.predictions)
            )
        self._report(running, event, trainer)

    def _report(self, running: Running, event: EvalEvent, trainer: Engine) -> None:
        """Tell the study the primary metric."""
        name = self.study.meta.metric
        value = event.metrics[name]
        if not math.isfinite(value):
            trainer.prune(running.number, f"{name} is {value} at step {event.step}")
            return
        self.study.queue.report(running.number, event.step, value)
        if event.step == running.step < running.total_steps:  # not one that it was judged by before its checkpoint
            self._reported[running.number] = event

    def judge(self, running: Mapping[int, Running], trainer: Engine) -> None:
        """End the trials that the pruner wants to end, once all that are evaluated now have reported."""
        reported, self._reported = self._reported, {}
        for number, event in reported.items():
            if number not in running:
                continue
            with self._failures.of_trial(running[number]):
                own = running[number]
                if self.study.should_prune(number, own.total_steps, own.spec.train.warmup_ratio):
                    name = self.study.meta.metric
                    verdict = f"{self.study.search.pruner}: {name} {event.metrics[name]:.4f} at step {event.step}"
                    self.study.queue.condemn(number, verdict)
                    trainer.prune(number, verdict)

    def _checkpoint(self, running: Running, trainer: Engine) -> None:
        """Save what the trial needs to go on; MLflow may then hold the points up to here."""
        self.study.queue.ensure_ours(running.number)
        carried = {"tokens": running.tokens, "wall_s": time.perf_counter() - running.began}
        try:
            step = trainer.checkpoint(running.number, running.folder / CHECKPOINT, carried)
        except FileNotFoundError as error:  # the next owner has tidied our half-written file away
            raise LostLease(f"trial {running.number}: {error}") from error
        self.study.queue.checkpointed(running.number, step)
        running.covered(step)
        running.saved = time.monotonic()

    def _end(self, running: Running, event: TrialEnded, trainer: Engine) -> None:
        """Save the adapter, load it again, write result.json and tell the study."""
        if event.state == "FAIL":
            self._endings.fail(running, event.reason)
            return
        assert running.counts is not None
        work, kept = self._workload(running.spec), event.kept
        adapter_mb = None if running.spec.lora.full else adapter.save(event.attached, running.folder / "adapter")
        task_state.write(running.folder, work.task)
        reached = matmul_peak.rate(running.flops, running.tokens, event.train_s + event.prefix_saved_s["train"])
        offered = running.offered / running.offered_s if running.offered else matmul_peak.peak_of(trainer.base.model)
        result = running.result(
            event.state,
            event.reason,
            metric=outcome.metric_of(kept, work.task, self.study.meta.metric) if kept else None,
            metrics=kept.metrics if kept else None,
            baseline=work.task.baseline(work.data, "eval") if kept else None,
            params=outcome.sizes(running.counts, is_trained=event.step > 0),
            data_fingerprint=work.data.fingerprint,
            eval_fingerprint=work.data.eval_fingerprint,
            reload=self._leave_answers(running, kept, event.state, trainer) if kept else None,
            steps=event.step,
            kept_step=kept.step if kept else None,
            learning_rate=running.peak_rate,
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
        self._endings.finish(running, result)

    def _leave_answers(self, running: Running, kept: EvalEvent, state: str, trainer: Engine) -> Reload | None:
        """Write what the model answered; return how the saved adapter compares where that is asked for."""
        work, primary = self._workload(running.spec), self.study.meta.metric
        outcome.write_examples(running.folder / "examples.txt", kept, work)
        example_scores.write(running.folder, work.task, primary, kept.predictions, work.data.splits["eval"])
        if not running.spec.tracking.reload_check or running.spec.lora.full or state != "COMPLETE":
            return None
        found = outcome.reload(running.folder / "adapter", running.spec, kept, work, trainer, primary)
        if not found.same:
            running.log.error("the saved adapter is not the trained one: %s", found)
            self.display.say(
                f"trial={running.number} WARNING: the saved adapter scores differently when loaded: {found}"
            )
        return found

    def _need(self, running: Running, work: Workload, missing: tuple[str, ...]) -> float | None:
        """Return the GiB that the trial needs by itself; None where that cannot be counted, which ends no trial."""
        try:
            return estimate.solo_gib(running.spec, work.task, work.tokenizer, work.examples, missing)
        except estimate.UNCOUNTED as error:
            running.log.warning("peak_gib is not known: %s", error)
            return None

    def suspend(self, running: Running, trainer: Engine) -> None:
        """Save a trial that is to go on later and put it back into the queue."""
        self._checkpoint(running, trainer)
        self._endings.put_back(running)
