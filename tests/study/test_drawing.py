"""A point is trained once: samplers draw again what is known, and what is asked for twice is left out."""

import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest

from lorasweep.config import compose
from lorasweep.config.spec import SearchSpec
from lorasweep.errors import KnownPoint
from lorasweep.search import space
from lorasweep.study import same_point
from lorasweep.study.meta import Entry, StudyMeta
from lorasweep.study.study import Study

SAMPLERS = ("random", "tpe", "gp", "qmc", "nsga2", "cmaes")


def make(folder: Path, words: list[str], trials: int, *entries: Entry, **search) -> Study:
    where, problems = space.read(words)
    assert problems == []
    name = f"s{time.monotonic_ns()}"
    spec = asdict(SearchSpec(**{"sampler": "random", "startup_trials": 2} | search))
    meta = StudyMeta(name, where.keys, [], "accuracy", True, "", space=where.describe(), search=spec)
    return Study.create(folder / name, meta, [*entries, *[Entry()] * trials])


def run(study: Study, *, state: str = "COMPLETE") -> list[dict]:
    """Claim and end all trials; return the points of those that were not left out."""
    points = []
    while (number := study.claim()) is not None:
        try:
            trial = study.drawn(number)
        except KnownPoint:
            continue
        points.append(trial.swept(study.space))
        study.tell(number, state, [float(trial.spec.lora.r)] if state != "FAIL" else None, {})
    return points


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_draws_each_point_of_a_small_space_once_and_no_more(tmp_path, sampler):
    study = make(tmp_path, ["lora.r=range(2,8,2)", "train.seed=range(0,2)"], 9, sampler=sampler)
    found = run(study)
    assert sorted((p["lora.r"], p["train.seed"]) for p in found) == [(r, s) for r in (2, 4, 6) for s in (0, 1)]
    assert [t.state.name for t in study.trials()] == ["COMPLETE"] * 6
    assert study.failed() == [] and study.waiting() == study.running() == 0
    assert [line.split(" was not")[0] for line in study.left_out()] == ["trial 6", "trial 7", "trial 8"]


def test_whole_numbers_of_an_interval_are_points_too(tmp_path):
    study = make(tmp_path, ["lora.r=tag(log,interval(3,6))"], 6)
    assert sorted(p["lora.r"] for p in run(study)) == [3, 4, 5, 6]


def test_two_workers_do_not_draw_one_point(tmp_path):
    study = make(tmp_path, ["lora.r=2,4,8,16"], 4)
    workers = [study, Study.open(study.folder)]
    claimed = [workers[i % 2].claim() for i in range(4)]
    drawn = [workers[i % 2].drawn(n).spec.lora.r for i, n in enumerate(claimed)]
    assert sorted(drawn) == [2, 4, 8, 16]


def test_other_order_of_names_is_no_other_point(tmp_path):
    study = make(tmp_path, ["lora.target_modules=[query,value],[value,query],[key]"], 3)
    assert len(run(study)) == 2


def test_point_that_failed_is_drawn_again_and_one_that_was_pruned_is_not(tmp_path):
    assert len(run(make(tmp_path, ["lora.r=2,4"], 5), state="FAIL")) == 5
    assert len(run(make(tmp_path, ["lora.r=2,4"], 5), state="PRUNED")) == 2


def test_point_that_is_given_twice_is_trained_once_but_a_pruned_one_again(tmp_path):
    for state, trials in (("COMPLETE", 1), ("PRUNED", 2)):
        entries = [Entry(["lora.r=2"], {"lora.r": 2}), Entry(["lora.r=2"], {"lora.r": 2}, added=True)]
        study = make(tmp_path, ["lora.r=2,4"], 0, *entries)
        assert len(run(study, state=state)) == trials
        assert len(study.left_out()) == 2 - trials


def test_recipe_that_is_a_known_point_is_left_out(tmp_path):
    study = make(tmp_path, ["lora.r=2,4"], 1, Entry(given={"lora.r": 4}), Entry(given={"lora.r": 4}))
    assert [p["lora.r"] for p in run(study)] == [4, 2]
    assert len(study.left_out()) == 1


def test_worker_that_dies_while_it_draws_or_leaves_out_leaves_nothing_half(tmp_path, monkeypatch):
    study = make(tmp_path, ["lora.r=2,4"], 3)
    store = study._store.optuna
    real, calls = store.set_trial_user_attr, [0]
    for last in range(1, 6):  # the worker dies at its first, second, ... attribute
        number = study.claim()
        if number is None:
            break
        calls[0] = 0

        def dies(trial_id: int, key: str, value: object, last: int = last) -> None:
            calls[0] += 1
            if calls[0] == last:
                raise KeyboardInterrupt
            real(trial_id, key, value)

        monkeypatch.setattr(store, "set_trial_user_attr", dies)
        with suppress(KeyboardInterrupt, KnownPoint):
            study.drawn(number)
        monkeypatch.undo()
        if study.running():
            study._put_back(study._ids.pop(number))
    assert sorted(p["lora.r"] for p in run(study)) == [2, 4]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("lora.lora_alpha=16", "lora.r=8", True),
        ("lora.alpha_ratio=2", "lora.lora_alpha=16", True),
        ("train.seed=1", "train.seed=0", False),
        ("tracking.log_every=5", "lora.r=8", True),
        ("lora.modules_to_save=[a,b]", "lora.modules_to_save=[b,a,a]", True),
        ("lora.target_modules=[a]", "lora.target_modules=[a,b]", False),
        ("lora.layers_to_transform=[0,1]", "lora.layers_to_transform=[0]", False),
        ("data.max_tokens=32", "data.max_tokens=64", False),
    ],
)
def test_point_is_what_the_outcome_depends_on(one, other, same):
    found = [same_point.identity(compose.compose_trial([word])) for word in (one, other)]
    assert (found[0] == found[1]) is same
