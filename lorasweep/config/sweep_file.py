"""Files of sweeps/: the question, its overrides and its space."""

from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lorasweep.config import spec
from lorasweep.config.overrides import keys_of, override_text
from lorasweep.config.registry import data_folder
from lorasweep.errors import ConfigError, did_you_mean


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
        names = sorted({path.stem for path in chain.from_iterable(f.glob("*.yaml") for f in folders)})
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
    in_overrides = keys_of(map(str, overrides))
    given = in_overrides | {f"search.{k}" for k in search}
    problems += [f"{key}: stands in overrides and in space; keep one of them" for key in space if key in given]
    twice = [f"search.{k}" for k in search if f"search.{k}" in in_overrides]
    return problems + [f"{key}: stands in overrides and in search; keep one of them" for key in twice]
