"""A trial as its worker sees it while it runs: its folder, its log, its MLflow run and what it has shown so far."""

import logging
import math
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasweep.config.measures import MEASURES
from lorasweep.config.spec import TrialSpec
from lorasweep.console import short
from lorasweep.lora import adapter
from lorasweep.search.dimension import Value
from lorasweep.study import provenance
from lorasweep.study.result import RESULT, TrialResult
from lorasweep.study.study import Study
from lorasweep.study.trial import Trial
from lorasweep.tracking import outbox
from lorasweep.tracking.runs import TrialRun, start_trial
from lorasweep.training.events import EvalEvent

MLFLOW = tuple(name for name, measure in MEASURES.items() if measure.in_mlflow)
"""Numbers of a result that MLflow holds as metrics, where they are known."""

UNJUDGED_S = 300.0
"""A trial's points wait so long for its first evaluation: MLflow compares runs by the metric that it has seen first."""


@dataclass
class Running:
    """A claimed trial."""

    study: Study
    trial: Trial
    folder: Path
    began: float = field(default_factory=time.perf_counter)
    counts: adapter.Counts | None = None
    """None until the engine has begun it."""
    tokens: int = 0
    peak_rate: float | None = None
    """The highest learning rate of its course."""
    flops: int = 0
    """A token's."""
    train_s: float | None = None
    """At its last step here."""
    offered: float = 0.0
    """FLOPs that the device's matmul could have done in its seconds of training here."""
    offered_s: float = 0.0
    """Those seconds."""
    step: int = 0
    total_steps: int = 0
    loss: float = math.nan
    last: EvalEvent | None = None
    saved: float = field(default_factory=time.monotonic)
    run: TrialRun | None = None

    def __post_init__(self) -> None:
        """Open log.txt in the trial's folder."""
        self.log = logging.getLogger(f"lorasweep.trial.{self.study.meta.name}.{self.number}")
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        handler = logging.FileHandler(self.folder / "log.txt", encoding="utf8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.log.addHandler(handler)

    @property
    def number(self) -> int:
        return self.trial.number

    @property
    def spec(self) -> TrialSpec:
        return self.trial.spec

    @cached_property
    def swept(self) -> dict[str, Value]:
        """What it has for the keys that vary."""
        return self.trial.swept(self.study.space)

    @property
    def name(self) -> str:
        """Of its display line and its MLflow run."""
        return " ".join(f"{k}={short(v)}" for k, v in self.swept.items()) or "default"

    def close(self) -> None:
        """Close log.txt."""
        for handler in list(self.log.handlers):
            handler.close()
            self.log.removeHandler(handler)

    # --- its MLflow run ----------------------------------------------------------------------------------------------

    def track(self, step: int | None = 0, evaluated: int | None = None) -> TrialRun:
        """Return the trial's run; the first call opens it, to go on after `step`, None after all that is there."""
        if self.run is None:
            meta = self.study.meta
            tags = {
                "study": meta.name,
                "trial": str(self.number),
                "kind": "trial",
                "state": "RUNNING",
                "commit": str(provenance.commit()),
            }
            title = f"{self.number} {self.name}"
            self.run = start_trial(self.folder, self.spec, meta.mlflow_parent, title, tags, step, evaluated)
        return self.run

    def covered(self, step: int) -> None:
        """Let MLflow have the points up to a step that a checkpoint holds."""
        if self.last is not None or time.perf_counter() - self.began > UNJUDGED_S:
            self.track().covered(step)

    def log_result(self, result: TrialResult) -> None:
        """Log the sizes and costs of an ended trial."""
        assert result.params is not None and result.steps is not None, "it has trained"
        values = {f"params_{k}": v for k, v in asdict(result.params).items()}
        values |= {name: getattr(result, name) for name in MLFLOW}
        values |= result.baseline or {}
        self.track().metrics(result.steps, {k: v for k, v in values.items() if v is not None})
        kept = result.metric is not None and self.last is not None and result.kept_step != self.last.step
        if kept and result.metric is not None:  # MLflow ranks runs by the value of the highest step
            self.track().metrics(result.steps + 1, {outbox.OBJECTIVE: result.metric.value})

    def end_run(self, result: TrialResult) -> None:
        """End the run with what stands in result.json."""
        run = self.track(None)
        run.tag("state", result.state)
        if result.reason:
            run.tag("reason", result.reason[:500])
        if result.params is not None and self.spec.tracking.save_adapters == "all":
            run.artifact(self.folder / "adapter", "adapter")
        for name in ("config.yaml", RESULT, "log.txt"):
            run.artifact(self.folder / name)
        run.close("FAILED" if result.state == "FAIL" else "FINISHED")

    # --- its result --------------------------------------------------------------------------------------------------

    def result(self, state: str, reason: str, **measured: Any) -> TrialResult:
        """Return the trial's result as of now; `measured` are further fields of it."""
        return TrialResult(
            number=self.number,
            state=state,
            reason=reason,
            overrides=list(self.spec.overrides),
            rerun=provenance.rerun_line(self.spec),
            params_swept=self.swept,
            wall_s=time.perf_counter() - self.began,
            **measured,
        )

    def told(self, result: TrialResult) -> tuple[str, list[float] | None]:
        """Return the state and the values for the study; a pruned trial keeps its last primary metric."""
        value = result.metric.value if result.metric else math.nan
        objectives = self.study.search.objectives or []
        if result.state == "FAIL":
            return "FAIL", None
        if not math.isfinite(value):
            return "PRUNED", None
        if result.state == "PRUNED" and objectives:
            return "PRUNED", None
        return result.state, [value, *(result.objective(name) for name in objectives)]
