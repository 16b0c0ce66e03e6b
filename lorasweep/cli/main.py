"""The command line: which command, and what its errors look like."""

import os
import sys
from collections.abc import Sequence

from lorasweep.cli import commands
from lorasweep.credentials import guard_stderr, hide_arguments, redact
from lorasweep.errors import ConfigError, LorasweepError


def program() -> int:
    """Run the command line of this process, whose secrets neither `ps` nor a library's message shows."""
    hide_arguments()
    guard_stderr()
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        return _run(words)
    except SystemExit as end:  # argparse leaves so once it has printed help
        return int(end.code or 0)
    except LorasweepError as error:
        print(f"{type(error).__name__}: {redact(str(error))}", file=sys.stderr)
        return 1
    except OSError as error:  # a disk that is full, a folder that may not be read: the system says which
        print(f"{type(error).__name__}: {redact(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(words: list[str]) -> int:
    first = words[0] if words else ""
    if first in ("-h", "--help") or words == ["help"]:
        print(commands.overview(), end="")
        return 0
    if first == "help":
        return _command(words[1]).run(["--help"])
    if first and not first.startswith("-") and _is_no_setting(first):
        return _command(first).run(words[1:])
    return commands.TRAIN.run(words)


def _is_no_setting(word: str) -> bool:
    return "=" not in word and not word.startswith("~")


def _command(name: str) -> commands.Command:
    """Return the command of this name. Raises ConfigError where there is none."""
    if name not in commands.COMMANDS:
        raise ConfigError([commands.no_command(name)], "the command line")
    return commands.COMMANDS[name]
