"""Other words for the same modules are no other point: grids, samplers and `add` train it once and say so."""

from pathlib import Path

import pytest
from support import studies

from lorasweep.cli import main
from lorasweep.study.study import Study


@pytest.fixture
def run(tiny_bert, tmp_path, monkeypatch):
    """Return a function that runs a command line on a tiny model and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    small = [f"model.pretrained={tiny_bert}", *studies.SMALL, "tracking.reload_check=false", "study=s"]
    return lambda *words: main.main([*words, *small])


def finished() -> Study:
    return Study.open(Path("outputs/s"))


def test_grid_trains_words_for_the_same_modules_once_and_add_tells_the_result(run, capsys):
    assert run("-m", "lora.target_modules=[query,value],[value,query],qv,[key]", "search.trials=6") == 0
    said = capsys.readouterr().out
    assert "there are 2 points to try, so the study ends early, after 2 of 6 trials" in said
    assert (
        "lora.target_modules=qv is the point lora.target_modules=[query,value] in other words: it is trained once"
        in said
    )
    assert [t.state.name for t in finished().trials()] == ["COMPLETE", "COMPLETE"]
    assert main.main(["add", "outputs/s", "lora.target_modules=[value,query]"]) == 0
    value = finished().trial(0).values[0]
    assert f"trial 0 is this point already (accuracy {value:.4f}), it is not trained again" in capsys.readouterr().out
    assert finished().queue.waiting() == 0
    assert main.main(["add", "outputs/s", "lora.target_modules=[value,query]", "train.seed=1"]) == 0
    assert finished().queue.waiting() == 1


def test_sampler_of_a_small_space_ends_early_and_says_so(run, capsys):
    words = ["search.sampler=random", "search.trials=9", "lora.target_modules=[query,value],[value,query],[key]"]
    assert run("check", *words) == 0
    assert "there are 2 points to try, so the study ends early, after 2 of 9 trials" in capsys.readouterr().out
    assert run("-m", "lora.target_modules=[query,value],qv,[value,query]", *words[:2]) == 0
    said = capsys.readouterr().out
    assert "there are 2 points to try, so the study ends early, after 2 of 9 trials" in said
    assert "trial 1 was not trained: every point that it could have is another trial's" in said
    assert [t.state.name for t in finished().trials()] == ["COMPLETE"]
    assert main.main(["resume", "outputs/s", "search.trials=5"]) == 0
    assert len(finished().trials()) == 1
