"""A trial as its worker sees it while it runs: its folder, its log, its MLflow run and what it has shown so far."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasweep.config.spec import TrialSpec
from lorasweep.lora import adapter
from lorasweep.study import provenance
from lorasweep.study.meta import Claimed
from lorasweep.study.result import objective
from lorasweep.study.study import Study
from lorasweep.tracking.runs import TrialRun, start_trial
from lorasweep.training.events import EvalEvent

SUMMARY = ("reason", "steps", "train_s", "eval_s", "adapter_mb", "peak_gib", "never_begun")
"""Of a result, what the study's storage holds too."""

COSTS = (
    "adapter_mb",
    "train_s",
    "eval_s",
    "peak_gib",
    "worker_peak_gib",
    "packing_saved_s",
    "wall_s",
    "flops_per_s",
    "matmul_share",
    "energy_j",
)
"""Of a result, what MLflow holds as metrics, where it is known."""

UNJUDGED_S = 300.0
"""A trial's points wait so long for its first evaluation: MLflow compares runs by the metric that it has seen first."""


@dataclass
class Running:
    """A claimed trial."""

    study: Study
    claimed: Claimed
    spec: TrialSpec
    folder: Path
    name: str
    """Of its display line and its MLflow run."""
    began: float = field(default_factory=time.perf_counter)
    counts: adapter.Counts | None = None
    """None until the engine has begun it."""
    tokens: int = 0
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
        return self.claimed.number

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

    def costs(self, result: Mapping[str, Any]) -> None:
        """Log an ended trial's sizes and costs."""
        values = {f"params_{k}": v for k, v in result["params"].items()}
        values |= {k: result[k] for k in COSTS if result[k] is not None}
        self.track().metrics(result["steps"], values | result.get("baseline", {}))

    def end_run(self, result: Mapping[str, Any]) -> None:
        """End the run with what stands in result.json."""
        run = self.track(None)
        run.tag("state", result["state"])
        if result["reason"]:
            run.tag("reason", result["reason"][:500])
        if "params" in result and self.spec.tracking.save_adapters == "all":
            run.artifact(self.folder / "adapter", "adapter")
        for name in ("config.yaml", "result.json", "log.txt"):
            run.artifact(self.folder / name)
        run.close("FAILED" if result["state"] == "FAIL" else "FINISHED")

    # --- its result --------------------------------------------------------------------------------------------------

    def described(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Return a result with what tells which trial it is of."""
        return {
            "number": self.number,
            "overrides": list(self.spec.overrides),
            "rerun": provenance.rerun_line(self.spec),
            "params_swept": self.claimed.swept,
            **result,
            "wall_s": time.perf_counter() - self.began,
        }

    def told(self, result: Mapping[str, Any]) -> tuple[str, list[float] | None]:
        """Return the state and the values that the study is told; a pruned trial keeps its last primary metric."""
        value = result["metric"]["value"] if "metric" in result else math.nan
        more = self.study.search.objectives or []
        if result["state"] == "FAIL":
            return "FAIL", None
        if not math.isfinite(value):
            return "PRUNED", None
        if result["state"] == "PRUNED" and more:
            return "PRUNED", None
        return result["state"], [value, *(objective(result, name) for name in more)]

    def summary(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the study's storage keeps of a result."""
        found = {k: result[k] for k in SUMMARY if k in result}
        used = ("train_s", "eval_s") if "train_s" in result else ("wall_s",)
        found["device_s"] = sum(result.get(k, 0.0) for k in used)
        found["trainable"] = result.get("params", {}).get("trainable")
        return found
