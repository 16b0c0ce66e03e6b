"""Runs a study with workers that are killed at random moments; a program of its own, for runner/test_killed_workers.py.

    python -P tests/support/faults.py FOLDER SEED KILLS WORKERS

Each worker is a fork of this process, which has imported everything and started no thread, so that a new one costs
nothing. Besides the kills from outside, a worker now and then kills itself right before or after it saves or tells.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from lorasweep.lora import adapter
from lorasweep.runner import endings, reclaim, worker
from lorasweep.study.queue import Queue
from lorasweep.study.study import Study
from lorasweep.training.engine import Engine

MOMENTS = ((adapter, "save"), (endings, "write_result"), (Queue, "tell"), (Engine, "checkpoint"), (Queue, "claim"))

SELF_KILL = 0.04
"""Chance that a worker dies at one of the moments it is most vulnerable at."""


def fragile(owner: Any, name: str, dice: random.Random, kill: bool) -> None:
    """Let a function kill its process now and then, before or after it has done its work."""
    whole: Callable[..., Any] = getattr(owner, name)

    def broken(*arguments: Any, **named: Any) -> Any:
        fate = dice.random()
        if kill and fate < SELF_KILL / 2:
            os.kill(os.getpid(), signal.SIGKILL)
        result = whole(*arguments, **named)
        if kill and fate > 1 - SELF_KILL / 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, broken)


def live(folder: str, seed: int, fragile_too: bool) -> None:
    dice = random.Random(seed)
    for owner, name in MOMENTS:
        fragile(owner, name, dice, fragile_too)
    worker.run_worker(folder, divide=False)


def main(folder: str, seed: int, kills: int, workers: int) -> int:
    """Return how many workers died."""
    fork = multiprocessing.get_context("fork")
    dice = random.Random(seed)
    alive: list[Any] = []
    died = started = 0
    study = Path(folder) / "study.json"
    assert study.exists(), study
    while True:
        ended = [p for p in alive if not p.is_alive()]
        died += sum(p.exitcode == -signal.SIGKILL for p in ended)
        finished = any(p.exitcode == 0 for p in ended) and len(ended) == len(alive)
        alive = [p for p in alive if p.is_alive()]
        if finished and _over(fork, folder):
            return died
        while len(alive) < workers:
            started += 1
            process = fork.Process(target=live, args=(folder, seed * 10_000 + started, died < kills))
            process.start()
            alive.append(process)
        time.sleep(dice.uniform(0.05, 0.6))
        if died < kills:
            victim = dice.choice(alive)
            if victim.is_alive():
                os.kill(victim.pid, signal.SIGKILL)
                victim.join()


def _over(fork: Any, folder: str) -> bool:
    """Return whether nothing waits or runs; asked in a fork, so that this process keeps no connection."""
    answer = fork.Queue()
    process = fork.Process(target=_ask, args=(folder, answer))
    process.start()
    left = answer.get(timeout=240)
    process.join()
    return left == 0


def _ask(folder: str, answer: Any) -> None:
    study = Study.open(Path(folder))
    reclaim.settle(study)
    answer.put(study.queue.waiting() + study.queue.running())


if __name__ == "__main__":
    began = time.monotonic()
    dead = main(sys.argv[1], *(int(a) for a in sys.argv[2:5]))
    print(f"seed={sys.argv[2]} killed={dead} seconds={time.monotonic() - began:.0f}")
