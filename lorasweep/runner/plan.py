"""From a request to a plan: the space, its points, what is checked of them, and what study.json will hold."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorasweep.config.overrides import key_of
from lorasweep.config.spec import SearchSpec, TrialSpec
from lorasweep.data import dataset
from lorasweep.errors import ConfigError
from lorasweep.lora import peft_config
from lorasweep.memory import estimate
from lorasweep.runner import launchers, room
from lorasweep.runner.points import Points, points
from lorasweep.runner.preflight import preflight
from lorasweep.runner.request import Request
from lorasweep.search.space import Space
from lorasweep.study import provenance
from lorasweep.study.meta import Entry, StudyMeta, new_name
from lorasweep.study.study import Study
from lorasweep.tasks.metric import Metric
from lorasweep.training import learning_rate, workload
from lorasweep.training.workload import Workload

# --- making a study --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A study that is valid, and not yet made."""

    folder: Path
    meta: StudyMeta
    queue: list[Entry]
    loaded: Mapping[str, Workload]
    first: TrialSpec
    """The spec of its first trial."""
    never: Sequence[str] = ()
    """Notes on points that need more memory than allowed, a line each."""
    notes: Sequence[str] = ()
    """What a person may want to know of what the trials adapt."""


def plan(request: Request, asked: Points | None = None) -> Plan:
    """Validate a study. Raises ConfigError, with the problems of all points, before anything is written.

    `asked` is what `points` has made of the request, where that has been done.
    """
    asked = asked or points(request)
    here = not launchers.is_elsewhere(request.launcher)
    is_alone = not request.launcher and asked.specs[0].search.workers == 1
    keep = is_alone and not launchers.is_in_small_container()
    loaded = preflight(asked.specs, here, keep)
    never = _never(asked.specs, loaded, asked.space.keys) if here else []
    first = asked.specs[0]
    full = room.problem(room.expected_bytes(asked.specs, loaded, len(asked.entries)), Path(first.outputs).resolve())
    if full and here:
        raise ConfigError(full)
    metric = loaded[workload.key(first)].task.metric(_shared_metric(asked.specs, loaded))
    meta = _meta(request, asked.space, first, metric)
    meta = replace(meta, data=_data(asked.specs, loaded))
    notes = [*_notes(asked.specs, loaded), *_rates(asked.specs, loaded)]
    return Plan(Path(meta.outputs).resolve() / meta.name, meta, asked.entries, loaded, first, never, notes)


# --- what is known of them before they run ---------------------------------------------------------------------------


def _shared_metric(specs: Sequence[TrialSpec], loaded: Mapping[str, Workload]) -> str:
    """Return the metric that ranks all trials. Raises ConfigError where they have different ones."""
    metrics = list(dict.fromkeys(s.task_type.primary or loaded[workload.key(s)].task.primary for s in specs))
    if len(metrics) > 1:
        raise ConfigError(
            [f"task_type: trials of one study are ranked by one metric, got {', '.join(metrics)}; sweep them apart"]
        )
    return metrics[0]


def _never(specs: Sequence[TrialSpec], loaded: Mapping[str, Workload], swept: Sequence[str]) -> list[str]:
    """Return a line for each point that search.max_memory_gib rules out. Raises ConfigError where it leaves none."""
    lines = []
    for number, spec in enumerate(specs):
        work = loaded[workload.key(spec)]
        why = estimate.hopeless(spec, work.task, work.tokenizer, work.examples)
        if why:
            point = " ".join(o for o in spec.overrides if key_of(o) in swept) or "as it is"
            lines.append(f"point {number} ({point}) {why}")
    if lines and len(lines) == len(specs):
        raise ConfigError([f"search.max_memory_gib: no trial is left; {line}" for line in lines])
    return lines


def _notes(specs: Sequence[TrialSpec], loaded: Mapping[str, Workload]) -> list[str]:
    """Return what the trials' presets find only a part of, each once."""
    different = {(workload.key(s), str(s.lora.target_modules)): s for s in specs}
    found = [peft_config.notes(s.lora, s.task_type, loaded[group].skeleton) for (group, _), s in different.items()]
    return list(dict.fromkeys(note for notes in found for note in notes))


def _rates(specs: Sequence[TrialSpec], loaded: Mapping[str, Workload]) -> list[str]:
    """Return what train.learning_rate=auto came to over the points; nothing where all rates are given."""
    works = [(s, loaded[workload.key(s)]) for s in specs if s.train.learning_rate == "auto"]
    rates = {learning_rate.peak(spec, work.task, work.skeleton.model) for spec, work in works}
    span = " to ".join(f"{rate:.2g}" for rate in sorted({min(rates), max(rates)})) if rates else ""
    return [f"train.learning_rate=auto came to {span}"] if rates else []


# --- study.json ------------------------------------------------------------------------------------------------------


def _meta(request: Request, space: Space, first: TrialSpec, metric: Metric) -> StudyMeta:
    """Return what study.json will hold. Raises ConfigError where search.warm_start names a study that cannot teach."""
    direction = first.search.direction
    maximize = metric.maximize if direction == "auto" else direction == "maximize"
    teachers(first.search, metric.name, maximize)
    low, high = (end if math.isfinite(end) else None for end in metric.bounds)
    warm_start = [str(Path(folder).resolve()) for folder in first.search.warm_start or []]
    return StudyMeta(
        name=first.study or new_name(space.keys),
        swept=space.keys,
        overrides=request.overrides,
        metric=metric.name,
        maximize=maximize,
        unit=metric.unit,
        low=low,
        high=high,
        created=provenance.now(),
        question=first.search.question or request.question,
        space=space.describe(),
        search=asdict(first.search) | {"warm_start": warm_start or None},
        outputs=first.outputs,
        launcher=request.launcher,
        storage=first.search.storage,
    )


def _data(specs: Sequence[TrialSpec], loaded: Mapping[str, Workload]) -> list[dict[str, Any]]:
    """Return what study.json holds of each data set, so that a change of a file is seen when the study goes on."""
    found: dict[str, dict[str, Any]] = {}
    for spec in specs:
        fingerprint = loaded[workload.key(spec)].data.fingerprint
        seen = {"fingerprint": fingerprint, "files": dataset.files_seen(spec.data)}
        found.setdefault(json.dumps(asdict(spec.data)), {"overrides": list(spec.overrides), **seen})
    return list({entry["fingerprint"]: entry for entry in reversed(found.values())}.values())


def teachers(search: SearchSpec, metric: str, maximize: bool) -> list[Study]:
    """Return the studies of search.warm_start. Raises ConfigError where one is missing or judged otherwise."""
    found, problems = [], []
    for folder in search.warm_start or []:
        try:
            other = Study.open(Path(folder).resolve())
        except ConfigError as error:
            problems += [f"search.warm_start: {p}" for p in error.problems]
            continue
        if (other.meta.metric, other.meta.maximize) != (metric, maximize):
            problems.append(f"search.warm_start: {folder} is ranked by {other.meta.metric}, not {metric}")
        elif (other.search.objectives or []) != (search.objectives or []):
            problems.append(f"search.warm_start: {folder} has other search.objectives: {other.search.objectives}")
        found.append(other)
    if problems:
        raise ConfigError(problems)
    return found
