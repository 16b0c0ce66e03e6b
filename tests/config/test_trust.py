"""A study that somebody sent runs nothing: its model's code and its launcher's commands wait for a flag."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import transformers

import lorasweep
from lorasweep.cli import main
from lorasweep.config import compose, trust
from lorasweep.errors import ConfigError
from lorasweep.study.meta import read_meta, write_meta
from lorasweep.study.study import Study


@pytest.fixture(scope="module")
def sent(tiny_bert, tmp_path_factory) -> Path:
    """Return the folder of a study whose model brings code that leaves the file `was_here` beside the model."""
    place = tmp_path_factory.mktemp("sent")
    model = place / "with_code"
    shutil.copytree(tiny_bert, model)
    config = json.loads((model / "config.json").read_text()) | {"model_type": "planted"}
    config["auto_map"] = {"AutoConfig": "planted.Config", "AutoModelForSequenceClassification": "planted.Model"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "planted.py").write_text(
        "from pathlib import Path\nfrom transformers import BertConfig, BertForSequenceClassification\n"
        f"Path({str(place / 'was_here')!r}).touch()\n"
        "class Config(BertConfig):\n    model_type = 'planted'\n"
        "class Model(BertForSequenceClassification):\n    config_class = Config\n"
    )
    words = [f"model.pretrained={model}", "model.trust_remote_code=true", "train.max_steps=1", "lora.r=2,4"]
    words += ["data.max_train_samples=32", "data.max_eval_samples=16", f"outputs={place / 'outputs'}", "study=s"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(place / "modules"))
        assert main.main(["-m", *words, "tracking.enabled=false"]) == 0
    assert (place / "was_here").exists()
    return place / "outputs/s"


@pytest.fixture
def mark(sent, tmp_path, monkeypatch) -> Path:
    """Return the file that the planted code leaves, which is not there, in a process that has not loaded it."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name in [n for n in sys.modules if n.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    path = sent.parent.parent / "was_here"
    path.unlink(missing_ok=True)
    return path


COMMANDS = [
    ["predict", "{}", "a text"],
    ["export", "{}", "--to", "{}/out"],
    ["export", "{}", "--merged", "--to", "{}/merged"],
    ["resume", "{}"],
    ["add", "{}", "lora.r=3"],
    ["add", "{}", "--like", "0"],
    ["work", "{}"],
    ["extend", "{}", "study=t", "lora.r=2,8"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_code_of_a_foreign_studys_model_is_refused(words, sent, mark, capsys):
    assert main.main([word.format(sent) for word in words]) == 1
    said = capsys.readouterr().err
    assert "model.trust_remote_code=true" in said
    assert "--trust-remote-code" in said
    assert not mark.exists()


@pytest.mark.parametrize(
    "words", [["report", "{}"], ["status", "{}"], ["clean", "{}"], ["sync", "{}"], ["stop", "{}", "--all"]]
)
def test_commands_that_load_no_model_run_none_of_its_code(words, sent, mark):
    main.main([word.format(sent) for word in words])
    assert not mark.exists()


def test_flag_lets_the_code_run(sent, mark, capsys):
    assert main.main(["predict", str(sent), "a text", "--trust-remote-code"]) == 0
    assert mark.exists()


def test_best_model_in_python_waits_for_the_same_word(sent, mark):
    with pytest.raises(ConfigError, match="trust-remote-code"):
        lorasweep.load_best(sent)
    assert not mark.exists()
    lorasweep.load_best(sent, trust_remote_code=True)


def test_trial_in_the_queue_of_a_foreign_study_loses_its_code(sent):
    line = ["model.pretrained=x", "model.trust_remote_code=true", "model.use_safetensors=false"]
    model = Study.open(sent).spec(line).model
    assert (model.trust_remote_code, model.use_safetensors) == (False, True)
    assert Study.open(sent, trusted=True).spec(line).model.trust_remote_code


@pytest.mark.parametrize("word", ["model.trust_remote_code=true", "model.use_safetensors=false"])
def test_both_ways_to_run_code_are_named(word):
    asks = compose.compose_trial(["model.pretrained=x", word])
    with pytest.raises(ConfigError, match=word):
        trust.refuse_code([asks], "outputs/s")
    assert trust.code_of(trust.without_code(asks)) == []


COMMAND_WORDS = [
    "hydra.launcher._target_=os.system",
    "+hydra.launcher.setup=['touch /tmp/x']",
    "hydra.launcher.partition='a\n#SBATCH --wrap=x'",
    "hydra.launcher.python=/tmp/x",
    "hydra/launcher=other",
    "hydra.searchpath=[file:///tmp]",
    "hydra.callbacks.x._target_=os.system",
    "+hydra.job.env_set.PYTHONPATH=/tmp",
    "+hydra.launcher.ray.init.runtime_env={py_modules:[/tmp/x]}",
]


@pytest.mark.parametrize("word", COMMAND_WORDS)
def test_commands_of_a_foreign_studys_launcher_are_refused(word, sent, tmp_path, capsys):
    from dataclasses import replace

    shutil.copytree(sent, tmp_path / "s")
    meta = read_meta(sent)
    plain = [o for o in meta.overrides if "trust" not in o]
    write_meta(tmp_path / "s", replace(meta, launcher=[word], overrides=plain))
    assert main.main(["resume", str(tmp_path / "s")]) == 1
    assert "give it here again" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.launcher.partition=gpu"])
def test_sizes_and_places_of_a_launcher_stay(word):
    trust.refuse_commands([word], "outputs/s")
