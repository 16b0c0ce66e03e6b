"""A command's words and flags: --help, and a ConfigError with every word and flag that nobody reads."""

import argparse
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import NoReturn

from lorasweep.errors import ConfigError, did_you_mean

PROGRAM = "python -m lorasweep"
WIDTH = 112

Options = argparse.Namespace


class Parser(argparse.ArgumentParser):
    """argparse, with our way to refuse: all problems at once, each with its next move."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError in place of leaving the process."""
        raise ConfigError([message.removeprefix("argument ")], "the command line")

    def parse(self, words: Sequence[str]) -> Options:
        """Return what the words say. Raises ConfigError for flags and words that the command does not take."""
        options, unread = self.parse_known_intermixed_args(list(words))
        flags = [word for word in unread if word.startswith("-")]
        known = [name for name in self._option_string_actions if name not in ("-h", "--help")]
        name = self.prog.removeprefix(PROGRAM).strip()
        if known:
            others = f"; {name} has {', '.join(known)}"
            settings = "; settings are written without dashes, key=value" if name in SETTINGS else ""
            problems = [f"{flag}: no such flag{_near(flag, known) or others + settings}" for flag in flags]
        else:
            taken = "; ".join(str(place.help) for place in self._get_positional_actions())
            problems = [f"{flag}: {name} has no flags; it takes {taken}" for flag in flags]
        if not flags:  # words after an unknown flag may be its value
            problems = [f"{word}: {name} takes {self._words()} alone" for word in unread]
        if problems:
            raise ConfigError(problems, "the command line")
        return options

    def _words(self) -> str:
        """Return what the command takes besides flags, in words."""
        places = self._get_positional_actions()
        return " and ".join(WORDS.get(str(place.metavar), str(place.metavar)) for place in places) or "no words"


SETTINGS = ("", "check")
"""Commands whose words are settings; the one without a name trains."""
WORDS = {"STUDY": "a study", "NAME": "one model", "NUMBER": "a trial's number"}
"""How a refusal calls what a command takes."""


def _near(word: str, known: Sequence[str]) -> str:
    return did_you_mean(word.split("=")[0], known).partition("; known")[0]


@dataclass(frozen=True)
class Command:
    """One command: what the overview says of it, what it takes, and the function that carries it out."""

    name: str
    usage: str
    """What follows the name in the overview."""
    summary: str
    example: str
    """A command line after `python -m lorasweep`."""
    carry_out: str
    """MODULE:FUNCTION of lorasweep.cli, imported when the command runs."""
    arguments: Callable[[Parser], None] = lambda _: None
    """Adds what the command takes to its parser."""
    details: str = ""

    def parser(self) -> Parser:
        """Return the command's parser."""
        parser = Parser(
            prog=f"{PROGRAM} {self.name}".strip(),
            description=textwrap.fill(" ".join(f"{self.summary}. {self.details}".split()), WIDTH),
            epilog=f"example:\n  {PROGRAM} {self.example}",
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        self.arguments(parser)
        return parser

    def run(self, words: Sequence[str]) -> int:
        """Carry the command out; return its exit code. Raises ConfigError for words that it does not take."""
        options = self.parser().parse(words)
        module, _, function = self.carry_out.partition(":")
        return getattr(import_module(f"lorasweep.cli.{module}"), function)(options)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=WIDTH)


def number(text: str) -> int:
    """Return a trial's number."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a trial's number, got '{text}'")
    return int(text)
