"""The answer: the best, how sure it is, what may be as good, and what is near enough for less."""

import os

import numpy as np
import pytest
import yaml
from support.studies import ROWS, SMALL, end, study_of

from lorasweep.cli import main
from lorasweep.config import compose, sweep_file
from lorasweep.config.spec import TrackSpec
from lorasweep.report import terminal
from lorasweep.study import answer, example_scores, wording
from lorasweep.study.study import Study


def test_best_what_may_be_as_good_and_what_is_cheaper(tmp_path):
    study = study_of(tmp_path, [2, 4, 8, 16])
    end(study, 0.60, trainable=25)
    end(study, 0.80, trainable=50)
    end(study, 0.8025, trainable=100)
    end(study, 0.79, trainable=200)
    found = answer.answer(study)
    assert found.best is not None and found.cheapest is not None
    assert (found.best.number, found.best.value) == (2, 0.8025)
    assert found.best.standard_error == pytest.approx((0.8 * 0.2 / ROWS) ** 0.5, rel=0.1)
    assert found.best.interval is not None and found.best.interval.holds(0.80)
    assert [c.number for c in found.alike] == [1] and [c.number for c in found.worse] == [0, 3]
    assert found.alike[0].gap.value == pytest.approx(0.0025) and found.alike[0].gap.at_most < 0.01
    assert found.margin == 0.01 and found.cheapest.number == 1  # one example of 400 apart: shown to be near
    assert found.fronts["trainable"] == [0, 1, 2]
    text = wording.text(found)
    assert "Trial 2 (lora.r=8) is best with eval accuracy 0.8025" in text
    assert "without that choice expect" in text and "4 trained models, one seed each" in text
    assert "As good as it, for all these data show: trial 1 (lora.r=4), 0.0025 lower" in text
    assert "Worse: trials 0, 3." in text
    assert "within 0.0100 (search.margin): trial 1 (lora.r=4)" in text and "50 % of its trainable parameters" in text


def test_trials_with_other_eval_rows_are_ranked_among_themselves(tmp_path):
    study = study_of(tmp_path, [2, 4, 8, 16])
    end(study, 0.80, trainable=100, eval_rows="one")
    end(study, 0.90, trainable=50, eval_rows="two")
    end(study, 0.895, trainable=60, eval_rows="two")
    end(study, 0.85, trainable=10, eval_rows="one")
    found = answer.answer(study)
    assert found.best is not None and found.cheapest is not None
    assert (found.best.number, found.cheapest.number) == (1, 1)
    assert [c.number for c in found.apart] == [3]
    assert found.compared == 1 and [c.number for c in [*found.alike, *found.worse]] == [2]
    assert found.fronts["trainable"] == [1]
    text = wording.text(found)
    assert "Of the trials with its eval rows, trial 1 (lora.r=4) is best" in text
    other = (
        "Trials with other eval rows are not compared with it; the best on each of them: trial 3 (lora.r=16) 0.8500."
    )
    assert other in text


def test_candidate_as_near_as_chance_is_not_called_near_enough(tmp_path):
    study = study_of(tmp_path, [2, 4])
    end(study, 0.80, trainable=100)
    end(study, 0.795, trainable=50, shift=7)  # other examples are right: 0.005 worse, or 0.05
    found = answer.answer(study)
    assert found.alike and found.cheapest is not None and found.cheapest.number == 0
    assert "No cheaper one is shown to be within 0.0100 of it (search.margin)." in wording.text(found)
    study.change_search({"margin": 0.1})
    assert answer.answer(study).cheapest.number == 1


def test_measured_costs_that_differ_by_their_noise_are_equal(tmp_path):
    study = study_of(tmp_path, [2, 4, 8])
    end(study, 0.80, train_s=3.0)
    end(study, 0.79, train_s=2.9)
    end(study, 0.78, train_s=1.0)
    found = answer.answer(study)
    assert found.fronts["train_s"] == [2, 0]


def test_minimised_metric_is_read_the_other_way(tmp_path):
    study = study_of(tmp_path, [2, 4, 8], maximize=False)
    end(study, 1.50, trainable=50)
    end(study, 1.00, trainable=100)
    end(study, 1.20, trainable=200)
    found = answer.answer(study)
    assert found.best is not None and found.best.number == 1
    assert found.alike == [] and [c.number for c in found.worse] == [0, 2] and found.margin == pytest.approx(0.01)
    assert found.fronts["trainable"] == [0, 1]
    assert found.best.number == found.cheapest.number
    assert "Worse: trials 0, 2." in wording.text(found)


def test_test_metric_of_the_shipped_adapter_comes_first_with_its_interval(tiny_bert, tmp_path, capsys):
    model = [f"model.pretrained={tiny_bert}"]
    assert main.main(["-m", "lora.r=2,4", *model, *SMALL, "tracking=none", f"outputs={tmp_path}", "study=s"]) == 0
    study = Study.open(tmp_path / "s")
    found = answer.answer(study)
    assert found.tested is not None and found.tested.number == found.best.number
    assert found.tested.value == pytest.approx(study.scores(found.best.number, "test").value)
    assert found.tested.interval.holds(found.tested.value)
    said = f"is best: test accuracy {found.tested.value:.4f} (95 % {found.tested.interval}), with eval accuracy"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "s" / "report.md").read_text()


def test_running_study_says_so_far_and_an_empty_one_that_there_is_nothing(tmp_path):
    study = study_of(tmp_path, [2, 4])
    assert wording.text(answer.answer(study)).startswith("No trial is complete yet.")
    assert answer.write_best(study, answer.answer(study), "") is None
    end(study, 0.5)
    assert wording.text(answer.answer(study)).startswith("So far, trial 0 (lora.r=2) is best")
    end(study, 0.4)
    assert wording.text(answer.answer(study)).startswith("Trial 0")


def test_trial_without_predictions_is_not_compared(tmp_path):
    study = study_of(tmp_path, [2, 4, 8])
    for value in (0.8, 0.79, 0.5):
        end(study, value)
    os.remove(study.trial_folder(1) / example_scores.NAME)
    found = answer.answer(study)
    assert [c.alike for c in found.candidates] == [None, None, False]
    os.remove(study.trial_folder(0) / example_scores.NAME)
    found = answer.answer(study)
    assert found.cheapest is None and found.best is not None and found.best.interval is None
    assert "compared with no other: nothing tells how sure the choice is" in wording.text(found)


def test_pruned_and_failed_trials_are_counted(tmp_path):
    study = study_of(tmp_path, [2, 4, 8])
    end(study, 0.8)
    study.queue.tell(study.claim(), "PRUNED", [0.1], {"reason": "asha"})
    study.queue.tell(study.claim(), "FAIL", None, {"reason": "out of memory"})
    text = wording.text(answer.answer(study))
    assert "Of 3 trials 1 was pruned, 1 failed." in text


def test_printout_tells_best_cheapest_and_front(tmp_path, capsys):
    study = study_of(tmp_path, [2, 4, 8])
    for value, trainable in ((0.6, 25), (0.8, 1234), (0.8025, 2468)):
        end(study, value, trainable=trainable)
    found = answer.answer(study)
    terminal.show(study, "./outputs", found, TrackSpec())
    out = capsys.readouterr().out
    assert all(sentence in out for sentence in wording.sentences(found))
    assert "run it again: rerun 2" in out and "run the cheapest again: rerun 1" in out
    assert "trial 1, eval accuracy 0.8000, 1,234 trainable, 123.40 MB, 1.00 s training, 1.00 GiB" in out
    assert "    rerun 0" in out and out.count("rerun 1") == out.count("rerun 2") == 1


def test_printout_names_the_server_and_no_adapter_that_goes(tmp_path, capsys):
    study = study_of(tmp_path, [2])
    end(study, 0.8)
    track = TrackSpec(uri="http://me:secret@host:5000", save_adapters="none")
    terminal.show(study, "./outputs", answer.answer(study), track)
    out = capsys.readouterr().out
    assert "its adapter:  not kept (tracking.save_adapters=none)" in out
    assert "compare in MLflow: http://***@host:5000\n" in out
    terminal.show(study, "./outputs", answer.answer(study), TrackSpec(uri="sqlite:///a.db"))
    out = capsys.readouterr().out
    assert "compare in MLflow: python -m lorasweep ui tracking.uri=sqlite:///a.db\n" in out and "0/adapter" in out


@pytest.mark.parametrize(("value", "told"), [(0.3, True), (0.3025, False)])
def test_metric_no_better_than_a_trivial_answer_is_told(tmp_path, value, told):
    study = study_of(tmp_path, [2])
    end(study, value, baseline=0.3, test=0.35)
    text = wording.text(answer.answer(study))
    assert "To compare with: majority accuracy 0.3000 on eval, 0.3000 on test." in text
    assert ("It is no better than the trivial answer (majority accuracy 0.3000)" in text) is told


def test_best_yaml_is_a_sweep_file_of_the_winner(tmp_path):
    study = study_of(tmp_path, [2, 4])
    end(study, 0.5)
    end(study, 0.9)
    path = answer.write_best(study, answer.answer(study), "so")
    assert path == study.folder / "best.yaml"
    assert yaml.safe_load(path.read_text())["overrides"] == ["train.epochs=1", "lora.r=4"]
    file = sweep_file.sweep_file(str(path))
    assert compose.compose_trial(file.overrides).lora.r == 4


def test_study_leaves_predictions_and_a_best_yaml_that_runs(tiny_bert, tmp_path, capsys):
    model = [f"model.pretrained={tiny_bert}"]
    assert main.main(["-m", "lora.r=2,4", *model, *SMALL, "tracking=none", f"outputs={tmp_path}", "study=s"]) == 0
    study = Study.open(tmp_path / "s")
    for trial in study.trials():
        found = example_scores.read(study.trial_folder(trial.number))
        assert found is not None and len(found) == 32
        assert float(np.mean(found.first)) == pytest.approx(trial.values[0])
    best = study.best()
    capsys.readouterr()
    assert main.main(["--sweep", str(tmp_path / "s" / "best.yaml"), f"outputs={tmp_path}", "study=again"]) == 0
    again = Study.open(tmp_path / "again").best()
    assert best is not None and again is not None and again.values == best.values


def test_study_ends_when_the_trials_that_wait_would_not_change_the_answer(tmp_path):
    study = study_of(tmp_path, [2] * 14, stop="when_settled")
    for i in range(8):
        end(study, 0.800 + 0.0005 * (i % 3))
    assert study.claim() is None
    assert study.settled().startswith("search.stop=when_settled: 6 more trials like the 8 finished ones are expected")
    wide = study_of(tmp_path, [2] * 14, stop="when_settled")
    for i in range(10):
        end(wide, 0.5 + 0.03 * i)
    assert wide.spent() == "" and wide.claim() is not None


def test_study_does_not_end_while_values_wait_that_no_trial_had(tmp_path):
    """The first half of a grid says nothing about a learning rate, or a rank beyond its own, that comes after it."""
    study = study_of(tmp_path, [2, 4] * 4 + [16] * 4, stop="when_settled")
    for i in range(8):
        end(study, 0.800 + 0.0005 * (i % 3))
    assert study.settled() == "" and study.claim() is not None
    between = study_of(tmp_path, [2, 8] * 4 + [4] * 4, stop="when_settled")
    for i in range(8):
        end(between, 0.800 + 0.0005 * (i % 3))
    assert between.settled() and between.claim() is None


def test_rows_of_one_group_count_as_one_in_the_answer(tiny_bert, tmp_path, capsys):
    rows = [f"word{i} text number {i},{'ab'[i % 2]},{i // 4}" for i in range(400)]
    (tmp_path / "t.csv").write_text("\n".join(["text,label,customer", *rows]))
    table = [f"data.path={tmp_path}/t.csv", "data.group_column=customer", "data.eval_fraction=0.3"]
    keys = [f"model.pretrained={tiny_bert}", *SMALL[:3], "tracking=none", f"outputs={tmp_path}", "study=s"]
    assert main.main(["-m", "lora.r=2,4", *table, *keys]) == 0
    study = Study.open(tmp_path / "s")
    found = answer.answer(study)
    assert found.groups is not None and found.rows == 4 * found.groups  # a customer's four rows in one split
    assert f"{found.rows} eval examples in {found.groups} groups" in capsys.readouterr().out


def test_choice_among_evaluations_is_counted_as_that_among_trials(tmp_path):
    """Twelve evaluations without a difference: each is right on other rows, and the best of them is luck."""
    study, rng = study_of(tmp_path, [2, 4]), np.random.default_rng(1)
    for _ in range(2):
        right = [rng.random(ROWS) < 0.7 for _ in range(6)]
        end(study, max(float(one.mean()) for one in right), evaluations=right)
    found = answer.answer(study)
    assert found.best is not None and found.corrected is not None and found.evaluations == 12
    assert found.corrected == pytest.approx(0.7, abs=0.015) and found.best.value > found.corrected + 0.01
    assert "chosen as the highest of 12 evaluations of 2 trials on these rows" in wording.text(found)


def test_single_trial_is_the_best_of_its_evaluations(tmp_path):
    study, rng = study_of(tmp_path, [2]), np.random.default_rng(2)
    right = [rng.random(ROWS) < 0.7 for _ in range(8)]
    end(study, max(float(one.mean()) for one in right), evaluations=right)
    found = answer.answer(study)
    assert found.best is not None and found.corrected is not None and found.corrected < found.best.value
    assert "It is the highest of 8 evaluations on these rows; without that choice expect" in wording.text(found)
