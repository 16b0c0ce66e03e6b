"""Which adapters a study keeps, and that `clean` says what it would remove before it does."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState

from lorasweep.cli import main, results
from lorasweep.config import compose
from lorasweep.config.spec import TrackSpec
from lorasweep.errors import ConfigError
from lorasweep.runner import cleanup
from lorasweep.study import answer
from lorasweep.study.study import Study

VALUES = [0.5, 0.9, 0.7, 0.9, 0.8]


def made(folder: Path, waiting: dict[str, Any] | None = None) -> Any:
    """Return a study of five ended trials with adapters, and one that waits where `waiting` has its attributes."""
    trials = []
    for number, value in enumerate(VALUES):
        place = folder / str(number)
        (place / "adapter").mkdir(parents=True)
        (place / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 1000)
        trials.append(SimpleNamespace(number=number, state=TrialState.COMPLETE, values=[value], user_attrs={}))
    best = trials[1]
    if waiting is not None:
        trials.append(SimpleNamespace(number=5, state=TrialState.WAITING, values=None, user_attrs=waiting))
    return SimpleNamespace(
        folder=folder,
        meta=SimpleNamespace(name="s", maximize=True),
        search=SimpleNamespace(objectives=None),
        trials=lambda: trials,
        best=lambda: best,
        not_begun=lambda: "",
        ready=lambda: int(waiting is not None),
        trial_folder=lambda n: folder / str(n),
    )


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("all", {0, 1, 2, 3, 4}), ("best", {1}), ("none", set()), ("top_k", {1, 3, 4})],
)
def test_setting_chooses_the_adapters_that_stay(setting, expected, tmp_path):
    assert cleanup.kept(made(tmp_path), TrackSpec(save_adapters=setting)) == expected
    cleanup.tidy(made(tmp_path / "again"), TrackSpec(save_adapters=setting))
    assert {int(p.parent.name) for p in (tmp_path / "again").glob("*/adapter")} == expected


def test_adapters_stay_while_a_trial_waits(tmp_path):
    cleanup.tidy(made(tmp_path, {}), TrackSpec(save_adapters="best"))
    assert len(list(tmp_path.glob("*/adapter"))) == 5


def test_adapter_that_a_waiting_trial_starts_from_stays_when_the_budget_is_spent(tmp_path):
    study = made(tmp_path, {"start_from": 0})
    study.not_begun, study.ready = lambda: "search.device_hours=1 are used", lambda: 0
    cleanup.tidy(study, TrackSpec(save_adapters="best"))
    assert {int(p.parent.name) for p in tmp_path.glob("*/adapter")} == {0, 1}


def test_clean_tells_first_and_removes_with_yes(tmp_path, capsys):
    study = made(tmp_path / "s")
    (tmp_path / "s" / "2" / "checkpoint.pt").write_bytes(b"x" * 500)
    track = TrackSpec(save_adapters="best")
    before = sorted(tmp_path.rglob("*"))
    assert results.run_clean({"s": (study, track)}, really=False) == 0
    told = capsys.readouterr().out
    assert "4,500 bytes; nothing was removed" in told and told.count("1,000") == 4 and "checkpoint" in told
    assert sorted(tmp_path.rglob("*")) == before
    assert results.run_clean({"s": (study, track)}, really=True) == 0
    assert "4,500 bytes freed" in capsys.readouterr().out
    assert [p.parent.name for p in (tmp_path / "s").glob("*/adapter")] == ["1"]
    assert not (tmp_path / "s" / "2" / "checkpoint.pt").exists()
    results.run_clean({"s": (study, track)}, really=True)
    assert "nothing to remove" in capsys.readouterr().out


def test_what_a_link_points_at_stays(tmp_path):
    study = made(tmp_path / "s")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept.txt").write_text("mine")
    (tmp_path / "s" / "2" / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "s" / "2" / "adapter").rmdir()
    (tmp_path / "s" / "2" / "adapter").symlink_to(tmp_path / "mine")
    cleanup.tidy(study, TrackSpec(save_adapters="best"))
    assert (tmp_path / "mine" / "kept.txt").exists() and not (tmp_path / "s" / "2" / "adapter").exists()


def test_pareto_keeps_the_front_of_the_report(tmp_path, monkeypatch):
    front = [SimpleNamespace(number=0), SimpleNamespace(number=2)]
    monkeypatch.setattr(answer, "answer", lambda _: SimpleNamespace(front=front))
    assert cleanup.kept(made(tmp_path), TrackSpec(save_adapters="pareto")) == {0, 1, 2}


def test_study_ends_with_the_adapters_it_was_asked_to_keep(tiny_bert, tmp_path, capsys):
    own = ["train.max_steps=2", "data.max_train_samples=64", "data.max_eval_samples=32", "tracking=none"]
    model = [f"model.pretrained={tiny_bert}", f"outputs={tmp_path}", "study=s"]
    assert main.main(["-m", "lora.r=2,4", *own, *model, "tracking.save_adapters=best"]) == 0
    opened = Study.open(tmp_path / "s")
    assert cleanup.kept(opened, TrackSpec(save_adapters="pareto")) >= cleanup.kept(
        opened, TrackSpec(save_adapters="best")
    )
    assert len(list((tmp_path / "s").glob("*/adapter"))) == 1
    (kept,) = (tmp_path / ".tokens").iterdir()
    capsys.readouterr()
    assert main.main(["clean", str(tmp_path / "s"), "tracking.save_adapters=none"]) == 0
    assert "nothing was removed, --yes does it" in capsys.readouterr().out
    assert kept.is_dir(), "tokens belong to all studies of a folder"
    assert main.main(["clean", f"outputs={tmp_path}"]) == 0
    size = sum(p.stat().st_size for p in kept.iterdir())
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "(shared)" in line]
    assert f"{size:,}" in row and "made again when needed" in row
    assert main.main(["clean", f"outputs={tmp_path}", "tracking.save_adapters=none", "--yes"]) == 0
    assert list((tmp_path / "s").glob("*/adapter")) == [] and not kept.exists()


def test_unknown_setting_and_flag_are_refused(capsys):
    with pytest.raises(ConfigError, match=r"tracking\.save_adapters: must be one of all, best, pareto"):
        compose.compose_trial(["tracking.save_adapters=bets"])
    assert main.main(["clean", "--force"]) == 1
    assert "--force: no such flag; clean has --yes" in capsys.readouterr().err
