"""A full disk pauses a study: no trial fails for it, what is said names what is needed, what is free and where."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import studies

from lorasweep.cli import main
from lorasweep.errors import ConfigError, DiskFull
from lorasweep.runner import room
from lorasweep.runner.failures import trace_of
from lorasweep.study import example_scores, result
from lorasweep.study.study import Study
from lorasweep.training import checkpoint


def disk(monkeypatch, *free: int) -> None:
    """Let the disk have so much free, one answer after the other; the last one stays."""
    answers = list(free)
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _: SimpleNamespace(free=answers.pop(0) if len(answers) > 1 else answers[0])
    )


def test_wait_ends_once_there_is_room_and_is_said_once(tmp_path, monkeypatch, capsys):
    study = studies.study_of(tmp_path, [2])
    monkeypatch.setattr(room, "LOOK_EVERY_S", 0.0)
    disk(monkeypatch, 0, 0, 0, 2**30)
    assert room.wait(study, lambda: False)
    said = capsys.readouterr().out
    assert said.count("paused") == 1 and f"16 MiB at the most in {study.folder}, 0 MiB are free there" in said
    assert not room.wait(study, lambda: False)  # there is room: something else is wrong


def test_wait_ends_with_a_stop(tmp_path, monkeypatch):
    study = studies.study_of(tmp_path, [2])
    disk(monkeypatch, 0)
    assert room.wait(study, lambda: True)


def test_what_is_needed_grows_with_what_was_written(tmp_path):
    study = studies.study_of(tmp_path, [2], workers=3)
    study.trial_folder(0).mkdir()
    (study.trial_folder(0) / "checkpoint.pt").write_bytes(bytes(5000))
    assert room.needed_to_go_on(study) == 2 * 3 * 5000 + room.SPARE_BYTES


def test_study_does_not_begin_without_room(tiny_bert, tmp_path, monkeypatch, capsys):
    words = ["-m", "lora.r=2,4", f"model.pretrained={tiny_bert}", f"outputs={tmp_path}/out", *studies.SMALL]
    assert main.main(["check", *words[1:]]) == 0
    assert f"MiB at the most in {tmp_path}/out" in capsys.readouterr().out
    disk(monkeypatch, 2**20)
    assert main.main(words) == 1
    assert f"in {tmp_path}/out, 1 MiB are free there; free some, or set outputs=FOLDER" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 704 vs 598"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        ValueError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_library_that_tells_a_full_disk_in_its_way_fails_no_trial(tmp_path, error):
    with pytest.raises(DiskFull, match=f"{tmp_path}: cannot write .* MiB are free there"):
        trace_of(error, tmp_path)


def test_error_raised_from_a_full_disk_fails_no_trial(tmp_path):
    error = RuntimeError("cannot save")
    error.__cause__ = OSError(errno.ENOSPC, "no room")
    with pytest.raises(DiskFull):
        trace_of(error, tmp_path)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("write", ["result", "predictions", "checkpoint"])
def test_write_to_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, write):
    study = studies.study_of(tmp_path, [2])
    studies.end(study, 0.5)
    folder = study.trial_folder(0)
    checkpoint.write(folder / "checkpoint.pt", {"weights": torch.ones(3)})
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr("os.fsync", full)
    found = result.read_result(folder)
    task = studies.make(studies.TaskSpec(name="SEQ_CLS"))
    task.classes = ["no", "yes"]
    rows = [{"row": 0, "loss": 0.1, "supervised": 1, "prediction": 1, "label": 1}]
    writes = {
        "result": lambda: result.write_result(folder, found),
        "predictions": lambda: example_scores.write(folder, task, "accuracy", rows, [{}]),
        "checkpoint": lambda: checkpoint.write(folder / "checkpoint.pt", {"weights": torch.zeros(3)}),
    }
    with pytest.raises(OSError, match=f"No space left on device: '{folder}/"):
        writes[write]()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_journal_on_a_full_disk_is_named(tmp_path, monkeypatch):
    study = studies.study_of(tmp_path, [2])
    before = (study.folder / "journal.log").read_bytes()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{study.folder}/journal.log'"):
        study.begin()
    assert (study.folder / "journal.log").read_bytes() == before


def test_study_on_a_full_disk_pauses_and_goes_on_with_every_trial(tiny_bert, tmp_path, monkeypatch, capsys):
    write, count = checkpoint.write, []

    def sometimes_full(path: Path, state: object) -> None:
        count.append(path)
        if len(count) == 2:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        write(path, state)

    monkeypatch.setattr(checkpoint, "write", sometimes_full)
    monkeypatch.setattr(room, "wait", lambda study, is_stopped: bool(count))
    words = ["-m", "lora.r=2,4", f"model.pretrained={tiny_bert}", f"outputs={tmp_path}", *studies.SMALL, "study=s"]
    assert main.main([*words, "search.checkpoint_s=0", "tracking=none", "tracking.reload_check=false"]) == 0
    study = Study.open(tmp_path / "s")
    assert [t.state.name for t in study.trials()] == ["COMPLETE"] * 2
    assert len(count) > 2 and not list(tmp_path.rglob("*.part"))


def test_problem_names_the_folder_that_is_there(tmp_path):
    assert room.existing(tmp_path / "a" / "b") == tmp_path
    with pytest.raises(ConfigError):
        raise ConfigError(room.problem(2**60, tmp_path / "a" / "b"))
