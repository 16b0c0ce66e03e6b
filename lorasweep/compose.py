"""Override strings and conf/ to a TrialSpec. Hydra's compose API lives here: no later file sees a DictConfig."""

import copy
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lorasweep import spec
from lorasweep.errors import ConfigError, did_you_mean

NOT_PART_OF_A_TRIAL = ("study", "outputs", "hydra", "search")
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./+-]*", re.ASCII)
"""Strings that an override holds without quotes."""


@cache
def data_folder(name: str) -> Path:
    """Return the folder `conf` or `sweeps`: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / name, here / "_data" / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"lorasweep is incomplete: no folder {name} beside {here}")


def register_schemas() -> None:
    """Give every group a `schema` option that holds all its keys with their defaults."""
    for group, cls in spec.SECTIONS.items():
        ConfigStore.instance().store(group=group, name="schema", node=asdict(cls()), provider="lorasweep")


def group_options(group: str) -> list[str]:
    """Return the names that `group=` takes."""
    return sorted(p.stem for p in (data_folder("conf") / group).glob("*.yaml"))


@dataclass(frozen=True)
class SweepFile:
    """What a file of sweeps/ holds."""

    question: str
    overrides: list[str]
    """Its `overrides`, then its `search` keys as overrides."""
    space: dict[str, Any]
    """Its `space`, as space.read takes it."""


def sweep_file(name: str) -> SweepFile:
    """Return what a sweep file holds: NAME.yaml of ./sweeps or of those that come with lorasweep, or a path.

    Raises ConfigError where there is no such file or it has unknown keys.
    """
    if not name.isprintable() or len(Path(name).name) > 200:
        raise ConfigError([f"--sweep: must be a name of 200 characters at most that can be printed, got {name!r}"])
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError([f"--sweep: no file {name}"])
        return read_sweep_file(Path(name))
    folders = [Path("sweeps"), data_folder("sweeps")]
    found = next((f / f"{name}.yaml" for f in folders if (f / f"{name}.yaml").is_file()), None)
    if found is None:
        names = sorted({p.stem for f in folders for p in f.glob("*.yaml")})
        near = did_you_mean(name, names)
        known = "" if near.startswith("; known") else f"; known: {', '.join(names)}"
        raise ConfigError([f"--sweep: no {name}.yaml in ./sweeps or among lorasweep's own{near}{known}"])
    return read_sweep_file(found)


def read_sweep_file(path: Path) -> SweepFile:
    """Return what a sweep file holds: the question in its first line, `overrides`, `space` and `search`."""
    text, where = path.read_text(encoding="utf8"), f"sweeps/{path.name}"
    try:
        content: Any = OmegaConf.to_container(OmegaConf.create(text)) or {}
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError([f"{where}: is not YAML: {' '.join(str(error).split())}"], where) from error
    parts: dict[str, type] = {"overrides": list, "space": dict, "search": dict}
    if not isinstance(content, dict):
        raise ConfigError([f"{where}: must hold the keys {', '.join(parts)}, got {content!r}"], where)
    problems = [f"{key}: no such key{did_you_mean(str(key), list(parts))}" for key in content if key not in parts]
    found = {key: content.get(key) or kind() for key, kind in parts.items()}
    wrong = [key for key, kind in parts.items() if not isinstance(found[key], kind)]
    problems += [
        f"{key}: must be {'a list of key=value strings' if key == 'overrides' else 'a mapping'}" for key in wrong
    ]
    if not problems:
        problems += _problems_of_parts(**found)
    if problems:
        raise ConfigError(problems, where)
    first = text.splitlines()[0]
    overrides = [*map(str, found["overrides"]), *(f"search.{k}={override_text(v)}" for k, v in found["search"].items())]
    return SweepFile(first.lstrip("# ").strip() if first.startswith("#") else "", overrides, found["space"])


def _problems_of_parts(overrides: list[Any], space: dict[str, Any], search: dict[str, Any]) -> list[str]:
    problems = []
    if not overrides and not space:
        problems.append("overrides, space: both are empty; list key=value strings or the keys that vary")
    known = [f.name for f in fields(spec.SearchSpec)]
    problems += [f"search.{k}: no such key{did_you_mean(str(k), known)}" for k in search if k not in known]
    given = {str(o).split("=")[0] for o in overrides} | {f"search.{k}" for k in search}
    problems += [f"{key}: stands in overrides and in space; keep one of them" for key in space if key in given]
    twice = [f"search.{k}" for k in search if f"search.{k}" in [str(o).split("=")[0] for o in overrides]]
    return problems + [f"{key}: stands in overrides and in search; keep one of them" for key in twice]


def override_text(value: Any) -> str:
    """Return a value as it stands after `key=`: Hydra reads the same value back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(override_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{_dict_key(k)}:{override_text(v)}' for k, v in value.items())}}}"
    text = str(value)
    if PLAIN.fullmatch(text) and text.lower() not in ("true", "false", "null", "nan", "inf"):
        return text
    return QuotedString(text, Quote.double if "'" in text and '"' not in text else Quote.single).with_quotes()


def _dict_key(key: Any) -> str:
    return re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", str(key))


def parse(overrides: Iterable[str]) -> tuple[list[Override], list[str]]:
    """Return Hydra's reading of the sound overrides and the problems of those that are unreadable or name no key."""
    parsed: list[Override] = []
    problems: list[str] = []
    for text in overrides:
        override, wrong = _parse_one(text)
        problems += wrong
        if override is not None:
            parsed.append(override)
    return parsed, problems


@lru_cache(maxsize=100_000)
def _parse_one(text: str) -> tuple[Override | None, tuple[str, ...]]:
    try:
        override = _parser().parse_override(text)
    except HydraException as error:
        return None, (f"{text}: not an override ({str(error).splitlines()[0]}); write key=value",)
    wrong = _key_problems(override)
    return (None if wrong else override), tuple(wrong)


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def compose_trial(overrides: Sequence[str]) -> spec.TrialSpec:
    """Return the spec of one trial. Raises ConfigError with every problem at once."""
    parsed, problems = parse(overrides)
    try:
        tree = _settings(parsed)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    trial, more = spec.trial_spec(tree, tuple(str(p.input_line) for p in parsed if _says_what(p)))
    if trial is None or problems or more:
        raise ConfigError(problems + more)
    return trial


def settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the composed configuration as nested data, values unchecked. Raises ConfigError where Hydra refuses."""
    parsed, problems = parse(overrides)
    if problems:
        raise ConfigError(problems)
    return _settings(parsed)


def _settings(parsed: Sequence[Override]) -> dict[str, Any]:
    """Compose the groups once for all trials that choose the same ones, and set plain values on a copy."""
    values = [p for p in parsed if _is_plain_value(p)]
    tree = copy.deepcopy(_composed(tuple(str(p.input_line) for p in parsed if not _is_plain_value(p)), resolve=False))
    if "${" in str(tree) or not all(_set(tree, p.key_or_group, p.value()) for p in values):
        return copy.deepcopy(_composed(tuple(str(p.input_line) for p in parsed), resolve=True))
    return tree


def _is_plain_value(override: Override) -> bool:
    """Return whether an override does nothing but set a key to a scalar or a list of them."""
    plain = not override.is_sweep_override() and override.package is None and override.key_or_group in spec.known_keys()
    return plain and "{" not in str(override.input_line)


def _set(tree: dict[str, Any], key: str, value: Any) -> bool:
    """Set a key that is there; return False where it is not, or holds a mapping, which Hydra would merge."""
    section, _, name = key.rpartition(".")
    part = tree.get(section) if section else tree
    if not isinstance(part, dict) or name not in part or isinstance(part[name], dict):
        return False
    part[name] = value
    return True


@lru_cache(maxsize=256)
def _composed(overrides: tuple[str, ...], resolve: bool) -> dict[str, Any]:
    """Hydra's own composition. Callers copy it."""
    register_schemas()
    try:
        with _inside_hydra(), initialize_config_dir(str(data_folder("conf")), version_base="1.3"):
            tree: Any = OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=resolve)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([str(error).strip().replace("\n", " ")]) from error
    return tree


def compose_points(points: Sequence[Sequence[str]], known: Sequence[str] = ()) -> list[spec.TrialSpec]:
    """Return the spec of every point of a grid. Raises ConfigError with the problems of all, `known` ones first."""
    trials, problems = [], list(known)
    for point in points:
        try:
            trials.append(compose_trial(point))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return trials


def import_plugins() -> None:
    """Let Hydra find the sweeper when lorasweep runs from a checkout that was never installed."""
    root = str(Path(__file__).resolve().parent.parent)
    if root not in sys.path:
        sys.path.append(root)


@contextmanager
def _inside_hydra() -> Iterator[None]:
    """Set aside the Hydra that may be running us, as `-m` does, while we compose on our own."""
    running = GlobalHydra.instance()
    outer, running.hydra = running.hydra, None
    try:
        yield
    finally:
        running.hydra = outer


def _says_what(override: Override) -> bool:
    return override.key_or_group.split(".")[0].split("/")[0] not in NOT_PART_OF_A_TRIAL


def _key_problems(override: Override) -> list[str]:
    key = override.key_or_group
    if key.split(".")[0].split("/")[0] == "hydra":
        return []
    if override.is_delete() or override.is_add():
        return [f"{override.input_line}: the keys are fixed, '+', '++' and '~' change nothing; write key=value"]
    if key in spec.SECTIONS:
        return _group_problems(override, group_options(key))
    if isinstance(override.value(), Glob):
        return [f"{key}: glob() lists the files of a group, such as model=glob(*); write the values, {key}=a,b,c"]
    if key not in spec.known_keys():
        section = key.partition(".")[0] + "."
        own = [k for k in spec.known_keys() if k.startswith(section)]
        return [f"{key}: no such key{did_you_mean(key, own or [*spec.known_keys(), *spec.SECTIONS])}"]
    return []


def _group_problems(override: Override, options: Sequence[str]) -> list[str]:
    key, value = override.key_or_group, override.value()
    if isinstance(value, Glob):
        if value.filter(list(options)):
            return []
        return [f"{key}: glob({', '.join(value.include)}) matches no {key}; known: {', '.join(options)}"]
    if isinstance(value, IntervalSweep):
        return [f"{key}: is one of {', '.join(options)}, not a number; write {key}=a,b,c or {key}=glob(*)"]
    raw = list(override.sweep_iterator()) if override.is_sweep_override() else [value]
    names = [str(v.text if isinstance(v, QuotedString) else v) for v in raw]
    known = f"; known: {', '.join(options)}"
    hints = {name: did_you_mean(name, options).partition("; known")[0] for name in names if name not in options}
    return [f"{key}: no {key} named '{name}'{hint}{known}" for name, hint in hints.items()]
