"""What a person sees: one progress bar a trial on a terminal, plain lines elsewhere; and tables. The owner of rich."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

LINE_EVERY_S = 30.0
"""Longest silence between two plain lines of a trial."""


class Display:
    """Shows the trials of one worker; `alone` says that no other process writes to this terminal."""

    def __init__(self, *, alone: bool = True) -> None:
        self.console = Console()
        self._tasks: dict[int, Any] = {}
        self._names: dict[int, str] = {}
        self._spoke: dict[int, float] = {}
        self._metric: dict[int, str] = {}
        self._loss: dict[int, float] = {}
        self._progress: Progress | None = None
        self._all = Text("")
        self._live: Live | None = None
        if self.console.is_terminal and alone:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._live = Live(Group(self._progress, self._all), console=self.console, refresh_per_second=4)
            self._live.start()

    def say(self, text: str) -> None:
        """Print a line above the bars. Where nobody reads it any more, no trial fails for that."""
        with suppress(OSError, SystemExit):  # rich ends the process where a pipe is closed
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, number: int, name: str) -> None:
        self._names[number] = name
        self._metric[number] = ""
        self._spoke[number] = time.monotonic()
        if self._progress:
            self._tasks[number] = self._progress.add_task(f"trial {number} {name}", total=None, state="")
        else:
            self.say(f"trial={number} {name} state=begins")

    def step(self, number: int, step: int, total: int, loss: float, throughput: object) -> None:
        """Show a trial's step, and what all trials together do a second."""
        self._loss[number] = loss
        if self._progress:
            self._progress.update(self._tasks[number], completed=step, total=total, state=self._state(number))
            self._all.plain = f"all trials: {throughput}"
        elif time.monotonic() - self._spoke[number] > LINE_EVERY_S:
            self._spoke[number] = time.monotonic()
            rate = f"; all trials: {throughput}" if str(throughput) else ""
            self.say(f"trial={number} {self._names[number]} step={step}/{total} loss={loss:.4f}{rate}")

    def evaluated(self, number: int, step: int, values: Mapping[str, float]) -> None:
        first, value = next(iter(values.items()))
        self._metric[number] = f"  {first} {value:.4f}"
        if self._progress:
            self._progress.update(self._tasks[number], state=self._state(number))
        else:
            self._spoke[number] = time.monotonic()
            text = " ".join(f"eval_{k}={v:.4f}" for k, v in values.items())
            self.say(f"trial={number} {self._names[number]} step={step} {text}")

    def _state(self, number: int) -> str:
        return f"loss {self._loss[number]:.4f}{self._metric[number]}"

    def end(self, number: int, state: str, detail: str) -> None:
        self.say(f"trial={number} {self._names[number]} state={state} {detail}")
        if self._progress and number in self._tasks:
            self._progress.remove_task(self._tasks.pop(number))

    def close(self) -> None:
        if self._live:
            self._all.plain = ""
            with suppress(OSError, SystemExit):
                self._live.stop()


MOST_SHOWN = 80
"""Characters of a value in a table or a line; files hold it whole."""
MOST_COMMAND = 2000
"""Characters of a command on screen and in MLflow."""


def short(value: Any) -> str:
    """Return a value for the eye: a number to four digits, a long list without its middle."""
    return f"{value:.4g}" if isinstance(value, float) else cut(str(value), MOST_SHOWN)


def cut(text: str, most: int) -> str:
    """Return a text of at most about `most` characters, its middle left out; of a list it says how long it is."""
    if len(text) <= most:
        return text
    whole = f"{text.count(',') + 1} in all" if text.startswith("[") else f"{len(text):,} characters"
    return f"{text[: most // 2]}...{text[-most // 4 :]} ({whole})"


def command(line: str, file: Path) -> str:
    """Return a command for the eye: one that fills more than a screen is cut, with the file that has it whole."""
    return line if len(line) <= MOST_COMMAND else f"{cut(line, MOST_COMMAND // 4)}, whole in {shown(file)}"


def shown(path: Path) -> str:
    """Return a path as short as it can be typed from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on a terminal, and tab-separated lines with a header elsewhere."""
    console = Console()
    if not console.is_terminal:
        sys.stdout.write("".join("\t".join(line) + "\n" for line in [columns, *rows]))
        sys.stdout.flush()
        return
    shown = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i < 1 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
