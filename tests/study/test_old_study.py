"""A study that an older lorasweep left is resumed, reported, used and read by MLflow with today's code."""

import json
from pathlib import Path

import mlflow
import pandas
import pytest
import torch
import transformers
from support import old_study

from lorasweep.cli import main
from lorasweep.study.study import Study

TEXTS = ["open the socket", "parse the tree"]


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    return old_study.unpack(tmp_path_factory.mktemp("old"))


def said(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main.main(list(words)) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def answers(study) -> list[str]:
    """Return the classes that the older pyfunc model names, before anything is resumed."""
    found = mlflow.pyfunc.load_model(str(study.parents[1] / "old_model")).predict(pandas.DataFrame({"text": TEXTS}))
    return [row["label"] for row in (found.to_dict("records") if hasattr(found, "to_dict") else found)]


def test_older_trial_answers_as_its_older_mlflow_model_and_its_export_do(study, answers, tmp_path, capsys):
    lines = said(capsys, "predict", str(study), "--trial", "0", *TEXTS, "--json").splitlines()
    assert [json.loads(line)["label"] for line in lines] == answers
    said(capsys, "export", str(study), "--trial", "0", "--to", str(tmp_path / "merged"), "--merged")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        best = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.argmax(-1)
    assert [model.config.id2label[int(i)] for i in best] == answers


def test_older_interrupted_trial_goes_on_from_its_checkpoint(study, answers, capsys):
    step = Study.open(study).trial(2).user_attrs["checkpoint_step"]
    said(capsys, "resume", str(study))
    assert [t.state.name for t in Study.open(study).trials()] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert f"goes on from step {step}" in (study / "2" / "log.txt").read_text()
    lines = [json.loads(line) for line in (study / "2" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, 301))
    said(capsys, "report", str(study))
    page = (study / "report.html").read_text()
    assert "PRUNED" in page or "pruned" in page
    client = mlflow.MlflowClient(f"sqlite:///{study.parent}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("lorasweep").experiment_id], "tags.kind = 'trial'")
    assert {r.data.tags["trial"]: r.data.tags["state"] for r in runs} == {
        "0": "COMPLETE",
        "1": "PRUNED",
        "2": "COMPLETE",
    }
