"""Champion or challenger: the test split decides, beyond the margin; else the champion stays, and why is said."""

import math
from dataclasses import replace

import numpy as np
import pytest
from support.drawn import right_or_wrong
from support.studies import end, study_of

from lorasweep.serving import champion
from lorasweep.serving.champion import Score, beats
from lorasweep.study.result import read_result, write_result
from lorasweep.tasks.metric import Parts

pytestmark = pytest.mark.usefixtures("few_resamples")


def score(parts: Parts | None, *, value=0.5, rows="rows", **more) -> Score:
    known = {"metric": "accuracy", "maximize": True, "margin": 0.01, "test": parts.value if parts else None} | more
    return Score(value=value, test_rows=rows, **known)


def right(count: int, examples: int = 100, **more) -> Parts:
    return Parts("accuracy", "ratio", np.arange(examples), np.arange(examples) < count, np.ones(examples), **more)


STEADY = {"seed_error": 0.0002, "seed_free": 8}


def replaced(rng, gap: float, examples: int, *, own_sd: float = 0.0, seeds: dict | None = None) -> bool:
    """Return whether a model that is better by `gap` replaces a champion of 0.8, each off by its own seed."""
    draw = right_or_wrong(rng, [0.8 + gap, 0.8], own_sd=own_sd, examples=examples)
    ours, theirs = (draw(k, 0)[1] for k in (0, 1))
    return beats(score(ours, **(seeds or {})), ours, score(theirs), theirs)[0]


@pytest.mark.parametrize(("own_sd", "free"), [(0.0, 0), (0.02, 0), (0.01, 8), (0.02, 8)])
@pytest.mark.parametrize("examples", [400, 2000])
def test_equal_champion_is_replaced_in_under_one_of_twenty(examples, own_sd, free):
    rng, tries = np.random.default_rng(examples), 200
    seeds = {"seed_error": own_sd, "seed_free": free} if free else {}
    assert np.mean([replaced(rng, 0.0, examples, own_sd=own_sd, seeds=seeds) for _ in range(tries)]) < 0.05


def test_champion_that_is_worse_by_the_margin_alone_is_replaced_in_one_of_twenty():
    rng, tries = np.random.default_rng(1), 300
    rate = np.mean([replaced(rng, 0.01, 2000, seeds=STEADY) for _ in range(tries)])
    assert rate == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / tries))


def test_model_that_is_better_by_three_margins_mostly_replaces_the_champion():
    rng = np.random.default_rng(2)
    assert np.mean([replaced(rng, 0.03, 2000, seeds=STEADY) for _ in range(100)]) > 0.7


def test_seeds_make_the_same_lead_less_sure():
    ours, theirs = right(880, 1000), right(840, 1000)
    for seeds in ({"seed_error": 0.02, "seed_free": 6}, {"seed_error": 0.02, "seed_free": 2}):
        better, why = beats(score(ours, **seeds), ours, score(theirs), theirs)
        assert not better and "a seed moves a run by 0.0200)" in why
        assert not beats(score(ours), ours, score(theirs, **seeds), theirs)[0]
    assert beats(score(ours, seed_error=0.001, seed_free=6), ours, score(theirs), theirs)[0]


def test_seeds_that_nobody_ran_are_guessed_and_that_is_said():
    ours, theirs = right(880, 1000), right(840, 1000)
    better, why = beats(score(ours), ours, score(theirs), theirs)
    assert not better and "a seed moves a run by 0.0200, a guess, for no configuration ran with several" in why
    far = right(960, 1000)
    assert beats(score(far), far, score(theirs), theirs)[0]


def test_luck_of_the_best_of_many_is_taken_off():
    ours, theirs, seeds = right(870, 1000), right(840, 1000), {"seed_error": 0.005, "seed_free": 9}
    assert beats(score(ours, **seeds), ours, score(theirs), theirs)[0]
    better, why = beats(score(ours, chosen_among=24, **seeds), ours, score(theirs), theirs)
    assert not better and "0.0097 taken off as the luck of the best of 24" in why
    largest = np.random.default_rng(0).standard_normal((100_000, 24)).max(1)
    found = champion._luck(24)
    assert (found.mean, found.variance) == pytest.approx((largest.mean(), largest.var()), abs=0.01)
    assert champion._luck(1).mean == pytest.approx(0, abs=1e-6)


def test_eval_metrics_decide_nothing():
    ours, theirs = right(500, 1000), right(600, 1000)
    assert not beats(score(ours, value=0.99), ours, score(theirs, value=0.01), theirs)[0]
    assert beats(score(theirs, value=0.01), theirs, score(ours, value=0.99), ours)[0]


def test_loss_is_better_where_it_is_lower():
    def of(nats: float) -> Parts:
        return Parts("loss", "ratio", np.arange(50), nats + 0.1 * np.sin(np.arange(50)), np.ones(50), (0.0, math.inf))

    kind = {"metric": "loss", "maximize": False}
    low, high = of(1.0), of(1.2)
    assert beats(score(low, **kind), low, score(high, **kind), high)[0]
    assert not beats(score(high, **kind), high, score(low, **kind), low)[0]


FEW, MANY = right(20, 20), right(90)


@pytest.mark.parametrize(
    ("ours", "mine", "theirs", "parts", "reason"),
    [
        (score(MANY), MANY, None, None, "the champion has no score of lorasweep's to compare with"),
        (score(MANY), MANY, score(MANY, metric="f1"), MANY, "the champion is judged by f1, this one by accuracy"),
        (score(None), None, score(MANY), MANY, "the test split was not read for this one"),
        (score(MANY), MANY, score(None), None, "the champion's answers on a test split are not there"),
        (score(MANY), MANY, score(MANY), None, "the champion's answers on a test split are not there"),
        (score(MANY), MANY, score(right(0), rows="other"), right(0), "the champion was tested on other rows"),
        (score(MANY, rows=""), MANY, score(right(0), rows=""), right(0), "the champion was tested on other rows"),
        (score(MANY), MANY, score(right(0, 90)), right(0, 90), "tested on other rows of the same test split"),
        (score(FEW), FEW, score(right(0, 20)), right(0, 20), "20 test examples are too few"),
    ],
)
def test_champion_stays_where_the_test_split_says_nothing(ours, mine, theirs, parts, reason):
    better, why = beats(ours, mine, theirs, parts)
    assert (
        not better
        and reason in why
        and why.endswith("the champion stays; set the alias yourself where you know better")
    )


def test_losses_of_unlike_tokenizers_are_not_compared():
    def of(tokens: int) -> Parts:
        return Parts("loss", "ratio", np.arange(50), np.full(50, 60.0), np.full(50, tokens), (0.0, math.inf))

    kind = {"metric": "loss", "maximize": False}
    better, why = beats(score(of(60), **kind), of(60), score(of(20), **kind), of(20))
    assert not better and "the champion's tokenizer cuts the same text into others" in why


def test_score_is_of_the_adapter_that_was_tested(tmp_path):
    study = study_of(tmp_path, [2, 4])
    for value, test in ((0.8, 0.7), (0.9, 0.85)):
        end(study, value, test=test)
    folder = study.trial_folder(1)
    write_result(folder, replace(read_result(folder), test_fingerprint="rows"))
    found = Score.of(study, 1)
    assert (found.value, found.test, found.test_rows, found.margin) == (0.9, 0.85, "rows", 0.01)
    assert found.parts() is not None and Score.from_tags(found.tags()) == found
    assert replace(found, test=0.1).parts() is None, "the folder holds another trial by now"


def test_versions_that_do_not_say_what_is_compared_are_read():
    assert Score.from_tags({"mine": "1"}) is None
    older = {"metric": '"accuracy"', "value": "0.9", "maximize": "true", "standard_error": "0.1", "folders": "[]"}
    found = Score.from_tags({f"{champion.TAG}{k}": v for k, v in older.items()})
    assert found is not None and found.test is None and found.value == 0.9
