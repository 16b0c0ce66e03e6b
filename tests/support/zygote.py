"""Runs studies in forks of this process, which has imported everything and started no thread: a start costs nothing.

    python -P tests/support/zygote.py

Each line of its input is the words of a command: `make` with override strings, or `go_on` with a study's folder. The
answer is a line: what was made, or the process that goes on, which leads a process group.
"""

import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from lorasweep.runner import launch, parent, plan, worker  # noqa: F401
from lorasweep.runner.request import Request
from lorasweep.study.study import Study

forked = multiprocessing.get_context("fork")


def make(*words: str) -> str:
    return str(launch.make(plan.plan(Request.of(list(words)))).folder)


def go_on(folder: str) -> None:
    """Run what is left of a study as `resume` does, its workers in forks."""
    os.setsid()
    os._exit(launch.carry_on(Study.open(Path(folder)), in_forks))


def in_forks(work: Callable[[Any], None], count: int) -> None:
    """Launch each worker in a fork. Raises RuntimeError where one ends otherwise than by itself."""
    workers = [forked.Process(target=work, args=(None,)) for _ in range(count)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    if any(process.exitcode for process in workers):
        raise RuntimeError(f"workers ended with {[process.exitcode for process in workers]}")


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for what goes on
    for line in sys.stdin:
        command, *words = shlex.split(line)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(reader)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(2, 1)
            if command == "make":
                os.write(writer, make(*words).encode())
                os._exit(0)
            os.close(writer)
            go_on(*words)
        os.close(writer)
        with os.fdopen(reader) as answer:
            print(answer.read() if command == "make" else pid, flush=True)


if __name__ == "__main__":
    main()
