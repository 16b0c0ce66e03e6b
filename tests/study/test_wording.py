"""The answer's sentences: true for none, one and many, and the same in all places that show them."""

import html
import re

import numpy as np
import pytest
from support.drawn import Drawn, regressions, right_or_wrong
from support.studies import SMALL, SPACE, end, study_of

from lorasweep.cli import main
from lorasweep.report import tables
from lorasweep.study import answer, repeat_rounds, wording
from lorasweep.study.meta import Entry
from lorasweep.study.study import Study
from lorasweep.tracking import outbox

RNG = np.random.default_rng


def one_trial(tmp_path):
    study = study_of(tmp_path, [2])
    end(study, 0.8, test=0.79, baseline=0.3)
    return study


def two_trials(tmp_path):
    study = study_of(tmp_path, [2, 4])
    end(study, 0.8, test=0.79, trainable=50, train_s=60.0, baseline=0.3)
    end(study, 0.79, shift=9, trainable=100, train_s=120.0)
    return study


def asha(tmp_path):
    """Points that differ in a key beside the rank."""
    study = study_of(tmp_path, [])
    lines = [[*SPACE.line({"lora.r": 2}), f"lora.lora_dropout={k / 40}"] for k in range(24)]
    study.queue.enqueue([Entry(line, {"lora.r": 2, "lora.lora_dropout": k / 40}) for k, line in enumerate(lines)])
    for k in range(5):
        end(study, 0.78 + 0.005 * k, shift=3 * k, trainable=100 + k, train_s=600.0, test=0.79 if k == 4 else None)
    for _ in range(18):
        study.queue.tell(study.claim(), "PRUNED", [0.5], {"reason": "asha"})
    study.queue.tell(study.claim(), "FAIL", None, {"reason": "out of memory"})
    return study


def repeated(tmp_path, search=(0.78, 0.79, 0.80, 0.5), **keys):
    study = study_of(tmp_path, [2, 4, 8, 16][: len(search)], **{"repeats": 3, "repeat_top": 3} | keys)
    for k, value in enumerate(search):
        end(study, value, shift=5 * k, trainable=100 + k, test=0.77 if k == 2 else None)
    rng = RNG(0)
    while round_ := repeat_rounds.next_round(study):
        for number in round_:
            origin = study.trial(number).user_attrs["repeat_of"]
            end(study, search[origin] + float(rng.normal(0, 0.004)), shift=5 * origin)
    return study


def two_objectives(tmp_path):
    study = study_of(tmp_path, [2, 4, 8], sampler="nsga2", objectives=["trainable"])
    for value, trainable in ((0.7, 50), (0.8, 100), (0.79, 200)):
        number = end(study, value, trainable=trainable, test=0.8, more=[float(trainable)])
        assert number is not None
    return study


def all_equal(tmp_path):
    study = study_of(tmp_path, [2, 4, 8])
    for k in range(3):
        end(study, 0.8, trainable=100 - k, test=0.8)
    return study


def six_groups(tmp_path):
    study = study_of(tmp_path, [2, 4, 8])
    for k in range(3):
        end(study, 0.8 - 0.05 * k, groups=6, test=0.8)
    return study


def no_test_split(tmp_path):
    study = study_of(tmp_path, [2, 4, 8])
    for k in range(3):
        end(study, 0.8 - 0.05 * k)
    return study


def all_failed_but_one(tmp_path):
    study = study_of(tmp_path, [2, 4, 8, 16])
    end(study, 0.8, test=0.79, train_s=100.0)
    for _ in range(3):
        study.queue.tell(study.claim(), "FAIL", None, {"reason": "out of memory"})
    return study


def failed_repeat(tmp_path):
    study = study_of(tmp_path, [2], repeats=1)
    end(study, 0.8)
    (number,) = repeat_rounds.next_round(study)
    assert study.claim() == number
    study.queue.tell(number, "FAIL", None, {"reason": "out of memory"})
    return study


def drawn_twice(tmp_path):
    """A sampler drew a poor point again, with the same seed: no second seed speaks for it."""
    study = study_of(tmp_path, [2, 4, 2])
    for value in (0.5, 0.8, 0.5):
        end(study, value)
    return study


def none_complete(tmp_path):
    study = study_of(tmp_path, [2, 4])
    study.queue.tell(study.claim(), "FAIL", None, {"reason": "out of memory"})
    study.queue.tell(study.claim(), "PRUNED", [0.1], {"reason": "stopped by hand"})
    return study


NOT_READ = "How good it is on unseen rows is not known: the test split was not read."
SAID = {
    one_trial: (
        "Trial 0 (lora.r=2) is best: test accuracy 0.7900 (95 % 0.7474 to 0.8271), with eval accuracy 0.8000",
        "To compare with: majority accuracy 0.3000 on eval, 0.3000 on test.",
        "It is the only complete one.",
        "search.repeats=3 (the best again with new seeds; at most 3 runs, about 3 seconds).",
    ),
    two_trials: (
        "It was chosen as the highest of 2 on these rows; without that choice expect 0.79",
        "As good as it, for all these data show: trial 1 (lora.r=4), 0.0100 lower (95 % -0.0",
        "These are 2 trained models, one seed each",
        "No other one has fewer trainable parameters.",
        "at most 6 runs, about 9 minutes).",
    ),
    asha: (
        "Trial 4 (lora.r=2, lora.lora_dropout=0.1) is best: test accuracy 0.7900",
        "These are 5 trained models, one seed each",
        "Of 24 trials 18 were pruned, 1 failed; only finished ones are compared.",
        "at most 9 runs, about 1.5 hours).",
    ),
    repeated: (
        "by its first run's adapter, with eval accuracy 0.80",
        "the mean of 2 new seeds",
        "3 configurations with several seeds were compared, by examples and seeds",
        "1 other ran with one seed and is not compared.",
        "What is unsure comes from the 400 eval examples: more seeds would not tell, a larger eval split would.",
    ),
    two_objectives: (
        "Worse: trials 0, 2.",
        "Trials 0, 1 have none that beats them in accuracy and trainable parameters at once.",
    ),
    all_equal: (
        "trial 1 (lora.r=4), no difference; trial 2 (lora.r=8), no difference.",
        "Cheapest that is shown to be within 0.0100 (search.margin): trial 2 (lora.r=8)",
    ),
    six_groups: (
        "With 6 groups of rows that belong together the intervals are too narrow.",
        "It was compared with no other: 400 eval examples in 6 groups are too few.",
        "What is unsure comes from the 400 eval examples in 6 groups",
    ),
    no_test_split: (NOT_READ, "Worse: trials 1, 2."),
    all_failed_but_one: (
        "It is the only complete one.",
        "Of 4 trials 3 failed.",
        "--failed (the failed trials again; at most 3 runs, about 5 minutes).",
    ),
    none_complete: ("No trial was completed (1 was pruned, 1 failed). There is nothing to choose from.",),
    failed_repeat: (
        "1 repeat of the best did not end complete: take it with care, no configuration has ended all its runs.",
    ),
    drawn_twice: ("Trial 1 (lora.r=4) is best", "These are 2 trained models, one seed each"),
}


@pytest.mark.parametrize("case", SAID, ids=lambda case: case.__name__)
def test_sentences_are_true_for_none_one_and_many(case, tmp_path):
    text = wording.text(answer.answer(case(tmp_path)))
    assert [s for s in SAID[case] if s not in text] == [], text


def test_regression_is_said_in_its_own_metric():
    found = Drawn(regressions(RNG(0), [0.5, 0.52, 0.9]), metric="pearson").search_for(3)
    text = wording.text(found)
    assert f"eval pearson {found.best.value:.4f}" in text and "Worse: trial 2." in text and NOT_READ in text
    assert f"A difference under {found.visible:.4f} does not show with 200 eval examples; one of 0.0100" in text


def test_rows_that_would_show_the_margin_are_said():
    found = Drawn(right_or_wrong(RNG(0), [0.8] * 3)).search_for(3)
    need = int(
        re.search(r"one of 0.0100 \(search.margin\) would take about ([\d,]+)\.", wording.text(found))[1].replace(
            ",", ""
        )
    )
    larger = Drawn(right_or_wrong(RNG(0), [0.8] * 3, examples=need)).search_for(3)
    assert larger.visible == pytest.approx(0.01, rel=0.15)


@pytest.mark.parametrize(
    ("curve", "said"), [((0.5, 0.7, 0.8), True), ((0.7, 0.795, 0.8), False), ((0.85, 0.7, 0.8), False)]
)
def test_best_that_had_not_ended_learning_is_said_to_want_more_steps(tmp_path, curve, said):
    study = study_of(tmp_path, [2])
    number = study.claim()
    for step, value in zip((10, 20, 30), curve, strict=True):
        study.queue.report(number, step, value)
    study.queue.tell(number, "COMPLETE", [0.8], {})
    line = "It was still getting better when it ended: eval accuracy 0.7000 at step 20, 0.8000 at step 30."
    assert (line in wording.text(answer.answer(study))) is said


def test_trials_of_many_keys_are_named_by_their_number(tmp_path):
    """Seven values each, six times, would hide the answer."""
    study = study_of(tmp_path, [])
    keys = ("lora.lora_dropout", "lora.lora_alpha", "train.learning_rate")
    study.queue.enqueue([Entry([f"{k}={n + 1}" for k in keys], {k: n + 1 for k in keys}) for n in range(2)])
    end(study, 0.8)
    end(study, 0.79, shift=9)
    text = wording.text(answer.answer(study))
    assert "Trial 0 (lora.lora_dropout=1, lora.lora_alpha=1, train.learning_rate=1) is best" in text
    assert "for all these data show: trial 1, 0.0100 lower" in text


def test_more_names_than_a_sentence_holds_are_counted():
    text = wording.text(Drawn(right_or_wrong(RNG(0), [0.8] * 24)).search_for(24))
    assert "and 17 more." in text and "chosen as the highest of 24 on these rows" in text


def test_auto_says_how_far_it_came(tmp_path):
    met = repeated(tmp_path, repeats="auto")
    found = answer.answer(met)
    assert f"search.repeats=auto: after {found.again} repeats, no other configuration that ran again is better" in (
        wording.text(found)
    )
    alone = repeated(tmp_path, search=(0.8,), repeats="auto")
    found = answer.answer(alone)
    assert found.again >= 2 and f"leave its mean unsure by {found.doubt.at_most:.4f} (95 %)" in wording.text(found)


def test_one_trial_is_said_in_the_words_of_the_answer(tmp_path):
    found = answer.answer(two_trials(tmp_path))
    best, other = wording.of_trial(found, 0), wording.of_trial(found, 1)
    sentences = wording.sentences(found)
    assert best == " ".join([sentences[0], sentences[1]]) and sentences[1].startswith("To compare with")
    assert other.startswith("Trial 1 (lora.r=4) has eval accuracy 0.7900 (95 % interval ")
    assert "The study's best is trial 0 (lora.r=2) with eval accuracy 0.8000" in other
    assert "this one is as good as it, for all these data show: 0.0100 lower (95 % -0.0" in other
    assert "python" not in best + other and wording.of_trial(found, 7) == ""
    again = repeated(tmp_path)
    found = answer.answer(again)
    assert "the mean of 2 new seeds" in wording.of_trial(found, found.best.number)
    assert "the two were not compared" in wording.of_trial(found, 3)


def test_terminal_report_and_mlflow_say_the_same(tiny_bert, tmp_path, capsys):
    keys = [f"model.pretrained={tiny_bert}", *SMALL, f"outputs={tmp_path}", "study=s"]
    assert main.main(["-m", "lora.r=2,4", *keys]) == 0
    said = wording.sentences(answer.answer(Study.open(tmp_path / "s")))
    text = " ".join(said)
    printed = capsys.readouterr().out
    assert "\n".join(said) in printed
    assert tables.plain(text) in (tmp_path / "s" / "report.md").read_text(encoding="utf8")
    page = (tmp_path / "s" / "report.html").read_text(encoding="utf8")
    assert text in html.unescape(re.search(r'<p class="answer">(.*?)</p>', page)[1])
    assert f"**Answer**: {tables.plain(text)}" in outbox.load(tmp_path / "s").tags[outbox.NOTE]
    assert text in (tmp_path / "s" / "best.yaml").read_text(encoding="utf8").splitlines()[0]
    assert "search.repeats=3 (the best again with new seeds; at most 6 runs, about" in text
