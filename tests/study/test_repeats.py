"""Repeats: who runs again, with which seeds, who leaves the race, and what a stop in between changes."""

import re

import numpy as np
import pytest
from support.studies import SMALL, end, study_of

from lorasweep.cli import main
from lorasweep.runner import launch, resume
from lorasweep.search import pruners, study_view
from lorasweep.study import answer, repeat_rounds, repeats, wording
from lorasweep.study.study import Study


def seeds(study: Study) -> list[tuple[int, int, int]]:
    """Return origin, round and seed of each repeat."""
    again = [t for t in study.trials() if repeats.is_repeat(t)]
    return [
        (t.user_attrs["repeat_of"], t.user_attrs["repeat"], study.spec(t.user_attrs["overrides"]).train.seed)
        for t in again
    ]


def searched(tmp_path, values=(0.6, 0.79, 0.80, 0.5), **keys) -> Study:
    study = study_of(tmp_path, [2, 4, 8, 16][: len(values)], **{"repeats": 2, "repeat_top": 2} | keys)
    for value, trainable in zip(values, (100, 100, 200, 400), strict=False):
        end(study, value, trainable=trainable)
    return study


def test_best_run_again_with_one_new_seed_a_round(tmp_path):
    study = searched(tmp_path)
    assert len(repeat_rounds.next_round(study)) == 2
    assert seeds(study) == [(2, 1, 1), (1, 1, 1)]
    assert repeat_rounds.next_round(study) == []  # they wait
    end(study, 0.78), end(study, 0.80)
    repeat_rounds.next_round(study)
    assert sorted(seeds(study)[2:]) == [(1, 2, 2), (2, 2, 2)]
    end(study, 0.78), end(study, 0.80)
    assert repeat_rounds.next_round(study) == []
    assert [t.user_attrs["overrides"][-1] for t in study.trials()[4:]] == [f"train.seed={s}" for s in (1, 1, 2, 2)]


def test_winner_is_the_one_that_all_runs_speak_for_not_the_best_run(tmp_path):
    study = searched(tmp_path)
    assert study.best().number == 2
    while round_ := repeat_rounds.next_round(study):
        for number in round_:
            study_of_run = study.trial(number).user_attrs["repeat_of"]
            end(study, {1: 0.80, 2: 0.76}[study_of_run])
    found = answer.answer(study)
    assert study.best().number == found.best.number == 1
    assert set(found.best.values) == {0.80} and found.best.searched == 0.79 and found.best.repeated
    assert "the mean of 2 new seeds" in wording.text(found)
    assert "the search's own run had 0.7900" in wording.text(found)
    assert [c.number for c in found.candidates] == [0, 1, 2, 3]


def test_mean_of_the_winner_leaves_out_the_run_that_the_search_chose(tmp_path):
    study = searched(tmp_path, values=(0.5, 0.9), repeats=3, repeat_top=1)
    while repeat_rounds.next_round(study):
        while study.queue.waiting():
            end(study, 0.7)
    best = answer.answer(study).best
    assert best.number == 1 and best.searched == 0.9 and best.value == pytest.approx(0.7)


def test_error_adds_examples_and_the_spread_over_seeds_of_all_candidates(tmp_path):
    study = searched(tmp_path, values=(0.3, 0.60, 0.90), repeats=2)
    drawn = {2: [0.7, 0.9], 1: [0.8, 0.6]}
    while round_ := repeat_rounds.next_round(study):
        for number in round_:
            end(study, drawn[study.trial(number).user_attrs["repeat_of"]].pop(0))
    best = answer.answer(study).best  # runs 0.90 0.7 0.9 and 0.60 0.8 0.6
    spread = ((3 * np.var([0.9, 0.7, 0.9]) + 3 * np.var([0.6, 0.8, 0.6])) / 4) ** 0.5
    assert best.number == 2 and best.value == pytest.approx(0.8)
    assert best.standard_error == pytest.approx((spread**2 / 2 + 0.8 * 0.2 / 400) ** 0.5, rel=0.02)
    assert best.interval.low < 0.8 - 2.3 * best.standard_error


def test_trial_of_one_seed_is_not_compared_with_configurations_of_several(tmp_path):
    study = searched(tmp_path, values=(0.3, 0.60, 0.90), repeats=1)
    repeat_rounds.next_round(study)
    for value in (0.72, 0.70):
        end(study, value)
    found = answer.answer(study)
    one = next(c for c in found.candidates if c.number == 0)
    assert not one.repeated and one.alike is None and one.gap is None


def test_cheapest_within_the_margin_runs_again_too(tmp_path):
    study = study_of(tmp_path, [2, 4, 8, 16], repeats=1, repeat_top=2, margin=0.02)
    for value, trainable in ((0.7975, 10), (0.60, 5), (0.8, 300), (0.8025, 200)):
        end(study, value, trainable=trainable)
    repeat_rounds.next_round(study)
    assert [origin for origin, *_ in seeds(study)] == [3, 2, 0]


def test_run_that_cannot_change_the_choice_is_not_made(tmp_path):
    study = searched(tmp_path, repeats=3, repeat_top=3)
    repeat_rounds.next_round(study)  # 2, 1, 0
    end(study, 0.81), end(study, 0.80), end(study, 0.605)
    repeat_rounds.next_round(study)
    assert sorted(s[:2] for s in seeds(study)[3:]) == [(1, 2), (2, 2)]


def test_repeats_end_when_no_run_is_expected_to_gain(tmp_path):
    study = searched(tmp_path, values=(0.6, 0.601, 0.8, 0.602), repeats=5, repeat_top=3)
    repeat_rounds.next_round(study)
    end(study, 0.801), end(study, 0.603), end(study, 0.601)
    assert len(repeat_rounds.next_round(study)) == 2  # the mean that is reported is of two new seeds
    end(study, 0.802), end(study, 0.602)
    assert repeat_rounds.next_round(study) == []  # of 15 that the budget has
    assert study.best().number == 2


def test_auto_repeats_until_seeds_leave_less_than_the_margin_open(tmp_path):
    study = searched(tmp_path, repeats="auto", repeat_top=3, trials=4)
    drawn = {2: [0.80, 0.79, 0.81, 0.80], 1: [0.795, 0.795, 0.80, 0.79], 0: [0.60, 0.60, 0.605, 0.60]}
    rounds = []
    while round_ := repeat_rounds.next_round(study):
        rounds.append([study.trial(n).user_attrs["repeat_of"] for n in round_])
        for origin in rounds[-1]:
            end(study, drawn[origin].pop(0))
    assert rounds[0] == [2, 1, 0]
    assert rounds[1:] and all(round_ == [2, 1] for round_ in rounds[1:]), "the best and the one that may be better"
    found = answer.answer(study)
    assert found.doubt.number == 1 and found.doubt.at_most < found.margin
    said = f"after {found.again} repeats, no other configuration that ran again is better by more than 0.0100"
    assert said in wording.text(found)
    assert f"at most {found.doubt.at_most:.4f}" in wording.text(found)


def test_auto_ends_at_its_bound_and_says_what_stayed_open(tmp_path):
    study = searched(tmp_path, repeats="auto", repeat_top=2, margin=0.0001)
    count = 0
    while round_ := repeat_rounds.next_round(study):
        for number in round_:
            count += 1
            even = study.trial(number).user_attrs["repeat"] % 2
            origin = study.trial(number).user_attrs["repeat_of"]
            end(study, 0.80 + (0.02 if even and origin == 1 else 0.0))
    assert count == repeat_rounds.FEWEST_AUTO_RUNS * 2
    text = wording.text(answer.answer(study))
    assert "search.repeats=auto" in text and "6 repeats are spent" in text and "may still be better by up to" in text


@pytest.mark.parametrize("hours", ["device_hours", "wall_hours"])
def test_auto_goes_on_to_the_hours_that_it_is_given(tmp_path, hours):
    study = searched(tmp_path, repeats="auto", repeat_top=2, margin=0.0001, **{hours: 9.0})
    for _ in range(5):
        for number in repeat_rounds.next_round(study):
            end(study, 0.7 + 0.02 * (number % 3))
    assert repeat_rounds.next_round(study), "more than the bound of a study without hours"
    study.begin()
    study.change_search({hours: 1e-9})
    assert study.spent() and study.ready() == 0 and repeat_rounds.next_round(study) == []


def test_auto_does_not_repeat_what_fails_without_end(tmp_path):
    study = searched(tmp_path, values=(0.6,), repeats="auto", device_hours=1.0)
    for number in repeat_rounds.next_round(study):
        assert study.claim() == number
        study.queue.tell(number, "FAIL", None, {"reason": "out of luck"})
    assert repeat_rounds.next_round(study) == []


@pytest.mark.parametrize("most", [1, "auto"])
def test_settled_study_repeats_its_best_while_trials_of_the_search_still_wait(tmp_path, most):
    study = study_of(tmp_path, [2, 4, 8, 16] * 2 + [2, 4], repeats=most, stop="when_settled", margin=0.05)
    for k in range(8):
        end(study, 0.70 + 0.01 * (k % 2), trainable=100 + k)
    assert study.settled() and study.ready() == 0 and study.claim() is None
    again = repeat_rounds.next_round(study)
    assert len(again) >= 1 and study.ready() == len(again)
    end(study, 0.7)
    assert repeats_of(study)
    while study.ready():
        end(study, 0.7)
    found = answer.answer(study)
    assert not found.going_on, "the trials that wait do not begin"
    assert "2 trials were not begun: search.stop=when_settled: 2 more trials like the 8 finished ones" in wording.text(
        found
    )


def repeats_of(study: Study) -> list[int]:
    return [t.number for t in study.trials() if repeats.is_repeat(t) and t.state.name == "COMPLETE"]


def test_minimised_metric_is_chosen_the_other_way(tmp_path):
    study = study_of(tmp_path, [2, 4], maximize=False, repeats=1)
    end(study, 2.0), end(study, 1.0)
    repeat_rounds.next_round(study)
    end(study, 1.01), end(study, 2.01)
    assert study.best().number == 1


def test_single_configuration_runs_with_all_seeds(tmp_path):
    study = searched(tmp_path, values=(0.6,))
    for _ in range(2):
        assert len(repeat_rounds.next_round(study)) == 1
        end(study, 0.61)
    assert repeat_rounds.next_round(study) == []
    assert len(answer.answer(study).best.values) == 2


def test_half_queued_round_is_completed_and_no_seed_comes_twice(tmp_path):
    study = searched(tmp_path)
    repeat_rounds.next_round(study)
    study.queue.end_waiting(study.trials()[-1].number, "stopped")
    half = Study.open(study.folder)
    found = half.signals.racing()
    assert half.run_again(found, [repeat_rounds._entry(half.trial(n), found, 1) for n in found.candidates]) == []
    end(half, 0.8)
    repeat_rounds.next_round(half)
    found = seeds(half)
    assert len(found) == 4 and len({(origin, seed) for origin, _, seed in found}) == 4
    assert {s[1:] for s in found} == {(1, 1), (2, 2)}


def test_seed_of_a_repeat_is_new_where_the_search_varied_it(tmp_path):
    study = searched(tmp_path, values=(0.6, 0.8))
    found = repeat_rounds.Race(seed=7)
    trial = study.trial(1)
    trial.user_attrs["swept"]["train.seed"] = 7
    entry = repeat_rounds._entry(trial, found, 2)
    assert entry.overrides[-1] == "train.seed=9" and entry.given["train.seed"] == 9


def test_study_prunes_by_comparison_neither_in_a_warm_up_nor_in_the_last_tenth(tmp_path):
    study = study_of(tmp_path, [2, 4, 8], pruner="median", pruner_startup_trials=2, min_complete=0)
    for value in (0.8, 0.9):
        number = study.claim()
        for step in (30, 50, 95):
            study.queue.report(number, step, value)
        study.queue.tell(number, "COMPLETE", [value], {})
    number, ended = study.claim(), {}
    for step in (30, 50, 95):
        study.queue.report(number, step, 0.1)
        ended[step] = study.should_prune(number, 100, warmup_ratio=0.2)
    assert ended == {30: False, 50: True, 95: False}


def test_samplers_and_pruners_do_not_see_repeats(tmp_path):
    study = searched(tmp_path, pruner="median", pruner_startup_trials=1)
    repeat_rounds.next_round(study)
    number = study.claim()
    study.queue.report(number, 1, 0.0)
    assert not study.should_prune(number, 10)
    seen = pruners._OwnTrials.of(study._optuna).get_trials(deepcopy=False)
    assert [t.number for t in seen] == [0, 1, 2, 3]
    assert [t.number for t in study_view.FirstObjective.of(study._optuna)._get_trials(False, None, False)] == [
        0,
        1,
        2,
        3,
    ]


def test_failed_repeat_is_done_again_as_the_same_repeat(tmp_path):
    study = searched(tmp_path)
    repeat_rounds.next_round(study)
    number = study.claim()
    study.queue.tell(number, "FAIL", None, {"reason": "out of luck"})
    end(study, 0.8)
    resume.resume(study, [], failed=True)
    again = study.trials()[-1].user_attrs
    assert (again["retry_of"], again["repeat_of"], again["repeat"]) == (number, 2, 1)


def test_budget_that_is_spent_ends_the_race(tmp_path):
    study = searched(tmp_path)
    study.change_search({"target": 0.7})
    assert repeat_rounds.next_round(study) == []


def test_stopped_study_goes_on_with_its_repeats(tiny_bert, tmp_path, monkeypatch, capsys):
    rounds = repeat_rounds.next_round
    monkeypatch.setattr(repeat_rounds, "next_round", lambda s: s.signals.stop(None, "here") or rounds(s))
    model = [f"model.pretrained={tiny_bert}"]
    keys = ["search.repeats=2", "search.repeat_top=1", "lora.r=2,4", f"outputs={tmp_path}", "study=s"]
    assert main.main(["-m", *keys, *model, *SMALL, "tracking=none"]) == launch.EXIT_INTERRUPTED
    study = Study.open(tmp_path / "s")
    assert study.queue.waiting() >= 1
    monkeypatch.setattr(repeat_rounds, "next_round", rounds)
    assert main.main(["resume", str(tmp_path / "s")]) == 0
    found = seeds(study)
    assert len(set(found)) == len(found) == 2 and {s for *_, s in found} <= {1, 2}
    best = answer.answer(study).best
    assert best is not None and best.repeated
    out = capsys.readouterr().out
    assert re.search("the mean of 2 new seeds|with a new seed", out) and f"(repeat of trial {best.number})" in out
    assert study.trial_folder(best.number).joinpath("result.json").read_text().count('"test"') == 1


def test_finished_study_is_resumed_to_repeat_its_best(tiny_bert, tmp_path, capsys):
    model = [f"model.pretrained={tiny_bert}"]
    assert main.main(["-m", "lora.r=2,4", *model, *SMALL, "tracking=none", f"outputs={tmp_path}", "study=s"]) == 0
    study = Study.open(tmp_path / "s")
    before = answer.answer(study).best
    assert before is not None and not before.repeated and len(study.trials()) == 2
    capsys.readouterr()
    words = ["resume", str(tmp_path / "s"), "search.repeats=2", "search.repeat_top=2"]
    assert main.main(words) == 0
    out = capsys.readouterr().out
    assert out.count("repeats: 2 trials run again with another seed") == 2
    again = Study.open(tmp_path / "s")
    assert sorted(s[:2] for s in seeds(again)) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert all(t.state.name == "COMPLETE" for t in again.trials())
    best = answer.answer(again).best
    assert best is not None and best.repeated and len(best.values) == 2
    repeated = [t.values[0] for t in again.trials() if t.user_attrs.get("repeat_of") == best.number]
    assert best.values == tuple(repeated)
    assert f"eval accuracy {best.value:.4f}" in out and "the mean of 2 new seeds" in out
    assert "2 new seeds" in (tmp_path / "s" / "best.yaml").read_text()
    assert "the mean of the new seeds is shown" in (tmp_path / "s" / "report.md").read_text()
    assert main.main(words) == 0 and len(Study.open(tmp_path / "s").trials()) == 6  # nothing is left to repeat
