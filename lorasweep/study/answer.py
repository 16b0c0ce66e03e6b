"""A study's answer: the best configuration, how sure that is, and what is nearly as good for less.

Without repeats it speaks of trained models: one run each, and another seed may order them otherwise. With repeats it
speaks of configurations, and compares those that ran with several seeds.

<study>/best.yaml   the best configuration, to run with: python -m lorasweep --sweep <study>/best.yaml
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import yaml
from optuna.trial import FrozenTrial, TrialState

from lorasweep import console
from lorasweep.config.measures import COSTS
from lorasweep.credentials import redact
from lorasweep.files import replace_file
from lorasweep.study import comparison, repeats, significance
from lorasweep.study.belief import near_enough
from lorasweep.study.comparison import Rivals
from lorasweep.study.direction import better, upward
from lorasweep.study.provenance import REGISTERS
from lorasweep.study.result import TrialResult, result_of
from lorasweep.study.significance import Interval
from lorasweep.study.study import Study
from lorasweep.tasks.metric import Parts

NOISE = {"train_s": 0.1, "peak_gib": 0.02}
"""Measured costs: shares by which two runs of the same work differ."""
BEST = "best.yaml"
Read = Callable[[int], Parts | None]
"""From a trial's number to what each eval example adds to its metric."""
FEWEST_ROWS, FEWEST_GROUPS = 30, 10
"""Eval examples, or groups of them where they belong together, below which nothing is compared."""


@dataclass(frozen=True)
class Tested:
    """The metric of a trial's adapter on the test split, which chose nothing."""

    number: int
    value: float
    interval: Interval | None
    """95 %, over the test examples; None: the trial left no answers to them."""


@dataclass(frozen=True)
class Gap:
    """How much worse than the best a candidate is; positive: the best is better."""

    value: float
    interval: Interval
    """95 %."""
    at_most: float
    """Upper end of the one-sided 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A complete configuration, with all its seeds."""

    result: TrialResult
    """Of its trial; of several seeds, of the first."""
    values: tuple[float, ...]
    """The primary metric of each run that is reported: of its repeats, or of all its runs where there are none."""
    value: float
    """Their mean."""
    searched: float
    """The primary metric of the search's own run."""
    repeated: bool
    """Whether it ran again with new seeds, which alone make `values`."""
    standard_error: float | None
    """Of `value`, over eval examples and seeds, as far as they are known; None: nothing tells."""
    interval: Interval | None
    """95 %, over the same."""
    scored: tuple[int, ...] = ()
    """The trials that make `values`."""
    gap: Gap | None = None
    """How much worse than the best, on the same examples; None: not compared."""
    alike: bool | None = None
    """Whether it may be as good as the best: it is in the model confidence set; None: not compared."""
    failed: tuple[int, ...] = ()
    """Repeats that did not end complete: it is not chosen."""

    @property
    def number(self) -> int:
        return self.result.number

    @property
    def costs(self) -> Mapping[str, float]:
        """By name, those that are known."""
        return self.result.costs

    @property
    def seeds(self) -> int:
        """With how many seeds it is reported."""
        return len(self.values)

    def is_comparable(self, other: "Candidate") -> bool:
        """Return whether both metrics are of the same eval rows; results that do not say are taken to be."""
        ours, theirs = self.result.eval_fingerprint, other.result.eval_fingerprint
        return ours == theirs or not ours or not theirs

    @property
    def label(self) -> str:
        point = ", ".join(
            f"{k}={console.short(v)}" for k, v in self.result.params_swept.items() if k != repeats.SEED_KEY
        )
        return f"trial {self.number}" + (f" ({point})" if point else "")


@dataclass(frozen=True, kw_only=True)
class Answer:
    metric: str
    maximize: bool
    going_on: bool
    """Whether trials wait or run: the answer may change."""
    candidates: Sequence[Candidate] = ()
    best: Candidate | None = None
    by_seeds: bool = False
    """Whether configurations are compared, by seeds and examples; else trained models, by examples."""
    rows: int = 0
    """Eval examples of the best one."""
    groups: int | None = None
    """Groups of those where they belong together; None where each stands alone."""
    tested: Tested | None = None
    """The best one's adapter on the test split; None before it was read."""
    visible: float | None = None
    """The smallest difference that four of five such studies would tell apart."""
    corrected: float | None = None
    """The best one's eval metric without the luck of having been chosen on these rows."""
    margin: float = 0.0
    """What a cheaper candidate may be worse by."""
    cheapest: Candidate | None = None
    """Fewest trainable parameters of those shown to be within the margin. May be the best itself; None: unknown."""
    fronts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Cost -> the trials that no other one beats in metric and that cost at once, cheapest first."""
    apart: Sequence[Candidate] = ()
    """The best one on each other set of eval rows: a metric of other rows says nothing about who is better."""
    ended: Mapping[str, int] = field(default_factory=dict)
    """State -> trials of the search, repeats aside."""

    @property
    def alike(self) -> list[Candidate]:
        """The candidates that may be as good as the best, the nearest first."""
        return sorted((c for c in self.candidates if c.alike), key=lambda c: c.gap.value if c.gap else math.inf)

    @property
    def worse(self) -> list[Candidate]:
        """The candidates that are told apart from the best."""
        return [c for c in self.candidates if c.alike is False]

    @property
    def compared(self) -> int:
        """With how many candidates the best was compared."""
        return sum(c.alike is not None for c in self.candidates)

    def no_better(self, value: float, baseline: Mapping[str, float]) -> str:
        """Return a sentence where a metric is no better than that of a trivial answer, "" elsewhere."""
        for name, trivial in baseline.items():
            if name.endswith(f"_{self.metric}") and not better(value, trivial, self.maximize):
                return f"It is no better than the trivial answer ({name.replace('_', ' ')} {trivial:.4f})."
        return ""

    @property
    def front(self) -> list[Candidate]:
        """The candidates on any of the fronts, best metric first."""
        there = {n for numbers in self.fronts.values() for n in numbers}
        return in_order([c for c in self.candidates if c.number in there], self.maximize)


def answer(study: Study) -> Answer:
    """Return what a study says so far, finished or running."""
    trials, maximize = study.trials(), study.meta.maximize
    empty = Answer(
        metric=study.meta.metric,
        maximize=maximize,
        going_on=bool(study.waiting() + study.running()),
        ended=_ended(trials),
    )
    runs, first = repeats.runs(trials), study.best()
    if first is None:
        return empty
    spread, bad = significance.spread(repeats.values(found) for found in runs.values()), repeats.failed(trials)
    scores = cache(study.scores)  # each trial is read once, and all are resampled together
    significance.resample(s for found in runs.values() for t in found if (s := scores(t.number)) is not None)
    made = {n: _candidate(study, scores, found, spread, bad.get(n, [])) for n, found in runs.items()}
    here = {n: found for n, found in runs.items() if made[n].is_comparable(made[first.number])}
    names, rivals = _rivals(study, scores, here, first.number)
    told = comparison.confidence_set(rivals) if rivals is not None else None
    judged = _judged(made, names, rivals, told, first.number)
    best = judged[first.number]
    own = scores(best.scored[0])
    margin = near_enough(study.search.margin, study.meta.bounds, best.value)
    return replace(
        empty,
        candidates=list(judged.values()),
        best=best,
        by_seeds=rivals is not None and rivals.by_seeds,
        rows=len(own) if own is not None else 0,
        groups=significance.units(own) if own is not None and own.groups is not None else None,
        tested=_tested(study, best),
        visible=comparison.smallest_difference(rivals, told.threshold)
        if rivals is not None and told is not None
        else None,
        corrected=_corrected(study, scores, judged, names, rivals),
        margin=margin,
        cheapest=cheapest(best, list(judged.values()), margin),
        fronts={cost: front([judged[n] for n in here], cost, maximize) for cost in COSTS},
        apart=_best_of_others(list(judged.values()), best, maximize),
    )


def _best_of_others(candidates: Sequence[Candidate], best: Candidate, maximize: bool) -> list[Candidate]:
    """Return the best candidate on each set of eval rows that is not the best one's."""
    firsts: dict[str, Candidate] = {}
    for candidate in in_order(candidates, maximize):
        if not candidate.is_comparable(best):
            firsts.setdefault(candidate.result.eval_fingerprint, candidate)
    return list(firsts.values())


def _ended(trials: Sequence[FrozenTrial]) -> dict[str, int]:
    own = [t.state.name for t in trials if t.state.is_finished() and not repeats.is_repeat(t)]
    return {state.name: own.count(state.name) for state in TrialState if own.count(state.name)}


def _candidate(
    study: Study,
    scores: Read,
    runs: Sequence[FrozenTrial],
    spread: significance.Spread | None,
    bad: Sequence[FrozenTrial],
) -> Candidate:
    trial, shown = runs[0], repeats.reported(runs)
    values = tuple(repeats.values(shown))
    parts = [s for t in shown if (s := scores(t.number)) is not None]
    error, interval = significance.sure(parts, values, spread if len(runs) > 1 else None)
    if interval is not None:
        interval = interval.within(*study.meta.bounds)
    return Candidate(
        result=result_of(trial, study.trial_folder(trial.number)),
        values=values,
        value=statistics.fmean(values),
        searched=trial.values[0],
        repeated=any(map(repeats.is_repeat, runs)),
        standard_error=error,
        interval=interval,
        scored=tuple(t.number for t in shown),
        failed=tuple(t.number for t in bad),
    )


# --- telling apart ---------------------------------------------------------------------------------------------------


def _rivals(
    study: Study, scores: Read, runs: Mapping[int, Sequence[FrozenTrial]], best: int
) -> tuple[list[int], Rivals | None]:
    """Return which candidates are compared, and what is known of them; None where nothing can be.

    Once the best ran with several seeds, only those that did are compared: one run may be luck.
    """
    maximize = study.meta.maximize
    several = len(runs[best]) > 1
    among = {n: found for n, found in runs.items() if len(found) > 1} if several else dict(runs)
    parts = {n: [scores(t.number) for t in found] for n, found in among.items()}
    rows = _examples(parts[best])
    same = {n: [s for s in found if s is not None] for n, found in parts.items() if rows and _examples(found) == rows}
    if len(same) < 2 or too_few(same[best][0]):
        return [], None
    names = list(same)
    replicates_KR = np.stack([upward(significance.mean_replicates(same[n]), maximize) for n in names])
    if not several:
        return names, Rivals(upward(np.array([same[n][0].value for n in names]), maximize), replicates_KR)
    fit = comparison.fit_seeds({n: repeats.by_seed(runs[n]) for n in names})
    if fit is None:
        return [], None
    return names, Rivals(upward(fit.mean_K, maximize), replicates_KR, fit.covariance_KK, fit.free)


def too_few(found: Parts) -> bool:
    """Return whether a split has too few independent examples for a comparison."""
    return significance.units(found) < (FEWEST_ROWS if found.groups is None else FEWEST_GROUPS)


def _examples(parts: Sequence[Parts | None]) -> bytes:
    """Return which eval examples all runs were scored on; b"" where they differ or one left none."""
    found = {b"" if s is None else significance.examples(s) for s in parts}
    return found.pop() if len(found) == 1 else b""


def _judged(
    made: Mapping[int, Candidate],
    names: Sequence[int],
    rivals: Rivals | None,
    told: comparison.ConfidenceSet | None,
    best: int,
) -> dict[int, Candidate]:
    """Return the candidates with how each stands to the best."""
    if rivals is None or told is None:
        return dict(made)
    inside = dict(zip(names, told.inside, strict=True))
    place = names.index(best)
    out = dict(made)
    for k, number in enumerate(names):
        if number == best:
            continue
        value, low, high = comparison.difference_interval(rivals, place, k)
        gap = Gap(value, Interval(low, high), comparison.worst_loss(rivals, place, k))
        # The best by all runs may have left the set where another one is clearer on these rows: then nothing is
        # told apart from it.
        out[number] = replace(made[number], gap=gap, alike=inside[number] or not inside[best])
    return out


def _tested(study: Study, best: Candidate) -> Tested | None:
    value = (best.result.test or {}).get(study.meta.metric)
    if value is None:
        return None
    found = study.scores(best.number, "test")
    return Tested(best.number, value, significance.interval(found) if found is not None else None)


def _corrected(
    study: Study, scores: Read, judged: Mapping[int, Candidate], names: Sequence[int], rivals: Rivals | None
) -> float | None:
    """Return the metric that choosing on resamples leads to on the rows left out; None with repeats, which say it."""
    if rivals is None or rivals.by_seeds:
        return None
    parts = [scores(judged[n].scored[0]) for n in names]
    return significance.without_choice([s for s in parts if s is not None], study.meta.maximize)


# --- what is nearly as good for less ---------------------------------------------------------------------------------


def cheapest(best: Candidate, candidates: Sequence[Candidate], margin: float) -> Candidate | None:
    """Return the candidate with fewest trainable parameters of those shown to be within the margin of the best.

    The best itself where no cheaper one is shown to be; None where costs are not known, or nothing was compared.
    """
    if "trainable" not in best.costs or all(c.gap is None for c in candidates):
        return None
    near = [c for c in candidates if c.gap is not None and c.gap.at_most < margin and "trainable" in c.costs]
    fewer = [c for c in near if c.costs["trainable"] < best.costs["trainable"] and not c.failed]
    return min([best, *fewer], key=lambda c: (c.costs["trainable"], c.gap.value if c.gap else 0.0, c.number))


def front(candidates: Sequence[Candidate], cost: str, maximize: bool) -> list[int]:
    """Return the candidates that no other one beats in metric and cost at once, cheapest first.

    Measured costs that differ by no more than their noise are equal.
    """
    noise = 1 + NOISE.get(cost, 0.0)
    priced = [c for c in in_order(candidates, maximize) if cost in c.costs]
    kept = [
        c
        for place, c in enumerate(priced)
        if all(other.costs[cost] > noise * c.costs[cost] for other in priced[:place])
    ]
    return [c.number for c in sorted(kept, key=lambda c: c.costs[cost])]


def in_order(candidates: Sequence[Candidate], maximize: bool) -> list[Candidate]:
    """Return candidates with the best metric first."""
    return sorted(candidates, key=lambda c: (-upward(c.value, maximize), c.number))


# --- best.yaml -------------------------------------------------------------------------------------------------------


def write_best(study: Study, found: Answer, text: str) -> Path | None:
    """Write best.yaml, a sweep file of one trial that `--sweep` runs, and return its path; None without a best."""
    if found.best is None:
        return None
    path = study.folder / BEST
    own = ("outputs=", "study=", "search.", REGISTERS)
    overrides = [redact(o) for o in found.best.result.overrides if not o.startswith(own)]
    head = (
        f"# {study.meta.name}: {' '.join(text.split())}\n"
        f"# Run it: python -m lorasweep --sweep {console.shown(path)}\n"
        f"# Every key with its value: {found.best.number}/config.yaml\n"
    )
    body = yaml.safe_dump({"overrides": overrides}, sort_keys=False, allow_unicode=True, width=1000)
    replace_file(path, redact(head) + body)
    return path
