"""What a study has shown so far, gathered from its queue and its trials' folders: what the report is made from."""

import json
import math
import shlex
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from scipy import stats

from lorasweep.study import answer, repeats
from lorasweep.study.result import read_result
from lorasweep.study.study import Study

LEAST_FOR_IMPORTANCE = 8
"""Finished trials below which parameter importance is chance."""
MOST_FOR_IMPORTANCE, TREES = 200, 32
"""Trials that the random forest sees, and its trees; more cost seconds and change little."""
WIDE = 8
"""Ratio of largest to smallest from which named numbers stand on a logarithmic axis; a range says so itself."""

UNITS = {
    "loss": "nats",
    "perplexity": "perplexity",
    "mse": "squared error",
    "pearson": "correlation, -1 to 1",
    "spearman": "correlation, -1 to 1",
    "mcc": "correlation, -1 to 1",
}
"""Units of the metrics that are no share from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One trial as the report shows it; None is not known."""

    number: int
    state: str
    point: Mapping[str, Any]
    value: float | None = None
    """Its primary metric; a pruned trial's is the last it reached."""
    curve: Sequence[tuple[int, float]] = ()
    """(step, primary metric) of each evaluation."""
    trainable: float | None = None
    adapter_mb: float | None = None
    train_s: float | None = None
    device_s: float | None = None
    peak_gib: float | None = None
    """What it needs by itself, an estimate."""
    worker_peak_gib: float | None = None
    """The highest use of its worker up to its end."""
    prefix_saved_s: float | None = None
    """Seconds that were not computed again, for another pass had kept the frozen layers' output."""
    packing_saved_s: float | None = None
    """Seconds that passes shared with other trials spared it."""
    steps: int | None = None
    began_s: float | None = None
    ended_s: float | None = None
    reason: str = ""
    rerun: str = ""
    seed: int | None = None
    interval: str = ""
    """95 % of its metric, over eval examples or seeds; of several seeds the mean is `value`."""
    standing: str = ""
    """How it stands to the best one."""
    repeat_of: int | None = None
    """The trial whose configuration it runs again with another seed."""

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
class Evidence:
    """A study, gathered."""

    name: str
    question: str
    folder: str
    metric: str
    maximize: bool
    trials: Sequence[Shown]
    axes: Sequence[Axis]
    importance: Mapping[str, float]
    no_importance: str
    """Why there is none, or which parameters it leaves out."""
    said: str = ""
    """The answer in two sentences."""
    method: str = ""
    """How the others were compared with the best, in a sentence."""
    chosen: int | None = None
    """The best trial."""
    cheapest: int | None = None
    """Of the trials within one standard error of the best the cheapest; may be the best."""
    no_better: str = ""
    """A sentence where the best is no better than a trivial answer."""
    best_file: str = ""
    """The sweep file that runs the best one, "" before there is one."""
    fronts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Cost -> the trials that no other one beats in metric and that cost at once, cheapest first."""
    test: Mapping[str, float] = field(default_factory=dict)
    baseline: Mapping[str, float] = field(default_factory=dict)
    fingerprints: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    """Versions, commit, machine: what each trial ran with."""
    command: str = ""
    """What started it."""
    made: str = ""

    @property
    def unit(self) -> str:
        return UNITS.get(self.metric, "0 to 1")

    @property
    def best(self) -> Shown | None:
        """The trial that the study has chosen."""
        return next((t for t in self.trials if t.number == self.chosen), None)

    def ranked(self, *states: str) -> list[Shown]:
        """Return the search's trials of these states that have a value, the best first; no repeats."""
        found = [t for t in self.trials if t.state in states and t.value is not None and t.repeat_of is None]
        sign = -1 if self.maximize else 1
        return sorted(found, key=lambda t: (sign * (t.value or 0.0), t.number))

    def of(self, state: str) -> list[Shown]:
        return [t for t in self.trials if t.state == state]

    def axis(self, key: str) -> Axis:
        return next(a for a in self.axes if a.key == key)

    def by_importance(self) -> list[Axis]:
        """Return the parameters, the most important first; without importances, as the study names them."""
        return sorted(self.axes, key=lambda a: -self.importance.get(a.key, -1.0))


def gather(study: Study, said: answer.Answer | None = None) -> Evidence:
    """Return what the study's queue and folders hold at this moment; `said` is the answer where it is known already."""
    found = study.trials()
    said = said or answer.answer(study)
    results = {t.number: read_result(study.trial_folder(t.number)) or {} for t in found}
    runs = {t.number: _run(study.trial_folder(t.number)) for t in found}
    judged = {c.number: c for c in said.candidates}
    trials = [_judged(_shown(t, results[t.number], runs[t.number]), judged.get(t.number), said) for t in found]
    done = [t for t in repeats.complete(found) if math.isfinite(t.values[0])]
    axes = [a for a in (_axis(study, key, trials) for key in study.meta.swept) if a is not None]
    importance, why = importances(done, [a.key for a in axes if len(a.values) > 1])
    chosen = said.best.number if said.best else None
    winner = results[chosen] if chosen is not None else {}
    folder = f"{study.meta.outputs.rstrip('/')}/{study.meta.name}".removeprefix("./")
    return Evidence(
        name=study.meta.name,
        question=study.meta.question,
        folder=folder,
        metric=study.meta.metric,
        maximize=study.meta.maximize,
        trials=trials,
        axes=axes,
        importance=importance,
        said=said.text,
        method=said.method,
        chosen=chosen,
        cheapest=said.cheapest.number if said.cheapest else None,
        no_better=said.no_better(said.best.value, winner.get("baseline", {})) if said.best else "",
        best_file=f"{folder}/{answer.BEST}" if (study.folder / answer.BEST).is_file() else "",
        fronts=said.fronts,
        no_importance=why,
        test={k: v for k, v in winner.get("test", {}).items() if isinstance(v, int | float)},
        baseline=winner.get("baseline", {}),
        fingerprints=sorted({r["data_fingerprint"] for r in results.values() if r.get("data_fingerprint")}),
        facts=_facts([r for r in runs.values() if r]),
        command=shlex.join(["python", "-m", "lorasweep", "-m", *study.meta.overrides]),
        made=time.strftime("%Y-%m-%d %H:%M %z"),
    )


def _run(folder: Path) -> dict[str, Any]:
    """Return what run.json holds, {} where there is none."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf8"))
    except (FileNotFoundError, ValueError):
        return {}


COSTS = (
    *("trainable", "adapter_mb", "train_s", "device_s", "steps"),
    *("peak_gib", "worker_peak_gib", "prefix_saved_s", "packing_saved_s"),
)
"""Fields of Shown that a result or the study's storage names alike."""


def _shown(trial: FrozenTrial, result: Mapping[str, Any], run: Mapping[str, Any]) -> Shown:
    known = {**result, **{k: v for k, v in trial.user_attrs.items() if v is not None}}
    value = trial.values[0] if trial.values else None
    if value is None and trial.state == TrialState.PRUNED:
        value = result.get("metric", {}).get("value")
    began, ended = trial.datetime_start, trial.datetime_complete
    paid: dict[str, Any] = {k: known.get(k) for k in COSTS}
    return Shown(
        number=trial.number,
        state=trial.state.name,
        point=known.get("swept") or trial.params,
        value=value if value is not None and math.isfinite(value) else None,
        curve=[(s, v) for s, v in sorted(trial.intermediate_values.items()) if math.isfinite(v)],
        began_s=began.timestamp() if began else None,
        ended_s=ended.timestamp() if ended else None,
        reason=known.get("reason") or "",
        rerun=result.get("rerun", ""),
        seed=run.get("seed"),
        repeat_of=known.get("repeat_of"),
        **paid,
    )


def _judged(trial: Shown, found: answer.Candidate | None, said: answer.Answer) -> Shown:
    """Return a trial with what the answer says of it: its mean over seeds, how sure that is, how it stands."""
    if found is None:
        return trial
    words = {None: "", True: "not distinguishable", False: "distinguishable"}
    standing = "best" if said.best and said.best.number == found.number else words[found.alike]
    notes = [standing] if standing else []
    if said.cheapest and said.cheapest.number == found.number:
        notes.append("cheapest within one standard error")
    if found.repeated:
        notes.append(found.over)
    elif said.best and said.best.repeated:
        notes.append("one seed")
    standing = "; ".join(notes)
    value = found.value if math.isfinite(found.value) else None
    return replace(trial, value=value, interval=str(found.interval or ""), standing=standing)


def _facts(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what the trials ran with; where they differ, each with the number of trials."""
    found: dict[str, Counter[str]] = {}
    for run in runs:
        for name, text in {
            **run.get("versions", {}),
            **{k: run.get(k) for k in ("python", "machine", "commit")},
        }.items():
            if text:
                found.setdefault(name, Counter())[str(text)] += 1
    return {
        name: next(iter(seen)) if len(seen) == 1 else ", ".join(f"{text} ({n} trials)" for text, n in seen.items())
        for name, seen in found.items()
    }


def _axis(study: Study, key: str, trials: Sequence[Shown]) -> Axis | None:
    """Return a parameter's axis, None where no finished trial sets it."""
    values = {str(t.point[key]): t.point[key] for t in trials if key in t.point and t.value is not None}
    if not values:
        return None
    found = list(values.values())
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in found):
        names = [str(n) for d in study.space.dimensions if d.key == key for n in d.names]
        order = {name: i for i, name in enumerate(names)}
        found.sort(key=lambda v: (order.get(str(v), len(order)), str(v)))
        return Axis(key=key, numeric=False, log=False, values=found)
    found.sort()
    dimension = next((d for d in study.space.dimensions if d.key == key), None)
    wide = found[0] > 0 and found[-1] / found[0] >= WIDE
    log = dimension.log if dimension and not dimension.names else wide
    return Axis(key=key, numeric=True, log=bool(log and found[0] > 0), values=found)


def importances(done: Sequence[FrozenTrial], keys: Sequence[str]) -> tuple[dict[str, float], str]:
    """Return each parameter's share of the metric's spread by fANOVA, the largest first, and what is missing or why."""
    if len(keys) < 2:
        return {}, "Only one parameter varies, so all the difference between trials is its own, or noise."
    if len(done) < LEAST_FOR_IMPORTANCE:
        return {}, f"Importance needs at least {LEAST_FOR_IMPORTANCE} finished trials; there are {len(done)}."
    always = [k for k in keys if all(k in t.params for t in done) and len({str(t.params[k]) for t in done}) > 1]
    values = [t.values[0] for t in done]
    if not always or max(values) == min(values):
        return {}, "All finished trials have the same metric, or no parameter is set in all of them."
    memory = optuna.create_study()
    memory.add_trials([_scored(t, always) for t in done[-MOST_FOR_IMPORTANCE:]])
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=0)
    found = optuna.importance.get_param_importances(memory, evaluator=evaluator, params=always)
    missing = [k for k in keys if k not in always]
    why = f"Not rated, because not every trial sets it: {', '.join(missing)}." if missing else ""
    return dict(sorted(found.items(), key=lambda item: -item[1])), why


def _scored(trial: FrozenTrial, keys: Sequence[str]) -> FrozenTrial:
    """Return a finished trial with these parameters and its primary metric alone.

    What is searched on a logarithmic scale stands there by its logarithm: the forest would look at the upper end alone.
    """
    params, distributions = {k: trial.params[k] for k in keys}, {k: trial.distributions[k] for k in keys}
    for key, known in distributions.items():
        if isinstance(known, FloatDistribution | IntDistribution) and known.log:
            params[key] = math.log(params[key])
            distributions[key] = FloatDistribution(math.log(known.low), math.log(known.high))
    return optuna.create_trial(value=trial.values[0], params=params, distributions=distributions)


def groups(trials: Sequence[Shown], axis: Axis, most: int = 8) -> list[Group]:
    """Return the mean metric of finished trials by value of a parameter, or by bin where it has more than `most`."""
    bins: dict[int, list[Shown]] = {}
    for t in trials:
        if axis.key in t.point and t.value is not None:
            bins.setdefault(place(axis, t.point[axis.key], most), []).append(t)
    return [_group(axis, i, bins[i], len(axis.values) > most and axis.numeric) for i in sorted(bins)]


def place(axis: Axis, value: Any, most: int) -> int:
    """Return the number of the value's bin: its own place while there are few values, equal widths otherwise."""
    if not axis.numeric or len(axis.values) <= most:
        return [str(v) for v in axis.values].index(str(value))
    low, high, at = (math.log(v) if axis.log else v for v in (axis.values[0], axis.values[-1], value))
    return min(most - 1, int((at - low) / (high - low) * most))


def _group(axis: Axis, i: int, members: Sequence[Shown], binned: bool) -> Group:
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
    return "not set" if value is None else str(value)


def duration(seconds: float) -> str:
    """Return seconds in the unit that a person would use."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.2f} h"


def counted(number: int, noun: str) -> str:
    """Return `1 trial`, `2 trials`."""
    return f"{number:,} {noun}" + ("s" if number != 1 else "")
