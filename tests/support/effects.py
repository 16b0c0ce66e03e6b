"""Searches over a learning rate, target modules and dropout with a known metric: do the effects' bars hold the mean?"""

import math
import statistics
from types import SimpleNamespace

import numpy as np
import optuna

from lorasweep.report import study_data

MODULES = {"qv": -1.5, "attention": -0.5, "mlp": 0.0, "all-linear": 0.6}
KEYS = ("rate", "modules", "dropout")
NOISE = 0.01


def points(rng: np.random.Generator, count: int) -> list[dict]:
    rates = 10 ** rng.uniform(-5, -2.5, count)
    modules, dropouts = rng.choice(list(MODULES), count), rng.integers(5, size=count) / 10
    return [
        {"rate": float(rate), "modules": str(names), "dropout": float(dropout)}
        for rate, names, dropout in zip(rates, modules, dropouts, strict=True)
    ]


def metric(point: dict) -> float:
    off = math.log10(point["rate"]) + 3.5
    return (80 - (6 if off < 0 else 14) * off**2 + MODULES[point["modules"]] - 4 * point["dropout"] ** 2) / 100


def trial(point: dict, value: float) -> SimpleNamespace:
    return SimpleNamespace(point=point, value=value, state="COMPLETE")


def random_search(rng: np.random.Generator, count: int) -> list[SimpleNamespace]:
    return [trial(p, metric(p) + NOISE * rng.standard_normal()) for p in points(rng, count)]


def tpe_search(rng: np.random.Generator, count: int) -> list[SimpleNamespace]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=int(rng.integers(2**31)))
    study, found = optuna.create_study(direction="maximize", sampler=sampler), []
    for _ in range(count):
        asked = study.ask()
        point = {
            "rate": asked.suggest_float("rate", 1e-5, 10**-2.5, log=True),
            "modules": asked.suggest_categorical("modules", list(MODULES)),
            "dropout": asked.suggest_int("dropout", 0, 4) / 10,
        }
        found.append(trial(point, metric(point) + NOISE * rng.standard_normal()))
        study.tell(asked, found[-1].value)
    return found


def bars_hold(trials: list[SimpleNamespace], population: list[SimpleNamespace], key: str, *, sure=True) -> list[bool]:
    """Return for each bar of a parameter whether it holds the population's mean; [] where none has an interval."""
    values = sorted({t.point[key] for t in trials})
    numeric = key != "modules"
    axis = study_data.Axis(key=key, numeric=numeric, log=key == "rate", values=values)
    inside = [t for t in population if not numeric or values[0] <= t.point[key] <= values[-1]]
    places = sorted({study_data.place(axis, t.point[key], 8) for t in trials})
    truths: dict[int, list[float]] = {place: [] for place in places}
    for t in inside:
        if len(values) > 8 or t.point[key] in values:
            truths.setdefault(study_data.place(axis, t.point[key], 8), []).append(t.value)
    groups = zip(study_data.groups(trials, axis, sure=sure), places, strict=True)
    return [abs(g.mean - statistics.fmean(truths[p])) <= g.half for g, p in groups if g.half is not None]
