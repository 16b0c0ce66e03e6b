"""What a LoRA setting would have shown, by recorded curves (benchmarks/curves/*.jsonl, made by record_curves.py).

A few hundred settings in eight dimensions lie far apart: the nearest recorded one would answer for a large cell of the
space, in which no sampler could get any better. So a Gaussian process over the settings answers, one for all points of
the curve and the test score, with what it cannot explain as noise. Seeds add what repeated runs differed by. The test
score without noise is the truth that regret is counted from. `quality` says how well settings that it has not seen are
predicted.

Shapes: N recorded runs, F features, E evaluations of a run and the test score.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from lorasweep.config.spec import LoraSpec
from lorasweep.lora import inits  # noqa: F401  registers the initialisations
from lorasweep.training import learning_rate

Array = NDArray[np.float64]

FOLDER = Path(__file__).resolve().parent / "curves"
MODULES = ("qv", "attention", "mlp", "all-linear")
INITS = ("true", "gaussian", "pissa_niter_4", "olora", "eva")
LENGTH_BOUNDS = (0.2, 20.0)
FOLDS = 10
FEWEST_RUNS = 40
"""Of a data set, to say anything of settings between them."""


@dataclass(frozen=True)
class Curve:
    """What one run of a setting shows."""

    steps: Array
    values: Array
    """The metric on eval rows after these steps."""
    test: float
    """The setting's metric on held-out rows, without a run's noise."""

    def at(self, step: int) -> float:
        return float(np.interp(step, self.steps, self.values))


class Surrogate:
    """A data set's curves for any setting."""

    def __init__(self, path: Path) -> None:
        about, *runs = [json.loads(line) for line in path.read_text().splitlines()]
        self.name, self.metric, self.total = about["name"], about["metric"], about["steps"]
        self.runs = runs
        self.rule = float(np.median([_rule_rate(run) for run in runs if "train.lr_multiple" in run["setting"]]))
        """What train.learning_rate=auto comes to at lora_alpha=32."""
        self.steps = np.array(max((r["steps"] for r in runs), key=len), dtype=float)
        self.features_NF = np.array([self._features(r["setting"], r["rate"]) for r in runs])
        self.shown_NE = np.array([self._shown(r) for r in runs])
        self._mean_E, self._sd_E = self.shown_NE.mean(0), self.shown_NE.std(0) + 1e-9
        self._process = _fitted(self.features_NF, (self.shown_NE - self._mean_E) / self._sd_E)
        self._residuals = self._seed_residuals()
        self._answers: dict[bytes, Array] = {}

    def _shown(self, run: Mapping[str, Any]) -> list[float]:
        """Return a run's curve, its last value held where it diverged, and its test score."""
        values = run["eval"].get(self.metric, [0.0])
        return [*values, *[values[-1]] * (len(self.steps) - len(values)), run["test"][self.metric]]

    def _features(self, setting: Mapping[str, Any], rate: float) -> list[float]:
        """Return a setting as numbers of about one size: new heads learn at the rate itself, adapters by its ratio to
        the rule, which knows the scale and the start.
        """
        lora = lora_spec(setting)
        adapters = rate / (self.rule * lora.init.rate / learning_rate.relative_scale(lora))
        out = [math.log(rate / self.rule), math.log(adapters), math.log2(lora.r / 16) / 2, 4 * lora.lora_dropout]
        out += [float(lora.target_modules == name) for name in MODULES]
        return out + [float(str(lora.init_lora_weights).lower() == name) for name in INITS]

    def rate(self, setting: Mapping[str, Any]) -> float:
        """Return the peak learning rate that a setting comes to."""
        given = setting.get("train.learning_rate", "auto")
        if given != "auto":
            return float(given)
        lora = lora_spec(setting)
        scale = lora.init.rate / learning_rate.relative_scale(lora)
        return self.rule * scale * float(setting.get("train.lr_multiple", 1.0))

    def mean(self, setting: Mapping[str, Any]) -> Array:
        """Return what a setting shows on average: its curve and its test score."""
        return self.means([setting])[0]

    def means(self, settings: Sequence[Mapping[str, Any]]) -> Array:
        features = [np.array(self._features(s, self.rate(s))) for s in settings]
        keys = [f.tobytes() for f in features]
        new = {k: f for k, f in zip(keys, features, strict=True) if k not in self._answers}
        if new:
            found = self._process.predict(np.array(list(new.values()))) * self._sd_E + self._mean_E
            self._answers |= dict(zip(new, np.clip(found, 0.0, 1.0), strict=True))
        return np.array([self._answers[k] for k in keys])

    def curve(self, setting: Mapping[str, Any], seed: Sequence[int]) -> Curve:
        """Return what a run of a setting shows; equal seeds show equal noise."""
        mean_E = self.mean(setting)
        random = np.random.default_rng([*seed])
        noise_E = self._residuals[random.integers(len(self._residuals))] * random.choice([-1.0, 1.0])
        values = np.clip(mean_E[:-1] + noise_E * _spread(mean_E[:-1]), 0.0, 1.0)
        return Curve(self.steps, values, float(mean_E[-1]))

    def _seed_residuals(self) -> Array:
        """Return what single runs of one setting differ by from their mean, in units of a proportion's spread."""
        by_setting: dict[int, list[Array]] = {}
        for run, shown in zip(self.runs, self.shown_NE, strict=True):
            by_setting.setdefault(run["number"], []).append(shown[:-1])
        out = []
        for several in [s for s in by_setting.values() if len(s) > 1]:
            mean = np.mean(several, axis=0)
            if mean[-1] > self._mean_E[-2] / 2:  # one that has learned nothing says nothing of seeds
                out += [math.sqrt(len(several) / (len(several) - 1)) * (s - mean) / _spread(mean) for s in several]
        return np.array(out) if out else np.zeros((1, len(self.steps)))

    def quality(self) -> dict[str, float]:
        """Return how well the test scores of settings are predicted from the others, and what seeds differ by."""
        numbers = np.array([r["number"] for r in self.runs])
        found = np.zeros(len(self.runs))
        scaled = (self.shown_NE - self._mean_E) / self._sd_E
        for fold in range(FOLDS):
            out = numbers % FOLDS == fold
            if out.any():
                process = _fitted(self.features_NF[~out], scaled[~out], self._process.kernel_)
                found[out] = (process.predict(self.features_NF[out]) * self._sd_E + self._mean_E)[:, -1]
        truth = self.shown_NE[:, -1]
        good = truth > np.median(truth)
        return {
            "runs": len(self.runs),
            "settings": len(set(numbers)),
            "r": float(np.corrcoef(found, truth)[0, 1]),
            "rmse": float(np.sqrt(np.mean((found - truth) ** 2))),
            "rmse_better_half": float(np.sqrt(np.mean((found - truth)[good] ** 2))),
            "seed_sd_end": float(np.std(self._residuals[:, -1]) * 0.5),
        }


def _spread(mean: Array) -> Array:
    return np.sqrt(np.clip(mean * (1 - mean), 0.01, None))


def _fitted(features_NF: Array, targets_NE: Array, kernel: Any = None) -> GaussianProcessRegressor:
    """Fit a process; with a kernel, keep its parameters."""
    lengths = np.full(features_NF.shape[1], 2.0)
    new = ConstantKernel(1.0) * Matern(lengths, LENGTH_BOUNDS, nu=2.5) + WhiteKernel(0.05, (1e-3, 1.0))
    process = GaussianProcessRegressor(kernel or new, random_state=0, optimizer=None if kernel else "fmin_l_bfgs_b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return process.fit(features_NF, targets_NE)


@cache
def _lora_spec(settings: tuple[tuple[str, Any], ...]) -> LoraSpec:
    return LoraSpec(**dict(settings))


def lora_spec(setting: Mapping[str, Any]) -> LoraSpec:
    """Return the adapter's settings; what is not set has its default."""
    own = {k.removeprefix("lora."): v for k, v in setting.items() if k.startswith("lora.")}
    if own.get("init_lora_weights") == "true":
        own["init_lora_weights"] = True
    return _lora_spec(tuple(sorted(own.items())))


def _rule_rate(run: Mapping[str, Any]) -> float:
    lora = lora_spec(run["setting"])
    return run["rate"] / run["setting"]["train.lr_multiple"] / lora.init.rate * learning_rate.relative_scale(lora)


def surrogates(folder: Path = FOLDER) -> list[Surrogate]:
    """Return the surrogate of each recorded data set."""
    enough = [path for path in sorted(folder.glob("*.jsonl")) if len(path.read_text().splitlines()) > FEWEST_RUNS]
    if not enough:
        raise SystemExit(
            f"{folder}: no data set has {FEWEST_RUNS} recorded runs; go on with benchmarks/record_curves.py"
        )
    return [Surrogate(path) for path in enough]
