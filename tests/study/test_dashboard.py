"""optuna-dashboard opens a study's storage as it is."""

import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from lorasweep.cli import main


def fetched(url: str, seconds: float = 120) -> dict:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.loads(answer.read())
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.3)


@pytest.fixture
def dashboard():
    """Return a function that serves a storage and gives the address of its API."""
    processes = []

    def serve(storage: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        run = "import sys; from optuna_dashboard._cli import main; sys.exit(main())"
        command = [sys.executable, "-c", run, storage, "--port", str(port)]
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return f"http://127.0.0.1:{port}/api"

    yield serve
    for process in processes:
        process.terminate()
        process.wait(timeout=20)


def test_dashboard_shows_the_study(tiny_bert, tmp_path, dashboard):
    small = ["train.max_steps=2", "train.batch_size=8", "data.max_train_samples=32", "data.max_eval_samples=16"]
    own = [f"model.pretrained={tiny_bert}", f"outputs={tmp_path}", "study=s"]
    assert main.main(["lora.r=1,2", *small, *own, "tracking.reload_check=false"]) == 0
    api = dashboard(str(tmp_path / "s" / "journal.log"))
    (study,) = fetched(f"{api}/studies")["study_summaries"]
    assert study["study_name"] == "s"
    assert study["directions"] == ["maximize"]
    trials = fetched(f"{api}/studies/{study['study_id']}?after=0")["trials"]
    assert [t["state"] for t in trials] == ["Complete", "Complete"]
    assert [t["params"][0]["param_external_value"] for t in trials] == ["1", "2"]
