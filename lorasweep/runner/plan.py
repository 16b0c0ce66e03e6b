"""From a request to a plan: the space, its points, what is checked of them, and what study.json will hold."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorasweep.training.workload import Workload

from lorasweep.config.overrides import key_of
from lorasweep.config.spec import SearchSpec, TrialSpec
from lorasweep.errors import ConfigError
from lorasweep.runner import launchers
from lorasweep.runner.findings import Findings
from lorasweep.runner.points import Points, points
from lorasweep.runner.request import Request
from lorasweep.search.space import Space
from lorasweep.study import provenance
from lorasweep.study.meta import Entry, StudyMeta, new_name
from lorasweep.study.study import Study

# --- making a study --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A study that is valid, and not yet made."""

    folder: Path
    meta: StudyMeta
    queue: list[Entry]
    loaded: "Mapping[str, Workload]"
    """What the pre-flight has loaded in this process."""
    first: TrialSpec
    """The spec of its first trial."""
    never: Sequence[str] = ()
    """Notes on points that need more memory than allowed, a line each."""
    notes: Sequence[str] = ()
    """What a person may want to know of how the models are used, and of what the trials adapt of them."""
    said: Sequence[str] = ()
    """How its points are drawn, a sentence each."""
    point_notes: Sequence[str] = ()
    """What a person may want to know of the points, a sentence each."""


def plan(request: Request, asked: Points | None = None) -> Plan:
    """Validate a study. Raises ConfigError, with the problems of all points, before anything is written.

    `asked` is what `points` has made of the request, where that has been done.
    """
    from lorasweep.runner import forecast, preflight, rehearsal, room  # load torch

    asked = asked or points(request)
    here = not launchers.is_elsewhere(request.launcher)
    is_alone = not request.launcher and asked.specs[0].search.workers == 1
    keep = is_alone and not launchers.is_in_small_container()
    loaded = preflight.preflight(asked.specs, here, keep)
    found = preflight.findings(asked.specs, loaded, asked.space.keys, here)
    asked = _each_once(asked, found.first_alike)
    expected_s = forecast.seconds(asked.specs, asked.entries, loaded, rehearsal.kind)
    first = asked.specs[0]
    full = room.problem(room.expected_bytes(asked.specs, loaded, len(asked.entries)), Path(first.outputs).resolve())
    if full and here:
        raise ConfigError(full)
    meta = replace(_meta(request, asked, first, found), expected_s=expected_s)
    folder = Path(meta.outputs).resolve() / meta.name
    return Plan(folder, meta, asked.entries, loaded, first, found.never, found.notes, asked.said, asked.notes)


def _each_once(asked: Points, first_alike: Sequence[int]) -> Points:
    """Return the points with what is to be said of them; of a grid each once, in whatever words it came.

    `first_alike` has for each point the number of the first one that is the same on the model.
    """
    notes = []
    if all(entry.overrides is not None for entry in asked.entries):
        for number, first in enumerate(first_alike):
            if first != number:
                one, other = (_in_words(asked.specs[i], asked.space) for i in (number, first))
                notes.append(f"{one} is the point {other} in other words: it is trained once")
        kept = sorted(set(first_alike))
        asked = replace(asked, specs=[asked.specs[i] for i in kept], entries=[asked.entries[i] for i in kept])
    return replace(asked, notes=[*notes, *filter(None, [asked.fewer()])])


def _in_words(spec: TrialSpec, space: Space) -> str:
    return " ".join(o for o in spec.overrides if key_of(o) in space.keys)


# --- study.json ------------------------------------------------------------------------------------------------------


def _meta(request: Request, asked: Points, first: TrialSpec, found: Findings) -> StudyMeta:
    """Return what study.json will hold. Raises ConfigError where search.warm_start names a study that cannot teach."""
    space, search = asked.space, asked.search
    maximize = found.maximize if search.direction == "auto" else search.direction == "maximize"
    teachers(search, found.metric, maximize)
    low, high = (end if math.isfinite(end) else None for end in found.bounds)
    warm_start = [str(Path(folder).resolve()) for folder in search.warm_start or []]
    return StudyMeta(
        name=first.study or new_name(space.keys),
        swept=space.keys,
        overrides=request.overrides,
        data=found.data,
        metric=found.metric,
        maximize=maximize,
        unit=found.unit,
        low=low,
        high=high,
        created=provenance.now(),
        question=_question(search) or request.question,
        space=space.describe(),
        search=asdict(search) | {"warm_start": warm_start or None},
        outputs=first.outputs,
        launcher=request.launcher,
        storage=search.storage,
    )


def _question(search: SearchSpec) -> str:
    if isinstance(search.question, str):
        return search.question
    return f"Which {', which '.join(search.question)}?" if search.question else ""


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
