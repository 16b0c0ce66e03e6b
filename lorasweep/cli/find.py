"""The study that a command names."""

from collections.abc import Sequence
from pathlib import Path

from lorasweep.config.overrides import Override, without
from lorasweep.config.spec import NAME_RULE, is_name
from lorasweep.credentials import database_url
from lorasweep.errors import ConfigError
from lorasweep.runner.request import Request
from lorasweep.study.study import Study

PLACE = ("outputs", "study")
"""Settings that say which study is meant."""


def find(name: str | None, words: Sequence[str], *, trusted: bool = False) -> tuple[Study, Request]:
    """Return the study that `name` is the folder, the name or the database of, and what else was asked.

    `trusted` lets the study's settings run code.
    Raises ConfigError where there is no such study.
    """
    if not name:
        raise ConfigError(["name a study first: its folder, e.g. outputs/NAME, or postgresql://... study=NAME"])
    place = dict(Override.of(word) for word in words)
    where = place.get("outputs", "./outputs")
    outputs = Path(where)
    if name.startswith("postgresql://"):
        return _in_database(name, place.get("study", ""), outputs, trusted), Request.of(without(words, PLACE))
    folder = (Path(name) if Path(name).is_dir() else outputs / name).resolve()
    if not folder.is_dir():
        there = sorted(p.parent.name for p in outputs.glob("*/study.json"))
        raise ConfigError([f"{name}: no such study; in {where} there are {', '.join(there[-8:]) or 'none'}"])
    return Study.open(folder, trusted=trusted), Request.of(without(words, ["outputs"]))


def _in_database(url: str, name: str, outputs: Path, trusted: bool) -> Study:
    if not is_name(name):
        raise ConfigError([f"study: {NAME_RULE}, got '{name}'; name the database's study with study=NAME"])
    return Study.join(database_url(url, "STUDY"), name, outputs, trusted=trusted)


def refuse_more(request: Request, rule: str) -> None:
    """Raise ConfigError where a command was given settings that it does not take."""
    more = [*request.overrides, *request.launcher]
    if more:
        raise ConfigError([f"{word}: {rule}" for word in more], "the command line")
