"""Override strings: how they are written, parsed and checked."""

import re
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from lorasweep.config import spec
from lorasweep.config.registry import data_folder, outside_conf
from lorasweep.errors import did_you_mean

NOT_PART_OF_A_TRIAL = ("study", "outputs", "hydra", "search")
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./+-]*", re.ASCII)
"""Strings that an override holds without quotes."""


def group_options(group: str) -> list[str]:
    """Return the names that `group=` takes."""
    folders = [data_folder("conf"), *outside_conf()]
    return sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})


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


def says_what(override: Override) -> bool:
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
