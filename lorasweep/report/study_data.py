"""What a study has shown so far, gathered from its queue and its trials' folders: what the report is made from."""

import math
import statistics
import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from scipy import stats

from lorasweep import console
from lorasweep.config.spec import SearchSpec
from lorasweep.files import read_json
from lorasweep.report import importance
from lorasweep.search import samplers
from lorasweep.study import answer, repeats, wording
from lorasweep.study.answer import Answer
from lorasweep.study.candidate import Candidate
from lorasweep.study.direction import upward
from lorasweep.study.meta import StudyMeta
from lorasweep.study.result import TrialResult, result_of
from lorasweep.study.study import Study

WIDE = 8
"""Ratio of largest to smallest from which named numbers stand on a logarithmic axis; a range says so itself."""


@dataclass(frozen=True, kw_only=True)
class TrialData:
    """One trial of the queue, with all that is known of it."""

    result: TrialResult
    """What it came to so far."""
    value: float | None = None
    """Its primary metric, of a pruned trial too at the evaluation that it keeps; of several seeds it is their mean."""
    curve: Sequence[tuple[int, float]] = ()
    """(step, primary metric) of each evaluation."""
    began_s: float | None = None
    ended_s: float | None = None
    seed: int | None = None
    repeat_of: int | None = None
    """The trial whose configuration it runs again with another seed."""
    baseline: str = ""
    """Which baseline it is, if any."""
    candidate: Candidate | None = None
    """What the answer says of it; None where it is not among the complete ones."""

    @property
    def number(self) -> int:
        return self.result.number

    @property
    def state(self) -> str:
        """Optuna's word."""
        return self.result.state

    @property
    def point(self) -> Mapping[str, Any]:
        """The values of the keys that vary."""
        return self.result.params_swept

    @property
    def interval(self) -> str:
        """95 % of its metric, over eval examples or seeds; "" where it is not known."""
        return str(self.candidate.interval or "") if self.candidate else ""

    def label(self) -> str:
        return f"trial {self.number}: " + (", ".join(f"{k}={short(v)}" for k, v in self.point.items()) or "as it is")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A parameter that varies, and how its values lie."""

    key: str
    numeric: bool
    log: bool
    values: Sequence[Any]
    """The distinct values of finished trials in order."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Finished trials that have one value of a parameter, or lie in one bin of it."""

    label: str
    centre: float
    """Where it lies on a numeric axis; its place in the order otherwise."""
    count: int
    mean: float
    half: float | None
    """Half of the mean's 95 % interval; None for a single trial."""


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """A study's answer, and all its trials."""

    meta: StudyMeta
    answer: Answer
    trials: Sequence[TrialData]
    axes: Sequence[Axis]
    importance: Mapping[str, float]
    """Each parameter's share of the metric's variance."""
    importance_says: str
    """That in a sentence, or why there is none, and which parameters it leaves out."""
    is_designed: bool = True
    """Whether the trials were drawn without looking at results, and none was pruned: means have intervals then."""
    best_file: str = ""
    """The sweep file that runs the best one, "" before there is one."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Versions, commit, machine: what each trial ran with."""
    made: str = ""

    @property
    def unit(self) -> str:
        return self.meta.shown_unit

    @property
    def folder(self) -> str:
        """The study's folder as a person types it."""
        return self.meta.place

    @property
    def best(self) -> TrialData | None:
        """The trial that the answer names."""
        best = self.answer.best
        return next((t for t in self.trials if best and t.number == best.number), None)

    @property
    def fingerprints(self) -> list[str]:
        """Of the data that trials saw, each once."""
        return sorted({t.result.data_fingerprint for t in self.trials if t.result.data_fingerprint})

    def standing(self, trial: TrialData) -> str:
        """Return how a trial stands to the best one, "" for one that the answer does not compare."""
        best, candidate = self.answer.best, trial.candidate
        if best is None or candidate is None:
            return ""
        words = {None: "not compared" if self.answer.compared else "", True: "may be as good", False: "worse"}
        standing = "best" if candidate.number == best.number else words[candidate.alike]
        notes = [standing] if standing else []
        if self.answer.cheapest and self.answer.cheapest.number == candidate.number:
            notes.append("cheapest within the margin")
        if candidate.repeated:
            notes.append(f"mean of {wording.counted(candidate.seeds, 'new seed')}, searched {candidate.searched:.4f}")
        elif best.repeated:
            notes.append("one seed")
        return "; ".join(notes)

    def ranked(self, *states: str) -> list[TrialData]:
        """Return the search's trials of these states that have a value, the best first; no repeats, no baselines."""
        found = [t for t in self.trials if t.state in states and t.value is not None and t.repeat_of is None]
        found = [t for t in found if not t.baseline]
        return sorted(found, key=lambda t: (-upward(t.value or 0.0, self.meta.maximize), t.number))

    def of(self, state: str) -> list[TrialData]:
        return [t for t in self.trials if t.state == state]

    def axis(self, key: str) -> Axis:
        return next(a for a in self.axes if a.key == key)

    def by_importance(self) -> list[Axis]:
        """Return the parameters, the most important first; without importances, as the study names them."""
        return sorted(self.axes, key=lambda a: -self.importance.get(a.key, -1.0))


def gather(study: Study, known_answer: Answer | None = None) -> StudyData:
    """Return what the study's queue and folders hold at this moment, with its answer where that is known already."""
    said = known_answer or answer.answer(study)
    queue = study.trials()
    runs = {t.number: read_json(study.trial_folder(t.number) / "run.json") or {} for t in queue}
    candidates = {c.number: c for c in said.candidates}
    trials = [
        _trial(t, result_of(t, study.trial_folder(t.number)), runs[t.number], candidates.get(t.number)) for t in queue
    ]
    searched = [t for t in queue if t.state.is_finished() and repeats.is_searched(t)]
    compared, step = importance.at_common_step(searched)
    maybe = [_axis(study, key, trials) for key in study.meta.swept]
    axes = [axis for axis in maybe if axis is not None]
    shares, why = importance.importances(compared, [a.key for a in axes if len(a.values) > 1])
    says = importance.summary(shares, study.meta.metric, len(compared), step) if shares else ""
    data = StudyData(
        meta=study.meta,
        answer=said,
        trials=trials,
        axes=axes,
        importance=shares,
        importance_says=" ".join(filter(None, [says, why])),
        is_designed=is_designed(study.search),
        facts=_facts([r for r in runs.values() if r]),
        made=time.strftime("%Y-%m-%d %H:%M %z"),
    )
    has_best = (study.folder / answer.BEST).is_file()
    return replace(data, best_file=f"{data.folder}/{answer.BEST}") if has_best else data


def is_designed(search: SearchSpec) -> bool:
    """Return whether the trials are drawn without looking at results, and none is pruned."""
    return not samplers.learns(search) and search.pruner == "none"


def _trial(trial: FrozenTrial, result: TrialResult, run: Mapping[str, Any], candidate: Candidate | None) -> TrialData:
    value = trial.values[0] if trial.values else None
    if value is None and trial.state == TrialState.PRUNED and result.metric:
        value = result.metric.value
    if candidate is not None:
        value = candidate.value
    began, ended = trial.datetime_start, trial.datetime_complete
    return TrialData(
        result=result,
        value=value if value is not None and math.isfinite(value) else None,
        curve=[(s, v) for s, v in sorted(trial.intermediate_values.items()) if math.isfinite(v)],
        began_s=began.timestamp() if began else None,
        ended_s=ended.timestamp() if ended else None,
        seed=run.get("seed"),
        repeat_of=trial.user_attrs.get("repeat_of"),
        baseline=trial.user_attrs.get("baseline", ""),
        candidate=candidate,
    )


def _facts(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what the trials ran with; where they differ, each with the number of trials."""
    found: dict[str, Counter[str]] = {}
    for run in runs:
        data = run.get("data", {})
        for name, text in {
            "rows": _counts(data.get("rows", {})),
            "rows left out": _counts(data.get("left_out", {})),
            "notes": "; ".join(data.get("notes", [])),
            **run.get("versions", {}),
            **{k: run.get(k) for k in ("python", "machine", "commit")},
        }.items():
            if text:
                found.setdefault(name, Counter())[str(text)] += 1
    return {name: _all_or_counted(seen) for name, seen in found.items()}


def _all_or_counted(seen: Counter[str]) -> str:
    if len(seen) == 1:
        return next(iter(seen))
    return ", ".join(f"{text} ({n} trials)" for text, n in seen.items())


def _counts(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{split} {count:,}" for split, count in rows.items())


def _axis(study: Study, key: str, trials: Sequence[TrialData]) -> Axis | None:
    """Return a parameter's axis, None where no finished trial sets it."""
    values = {str(t.point[key]): t.point[key] for t in trials if key in t.point and t.value is not None}
    if not values:
        return None
    found = list(values.values())
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in found):
        names = chain.from_iterable(d.names for d in study.space.dimensions if d.key == key)
        order = {str(name): i for i, name in enumerate(names)}
        found.sort(key=lambda v: (order.get(str(v), len(order)), str(v)))
        return Axis(key=key, numeric=False, log=False, values=found)
    found.sort()
    dimension = next((d for d in study.space.dimensions if d.key == key), None)
    wide = found[0] > 0 and found[-1] / found[0] >= WIDE
    log = dimension.log if dimension and not dimension.names else wide
    return Axis(key=key, numeric=True, log=bool(log and found[0] > 0), values=found)


def groups(trials: Sequence[TrialData], axis: Axis, most: int = 8, *, sure: bool = True) -> list[Group]:
    """Return the mean metric of finished trials by value of a parameter, or by bin where it has more than `most`.

    Without `sure` no mean has an interval: a sampler that learns, or a pruner, has chosen which trials are there.
    """
    bins: dict[int, list[TrialData]] = {}
    for t in trials:
        if axis.key in t.point and t.value is not None:
            bins.setdefault(place(axis, t.point[axis.key], most), []).append(t)
    made = [_group(axis, i, bins[i], len(axis.values) > most and axis.numeric) for i in sorted(bins)]
    return made if sure else [replace(group, half=None) for group in made]


def place(axis: Axis, value: Any, most: int) -> int:
    """Return the number of the value's bin: its own place while there are few values, equal widths otherwise."""
    if not axis.numeric or len(axis.values) <= most:
        return [str(v) for v in axis.values].index(str(value))
    low, high, at = (math.log(v) if axis.log else v for v in (axis.values[0], axis.values[-1], value))
    return min(most - 1, int((at - low) / (high - low) * most))


def _group(axis: Axis, i: int, members: Sequence[TrialData], binned: bool) -> Group:
    points = [t.point[axis.key] for t in members]
    values = [t.value for t in members if t.value is not None]
    centre = float(i)
    if axis.numeric:
        centre = statistics.geometric_mean(points) if axis.log else statistics.fmean(points)
    same = not binned or min(points) == max(points)
    half = None
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Group(
        label=short(points[0]) if same else f"{short(min(points))} to {short(max(points))}",
        centre=centre,
        count=len(values),
        mean=statistics.fmean(values),
        half=half,
    )


def short(value: Any) -> str:
    """Return a value as a table shows it."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    if len(text) > console.MOST_SHOWN:  # two long lists may begin and end alike
        return f"{console.cut(text, console.MOST_SHOWN)} #{zlib.crc32(text.encode()):08x}"
    return "not set" if value is None else text


def duration(seconds: float) -> str:
    """Return seconds in the unit that a person would use."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.2f} h"
