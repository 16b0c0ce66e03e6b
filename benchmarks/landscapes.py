"""Invented learning curves: a family of landscapes as published LoRA results have them, for any number of data sets.

They show what a method makes of such landscapes, not what real data are like: recorded curves (surrogate.py) do that.
Each landscape draws its own optimum: how far the best rate lies from train.learning_rate=auto, how fast scores fall off
on both sides of it (faster above: runs diverge), what modules, rank, dropout and the start are worth, how fast a run
learns, and how much seeds differ. Rates count most, then modules, rank, dropout and the start (docs/lora.md).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from surrogate import INITS, MODULES, Array, Curve, lora_spec

from lorasweep.training import learning_rate

RULE = 6.5e-4
"""What train.learning_rate=auto comes to at lora_alpha=32."""
TOTAL = 100


class Landscape:
    """One data set; it answers as a Surrogate does."""

    total = TOTAL
    metric = "accuracy"
    rule = RULE

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng([seed, 22])
        self.name = f"landscape {seed}"
        self.steps = np.linspace(0.05, 1.0, 20) * TOTAL
        self._top = random.uniform(0.5, 0.9)
        self._best_rate = random.normal(0.4, 0.7)
        """Logarithm of the best multiple of the rule."""
        self._widths = random.uniform(1.0, 2.0), random.uniform(0.5, 1.0)
        """Below and above it, likewise."""
        self._modules = dict(zip(MODULES, [*random.uniform(-0.12, 0.0, 3), 0.0], strict=True))
        self._inits = dict(zip(INITS, [0.0, *random.uniform(-0.03, 0.02, 4)], strict=True))
        self._rank = random.uniform(0.0, 0.02)
        """For each doubling beyond 4, up to 64."""
        self._dropout = random.uniform(0.0, 0.1), random.uniform(0.1, 0.5)
        """The best one, and the loss for each unit away from it."""
        self._speed = random.uniform(1.0, 5.0)
        self._seed_sd = random.uniform(0.01, 0.025)

    def rate(self, setting: Mapping[str, Any]) -> float:
        given = setting.get("train.learning_rate", "auto")
        lora = lora_spec(setting)
        rule = RULE * lora.init.rate / learning_rate.relative_scale(lora)
        return rule * float(setting.get("train.lr_multiple", 1.0)) if given == "auto" else float(given)

    def _off(self, setting: Mapping[str, Any]) -> float:
        """Return how far a setting's rate lies from the best one, in widths."""
        lora = lora_spec(setting)
        off = math.log(self.rate(setting) / RULE / lora.init.rate * learning_rate.relative_scale(lora))
        off -= self._best_rate
        return off / self._widths[off > 0]

    def means(self, settings: Sequence[Mapping[str, Any]]) -> Array:
        """Return each setting's test score, as a row of one, last like a Surrogate's."""
        return np.array([[self._test(s)] for s in settings])

    def _test(self, setting: Mapping[str, Any]) -> float:
        lora = lora_spec(setting)
        best, slope = self._dropout
        found = self._modules[str(lora.target_modules)] + self._inits[str(lora.init_lora_weights).lower()]
        found += self._rank * (min(6.0, math.log2(lora.r)) - 6.0) - slope * abs(lora.lora_dropout - best)
        return float(np.clip((self._top + found) * math.exp(-(self._off(setting) ** 2) / 2), 0.01, 1.0))

    def curve(self, setting: Mapping[str, Any], seed: Sequence[int]) -> Curve:
        """Return what a run of a setting shows; equal seeds show equal noise."""
        random = np.random.default_rng([*seed, 23])
        end = self._test(setting)
        speed = self._speed * math.exp(0.3 * np.clip(self._off(setting), -2.0, 1.0))
        values = end * (1 - np.exp(-speed * self.steps / TOTAL)) / (1 - math.exp(-speed))
        noise = self._seed_sd * (random.normal() + 0.5 * random.normal(size=len(self.steps)))
        return Curve(self.steps, np.clip(values + noise * math.sqrt(4 * end * (1 - end) + 0.05), 0.0, 1.0), end)
