"""result.json: what a trial came to. Written once by the trial's worker, read by everybody else."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorasweep.config.measures import COSTS, MEASURES
from lorasweep.credentials import redact
from lorasweep.files import read_json, replace_file

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

T = TypeVar("T")

log = logging.getLogger(__name__)

RESULT = "result.json"

STORED = tuple(name for name, measure in MEASURES.items() if measure.in_storage)
"""Numbers that the study's storage keeps."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The metric that ranks a study's trials, at the evaluation that the trial keeps."""

    name: str
    """As in `metrics`."""
    value: float
    """It on the whole eval split."""
    maximize: bool
    """Whether more is better."""


@dataclass(frozen=True, kw_only=True)
class Params:
    """Numbers of parameters, as peft counts them; None where only `trainable` is known."""

    lora: int | None = None
    """In A and B."""
    bias: int | None = None
    """Biases of the base that train."""
    modules_to_save: int | None = None
    """In modules that train in full, such as a new head."""
    total: int | None = None
    """Base and adapter together."""
    trainable: int
    """All that train."""
    trainable_pct: float | None = None
    """Their share of the total, percent."""


@dataclass(frozen=True, kw_only=True)
class Reload:
    """The saved adapter, loaded again with plain peft onto a fresh base, against the trained one."""

    rows: int
    """Rows of the eval split that it was tried on."""
    metric: float | None
    """The metric that ranks the trials, on those rows; null where so few rows have none."""
    difference: float | None
    """That metric minus the trained adapter's on the same rows."""
    loss_relative_difference: float
    """Of the losses on those rows."""
    same: bool
    """Whether the losses agree within what rounding explains."""
    seconds: float
    """What the check took."""


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What a trial came to. Of the numbers null means: it could not be measured here."""

    number: int
    """Its number in the study."""
    state: str
    """COMPLETE, PRUNED or FAIL."""
    reason: str
    """Why it was pruned or failed."""
    overrides: list[str]
    """The strings it was made from."""
    params_swept: dict[str, Any]
    """The values of the keys that the study varies."""
    rerun: str = ""
    """The command that runs it again."""
    traceback: str = ""
    """Of a failed trial, where it failed."""
    never_begun: bool = False
    """It was pruned before it was loaded: it needs more than search.max_memory_gib."""
    metric: Metric | None = None
    """What ranks the study's trials, as of the evaluation that it keeps."""
    metrics: dict[str, float] | None = None
    """All metrics of that evaluation on the eval split."""
    kept_step: int | None = None
    """The optimiser step of that evaluation, which its adapter is of: the best one's, or with train.keep=last the last
    one's."""
    baseline: dict[str, float] | None = None
    """What trivial answers reach there."""
    test: dict[str, float] | None = None
    """Of the study's winner alone: metrics and trivial answers on the test split, read once, after choosing."""
    params: Params | None = None
    """Numbers of parameters, as peft counts them."""
    data_fingerprint: str = ""
    """Digest of the rows of all splits: trials that share it saw the same data."""
    eval_fingerprint: str = ""
    """Digest of the rows of the eval split: metrics of trials that share it can be compared."""
    test_fingerprint: str = ""
    """Digest of the rows of the test split, where this trial was scored on it."""
    reload: Reload | None = None
    """The saved adapter, loaded again with plain peft onto a fresh base, against the trained one."""
    steps: int | None = None
    """Optimiser steps it has taken."""
    learning_rate: float | None = None
    """The highest of its course: train.learning_rate, or what auto came to."""
    adapter_mb: float | None = None
    """Size of the saved adapter."""
    train_s: float | None = None
    """Its share of the seconds in which passes trained."""
    eval_s: float | None = None
    """Its share of the seconds of evaluation."""
    wall_s: float | None = None
    """From its claim to its end, with what ran beside it; what was before a resume counts too."""
    peak_gib: float | None = None
    """What it needs by itself, an estimate, whoever shares its passes."""
    worker_peak_gib: float | None = None
    """The highest use of its worker up to its end, measured: of the device, or of the process on a CPU."""
    prefix_saved_s: float | None = None
    """Seconds that were not computed again, for another pass had kept the frozen layers' output; an estimate."""
    packing_saved_s: float | None = None
    """Seconds of training that passes shared with other trials spared it, an estimate; null where both ways were not
    timed."""
    tokens_per_s: float | None = None
    """Of training."""
    flops_per_s: float | None = None
    """Of the linear layers while it trained."""
    matmul_share: float | None = None
    """flops_per_s against what large matrix products reach on this device."""
    energy_j: float | None = None
    """Its share of the training passes, evaluation left out; null where the driver does not tell."""

    @property
    def trainable(self) -> int | None:
        """Parameters that train, None before they were counted."""
        return self.params.trainable if self.params else None

    @property
    def device_s(self) -> float | None:
        """Seconds that it held a device: training and evaluation, or all its time where it failed on the way."""
        if self.train_s is None:
            return self.wall_s
        return self.train_s + (self.eval_s or 0.0)

    @property
    def costs(self) -> dict[str, float]:
        """Its costs by name, those that are known."""
        values = {name: getattr(self, name) for name in COSTS}
        return {name: float(value) for name, value in values.items() if value is not None}

    def objective(self, cost: str) -> float:
        """Return a cost for the sampler: infinity, the worst, where it is not known."""
        return self.costs.get(cost, math.inf)

    def stored(self) -> dict[str, Any]:
        """Return what the study's storage keeps."""
        values = {name: getattr(self, name) for name in STORED}
        known = {name: value for name, value in values.items() if value is not None}
        return {"reason": self.reason, **known} | ({"never_begun": True} if self.never_begun else {})

    def to_dict(self) -> dict[str, Any]:
        """Return what result.json holds: what is known; of a trial that has trained, unknown numbers too, as null."""
        values = asdict(self)
        trained = self.params is not None
        return {
            f.name: values[f.name]
            for f in fields(self)
            if values[f.name] != f.default or (trained and f.name in MEASURES)
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "TrialResult":
        """Return the result of a dict, whatever version of lorasweep wrote it."""
        parts = {"metric": Metric, "params": Params, "reload": Reload}
        known = {key: value for key, value in values.items() if value is not None}
        known |= {key: _fitting(part, known[key]) for key, part in parts.items() if key in known}
        # at first, a trial that failed before its point was drawn had none of these
        return _fitting(TrialResult, {"reason": "", "overrides": [], "params_swept": {}} | known)


def _fitting(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return a dataclass of the values that it has fields for."""
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    return cls(**{key: value for key, value in values.items() if key in names})


def write_result(folder: Path, result: TrialResult) -> None:
    """Write result.json whole or not at all."""
    replace_file(folder / RESULT, redact(json.dumps(result.to_dict(), indent=1)), durable=True)


def read_result(folder: Path) -> TrialResult | None:
    """Return what result.json holds; None where there is none or, with a warning, a damaged one."""
    path = folder / RESULT
    values = read_json(path)
    try:
        if values:
            return TrialResult.from_dict(values)
    except (TypeError, AttributeError, ValueError) as error:
        log.warning("%s cannot be read (%s); the queue keeps its main numbers", path, error)
        return None
    if values is None and path.exists():
        log.warning("%s cannot be read, it is no JSON; the queue keeps its main numbers", path)
    return None


def result_of(trial: "FrozenTrial", folder: Path) -> TrialResult:
    """Return what a trial of the queue came to so far.

    State and point are the queue's. The rest is result.json's; where this disk has none, what the queue keeps of it.
    """
    known = trial.user_attrs
    result = read_result(folder) or _from_storage(trial)
    return replace(
        result,
        number=trial.number,
        state=trial.state.name,
        reason=known.get("reason") or result.reason,
        overrides=result.overrides or list(known.get("overrides", [])),
        params_swept=dict(known.get("swept") or trial.params),
    )


def _from_storage(trial: "FrozenTrial") -> TrialResult:
    """Return what `TrialResult.stored` gave the storage; what is the queue's is left to `result_of`."""
    known = {name: trial.user_attrs[name] for name in STORED if name in trial.user_attrs}
    trainable, device_s = known.pop("trainable", None), known.pop("device_s", None)
    return TrialResult(
        number=trial.number,
        state=trial.state.name,
        reason="",
        overrides=[],
        params_swept={},
        never_begun="never_begun" in trial.user_attrs,
        params=None if trainable is None else Params(trainable=trainable),
        wall_s=None if "train_s" in known else device_s,  # all that device_s is of, where it failed on the way
        **known,
    )
