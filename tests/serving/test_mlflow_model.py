"""Each task's trial as an MLflow model: used in a fresh process without a network, it answers as `predict` does."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pandas
import pytest
import yaml

from lorasweep.config import compose
from lorasweep.errors import ConfigError
from lorasweep.lora import adapter
from lorasweep.models import base_model
from lorasweep.serving import mlflow_model, predict
from lorasweep.tasks import task_state
from lorasweep.tasks.seq_cls import SeqCls
from lorasweep.training import workload

pytestmark = pytest.mark.integration

FRESH = """
import json, socket, sys
class Shut(socket.socket):
    def connect(self, *_): raise OSError("no network here")
socket.socket = Shut
import mlflow, pandas
told = {}
for name, (folder, rows) in json.loads(sys.argv[1]).items():
    model = mlflow.pyfunc.load_model(folder)
    found = model.predict(pandas.DataFrame(rows))
    told[name] = found.to_dict("records") if hasattr(found, "to_dict") else found
    if "pipeline" in name:
        told[name + " itself"] = mlflow.transformers.load_model(folder)(next(iter(rows[0].values())))
    assert not (name.startswith("pipeline") and "lorasweep" in sys.modules), "a pipeline needs no lorasweep"
print("RESULT" + json.dumps(told, default=float))
"""
QUESTION = {"question": "Which module opens files?", "context": "The module io opens files and streams."}
TEXTS = ["Open a socket and read from it", "Parse the tree", "word " * 400]
PAIRS: dict[str, list[dict[str, Any]]] = {
    "pipeline SEQ_CLS": [{"text": t} for t in TEXTS],
    "pipeline TOKEN_CLS": [{"tokens": "call bind ( address )"}, {"tokens": "the"}],
    "pipeline CAUSAL_LM": [{"text": "Open a socket"}, {"text": "Return the"}],
    "pipeline CAUSAL_LM prompt": [{"prompt": "Open {a} socket"}, {"prompt": "Return"}],
    "QUESTION_ANS": [QUESTION],
    "SEQ_2_SEQ_LM": [{"source": "Open a socket"}],
    "FEATURE_EXTRACTION": [{"anchor": "Open a socket"}],
}


@pytest.fixture(scope="module")
def trials(tiny_bert, tiny_llama, tiny_t5, tmp_path_factory) -> dict[str, Path]:
    """Return the folder of a trial for each of PAIRS."""
    out = {}
    for name in PAIRS:
        place = tmp_path_factory.mktemp(name.replace(" ", "_"))
        task = name.removeprefix("pipeline ").split()[0]
        base = {"CAUSAL_LM": tiny_llama, "SEQ_2_SEQ_LM": tiny_t5}.get(task, tiny_bert)
        more = [f"task_type={task.lower()}", "task_type.max_new_tokens=4", f"model.pretrained={base}"]
        more += ["model.decoder=null"] if task == "SEQ_2_SEQ_LM" else []
        if name.endswith("prompt"):
            rows = [json.dumps({"q": f"What is {i}?", "a": f"number {i}"}) for i in range(40)]
            (place / "rows.jsonl").write_text("\n".join(rows))
            more += ["data=jsonl", f"data.path={place}/rows.jsonl", "data.prompt_column=q", "data.completion_column=a"]
            more += ["data.prompt_suffix=' {end}:'"]
        if task == "SEQ_CLS":
            more += ["data.max_tokens=64", "model.pooling=model"]
        out[name] = trial(place, more)
    return out


def trial(folder: Path, overrides: list[str]) -> Path:
    """Return the folder, with what a trial leaves whose adapter changes the base at random."""
    small = ["data.max_train_samples=48", "data.max_eval_samples=16", "model=minilm"]
    spec = compose.compose_trial([*small, "lora.init_lora_weights=false", "lora.lora_alpha=64", *overrides])
    work = workload.workload(spec)
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    adapter.save(adapter.attach(base, spec.lora, spec.task_type, seed=1), folder / "adapter")
    task_state.write(folder, work.task)
    (folder / task_state.CONFIG).write_text(yaml.safe_dump(spec.to_dict()))
    return folder


@pytest.fixture(scope="module")
def answered(trials, tmp_path_factory) -> dict[str, Any]:
    """Return what each model says in one fresh process."""
    place = tmp_path_factory.mktemp("models")
    asked = {}
    for i, (name, folder) in enumerate(trials.items()):
        saved = place / str(i) / "model"
        saved.parent.mkdir()
        mlflow_model.save(folder, saved, place / "bases")
        asked[name] = (str(saved), PAIRS[name])
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FRESH, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1]) | {"folders": {n: f for n, (f, _) in asked.items()}}


@pytest.mark.parametrize("name", ["pipeline SEQ_CLS"])
def test_pipeline_names_the_class_that_predict_names(name, trials, answered):
    expected = predict.answers(predict.load(trials[name]), PAIRS[name])
    assert [row["label"] for row in answered[name]] == [a["label"] for a in expected]
    assert [row["score"] for row in answered[name]] == pytest.approx([a["probability"] for a in expected], abs=1e-5)


@pytest.mark.parametrize("name", ["pipeline CAUSAL_LM", "pipeline CAUSAL_LM prompt"])
def test_pipeline_writes_what_predict_writes(name, trials, answered):
    expected = [a["text"] for a in predict.answers(predict.load(trials[name]), PAIRS[name])]
    assert answered[name] == expected
    assert all(expected)


def test_pipeline_tags_what_predict_tags(trials, answered):
    name = "pipeline TOKEN_CLS"
    expected = [a["tags"] for a in predict.answers(predict.load(trials[name]), PAIRS[name])]
    assert len(answered[name]) == len(expected)
    assert set(answered[name][0].split(",")) == {tag.removeprefix("B-").removeprefix("I-") for tag in expected[0]}
    assert {part["entity"] for part in answered[f"{name} itself"]} <= {*expected[0]} - {"O"}


@pytest.mark.parametrize("name", ["QUESTION_ANS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"])
def test_pyfunc_answers_as_predict(name, trials, answered):
    (expected,) = predict.answers(predict.load(trials[name]), PAIRS[name])
    (found,) = answered[name]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value, abs=1e-5) if key == "embedding" else value)


def test_flavour_and_signature_stand_in_the_model(answered):
    for name, folder in answered["folders"].items():
        told = yaml.safe_load((Path(folder) / "MLmodel").read_text())
        assert ("transformers" in told["flavors"]) is name.startswith("pipeline")
        given = mlflow.models.get_model_info(folder).signature
        assert given.inputs.input_names() == list(PAIRS[name][0])


def test_base_is_linked_not_copied(trials, answered, tiny_bert):
    folder = Path(answered["folders"]["pipeline SEQ_CLS"])
    told = yaml.safe_load((folder / "MLmodel").read_text())["flavors"]["transformers"]
    base = Path(told["local_base_model_path"])
    assert (base / "model.safetensors").is_symlink()
    assert (base / "model.safetensors").resolve() == (tiny_bert / "model.safetensors").resolve()
    assert len(json.loads((base / "config.json").read_text())["id2label"]) > 2
    weights = [p for p in folder.rglob("*.safetensors")]
    assert [p.name for p in weights] == ["adapter_model.safetensors"]


def test_what_no_pipeline_can_serve_says_why(trials):
    folder = trials["pipeline SEQ_CLS"]
    spec = task_state.settings(folder)
    task = task_state.task_of(folder, spec)
    assert mlflow_model.no_pipeline(spec, task) == ""
    mean = replace(spec, model=replace(spec.model, pooling="mean"))
    assert "pool" in mlflow_model.no_pipeline(mean, task)
    foreign = replace(spec, model=replace(spec.model, trust_remote_code=True))
    assert "own code" in mlflow_model.no_pipeline(foreign, task)
    coarse = replace(spec, lora=replace(spec.lora, init_lora_weights="loftq"))
    assert "loftq" in mlflow_model.no_pipeline(coarse, task)
    task.kind = "multi_label"
    assert "one class" in mlflow_model.no_pipeline(spec, task)


def test_pipeline_that_answers_otherwise_gives_way_to_a_pyfunc_model(trials, tmp_path, monkeypatch):
    monkeypatch.setattr(SeqCls, "pipeline_arguments", lambda *_: {"truncation": True, "max_length": 3})
    mlflow_model.save(trials["pipeline SEQ_CLS"], tmp_path / "model", tmp_path / "bases")
    told = yaml.safe_load((tmp_path / "model" / "MLmodel").read_text())
    assert set(told["flavors"]) == {"python_function"}


def test_texts_that_bring_the_start_token_are_answered_by_predict(tiny_bert, tmp_path):
    """A pipeline would put it there twice."""
    rows = [json.dumps({"text": f"[CLS] a text {i}", "label": "ab"[i % 2]}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = ["data=jsonl", f"data.path={tmp_path}/rows.jsonl", "model.pooling=model"]
    folder = trial(tmp_path / "trial", ["task_type=seq_cls", f"model.pretrained={tiny_bert}", *data])
    mlflow_model.save(folder, tmp_path / "model", tmp_path / "bases")
    told = yaml.safe_load((tmp_path / "model" / "MLmodel").read_text())
    assert set(told["flavors"]) == {"python_function"}
    marked, plain = mlflow_model.Answerer(folder).predict(pandas.DataFrame({"text": ["[CLS] a text 3", "a text 3"]}))
    assert marked == plain


@pytest.mark.parametrize("name", ["pipeline TOKEN_CLS", "SEQ_2_SEQ_LM"])
def test_model_that_answers_otherwise_is_not_logged(name, trials, tmp_path, monkeypatch):
    """A PARTS without task.json or with another adapter would load, and answer, all the same."""
    answers = predict.answers
    monkeypatch.setattr(predict, "answers", lambda loaded, given: [other(a) for a in answers(loaded, given)])
    monkeypatch.setattr(
        mlflow_model.Answerer, "predict", lambda self, rows, params=None: answers(self._loaded, rows.to_dict("records"))
    )
    with pytest.raises(ConfigError, match="the trial"):
        mlflow_model.save(trials[name], tmp_path / "model", tmp_path / "bases")


def other(answer: dict[str, Any]) -> dict[str, Any]:
    return {k: [*reversed(v), "X"] if isinstance(v, list) else f"{v}x" for k, v in answer.items()}
