"""Keys that hold paths: what was typed is a file's name before it is grammar, and is found from anywhere."""

import os
import re
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep

from lorasweep.config.overrides import Override, override_text, parse

PATHS = ("data.path", "model.pretrained", "model.decoder", "model.tokenizer", "outputs")
SIGNS = re.compile(r"[^A-Za-z0-9_./-]")
"""What may mean something else than itself in an override."""


def absolute(key: str, value: Any) -> Any:
    """Return the full path of a file or folder that is here, and any other value as it is.

    A worker may run elsewhere, and data may be asked for again from another folder.
    """
    if key not in PATHS or not isinstance(value, str) or not value:
        return value
    path = Path(value).expanduser() if value.startswith("~/") and not Path(value).exists() else Path(value)
    return os.path.abspath(path) if path.exists() else value


def literal(word: str) -> str:
    """Return an override with a path in it, written so that Hydra reads the path that was typed.

    A name may hold commas, brackets or quotes. It is taken by the letter where it is there, where it lies in a folder
    that is there and has all such signs in its own name, or where the grammar finds no value in it.
    """
    key, text = Override.of(word)
    if key not in PATHS or not text:
        return word
    if _is_there(text) or _is_all_in_a_folder(text):
        return str(Override(key, path_text(key, text)))
    parsed, _ = parse([f"{key}={text}"])
    if not parsed:
        return str(Override(key, path_text(key, text)))
    if isinstance(parsed[0].value(), ChoiceSweep):
        return word
    value = absolute(key, parsed[0].value())
    return word if value == parsed[0].value() else str(Override(key, path_text(key, value)))


def path_text(key: str, path: Any) -> str:
    """Return a path as it stands after `key=`, in full where it is here; outputs stay as they were typed."""
    value = path if key == "outputs" else absolute(key, path)
    return override_text(value).replace("${", r"\${")


def _is_there(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a name, a null byte
        return False


def _is_all_in_a_folder(text: str) -> bool:
    """Return whether all signs that could be grammar stand in the name of a folder that is there."""
    parents = Path(text).parents
    there = next((str(p) for p in parents if _is_there(str(p))), "")
    return bool(SIGNS.search(text)) and not SIGNS.search(text.removeprefix(there))
