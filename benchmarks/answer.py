"""How often the answer errs, on simulated studies with a known truth, through the package's own answer and repeats.

    python benchmarks/answer.py [STUDIES]      a Markdown table, some minutes on one core

A study without training: trials, scores and repeats are drawn (tests/support/drawn.py).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
from support.drawn import Drawn, losses, right_or_wrong

from lorasweep.study import comparison, significance


def row(what: str, studies: int, value: float, wanted: str) -> None:
    print(f"| {what} | {studies} | {value:.3f} | {wanted} |", flush=True)


def false_claims(studies: int) -> None:
    for count in (3, 10, 24):
        rng = np.random.default_rng(count)
        wrong = sum(bool(Drawn(right_or_wrong(rng, [0.8] * count)).search_for(count).worse) for _ in range(studies))
        row(f"{count} equal trained models, 400 rows: some told apart", studies, wrong / studies, "0.05")
    for own_sd in (0.01, 0.022):
        rng, wrong = np.random.default_rng(1), 0
        for _ in range(studies):
            draw = right_or_wrong(rng, [0.8] * 10, own_sd=own_sd, common_sd=0.02)
            wrong += bool(Drawn(draw, repeats=3, repeat_top=3).search_for(10).worse)
        row(
            f"10 equal settings, seeds sd {own_sd}, repeats 3: some told apart",
            studies,
            wrong / studies,
            "at most 0.05",
        )


def power(studies: int) -> None:
    for gap in (0.01, 0.02, 0.05):
        for count in (2, 10):
            rng, seen = np.random.default_rng(7), 0
            for _ in range(studies):
                found = Drawn(right_or_wrong(rng, [0.8] + [0.8 - gap] * (count - 1))).search_for(count)
                seen += len([c for c in found.worse if c.number]) / (count - 1)
            row(f"{count} models, {gap:.2f} apart, 400 rows: share told apart", studies, seen / studies, "-")


def coverage(studies: int) -> None:
    for examples in (50, 200, 400, 2000):
        for share in (0.8, 0.95):
            rng, held = np.random.default_rng(examples), 0
            for _ in range(4 * studies):
                _, scores = right_or_wrong(rng, [share], examples=examples)(0, 0)
                held += significance.interval(scores).holds(share)
            row(f"interval of accuracy {share}, {examples} rows", 4 * studies, held / (4 * studies), "0.92 to 0.98")
    for examples in (400, 2000):
        rng, held = np.random.default_rng(3), 0
        for _ in range(studies):
            draw = right_or_wrong(rng, [0.8] * 10, own_sd=0.01, common_sd=0.01, examples=examples)
            held += Drawn(draw, repeats=3, repeat_top=3).search_for(10).best.interval.holds(0.8)
        row(f"interval of the winner's setting after repeats, {examples} rows", studies, held / studies, "0.93 to 0.97")


def choices(studies: int) -> None:
    rng, apart, cost = np.random.default_rng(3), 0, 0.0
    excess = [0.06, 0.03, 0.01, 0.005, 0.0]
    for _ in range(studies):
        found = Drawn(losses(rng, excess), metric="loss", maximize=False).search_for(5)
        apart += found.cheapest.alike is False
        cost += excess[found.cheapest.number]
    row("cheapest by loss: told apart from the best", studies, apart / studies, "under 0.05")
    row("cheapest by loss: mean true excess, nats (margin 0.01)", studies, cost / studies, "-")
    rng, raw, corrected = np.random.default_rng(4), 0.0, 0.0
    for _ in range(studies):
        found = Drawn(right_or_wrong(rng, [0.8] * 24)).search_for(24)
        raw, corrected = raw + found.best.value - 0.8, corrected + found.corrected - 0.8
    row("best of 24: eval accuracy above the truth", studies, raw / studies, "-")
    row("the same without the choice", studies, corrected / studies, "0")


def regret(studies: int) -> None:
    """One seed against repeats: how far the chosen setting is from the best one, in points."""
    for own_sd in (0.005, 0.01, 0.022):
        for repeats in (0, 1, 3):
            rng, lost, ran = np.random.default_rng(9), 0.0, 0
            for _ in range(studies):
                qualities = 0.8 - 0.03 * rng.exponential(1.0, 24)
                study = Drawn(right_or_wrong(rng, qualities, own_sd=own_sd, common_sd=own_sd), repeats=repeats)
                found = study.search_for(24)
                lost += 100 * (qualities.max() - qualities[found.best.number])
                ran += len(study.list) - 24
            what = f"regret in points, 24 settings, seeds sd {own_sd}, repeats {repeats} ({ran / studies:.1f} runs)"
            row(what, studies, lost / studies, "-")


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print(f"confidence level {comparison.LEVEL}\n\n| what | studies | found | wanted |\n|---|--:|--:|--:|")
    for part in (false_claims, power, coverage, choices, regret):
        part(count)
