"""Each command's help, what it refuses, and what it does without."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lorasweep.cli import commands, main
from lorasweep.cli.parser import Parser
from lorasweep.errors import ConfigError
from lorasweep.study.meta import Entry, StudyMeta
from lorasweep.study.study import Study

ALL = {"train": commands.TRAIN, **commands.COMMANDS}


def flags(parser: Parser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings]


@pytest.mark.parametrize("name", commands.COMMANDS)
@pytest.mark.parametrize("words", [["{}", "--help"], ["{}", "-h"], ["help", "{}"], ["{}", "x", "-h"]])
def test_help_of_a_command_shows_its_flags_and_an_example(name, words, capsys):
    assert main.main([word.format(name) for word in words]) == 0
    said = capsys.readouterr()
    command = commands.COMMANDS[name]
    assert said.err == ""
    assert said.out.startswith(f"usage: python -m lorasweep {name} ")
    assert f"example:\n  python -m lorasweep {command.example}" in said.out
    assert all(flag in said.out for flag in flags(command.parser()))


@pytest.mark.parametrize("name", ALL)
def test_example_of_a_command_is_one_that_it_takes(name):
    command = ALL[name]
    words = shlex.split(command.example)
    command.parser().parse(words[1:] if command.name else words)


def test_flags_that_train_are_explained_by_help_after_a_setting(capsys):
    assert main.main(["-m", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(flag in said for flag in flags(commands.TRAIN.parser()))


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"]])
def test_overview_names_each_command_without_a_heavy_import(words, capsys, monkeypatch):
    for name in ("torch", "hydra", "mlflow", "optuna"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    assert main.main(words) == 0
    said = capsys.readouterr().out
    assert all(f"python -m lorasweep {name} " in said for name in commands.COMMANDS)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["chekc"], "chekc: no such command; did you mean 'check'?"),
        (["help", "reprot"], "reprot: no such command; did you mean 'report'?"),
        (["-m", "check", "lora.r=8"], "check: a command comes first"),
        (["--mutlirun"], "--mutlirun: no such flag; did you mean '--multirun'?"),
        (["--swep=rank"], "--swep=rank: no such flag; did you mean '--sweep'?"),
        (["--sweep"], "--sweep: expected one argument"),
        (["check", "--multi"], "--multi: no such flag; did you mean '--multirun'?"),
        (["status", "s", "--wach"], "--wach: no such flag; did you mean '--watch'?"),
        (["work", "s", "--failed"], "--failed: no such flag; work has --trust-remote-code"),
        (["report", "s", "--failed"], "--failed: report has no flags; it takes its folder"),
        (["export", "s", "--trial", "best"], "--trial: must be a trial's number, got 'best'"),
        (["add", "s", "--like", "-1"], "--like: must be a trial's number, got '-1'"),
        (["keys", "dropuot"], "dropuot: in no key's name or meaning"),
    ],
)
def test_what_nobody_reads_is_refused_with_the_nearest_that_somebody_does(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(words) == 1
    said = capsys.readouterr()
    assert "ConfigError: 1 problem in " in said.err
    assert told in said.err and said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_all_unknown_flags_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        commands.COMMANDS["predict"].parser().parse(["s", "--flie", "a.txt", "text", "--jsno"])
    assert [p.partition(":")[0] for p in caught.value.problems] == ["--flie", "--jsno"]


def test_words_and_flags_stand_in_any_order():
    parser = commands.COMMANDS["add"].parser()
    for words in ("s --like 7 lora.r=2 --from-weights train.seed=1", "--from-weights s lora.r=2 train.seed=1 --like 7"):
        options = parser.parse(words.split())
        assert (options.study, options.words, options.like) == ("s", ["lora.r=2", "train.seed=1"], 7)
        assert options.from_weights


def test_text_that_looks_like_a_flag_is_a_text_after_two_dashes():
    options = commands.COMMANDS["predict"].parser().parse(["s", "--json", "--", "--really?", "-5 degrees"])
    assert options.texts == ["--really?", "-5 degrees"] and options.json


def test_keys_are_grouped_and_found_by_words(capsys):
    assert main.main(["keys"]) == 0
    everything = capsys.readouterr().out
    assert [line for line in everything.splitlines() if line.startswith("---")] == [
        f"--- {name} ---" for name in ("the study", "model", "task_type", "lora", "data", "train", "tracking", "search")
    ]
    assert main.main(["keys", "Dropout", "lora"]) == 0
    found = capsys.readouterr().out
    assert found.splitlines()[0] == "--- lora ---"
    assert {line.partition("=")[0] for line in found.splitlines() if line.startswith("lora.")} >= {"lora.lora_dropout"}
    assert "lora.r=" not in found and "model." not in found


WITHOUT_TORCH = """
import json, sys, traceback
sys.modules["torch"] = None
from lorasweep.cli.main import main
for words in json.loads(sys.argv[1]):
    try:
        print(main(words), flush=True)
    except ImportError as error:
        print("torch is asked for" if "torch" in str(error) else traceback.format_exc(), flush=True)
"""


def test_first_line_refusals_and_a_study_s_state_come_before_torch_is_loaded(tmp_path):
    space = {"fixed": [], "dimensions": [{"key": "lora.r", "names": [1, 2], "texts": ["1", "2"]}], "settled": {}}
    meta = StudyMeta("s", ["lora.r"], [], "accuracy", True, "today", space=space, search={})
    Study.create(tmp_path / "outputs/s", meta, [Entry([f"lora.r={r}"], {"lora.r": r}) for r in (1, 2)])
    lines = [
        ["status", "s"],
        ["stop", "s", "--all"],
        ["-m", "lora.r=0,2000"],
        ["-m", "lora.r=1,2"],
        ["check", "lora.r=3"],
    ]
    run = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(lines)]
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        run, capture_output=True, text=True, check=True, cwd=tmp_path, env={"PYTHONPATH": root, "PATH": ""}
    )
    said = done.stdout.splitlines()
    assert "2 waiting" in said
    assert said[-8:-5] == ["0", "s stops; go on with: python -m lorasweep resume outputs/s", "0"]
    assert said[-5:] == [
        "1",
        "checking model, data and every point of lora.r",
        "torch is asked for",
        "checking model, data",
        "torch is asked for",
    ]
    assert "lora.r: must be between 1 and 1024, got 0" in done.stderr
    assert "lora.r: must be between 1 and 1024, got 2000" in done.stderr
