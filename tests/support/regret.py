"""How far the chosen setting is from the best one, by the rule of repeats and by the former rule, on the same draws."""

import math
import statistics

import numpy as np
from scipy.stats import t
from support.drawn import Drawn, by_seed

SETTINGS = 24


def regrets(seed_sd: float, budget: int, studies: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points below the best setting, and repeats that ran, by the former rule and by today's, [N, 2] each.

    `budget` is search.repeats, of three settings; a seed moves a run by `seed_sd` points.
    """
    rng, lost, ran = np.random.default_rng([9, budget, int(10 * seed_sd)]), [], []
    for _ in range(studies):
        quality_K = -rng.exponential(3.0, SETTINGS)
        draw = by_seed(rng, quality_K, seed_sd)
        before, before_ran = former_choice(draw, budget)
        study = Drawn(draw, repeats=budget)
        study.repeat_all(SETTINGS)
        lost.append(quality_K.max() - quality_K[[before, study.best().number]])
        ran.append((before_ran, len(study.list) - SETTINGS))
    return np.array(lost), np.array(ran)


def former_choice(draw, budget: int, top: int = 3) -> tuple[int, int]:
    """Return the setting that 7e88fe4 chose, and how many repeats it ran.

    The best three of the search run again, once a round, until they cannot reach the best any more; the mean of the
    repeats alone decides.
    """
    runs = {k: [draw(k, 0)[0]] for k in range(SETTINGS)}
    live = sorted(runs, key=lambda k: -runs[k][0])[: top if budget else 1]
    for number in range(1, budget + 1):
        if number > 1:
            live = _in_reach({k: runs[k] for k in live})
        if len(live) == 1:
            break
        for k in live:
            runs[k].append(draw(k, number)[0])
    chosen = max(live, key=lambda k: statistics.fmean(runs[k][1:] or runs[k]))
    return chosen, sum(map(len, runs.values())) - SETTINGS


def _in_reach(runs: dict[int, list[float]]) -> list[int]:
    """Return the settings whose mean of repeats is below the best one's by no more than its interval."""
    mean = {k: statistics.fmean(values[1:]) for k, values in runs.items()}
    free = sum(len(values) - 1 for values in runs.values())
    error = math.sqrt(sum(np.var(values) * len(values) for values in runs.values()) / free)
    repeats = len(next(iter(runs.values()))) - 1
    far = float(t.ppf(0.975, free)) * error * math.sqrt(2 / repeats)
    return [k for k in runs if max(mean.values()) - mean[k] <= far]
