"""A study's answer: the best configuration, how sure that is, and what is nearly as good for less.

<study>/best.yaml   the best configuration, to run with: python -m lorasweep --sweep <study>/best.yaml
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lorasweep import console
from lorasweep.config.measures import COSTS
from lorasweep.credentials import redact
from lorasweep.files import replace_file
from lorasweep.study import example_scores, repeats, significance
from lorasweep.study.provenance import REGISTERS
from lorasweep.study.result import TrialResult, result_of
from lorasweep.study.significance import Difference, Interval, Spread
from lorasweep.study.study import Study

BEST = "best.yaml"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A complete configuration, with all its seeds."""

    result: TrialResult
    """Of its trial; of several seeds, of the first."""
    values: tuple[float, ...]
    """The primary metric of each repeat; of the search's own run where there are none."""
    value: float
    """Their mean."""
    searched: float
    """The primary metric of the search's own run, by which it was chosen."""
    repeated: bool
    """Whether it ran again with new seeds, which alone make `values`."""
    standard_error: float | None
    """Of the metric over eval examples or of the mean over seeds, whichever is larger; None: nothing tells."""
    interval: Interval | None
    """95 %, over eval examples or of the mean over seeds, whichever is wider."""
    scored: tuple[Path, ...] = ()
    """The folders of the runs that make `values`."""
    difference: Difference | None = None
    """The best one's metric minus its own, on the same examples; None: they cannot be compared so."""
    alike: bool | None = None
    """Whether it cannot be told apart from the best; None: nothing tells."""
    dropped: bool = False
    """Whether its repeats ended early, for it could not reach the best any more."""

    @property
    def number(self) -> int:
        return self.result.number

    @property
    def over(self) -> str:
        """How many runs `value` is the mean of, "" for the search's own."""
        if not self.repeated:
            return ""
        seeds = f"the mean of {len(self.values)} new seeds" if len(self.values) > 1 else "with a new seed"
        return f"{seeds} (the search's own run, which chose it, had {self.searched:.4f})"

    @property
    def label(self) -> str:
        point = ", ".join(f"{k}={console.short(v)}" for k, v in self.result.params_swept.items())
        return f"trial {self.number}" + (f" ({point})" if point else "")


@dataclass(frozen=True, kw_only=True)
class Answer:
    metric: str
    maximize: bool
    going_on: bool
    """Whether trials wait or run: the answer may change."""
    candidates: Sequence[Candidate] = ()
    by_seeds: bool = False
    """Whether the spread over seeds was known and counted in the comparisons."""
    best: Candidate | None = None
    cheapest: Candidate | None = None
    """Of those within one standard error of the best: fewest trainable parameters, then seconds. May be the best."""
    fronts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Cost -> the trials that no other one beats in metric and that cost at once, cheapest first."""

    @property
    def alike(self) -> list[Candidate]:
        """The candidates that cannot be told apart from the best."""
        return [c for c in self.candidates if c.alike]

    @property
    def compared(self) -> int:
        """With how many candidates the best could be compared."""
        return sum(c.alike is not None for c in self.candidates)

    @property
    def method(self) -> str:
        """How the comparisons with the best were made, in a sentence."""
        if not self.compared:
            return ""
        seeds = " or by the spread over seeds, whichever says less" if self.by_seeds else ""
        several = f", corrected for {self.compared} comparisons (Holm, 5 % for all together)"
        return f"compared on the same eval examples, by paired bootstrap{seeds}{several if self.compared > 1 else ''}"

    def no_better(self, value: float, baseline: Mapping[str, float]) -> str:
        """Return a sentence where a metric is no better than that of a trivial answer, "" elsewhere."""
        sign = 1 if self.maximize else -1
        for name, trivial in baseline.items():
            if name.endswith(f"_{self.metric}") and sign * value <= sign * trivial:
                return f"It is no better than the trivial answer ({name.replace('_', ' ')} {trivial:.4f})."
        return ""

    @property
    def front(self) -> list[Candidate]:
        """The candidates on any of the fronts, best metric first."""
        there = {n for numbers in self.fronts.values() for n in numbers}
        return in_order([c for c in self.candidates if c.number in there], self.maximize)

    @property
    def text(self) -> str:
        """The answer in two sentences."""
        if self.best is None:
            return "No trial is complete yet. There is nothing to choose from."
        first, second = self._first(self.best), self._second(self.best)
        return f"{f'So far, {first}' if self.going_on else _sentence(first)} {_sentence(second)}"

    def _first(self, best: Candidate) -> str:
        seeds = f", {best.over}" if best.repeated else ""
        sure = f" (95 % interval {best.interval})" if best.interval else ""
        others = len(self.candidates) - 1
        said = f"{best.label} is best with eval {self.metric} {best.value:.4f}{seeds}{sure}"
        if not others:
            return f"{said}, the only complete one."
        if not self.compared:
            return f"{said}; nothing tells how sure the choice is."
        if not self.alike:
            return f"{said}, and can be told apart from {_of(self.compared, others)} others."
        return f"{said}; {len(self.alike)} of {_of(self.compared, others)} others cannot be told apart from it."

    def _second(self, best: Candidate) -> str:
        cheap = self.cheapest
        if cheap is None:
            return "How much a difference has to be to count is not known, so no cheaper one is named."
        if cheap.number == best.number:
            return f"No other one within one standard error ({best.standard_error:.4f}) is cheaper: take it."
        share = cheap.result.costs["trainable"] / best.result.costs["trainable"]
        much = f"{100 * share:.0f} % of its trainable parameters" if share < 1 else "as many parameters in less time"
        return (
            f"{cheap.label} is the cheapest within one standard error ({best.standard_error:.4f}): "
            f"{cheap.value:.4f} with {much}."
        )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _of(compared: int, others: int) -> str:
    return str(others) if compared == others else f"{compared} compared ({others})"


def answer(study: Study) -> Answer:
    """Return what a study says so far, finished or running."""
    trials = study.trials()
    going_on = bool(study.waiting() + study.running())
    runs, first = repeats.runs(trials), study.best()
    empty = Answer(metric=study.meta.metric, maximize=study.meta.maximize, going_on=going_on)
    if first is None:
        return empty
    spread, racing = significance.spread(repeats.values(found) for found in runs.values()), study.racing()
    made = {n: _candidate(study, found, spread) for n, found in runs.items()}
    gaps = _differences(made, first.number, spread)
    told = significance.holm([gap.p for gap in gaps.values()])
    alike = {n: not apart for n, apart in zip(gaps, told, strict=True)}
    candidates = [
        _with(c, difference=gaps.get(n), alike=alike.get(n), dropped=n in racing.dropped) for n, c in made.items()
    ]
    best = next(c for c in candidates if c.number == first.number)
    among = [c for c in candidates if c.repeated or not best.repeated]  # a run that was not repeated may be luck
    return _with(
        empty,
        candidates=candidates,
        by_seeds=spread is not None and best.repeated,
        best=best,
        cheapest=cheapest(best, among, study.meta.maximize),
        fronts={cost: front(candidates, cost, study.meta.maximize) for cost in COSTS},
    )


def _with(thing: Any, **changed: Any) -> Any:
    return type(thing)(**vars(thing) | changed)


def _candidate(study: Study, runs: Sequence[Any], spread: Spread | None) -> Candidate:
    trial, judged = runs[0], repeats.judged(runs)
    folders = tuple(study.trial_folder(t.number) for t in judged)
    values = tuple(repeats.values(judged))
    parts = [s for s in map(example_scores.read, folders) if s is not None]
    errors = [significance.standard_error(*parts)] if parts else []
    intervals = [significance.interval(*parts)] if parts else []
    if spread is not None:  # one run's seed is as much chance as several ones'
        errors.append(spread.of_mean(len(values)))
        intervals.append(spread.around(values).within(*significance.limits(study.meta.metric)))
    return Candidate(
        result=result_of(trial, study.trial_folder(trial.number)),
        values=values,
        value=statistics.fmean(values),
        searched=trial.values[0],
        repeated=len(runs) > 1,
        standard_error=max(errors, default=None),
        interval=max(intervals, key=lambda i: i.high - i.low, default=None),
        scored=folders,
    )


def _differences(made: Mapping[int, Candidate], best: int, spread: Spread | None) -> dict[int, Difference]:
    """Return how far the others are from the best on the same examples, as far as that can be told.

    Where the best ran again, the one of examples and seeds that says less counts.
    """
    first, out = made[best], {}
    ours = [example_scores.read(f) for f in first.scored]
    for number, other in made.items():
        theirs = [example_scores.read(f) for f in other.scored]
        gap = significance.paired([s for s in ours if s], [s for s in theirs if s]) if number != best else None
        if gap is not None and spread is not None and first.repeated:
            gap = max(gap, spread.apart(first.values, other.values), key=lambda g: g.p)
        if gap is not None:
            out[number] = gap
    return out


# --- what is nearly as good for less ---------------------------------------------------------------------------------


def cheapest(best: Candidate, candidates: Sequence[Candidate], maximize: bool) -> Candidate | None:
    """Return the candidate within one standard error of the best with fewest trainable parameters, then seconds.

    None where the best one's standard error or its costs are not known.
    """
    if best.standard_error is None or best.result.trainable is None:
        return None
    sign = 1 if maximize else -1
    least = sign * best.value - best.standard_error
    within = [c for c in candidates if sign * c.value >= least and c.result.trainable is not None]
    return min(within, key=lambda c: (c.result.trainable, c.result.train_s or 0.0, c.number))


def front(candidates: Sequence[Candidate], cost: str, maximize: bool) -> list[int]:
    """Return the candidates that no other one beats in metric and cost at once, cheapest first."""
    priced = [c for c in in_order(candidates, maximize) if cost in c.result.costs]
    out: list[int] = []
    reached = None
    for c in sorted(priced, key=lambda c: c.result.costs[cost]):  # of equal cost the best comes first
        gained = c.value if maximize else -c.value
        if reached is None or gained > reached:
            out.append(c.number)
            reached = gained
    return out


def in_order(candidates: Sequence[Candidate], maximize: bool) -> list[Candidate]:
    """Return candidates with the best metric first."""
    return sorted(candidates, key=lambda c: (-c.value if maximize else c.value, c.number))


# --- best.yaml -------------------------------------------------------------------------------------------------------


def write_best(study: Study, found: Answer) -> Path | None:
    """Write best.yaml, a sweep file of one trial that `--sweep` runs, and return its path; None without a best."""
    if found.best is None:
        return None
    path = study.folder / BEST
    own = ("outputs=", "study=", "search.", REGISTERS)
    overrides = [redact(o) for o in found.best.result.overrides if not o.startswith(own)]
    head = (
        f"# {study.meta.name}: {' '.join(found.text.split())}\n"
        f"# Run it: python -m lorasweep --sweep {console.shown(path)}\n"
        f"# Every key with its value: {found.best.number}/config.yaml\n"
    )
    body = yaml.safe_dump({"overrides": overrides}, sort_keys=False, allow_unicode=True, width=1000)
    replace_file(path, redact(head) + body)
    return path
