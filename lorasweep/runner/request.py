"""What was asked, as one record that is made at the door: nothing behind it looks at typed words again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorasweep.config import paths
from lorasweep.config.overrides import Override, keys_of, overlaid, override_text, parse
from lorasweep.config.sweep_file import SweepFile, sweep_file
from lorasweep.credentials import FUNCTIONS, TEXTS, taken_out
from lorasweep.errors import ConfigError
from lorasweep.runner.launchers import is_launchers


@dataclass(frozen=True)
class Request:
    """Settings without credentials, with full paths, and with those of a sweep file."""

    overrides: list[str]
    """Settings of trials and of the study; some of them vary."""
    launcher: list[str] = field(default_factory=list)
    """Hydra's own settings, for its launcher."""
    space: Mapping[str, Any] = field(default_factory=dict)
    """What varies by a sweep file, as space.read takes it."""
    question: str = ""

    @staticmethod
    def of(words: Sequence[str], sweep: str | None = None) -> "Request":
        """Return the request of settings and of `--sweep NAME`; the settings win over the file's.

        Raises ConfigError where there is no such file, and for a password that would have to be written down.
        """
        file = SweepFile("", [], {}) if sweep is None else sweep_file(sweep)
        varying = {key: entry for key, entry in file.space.items() if key not in keys_of(words)}
        problems: list[str] = []
        settings = [_writable(word, problems) for word in overlaid(file.overrides, words)]
        for key, entry in varying.items():
            _taken_out(key, entry, problems)
        if problems:
            raise ConfigError(problems)
        return Request(
            overrides=[word for word in settings if not is_launchers(word)],
            launcher=[word for word in settings if is_launchers(word)],
            space=varying,
            question=taken_out("search.question", file.question),
        )


def _writable(word: str, problems: list[str]) -> str:
    """Return a setting with its path in full and without credentials; add what is wrong with it to `problems`."""
    key, text = Override.of(word)
    if key in FUNCTIONS or key in TEXTS:
        value = _read(word, text) if text[:1] in ("'", '"') else text  # a password may hold commas and brackets
        kept = _taken_out(key, value, problems)
        return word if kept == value else str(Override(key, override_text(kept)))
    written = paths.literal(word)
    before = len(problems)
    _taken_out(key, Override.of(written).text, problems)
    if "{" in text and len(problems) == before:
        _taken_out(key, _read(word, text), problems)
    return written


def _read(word: str, text: str) -> Any:
    """Return the value as Hydra reads it, or the text where it reads none."""
    parsed, _ = parse([word])
    return parsed[0].value() if parsed and not parsed[0].is_sweep_override() else text


def _taken_out(key: str, value: Any, problems: list[str]) -> Any:
    try:
        return taken_out(key, value)
    except ConfigError as error:
        problems += error.problems
        return value
