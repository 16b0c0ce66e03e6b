"""From overrides to a plan: the space, the points and what is known to fail."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasweep.errors import ConfigError
from lorasweep.runner import launchers

# --- making a study --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A study that is valid, and not yet made."""

    folder: Path
    meta: Any
    queue: list[Any]
    loaded: Mapping[str, Any]
    first: Any
    """The spec of its first trial."""
    never: Sequence[str] = ()
    """What is to be said of points that need more memory than allowed, a line each."""


def plan(overrides: Sequence[str], space: Mapping[str, Any] | None = None, question: str = "") -> Plan:
    """Validate a study. Raises ConfigError, with the problems of all points, before anything is written."""
    from lorasweep.config import compose
    from lorasweep.credentials import keep_credentials, keep_password
    from lorasweep.runner import preflight
    from lorasweep.search.space import read
    from lorasweep.study import provenance
    from lorasweep.study.meta import StudyMeta, new_name
    from lorasweep.tasks.task import maximize as better_when_larger
    from lorasweep.training import workload

    overrides = [keep_password(keep_credentials(o)) for o in overrides]
    own = [o for o in overrides if launchers.is_launchers(o)]
    overrides = [_from_anywhere(o) for o in overrides]
    found, problems = read([o for o in overrides if o not in own], space)
    lines, entries = _points(found, problems)
    specs = compose.compose_points(lines, problems)
    loaded = preflight.preflight(specs, here := not launchers.is_elsewhere(own))
    never = _never(specs, loaded, found.keys) if here else []
    first = specs[0]
    metric = _shared_metric([s.task_type.primary or loaded[workload.key(s)].task.primary for s in specs])
    search = asdict(first.search)
    search["warm_start"] = [str(Path(f).resolve()) for f in first.search.warm_start or []] or None
    name = first.study or new_name(found.keys)
    direction = first.search.direction
    maximize = better_when_larger(metric) if direction == "auto" else direction == "maximize"
    teachers(first.search, metric, maximize)
    meta = StudyMeta(
        name=name,
        swept=found.keys,
        overrides=[o for o in overrides if o not in own],
        metric=metric,
        maximize=maximize,
        created=provenance.now(),
        question=first.search.question or question,
        space=found.describe(),
        search=search,
        outputs=first.outputs,
        launcher=own,
        storage=search["storage"],
    )
    return Plan(
        Path(first.outputs).resolve() / name,
        meta,
        entries,
        loaded,
        first,
        never,
    )


def _never(specs: Sequence[Any], loaded: Mapping[str, Any], swept: Sequence[str]) -> list[str]:
    """Return a line for each point that search.max_memory_gib rules out. Raises ConfigError where it leaves none."""
    from lorasweep.memory import estimate
    from lorasweep.training import workload

    lines = []
    for number, spec in enumerate(specs):
        work = loaded[workload.key(spec)]
        why = estimate.hopeless(spec, work.task, work.tokenizer, work.examples)
        if why:
            point = " ".join(o for o in spec.overrides if o.split("=")[0] in swept) or "as it is"
            lines.append(f"point {number} ({point}) {why}")
    if lines and len(lines) == len(specs):
        raise ConfigError([f"search.max_memory_gib: no trial is left; {line}" for line in lines])
    return lines


def _from_anywhere(override: str) -> str:
    """Return an override that names a file or folder here by its full path: workers may run elsewhere."""
    key, _, value = override.partition("=")
    if key in ("data.path", "model.pretrained") and value and Path(value).exists():
        return f"{key}={Path(value).resolve()}"
    return override


def _points(found: Any, problems: list[str]) -> tuple[list[list[str]], list[Any]]:
    """Return the override lines to validate and the queue's entries: all points of a grid, or a sampler's blanks."""
    from lorasweep.config import compose
    from lorasweep.search import samplers
    from lorasweep.study.meta import Entry
    from lorasweep.study.study import DEFAULT_TRIALS

    try:
        base = compose.compose_trial(found.fixed).search
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    recipes = [split_point(found, text.split()) for text in base.enqueue or []]
    lines = [found.line(given) + extra for given, extra in recipes]
    if base.sampler == "grid":
        try:
            points = found.grid()[: base.trials]
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from None
        entries = [Entry(line, given) for line, (given, _) in zip(lines, recipes, strict=True)]
        done = [given for given, extra in recipes if not extra]
        entries += [Entry(found.line(p), dict(p)) for p in points if p not in done]
        return [e.overrides or [] for e in entries], entries
    problems += samplers.problems(base, found)
    if not found.keys and not problems:
        problems.append(f"search.sampler: {base.sampler} needs something to vary, e.g. lora.r=4,8,16")
    given_first = [Entry(given=given, extra=extra) for given, extra in recipes]
    blanks = [Entry()] * ((base.trials or DEFAULT_TRIALS) - len(recipes))
    return [found.line(p) for p in found.corners()] + lines, given_first + blanks


def split_point(found: Any, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values that overrides give to the space's keys, and the overrides it has no place for."""
    given, extra = {}, []
    for override in overrides:
        key = override.split("=")[0]
        value = found.value_of(override) if "=" in override else None
        if key in found.keys and found.contains({key: value}):
            given[key] = value
        else:
            extra.append(override)
    return given, extra


def _shared_metric(metrics: Sequence[str]) -> str:
    """Return the metric that ranks all trials. Raises ConfigError where they have different ones."""
    found = list(dict.fromkeys(metrics))
    if len(found) > 1:
        raise ConfigError(
            [f"task_type: trials of one study are ranked by one metric, got {', '.join(found)}; sweep them apart"]
        )
    return found[0]


def teachers(search: Any, metric: str, maximize: bool) -> list[Any]:
    """Return the studies of search.warm_start. Raises ConfigError where one is missing or judged otherwise."""
    from lorasweep.study.study import Study

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
