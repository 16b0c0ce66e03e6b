"""A command's processes answer, keep what they have loaded, are missed when killed, and end with the command."""

import functools
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from support import started, studies

from lorasweep.errors import ConfigError, DiskFull, WorkerGone
from lorasweep.runner import interrupt, launch, launchers, torch_calls, worker_process
from lorasweep.runner.worker_process import Workers

LIGHT = (
    f"import sys, types; sys.path.append({str(Path(__file__).parent)!r}); "
    "sys.modules['lorasweep.runner.worker'] = types.ModuleType('worker'); "
)
"""Lets a process do without torch, and find this file."""

_kept: list[int] = []


@pytest.fixture(autouse=True)
def light(monkeypatch):
    monkeypatch.setattr(
        worker_process, "PROGRAM", worker_process.PROGRAM.replace("import json, sys; ", f"import json; {LIGHT}")
    )
    monkeypatch.setattr(torch_calls, "has_torch", lambda: False)


@pytest.fixture
def workers():
    with Workers() as started:
        yield started


def keep(number: int) -> list[int]:
    _kept.append(number)
    return _kept


def fail(kind: str) -> None:
    class Local(Exception):
        pass

    raise {"config": ConfigError(["key: wrong"]), "disk": DiskFull("full"), "plain": KeyError("k"), "own": Local("x")}[
        kind
    ]


def variable(name: str) -> str | None:
    return os.environ.get(name)


def pid() -> int:
    return os.getpid()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def work(folder: str, config: object) -> None:
    """Work as a worker does: until a file is there, or a signal asks for an end."""
    with interrupt.heard() as interrupts:
        (Path(folder) / f"at-work-{os.getpid()}").touch()
        while not interrupts.count and not (Path(folder) / "enough").exists():
            time.sleep(0.02)
    (Path(folder) / f"saved-{os.getpid()}").touch()


def test_process_keeps_between_calls_what_it_has_and_takes_the_environment_along(workers, monkeypatch, capfd):
    assert workers.begin(keep, 1)() == [1]
    assert workers.begin(keep, 2)() == [1, 2]
    monkeypatch.setenv("PGPASSWORD", "given later")
    assert workers.begin(variable, "PGPASSWORD")() == "given later"
    assert workers.begin(pid)() != os.getpid()
    with pytest.raises(ConfigError) as error:
        workers.begin(fail, "config")()
    assert error.value.problems == ["key: wrong"]
    with pytest.raises(DiskFull, match="full"):
        workers.begin(fail, "disk")()
    with pytest.raises(KeyError) as error:
        workers.begin(fail, "plain")()
    assert "in fail" in error.value.__notes__[0]
    with pytest.raises(RuntimeError, match="Local: x"):
        workers.begin(fail, "own")()
    workers.begin(os.kill, workers.begin(pid)(), signal.SIGINT)()  # a terminal's, while nothing is to be saved
    assert workers.begin(keep, 3)() == [1, 2, 3]
    with pytest.raises(WorkerGone, match="ended by SIGKILL"):
        workers.begin(die)()
    assert workers.begin(keep, 4)() == [4]


def test_killed_worker_is_missed_and_replaced_while_others_go_on(workers, tmp_path):
    job = functools.partial(work, str(tmp_path))
    workers.load(2)

    def kill_one_of_two() -> None:
        started.until(lambda: len(list(tmp_path.glob("at-work-*"))) == 2)
        os.kill(int(min(tmp_path.glob("at-work-*")).name.rpartition("-")[2]), signal.SIGKILL)

    threading.Thread(target=kill_one_of_two).start()
    with pytest.raises(WorkerGone, match="SIGKILL"):
        workers.launch(job, 2)

    def end() -> None:
        started.until(lambda: len(list(tmp_path.glob("at-work-*"))) == 3)
        time.sleep(0.3)
        (tmp_path / "enough").touch()

    threading.Thread(target=end).start()
    workers.launch(job, 2)  # one is at it still
    assert len(list(tmp_path.glob("at-work-*"))) == 3
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_command_that_ends_early_lets_its_workers_save_and_leaves_no_process(tmp_path):
    with Workers() as workers:
        process = workers._processes[0]
        process.begin(work, str(tmp_path), None)
        started.until(lambda: list(tmp_path.glob("at-work-*")))
    assert list(tmp_path.glob("saved-*")) and not process.lives
    with Workers() as workers:
        idle = workers._processes[0]
    assert not idle.lives


def test_study_ends_with_its_answer_where_the_process_that_scores_the_winner_is_killed(tmp_path, capsys):
    study = studies.study_of(tmp_path, [2, 4])
    for value in (0.6, 0.7):
        studies.end(study, value)

    def killed(*_: object):
        def answer():
            raise WorkerGone("its process was ended by SIGKILL")

        return answer

    assert launch.finish(study, killed) == launch.EXIT_OK
    said = capsys.readouterr().out
    assert "the test split was not read: its process was ended by SIGKILL; `resume` tries again" in said
    assert "Trial 1 (lora.r=4) is best" in said


def test_single_worker_is_a_process_for_itself_unless_the_command_has_torch_and_room(monkeypatch):
    monkeypatch.setattr(launchers.container, "memory", lambda: None)
    monkeypatch.setattr(torch_calls, "has_torch", lambda: True)
    assert not worker_process.is_apart(1)
    assert worker_process.is_apart(2)
    monkeypatch.setattr(launchers.container, "memory", lambda: launchers.container.Memory(2**20, 0))
    assert worker_process.is_apart(1)
    monkeypatch.setattr(launchers.container, "memory", lambda: None)
    monkeypatch.setattr(torch_calls, "has_torch", lambda: False)
    assert worker_process.is_apart(1)
