"""One process: claims trials, feeds the engine, writes what happens to the folder, MLflow and the study."""

import json
import logging
import math
import resource
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorasweep import adapter, compose, engine, group, model, provenance
from lorasweep.display import Display
from lorasweep.engine import Engine, EvalEvent, StepEvent, TrialBegan, TrialEnded
from lorasweep.spec import TrialSpec
from lorasweep.study import Claimed, Study
from lorasweep.tasks import maximize
from lorasweep.tracking import TrialRun, start_trial

SHOWN_EXAMPLES = 8
"""Rows of the eval split that a trial leaves with the model's answers, for a person to read."""

RELOAD_TOLERANCE = 1e-4
"""Largest relative difference of the eval loss between the trial and its adapter loaded again."""


@dataclass
class Running:
    """A claimed trial: its folder, its logs and what it has shown so far."""

    claimed: Claimed
    spec: TrialSpec
    folder: Path
    run: TrialRun
    log: logging.Logger
    name: str
    began: float = field(default_factory=time.perf_counter)
    counts: adapter.Counts | None = None
    tokens: int = 0
    last: EvalEvent | None = None

    @property
    def number(self) -> int:
        return self.claimed.number


class Worker:
    """Runs a study's trials until the queue is empty. A group's base is loaded once and kept while it is in use."""

    def __init__(self, study: Study, loaded: Mapping[str, group.Workload] | None = None) -> None:
        self.study = study
        self.display = Display()
        self._loaded = dict(loaded or {})
        self._running: dict[int, Running] = {}
        self._held: Running | None = None

    def run(self) -> None:
        """Claim and run trials until none is waiting."""
        try:
            while True:
                self._held = self._held or self._take()
                if self._held is None:
                    return
                self._run_group(self._held.spec)
        finally:
            self.display.close()

    def _take(self) -> Running | None:
        """Claim a trial and write its folder, or return None when nothing waits."""
        claimed = self.study.claim()
        if claimed is None:
            return None
        spec = compose.compose_trial(claimed.overrides)
        folder = self.study.trial_folder(claimed.number)
        folder.mkdir(parents=True, exist_ok=True)
        facts = provenance.write(folder, spec)
        name = " ".join(f"{k}={v}" for k, v in claimed.params.items()) or "default"
        tags = {
            "study": self.study.meta.name,
            "trial": str(claimed.number),
            "kind": "trial",
            "state": "RUNNING",
            "commit": str(facts["commit"]),
        }
        run = start_trial(folder, spec, self.study.meta.mlflow_parent, f"{claimed.number} {name}", tags)
        log = logging.getLogger(f"lorasweep.trial.{self.study.meta.name}.{claimed.number}")
        log.setLevel(logging.INFO)
        log.propagate = False
        handler = logging.FileHandler(folder / "log.txt", encoding="utf8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        self.display.begin(claimed.number, name)
        return Running(claimed, spec, folder, run, log, name)

    def _run_group(self, spec: TrialSpec) -> None:
        """Run the held trial and all that follow it in the queue and share its group."""
        wanted = group.key(spec)
        trainer: Engine | None = None

        def source() -> tuple[int, TrialSpec] | None:
            running, self._held = self._held or self._take(), None
            if running is None:
                return None
            if group.key(running.spec) != wanted:
                self._held = running
                return None
            self._running[running.number] = running
            return running.number, running.spec

        while True:
            try:
                if trainer is None:
                    trainer = self._engine(spec)
                for event in trainer.run(source):
                    self._handle(event, trainer)
                return
            except Exception:
                error = traceback.format_exc()
                held = [self._held] if self._held is not None else []
                for running in list(self._running.values()) or held:
                    self._fail(running, error)
                if self._held is None or trainer is None:
                    self._held = None
                    return

    def _engine(self, spec: TrialSpec) -> Engine:
        work = self._workload(spec)
        base = model.load(spec.model, spec.train, work.task, work.tokenizer)
        return Engine(base, work.task, work.prepared())

    def _workload(self, spec: TrialSpec) -> group.Workload:
        wanted = group.key(spec)
        if wanted not in self._loaded:
            self._loaded[wanted] = group.workload(spec)
        return self._loaded[wanted]

    # --- events ------------------------------------------------------------------------------------------------------

    def _handle(self, event: engine.Event, trainer: Engine) -> None:
        running = self._running[event.number]
        match event:
            case TrialBegan():
                self._begin(running, event)
            case StepEvent():
                self._step(running, event)
            case EvalEvent():
                self._evaluated(running, event)
            case TrialEnded():
                self._end(running, event, trainer)

    def _begin(self, running: Running, event: TrialBegan) -> None:
        running.counts = adapter.counts(event.attached)
        work = self._workload(running.spec)
        running.run.params(running.spec, running.claimed.params)
        running.run.dataset(work.data, running.spec)
        running.log.info("%d steps, %s, data %s", event.total_steps, running.counts, work.data.fingerprint[:12])
        for note in (*work.data.notes, *work.task.notes):
            running.log.info("%s", note)

    def _step(self, running: Running, event: StepEvent) -> None:
        running.tokens += event.tokens
        if event.step % running.spec.tracking.log_every == 0 or event.step == event.total_steps:
            values = {
                "train_loss": event.loss,
                "learning_rate": event.learning_rate,
                "grad_norm": event.grad_norm,
                "tokens_per_s": running.tokens / event.train_s,
            }
            running.run.metrics(event.step, values)
        self.display.step(event.number, event.step, event.total_steps, event.loss)

    def _evaluated(self, running: Running, event: EvalEvent) -> None:
        running.last = event
        primary = self.study.meta.metric
        running.run.metrics(event.step, {"epoch": event.epoch} | {f"eval_{k}": v for k, v in event.metrics.items()})
        self.study.report(event.number, event.step, event.metrics[primary])
        running.log.info("step %d: %s", event.step, event.metrics)
        first = {primary: event.metrics[primary]}
        self.display.evaluated(event.number, event.step, first | event.metrics)

    def _end(self, running: Running, event: TrialEnded, trainer: Engine) -> None:
        """Save the adapter, load it again, write result.json and tell the study."""
        result: dict[str, Any] = {"state": event.state, "reason": event.reason, "steps": event.step}
        primary = self.study.meta.metric
        if running.last is not None:
            work = self._workload(running.spec)
            result["metric"] = {"name": primary, "value": running.last.metrics[primary], "maximize": maximize(primary)}
            result["metrics"] = running.last.metrics
            result["baseline"] = work.task.baseline(work.data, "eval")
            self._write_examples(running, work)
        folder = running.folder / "adapter"
        result["adapter_mb"] = adapter.save(event.attached, folder)
        if running.spec.tracking.reload_check and event.state == "COMPLETE":
            result["reload"] = self._reload(running, folder, trainer)
        assert running.counts is not None
        counts = running.counts
        result["params"] = asdict(counts) | {"trainable": counts.trainable}
        result["params"]["trainable_pct"] = 100 * counts.trainable / counts.total
        result |= {
            "train_s": event.train_s,
            "eval_s": event.eval_s,
            "tokens_per_s": running.tokens / event.train_s if event.train_s else 0.0,
            "peak_gib": peak_gib(trainer.device),
            "data_fingerprint": self._workload(running.spec).data.fingerprint,
        }
        self._finish(running, result)

    def _write_examples(self, running: Running, work: group.Workload) -> None:
        """Write a few rows of the eval split and what the model answers into examples.txt."""
        assert running.last is not None
        records = work.data.splits["eval"]
        first = {p["row"]: p for p in reversed(running.last.predictions)}
        lines = []
        for row in sorted(first)[:SHOWN_EXAMPLES]:
            record = "\n".join(f"{k}: {str(v)[:500]}" for k, v in records[row].items())
            lines.append(f"{record}\nanswer: {work.task.readable(records[row], first[row])}\n")
        (running.folder / "examples.txt").write_text("\n".join(lines), encoding="utf8")

    def _reload(self, running: Running, folder: Path, trainer: Engine) -> dict[str, Any]:
        """Evaluate the saved adapter with plain peft on a base loaded afresh, and compare."""
        assert running.last is not None
        began = time.perf_counter()
        spec, task = running.spec, trainer.task
        fresh = model.load(spec.model, spec.train, task, self._workload(spec).tokenizer)
        reloaded = adapter.reload(folder, fresh, spec.lora, spec.task_type).base_model.model
        predictions = engine.predict(reloaded, task, trainer.prepared.eval, spec.train, trainer.prepared.pad_id)
        metrics = task.metrics(predictions)
        primary = self.study.meta.metric
        before = running.last.metrics
        gap = abs(metrics["loss"] - before["loss"]) / max(1e-12, abs(before["loss"]))
        outcome = {
            "metric": metrics[primary],
            "difference": metrics[primary] - before[primary],
            "loss_relative_difference": gap,
            "same": gap <= RELOAD_TOLERANCE,
            "seconds": time.perf_counter() - began,
        }
        if not outcome["same"]:
            running.log.error("the saved adapter is not the trained one: %s", outcome)
            self.display.say(
                f"trial={running.number} WARNING: the saved adapter scores differently when loaded: {outcome}"
            )
        return outcome

    def _fail(self, running: Running, error: str) -> None:
        running.log.error("%s", error)
        last = error.strip().splitlines()[-1]
        self._finish(running, {"state": "FAIL", "reason": last, "traceback": error})

    def _finish(self, running: Running, result: dict[str, Any]) -> None:
        """Write result.json, end the MLflow run, tell the study; in this order, so that what is told is there."""
        result = {
            "number": running.number,
            "overrides": list(running.spec.overrides),
            "rerun": provenance.rerun_line(running.spec),
            "params_swept": running.claimed.params,
            **result,
            "wall_s": time.perf_counter() - running.began,
        }
        (running.folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf8")
        self._track_end(running, result)
        value = result["metric"]["value"] if "metric" in result and result["state"] == "COMPLETE" else None
        state = result["state"] if value is None or math.isfinite(value) else "PRUNED"
        self.study.tell(running.number, state, value if state == "COMPLETE" else None, {"reason": result["reason"]})
        shown = f"{result['metric']['name']}={result['metric']['value']:.4f} " if "metric" in result else ""
        detail = f"{shown}train_s={result.get('train_s', 0.0):.1f}"
        self.display.end(running.number, state, f"{detail} reason={result['reason']!r}" if result["reason"] else detail)
        running.log.info("%s %s", state, result["reason"])
        for handler in list(running.log.handlers):
            handler.close()
            running.log.removeHandler(handler)
        self._running.pop(running.number, None)

    def _track_end(self, running: Running, result: Mapping[str, Any]) -> None:
        run = running.run
        run.tag("state", result["state"])
        if result["reason"]:
            run.tag("reason", result["reason"][:500])
        if "params" in result:
            values = {f"params_{k}": v for k, v in result["params"].items()}
            values |= {k: result[k] for k in ("adapter_mb", "train_s", "eval_s", "peak_gib", "wall_s")}
            run.metrics(result["steps"], values | result.get("baseline", {}))
            run.artifact(running.folder / "adapter", "adapter")
        for name in ("config.yaml", "result.json", "log.txt"):
            run.artifact(running.folder / name)
        run.close("FAILED" if result["state"] == "FAIL" else "FINISHED")


def score_winner(study: Study, loaded: Mapping[str, group.Workload]) -> dict[str, float]:
    """Return the best trial's metrics on the test split, which is read here and nowhere else; {} without a winner."""
    best = study.best()
    if best is None:
        return {}
    spec = compose.compose_trial(best.user_attrs["overrides"])
    work = loaded.get(group.key(spec)) or group.workload(spec)
    base = model.load(spec.model, spec.train, work.task, work.tokenizer)
    folder = study.trial_folder(best.number)
    adapted = adapter.reload(folder / "adapter", base, spec.lora, spec.task_type).base_model.model
    found = engine.predict(adapted, work.task, work.examples["test"], spec.train, work.tokenizer.pad_token_id)
    scores = work.task.metrics(found) | work.task.baseline(work.data, "test")
    path = folder / "result.json"
    result = json.loads(path.read_text(encoding="utf8"))
    path.write_text(json.dumps(result | {"test": scores}, indent=1), encoding="utf8")
    return scores


def peak_gib(device: torch.device) -> float:
    """Return the highest memory use so far in GiB: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
