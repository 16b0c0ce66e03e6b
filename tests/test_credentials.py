"""Nothing secret is written, nothing foreign is run, and no name from a config leads out of the outputs folder."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lorasweep import tasks
from lorasweep.cli import main
from lorasweep.config import compose, sweep_file
from lorasweep.config.overrides import override_text
from lorasweep.credentials import redact, tracking_uri
from lorasweep.errors import ConfigError
from lorasweep.lora import adapter
from lorasweep.models import base_model
from lorasweep.runner import rehearsal
from lorasweep.tracking import runs

SECRETS = {
    "HF_TOKEN": "hf_QpLmZxNvBcRtYuWoKd",
    "MLFLOW_TRACKING_PASSWORD": "trackpass-77123",
    "MLFLOW_TRACKING_TOKEN": "tracktoken-99321",
    "AWS_SECRET_ACCESS_KEY": "awskey-55423/xyz",
    "PGPASSWORD": "pgpass-31887",
}
IN_URLS = ("pa55word-of-uri", "pa55word-of-store", "sas-signature-123")
SMALL = ["train.max_steps=2", "train.eval_every=1", "data.max_train_samples=32", "data.max_eval_samples=16"]

BREAKS = """
import os, sys
from lorasweep.cli import main
from lorasweep.lora import adapter
from lorasweep.runner import rehearsal
rehearsal.rehearse = lambda *_: []
attach, names = adapter.attach, sys.argv[1].split(",")
def broken(base, lora, *rest):
    if lora.r == 4 and base.model.device.type != "meta":  # a worker, not the plan
        told = " ".join(os.environ[name] for name in names)
        raise RuntimeError(f"401 for http://me:pa55word-of-uri@host/x?token=sas-signature-123 with {told}")
    return attach(base, lora, *rest)
adapter.attach = broken
sys.exit(main.main(sys.argv[2:]))
"""


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def found_in(written: dict[str, bytes]) -> list[str]:
    secrets = [*SECRETS.values(), *IN_URLS]
    return [
        f"{secret} in {name}" for name, content in written.items() for secret in secrets if secret.encode() in content
    ]


def arguments(tiny_bert: Path, outputs: Path) -> list[str]:
    return ["-m", f"model.pretrained={tiny_bert}", *SMALL, f"outputs={outputs}", "study=s"]


def broken_sweep(words: list[str], folder: Path) -> dict[str, bytes]:
    """Return what a process of its own says that runs BREAKS in a folder."""
    command = [sys.executable, "-c", BREAKS, ",".join(SECRETS), *words]
    done = subprocess.run(command, capture_output=True, cwd=folder, env=os.environ | SECRETS, check=False)
    assert done.returncode == 3, done.stderr
    return {"stdout": done.stdout, "stderr": done.stderr}


def broken_sweep_here(words: list[str], folder: Path, monkeypatch, capfd) -> dict[str, bytes]:
    """Return what this process says when it runs BREAKS in a folder, without a start of Python."""
    for name, value in (SECRETS | {"MLFLOW_TRACKING_USERNAME": ""}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runs, "_senders", {})
    monkeypatch.setattr(adapter, "attach", adapter.attach)
    monkeypatch.setattr(rehearsal, "rehearse", rehearsal.rehearse)
    monkeypatch.setattr(sys, "argv", ["-c", ",".join(SECRETS), *words])
    monkeypatch.chdir(folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        exec(BREAKS, {})
    told = capfd.readouterr()
    assert ended.value.code == 3, told.err
    return {"stdout": told.out.encode(), "stderr": told.err.encode()}


@pytest.mark.parametrize("store", ["sqlite", "server"])
def test_no_secret_is_written_by_trials_that_end_well_or_fail(store, tiny_bert, tmp_path, monkeypatch, capfd):
    words = [*arguments(tiny_bert, tmp_path / "outputs"), "lora.r=2,4"]
    if store == "server":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words += [f"tracking.uri=http://user:pa55word-of-uri@127.0.0.1:{port}"]
        told = broken_sweep_here(words, tmp_path, monkeypatch, capfd)
    else:
        told = broken_sweep(words, tmp_path)
    written = everything(tmp_path)
    assert b"401 for http://***@host" in written["outputs/s/1/log.txt"]
    assert b"401 for" in written["outputs/s/1/result.json"]
    assert b"401 for" in written["outputs/s/journal.log"]
    assert {"outputs/s/report.html", "outputs/s/report.md", "outputs/s/best.yaml"} <= written.keys()
    assert any(name.endswith("MLmodel") for name in written) == (store == "sqlite")
    assert ("outputs/mlflow.db" in written) == (store == "sqlite")
    assert found_in(written | told) == []


@pytest.mark.parametrize(
    "words",
    [
        ["lora.r=2", "search.storage=postgresql://me:pa55word-of-store@127.0.0.1:1/db"],
        ["lora.r=2", "search.storage=mysql://me:pa55word-of-store@127.0.0.1:1/db"],
        ["lora.r=2", "tracking.uri=mysql://me:pa55word-of-uri@127.0.0.1:1/db"],
        ["lora.r=2", "data=csv", "data.path=https://me:pa55word-of-store@host/x.csv?token=sas-signature-123"],
        ["lora.r=2", f"model.pretrained=some/{SECRETS['HF_TOKEN']}"],
    ],
)
def test_no_secret_is_in_what_a_refused_command_says(words, tiny_bert, tmp_path, monkeypatch, capfd):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    assert main.main([*arguments(tiny_bert, tmp_path / "outputs"), *words]) == 1
    told = capfd.readouterr()
    assert "ConfigError" in told.err
    assert found_in({"stdout": told.out.encode(), "stderr": told.err.encode()} | everything(tmp_path)) == []


def test_password_of_a_database_that_mlflow_uses_goes_to_the_environment(monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "")
    kept = tracking_uri("postgresql+psycopg://me:pa%40ss@host/db")
    assert (kept, os.environ["PGPASSWORD"]) == ("postgresql+psycopg://me@host/db", "pa@ss")


def test_secret_is_taken_out_wherever_it_stands(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    text = "".join(f"{value}, '{value}' and x?key={value}\n" for value in SECRETS.values())
    assert redact(text) == "***, '***' and x?key=***\n" * len(SECRETS)


def test_words_that_are_no_secret_stay(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "tokenizers-parallel")
    monkeypatch.setenv("HF_TOKEN", "short")
    text = "tokenizers-parallel, short, lora.r=8, http://127.0.0.1:5000"
    assert redact(text) == text


# --- what a checkpoint may do ----------------------------------------------------------------------------------------


@pytest.fixture
def with_code(tiny_bert, tmp_path) -> Path:
    """Return a model folder whose own Python code leaves a file where it is run."""
    folder = tmp_path / "with_code"
    shutil.copytree(tiny_bert, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "stranger"}
    config["auto_map"] = {"AutoConfig": "stranger.Config", "AutoModelForSequenceClassification": "stranger.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    code = f"from pathlib import Path\nfrom transformers import BertConfig, BertForSequenceClassification\n\
Path({str(tmp_path / 'was_here')!r}).touch()\n\
class Config(BertConfig):\n    model_type = 'stranger'\n\
class Model(BertForSequenceClassification):\n    config_class = Config\n"
    (folder / "stranger.py").write_text(code)
    return folder


def load(folder: Path, tokenizer: Path, *overrides: str) -> base_model.Base:
    trial = compose.compose_trial([f"model.pretrained={folder}", *overrides])
    task = tasks.make(trial.task_type)
    task.model_kwargs = dict  # type: ignore[method-assign]
    return base_model.load(trial.model, trial.train, task, transformers.AutoTokenizer.from_pretrained(tokenizer))


def test_code_of_a_checkpoint_runs_only_when_asked(with_code, tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    with pytest.raises(ConfigError, match=r"model\.pretrained: cannot load"):
        load(with_code, tiny_bert)
    assert not (tmp_path / "was_here").exists()
    load(with_code, tiny_bert, "model.trust_remote_code=true")
    assert (tmp_path / "was_here").exists()


def test_pickled_weights_are_loaded_only_when_asked(tiny_bert, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_bert, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    with pytest.raises(ConfigError, match="safetensors"):
        load(folder, tiny_bert)
    assert load(folder, tiny_bert, "model.use_safetensors=false").missing == ("classifier",)


# --- where files go --------------------------------------------------------------------------------------------------


BAD_NAMES = [
    "../../x",
    "..",
    "a/b",
    "/tmp/x",
    "a\\b",
    ".hidden",
    "~/x",
    "x\n",
    "x\0y",
    "a" * 201,
    "x.",
    "NUL",
    "com1.txt",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_name_of_a_study_cannot_lead_out_of_the_outputs_folder(name):
    with pytest.raises(ConfigError, match="study: must be letters"):
        compose.compose_trial([f"study={override_text(name)}"])


@pytest.mark.parametrize("name", ["console", "nullable", "com", "a" * 200, "2.x_y-z"])
def test_name_that_is_a_folders_everywhere_is_taken(name):
    assert compose.compose_trial([f"study={name}"]).study == name


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        *(("tracking.register", v, "must be a name") for v in ("../x", "a:b", "..", " ", "a\nb", "a" * 201)),
        *(("tracking.experiment", v, "must be a name") for v in ("", "..", "a\nb", "a" * 201)),
        *(
            ("model.pretrained", v, "model.pretrained: ")
            for v in ("package:../x", "package:a.b", "package:", "fetched:../x")
        ),
        *(
            (key, "x\0y", "null byte")
            for key in ("outputs", "model.pretrained", "data.path", "tracking.experiment", "tracking.register")
        ),
        ("search.warm_start", ["x\0y"], "null byte"),
    ],
)
def test_value_that_names_no_file_and_no_model_is_refused_in_words(key, value, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        base_model.source(compose.compose_trial([f"{key}={override_text(value)}"]).model)


HOSTILE = ["../../escape", "/tmp/escape", "NUL", "a" * 300, "<script>"]


def test_whatever_data_and_names_hold_files_stay_in_the_outputs_folder(tiny_bert, tmp_path, monkeypatch):
    place = tmp_path / "some" / "where"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    rows = [json.dumps({"text": f"{label} {i}", "label": label}) for i in range(40) for label in HOSTILE]
    (place / "rows.jsonl").write_text("\n".join(rows))
    before = everything(tmp_path).keys()
    words = [*arguments(tiny_bert, Path("outputs")), "lora.r=2,4", "data=jsonl", "data.path=rows.jsonl"]
    words += [
        "data.text_column=text",
        "data.label_column=label",
        "tracking.register=con",
        "tracking.experiment=../../x",
    ]
    assert main.main(words) == 0
    assert main.main(["export", "outputs/s"]) == 0
    assert main.main(["extend", "outputs/s", "study=../../x", "lora.r=2,8"]) == 1
    assert main.main(["add", "outputs/s", "--like", "../0"]) == 1
    assert main.main(["export", "outputs/s", "--trial", "../0"]) == 1
    new = everything(tmp_path).keys() - before
    assert "some/where/outputs/s/export-0/README.md" in new or "some/where/outputs/s/export-1/README.md" in new
    assert [name for name in new if not name.startswith("some/where/outputs/")] == []
    assert not Path("/tmp/escape").exists()


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "x\0", "x\0.yaml", "x" * 300, "x" * 300 + ".yaml"])
def test_name_of_a_sweep_that_is_no_file_is_refused(name):
    with pytest.raises(ConfigError, match="--sweep: "):
        sweep_file.sweep_file(name)


@pytest.mark.parametrize("group", ["model", "data"])
@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "x" * 300])
def test_name_of_a_preset_that_is_none_is_refused(group, name):
    with pytest.raises(ConfigError):
        compose.compose_trial([f"{group}={name}"])


def test_name_of_a_databases_study_cannot_lead_out_of_the_outputs_folder(tmp_path, capsys):
    assert main.main(["work", "postgresql://nobody@127.0.0.1:1/none", "study=../../x", f"outputs={tmp_path}"]) == 1
    assert "study: must be letters" in capsys.readouterr().err


def test_ui_listens_on_this_machine_alone(tmp_path, monkeypatch):
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert main.main(["ui", f"outputs={tmp_path}"]) == 0
    assert commands[0][commands[0].index("--host") + 1] == "127.0.0.1"


def test_ui_of_a_server_is_the_servers_own(tmp_path, capsys):
    assert main.main(["ui", "tracking.uri=http://me:pa55word-of-uri@127.0.0.1:1"]) == 0
    told = capsys.readouterr().out
    assert "http://127.0.0.1:1 is a server" in told
    assert "pa55word" not in told
