"""The whole way, as a person runs it: what is printed, what is left in the folder and in MLflow, and the exit code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import yaml
from support.studies import SMALL

from lorasweep.cli import main
from lorasweep.errors import ConfigError
from lorasweep.study.study import Study


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "lorasweep", *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.fixture(scope="module")
def swept(tiny_bert, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    outputs = tmp_path_factory.mktemp("outputs")
    model = [f"model.pretrained={tiny_bert}"]
    return command("-m", "lora.r=2,4,8", *model, *SMALL, f"outputs={outputs}", "study=s"), outputs


def results(outputs: Path) -> list[dict]:
    return [json.loads((outputs / "s" / str(i) / "result.json").read_text()) for i in range(3)]


def test_sweep_ends_well_and_prints_a_parseable_table(swept):
    done, outputs = swept
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    assert rows[0] == ["trial", "lora.r", "eval accuracy", "trainable", "seconds", "adapter MB", "state"]
    assert [row[:2] for row in rows[1:]] == [["0", "2"], ["1", "4"], ["2", "8"]]
    for row, result in zip(rows[1:], results(outputs), strict=True):
        assert float(row[2]) == pytest.approx(result["metric"]["value"], abs=1e-4)
        assert int(row[3].replace(",", "")) == result["params"]["trainable"]
    assert "majority accuracy" in done.stdout
    assert re.search(r"run it again: python -m lorasweep .*lora\.r=", done.stdout)
    assert "lorasweep ui outputs=" in done.stdout


def test_every_file_that_a_study_leaves_is_described(swept):
    _, outputs = swept
    described = (Path(__file__).parents[2] / "docs" / "files.md").read_text(encoding="utf8")
    left = [*outputs.iterdir(), *(outputs / "s").iterdir(), *(outputs / "s" / "0").iterdir()]
    names = [f"{path.name}/" if path.is_dir() else path.name for path in left if path.name != "s"]
    assert [name for name in names if f"`{name}`" not in described] == []


def test_trial_leaves_what_it_was_made_from_and_what_it_made(swept):
    _, outputs = swept
    folder = outputs / "s" / "1"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["lora"]["r"] == 4
    run = json.loads((folder / "run.json").read_text())
    assert run["seed"] == 0
    assert run["versions"]["peft"] == pytest.importorskip("peft").__version__
    assert "lora.r=4" in run["overrides"]
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [p["step"] for p in points if "train_loss" in p] == [1, 2, 3, 4]
    assert [p["step"] for p in points if "eval_accuracy" in p] == [2, 4]
    result = json.loads((folder / "result.json").read_text())
    assert result["reload"]["same"] is True
    assert result["reload"]["metric"] == result["metric"]["value"]
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 4
    examples = (folder / "examples.txt").read_text()
    assert examples.count("label: ") == examples.count("answer: ") == 8
    assert (folder / "log.txt").read_text().strip().endswith("COMPLETE")


def test_test_split_is_read_for_the_winner_alone(swept):
    _, outputs = swept
    best = Study.open(outputs / "s").best()
    assert best is not None
    assert [("test" in r) for r in results(outputs)] == [i == best.number for i in range(3)]


def test_mlflow_holds_a_parent_and_its_trials(swept):
    _, outputs = swept
    client = mlflow.MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    experiment = client.get_experiment_by_name("lorasweep")
    runs = client.search_runs([experiment.experiment_id])
    parent = next(r for r in runs if r.data.tags["kind"] == "study")
    children = sorted((r for r in runs if r.data.tags["kind"] == "trial"), key=lambda r: r.data.tags["trial"])
    assert [r.data.params["lora.r"] for r in children] == ["2", "4", "8"]
    assert all(r.data.tags["mlflow.parentRunId"] == parent.info.run_id for r in children)
    assert {r.info.status for r in runs} == {"FINISHED"}
    for run, result in zip(children, results(outputs), strict=True):
        assert run.data.metrics["objective"] == pytest.approx(result["metric"]["value"]), "of the evaluation it keeps"
        assert run.data.metrics["params_trainable"] == result["params"]["trainable"]
        parts = [run.data.metrics[f"params_{k}"] for k in ("lora", "bias", "modules_to_save")]
        assert sum(parts) == result["params"]["trainable"]
        assert len(client.get_metric_history(run.info.run_id, "train_loss")) == 4
        assert run.inputs.dataset_inputs[0].dataset.digest == result["data_fingerprint"][:32]
        assert "adapter" in {a.path for a in client.list_artifacts(run.info.run_id)}
        assert run.data.tags["state"] == "COMPLETE"


def test_speed_and_share_of_the_peak_are_in_result_and_mlflow(swept):
    _, outputs = swept
    client = mlflow.MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    experiment = client.get_experiment_by_name("lorasweep")
    runs = client.search_runs([experiment.experiment_id], "tags.kind = 'trial'")
    told = {r.data.tags["trial"]: r.data.metrics for r in runs}
    for number, result in enumerate(results(outputs)):
        speeds = {k: result[k] for k in ("tokens_per_s", "flops_per_s", "matmul_share", "peak_gib")}
        assert min(speeds.values()) > 0
        assert result["matmul_share"] < 1
        assert {k: told[str(number)][k] for k in speeds} == pytest.approx(speeds)


def test_same_study_again_is_refused(swept, capsys):
    _, outputs = swept
    before = sorted(p.name for p in (outputs / "s").iterdir())
    assert main.main(["lora.r=2", f"outputs={outputs}", "study=s"]) == 1
    assert "choose another name" in capsys.readouterr().err
    assert sorted(p.name for p in (outputs / "s").iterdir()) == before


def test_machine_that_cannot_load_the_winner_says_so_and_another_scores_it(tiny_bert, tmp_path, monkeypatch, capsys):
    from lorasweep.runner import outcome

    def refuse(*_):
        raise ConfigError(["train.device: there is no GPU"])

    with monkeypatch.context() as launching:
        launching.setattr(outcome, "base_model", SimpleNamespace(load=refuse))
        own = [f"model.pretrained={tiny_bert}", "tracking=none", "tracking.reload_check=false"]
        assert main.main(["lora.r=2", *own, *SMALL, f"outputs={tmp_path}", "study=s"]) == 0
    told = capsys.readouterr().out
    assert "the test split was not read: train.device: there is no GPU; " in told
    assert "Trial 0 is best" in told and (tmp_path / "s/best.yaml").is_file()
    assert main.main(["resume", str(tmp_path / "s")]) == 0
    assert json.loads((tmp_path / "s/0/result.json").read_text())["test"]["accuracy"] > 0


def test_failed_trial_is_told_and_the_others_go_on(tiny_bert, tmp_path, monkeypatch, capsys):
    from lorasweep.lora import adapter

    attach = adapter.attach

    def broken(base, lora, *rest):
        if lora.r == 4:
            raise RuntimeError("out of luck")
        return attach(base, lora, *rest)

    monkeypatch.setattr(adapter, "attach", broken)
    model = [f"model.pretrained={tiny_bert}"]
    code = main.main(["-m", "lora.r=2,4,8", *model, *SMALL, f"outputs={tmp_path}", "study=s", "tracking=none"])
    assert code == 3
    states = [r["state"] for r in results(tmp_path)]
    assert states == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "out of luck" in (tmp_path / "s" / "1" / "log.txt").read_text()
    assert "out of luck" in capsys.readouterr().out


def test_diverging_trial_is_pruned_with_its_reason(tiny_bert, tmp_path, monkeypatch, capsys):
    from lorasweep.runner import rehearsal
    from lorasweep.tasks import seq_cls

    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: [])
    losses = seq_cls.SeqCls.row_losses
    monkeypatch.setattr(seq_cls.SeqCls, "row_losses", lambda *a: losses(*a) * float("nan"))
    model = [f"model.pretrained={tiny_bert}"]
    assert main.main([*model, *SMALL, f"outputs={tmp_path}", "study=s", "tracking=none"]) == 3
    result = json.loads((tmp_path / "s" / "0" / "result.json").read_text())
    assert result["state"] == "PRUNED"
    assert "nan" in result["reason"]
    assert "no trial was completed: 1 PRUNED (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["lora.r=0", "train.lerning_rate=1"],
            ["2 problems", "between 1 and 1024", "did you mean 'train.learning_rate'?"],
        ),
        (["data=csv", "data.path=nowhere.csv"], ["no file or folder 'nowhere.csv'"]),
        (["-m", "lora.target_modules=[query],[q_porj],[vlaue]"], ["2 problems", "'q_porj'", "'vlaue'", "did you mean"]),
        (["model.pretrained=some/hub-id"], ["cannot load 'some/hub-id'"]),
        (["model.pretrained=./nowhere"], ["no folder './nowhere'"]),
        (["task_type.primary=acuracy"], ["has accuracy", "got 'acuracy'"]),
        (["-m", "task_type=seq_cls,question_ans"], ["ranked by one metric, got accuracy, f1"]),
        (["--mutlirun", "lora.r=1"], ["did you mean '--multirun'?"]),
        (["train"], ["no such command"]),
        (["lora.r=8", "16", "32"], ["1 problem", "if it belongs to 'lora.r=8', write lora.r=8,16,32, without spaces"]),
        (["lora.r=", "8"], ["write lora.r=8, without spaces"]),
        (
            ["train.lr=1e-3", "num_train_epochs=3"],
            ["did you mean 'train.learning_rate'?", "did you mean 'train.epochs'?"],
        ),
        (["--lr", "1e-3"], ["settings are written without dashes, key=value"]),
        (["data=reviews.csv"], ["to use a file or folder of yours write data.path=reviews.csv"]),
        (["model=some/model"], ["write model.pretrained=some/model"]),
        ([__file__], [f"write data.path={__file__} for data"]),
        ([f"outputs={__file__}"], ["is a file; name a folder"]),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(arguments) == 1
    error = capsys.readouterr().err
    assert all(w in error for w in words), error
    assert list(tmp_path.iterdir()) == []


def test_help_answers_without_heavy_imports():
    heavy = "[m for m in ('torch', 'hydra', 'mlflow') if m in sys.modules]"
    code = f"import sys; from lorasweep.cli import main; main.main(['--help']); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
