"""How often the answer errs, on simulated studies with a known truth, through the package's own functions.

    python benchmarks/answer.py [PART ...] [--studies 400]      Markdown rows; PART: claims, coverage, choices,
                                                                champion, effects, power, regret; without one, all

A study without training: trials, scores and repeats are drawn (tests/support/drawn.py, tests/support/populations.py).
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
from support import effects as drawn_effects
from support.drawn import Drawn, challenged, losses, right_or_wrong
from support.populations import POPULATIONS
from support.regret import regrets

from lorasweep.study import significance


def row(what: str, found: list[float] | list[bool], wanted: str) -> None:
    mean, error = float(np.mean(found)), float(np.std(found)) / math.sqrt(len(found))
    print(f"| {what} | {len(found)} | {mean:.3f} ± {error:.3f} | {wanted} |", flush=True)


def claims(studies: int) -> None:
    """Some trial is told apart where all are equally good."""
    for count in (3, 10, 24, 100):
        rng = np.random.default_rng(count)
        false = [bool(Drawn(right_or_wrong(rng, [0.8] * count)).search_for(count).worse) for _ in range(studies)]
        row(f"{count} equal trained models, 400 rows: some told apart", false, "0.05")
    for examples in (400, 2000):
        for count in (3, 10, 24, 100):
            rng, false, regretted = np.random.default_rng(count), [], []
            for _ in range(studies):
                draw = right_or_wrong(rng, [0.8] * count, own_sd=0.01, common_sd=0.02, examples=examples)
                found = Drawn(draw, repeats=3, repeat_top=3).search_for(count)
                false.append(bool(found.worse))
                regretted.append(found.best.interval.holds(0.8))
            row(
                f"{count} equal settings, models 1 point apart, {examples} rows, repeats=3: some told apart",
                false,
                "<= 0.05",
            )
            row("the same: interval of the winner's setting holds its mean", regretted, "-")


def power(studies: int) -> None:
    for examples in (400, 2000):
        for gap in (0.01, 0.02, 0.05):
            for count in (2, 10):
                rng, seen = np.random.default_rng(7), []
                for _ in range(studies):
                    draw = right_or_wrong(rng, [0.8] + [0.8 - gap] * (count - 1), examples=examples)
                    found = Drawn(draw).search_for(count)
                    seen.append(len([c for c in found.worse if c.number]) / (count - 1))
                row(
                    f"{count} models, one {100 * gap:.0f} points better, {examples} rows: worse ones told apart",
                    seen,
                    "-",
                )


def coverage(studies: int) -> None:
    for name, (draw, truth) in POPULATIONS.items():
        for examples in (50, 200, 400, 2000):
            rng, held = np.random.default_rng(examples), []
            for _ in range(math.ceil(studies / 50)):
                drawn = [draw(rng, examples) for _ in range(50)]
                significance.resample(drawn)
                held += [significance.interval(found).holds(truth) for found in drawn]
            row(f"interval: {name}, {examples} rows", held, "0.92 to 0.98")


def choices(studies: int) -> None:
    rng, apart, cost = np.random.default_rng(3), [], []
    excess = [0.06, 0.03, 0.01, 0.005, 0.0]
    for _ in range(studies):
        found = Drawn(losses(rng, excess), metric="loss", maximize=False).search_for(5)
        apart.append(found.cheapest.alike is False)
        cost.append(excess[found.cheapest.number])
    row("cheapest by loss: told apart from the best", apart, "< 0.05")
    row("cheapest by loss: true excess, nats (margin 0.01)", cost, "-")
    for examples in (400, 2000):
        rng, raw, corrected, tested = np.random.default_rng(4), [], [], []
        for _ in range(studies):
            truths = 0.8 + 0.01 * rng.standard_normal(24)
            found = Drawn(right_or_wrong(rng, truths, examples=examples)).search_for(24)
            truth = truths[found.best.number]
            raw.append(100 * (found.best.value - truth))
            corrected.append(100 * (found.corrected - truth))
            test = right_or_wrong(rng, [truth], examples=examples)(0, 0)[1]
            tested.append(significance.interval(test).holds(truth))
        row(f"best of 24, {examples} rows: eval accuracy above the truth, points", raw, "-")
        row(f"best of 24, {examples} rows: the same without the choice, points", corrected, "0")
        row(f"best of 24, {examples} rows: test interval holds the truth", tested, "0.93 to 0.97")


def champion(studies: int) -> None:
    """The best of 24 replaces one equal champion."""
    for examples in (400, 2000):
        for own_sd, seed_free in ((0.0, 0), (0.01, 0), (0.01, 8)):
            rng = np.random.default_rng(5)
            replaced = [challenged(rng, 24, own_sd, examples, seed_free) for _ in range(studies)]
            seeds = f"seeds {100 * own_sd:.0f} points{', known' if seed_free else ''}"
            what = f"best of 24 equal ones, {seeds}, {examples} rows: replaces the champion"
            row(what, replaced, "< 0.05")


def effects(studies: int) -> None:
    """Bars of a random search of 24 trials over learning rate, modules and dropout."""
    rng, held = np.random.default_rng(6), {key: [] for key in drawn_effects.KEYS}
    population = [drawn_effects.trial(p, drawn_effects.metric(p)) for p in drawn_effects.points(rng, 10_000)]
    for _ in range(studies):
        trials = drawn_effects.random_search(rng, 24)
        for key, found in held.items():
            found += drawn_effects.bars_hold(trials, population, key)
    for key, found in held.items():
        row(f"effects of a random search, 24 trials: bars of {key} hold the mean", found, "0.92 to 0.98")


def regret(studies: int) -> None:
    """How far the chosen setting is from the best of 24, in points: accuracies -Exp(3), 400 rows."""
    print("\n| `search.repeats`, of 3 | " + " | ".join(f"seeds sd {sd:g}: before, after" for sd in SEED_SDS) + " |")
    print("|---|" + "--:|" * len(SEED_SDS))
    for repeats in (1, 2, 3, 5):
        cells = []
        for seed_sd in SEED_SDS:
            lost_N2, ran_N2 = regrets(seed_sd, repeats, studies)
            (before, after), (ran_before, ran_after) = lost_N2.mean(0), ran_N2.mean(0)
            gained = lost_N2[:, 1] - lost_N2[:, 0]
            error = gained.std() / math.sqrt(studies)
            cells.append(
                f"{before:.3f} ({ran_before:.1f}), {after:.3f} ({ran_after:.1f}); {gained.mean():+.3f} ± {error:.3f}"
            )
        print(f"| {repeats} | {' | '.join(cells)} |", flush=True)


SEED_SDS = (0.5, 1.0, 2.2)
PARTS = {part.__name__: part for part in (claims, coverage, choices, champion, effects, power, regret)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    parser.add_argument("--studies", type=int, default=400)
    args = parser.parse_args()
    parts = args.parts or [*PARTS]
    if parts != [regret.__name__]:  # which has a table by itself
        print("| what | studies | found | wanted |\n|---|--:|--:|--:|")
    for name in parts:
        PARTS[name](args.studies)
