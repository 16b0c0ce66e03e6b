"""A tracking server that asks for a password: a real `mlflow server` with basic auth."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support.mlflow_server import Server, in_file, in_mlflow, remembered

from lorasweep.cli import main
from lorasweep.config import compose
from lorasweep.tracking import outbox, runs

USER, PASSWORD = "sweeper", "a-long-pass-of-ours"
SMALL = ["train.max_steps=4", "train.eval_every=2", "data.max_train_samples=64", "data.max_eval_samples=32"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    pytest.importorskip("flask_wtf", reason="mlflow's basic auth needs flask-wtf")
    folder = tmp_path_factory.mktemp("guarded")
    config = folder / "auth.ini"
    config.write_text(
        f"[mlflow]\ndefault_permission = MANAGE\ndatabase_uri = sqlite:///{folder}/auth.db\n"
        f"admin_username = {USER}\nadmin_password = {PASSWORD}\nauthorization_function = "
        "mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environment = {"MLFLOW_FLASK_SERVER_SECRET_KEY": "for-this-test", "MLFLOW_AUTH_CONFIG_PATH": str(config)}
    running = Server(folder, ["--app-name", "basic-auth"], environment)
    running.start()
    yield running
    running.kill()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("lorasweep.tracking.sender.RETRY_S", 0.5)
    monkeypatch.setattr("lorasweep.tracking.runs._senders", {})


def sign_in(monkeypatch, password: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)


def swept(tiny_bert: Path, outputs: Path, uri: str) -> int:
    model = [f"model.pretrained={tiny_bert}"]
    return main.main(["-m", "lora.r=2,4", *model, *SMALL, f"outputs={outputs}", "study=s", f"tracking.uri={uri}"])


@pytest.mark.slow
def test_study_on_a_guarded_server_is_whole(guarded, tiny_bert, tmp_path, monkeypatch):
    sign_in(monkeypatch, PASSWORD)
    assert swept(tiny_bert, tmp_path, guarded.uri) == 0
    client = MlflowClient(guarded.uri)
    study = client.get_run(remembered(tmp_path / "s").run_id)
    assert study.info.status == "FINISHED"
    assert "**Best**" in study.data.tags[outbox.NOTE]
    for number in range(2):
        folder = tmp_path / "s" / str(number)
        result = json.loads((folder / "result.json").read_text())
        run = client.get_run(remembered(folder).run_id)
        objective = Counter([(outbox.OBJECTIVE, 0, result["metric"]["value"])])
        assert in_mlflow(guarded.uri, folder) == in_file(folder) + objective
        assert run.data.tags["mlflow.parentRunId"] == study.info.run_id
        assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {"adapter", "result.json"}


@pytest.mark.slow
def test_wrong_password_stops_nothing_and_sync_sends_all_with_the_right_one(
    guarded, tiny_bert, tmp_path, monkeypatch, caplog
):
    sign_in(monkeypatch, "not-the-password")
    assert swept(tiny_bert, tmp_path, guarded.uri) == 0
    warnings = [r.getMessage() for r in caplog.records if r.name == "lorasweep.tracking"]
    assert len(warnings) == 1, warnings
    assert "user or password" in warnings[0]
    assert "lorasweep sync" in warnings[0]
    assert "not-the-password" not in caplog.text

    sign_in(monkeypatch, PASSWORD)
    counts = runs.sync(tmp_path / "s", compose.compose_trial([f"tracking.uri={guarded.uri}"]))
    assert (counts.sent, counts.failed) == (3, 0), counts
    for number in range(2):
        folder = tmp_path / "s" / str(number)
        assert in_file(folder) <= in_mlflow(guarded.uri, folder)
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == PASSWORD
