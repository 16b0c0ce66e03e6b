"""Which version of a registered model is its champion: a new one only where the test split shows it to be better.

Both adapters are compared on the same test examples, one by one. The eval split chose each of them, so it flatters both
and is not asked. It chose the seed with the setting: a winner of many is lucky in its seed, on any rows, and that luck
is taken off before it replaces another one.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from lorasweep.credentials import redact
from lorasweep.serving import winner
from lorasweep.study import answer, comparison, example_scores, repeats, significance
from lorasweep.study.belief import near_enough
from lorasweep.study.comparison import Rivals
from lorasweep.study.direction import upward
from lorasweep.study.significance import Spread
from lorasweep.study.study import Study
from lorasweep.tasks.metric import A_TOKEN, Parts

TAG = "lorasweep."
GUESS = 2.0
"""What a seed is taken to move a run by where no configuration ran with several: points, or hundredths of a loss. Small
encoders on a few hundred rows were seen to move by that; more data move less.
"""
STEPS = 1000
"""Of the integral over the best one's luck."""
STAYS = "the champion stays; set the alias yourself where you know better"


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good a version is; its tags in the registry hold this."""

    metric: str
    maximize: bool
    value: float
    """On the eval split, which chose it; nothing is compared by it."""
    margin: float
    """By how much a new version has to be shown to be better than the champion."""
    test: float | None = None
    """On the test split; None where that was not read."""
    test_rows: str = ""
    """Digest of the rows of the test split."""
    seed_error: float | None = None
    """Standard deviation of one run over seeds; None where too few configurations ran with several."""
    seed_free: float = 0
    """Its degrees of freedom."""
    chosen_among: int = 1
    """Configurations of which its study chose it."""
    folder: str = ""
    """Of the trial, on the machine that ran it."""

    @staticmethod
    def of(study: Study, number: int) -> "Score":
        meta, result = study.meta, winner.result(study, number)
        candidates = answer.answer(study).candidates
        ours = next(c for c in candidates if c.number == number)
        test = (result.test or {}).get(meta.metric)
        spread = significance.spread(map(repeats.by_seed, repeats.runs(study.trials()).values()))
        return Score(
            metric=meta.metric,
            maximize=meta.maximize,
            value=ours.value,
            margin=near_enough(study.search.margin, meta.bounds, ours.value if test is None else test),
            test=test,
            test_rows=result.test_fingerprint,
            seed_error=spread.error if spread else None,
            seed_free=spread.free if spread else 0,
            chosen_among=sum(c.is_comparable(ours) for c in candidates),
            folder=str(study.trial_folder(number)),
        )

    def tags(self) -> dict[str, str]:
        return {f"{TAG}{k}": redact(json.dumps(v)) for k, v in vars(self).items()}

    @staticmethod
    def from_tags(tags: dict[str, str]) -> "Score | None":
        """Return what a version's tags say, None for a version that lorasweep did not make."""
        known = [f.name for f in fields(Score) if f"{TAG}{f.name}" in tags]
        try:
            return Score(**{"margin": 0.0} | {name: json.loads(tags[f"{TAG}{name}"]) for name in known})
        except (TypeError, ValueError):
            return None

    @property
    def spread(self) -> Spread | None:
        return None if self.seed_error is None else Spread(self.seed_error, self.seed_free)

    def parts(self) -> Parts | None:
        """Return what each test example adds to the metric; None where the trial's folder is not here, or holds
        another trial by now.
        """
        found = example_scores.read(Path(self.folder), example_scores.TEST_NAME) if self.folder else None
        return found if found is not None and self.is_of(found) else None

    def is_of(self, found: Parts) -> bool:
        """Return whether test scores are those that this score was made of."""
        return self.test is not None and found.metric == self.metric and math.isclose(found.value, self.test)


def beats(ours: Score, mine: Parts | None, champion: Score | None, theirs: Parts | None) -> tuple[bool, str]:
    """Return whether a version is shown to be better than the champion by more than its margin, and why.

    `mine` and `theirs` are what each test example adds to the metric of either.
    """
    if champion is None:
        return False, f"the champion has no score of lorasweep's to compare with; {STAYS}"
    reason = _not_comparable(ours, mine, champion, theirs)
    if reason or mine is None or theirs is None:
        return False, f"{reason}; {STAYS}"
    seeds, luck = _seeds(ours, mine, champion), _luck(ours.chosen_among)
    rivals, off = _rivals(ours, mine, theirs, seeds, luck), luck.mean * seeds[0].error
    ahead, at_least = float(rivals.mean_K[0] - rivals.mean_K[1]), -comparison.worst_loss(rivals, 1, 0) - off
    better = at_least > ours.margin
    return better, (
        f"test {ours.metric} {mine.value:.4f}, the champion's {theirs.value:.4f} on the same {len(mine):,} test "
        f"examples; better by {ahead:.4f}, with other rows and seeds at least {at_least:.4f} (one-sided 95 %; "
        f"{_assumed(ours, champion, seeds[0].error, off)}), which is {'' if better else 'not '}more than "
        f"{ours.margin:.4f} (search.margin)"
    )


def _assumed(ours: Score, champion: Score, error: float, off: float) -> str:
    """Return what is taken to be known of seeds."""
    said = f"a seed moves a run by {error:.4f}"
    if ours.spread is None and champion.spread is None:
        said += ", a guess, for no configuration ran with several: search.repeats=3 measures it"
    if ours.chosen_among > 1:
        said += f"; {off:.4f} taken off as the luck of the best of {ours.chosen_among}"
    return said


def _not_comparable(ours: Score, mine: Parts | None, champion: Score, theirs: Parts | None) -> str:
    """Return why test examples tell nothing about which one is better; "" where they do."""
    if (ours.metric, ours.maximize) != (champion.metric, champion.maximize):
        return f"the champion is judged by {champion.metric}, this one by {ours.metric}"
    if ours.test is None or mine is None:
        return "the test split was not read for this one"
    if champion.test is None or theirs is None:
        return "the champion's answers on a test split are not there"
    if not ours.test_rows or ours.test_rows != champion.test_rows:
        return "the champion was tested on other rows"
    if significance.examples(mine) != significance.examples(theirs):
        return "the champion was tested on other rows of the same test split"
    if ours.metric in A_TOKEN and list(mine.second) != list(theirs.second):
        return f"{ours.metric} counts tokens, and the champion's tokenizer cuts the same text into others"
    if answer.too_few(mine):
        return f"{significance.units(mine)} test examples are too few"
    return ""


def _seeds(ours: Score, mine: Parts, champion: Score) -> tuple[Spread, Spread]:
    """Return how far a seed moves a run, of either; one that does not know takes the other's."""
    guess = Spread(GUESS * near_enough(None, mine.bounds, mine.value), math.inf)
    return ours.spread or champion.spread or guess, champion.spread or ours.spread or guess


@dataclass(frozen=True)
class Luck:
    """Of the seed of the best of many runs that are equally good, in standard deviations over seeds."""

    mean: float
    variance: float


def _luck(count: int) -> Luck:
    """Return mean and variance of the largest of `count` normal numbers."""
    from scipy.special import ndtri

    largest_S = ndtri(((np.arange(STEPS) + 0.5) / STEPS) ** (1 / count))
    return Luck(float(largest_S.mean()), float(largest_S.var()))


def _rivals(ours: Score, mine: Parts, theirs: Parts, seeds: tuple[Spread, Spread], luck: Luck) -> Rivals:
    """Return both as one run each, with the seeds' part of the error."""
    mean_K = upward(np.array([mine.value, theirs.value]), ours.maximize)
    significance.resample([mine, theirs])
    replicates_KR = upward(np.stack([significance.replicates(p) for p in (mine, theirs)]), ours.maximize)
    variance_K = np.array([s.error**2 for s in seeds]) * [luck.variance, 1.0]
    each = sum(v**2 / s.free for v, s in zip(variance_K, seeds, strict=True))
    free = variance_K.sum() ** 2 / each if each and seeds[0] is not seeds[1] else seeds[0].free  # Satterthwaite's
    independent = significance.independent(mine)
    return Rivals(mean_K, replicates_KR, np.diag(variance_K), max(1.0, float(free)), independent)
