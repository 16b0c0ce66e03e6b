"""Override strings and conf/ to a TrialSpec. Hydra's compose API lives here: no later file sees a DictConfig."""

import copy
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep.config import spec
from lorasweep.config.overrides import parse, says_what
from lorasweep.config.registry import data_folder
from lorasweep.errors import ConfigError

OF_THE_CHECKPOINT = ("revision", "sha256", "decoder", "tokenizer", "pooling")
"""Keys of a model group that hold for its `pretrained` alone."""


def register_schemas() -> None:
    """Give every group a `schema` option that holds all its keys with their defaults."""
    for group, cls in spec.SECTIONS.items():
        ConfigStore.instance().store(group=group, name="schema", node=asdict(cls()), provider="lorasweep")


def compose_trial(overrides: Sequence[str]) -> spec.TrialSpec:
    """Return the spec of one trial. Raises ConfigError with every problem at once."""
    parsed, problems = parse(overrides)
    try:
        tree = _settings(parsed)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    trial, more = spec.trial_spec(tree, tuple(str(p.input_line) for p in parsed if says_what(p)))
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
    chosen = [*_data_group(parsed), *[str(p.input_line) for p in parsed if not _is_plain_value(p)]]
    groups = _composed(tuple(chosen), resolve=False)
    tree = copy.deepcopy(groups)
    if "${" in str(tree) or not all(_set(tree, p.key_or_group, p.value()) for p in values):
        tree = copy.deepcopy(_composed((*_data_group(parsed), *[str(p.input_line) for p in parsed]), resolve=True))
    if any(p.key_or_group == "model.pretrained" for p in parsed):
        others = [str(p.input_line) for p in parsed if not _is_plain_value(p) and p.key_or_group != "model.pretrained"]
        group = _composed((*_data_group(parsed), *others), resolve=False)["model"]
        _forget_old_model(tree["model"], group, {p.key_or_group for p in parsed})
    return tree


def _data_group(parsed: Sequence[Override]) -> list[str]:
    """Return the choice of the group that finds a file's kind, where a path is given and no source."""
    keys = {p.key_or_group for p in parsed}
    named = any(p.key_or_group == "data.path" and p.value() for p in parsed)
    return ["data=auto"] if named and not keys & {"data", "data.source"} else []


def _forget_old_model(model: dict[str, Any], group: Mapping[str, Any], given: Collection[str]) -> None:
    """Drop what the model group says about its checkpoint where the user names another one."""
    if model["pretrained"] == group["pretrained"]:
        return
    for key in OF_THE_CHECKPOINT:
        if f"model.{key}" not in given:
            model[key] = getattr(spec.ModelSpec, key)


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
    root = str(Path(__file__).resolve().parent.parent.parent)
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
