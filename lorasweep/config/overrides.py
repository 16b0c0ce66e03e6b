"""Override strings: how they are written, parsed and checked."""

import re
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser import types as hydra_types
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Quote, QuotedString
from hydra.errors import HydraException

from lorasweep.config import spec
from lorasweep.config.registry import data_folder, outside_conf
from lorasweep.errors import did_you_mean

NOT_PART_OF_A_TRIAL = ("study", "outputs", "hydra", "search")
PLAIN = re.compile(r"/?[A-Za-z_][A-Za-z0-9_./+-]*", re.ASCII)
"""Strings that an override holds without quotes."""


class Override(NamedTuple):
    """One `key=text`. The text is in Hydra's grammar; the key is without the signs that may stand before it."""

    key: str
    text: str

    @staticmethod
    def of(word: str) -> "Override":
        """Return the two sides of a word."""
        key, _, text = word.partition("=")
        return Override(key.lstrip("+~"), text)

    def __str__(self) -> str:
        return f"{self.key}={self.text}"


def key_of(word: str) -> str:
    """Return the key that an override string sets."""
    return Override.of(word).key


def keys_of(words: Iterable[str]) -> set[str]:
    """Return the keys that override strings set."""
    return {key_of(word) for word in words}


def without(words: Iterable[str], keys: Iterable[str]) -> list[str]:
    """Return the override strings that set none of these keys."""
    left_out = set(keys)
    return [word for word in words if key_of(word) not in left_out]


def overlaid(words: Iterable[str], later: Sequence[str]) -> list[str]:
    """Return override strings with later ones, which take the places of those with their keys."""
    return [*without(words, keys_of(later)), *later]


def is_of_the_study(key: str) -> bool:
    """Return whether a key, or group, belongs to a study as a whole and not to a trial."""
    return re.split("[./]", key, maxsplit=1)[0] in NOT_PART_OF_A_TRIAL


def group_options(group: str) -> list[str]:
    """Return the names that `group=` takes."""
    folders = [data_folder("conf"), *outside_conf()]
    files = chain.from_iterable((folder / group).glob("*.yaml") for folder in folders)
    return sorted({path.stem for path in files})


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


def parse(overrides: Iterable[str]) -> tuple[list[hydra_types.Override], list[str]]:
    """Return Hydra's reading of the sound overrides and the problems of those that are unreadable or name no key."""
    parsed: list[hydra_types.Override] = []
    problems: list[str] = []
    for text in overrides:
        override, wrong = _parse_one(text)
        problems += wrong
        if override is not None:
            parsed.append(override)
    return parsed, problems


@lru_cache(maxsize=100_000)
def _parse_one(text: str) -> tuple[hydra_types.Override | None, tuple[str, ...]]:
    try:
        override = _parser().parse_override(text)
    except HydraException as error:
        return None, (f"{text}: not an override ({str(error).splitlines()[0]}); write key=value",)
    wrong = _key_problems(override)
    return (None if wrong else override), tuple(wrong)


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def says_what(override: hydra_types.Override) -> bool:
    return not is_of_the_study(override.key_or_group)


OTHER_NAMES = {
    **dict.fromkeys(("lr", "learning_rate"), "train.learning_rate"),
    **dict.fromkeys(("bs", "batch", "per_device_train_batch_size", "train_batch_size"), "train.batch_size"),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "n_epochs"), "train.epochs"),
    **dict.fromkeys(("steps", "num_steps", "max_train_steps"), "train.max_steps"),
    **dict.fromkeys(("wd", "decay"), "train.weight_decay"),
    **dict.fromkeys(("rank", "lora_rank", "lora_r"), "lora.r"),
    **dict.fromkeys(("alpha", "lora_alpha"), "lora.lora_alpha"),
    **dict.fromkeys(("dropout", "lora_dropout"), "lora.lora_dropout"),
    **dict.fromkeys(("targets", "modules"), "lora.target_modules"),
    **dict.fromkeys(("max_length", "max_seq_length", "max_seq_len", "cutoff_len", "block_size"), "data.max_tokens"),
    **dict.fromkeys(("model_name_or_path", "base_model", "pretrained_model_name_or_path"), "model.pretrained"),
    **dict.fromkeys(("train_file", "dataset", "dataset_name", "data_path"), "data.path"),
    **dict.fromkeys(("output_dir", "output", "out"), "outputs"),
}
"""What keys are called elsewhere -> the key here."""


def _key_problems(override: hydra_types.Override) -> list[str]:
    key = override.key_or_group
    if re.split("[./]", key, maxsplit=1)[0] == "hydra":
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
        other = OTHER_NAMES.get(key.rpartition(".")[2].lower())
        hint = f"; did you mean '{other}'?" if other else did_you_mean(key, own or [*spec.known_keys(), *spec.SECTIONS])
        return [f"{key}: no such key{hint}"]
    return []


def _group_problems(override: hydra_types.Override, options: Sequence[str]) -> list[str]:
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
    own = WITH_PATHS.get(key)
    return [
        f"{key}: no {key} named '{name}'; to use a file or folder of yours write {own}={name}"
        if own and _is_path(name)
        else f"{key}: no {key} named '{name}'{hint}{known}"
        for name, hint in hints.items()
    ]


WITH_PATHS = {"data": "data.path", "model": "model.pretrained"}
"""Groups beside which a key names what a person brings."""


def _is_path(name: str) -> bool:
    if "/" in name or Path(name).suffix:
        return True
    try:
        return Path(name).expanduser().exists()
    except OSError:  # too long for a name, for example
        return False
