"""A search space: what varies, between which values, on which conditions; and its points as override strings."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lorasweep.config import compose, spec
from lorasweep.config.overrides import Override, is_of_the_study, key_of, override_text, parse
from lorasweep.config.paths import PATHS
from lorasweep.errors import ConfigError, did_you_mean
from lorasweep.search import condition
from lorasweep.search.dimension import Dimension, Value, of_override, of_yaml, parsed_value, plain, same, value_problems

Lookup = Callable[[str], Any]
MOST_COMBINATIONS = 10_000


@dataclass(frozen=True)
class Space:
    fixed: tuple[str, ...] = ()
    """Overrides that do not vary."""
    dimensions: tuple[Dimension, ...] = ()
    """In an order in which conditions only look back."""
    settled: Mapping[str, Any] = field(default_factory=dict)
    """What the other keys that conditions name are configured to; a conditional key that is not set has it too."""

    @property
    def keys(self) -> list[str]:
        return [d.key for d in self.dimensions]

    def applies(self, dimension: Dimension, point: Mapping[str, Any], lookup: Lookup | None = None) -> bool:
        """Return whether a dimension's condition holds at a point; `lookup` in place of `settled`."""
        if dimension.when is None:
            return True
        settled = lookup or self.settled.get
        return condition.holds(dimension.when, lambda key: point[key] if key in point else settled(key))

    def grid(self) -> list[dict[str, Value]]:
        """Return every point once, the last key varying fastest. Raises ConfigError where a range has no end."""
        problems: list[str] = []
        for d in self.dimensions:
            try:
                d.values()
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        points: list[dict[str, Value]] = [{}]
        for d in self.dimensions:
            values = d.values()
            longer: list[dict[str, Value]] = []
            for point in points:
                longer += [point | {d.key: v} for v in values] if self.applies(d, point) else [point]
            points = longer
        return points

    def points(self, most: int) -> list[dict[str, Value]] | None:
        """Return every point once; None where there are more than `most`, or no end of them."""
        points: list[dict[str, Value]] = [{}]
        for d in self.dimensions:
            values = d.every(most)
            if values is None:
                return None
            points = [q for p in points for q in ([p | {d.key: v} for v in values] if self.applies(d, p) else [p])]
            if len(points) > most:
                return None
        return points

    def corners(self) -> list[dict[str, Value]]:
        """Return few points that together have every choice and both ends of every range, as far as conditions let."""
        points: list[dict[str, Value]] = []
        for d in self.dimensions:
            for value in d.ends():
                point = self._corner(d, value)
                if point is not None and point not in points:
                    points.append(point)
        return points or [{}]

    def _corner(self, wanted: Dimension, value: Value) -> dict[str, Value] | None:
        before = [d for d in self.dimensions if d.key in self._looks_at(wanted)]
        combinations = itertools.product(*(d.ends() for d in before))
        for combination in itertools.islice(combinations, MOST_COMBINATIONS):
            chosen: dict[str, Value] = dict(zip([d.key for d in before], combination, strict=True))
            chosen[wanted.key] = value
            point: dict[str, Value] = {}
            for d in self.dimensions:
                if self.applies(d, point):
                    point[d.key] = chosen.get(d.key, d.ends()[0]) if d.key in chosen else d.ends()[0]
            if wanted.key in point:
                return point
        return None

    def _looks_at(self, dimension: Dimension) -> set[str]:
        """Return the keys that decide whether a dimension applies, directly or through others."""
        found: set[str] = set()
        by_key = {d.key: d for d in self.dimensions}
        for key in condition.keys(dimension.when) if dimension.when else []:
            if key in by_key:
                found |= {key} | self._looks_at(by_key[key])
        return found

    def contains(self, point: Mapping[str, Any]) -> bool:
        """Return whether each value lies in its dimension and no condition speaks against it.

        Keys may be absent; a condition on a key that is absent, though it may vary, is taken as met.
        """
        by_key = {d.key: d for d in self.dimensions}
        for key, value in point.items():
            if key not in by_key or not by_key[key].holds(value):
                return False
            if self._told(by_key[key], point) and not self.applies(by_key[key], point):
                return False
        return True

    def _told(self, dimension: Dimension, point: Mapping[str, Any]) -> bool:
        """Return whether a point says whether a dimension applies."""
        by_key = {d.key: d for d in self.dimensions}
        named = [by_key[k] for k in condition.keys(dimension.when or "true") if k in by_key and k not in point]
        return all(d.when and self._told(d, point) and not self.applies(d, point) for d in named)

    def point(self, trial: spec.TrialSpec) -> dict[str, Value]:
        """Return where a trial lies: its value of each key that varies, and of those that it alone sets.

        The settings say it. A choice goes by its name; that of a whole group stands in the trial's overrides alone.
        """
        own = {key_of(o): o for o in trial.overrides if o not in self.fixed}
        point: dict[str, Value] = {}
        for d in self.dimensions:
            if d.key in own or self.applies(d, point, trial.get):
                point[d.key] = self._seen(d, trial, own.get(d.key))
        further = {key: o for key, o in own.items() if key not in point}
        return point | {
            key: plain(trial.get(key)) if key in spec.known_keys() else self.value_of(o) for key, o in further.items()
        }

    def _seen(self, d: Dimension, trial: spec.TrialSpec, override: str | None) -> Value:
        """Return what a trial has for a dimension; None for a group that it does not choose."""
        value = None if d.key in spec.SECTIONS else d.seen(trial.get(d.key))
        return self.value_of(override) if override is not None and not d.holds(value) else value

    def line(self, point: Mapping[str, Any]) -> list[str]:
        """Return the override strings of a point, what does not vary first."""
        by_key = {d.key: d for d in self.dimensions}
        ordered = [k for k in by_key if k in point] + [k for k in point if k not in by_key]
        texts = [by_key[k].text(point[k]) if k in by_key else override_text(point[k]) for k in ordered]
        return [*self.fixed, *(f"{key}={text}" for key, text in zip(ordered, texts, strict=True))]

    def first_line(self) -> list[str]:
        """Return the override strings of one point. Rules about whole trials hold for it, not for what is fixed."""
        return self.line(self.corners()[0])

    def value_of(self, override: str) -> Value:
        """Return what an override sets as this space sees it: the name of the choice that it writes out, if it does."""
        key = key_of(override)
        value = parsed_value(override)
        for d in self.dimensions:
            if d.key == key and not d.holds(value):
                for name, text in zip(d.names, d.texts, strict=True):
                    if same(parsed_value(f"{key}={text}"), value):
                        return name
        return plain(value)

    def describe(self) -> dict[str, Any]:
        """Return it as JSON-able data, for Space.from_json."""
        dimensions = [_described(d) for d in self.dimensions]
        return {"fixed": list(self.fixed), "dimensions": dimensions, "settled": dict(self.settled)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Space":
        """Return the space that `describe` described."""
        dimensions: list[Dimension] = []
        for described in data.get("dimensions", []):
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}
            dimensions.append(Dimension(**fields))
        return Space(tuple(data.get("fixed", [])), tuple(dimensions), dict(data.get("settled", {})))


def differences(old: Space, new: Space) -> list[str]:
    """Return what the second space has otherwise, in words, a key a line."""
    was, now = _shown(old), _shown(new)
    return [
        f"{key}: was {was.get(key, 'not set')}, is {now.get(key, 'not set')}"
        for key in dict.fromkeys([*was, *now])
        if was.get(key) != now.get(key)
    ]


def _shown(space: Space) -> dict[str, str]:
    fixed = [Override.of(o) for o in space.fixed]
    own = {key: text for key, text in fixed if not is_of_the_study(key)}
    return own | {d.key: str(d) for d in space.dimensions}


def _described(dimension: Dimension) -> dict[str, Any]:
    """Return the fields that are not at their defaults, lists in place of tuples, as JSON has them."""
    set_fields = {k: v for k, v in asdict(dimension).items() if v != getattr(Dimension, k, "")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in set_fields.items()}


# --- reading ---------------------------------------------------------------------------------------------------------


def read(overrides: Sequence[str], space: Mapping[str, Any] | None = None) -> tuple[Space, list[str]]:
    """Return the space of overrides, some with sweeps, and of a sweep file's `space`; and what is wrong with them.

    An override wins over the file and over an earlier one with its key. What is wrong is left out of the space.
    """
    parsed, problems = parse(overrides)
    given = {o.get_key_element(): o for o in parsed}
    fixed = tuple(str(o.input_line) for o in given.values() if not o.is_sweep_override())
    made = [_study_key_problem(o.key_or_group) or of_override(o) for o in given.values() if o.is_sweep_override()]
    made += [_study_key_problem(k) or of_yaml(k, entry) for k, entry in (space or {}).items() if k not in given]
    problems += itertools.chain.from_iterable(wrong for _, wrong in made)
    found = [d for d, _ in made if d is not None]
    found = [_with_sound_condition(d, found, problems) for d in found]
    ordered = _in_order(found, problems)
    return Space(fixed, tuple(ordered), _settled(ordered, fixed, problems)), problems


def _study_key_problem(key: str) -> tuple[None, list[str]] | None:
    if not is_of_the_study(key):
        return None
    hint = f""", a name with a comma in quotes: {key}="'a,b'\"""" if key in PATHS else ""
    return None, [f"{key}: belongs to the study as a whole and cannot vary; give it one value{hint}"]


def _with_sound_condition(d: Dimension, all_of_them: Sequence[Dimension], problems: list[str]) -> Dimension:
    """Return the dimension, without its condition where that is wrong."""
    if d.when is None:
        return d
    try:
        keys = condition.keys(d.when)
    except ValueError as error:
        problems.append(f"{d.key}: when {error}; write e.g. \"lora.r > 4 and lora.use_rslora\", got '{d.when}'")
        return replace(d, when=None)
    swept = {other.key: other for other in all_of_them}
    wrong: list[str] = []
    for key in keys:
        wrong += [] if key in swept else _unswept_problems(d.key, key, list(swept))
    if not wrong:
        for key, constant in condition.compared(d.when):
            wrong += _never(d.key, key, swept.get(key), constant)
    problems += wrong
    return replace(d, when=None) if wrong else d


def _unswept_problems(key: str, named: str, swept: Sequence[str]) -> list[str]:
    """Return why a condition cannot name a key that does not vary."""
    if named in spec.SECTIONS:
        return [f"{key}: when names the group {named}, which does not vary; name a key, e.g. {named}.NAME"]
    if named not in spec.known_keys():
        return [f"{key}: when names {named}, no such key{did_you_mean(named, spec.known_keys())}"]
    section = named.split(".")[0]
    groups = [g for g in swept if g == section or (g == "task_type" and section == "model")]
    return [f"{key}: when names {named}, which the varying group {g} sets; name {g} itself" for g in groups]


def _never(key: str, named: str, dimension: Dimension | None, constant: Any) -> list[str]:
    """Return the problem of a comparison with something that a key never has."""
    if dimension is None or not dimension.names:
        return [f"{key}: when compares {named} with {constant!r}; {p}" for p in value_problems(named, constant)]
    if dimension.holds(constant):
        return []
    hint = did_you_mean(str(constant), [str(n) for n in dimension.names])
    return [f"{key}: when compares {named} with {constant!r}, which it never is{hint}"]


def _in_order(found: Sequence[Dimension], problems: list[str]) -> list[Dimension]:
    """Return the dimensions so that conditions look back only, else in the order given."""
    waiting = list(found)
    ordered: list[Dimension] = []
    while waiting:
        keys = {d.key for d in waiting}
        free = [d for d in waiting if not keys.intersection(condition.keys(d.when) if d.when else [])]
        if not free:
            circle = ", ".join(sorted(keys))
            problems.append(f"{waiting[0].key}: the conditions of {circle} wait for each other; drop one `when`")
            return ordered + [replace(d, when=None) for d in waiting]
        ordered.append(free[0])
        waiting.remove(free[0])
    return ordered


def _settled(found: Sequence[Dimension], fixed: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Return what the configuration has for the keys that conditions name, where they may be left unset."""
    always = {d.key for d in found if d.when is None}
    in_conditions = itertools.chain.from_iterable(condition.keys(d.when) for d in found if d.when)
    named = dict.fromkeys(key for key in in_conditions if key not in always)
    if not named or problems:
        return {}
    try:
        tree = compose.settings(fixed)
    except ConfigError as error:
        problems += error.problems
        return {}
    out = {}
    for key in named:
        section, _, name = key.partition(".")
        out[key] = tree[section].get(name) if name else tree.get(section)
    return out
