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
from itertools import chain
from pathlib import Path

import numpy as np
import yaml
from optuna.trial import FrozenTrial, TrialState

from lorasweep import console
from lorasweep.config.measures import COSTS
from lorasweep.credentials import redact
from lorasweep.files import replace_file
from lorasweep.study import baselines, comparison, repeats, significance
from lorasweep.study.baselines import Baseline
from lorasweep.study.belief import Doubt, near_enough
from lorasweep.study.candidate import Candidate, Gap, Tested, cheapest, front, in_order
from lorasweep.study.comparison import Rivals
from lorasweep.study.direction import better, upward
from lorasweep.study.next_run import Next, failed_again, is_seeds, more_seeds
from lorasweep.study.provenance import REGISTERS
from lorasweep.study.result import result_of
from lorasweep.study.significance import Interval
from lorasweep.study.study import Study
from lorasweep.tasks.metric import Parts

BEST = "best.yaml"
Read = Callable[[int], Parts | None]
"""From a trial's number to what each eval example adds to its metric."""
OUT_OF_REACH = 6.0
"""Standard errors below the best from which on an evaluation is the best on no resample."""
FEWEST_ROWS, FEWEST_GROUPS = 30, 10
"""Eval examples, or groups of them where they belong together, below which nothing is compared."""


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
    baselines: Sequence[Baseline] = ()
    """What the best one is compared with: the base as it is, a head alone, full fine-tuning."""
    tested: Tested | None = None
    """The best one's adapter on the test split; None before it was read."""
    visible: float | None = None
    """The smallest difference that four of five such studies would tell apart."""
    corrected: float | None = None
    """The best one's eval metric without the luck of having been chosen on these rows, among trials and evaluations."""
    evaluations: int = 0
    """Evaluations among which it was chosen, of all trials compared, as far as they could have been the best."""
    margin: float = 0.0
    """What a cheaper candidate may be worse by."""
    rising: tuple[tuple[int, float], tuple[int, float]] | None = None
    """Step and metric of the best one's last two evaluations, where the last is better by more than the margin."""
    cheapest: Candidate | None = None
    """Fewest trainable parameters of those shown to be within the margin. May be the best itself; None: unknown."""
    fronts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Cost -> the trials that no other one beats in metric and that cost at once, cheapest first."""
    apart: Sequence[Candidate] = ()
    """The best one on each other set of eval rows: a metric of other rows says nothing about who is better."""
    ended: Mapping[str, int] = field(default_factory=dict)
    """State -> trials of the search, repeats and baselines aside."""
    waiting: int = 0
    """Trials that wait."""
    not_begun: str = ""
    """Why those do not begin; "" where they will."""
    again: int = 0
    """Repeats that have ended."""
    is_auto: bool = False
    """Whether repeats are run until the margin is met."""
    over_memory: int = 0
    """Pruned trials that were never begun: they need more than search.max_memory_gib."""
    objectives: Sequence[str] = ()
    """Costs that the search made small too."""
    doubt: Doubt | None = None
    """What seeds leave open about the choice; None before they tell anything."""
    next: Next | None = None
    """What to run next; None where nothing is known that would tell more."""
    lacks_rows: bool = False
    """Whether what is left open is the eval examples' doing: more seeds would not tell."""

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

    @property
    def is_too_few(self) -> bool:
        """Whether the eval split has too few independent examples for a comparison."""
        if self.groups is not None:
            return self.groups < FEWEST_GROUPS
        return 0 < self.rows < FEWEST_ROWS

    @property
    def baseline(self) -> Mapping[str, float]:
        """What trivial answers reach on the best one's eval split, by name."""
        return (self.best.result.baseline if self.best else None) or {}

    @property
    def not_beaten(self) -> str:
        """The trivial answer that the best is no better than; "" where it is."""
        for name, trivial in self.baseline.items():
            if self.best and name.endswith(f"_{self.metric}") and not better(self.best.value, trivial, self.maximize):
                return name
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
        going_on=bool(study.ready() + study.queue.running()),
        ended=_ended(trials),
        waiting=study.queue.waiting(),
        not_begun=study.not_begun() if study.queue.waiting() else "",
        again=sum(t.state.is_finished() for t in trials if repeats.is_repeat(t)),
        over_memory=sum("never_begun" in t.user_attrs for t in trials),
        objectives=study.search.objectives or (),
        is_auto=study.search.repeats == repeats.AUTO,
    )
    runs, first = repeats.runs(trials), study.best()
    if first is None:
        return empty
    spread, bad = significance.spread(map(repeats.by_seed, runs.values())), repeats.failed(trials)
    scores = cache(study.scores)  # each trial is read once, and all are resampled together
    significance.resample(s for found in runs.values() for t in found if (s := scores(t.number)) is not None)
    made = {n: _candidate(study, scores, found, spread, bad.get(n, [])) for n, found in runs.items()}
    here = {n: found for n, found in runs.items() if made[n].is_comparable(made[first.number])}
    names, rivals = _rivals(study, scores, here, first.number)
    told = comparison.confidence_set(rivals) if rivals is not None else None
    judged = _judged(made, names, rivals, told, first.number)
    best = judged[first.number] = _with_luck(judged[first.number], study, trials)
    own = scores(best.scored[0])
    margin = near_enough(study.search.margin, study.meta.bounds, best.value)
    corrected, evaluations = _corrected(study, scores, best, names, rivals)
    said = replace(
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
        corrected=corrected,
        evaluations=evaluations,
        margin=margin,
        rising=_rising(first, margin, maximize),
        cheapest=cheapest(best, list(judged.values()), margin),
        fronts={cost: front([judged[n] for n in here], cost, maximize) for cost in COSTS},
        apart=_best_of_others(list(judged.values()), best, maximize),
        doubt=repeats.doubt(trials, maximize),
        baselines=baselines.compared(study, trials, scores, best),
    )
    return said if said.going_on else _with_next(said, study, names, rivals)


def _with_next(found: Answer, study: Study, names: Sequence[int], rivals: Rivals | None) -> Answer:
    """Return the answer with what to run next: more seeds, unless nothing is open or examples are what lacks."""
    best, alone = found.best, len(found.candidates) == 1
    assert best is not None, "it was looked for before"
    if alone and found.ended.get("FAIL"):
        return replace(found, next=failed_again(study.meta.place, study.search, best, found.ended["FAIL"]))
    if not found.compared and found.is_too_few and not alone:
        return replace(found, lacks_rows=True)
    near = [c for c in found.alike if c.gap is not None and c.gap.at_most >= found.margin]
    if found.by_seeds and not near:
        return found
    if rivals is not None and found.by_seeds:
        place = names.index(best.number)
        if not any(is_seeds(rivals, place, names.index(c.number)) for c in near):
            return replace(found, lacks_rows=True)
    others = [c for c in found.candidates if c is not best and not c.failed and c.is_comparable(best)]
    first = [*found.alike, *(c for c in in_order(others, found.maximize) if c not in found.alike)]
    return replace(found, next=more_seeds(study.meta.place, study.search, best, first, found.again))


def _rising(trial: FrozenTrial, margin: float, maximize: bool) -> tuple[tuple[int, float], tuple[int, float]] | None:
    """Return the last two evaluations of a run that had not ended learning: the last is the best, by far."""
    evaluations = sorted(trial.intermediate_values.items())
    if len(evaluations) < 2:
        return None
    before, last = evaluations[-2:]
    earlier = max(upward(value, maximize) for _, value in evaluations[:-1])
    return (before, last) if upward(last[1], maximize) - earlier > margin else None


def _best_of_others(candidates: Sequence[Candidate], best: Candidate, maximize: bool) -> list[Candidate]:
    """Return the best candidate on each set of eval rows that is not the best one's."""
    firsts: dict[str, Candidate] = {}
    for candidate in in_order(candidates, maximize):
        if not candidate.is_comparable(best):
            firsts.setdefault(candidate.result.eval_fingerprint, candidate)
    return list(firsts.values())


def _ended(trials: Sequence[FrozenTrial]) -> dict[str, int]:
    own = [t.state.name for t in trials if t.state.is_finished() and repeats.is_searched(t)]
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


def _with_luck(best: Candidate, study: Study, trials: Sequence[FrozenTrial]) -> Candidate:
    """Return the best configuration of several seeds with an interval that reaches further to the worse side.

    It was chosen among others on these rows and with these seeds; its mean is too good by about as much as the belief
    pulls it back.
    """
    held, maximize = repeats.beliefs(trials, study.meta.maximize), study.meta.maximize
    if best.interval is None or held is None or not (best.repeated or best.seeds > 1):
        return best
    luck, (low, high) = max(0.0, held.pulled[best.number]), (best.interval.low, best.interval.high)
    wider = Interval(low - luck, high) if maximize else Interval(low, high + luck)
    return replace(best, interval=wider.within(*study.meta.bounds))


# --- telling apart ---------------------------------------------------------------------------------------------------


def _rivals(
    study: Study, scores: Read, runs: Mapping[int, Sequence[FrozenTrial]], best: int
) -> tuple[list[int], Rivals | None]:
    """Return which candidates are compared, and what is known of them; None where nothing can be.

    Once the best ran with several seeds, only those that did are compared: one run may be luck.
    """
    maximize = study.meta.maximize
    several = len(runs[best]) > 1
    among = {n: found if several else found[:1] for n, found in runs.items() if len(found) > 1 or not several}
    parts = {n: [scores(t.number) for t in found] for n, found in among.items()}
    rows = _examples(parts[best])
    same = {n: [s for s in found if s is not None] for n, found in parts.items() if rows and _examples(found) == rows}
    if len(same) < 2 or too_few(same[best][0]):
        return [], None
    names = list(same)
    replicates_KR = np.stack([upward(significance.mean_replicates(same[n]), maximize) for n in names])
    independent = significance.independent(same[best][0])
    if not several:
        values_K = upward(np.array([same[n][0].value for n in names]), maximize)
        return names, Rivals(values_K, replicates_KR, independent=independent)
    fit = comparison.fit_seeds({n: repeats.by_seed(runs[n]) for n in names})
    if fit is None:
        return [], None
    return names, Rivals(upward(fit.mean_K, maximize), replicates_KR, fit.covariance_KK, fit.free, independent)


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
        value, low, high = comparison.difference_interval(rivals, place, k, told.threshold)
        gap = Gap(value, Interval(low, high), comparison.worst_loss(rivals, place, k))
        # The best by all runs may have left the set where another one is clearer on these rows: then nothing is
        # told apart from it.
        out[number] = replace(made[number], gap=gap, alike=inside[number] or not inside[best])
    return out


def _tested(study: Study, best: Candidate) -> Tested | None:
    if best.result.test is None or study.meta.metric not in best.result.test:
        return None
    value = best.result.test[study.meta.metric]
    found = study.scores(best.number, "test")
    interval = significance.interval(found) if found is not None else None
    trivial = {name: best.result.test[name] for name in best.result.baseline or {} if name in best.result.test}
    return Tested(best.number, value, interval, trivial)


def _corrected(
    study: Study,
    scores: Read,
    best: Candidate,
    names: Sequence[int],
    rivals: Rivals | None,
) -> tuple[float | None, int]:
    """Return the metric that choosing on resamples leads to on the rows left out, and of how many evaluations it is.

    Each trial is its best evaluation: that is a choice on these rows, too, and the only one where repeats say how good
    a configuration is, or there is nothing to compare with. None where nothing was chosen.
    """

    maximize = study.meta.maximize
    reach = math.inf if best.standard_error is None else OUT_OF_REACH * best.standard_error

    def found(number: int) -> list[Parts]:
        own = scores(number)
        near = study.evaluations(number, upward(best.value, maximize) - reach)
        return near or ([own] if own is not None else [])

    if rivals is not None and not rivals.by_seeds:
        parts = list(chain.from_iterable(found(n) for n in names))
        return significance.without_choice(parts, maximize), len(parts)
    each = [found(number) for number in best.scored]
    if not all(each) or max(map(len, each)) < 2 or too_few(each[0][0]):
        return None, 0
    return statistics.fmean(significance.without_choice(parts, maximize) for parts in each), max(map(len, each))


# --- best.yaml -------------------------------------------------------------------------------------------------------


def write_best(study: Study, found: Answer, text: str) -> Path | None:
    """Write best.yaml, a sweep file of one trial that `--sweep` runs, and return its path; None without a best."""
    if found.best is None:
        return None
    path = study.folder / BEST
    own = ("outputs=", "study=", "search.", REGISTERS)
    overrides = [redact(o) for o in found.best.result.overrides if not o.startswith(own)]
    head = (
        f"# {' '.join(f'{study.meta.name}: {text}'.split())}\n"
        f"# Run it: python -m lorasweep --sweep {' '.join(console.shown(path).split())}\n"
        f"# Every key with its value: {found.best.number}/config.yaml\n"
    )
    body = yaml.safe_dump({"overrides": overrides}, sort_keys=False, allow_unicode=True, width=1000)
    replace_file(path, redact(head) + body)
    return path
