"""Processes that have torch, for a command that does without it: the pre-flight, the workers, the winner's score.

A process begins to import what trains as soon as it is started, while the command still composes. It runs what it is
given, one call after another, and keeps between them what it has loaded. It ends with the command, busy or not.
"""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection
from typing import Any

import psutil

from lorasweep.credentials import guard_stderr
from lorasweep.errors import ConfigError, LorasweepError, WorkerGone
from lorasweep.runner import interrupt, launchers, parent, torch_calls
from lorasweep.runner.findings import Findings
from lorasweep.runner.points import Points
from lorasweep.study import lease
from lorasweep.tracking import mlflow_store

SAVE_S = 60.0
"""Longest that a busy worker saves when its command ends early; then it is killed."""

LOOK_EVERY_S = 1.0
"""Between two looks at whether a process lives."""

LEAVE_S = 0.5
"""Longest that an idle process takes to see that nobody will ask it again; one that still imports is killed."""

PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from lorasweep.runner import worker_process; worker_process.serve(int(sys.argv[2]))"
)
"""What a process runs: it finds modules where this one does, and never runs this one's main file again."""

LESS_MEMORY = (
    "if memory ran out, take a smaller model, model.quantization=nf4 or train.precision=bf16; if not, its own words "
    "stand above"
)

Call = Callable[[], Any]
"""Returns what was asked for, once it is there, or raises what that raised."""


def is_apart(workers: int) -> bool:
    """Return whether workers, of no launcher's, run in processes of the command and not in itself.

    In a container with little memory a single worker does in any case: where the kernel kills it, the study goes on
    without the trial that was too large.
    """
    return os.name == "posix" and (not torch_calls.has_torch() or workers > 1 or launchers.is_in_small_container())


class WorkerProcess:
    """One process. After a WorkerGone it is of no more use."""

    def __init__(self) -> None:
        self.answers, theirs = multiprocessing.Pipe()
        flags = [*(["-B"] if sys.flags.dont_write_bytecode else []), *(f"-W{option}" for option in sys.warnoptions)]
        self._process = subprocess.Popen(
            [sys.executable, *flags, "-c", PROGRAM, json.dumps(sys.path), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self.is_busy = False

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    @property
    def is_over(self) -> bool:
        """Return whether the call under way has ended, or its process: what that has started may hold its pipe open."""
        return not self.lives or self.answers.poll()

    def begin(self, function: Callable[..., Any], *arguments: Any) -> Call:
        """Let the process call a function of a module's top level; return how its answer is waited for.

        It takes over this process's environment, where passwords of servers lie.
        """
        _flush()  # what it prints comes after what was printed here
        with suppress(OSError):  # then it has ended, and the answer will tell
            self.answers.send((dict(os.environ), lease.me(), function, arguments))
        self.is_busy = True
        return self.answer

    def answer(self) -> Any:
        """Return what the call under way returns, or raise what it raises; WorkerGone where the process has ended."""
        try:
            while not self.is_over:
                connection.wait([self.answers], LOOK_EVERY_S)
            if not self.answers.poll():
                raise EOFError
            value, error = self.answers.recv()
        except (EOFError, OSError):
            raise WorkerGone(self._end()) from None
        finally:
            self.is_busy = False
        if error is not None:
            raise error
        return value

    def _end(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LEAVE_S)
        self._process.kill()
        code = self._process.wait()
        if code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with code {code}"

    def end_work(self) -> None:
        """Ask a busy process to save and end; one that only looks ends at once."""
        if self.is_busy and self.lives:
            self._process.terminate()

    def close(self) -> None:
        """End the process: wait for a worker that saves, and kill what does not go, with what it has started."""
        self.answers.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(SAVE_S if self.is_busy else LEAVE_S)
        if not self.lives:
            return
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                child.kill()
            self._process.kill()
        self._process.wait()


class Workers:
    """The processes of a command. The first one is asked for what needs torch, and is the first worker then.

    Where this process has torch, as in a notebook or with Hydra's basic launcher, it does itself what is asked.
    """

    def __init__(self) -> None:
        self.size = 1
        """Most workers at a time."""
        self._processes: list[WorkerProcess] = []
        if not torch_calls.has_torch():
            self.load(1)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, function: Callable[..., Any], *arguments: Any) -> Call:
        """Let an idle process call a function, the oldest one, which has loaded most."""
        if torch_calls.has_torch():
            return torch_calls.here(function, *arguments)
        for process in self._processes:
            if process.is_busy and process.is_over:
                with suppress(Exception):  # its trials are others' by now, or have ended
                    process.answer()
        return self._idle(1)[0].begin(function, *arguments)

    def look(self, asked: Points, is_here: bool, keep: bool) -> Findings:
        """Return what the pre-flight finds; with `keep`, where the first worker will train, and others load already.

        Raises ConfigError with the problems of all trials.
        """
        if torch_calls.has_torch():
            return torch_calls.look_here(asked, is_here, keep)
        found = self.begin(torch_calls.look, asked, is_here, keep)
        if keep:
            self.load(asked.specs[0].search.workers)
        if asked.specs[0].tracking.enabled:
            mlflow_store.load()  # nothing else to do before the answer
        try:
            return found()
        except WorkerGone as error:
            raise ConfigError([f"model.pretrained: one training step was tried, and {error}; {LESS_MEMORY}"]) from None

    def load(self, size: int) -> None:
        """Set the number of workers; as many as there are cores for begin to import what trains."""
        self.size = size
        missing = min(size, os.cpu_count() or 1) - len(self._processes)
        self._processes += [WorkerProcess() for _ in range(missing)]

    def launch(self, work: Callable[[Any], None], count: int) -> None:
        """Let workers work until all have ended; raise what the first one to fail raised, while others go on.

        As long as some are busy from before, there will not be more than `size` in all.
        """
        busy = sum(process.is_busy for process in self._processes)
        for process in self._idle(max(0, min(count, self.size - busy))):
            process.begin(work, None)
        while working := [process for process in self._processes if process.is_busy]:
            connection.wait([process.answers for process in working], LOOK_EVERY_S)
            for process in working:
                if process.is_over:
                    self._end_of_work(process)

    def _end_of_work(self, process: WorkerProcess) -> None:
        """Raise what a worker raised, without its process: what lives may be at work still, in the study's eyes."""
        try:
            process.answer()
        except Exception:
            process.close()
            raise

    def close(self) -> None:
        """End all: those that are busy save first, at the same time."""
        for process in self._processes:
            process.end_work()
        for process in self._processes:
            process.close()
        self._processes = []

    def _idle(self, count: int) -> list[WorkerProcess]:
        """Return processes that have nothing to do, started where there are too few."""
        self._processes = [process for process in self._processes if process.is_busy or process.lives]
        idle = [process for process in self._processes if not process.is_busy]
        new = [WorkerProcess() for _ in range(count - len(idle))]
        self._processes += new
        return (idle + new)[:count]


# --- in the process --------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Call what comes in, until nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; workers hear it once they work
    guard_stderr()
    interrupt.be_quiet()
    asked = connection.Connection(descriptor)
    from lorasweep.runner import worker  # noqa: F401  all that trains

    with suppress(EOFError, OSError):
        while True:
            environment, command, function, arguments = asked.recv()
            os.environ.update(environment)
            with parent.followed(command):
                answer = _answer(function, arguments)
            _flush()
            asked.send(answer)
    os._exit(0)  # all is written; to tear torch down takes a while


def _flush() -> None:
    """Write what was printed until now; a reader that has left ends nothing."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()


def _answer(function: Callable[..., Any], arguments: tuple) -> tuple[Any, Exception | None]:
    """Return what a call returns and None, or None and what it raises."""
    try:
        return function(*arguments), None
    except LorasweepError as error:
        return None, error
    except Exception as error:  # of a library that the command need not load, or with what cannot be sent
        text = traceback.format_exc()
        plain = error if _is_plain(error) else RuntimeError(f"{type(error).__name__}: {error}")
        plain.add_note(text)
        return None, plain


def _is_plain(error: Exception) -> bool:
    """Return whether an error can be sent, and is none of a library."""
    with suppress(Exception):
        return type(error).__module__ == "builtins" and bool(pickle.loads(pickle.dumps(error)))
    return False
