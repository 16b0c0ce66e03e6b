"""Override strings and conf/ to a TrialSpec. Hydra's compose API lives here: no later file sees a DictConfig."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep import spec
from lorasweep.errors import ConfigError, did_you_mean

NOT_PART_OF_A_TRIAL = ("study", "outputs", "hydra", "search")


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


def sweep_file(name: str) -> list[str]:
    """Return the overrides that sweeps/NAME.yaml lists. Raises ConfigError where there is no such file."""
    folder = data_folder("sweeps")
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    if name not in names:
        raise ConfigError(
            [f"--sweep: no file sweeps/{name}.yaml{did_you_mean(name, names)}; known: {', '.join(names)}"]
        )
    content: Any = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"))
    listed = content.get("overrides") if isinstance(content, dict) else None
    if not listed or set(content) != {"overrides"}:
        raise ConfigError([f"sweeps/{name}.yaml: must hold one key, `overrides`, a list of key=value strings"])
    return [str(o) for o in listed]


def parse(overrides: Iterable[str]) -> tuple[list[Override], list[str]]:
    """Return Hydra's reading of the sound overrides and the problems of those that are unreadable or name no key."""
    parser = OverridesParser.create()
    parsed: list[Override] = []
    problems: list[str] = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            problems.append(f"{text}: not an override ({str(error).splitlines()[0]}); write key=value")
            continue
        wrong = _key_problems(override)
        problems += wrong
        if not wrong:
            parsed.append(override)
    return parsed, problems


def compose_trial(overrides: Sequence[str]) -> spec.TrialSpec:
    """Return the spec of one trial. Raises ConfigError with every problem at once."""
    parsed, problems = parse(overrides)
    register_schemas()
    try:
        with _inside_hydra(), initialize_config_dir(str(data_folder("conf")), version_base="1.3"):
            config = compose("config", overrides=[str(p.input_line) for p in parsed])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([*problems, str(error).strip().replace("\n", " ")]) from error
    tree: Any = OmegaConf.to_container(config, resolve=True)
    trial, more = spec.trial_spec(tree, tuple(str(p.input_line) for p in parsed if _says_what(p)))
    if trial is None or problems or more:
        raise ConfigError(problems + more)
    return trial


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
        names = list(override.sweep_string_iterator()) if override.is_sweep_override() else [str(override.value())]
        options = group_options(key)
        return [
            f"{key}: no {key} named '{name}'{did_you_mean(name, options)}; known: {', '.join(options)}"
            for name in names
            if name not in options
        ]
    if key not in spec.known_keys():
        return [f"{key}: no such key{did_you_mean(key, [*spec.known_keys(), *spec.SECTIONS])}"]
    return []
