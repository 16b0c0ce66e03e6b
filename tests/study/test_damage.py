"""Files that a crash or a disk has torn: the study is read without them, and what is damaged is named."""

import json
import logging

import pytest
from support import studies

from lorasweep.report import html_page
from lorasweep.runner import launch
from lorasweep.study import answer
from lorasweep.study.result import read_result
from lorasweep.study.study import Study


@pytest.fixture
def study(tmp_path) -> Study:
    found = studies.study_of(tmp_path, [2, 4, 8])
    for value in (0.5, 0.8, 0.6):
        studies.end(found, value)
    return found


def cut(path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"metric": 3}', '{"metric": {"name": 1}}', "\x00\x00"])
def test_report_goes_on_without_a_damaged_result(study, caplog, text):
    (study.trial_folder(1) / "result.json").write_text(text)
    assert read_result(study.trial_folder(1)) is None
    if text != "[]":
        assert "1/result.json cannot be read" in caplog.text
    assert answer.answer(study).best.value == 0.8
    html_page.write_if_possible(study, answer.answer(study))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_report_goes_on_without_damaged_predictions(study, caplog, share):
    cut(study.trial_folder(1) / "predictions.parquet", share)
    assert study.scores(1) is None
    assert "1/predictions.parquet cannot be read" in caplog.text
    assert answer.answer(study).best.value == 0.8


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_damaged_study_json_is_read_from_the_queue_and_written_again(study, caplog, text):
    (study.folder / "study.json").write_text(text)
    again = Study.open(study.folder)
    assert again.meta == study.meta
    assert "study.json is damaged" in caplog.text
    again.begin()
    assert json.loads((study.folder / "study.json").read_text())["name"] == study.meta.name


@pytest.mark.parametrize("bad", [b"\x00" * 40 + b"\n", b'{"op_code"\n', b"7\n"])
def test_each_line_of_the_journal_may_be_damaged(study, caplog, bad):
    """The first makes the study: without it there is none."""
    caplog.set_level(logging.ERROR)
    journal = study.folder / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    for number in range(1, len(lines)):
        journal.write_bytes(b"".join([*lines[:number], bad, *lines[number + 1 :]]))
        again = Study.open(study.folder)
        assert len(again.trials()) == 3
        assert sum(t.state.name == "COMPLETE" for t in again.trials()) >= 2


def test_lines_of_the_journal_that_ran_into_each_other_lose_no_trial(study):
    journal = study.folder / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    makes = [i for i, line in enumerate(lines) if json.loads(line)["op_code"] == 4]
    journal.write_bytes(b"".join([*lines[: makes[0]], bytes(100), b"\n", *lines[makes[1] + 1 :]]))
    again = Study.open(study.folder)
    assert len(again.trials()) == 3
    again.queue.enqueue([])
    assert len(Study.open(study.folder).trials()) == 3


def test_winner_whose_adapter_is_damaged_has_no_test_score_and_a_table(study, capsys):
    folder = study.trial_folder(1) / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"\x07")
    launch.finish(study)
    said = capsys.readouterr().out
    assert "the test split was not read: " in said and "0.8000" in said
