"""The winner as an MLflow model: loaded in a fresh process without a network, and champion or challenger."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest

from lorasweep.cli import main
from lorasweep.config import compose
from lorasweep.errors import ConfigError, MlflowDown
from lorasweep.serving import model_registry, predict
from lorasweep.study import example_scores
from lorasweep.study.study import Study
from lorasweep.tracking import mlflow_store

SMALL = ["train.max_steps=2", "train.batch_size=8", "data.max_train_samples=64", "data.max_eval_samples=32"]


def study(outputs: Path, model: Path, name: str, *overrides: str) -> Path:
    own = [f"model.pretrained={model}", "model.pooling=model", f"outputs={outputs}"]
    assert main.main([*own, *SMALL, f"study={name}", *overrides]) == 0
    return outputs / name


@pytest.fixture(scope="module")
def registered(tiny_bert, tmp_path_factory) -> Path:
    outputs = tmp_path_factory.mktemp("registry")
    study(outputs, tiny_bert, "one", "tracking.register=py")
    study(outputs, tiny_bert, "two", "tracking.register=py", "train.seed=1", "tracking.save_adapters=best")
    return outputs


def client(outputs: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{outputs}/mlflow.db")


def model_id(outputs: Path, name: str) -> str:
    return json.loads((outputs / name / "model.json").read_text())["model_id"]


@pytest.mark.integration
def test_model_answers_in_a_fresh_process_without_a_network(registered):
    code = """
import socket, sys
class Shut(socket.socket):
    def connect(self, *_): raise OSError("no network here")
socket.socket = Shut
sys.modules["lorasweep"] = None
import mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
print(model.metadata.signature.inputs.input_names(), model.metadata.signature.outputs.input_names())
print("RESULT", model.predict(pandas.DataFrame({"text": ["Open a socket", "Parse the tree"]}))["label"][1])
"""
    words = [f"sqlite:///{registered}/mlflow.db", f"models:/{model_id(registered, 'one')}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "['text'] ['label', 'score']" in done.stdout
    expected = predict.answers(predict.load(registered / "one" / "0"), ["Parse the tree"])[0]["label"]
    assert done.stdout.split("RESULT ")[1].strip() == expected


def test_base_is_not_copied(registered, tiny_bert):
    model = client(registered).get_logged_model(model_id(registered, "one"))
    folder = Path(model.artifact_location.removeprefix("file://"))
    sizes = {p.name: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    adapter = (registered / "one" / "0" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert sizes["adapter_model.safetensors"] == adapter
    tokenizer = sum(size for name, size in sizes.items() if name.startswith("tokenizer"))
    assert sum(sizes.values()) < adapter + tokenizer + 20_000


def test_answers_to_the_test_split_stay_out_of_the_store(registered):
    model = client(registered).get_logged_model(model_id(registered, "one"))
    kept = pq.read_table(Path(model.artifact_location.removeprefix("file://")) / example_scores.TEST_NAME)
    assert kept.num_rows == 32 and "answer" not in kept.column_names


def test_model_belongs_to_the_trials_run(registered):
    run_id = client(registered).get_logged_model(model_id(registered, "one")).source_run_id
    outputs = client(registered).get_run(run_id).outputs.model_outputs
    assert [m.model_id for m in outputs] == [model_id(registered, "one")]
    assert client(registered).get_run(run_id).data.tags["kind"] == "trial"


@pytest.mark.parametrize(("name", "copied"), [("one", True), ("two", False)])
def test_adapters_go_to_mlflow_with_their_run_only_where_all_are_kept(registered, name, copied):
    run_id = client(registered).get_logged_model(model_id(registered, name)).source_run_id
    assert ("adapter" in {a.path for a in client(registered).list_artifacts(run_id)}) is copied


def test_second_winner_within_noise_is_challenger(registered):
    found = client(registered).get_registered_model("py").aliases
    assert (str(found["champion"]), str(found["challenger"])) == ("1", "2")


def test_same_winner_is_logged_once(registered):
    opened = Study.open(registered / "one")
    assert model_registry.log_winner(opened, opened.spec([*opened.space.fixed])) == ""
    assert len(client(registered).search_model_versions("name='py'")) == 2


def test_sync_fills_another_store_and_says_where_it_cannot(registered, monkeypatch, capsys):
    def down(*_):
        raise MlflowDown("no answer")

    words = ["sync", str(registered / "one"), f"tracking.uri=sqlite:///{registered}/other.db"]
    with monkeypatch.context() as broken:
        broken.setattr(mlflow_store.Mirror, "push", down)
        assert main.main(words) == 1
    assert "no answer" in capsys.readouterr().out
    assert main.main(words) == 0
    other = mlflow.MlflowClient(f"sqlite:///{registered}/other.db")
    runs = other.search_runs([other.get_experiment_by_name("lorasweep").experiment_id])
    assert sorted(r.data.tags["kind"] for r in runs) == ["study", "trial"]
    (study,) = (r for r in runs if r.data.tags["kind"] == "study")
    (best,) = re.findall(r"\[trial \d\]\(#/runs/(\w+)\)", study.data.tags["mlflow.note.content"])
    assert best in {r.info.run_id for r in runs if r.data.tags["kind"] == "trial"}
    assert main.main(["sync", str(registered / "one"), "lora.r=8"]) == 1
    assert "sync: takes a study and tracking.uri=..., got 'lora.r=8'" in capsys.readouterr().err


def test_sync_logs_and_registers_a_model_that_mlflow_missed(tiny_bert, tmp_path, monkeypatch, capsys):
    def down(*_):
        raise MlflowDown("no answer")

    with monkeypatch.context() as broken:
        broken.setattr(model_registry.Registry, "_model", down)
        study(tmp_path, tiny_bert, "late", "tracking.register=late")
    assert "the model was not logged: no answer" in capsys.readouterr().out
    assert main.main(["sync", str(tmp_path / "late")]) == 0
    told = capsys.readouterr().out
    assert f"model in MLflow: models:/{model_id(tmp_path, 'late')}" in told
    assert "registered as late version 1, champion: the first" in told
    assert client(tmp_path).get_logged_model(model_id(tmp_path, "late")).status == "READY"
    assert main.main(["sync", str(tmp_path / "late")]) == 0
    assert "model in MLflow" not in capsys.readouterr().out
    assert len(client(tmp_path).search_model_versions("name='late'")) == 1


def test_study_does_not_fail_by_mlflow(registered):
    opened = Study.open(registered / "one")
    spec = opened.spec([*opened.space.fixed, "tracking.uri=http://127.0.0.1:9"])
    assert "the model was not logged" in model_registry.log_winner(opened, spec)


def test_nothing_is_logged_where_tracking_or_log_model_is_off(registered):
    opened = Study.open(registered / "two")
    (registered / "two" / "model.json").unlink()
    for off in (["tracking=none"], ["tracking.log_model=false", "tracking.register=null"]):
        assert model_registry.log_winner(opened, opened.spec([*opened.space.fixed, *off])) == ""


def test_champion_is_compared_by_what_mlflow_keeps_once_its_study_is_gone(tiny_bert, tmp_path, capsys):
    study(tmp_path, tiny_bert, "old", "tracking.register=kept")
    shutil.rmtree(tmp_path / "old")
    capsys.readouterr()
    study(tmp_path, tiny_bert, "new", "tracking.register=kept", "train.seed=1")
    assert "the champion's 0." in (said := capsys.readouterr().out) and "on the same 32 test examples" in said


@pytest.mark.parametrize("name", ["", "a/b", "a:b"])
def test_name_that_mlflow_refuses_is_told_before_the_study(name):
    with pytest.raises(ConfigError, match=r"tracking\.register"):
        compose.compose_trial([f"tracking.register='{name}'"])
