"""What was asked, as one record that is made at the door: nothing behind it looks at typed words again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorasweep.config import paths
from lorasweep.config.overrides import keys_of, overlaid
from lorasweep.config.sweep_file import SweepFile, sweep_file
from lorasweep.credentials import take_out
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
        settings = [paths.literal(take_out(word)) for word in overlaid(file.overrides, words)]
        return Request(
            overrides=[word for word in settings if not is_launchers(word)],
            launcher=[word for word in settings if is_launchers(word)],
            space={key: entry for key, entry in file.space.items() if key not in keys_of(words)},
            question=file.question,
        )
