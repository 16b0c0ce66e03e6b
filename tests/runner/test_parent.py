"""A worker whose launcher was killed saves and leaves, at work or idle; the study goes on as if nothing had been."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from support import started, studies

from lorasweep.runner import interrupt, parent
from lorasweep.study import lease

STEPS = 60
LEAVE_S = 20.0
"""On a busy machine; a step of a tiny trial takes milliseconds."""

forked = multiprocessing.get_context("fork")


def launcher_of(follow, folder: Path):
    """Start a launcher whose worker runs `follow`; return both processes."""

    def launch() -> None:
        worker = forked.Process(target=follow, args=(lease.me(),))
        worker.start()
        (folder / "worker").write_text(str(worker.pid))
        time.sleep(60)

    launcher = forked.Process(target=launch)
    launcher.start()
    started.until(lambda: (folder / "ready").exists())
    return launcher, psutil.Process(int((folder / "worker").read_text()))


def test_worker_at_work_hears_its_launchers_death_and_ends_after_it(tmp_path):
    def follow(owner) -> None:
        with parent.followed(owner), interrupt.heard(), interrupt.heard() as interrupts:
            (tmp_path / "ready").touch()
            while not interrupts.count:
                time.sleep(0.05)
            (tmp_path / "saved").touch()
        time.sleep(60)

    launcher, worker = launcher_of(follow, tmp_path)
    launcher.kill()
    launcher.join()
    started.until(lambda: started.gone(worker), LEAVE_S)
    assert (tmp_path / "saved").exists()


def test_worker_that_still_loads_ends_at_once_with_its_launcher(tmp_path):
    def follow(owner) -> None:
        with parent.followed(owner), interrupt.heard():
            (tmp_path / "ready").touch()
            time.sleep(60)

    launcher, worker = launcher_of(follow, tmp_path)
    launcher.kill()
    launcher.join()
    started.until(lambda: started.gone(worker), LEAVE_S)


def test_idle_worker_ends_with_its_launcher(tmp_path):
    def follow(owner) -> None:
        with parent.followed(owner):
            pass
        (tmp_path / "ready").touch()
        time.sleep(60)

    launcher, worker = launcher_of(follow, tmp_path)
    launcher.kill()
    launcher.join()
    started.until(lambda: started.gone(worker), LEAVE_S)


def test_worker_in_its_launchers_process_follows_nobody():
    with parent.followed(lease.me()):
        assert not parent._watched


@pytest.fixture(scope="module")
def zygote():
    process = started.Zygote()
    yield process
    process.close()


@pytest.mark.integration
def test_study_whose_parent_is_killed_and_whose_terminal_is_closed_ends_as_a_calm_one(zygote, tiny_bert, tmp_path):
    setting = [*studies.SMALL, f"train.max_steps={STEPS}", "train.slots=1", "tracking.reload_check=false"]
    words = [*setting, f"model.pretrained={tiny_bert}", f"outputs={tmp_path}", "lora.r=1,2"]
    study = zygote.make(*words, "study=s", "search.workers=2")

    command = zygote.go_on(study)
    started.until(lambda: started.trains(study))
    workers = command.children(recursive=True)
    command.kill()
    started.until(lambda: all(map(started.gone, workers)), LEAVE_S)
    assert not study.queue.running() and list(study.folder.glob("*/checkpoint.pt"))

    command = zygote.go_on(study)
    started.until(lambda: started.trains(study))
    os.killpg(command.pid, signal.SIGHUP)
    started.until(lambda: started.gone(command), LEAVE_S)
    assert not study.queue.running() and study.queue.waiting()

    calm = zygote.make(*words, "study=calm")
    for command in (zygote.go_on(study), zygote.go_on(calm)):
        started.until(lambda command=command: started.gone(command), 300)
    for number in range(2):
        losses = started.losses(study.trial_folder(number))
        assert losses == started.losses(calm.trial_folder(number))
        assert [step for step, _ in losses] == list(range(1, STEPS + 1))
