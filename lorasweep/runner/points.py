"""From a request to its points: all that is known of a study before a model or a data set is looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.config import compose
from lorasweep.config.fields import Affects
from lorasweep.config.overrides import key_of
from lorasweep.config.spec import SearchSpec, TrialSpec, keys_affecting
from lorasweep.errors import ConfigError
from lorasweep.runner.request import Request
from lorasweep.search import choice, samplers
from lorasweep.search.choice import DEFAULT_TRIALS
from lorasweep.search.dimension import Value
from lorasweep.search.space import Space, read
from lorasweep.study import baselines, same_point
from lorasweep.study.meta import Entry, search_spec

SHARED = ("model", "task_type", "data")
"""Groups that all trials of a study with baselines have in common."""
MOST_WORDS = 2
"""So many times as many points as trials are counted: some may be others in other words."""


@dataclass(frozen=True)
class Points:
    """The trials that a request asks for."""

    space: Space
    specs: list[TrialSpec]
    """The trials to check: all of a grid, or those at the ends of a space that is sampled."""
    entries: list[Entry]
    """The queue: all points of a grid, or a sampler's blanks."""
    search: SearchSpec
    """How the study searches, with a choice in place of each auto."""
    said: Sequence[str] = ()
    """How its points are drawn, a sentence each; nothing of a plain grid."""
    wanted: int = 0
    """How many trials are asked for; 0: all of a grid."""
    notes: Sequence[str] = ()
    """What a person may want to know of them, a sentence each."""

    def fewer(self) -> str:
        """Return a sentence where there are fewer points than trials are asked for, or nothing."""
        count = sum(not entry.baseline for entry in self.entries)
        if count >= self.wanted or not self.space.keys:
            return ""
        points = f"are {count} points" if count != 1 else "is 1 point"
        keys = ", ".join(self.space.keys)
        return f"{keys}: there {points} to try, so the study ends early, after {count} of {self.wanted} trials"


def points(request: Request) -> Points:
    """Return the trials that are asked for. Raises ConfigError with all that is wrong with them."""
    space, problems = read(request.overrides, request.space)
    try:
        wanted = search_spec(_settings(space)["search"])
        search = choice.settled(wanted, space)
        problems += _question_problems(search, space)
        lines, entries = _grid(space, search) if search.sampler == "grid" else _sampled(space, search, problems)
        beside = _baselines(space, search) if search.baselines and not problems else []
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    specs = compose.compose_points([*lines, *(entry.overrides or [] for entry in beside)], problems)
    said = choice.said(wanted, search)
    return Points(space, specs, [*entries, *beside], search, said, _wanted(search))


def _baselines(space: Space, search: SearchSpec) -> list[Entry]:
    """Return the trials that search.baselines asks for. Raises ConfigError where the study has no one base or data."""
    shared = [key for key in space.keys if key in keys_affecting(Affects.BASE) or key.partition(".")[0] in SHARED]
    if shared:
        raise ConfigError(
            [
                f"search.baselines: are of one base and one data set, and the study sweeps {', '.join(shared)}; sweep "
                "that in studies of their own, or leave search.baselines out"
            ]
        )
    spec = compose.compose_trial(space.fixed)
    names = dict.fromkeys(search.baselines or [])
    return [Entry(baselines.overrides(n, space.fixed, spec), {"baseline": n}, baseline=n) for n in names]


def _wanted(search: SearchSpec) -> int:
    return search.trials or (0 if search.sampler == "grid" else DEFAULT_TRIALS)


def _settings(space: Space) -> dict[str, Any]:
    """Return the settings that do not vary. Raises ConfigError with all that is wrong, with the study's own or with the
    trials'.
    """
    try:
        found = compose.settings(space.fixed)
        search_spec(found["search"])
        return found
    except ConfigError:
        compose.compose_trial(space.line(space.corners()[0]))
        raise


def _question_problems(search: SearchSpec, space: Space) -> list[str]:
    asked = search.question if isinstance(search.question, list) else []
    vary = ", ".join(space.keys) or "nothing"
    return [f"search.question: '{key}' does not vary here; {vary} does" for key in asked if key not in space.keys]


def _grid(space: Space, search: SearchSpec) -> tuple[list[list[str]], list[Entry]]:
    recipes = _recipes(space, search)
    entries = [Entry(space.line(given) + extra, given) for given, extra in recipes]
    done = [given for given, extra in recipes if not extra]
    points = space.grid()[: search.trials]
    entries += [Entry(space.line(p), dict(p)) for p in points if p not in done]
    return [entry.overrides or [] for entry in entries], entries


def _sampled(space: Space, search: SearchSpec, problems: list[str]) -> tuple[list[list[str]], list[Entry]]:
    """Return lines at the ends of the space, and as many entries as there will be trials."""
    problems += samplers.problems(search, space)
    if not space.keys and not problems:
        problems.append(f"search.sampler: {search.sampler} needs something to vary, e.g. lora.r=4,8,16")
    wanted = _wanted(search)
    recipes = _recipes(space, search)[:wanted]
    lines = [space.line(point) for point in space.corners()] + [space.line(given) + extra for given, extra in recipes]
    entries = [Entry(given=given, extra=extra) for given, extra in recipes]
    every = space.points(MOST_WORDS * wanted)
    if every is not None and not problems:  # a point is trained once
        distinct = {same_point.identity(spec) for spec in compose.compose_points([space.line(p) for p in every])}
        wanted = min(wanted, len(distinct) + sum(bool(extra) for _, extra in recipes))
    return lines, entries + [Entry()] * (wanted - len(recipes))


def _recipes(space: Space, search: SearchSpec) -> list[tuple[dict[str, Value], list[str]]]:
    return [split_point(space, text.split()) for text in search.enqueue or []]


def split_point(space: Space, overrides: Sequence[str]) -> tuple[dict[str, Value], list[str]]:
    """Return the values that overrides give to the space's keys, and the overrides it has no place for."""
    given, extra = {}, []
    for override in overrides:
        key = key_of(override)
        value = space.value_of(override) if "=" in override else None
        if key in space.keys and space.contains({key: value}):
            given[key] = value
        else:
            extra.append(override)
    return given, extra
