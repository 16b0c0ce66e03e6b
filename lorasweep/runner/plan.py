"""From a request to a plan: the space, its points, what is checked of them, and what study.json will hold."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lorasweep.config.overrides import key_of
from lorasweep.config.spec import SearchSpec, TrialSpec
from lorasweep.errors import ConfigError
from lorasweep.runner import forecast, launchers, room, torch_calls
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
    first: TrialSpec
    """The spec of its first trial."""
    disk_bytes: int = 0
    """The most that it writes."""
    never: Sequence[str] = ()
    """Notes on points that need more memory than allowed, a line each."""
    notes: Sequence[str] = ()
    """What a person may want to know of how the models are used, and of what the trials adapt of them."""
    said: Sequence[str] = ()
    """How its points are drawn, a sentence each."""
    point_notes: Sequence[str] = ()
    """What a person may want to know of the points, a sentence each."""


Look = Callable[[Points, bool, bool], Findings]
"""The pre-flight, as torch_calls.look: here or in another process."""


def plan(request: Request, asked: Points | None = None, look: Look = torch_calls.look_here) -> Plan:
    """Validate a study. Raises ConfigError, with the problems of all points, before anything is written.

    `asked` is what `points` has made of the request, where that has been done.
    """
    asked = asked or points(request)
    outputs = Path(asked.specs[0].outputs).resolve()
    if outputs.is_file():
        raise ConfigError([f"outputs: {outputs} is a file; name a folder"])
    here = not launchers.is_elsewhere(request.launcher)
    found = look(asked, here, not request.launcher)
    kept = _kept(asked, found.first_alike)
    asked = _each_once(asked, found.first_alike, kept)
    first = asked.specs[0]
    expected_s = forecast.seconds([found.trials_s[i] for i in kept], asked.entries, first.search, found.divided)
    most_bytes = room.expected_bytes(asked.specs, found.adapter_bytes, found.full_bytes, len(asked.entries))
    full = room.problem(most_bytes, outputs)
    if full and here:
        raise ConfigError(full)
    meta = replace(_meta(request, asked, first, found), expected_s=expected_s)
    folder = Path(meta.outputs).resolve() / meta.name
    return Plan(folder, meta, asked.entries, first, most_bytes, found.never, found.notes, asked.said, asked.notes)


def _kept(asked: Points, first_alike: Sequence[int]) -> list[int]:
    """Return the numbers of the points that stay: of a grid each once, in whatever words it came.

    `first_alike` has for each point the number of the first one that is the same on the model.
    """
    is_grid = all(entry.overrides is not None for entry in asked.entries)
    return sorted(set(first_alike)) if is_grid else list(range(len(asked.specs)))


def _each_once(asked: Points, first_alike: Sequence[int], kept: Sequence[int]) -> Points:
    """Return the points that stay, with what is to be said of them."""
    notes = []
    if len(kept) < len(asked.specs):
        for number, first in enumerate(first_alike):
            if first != number:
                one, other = (_in_words(asked.specs[i], asked.space) for i in (number, first))
                notes.append(f"{one} is the point {other} in other words: it is trained once")
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
