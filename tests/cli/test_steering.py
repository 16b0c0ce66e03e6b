"""Steering from another terminal, and going on: what each command does to a study, and what it refuses."""

import errno
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import mlflow
import pytest
from support import studies

from lorasweep import console
from lorasweep.cli import main
from lorasweep.hardware import device, matmul_peak
from lorasweep.models import base_model
from lorasweep.runner import worker
from lorasweep.study.study import Study

SMALL = [*studies.SMALL, "tracking.reload_check=false", "study=s"]


@pytest.fixture
def run(tiny_bert, tmp_path, monkeypatch):
    """Return a function that runs a command line on a small setting and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    small = [f"model.pretrained={tiny_bert}", *SMALL]

    def ran(*words: str) -> int:
        given = {w.split("=")[0] for w in words}
        return main.main([*words, *(o for o in small if o.split("=")[0] not in given)])

    return ran


@pytest.fixture(scope="module")
def one_trial(tiny_bert, tmp_path_factory) -> Path:
    """Return the outputs folder of a study s of one trial of rank 1, made as `run` makes it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("one_trial"))
        assert main.main(["lora.r=1", f"model.pretrained={tiny_bert}", *SMALL]) == 0
        return Path("outputs").resolve()


def study() -> Study:
    return Study.open(Path("outputs/s"))


def states() -> list[str]:
    return [t.state.name for t in study().trials()]


def test_status_shows_every_trial_and_the_best(run, capsys):
    assert run("lora.r=1,2", "search.target=0.0", "train.slots=1") == 0
    capsys.readouterr()
    assert main.main(["status", "outputs/s"]) == 0
    said = capsys.readouterr().out
    assert "1 complete  1 waiting" in said
    assert "no more trials begin: search.target=0 is reached by trial 0" in said
    rows = [line.split("\t") for line in said.splitlines() if "\t" in line]
    assert rows[0][:3] == ["trial", "lora.r", "state"]
    assert rows[1][:4] == ["0", "1", "COMPLETE", "4"]
    assert rows[2][:3] == ["1", "2", "WAITING"]
    assert "best so far: trial 0, accuracy" in said


def test_asha_judges_the_trials_of_a_pass_when_all_were_evaluated(run, tiny_llama):
    """The best quarter goes on; before all had reported, the first trial, the worst, would have gone on too."""
    rates = "1e-6,3e-2,1e-5,1e-3,3e-5,1e-4,3e-3,1e-2"
    small = ["task_type=causal_lm", f"model.pretrained={tiny_llama}", "train.warmup_ratio=0", "train.max_steps=8"]
    asha = ["search.pruner=asha", "search.min_steps=2", "search.reduction_factor=4", "search.min_complete=0"]
    assert run(f"train.learning_rate={rates}", *small, *asha, "train.slots=8") == 0
    losses = {t.number: t.intermediate_values[2] for t in study().trials()}
    assert max(losses, key=losses.__getitem__) == 0
    went_on = {t.number for t in study().trials() if t.state.name == "COMPLETE"}
    assert went_on == set(sorted(losses, key=losses.__getitem__)[:2])


def test_worker_tells_all_trials_tokens_a_second_and_share_of_the_peak(run, capsys, monkeypatch):
    monkeypatch.setattr(console, "LINE_EVERY_S", -1.0)
    assert run("lora.r=1,2", "train.slots=2") == 0
    said = capsys.readouterr().out
    assert re.search(r"trial=1 lora.r=2 step=3/4 loss=\S+; all trials: [\d,]+ tokens/s, \d+% of the matmul peak", said)


def test_worker_that_is_left_alone_takes_all_threads_and_its_share_counts_their_peak(run, monkeypatch):
    assert run("lora.r=1") == 0
    assert main.main(["add", "s", "lora.r=2"]) == 0
    asked, peaks = [], iter([1e12, 4e12])
    monkeypatch.setattr(Study, "sharing", lambda _: 1)
    monkeypatch.setattr(device, "divide_threads", lambda workers: asked.append(workers) or len(asked) == 1)
    monkeypatch.setattr(matmul_peak, "peak_of", lambda _: next(peaks))
    worker.Worker(study(), divides=True).run()
    assert set(asked) == {1} and len(asked) >= 4, "at each event"
    result = json.loads((study().trial_folder(1) / "result.json").read_text())
    assert result["matmul_share"] == pytest.approx(result["flops_per_s"] / 4e12)


def test_base_is_loaded_once_for_each_group_of_trials(run, monkeypatch):
    """The queue alternates between two groups; each is asked for as long as its base is there."""
    loads, load = [], base_model.load
    monkeypatch.setattr(base_model, "load", lambda *args: loads.append(args) or load(*args))
    assert (
        run("train.learning_rate=1e-3,2e-3", "data.max_tokens=16,24", "train.slots=1", "tracking.log_model=false") == 0
    )
    assert states() == ["COMPLETE"] * 4
    assert len(loads) == 3, "one for each group, and one for the winner's test score"


def test_added_trial_waits_and_resume_runs_it(run, capsys):
    assert run("lora.r=1,2") == 0
    assert main.main(["add", "s", "lora.r=16", "lora.lora_dropout=0.1"]) == 0
    assert "start one with: python -m lorasweep resume outputs/s" in capsys.readouterr().out
    assert states() == ["COMPLETE", "COMPLETE", "WAITING"]
    assert main.main(["resume", "outputs/s"]) == 0
    assert states() == ["COMPLETE"] * 3
    config = json.loads((study().trial_folder(2) / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_dropout"]) == (16, 0.1)


def test_copy_of_a_trial_starts_from_its_weights(run, capsys):
    assert run("lora.r=2") == 0
    assert main.main(["add", "s", "--like", "0", "lora.r=4", "--from-weights"]) == 0
    assert main.main(["add", "s", "--like", "0", "lora.r=4"]) == 0
    assert main.main(["resume", "s"]) == 0
    assert "took" in (study().trial_folder(1) / "log.txt").read_text()
    first = [json.loads((study().trial_folder(n) / "metrics.jsonl").read_text().splitlines()[0]) for n in (1, 2)]
    assert first[0]["train_loss"] != first[1]["train_loss"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["add", "s", "lora.r=0"], "lora.r: must be between 1 and 1024, got 0"),
        (["add", "s", "lora.target_modules=[nix]"], "nix"),
        (["add", "s"], "give overrides"),
        (["add", "s", "--from-weights", "lora.r=2"], "--from-weights: needs --like NUMBER"),
        (["add", "s", "--like", "9", "lora.r=2"], "trial 9: s has no such trial; it has 0 to 0"),
        (["stop", "s", "9"], "trial 9: s has no such trial"),
        (["stop", "s", "0"], "this trial has ended, COMPLETE"),
        (["stop", "s"], "give a trial's number"),
        (["status", "nix"], "nix: no such study; in ./outputs there are s"),
        (["resume"], "name a study first"),
        (["resume", "s", "search.sampler=tpe"], "search.sampler: cannot change in a study that has begun; use extend"),
        (["resume", "s", "search.workerz=2"], "did you mean 'search.workers'"),
        (["work", "s", "lora.r=2"], "work takes a study alone"),
        (["extend", "s", "lora.r=4"], "study: give the new study a name"),
        (["extend", "s", "study=t", "task_type.primary=macro_f1"], "were judged otherwise"),
        (["extend", "s", "study=t", "search.objectives=[trainable]"], "were judged otherwise"),
        (["resume", "s", "search.pruner=threshold"], "threshold needs search.lower or search.upper"),
        (["resume", "s", "search.trials=0"], "search.trials: must be at least 1"),
        (["lora.r=3", "study=u", "search.warm_start=[outputs/nix]"], "outputs/nix: no study here"),
        (["frobnicate"], "no such command"),
        (["lora.r=2", "search.storage=sqlite:///x.db"], "SQLite hands one trial to two workers"),
        (["-m", "search.workers=1,2"], "belongs to the study as a whole"),
    ],
)
def test_wrong_commands_are_told_and_change_nothing(run, one_trial, tmp_path, capsys, words, problem):
    shutil.copytree(one_trial, tmp_path / "outputs")
    before = states()
    capsys.readouterr()
    assert main.main(words) == 1
    assert problem in capsys.readouterr().err
    assert states() == before == ["COMPLETE"]


def test_resume_with_another_space_is_refused_with_the_difference(run, capsys):
    assert run("lora.r=1,2", "lora.lora_dropout=0.1") == 0
    capsys.readouterr()
    assert main.main(["resume", "s", "lora.r=2,4", "lora.lora_dropout=0.2"]) == 1
    said = capsys.readouterr().err
    assert "lora.r: was 1,2, is 2,4" in said
    assert "lora.lora_dropout: was 0.1, is 0.2" in said
    assert "extend outputs/s study=NAME" in said
    assert main.main(["resume", "s", "lora.r=1,2", "lora.lora_dropout=0.1"]) == 0


def test_extend_copies_the_trials_and_runs_what_is_open(run, capsys):
    assert run("lora.r=1,2") == 0
    capsys.readouterr()
    assert main.main(["extend", "s", "study=t", "lora.r=2,4"]) == 0
    assert "1 of 2 trials of s lie in the new space" in capsys.readouterr().out
    new = Study.open(Path("outputs/t"))
    assert [t.user_attrs["swept"] for t in new.trials()] == [{"lora.r": 2}, {"lora.r": 4}]
    assert new.trials()[0].values == study().trials()[1].values
    assert (new.trial_folder(0) / "adapter").is_dir()


def test_extend_leaves_out_trials_of_another_configuration(run, capsys):
    assert run("lora.r=1,2") == 0
    assert main.main(["add", "s", "--like", "0", "lora.lora_dropout=0.2"]) == 0
    assert main.main(["resume", "s"]) == 0
    capsys.readouterr()
    assert main.main(["extend", "s", "study=t", "lora.r=1,3"]) == 0
    assert "1 of 3 trials of s lie in the new space" in capsys.readouterr().out
    assert main.main(["extend", "s", "study=longer", "lora.r=1,3", "train.max_steps=6"]) == 0
    assert "0 of 3 trials of s lie in the new space" in capsys.readouterr().out
    numbers = [json.loads(p.read_text())["number"] for p in sorted(Path("outputs/t").glob("*/result.json"))]
    assert numbers == [0, 1]


def test_longer_grid_takes_the_points_that_were_left_out(run):
    assert run("lora.r=1,2,3", "search.sampler=grid", "search.trials=2") == 0
    assert main.main(["resume", "s", "search.trials=3"]) == 0
    assert [t.user_attrs["swept"]["lora.r"] for t in study().trials()] == [1, 2, 3]


def test_study_is_the_same_from_another_folder(run, tmp_path, monkeypatch):
    assert run("lora.r=1,2", "search.target=0.0", "train.slots=1") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main.main(["resume", str(tmp_path / "outputs" / "s")]) == 0  # the target is reached: nothing more runs
    assert main.main(["add", str(tmp_path / "outputs" / "s"), "lora.r=3"]) == 0
    assert main.main(["work", str(tmp_path / "outputs" / "s")]) == 0
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_trial_whose_point_cannot_be_drawn_fails_with_its_traceback(run, monkeypatch):
    from lorasweep.search import samplers

    def broken(*_):
        raise RuntimeError("no point")

    monkeypatch.setattr(samplers, "suggest", broken)
    assert run("lora.r=interval(1,8)", "search.sampler=random", "search.trials=2") == 3
    assert states() == ["FAIL", "FAIL"]
    result = json.loads((study().trial_folder(0) / "result.json").read_text())
    assert "no point" in result["traceback"]


def test_recipe_that_is_a_point_of_the_grid_runs_once(run):
    assert run("lora.r=1,2", "search.enqueue=['lora.r=2']") == 0
    assert [t.user_attrs["swept"]["lora.r"] for t in study().trials()] == [2, 1]


def test_sweep_file_of_ones_own_is_found_here_and_by_path(run, tmp_path, capsys):
    (tmp_path / "sweeps").mkdir()
    mine = "# Is two enough?\nspace:\n  lora.r: 1,2\n  lora.lora_dropout: {choices: [0.1], when: %s}\n"
    (tmp_path / "sweeps" / "mine.yaml").write_text(mine % "lora.r == 2")
    (tmp_path / "bad.yaml").write_text(mine % "lora.rr == 2")
    assert run("--sweep", "mine") == 0
    assert study().meta.question == "Is two enough?"
    assert [t.user_attrs["swept"] for t in study().trials()] == [{"lora.r": 1}, {"lora.r": 2, "lora.lora_dropout": 0.1}]
    assert run("--sweep", "bad.yaml", "study=u") == 1
    assert "lora.rr" in capsys.readouterr().err
    assert run("--sweep", "nix", "study=u") == 1
    assert "no nix.yaml in ./sweeps or among lorasweep's own" in capsys.readouterr().err


def test_more_trials_of_a_sampler_go_on_where_it_stopped(run):
    space = ["train.learning_rate=tag(log,interval(1e-4,1e-2))", "search.sampler=random"]
    assert run(*space, "search.trials=2") == 0
    assert main.main(["resume", "s", "search.trials=3"]) == 0
    assert states() == ["COMPLETE"] * 3
    assert len({t.params["train.learning_rate"] for t in study().trials()}) == 3


def test_warm_start_tells_the_sampler_and_not_the_table(run, capsys):
    assert run("lora.r=1,2") == 0
    more = ["lora.r=2,4,8", "search.sampler=tpe", "search.trials=1", "search.warm_start=[outputs/s]", "study=t"]
    assert run(*more) == 0
    assert "warm start: 1 of 2 trials" in capsys.readouterr().out
    new = Study.open(Path("outputs/t"))
    assert len(new.trials()) == 1 and len(new._optuna.get_trials()) == 2


def test_recipes_come_first(run):
    space = ["lora.r=interval(1,8)", "search.sampler=tpe", "search.trials=2"]
    assert run(*space, "search.enqueue=['lora.r=3 lora.lora_alpha=5']") == 0
    first = study().trial(0)
    assert first.params == {"lora.r": 3}
    config = json.loads((study().trial_folder(0) / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 5)
    assert len(study().trials()) == 2


def test_cheapest_counts_as_an_objective(run):
    assert run("lora.r=1,2,4", "search.sampler=nsga2", "search.trials=3", "search.objectives=[trainable]") == 0
    for trial in study().trials():
        result = json.loads((study().trial_folder(trial.number) / "result.json").read_text())
        assert trial.values == [result["metric"]["value"], result["params"]["trainable"]]


def test_study_in_a_database_is_run_and_joined_from_elsewhere(run, postgres, capsys):
    assert run("lora.r=1,2", f"search.storage={postgres}", "study=far") == 0
    assert "postgresql" in json.loads(Path("outputs/far/study.json").read_text())["storage"]
    assert not Path("outputs/far/journal.log").exists()
    assert main.main(["add", postgres, "study=far", "lora.r=3"]) == 0
    assert main.main(["work", postgres, "study=far", "outputs=elsewhere"]) == 0
    assert (Path("elsewhere") / "far" / "2" / "result.json").exists()
    capsys.readouterr()
    assert main.main(["status", postgres, "study=far"]) == 0
    assert "3 complete" in capsys.readouterr().out
    assert run("lora.r=1,2", f"search.storage={postgres}", "study=far", "outputs=other") == 1
    assert "the database has a study 'far' already" in capsys.readouterr().err


def later(act, ready) -> threading.Thread:
    """Do something once a study is ready for it."""

    def wait() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if Path("outputs/s/study.json").exists() and ready(study()):
                act()
                return
            time.sleep(0.1)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_stopped_trial_is_pruned_and_the_next_one_runs(run, monkeypatch):
    monkeypatch.setattr(worker, "POLL_S", 0.1)

    def begun(s: Study) -> bool:
        return bool(s.trials()[0].intermediate_values)

    thread = later(lambda: main.main(["stop", "s", "0", "too", "slow"]), begun)
    assert run("lora.r=1,2", "train.max_steps=400") == 0
    thread.join()
    assert states() == ["PRUNED", "COMPLETE"]
    assert study().trial(0).user_attrs["reason"] == "stopped by hand: too slow"
    assert study().trial(0).user_attrs["steps"] < 400


def test_stop_all_saves_and_resume_goes_on(run, monkeypatch, capsys):
    monkeypatch.setattr(worker, "POLL_S", 0.1)
    thread = later(lambda: main.main(["stop", "s", "--all"]), lambda s: bool(s.trials()[0].intermediate_values))
    assert run("lora.r=1,2", "train.max_steps=400", "train.slots=2") == 130
    thread.join()
    assert "go on with: python -m lorasweep resume outputs/s" in capsys.readouterr().out
    assert states() == ["WAITING", "WAITING"]
    step = study().trial(0).user_attrs["checkpoint_step"]
    assert 0 < step < 400
    client = mlflow.MlflowClient(f"sqlite:///{Path('outputs').resolve()}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("lorasweep").experiment_id])
    assert [r.info.status for r in runs if r.data.tags["kind"] == "trial"] == ["KILLED", "KILLED"]
    assert main.main(["resume", "s"]) == 0
    assert states() == ["COMPLETE", "COMPLETE"]
    assert f"goes on from step {step}" in (study().trial_folder(0) / "log.txt").read_text()
    lines = [json.loads(x) for x in (study().trial_folder(0) / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "train_loss" in x] == list(range(1, 401))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_full_disk_stops_the_worker_with_a_clear_message_and_loses_nothing(run, monkeypatch, capsys, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("lorasweep.runner.endings.write_result", full)
    assert run("lora.r=1,2") == 1
    said = capsys.readouterr().err
    assert os.strerror(number) in said and "free space, then: python -m lorasweep resume" in said
    assert "FAIL" not in states()
    monkeypatch.undo()


def test_failed_trials_run_again_when_asked(run, monkeypatch):
    from lorasweep.lora import adapter
    from lorasweep.runner import preflight, rehearsal

    def broken(*_):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patched:
        patched.setattr(rehearsal, "rehearse", lambda *_: [])
        patched.setattr(preflight, "_trained_bytes", lambda *_: 0)
        patched.setattr(adapter, "attach", broken)
        assert run("lora.r=1,2") == 3
    assert states() == ["FAIL", "FAIL"]
    assert "out of luck" in json.loads((study().trial_folder(0) / "result.json").read_text())["traceback"]
    assert main.main(["resume", "s", "--failed"]) == 0
    assert states() == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert main.main(["resume", "s", "--failed"]) == 0
    assert len(states()) == 4


def test_eva_of_a_rank_above_the_batch_ends(run):
    run("lora.r=16", "lora.init_lora_weights=eva", "data.max_train_samples=64", "train.batch_size=4")
    assert states() == ["COMPLETE"]


def test_eva_without_examples_enough_is_refused_before_the_study_is_made(run, capsys):
    assert run("lora.r=16", "lora.init_lora_weights=eva", "data.max_train_samples=30", "train.batch_size=4") == 1
    assert "eva needs r * eva_rho = 32 training examples, got 30" in capsys.readouterr().err
    assert not Path("outputs/s").exists()
