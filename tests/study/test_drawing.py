"""A point is trained once: samplers draw again what is known, and what is asked for twice is left out."""

import math
import time
from contextlib import suppress
from dataclasses import asdict
from heapq import heappop, heappush
from pathlib import Path
from random import Random

import pytest

from lorasweep.config import compose
from lorasweep.config.spec import SearchSpec
from lorasweep.errors import KnownPoint
from lorasweep.search import pruners, space
from lorasweep.study import same_point
from lorasweep.study.drawing import RESULTS
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
        study.queue.tell(number, state, [float(trial.spec.lora.r)] if state != "FAIL" else None, {})
    return points


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_draws_each_point_of_a_small_space_once_and_no_more(tmp_path, sampler):
    study = make(tmp_path, ["lora.r=range(2,8,2)", "train.seed=range(0,2)"], 9, sampler=sampler)
    found = run(study)
    assert sorted((p["lora.r"], p["train.seed"]) for p in found) == [(r, s) for r in (2, 4, 6) for s in (0, 1)]
    assert [t.state.name for t in study.trials()] == ["COMPLETE"] * 6
    assert study.failed() == [] and study.queue.waiting() == study.queue.running() == 0
    assert [line.split(" was not")[0] for line in study.left_out()] == ["trial 6", "trial 7", "trial 8"]


def test_whole_numbers_of_an_interval_are_points_too(tmp_path):
    study = make(tmp_path, ["lora.r=tag(log,interval(3,6))"], 6)
    assert sorted(p["lora.r"] for p in run(study)) == [3, 4, 5, 6]


def test_two_workers_do_not_draw_one_point(tmp_path):
    study = make(tmp_path, ["lora.r=2,4,8,16"], 4)
    workers = [study, Study.open(study.folder)]
    drawn = []
    for i in range(4):
        one, other = workers[i % 2], workers[1 - i % 2]
        number = one.claim()
        assert other.claim() is None, "the next point is drawn once this one is known"
        drawn.append(one.drawn(number).spec.lora.r)
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
        if study.queue.running():
            study.queue.put_back(study.queue._ids.pop(number))
    assert sorted(p["lora.r"] for p in run(study)) == [2, 4]


STEPS = 16


def play(study: Study, at_once: int, clock: int) -> list[tuple]:
    """Run a study in counted time, `at_once` trials beside each other; return what each drew and came to. `clock` says
    how long each takes.
    """
    chance, now = Random(clock), 0.0
    steps = [*sorted(pruners.rungs(study.search, STEPS) or {4, 8}), STEPS]
    running: list[tuple] = []
    while True:
        while len(running) < at_once and (number := study.claim()) is not None:
            point, pace = study.drawn(number).swept(study.space), chance.uniform(0.5, 3.0)
            heappush(running, (now + pace * steps[0], number, 0, point, pace))
        if not running:
            break
        now, number, place, point, pace = heappop(running)
        value = 1 - abs(math.log10(point["train.learning_rate"]) + 3) / 4 - 0.3 / point["lora.r"]
        value -= 0.2 / steps[place] * chance_of(point)
        study.queue.report(number, steps[place], value)
        if steps[place] == STEPS:
            study.queue.tell(number, "COMPLETE", [value], {})
        elif study.should_prune(number, STEPS):
            study.queue.tell(number, "PRUNED", None, {"step": steps[place]})
        else:
            heappush(running, (now + pace * (steps[place + 1] - steps[place]), number, place + 1, point, pace))
    assert study.queue.waiting() == 0 and not study.left_out()
    return [(t.user_attrs["swept"], t.state.name, t.user_attrs.get("step")) for t in study.trials()]


def chance_of(point: dict) -> float:
    return Random(str(point)).random()


TWO_KEYS = ["lora.r=2,4,8,16,32", "train.learning_rate=tag(log,interval(1e-5,1e-1))"]


@pytest.mark.parametrize(("sampler", "pruner"), [("tpe", "none"), ("tpe", "asha"), ("tpe", "median"), ("gp", "asha")])
def test_neither_points_nor_ends_depend_on_slots_workers_or_speed(tmp_path, sampler, pruner):
    """Eight slots, or three, and clocks that differ: the trials are those of one slot, and no draw is blind."""
    trials = 18 if sampler == "tpe" else 8
    search = {"sampler": sampler, "pruner": pruner, "startup_trials": 5, "seed": 3, "min_complete": 2}
    found = []
    for at_once, clock, workers in ((1, 0, 1), (8, 1, 1), (3, 2, 2)):
        study = make(tmp_path, TWO_KEYS, trials, **search, workers=workers, reduction_factor=2)
        found.append(play(study, at_once, clock))
        modelled = [t.user_attrs[RESULTS] for t in study.trials() if RESULTS in t.user_attrs]
        assert len(modelled) == trials - 5
        assert min(modelled) >= 4, "each draw of the model sees results"
    assert found[1:] == found[:-1]
    if pruner != "none" and sampler == "tpe":
        assert {state for _, state, _ in found[0]} == {"COMPLETE", "PRUNED"}


def test_trial_that_is_added_stands_in_no_line_and_counts_once_it_has_ended(tmp_path):
    search = {"sampler": "tpe", "startup_trials": 2, "in_flight": 1}
    study = make(tmp_path, TWO_KEYS, 4, **search)
    line = ["lora.r=64"]
    added = study.queue.enqueue([Entry(line, {"lora.r": 64}, added=True)])[0]
    first = study.claim()
    assert first == added
    study.drawn(first)
    for number in (0, 1):
        assert study.claim() == number
        study.drawn(number)
    for number in (first, 0):
        assert study.claim() is None, "the next point waits for all before it"
        assert study.awaits_results()
        study.queue.tell(number, "COMPLETE", [0.5], {})
    study.queue.tell(1, "PRUNED", None, {})
    assert not study.awaits_results()
    assert study.claim() == 2
    assert study.drawn(2) and study.trial(2).user_attrs[RESULTS] == 3


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
