"""lorasweep from Python."""

import subprocess
import sys

import pytest

import lorasweep
from lorasweep.errors import ConfigError

SMALL = [
    "train.max_steps=2",
    "train.batch_size=8",
    "data.max_train_samples=64",
    "data.max_eval_samples=32",
    "tracking=none",
    "model.pooling=model",
]


def test_import_loads_nothing_heavy():
    heavy = "[m for m in ('torch', 'hydra', 'mlflow', 'pandas', 'optuna') if m in sys.modules]"
    code = f"import sys, lorasweep; print({heavy}, 'run' in dir(lorasweep))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'runs'"):
        _ = lorasweep.runs


def test_run_returns_the_result_and_load_best_its_model(tiny_bert, tmp_path):
    own = [f"model.pretrained={tiny_bert}", *SMALL, f"outputs={tmp_path}"]
    result = lorasweep.run(["lora.r=3", "study=one", *own])
    assert result["state"] == "COMPLETE" and "lora.r=3" in result["overrides"]
    assert result["folder"] == str(tmp_path / "one")
    model, tokenizer = lorasweep.load_best(result["folder"])
    assert not model.training and model.peft_config["default"].r == 3
    assert model(**tokenizer("Open a socket", return_tensors="pt")).logits.shape[0] == 1
    with pytest.raises(ConfigError, match="takes one trial, these overrides mean 2"):
        lorasweep.run(["lora.r=3,4", *own])
    with pytest.raises(ConfigError, match=r"takes a list of overrides, got a string; write run\(\['lora.r=3'\]\)"):
        lorasweep.run("lora.r=3")


def test_trial_whose_need_cannot_be_estimated_ends_well(tiny_bert, tmp_path, monkeypatch):
    from lorasweep.memory import estimate

    def failing(*_):
        raise NotImplementedError("no kernel for meta tensors")

    monkeypatch.setattr(estimate, "solo_gib", failing)
    own = [f"model.pretrained={tiny_bert}", *SMALL, f"outputs={tmp_path}"]
    result = lorasweep.run(["search.objectives=[peak_gib]", "study=one", *own])
    assert result["state"] == "COMPLETE" and result["peak_gib"] is None and result["worker_peak_gib"] > 0
    assert "peak_gib is not known: no kernel for meta tensors" in (tmp_path / "one/0/log.txt").read_text()
    (row,) = lorasweep.load_study(tmp_path / "one").to_dict("records")
    assert row["state"] == "COMPLETE" and row["metric"] is not None


def test_load_study_is_a_typed_table(tiny_bert, tmp_path):
    from lorasweep.cli import main

    own = [f"model.pretrained={tiny_bert}", *SMALL, f"outputs={tmp_path}", "study=s"]
    assert main.main(["-m", "lora.r=2,4", "lora.use_dora=false,true", *own]) == 0
    table = lorasweep.load_study(str(tmp_path / "s"))
    assert list(table.columns[:7]) == ["number", "state", "lora.r", "lora.use_dora", "metric", "trainable", "seconds"]
    assert table["lora.r"].tolist() == [2, 2, 4, 4] and table["lora.r"].dtype.kind == "i"
    assert table["lora.use_dora"].dtype.kind == "b" and table["metric"].dtype.kind == "f"
    assert table.attrs["metric"] == "accuracy"
    assert table["metric"].equals(table["eval_accuracy"].rename("metric"))
    assert table["test_accuracy"].notna().sum() == 1
    assert (table["trainable"] > 0).all() and (table["adapter_mb"] > 0).all()
