"""Searches replayed in virtual time (benchmarks/replay.py), with fixed seeds: what they draw, what they cost, what they
find.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from landscapes import Landscape
from methods import Listed, chunked
from record_curves import TWENTIETHS, runs
from replay import ANCHORS, Cell, Setup, ours, sweep
from simulated import Simulation, pass_time
from surrogate import Surrogate


def recorded(path: Path, settings: int) -> Path:
    """Write curves of an invented data set as record_curves.py writes real ones."""
    where, steps = Landscape(1), [round(Landscape.total * k / 20) for k in TWENTIETHS]
    lines = [json.dumps({"name": "invented", "metric": "accuracy", "steps": Landscape.total})]
    for run in runs(settings, seed=1):
        curve = where.curve(run.setting, [run.number, run.seed])
        values = {"accuracy": [curve.at(step) for step in steps]}
        own = {"rate": where.rate(run.setting), "steps": steps, "eval": values, "test": {"accuracy": curve.test}}
        lines.append(json.dumps(vars(run) | own))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_surrogate_foretells_settings_that_it_has_not_seen_and_seeds_differ_as_they_did(tmp_path):
    found = Surrogate(recorded(tmp_path / "invented.jsonl", 64))
    assert found.rule == pytest.approx(Landscape.rule)
    assert found.quality()["r"] > 0.8
    where, random = Landscape(1), np.random.default_rng(0)
    settings = [RECIPE | {"train.lr_multiple": float(m)} for m in np.exp(random.uniform(-1.4, 1.4, 20))]
    assert np.corrcoef(found.means(settings)[:, -1], where.means(settings)[:, -1])[0, 1] > 0.9
    one, again, other = (found.curve(RECIPE, seed) for seed in ([1, 2], [1, 2], [1, 3]))
    assert list(one.values) == list(again.values) != list(other.values)
    assert one.test == other.test


RECIPE = {"lora.r": 16, "lora.lora_alpha": 32, "train.learning_rate": "auto", "lora.target_modules": "all-linear"}


def replayed(trials: int, slots: int, workers: int = 1, **changed):
    setup = Setup(Landscape(1), sweep("lora_search"), trials, slots, workers, 3, trials)
    method = ours(**changed)(setup)
    found = Simulation(setup.curves, method, slots=slots, workers=workers, seed=3).run()
    return found, method.study


@pytest.mark.parametrize("trials", [12, 24])
def test_points_are_the_same_in_one_slot_in_eight_and_with_two_workers_of_them(trials):
    one, eight, again = replayed(trials, 1), replayed(trials, 8), replayed(trials, 8)
    assert one[0].settings == eight[0].settings == again[0].settings
    assert one[0].states == eight[0].states
    assert len(one[0].settings) == trials


def test_no_point_is_drawn_by_a_model_that_has_seen_nothing():
    for trials in (12, 24):
        _, study = replayed(trials, 8)
        line = study._line(study.trials())
        seen = [line.sees(t.number) for t in study.trials() if line.models(t.number)]
        assert len(seen) >= trials // 2 and min(seen) >= 4


def test_time_is_that_of_the_passes():
    method = Listed([RECIPE] * 3)
    found = Simulation(Landscape(0), method, slots=2, workers=1, seed=0).run()
    total = Landscape.total
    assert found.points[-1].time == pass_time(3, 2, 1, total) == total * (3 + 2) / 2
    assert pass_time(1, 1, 1, total) == total, "a trial that has the device to itself"
    spread = Simulation(Landscape(0), Listed([RECIPE] * 4), slots=2, workers=2, seed=0).run()
    assert spread.points[-1].device == 2 * spread.points[-1].time == 2 * pass_time(4, 2, 2, total)


def test_a_rule_of_chunks_halves_the_field_and_pays_for_what_it_ran():
    settings = [RECIPE | {"train.lr_multiple": m} for m in (0.25, 0.5, 1, 2, 4, 8, 16, 1.5)]
    found = chunked(Landscape(1), settings, slots=1, workers=1, seed=0)
    assert 1 <= found.states.count("COMPLETE") <= 2
    assert found.points[-1].time == Landscape.total / 4 * (8 + 4 + 2 + found.states.count("COMPLETE"))


@pytest.mark.parametrize("name", ["random", "TPE + median", "random + Ray's ASHA", "three rates"])
def test_lora_search_finds_better_settings_than_anchors_in_the_same_space_and_time(name):
    cells = [Cell(Landscape(i), 12, 1, 1, in_time=True) for i in range(6)]
    own = [c.score(ours(), 0, sweep("lora_search")).regret for c in cells]
    theirs = [c.score(ANCHORS[name], 0, sweep("lora_search")).regret for c in cells]
    assert np.mean(own) < np.mean(theirs)
