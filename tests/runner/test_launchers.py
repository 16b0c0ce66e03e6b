"""Workers through Hydra's launchers, each started for real: joblib, submitit's local executor, a Ray cluster of two."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import studies

from lorasweep.cli import main
from lorasweep.study.study import Study

pytestmark = pytest.mark.integration

SMALL = [*studies.SMALL, "tracking.reload_check=false", "study=s", "search.workers=2"]

ANSWER = re.compile(r"^Trial \d \(lora\.r=\d\) is best\b", re.MULTILINE)


def start(model: Path, outputs: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "lorasweep", *SMALL, f"model.pretrained={model}", f"outputs={outputs}", *arguments]
    own = os.environ | {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"} | environment
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own, start_new_session=True
    )


def here(model: Path, outputs: Path, *arguments: str) -> int:
    """Run the same in this process; return its exit code."""
    return main.main([*SMALL, f"model.pretrained={model}", f"outputs={outputs}", *arguments])


def ended(process: subprocess.Popen) -> tuple[int, str]:
    said, _ = process.communicate(timeout=500)
    return process.returncode, said


def owners(outputs: Path) -> list[dict]:
    """Return who ran each trial; all must be complete."""
    trials = Study.open(outputs / "s").trials()
    assert [t.state.name for t in trials] == ["COMPLETE"] * len(trials)
    return [t.user_attrs["owner"] for t in trials]


def until(outputs: Path, what, seconds: float = 120) -> Study:
    """Return the study once `what` holds of it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (outputs / "s" / "study.json").exists():
            study = Study.open(outputs / "s")
            if what(study):
                return study
        time.sleep(0.2)
    raise AssertionError("it took too long")


@pytest.mark.parametrize(
    "launcher",
    [
        [],  # processes of the command's own
        ["hydra/launcher=joblib"],
        ["hydra/launcher=submitit_local"],
    ],
)
def test_two_workers_share_a_study(tiny_bert, tmp_path, launcher):
    code, said = ended(start(tiny_bert, tmp_path, "-m", "lora.r=1,2,3,4,5,6", *launcher))
    assert code == 0, said
    assert len({o["pid"] for o in owners(tmp_path)}) == 2
    assert ANSWER.search(said), said


def test_basic_launcher_runs_its_workers_in_this_process(tiny_bert, tmp_path, capsys):
    assert here(tiny_bert, tmp_path, "-m", "lora.r=1,2,3,4,5,6", "hydra/launcher=basic") == 0
    assert {o["pid"] for o in owners(tmp_path)} == {os.getpid()}
    assert ANSWER.search(capsys.readouterr().out)


@pytest.mark.slow
def test_ray_cluster_of_two_nodes_shares_a_study(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster_utils = __import__("ray.cluster_utils").cluster_utils
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        nodes = ["hydra/launcher=ray", f"hydra.launcher.ray.init.address={cluster.address}"]
        variables = ['+hydra.launcher.ray.init.runtime_env.env_vars.HF_HUB_OFFLINE="1"']
        code, said = ended(start(tiny_bert, tmp_path, "-m", "lora.r=1,2,3,4", *nodes, *variables))
    finally:
        cluster.shutdown()
    assert code == 0, said
    assert len({o["pid"] for o in owners(tmp_path)}) == 2
    assert any("ray" in o for o in Study.open(tmp_path / "s").meta.launcher)


@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=joblib"]])  # which takes its other workers down
def test_study_goes_on_after_a_worker_was_killed(tiny_bert, tmp_path, launcher):
    words = ["-m", "lora.r=1,2,3,4,5,6", "train.max_steps=60", "search.checkpoint_s=0"]
    process = start(tiny_bert, tmp_path, *words, *launcher)
    study = until(tmp_path, lambda s: any(t.user_attrs.get("checkpoint_step", 0) > 5 for t in s.trials()))
    victim = next(t for t in study.trials() if t.user_attrs.get("checkpoint_step", 0) > 5)
    os.kill(victim.user_attrs["owner"]["pid"], signal.SIGKILL)
    code, said = ended(process)
    assert code == 0, said
    assert len(owners(tmp_path)) == 6
    log = (study.trial_folder(victim.number) / "log.txt").read_text()
    assert "goes on from step" in log


def test_interrupted_study_is_saved_and_resumed_to_the_same_end(tiny_bert, tmp_path):
    more = ["-m", "lora.r=1,2", "train.max_steps=80", "search.workers=2"]
    process = start(tiny_bert, tmp_path, *more)
    until(tmp_path, lambda s: any(t.state.name == "RUNNING" and t.intermediate_values for t in s.trials()))
    os.killpg(process.pid, signal.SIGINT)
    code, said = ended(process)
    assert code == 130, said
    assert "go on with: python -m lorasweep resume" in said
    study = Study.open(tmp_path / "s")
    assert not study.queue.running() and study.queue.waiting()
    saved = [p for p in tmp_path.glob("s/*/checkpoint.pt")]
    assert saved
    again = subprocess.run(
        [sys.executable, "-m", "lorasweep", "resume", str(tmp_path / "s")], capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(owners(tmp_path)) == 2
    assert here(tiny_bert, tmp_path / "whole", *more[:-1], "search.workers=1") == 0
    for number in range(2):
        assert losses(tmp_path / "s" / str(number)) == pytest.approx(losses(tmp_path / "whole" / "s" / str(number)))


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [(p["step"], p["train_loss"]) for p in lines if "train_loss" in p]
    assert [s for s, _ in found] == list(range(1, 81))
    return [v for _, v in found]


def test_second_interrupt_ends_at_once_and_the_study_can_be_resumed(tiny_bert, tmp_path):
    process = start(tiny_bert, tmp_path, "-m", "lora.r=1,2", "train.max_steps=3000", "search.workers=1")
    until(tmp_path, lambda s: any(t.intermediate_values for t in s.trials()))
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    process.wait(timeout=30)
    assert process.returncode in (130, -signal.SIGINT)
    assert time.monotonic() - began < 10
    study = Study.open(tmp_path / "s")
    study.owners.reclaim(study.search.max_retries)
    assert study.queue.waiting() == 2


@pytest.mark.slow
def test_job_that_a_cluster_takes_away_saves_and_goes_on_by_itself(tiny_bert, tmp_path):
    """submitit's local executor queues a job again as SLURM does, and its signal is the same."""
    words = ["-m", "lora.r=1,2", "train.max_steps=300", "search.workers=1", "hydra/launcher=submitit_local"]
    process = start(tiny_bert, tmp_path, *words)
    study = until(tmp_path, lambda s: any(t.intermediate_values and t.state.name == "RUNNING" for t in s.trials()))
    owner = next(t for t in study.trials() if t.state.name == "RUNNING").user_attrs["owner"]
    os.kill(owner["pid"], signal.SIGUSR2)
    code, said = ended(process)
    assert code == 0, said
    assert {o["pid"] for o in owners(tmp_path)} - {owner["pid"]}
    logs = "".join(path.read_text() for path in tmp_path.glob("s/*/log.txt"))
    assert "put back" in logs and "goes on from step" in logs
    jobs = "".join(path.read_text() for path in tmp_path.glob("s/submitit/*/*_log.*"))
    assert "Requeued job" in jobs
