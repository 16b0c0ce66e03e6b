"""How sure a metric is: against formulas, against the tasks' own metrics, and for two trials on the same examples."""

import numpy as np
import pytest
import scipy.stats
import torch
from support.populations import POPULATIONS

from lorasweep.config.spec import TaskSpec
from lorasweep.study import example_scores, significance
from lorasweep.tasks import make
from lorasweep.tasks import metric as metrics
from lorasweep.tasks.metric import Parts

RNG = np.random.default_rng(0)


def hits(count: int, right: int) -> Parts:
    marks = np.zeros(count)
    marks[:right] = 1
    return Parts("accuracy", "ratio", np.arange(count), marks, np.ones(count))


def unbounded(metric: str, values: np.ndarray) -> Parts:
    ones = np.ones(len(values))
    return Parts(metric, "ratio", np.arange(len(values)), values, ones, (0.0, float("inf")))


@pytest.mark.parametrize(("count", "right"), [(100, 80), (1000, 500), (400, 20)])
def test_standard_error_of_a_share_is_the_binomial_one(count, right):
    share = right / count
    found = hits(count, right)
    expected = (share * (1 - share) / count) ** 0.5
    assert significance.standard_error(found) == pytest.approx(expected, rel=0.08)
    interval = significance.interval(found)
    assert interval.low == pytest.approx(share - 1.96 * expected, abs=0.5 * expected)
    assert interval.high == pytest.approx(share + 1.96 * expected, abs=0.5 * expected)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for _ in range(200):
        drawn = RNG.normal(1.0, 2.0, size=100)
        covered += significance.interval(unbounded("mse", drawn)).holds(1.0)
    assert 0.90 <= covered / 200 <= 0.99


def with_seeds(*runs):
    return [dict(enumerate(values)) for values in runs]


def test_error_over_seeds_is_pooled_and_its_interval_students():
    spread = significance.spread(with_seeds([1.0, 2.0, 3.0], [7.0]))
    assert spread is not None and (spread.error, spread.free) == (1.0, 2) and spread.of_mean(4) == 0.5
    error, found = significance.sure([], [1.0, 2.0, 3.0], spread)
    assert error == pytest.approx(3**-0.5)
    assert (found.low, found.high) == (pytest.approx(2 - 4.3027 / 3**0.5, abs=1e-3), pytest.approx(4.4841, abs=1e-3))
    assert significance.spread(with_seeds([0.8], [0.5])) is None
    assert significance.spread(with_seeds([0.8, 0.8], [0.5])) is None  # that two runs were equal says little


def test_what_a_seed_does_to_all_alike_is_seen_once_a_seed():
    seeds = [0.01, -0.02, 0.015, -0.005]
    alike = significance.spread(with_seeds(*[[0.8 - 0.1 * k + s for s in seeds] for k in range(3)]))
    assert alike.free == pytest.approx(3) and alike.error == pytest.approx(np.std(seeds, ddof=1))
    each_by_itself = [{4 * k + s: 0.8 + seeds[s] for s in range(4)} for k in range(3)]
    assert significance.spread(each_by_itself).free == 9


def test_variances_of_examples_and_of_seeds_add_up():
    spread = significance.spread(with_seeds([0.5, 0.52, 0.48]))
    error, found = significance.sure([hits(400, 200)], [0.5], spread)
    assert error == pytest.approx((0.5 * 0.5 / 400 + 0.02**2) ** 0.5, rel=0.08)
    assert found.holds(0.5 - 1.9 * error)
    assert significance.sure([], [0.5], None) == (None, None)


def test_interval_of_a_share_is_wilsons():
    found = significance.interval(hits(400, 396))
    low, high = scipy.stats.binomtest(396, 400).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((low, high))


def test_metric_without_the_choice_of_one_trial_is_its_own():
    assert significance.without_choice([hits(400, 300)], True) == pytest.approx(0.75, abs=0.005)


# --- each metric is the task's own -----------------------------------------------------------------------------------


def seq_cls(kind: str):
    task = make(TaskSpec(name="SEQ_CLS", problem_type=kind))
    task.kind, task.classes = kind, ["a", "b", "c", "never"]
    labels = {
        "single_label": RNG.integers(0, 3, (60, 2)).tolist(),
        "multi_label": RNG.integers(0, 2, (60, 2, 4)).tolist(),
        "regression": RNG.normal(size=(60, 2)).tolist(),
    }[kind]
    return task, [
        {"row": i, "loss": 0.1 * i, "supervised": 1, "prediction": p, "label": t} for i, (p, t) in enumerate(labels)
    ]


def token_cls(tags: list[str]):
    task = make(TaskSpec(name="TOKEN_CLS"))
    task.classes = tags
    rows = [(RNG.choice(tags, 6).tolist(), RNG.choice(tags, 6).tolist()) for _ in range(40)]
    return task, [
        {"row": i, "loss": 0.1 * i, "supervised": 6, "prediction": p, "label": t} for i, (p, t) in enumerate(rows)
    ]


def question_ans():
    task = make(TaskSpec(name="QUESTION_ANS"))
    texts = [("the red cat", "red cat"), ("blue", "blue dog"), ("", "green"), ("dog", "dog")] * 3
    known = {"supervised": 1, "score": 1.0, "null": 0.0, "by_character": False}
    return task, [
        {"row": i // 2, "loss": 0.3, "prediction": p, "answers": (t,), **known} | {"score": float(i)}
        for i, (p, t) in enumerate(texts)
    ]


def causal_lm():
    counts = [(3.0, 5, 2), (8.0, 4, 1), (0.5, 9, 9), (2.5, 2, 1)]
    return make(TaskSpec(name="CAUSAL_LM", generate=True)), [
        {"row": i, "loss": loss, "supervised": n, "correct": right, "text_bytes": 3 * n + i}
        | ({"text": "x", "right": i < 2} if i < 3 else {})
        for i, (loss, n, right) in enumerate(counts)
    ]


def feature_extraction():
    task = make(TaskSpec(name="FEATURE_EXTRACTION"))
    drawn = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    vectors = torch.nn.functional.normalize(torch.stack([drawn[0], drawn[0] + 2 * drawn[1]]), dim=-1)
    return task, [
        {"row": i, "loss": 1.0, "supervised": 1, "vectors": [vectors[0, i], vectors[1, i]], "info": ((i,), (i + 99,))}
        for i in range(30)
    ]


def pairs():
    task = make(TaskSpec(name="FEATURE_EXTRACTION"))
    task.scored = True
    drawn = RNG.normal(size=(40, 2)).round(1).tolist()  # rounded: some are equal
    return task, [
        {"row": i, "loss": (a - b) ** 2, "supervised": 1, "cosine": a, "score": b} for i, (a, b) in enumerate(drawn)
    ]


def written():
    task = make(TaskSpec(name="SEQ_2_SEQ_LM", generate=True))
    texts = [
        ("the cat sat on the mat today", ["the cat sat on the mat"]),
        ("a dog runs in the park", ["a dog ran in the park", "the dog runs in a park now"]),
        ("nothing is right here at all", ["completely different words stand in this one"]),
        ("我 们 去 公园", ["我们去公园玩"]),
        ("", ["something"]),
    ] * 4
    return task, [
        {"row": i, "loss": 2.0 + i, "supervised": 3, "correct": 1, "text_bytes": 9, "text": t, "references": r}
        for i, (t, r) in enumerate(texts)
    ]


CASES = {
    "written": written,
    **{k: (lambda k=k: seq_cls(k)) for k in ("single_label", "multi_label", "regression")},
    "bio": lambda: token_cls(["O", "B-x", "I-x", "B-y"]),
    "words": lambda: token_cls(["N", "V", "ADJ"]),
    "question_ans": question_ans,
    "causal_lm": causal_lm,
    "feature_extraction": feature_extraction,
    "pairs": pairs,
}


@pytest.mark.parametrize("case", CASES)
def test_metric_from_the_parts_is_the_tasks_own(case, tmp_path, monkeypatch):
    task, predictions = CASES[case]()
    monkeypatch.setattr(task, "readable", lambda record, p: "an answer")
    own = task.metrics(predictions)
    for metric, value in own.items():
        example_scores.write(tmp_path, task, metric, predictions, [{}] * len(predictions))
        found = example_scores.read(tmp_path)
        assert found is not None, metric
        assert found.value == pytest.approx(value, abs=1e-5), metric
        assert 0 < significance.standard_error(found) < 100, metric


def test_resampled_metric_is_the_tasks_own_on_that_resample():
    task, predictions = seq_cls("single_label")
    for metric in ("accuracy", "macro_f1", "mcc"):
        assert_resampled(task, metric, predictions)
    task, predictions = written()
    for metric in ("bleu", "chrf"):
        assert_resampled(task, metric, predictions)


def assert_resampled(task, metric, predictions):
    found = task.metric(metric).parts(predictions)
    weights = significance._weights(len(predictions))[5].astype(int)
    at = np.repeat(np.arange(len(predictions)), weights)
    again = [predictions[i] | {"row": row} for row, i in enumerate(at)]
    assert significance.replicates(found)[5] == pytest.approx(task.metrics(again)[metric], abs=1e-5), metric


def grouped(rng, groups: int, each: int, correlated: float) -> Parts:
    """Return right or wrong answers of examples of which those of a group are alike."""
    of_group_G, own_N = rng.standard_normal(groups), rng.standard_normal(groups * each)
    latent_N = np.sqrt(correlated) * of_group_G.repeat(each) + np.sqrt(1 - correlated) * own_N
    right_N = (latent_N < scipy.stats.norm.ppf(0.8)).astype(float)
    rows = np.arange(len(right_N))
    return Parts("accuracy", "ratio", rows, right_N, np.ones(len(rows)), groups=(rows // each).astype(str))


def test_examples_of_one_answer_a_group_count_as_one():
    found = grouped(np.random.default_rng(0), 100, 8, 1.0)
    share = found.value
    assert significance.units(found) == 100
    assert significance.standard_error(found) == pytest.approx((share * (1 - share) / 100) ** 0.5, rel=0.1)


@pytest.mark.parametrize(("groups", "each"), [(50, 8), (40, 5)])
def test_interval_holds_the_truth_where_examples_belong_together(groups, each):
    rng, draws = np.random.default_rng(groups), 300
    drawn = [grouped(rng, groups, each, 0.5) for _ in range(draws)]
    held = sum(significance.interval(found).holds(0.8) for found in drawn)
    alone = sum(significance.interval(Parts(f.metric, f.kind, f.rows, f.first, f.second)).holds(0.8) for f in drawn)
    assert 0.90 <= held / draws <= 0.98
    assert alone / draws < 0.87  # as if each example stood alone


def test_predictions_keep_which_rows_belong_together(tmp_path, monkeypatch):
    task, predictions = seq_cls("single_label")
    monkeypatch.setattr(task, "readable", lambda record, p: "an answer")
    records = [{"text": f"text {i}", "group": i // 3} for i in range(len(predictions))]
    example_scores.write(tmp_path, task, "accuracy", predictions, records)
    found = example_scores.read(tmp_path)
    assert significance.units(found) == 20 and len(found) == 60
    example_scores.write(
        tmp_path, task, "accuracy", predictions, [{"text": str(i)} for i in range(60)], "other.parquet"
    )
    assert example_scores.read(tmp_path, "other.parquet").groups is None


def test_trial_without_predictions_has_no_scores(tmp_path):
    assert example_scores.read(tmp_path) is None


@pytest.mark.parametrize("right", [0, 20])
def test_all_right_or_all_wrong_is_not_certain(right):
    found = hits(20, right)
    interval = significance.interval(found, found)
    far = 20 / (20 + 1.959964**2)  # Wilson's: 0.84 for 20 of 20
    assert (interval.low, interval.high) == pytest.approx((far, 1.0) if right else (0.0, 1 - far))
    assert significance.standard_error(found) == pytest.approx((22 / 24 * 2 / 24 / 24) ** 0.5)


@pytest.mark.parametrize("kind", ["ratio", "found_f1", "macro_f1", "label_macro_f1", "mcc"])
def test_perfect_metric_of_any_kind_or_of_groups_is_not_certain(kind):
    cells = {"ratio": (np.ones(24), np.ones(24)), "found_f1": (np.full(24, 2.0), [[2.0, 2.0]] * 24)}
    cells |= dict.fromkeys(("macro_f1", "mcc"), (np.arange(24) % 4, np.arange(24) % 4))
    first, second = cells.get(kind, ([[1, 0], [0, 1]] * 12, [[1, 0], [0, 1]] * 12))
    bounds = (-1.0, 1.0) if kind == "mcc" else (0.0, 1.0)
    found = Parts(kind, kind, np.arange(24), first, second, bounds, groups=np.arange(24) // 2)
    assert found.value == 1.0
    low = 1 - (bounds[1] - bounds[0]) * (1 - 12 / (12 + 1.959964**2))  # Wilson's, for 12 of 12
    interval = significance.interval(found, found)
    assert (interval.low, interval.high) == pytest.approx((low, 1.0))
    assert significance.standard_error(found) > 0


@pytest.mark.parametrize("kind", ["macro_f1", "macro_recall", "macro_precision", "label_macro_f1"])
def test_error_of_a_macro_average_counts_the_examples_of_each_class(kind):
    rng = np.random.default_rng(0)
    true_N, right_N = np.arange(48) // 3, rng.random(48) < 0.7
    answer_N = np.where(right_N, true_N, (true_N + 1) % 16)
    cells = [
        np.eye(16)[side_N].tolist() if kind.startswith("label") else side_N.tolist() for side_N in (answer_N, true_N)
    ]
    found = Parts(kind, kind, np.arange(48), *cells)
    between = np.std(significance.replicates(found), ddof=1)
    assert significance.standard_error(found) > 1.1 * between  # of three examples, two are free


def test_losses_are_no_shares():
    gone = unbounded("loss", np.zeros(5))
    assert (significance.interval(gone), significance.standard_error(gone)) == (significance.Interval(0.0, 0.0), 0.0)


# --- many trials at once ---------------------------------------------------------------------------------------------


def drawn(kind, rng, groups_N):
    count = len(groups_N) if groups_N is not None else 90
    first, second = rng.lognormal(3, 1, count), rng.integers(1, 90, count).astype(float)
    if kind == "macro_f1":
        first, second = ([[int(c)] for c in rng.integers(0, 4, count)] for _ in range(2))
    if kind in ("spearman", "pearson"):
        first, second = np.round(first), np.round(first + 20 * rng.standard_normal(count))
    return Parts(kind, kind, np.arange(count), first, second, (0.0, float("inf")), groups_N)


@pytest.mark.parametrize("groups_N", [None, np.arange(90) % 30], ids=["alone", "grouped"])
@pytest.mark.parametrize("kind", ["ratio", "exp_ratio", "macro_f1", "spearman", "pearson"])
def test_trials_resampled_together_have_the_numbers_of_each_resample_alone(kind, groups_N, monkeypatch):
    monkeypatch.setattr(metrics, "MOST_NUMBERS", 7 * 90)
    trials = [drawn(kind, np.random.default_rng(k), groups_N) for k in range(3)]
    significance.resample(trials)
    unit_N = np.arange(90) if groups_N is None else groups_N
    resamples_RN = significance._weights(unit_N.max() + 1)[::50, unit_N].astype(float)
    for found in trials:
        alone_R = [found.combined(weights_N[None])[0] for weights_N in resamples_RN]
        np.testing.assert_allclose(significance.replicates(found)[::50], alone_R, rtol=1e-12)


def test_ranks_of_a_resample_are_scipys():
    found, rng = drawn("spearman", np.random.default_rng(3), None), np.random.default_rng(4)
    weights_RN = rng.multinomial(90, [1 / 90] * 90, size=5).astype(float)
    for weights_N, value in zip(weights_RN, found.combined(weights_RN), strict=True):
        at = np.repeat(np.arange(90), weights_N.astype(int))
        assert value == pytest.approx(scipy.stats.spearmanr(found.first[at], found.second[at]).statistic)
    level = Parts("spearman", "spearman", found.rows, np.ones(90), found.second)
    assert np.isnan(level.combined(weights_RN)).all()


def test_error_of_a_large_split_is_that_of_its_examples():
    share = 0.8
    found = hits(20_000, int(20_000 * share))
    assert significance.standard_error(found) == pytest.approx((share * (1 - share) / 20_000) ** 0.5, rel=0.05)
    interval = significance.interval(found)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * (0.16 / 20_000) ** 0.5, rel=0.01)


# --- coverage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        ("accuracy 0.99", 400),
        ("accuracy 0.80, 8 a group", 50),
        ("macro F1, 10 classes, the last 3 %", 50),
        ("macro F1, 10 classes, the last 3 %", 100),
        ("loss a token, lengths spread 1.3", 50),
        ("QA F1, 20 questions an article", 50),
        ("QA F1, 20 questions an article", 200),
        ("QA F1, 5 questions a passage", 50),
        ("QA F1, 5 questions a passage", 400),
    ],
)
def test_interval_of_a_metric_holds_the_true_value(name, examples):
    draw, truth = POPULATIONS[name]
    rng, studies = np.random.default_rng(1), 500
    drawn = [draw(rng, examples) for _ in range(studies)]
    significance.resample(drawn)
    held = sum(significance.interval(found).holds(truth) for found in drawn) / studies
    assert 0.92 - 2 * (0.92 * 0.08 / studies) ** 0.5 < held < 0.98 + 2 * (0.98 * 0.02 / studies) ** 0.5
