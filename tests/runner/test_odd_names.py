"""Folders whose names could be grammar, from the command line to a study's end; several data sets in one study."""

import json
import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lorasweep.cli import main
from lorasweep.config.compose import register_schemas
from lorasweep.config.registry import data_folder
from lorasweep.errors import ConfigError
from lorasweep.runner import launch, launchers, plan
from lorasweep.runner.request import Request
from lorasweep.study import answer
from lorasweep.study.study import Study

ODD = [
    *("a,b", "[x]", "(x)", "{x}", "a=b", "a#b", "it's", '"q"', "a&b", "~a", "a;b", "über", "中文", "with space"),
    *("a%20b", "a?b", "$HOME", "${x}", "a:b", "!a", "a\\b"),
]
EVERY_SIGN = "".join(name.replace(" ", "_") for name in ODD)
SMALL = [
    *("lora.r=1", "train.max_steps=1", "train.batch_size=4", "train.slots=1", "tracking.reload_check=false"),
    *("tracking.log_model=false", "tracking.system_metrics=false", "data.eval_fraction=0.25"),
]


def rows(path: Path, texts: int = 24) -> Path:
    lines = [f"text of row {i},{'even' if i % 2 == 0 else 'odd'}" for i in range(texts)]
    path.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf8")
    return path


@pytest.fixture
def in_folder(tiny_bert, tmp_path, monkeypatch):
    """Return a function that makes a folder of a name, with a model and a table in it, and goes there."""

    def go(name: str) -> Path:
        place = tmp_path / name
        place.mkdir()
        os.symlink(tiny_bert, place / "model")
        rows(place / "rows.csv")
        monkeypatch.chdir(place)
        return place

    return go


@pytest.mark.parametrize("name", ODD)
def test_study_in_a_folder_of_any_name_is_planned_for_what_lies_there(in_folder, name):
    place = in_folder(name)
    for there in (".", str(place)):
        words = [f"model.pretrained={there}/model", f"data.path={there}/rows.csv", f"outputs={there}/out", *SMALL]
        planned = plan.plan(Request.of(words))
        assert len(planned.queue) == 1
        assert planned.folder.parent == place / "out"
        assert planned.first.data.path == str(place / "rows.csv")
        assert planned.first.model.pretrained == str(place / "model")


def test_study_in_a_folder_with_every_sign_trains_and_is_followed_to_its_end(in_folder, capsys):
    place = in_folder(EVERY_SIGN)
    words = ["-m", "model.pretrained=model", "data.path=rows.csv", "study=s", *SMALL]
    assert main.main([*words, "lora.r=1,2"]) == 0
    assert capsys.readouterr().err == ""
    assert [t.state.name for t in Study.open(place / "outputs/s").trials()] == ["COMPLETE"] * 2
    assert json.loads((place / "outputs/s/0/mlflow.json").read_text(encoding="utf8"))
    assert main.main(["add", "outputs/s", "lora.r=4"]) == 0
    assert main.main(["resume", "s", "model.pretrained=model"]) == 0
    assert main.main(["report", str(place / "outputs/s")]) == 0
    assert main.main(["predict", "s", "text of row 3"]) == 0
    assert [t.state.name for t in Study.open(place / "outputs/s").trials()] == ["COMPLETE"] * 3


@pytest.mark.parametrize("launcher", ["submitit_local", "submitit_slurm", "joblib"])
def test_launcher_is_told_a_folder_of_any_name(launcher):
    folder = Path("/srv") / EVERY_SIGN.replace("${x}", "")
    words = launchers.launcher_overrides([f"hydra/launcher={launcher}"], 2, folder)
    register_schemas()
    with initialize_config_dir(str(data_folder("conf")), version_base="1.3"):
        made = compose("config", overrides=words, return_hydra_config=True).hydra.launcher
    told = OmegaConf.to_container(made, resolve=False)
    assert told.get("submitit_folder", f"{folder}/submitit/%j") == f"{folder}/submitit/%j"


def test_studies_that_the_clock_gave_one_name_both_run(in_folder):
    place = in_folder("plain")
    words = ["model.pretrained=model", "data.path=rows.csv", "tracking=none", *SMALL]
    planned = plan.plan(Request.of(words))
    name = planned.meta.name
    made = [launch.make(planned) for _ in range(3)]
    assert [study.meta.name for study in made] == [name, f"{name}_2", f"{name}_3"]
    assert [study.folder for study in made] == [place / "outputs" / study.meta.name for study in made]
    again = plan.plan(Request.of([*words, f"study={name}"]))
    with pytest.raises(ConfigError, match="is there already"):
        launch.make(again)


def test_which_of_several_data_sets_is_one_study(in_folder, capsys):
    place = in_folder("data")
    rows(place / "more.csv", 40)
    words = ["-m", "data.path=rows.csv,more.csv", "model.pretrained=model", "tracking=none", "study=s", *SMALL]
    assert main.main(words) == 0
    study = Study.open(place / "outputs/s")
    assert [t.state.name for t in study.trials()] == ["COMPLETE"] * 2
    assert [t.user_attrs["swept"] for t in study.trials()] == [{"data.path": "rows.csv"}, {"data.path": "more.csv"}]
    assert study.first_spec().data.path == str(place / "rows.csv")
    said = answer.answer(study)
    assert len(said.apart) == 1 and said.compared == 0
    assert main.main(["status", "s"]) == 0
    assert main.main(["report", "s"]) == 0
    assert "Trials with other eval rows are not compared" in (study.folder / "report.md").read_text(encoding="utf8")
