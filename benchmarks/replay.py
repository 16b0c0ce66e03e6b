"""How good the setting is that a search chooses: samplers and pruners replayed on recorded curves, in virtual time.

    python benchmarks/replay.py score [--seeds 20] [--budgets 6 12 24] [--methods ours ...]     Markdown tables
    python benchmarks/replay.py rungs          what early scores tell of final ones, at each recorded step
    python benchmarks/replay.py settings       what the curves say of rates, ranks, scales, modules and starts
    python benchmarks/replay.py quality        how well the surrogate predicts settings that it has not seen

Regret: the best held-out metric that the spaces have by the surrogate, less that of the chosen setting, in points.
Two budgets: a number of trials; and the device time that as many whole trials take, in which a method that prunes may
begin more. `to margin`: device time, in whole trials, after which the chosen setting was within one point of the best
for good; the median over seeds of studies with the largest budget.
"""

import argparse
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
from landscapes import Landscape
from methods import BohbSampler, Listed, Optuna, Ours, RayAsha, chunked, settings_of
from scipy.stats import qmc, spearmanr
from simulated import LOOKS, Curves, Method, Result, Simulation, pass_time
from surrogate import INITS, MODULES, surrogates

from lorasweep.config import compose
from lorasweep.config.spec import SearchSpec
from lorasweep.runner.request import Request
from lorasweep.search import choice
from lorasweep.search.dimension import Dimension
from lorasweep.search.space import Space, read
from lorasweep.study.meta import search_spec

BUDGETS = (6, 12, 24, 60, 200)
PLACES = ((1, 1), (8, 1), (1, 2), (8, 8))
"""Slots and workers."""
MORE = 4
"""So many times the budget's trials may begin within the device time of the budget."""
MARGIN = 0.01
POOL = 4096
"""Points of the space among which the best is looked for."""
WIDE, NARROW = "lora_search", "recipes_24"
RECIPE = "lora.r=16 lora.target_modules=all-linear lora.lora_alpha=32 train.learning_rate=auto train.lr_multiple="
RATES = (1, 3, 0.33)
"""Multiples of the rule that a person tries at one good recipe."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file's space, its fixed settings in it, and how it is searched."""

    name: str
    space: Space
    search: SearchSpec


@cache
def sweep(name: str, *words: str) -> Sweep:
    request = Request.of(list(words), name)
    space, problems = read(request.overrides, request.space)
    assert not problems, problems
    return Sweep(name, space, search_spec(compose.settings(space.fixed)["search"]))


@dataclass(frozen=True)
class Setup:
    """One cell of the score: a study to be run by each method."""

    curves: Curves
    sweep: Sweep
    budget: int
    slots: int
    workers: int
    seed: int
    trials: int
    """That may begin."""


Make = Callable[[Setup], Method]


def _optuna(sampler: Callable[[Setup], Any], pruner: Callable[[Setup], Any]) -> Make:
    return lambda s: Optuna(s.sweep.space, s.trials, sampler(s), pruner(s))


def _random(s: Setup) -> Any:
    return optuna.samplers.RandomSampler(seed=s.seed)


def _tpe(s: Setup) -> Any:
    return optuna.samplers.TPESampler(seed=s.seed)


def _never(s: Setup) -> Any:
    return optuna.pruners.NopPruner()


def _hyperband(s: Setup) -> Any:
    return optuna.pruners.HyperbandPruner(min_resource=s.curves.total // LOOKS, max_resource=s.curves.total)


def _values(d: Dimension) -> list[Any]:
    """Return the values that a person writes into a grid: choices, or three of a range."""
    if d.names:
        return list(d.names)
    inner = [0.25, 0.5, 0.75]
    found = [d.low * (d.high / d.low) ** x if d.log else d.low + x * (d.high - d.low) for x in inner]
    return [d.snap(round(v) if d.whole else v) for v in found]


def _shuffled_grid(s: Setup) -> Method:
    space, random, settings = s.sweep.space, np.random.default_rng(s.seed), []
    for _ in range(s.trials):
        point: dict[str, Any] = {}
        for d in space.dimensions:
            values = _values(d)
            if space.applies(d, point):
                point[d.key] = values[random.integers(len(values))]
        settings.append(settings_of(space.line(point)))
    return Listed(settings)


def _three_rates(s: Setup) -> Method:
    """A grid of three rates at one good recipe."""
    return Listed([settings_of(f"{RECIPE}{rate}".split()) for rate in RATES])


def ours(**changed: Any) -> Make:
    """Return lorasweep's own study with other search settings."""

    def make(s: Setup) -> Method:
        asked = replace(s.sweep.search, trials=s.budget, seed=s.seed, workers=s.workers, **changed)
        search = choice.settled(asked, s.sweep.space)
        return Ours(s.sweep.space, replace(search, trials=s.trials), s.curves.total)

    return make


ANCHORS: dict[str, Make] = {
    "random": _optuna(_random, _never),
    "TPE + median": _optuna(_tpe, lambda s: optuna.pruners.MedianPruner()),
    "TPE + Hyperband": _optuna(_tpe, _hyperband),
    "GP": _optuna(lambda s: optuna.samplers.GPSampler(seed=s.seed), _never),
    "CMA-ES": _optuna(lambda s: optuna.samplers.CmaEsSampler(seed=s.seed), _never),
    "random + Ray's ASHA": _optuna(_random, lambda s: RayAsha(s.curves.total, LOOKS)),
    "BOHB": _optuna(lambda s: BohbSampler(s.seed, len(s.sweep.space.dimensions)), _hyperband),
    "shuffled grid": _shuffled_grid,
    "three rates": _three_rates,
}
CHUNKS = "RapidFire's chunks"


# --- running ---------------------------------------------------------------------------------------------------------


def reference_time(total: int, trials: int, slots: int, workers: int) -> float:
    """Return the device time of a number of whole trials."""
    return workers * pass_time(trials, slots, workers, total)


@dataclass(frozen=True)
class Score:
    regret: float
    """In points."""
    device: float
    """Device time in whole trials alone on the device."""
    to_margin: float


@cache
def best_of(curves: Curves) -> float:
    """Return the best held-out metric of the spaces."""
    found = []
    for name in (WIDE, NARROW):
        space = sweep(name).space
        points = qmc.Sobol(len(space.dimensions), scramble=True, rng=0).random(POOL)
        found.append(curves.means([settings_of(_line(space, p)) for p in points])[:, -1].max())
    return float(max(found))


def _line(space: Space, point: Sequence[float]) -> list[str]:
    found: dict[str, Any] = {}
    for d, x in zip(space.dimensions, point, strict=True):
        if not space.applies(d, found):
            continue
        if d.names:
            found[d.key] = d.names[min(int(x * len(d.names)), len(d.names) - 1)]
        else:
            value = d.low * (d.high / d.low) ** x if d.log else d.low + x * (d.high - d.low)
            found[d.key] = d.snap(round(value) if d.whole else value)
    return space.line(found)


def run(setup: Setup, make: Make | None, until: float = math.inf) -> Result:
    if make is None:
        random = Optuna(setup.sweep.space, setup.budget, _random(setup), _never(setup))
        settings = [asked[1] for _ in range(setup.budget) if (asked := random.ask(0)) is not None]
        return chunked(setup.curves, settings, setup.slots, setup.workers, setup.seed)
    simulation = Simulation(setup.curves, make(setup), slots=setup.slots, workers=setup.workers, seed=setup.seed)
    return simulation.run(until)


@dataclass(frozen=True)
class Cell:
    """One cell of the score's table."""

    curves: Curves
    budget: int
    slots: int
    workers: int
    in_time: bool
    """Whether the budget is the device time of whole trials, or a number of trials."""

    def score(self, make: Make | None, seed: int, within: Sweep) -> Score:
        curves, best = self.curves, best_of(self.curves)
        limit = reference_time(curves.total, self.budget, self.slots, self.workers)
        trials = self.budget * MORE if self.in_time else self.budget
        setup = Setup(curves, within, self.budget, self.slots, self.workers, seed, trials)
        result = run(setup, make, limit if self.in_time else math.inf)
        test = result.at_device(limit) if self.in_time else result.points[-1].test
        test = result.points[0].test if test is None else test
        device = min(result.points[-1].device, limit) if self.in_time else result.points[-1].device
        return Score(100 * (best - test), device / curves.total, result.time_to(best - MARGIN) / curves.total)


def interval(values: Sequence[float]) -> str:
    error = 1.96 * float(np.std(values)) / math.sqrt(len(values))
    return f"{np.mean(values):.2f} ± {error:.2f}"


@dataclass(frozen=True)
class Entrant:
    make: Make | None
    """None is RapidFire's rule, which is no queue."""
    within: str = WIDE


def entrants() -> dict[str, Entrant]:
    out = {name: Entrant(make) for name, make in ANCHORS.items()}
    out[CHUNKS] = Entrant(None)
    out["ours without recipes"] = Entrant(ours(enqueue=None))
    out["ours"] = Entrant(ours())
    out["ours, recipes_24"] = Entrant(ours(), NARROW)
    return out


# --- tables ----------------------------------------------------------------------------------------------------------


def score(given: argparse.Namespace) -> None:
    """Print a table for each budget's meaning and place: methods by budgets, mean regret over data sets and seeds."""
    found = [Landscape(i) for i in range(given.landscapes)] or surrogates(Path(given.folder))
    chosen = {n: e for n, e in entrants().items() if not given.methods or any(m in n for m in given.methods)}
    kind = "invented" if given.landscapes else "recorded"
    lines = [f"{len(found)} {kind} data sets, {given.seeds} seeds each, commit {commit()}."]
    for in_time, (slots, workers) in itertools.product(given.in_time, given.places):
        what = "device time of so many whole trials" if in_time else "so many trials"
        lines += ["", f"{slots} slots, {workers} workers; budget: {what}:", ""]
        lines += ["| method | " + " | ".join(map(str, given.budgets)) + " | mean | to margin |"]
        lines += ["|---|" + "--:|" * (len(given.budgets) + 2)]
        for name, entrant in chosen.items():
            cells = [Cell(c, b, slots, workers, bool(in_time)) for b in given.budgets for c in found]
            lines.append(row(name, entrant, cells, given))
            sys.stderr.write(lines[-1] + "\n")
    print("\n".join(lines))
    if given.into:
        write(Path(given.into), f"Searches replayed on {kind} curves", lines)


def row(name: str, entrant: Entrant, cells: Sequence[Cell], given: argparse.Namespace) -> str:
    """Return a method's line: mean regret and device time by budget, and what the largest budget has for the margin."""
    within, shown, means, to_margin = sweep(entrant.within), [], [], [math.inf]
    for budget in given.budgets:
        own = itertools.product([c for c in cells if c.budget == budget], range(given.seeds))
        got = [cell.score(entrant.make, seed, within) for cell, seed in own]
        means.append(float(np.mean([g.regret for g in got])))
        shown.append(f"{interval([g.regret for g in got])} ({np.mean([g.device for g in got]):.0f})")
        to_margin = [g.to_margin for g in got]
    return f"| {name} | {' | '.join(shown)} | {np.mean(means):.2f} | {np.median(to_margin):.0f} |"


def write(path: Path, heading: str, lines: Sequence[str]) -> None:
    """Put the lines under a heading of a Markdown file, in the place of what is there; a new one comes last."""
    before, there, rest = path.read_text().partition(f"## {heading}\n")
    after = rest.partition("\n## ")
    text = "\n".join([f"## {heading}", "", __doc__.split("\n\n")[2].strip() if __doc__ else "", "", *lines, ""])
    following = f"\n## {after[2]}" if there and after[1] else ""
    path.write_text(before.rstrip("\n") + "\n\n" + text + following)


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def rungs(given: argparse.Namespace) -> None:
    print("| data | of a run | " + " | ".join(HEADS) + " |\n|---|--:|" + "--:|" * len(HEADS))
    for curves in surrogates(Path(given.folder)):
        first = [i for i, r in enumerate(curves.runs) if r["seed"] == 0]
        shown_NE = curves.shown_NE[first]
        test, good = shown_NE[:, -1], shown_NE[:, -1] >= np.median(shown_NE[:, -1])
        for place, step in enumerate(curves.steps):
            early = shown_NE[:, place]
            quarter = early >= np.quantile(early, 0.75)
            lost = 100 * (test.max() - test[quarter].max())
            both = spearmanr(early, test)[0], spearmanr(early[good], test[good])[0]
            print(f"| {curves.name} | {step / curves.total:.2f} | {both[0]:.2f} | {both[1]:.2f} | {lost:.1f} |")


HEADS = ("rank correlation with the test score", "among the better half", "best lost by keeping the first quarter")


def settings(given: argparse.Namespace) -> None:
    """Print what the surrogate has for the best rate, and what is left of the best, setting by setting."""
    multiples = np.exp(np.linspace(math.log(1 / 16), math.log(16), 65))
    for curves in surrogates(Path(given.folder)):
        print(f"\n{curves.name}: train.learning_rate=auto is {curves.rule:.2g} at lora_alpha=32\n")
        print("| setting | best multiple of auto | its rate | test there | test at auto |\n|---|--:|--:|--:|--:|")
        for text in SETTINGS:
            own = settings_of(text.split())
            means = curves.means([own | {"train.lr_multiple": float(m)} for m in multiples])[:, -1]
            at, auto = int(means.argmax()), curves.mean(own)[-1]
            rate = curves.rate(own | {"train.lr_multiple": multiples[at]})
            print(f"| {text} | {multiples[at]:.2f} | {rate:.1e} | {means[at]:.3f} | {auto:.3f} |")


SETTINGS = [
    *(f"lora.r={r} lora.lora_alpha={a}" for r, a in itertools.product((4, 16, 64, 128), (8, 16, 32, 64))),
    *(f"lora.r=16 lora.lora_alpha=32 lora.target_modules={m}" for m in MODULES),
    *(f"lora.r=16 lora.lora_alpha=32 lora.init_lora_weights={i}" for i in INITS),
    *(f"lora.r=16 lora.lora_alpha=32 lora.lora_dropout={d}" for d in (0.1, 0.2, 0.3, 0.5)),
    "lora.r=16 lora.lora_alpha=32 lora.use_rslora=true",
]


def quality(given: argparse.Namespace) -> None:
    rows = {curves.name: curves.quality() for curves in surrogates(Path(given.folder))}
    heads = list(next(iter(rows.values())))
    print("| data | " + " | ".join(heads) + " |\n|---|" + "--:|" * len(heads))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[h]:.3g}" for h in heads) + " |")


PARTS = {part.__name__: part for part in (score, rungs, settings, quality)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--folder", default=str(Path(__file__).resolve().parent / "curves"))
    parser.add_argument("--landscapes", type=int, default=0, help="score on so many invented data sets instead")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--methods", nargs="*", help="parts of their names")
    parser.add_argument("--places", nargs="+", default=PLACES, type=lambda t: tuple(map(int, t.split(","))))
    parser.add_argument(
        "--in-time", nargs="+", type=int, default=[1, 0], help="1: budgets of device time, 0: of trials"
    )
    parser.add_argument("--into", help="a Markdown file that takes the tables, e.g. benchmarks/RESULTS.md")
    given = parser.parse_args()
    PARTS[given.part](given)


if __name__ == "__main__":
    main()
