"""One definition a metric: value, interval and comparison of the same predictions, against others' definitions."""

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import f1_score as seqeval_f1
from seqeval.metrics import precision_score as seqeval_precision
from seqeval.metrics import recall_score as seqeval_recall
from seqeval.scheme import IOB2
from sklearn import metrics as sklearn

from lorasweep.config.spec import TaskSpec
from lorasweep.study import example_scores, significance
from lorasweep.tasks import make, metric
from lorasweep.tasks.metric import COMBINATIONS, Metric, by_row, ratio
from lorasweep.tasks.task import Prediction, Task

ROWS = 60

Case = tuple[Task, list[Prediction], list[Prediction], dict[str, float]]
"""A task, the predictions of two trials, and the first one's metrics by another library or by hand."""


def task_of(name: str, **settings: object) -> Task:
    return make(TaskSpec(name=name, **settings))


def two(make_one: Callable[[random.Random], list[Prediction]]) -> tuple[list[Prediction], list[Prediction]]:
    return make_one(random.Random(0)), make_one(random.Random(1))


def losses(predictions: list[Prediction]) -> dict[str, float]:
    return {"loss": sum(p["loss"] for p in predictions) / sum(p["supervised"] for p in predictions)}


def columns(predictions: list[Prediction]) -> tuple[list, list]:
    return [p["label"] for p in predictions], [p["prediction"] for p in predictions]


def single_label() -> Case:
    task = task_of("SEQ_CLS", problem_type="single_label")
    task.classes = list("abcde")
    labels = [random.Random(9 + i).randrange(4) for i in range(ROWS)]  # e is in train alone, and predicted

    def one(draw: random.Random) -> list[Prediction]:
        return [
            {
                "row": i,
                "loss": draw.random(),
                "supervised": 1,
                "label": v,
                "prediction": v if draw.random() < 0.6 else draw.randrange(5),
            }
            for i, v in enumerate(labels)
        ]

    first, second = two(one)
    true, predicted = columns(first)
    return (
        task,
        first,
        second,
        losses(first)
        | {
            "accuracy": sklearn.accuracy_score(true, predicted),
            "macro_f1": sklearn.f1_score(true, predicted, average="macro"),
            "mcc": sklearn.matthews_corrcoef(true, predicted),
        },
    )


def multi_label() -> Case:
    """Class d is in train, in no row of eval, and never predicted."""
    task = task_of("SEQ_CLS", problem_type="multi_label")
    task.classes = list("abcd")
    labels = [[float(random.Random(i).random() < 0.4), float(i % 3 == 0), float(i % 2), 0.0] for i in range(ROWS)]

    def one(draw: random.Random) -> list[Prediction]:
        return [
            {
                "row": i,
                "loss": draw.random(),
                "supervised": 1,
                "label": v,
                "prediction": [int(x if draw.random() < 0.9 else 1 - x) for x in v[:3]] + [0],
            }
            for i, v in enumerate(labels)
        ]

    first, second = two(one)
    true, predicted = map(np.array, columns(first))
    return (
        task,
        first,
        second,
        losses(first)
        | {
            "micro_f1": sklearn.f1_score(true, predicted, average="micro"),
            "macro_f1": sklearn.f1_score(true, predicted, average="macro", zero_division=0),
            "subset_accuracy": sklearn.accuracy_score(true, predicted),
        },
    )


def regression() -> Case:
    task = task_of("SEQ_CLS", problem_type="regression")
    labels = [round(random.Random(i).uniform(0, 5)) for i in range(ROWS)]  # rounded: some are equal

    def one(draw: random.Random) -> list[Prediction]:
        return [
            {"row": i, "loss": draw.random(), "supervised": 1, "label": float(v), "prediction": v + draw.gauss(0, 1)}
            for i, v in enumerate(labels)
        ]

    first, second = two(one)
    true, predicted = columns(first)
    return (
        task,
        first,
        second,
        losses(first)
        | {
            "pearson": pearsonr(true, predicted)[0],
            "spearman": spearmanr(true, predicted)[0],
            "mse": sklearn.mean_squared_error(true, predicted),
        },
    )


def tagged(classes: list[str]) -> tuple[Task, list[Prediction], list[Prediction]]:
    task = task_of("TOKEN_CLS")
    task.classes = classes
    true = [[random.Random(100 * i + j).choice(classes) for j in range(1 + i % 7)] for i in range(ROWS)]

    def one(draw: random.Random) -> list[Prediction]:
        return [
            {
                "row": i,
                "loss": draw.random() * len(tags),
                "supervised": len(tags),
                "label": tags,
                "prediction": [t if draw.random() < 0.7 else draw.choice(classes) for t in tags],
            }
            for i, tags in enumerate(true)
        ]

    return task, *two(one)


def flat(rows: list[list[str]]) -> list[str]:
    return [tag for row in rows for tag in row]


def entities() -> Case:
    task, first, second = tagged(["O", "B-x", "I-x", "B-y"])
    task.scheme = "IOB2"
    true, predicted = columns(first)
    strict = {"mode": "strict", "scheme": IOB2}
    return (
        task,
        first,
        second,
        losses(first)
        | {
            "f1": seqeval_f1(true, predicted, **strict),
            "precision": seqeval_precision(true, predicted, **strict),
            "recall": seqeval_recall(true, predicted, **strict),
            "accuracy": sklearn.accuracy_score(flat(true), flat(predicted)),
        },
    )


def words() -> Case:
    task, first, second = tagged(["NOUN", "VERB", "ADJ"])
    true, predicted = map(flat, columns(first))
    macro = {"average": "macro", "zero_division": 0}
    return (
        task,
        first,
        second,
        losses(first)
        | {
            "accuracy": sklearn.accuracy_score(true, predicted),
            "macro_f1": sklearn.f1_score(true, predicted, **macro),
            "macro_precision": sklearn.precision_score(true, predicted, **macro),
            "macro_recall": sklearn.recall_score(true, predicted, **macro),
        },
    )


def question_ans() -> Case:
    """Every other row has two windows, of which the better one answers."""
    task = task_of("QUESTION_ANS")

    def one(draw: random.Random) -> list[Prediction]:
        rows = []
        for i in range(ROWS):
            right = draw.random() < 0.5
            known = {"row": i, "supervised": 1, "answers": ("the big dog",), "by_character": False, "null_score": -9.0}
            rows.append(known | {"loss": 1.0, "score": 2.0, "prediction": "big dog" if right else "big cat"})
            if i % 2:
                rows.append(known | {"loss": 3.0, "score": 1.0, "prediction": "nothing"})
        return rows

    first, second = two(one)
    shares = [p["prediction"] == "big dog" for p in first if p["prediction"] != "nothing"]
    right = sum(shares) / ROWS
    return task, first, second, losses(first) | {"exact_match": right, "f1": right + (1 - right) / 2}


def causal_lm() -> Case:
    """A third of the rows has no generated answer."""
    task = task_of("CAUSAL_LM", generate=True)

    def one(draw: random.Random) -> list[Prediction]:
        return [
            {"row": i, "loss": draw.random() * 5, "supervised": 5, "correct": draw.randrange(6), "text_bytes": 9}
            | ({"text": "x", "right": draw.random() < 0.5} if i % 3 else {})
            for i in range(ROWS)
        ]

    first, second = two(one)
    rights = [p["right"] for p in first if "text" in p]
    return (
        task,
        first,
        second,
        losses(first)
        | {
            "perplexity": math.exp(losses(first)["loss"]),
            "token_accuracy": sum(p["correct"] for p in first) / (5 * ROWS),
            "bits_per_byte": sum(p["loss"] for p in first) / math.log(2) / (9 * ROWS),
            "exact_match": sum(rights) / len(rights),
        },
    )


def seq_2_seq_lm() -> Case:
    from torchmetrics.functional.text import chrf_score, sacre_bleu_score

    task = task_of("SEQ_2_SEQ_LM", generate=True)
    texts = ["the cat sat on the mat today", "a dog runs in the park", "nothing is right here", "a b c d e f"]
    references = [
        ["the cat sat on the mat"],
        ["a dog ran in the park", "the dog runs now"],
        ["other words"],
        ["a b c d"],
    ]

    def one(draw: random.Random) -> list[Prediction]:
        rows = []
        for i in range(ROWS):
            known = {
                "row": i,
                "loss": draw.random() * 4,
                "supervised": 4,
                "correct": draw.randrange(5),
                "text_bytes": 7,
            }
            rows.append(known | {"text": texts[draw.randrange(4)], "references": references[i % 4]})
        return rows

    first, second = two(one)
    written, refs = [p["text"] for p in first], [p["references"] for p in first]
    by_hand = sum(longest_common(t.split(), [r.split() for r in rs]) for t, rs in zip(written, refs, strict=True))
    return (
        task,
        first,
        second,
        losses(first)
        | {
            "perplexity": math.exp(losses(first)["loss"]),
            "token_accuracy": sum(p["correct"] for p in first) / (4 * ROWS),
            "bits_per_byte": sum(p["loss"] for p in first) / math.log(2) / (7 * ROWS),
            "rouge_l": by_hand / ROWS,
            "bleu": float(sacre_bleu_score(written, refs, tokenize="13a")),
            "chrf": float(chrf_score(written, refs, n_word_order=0)),
        },
    )


def longest_common(text: list[str], references: list[list[str]]) -> float:
    """Return the F of the longest common subsequence, of the best reference."""
    best = 0.0
    for reference in references:
        table = np.zeros((len(text) + 1, len(reference) + 1))
        for i, a in enumerate(text):
            for j, b in enumerate(reference):
                table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
        best = max(best, 2 * table[-1, -1] / (len(text) + len(reference)))
    return best


def search() -> Case:
    task = task_of("FEATURE_EXTRACTION")

    def one(draw: random.Random) -> list[Prediction]:
        drawn = torch.randn(2, ROWS, 3, generator=torch.Generator().manual_seed(draw.randrange(99)))
        vectors = torch.nn.functional.normalize(torch.stack([drawn[0], drawn[0] + 2 * drawn[1]]), dim=-1)
        return [
            {"row": i, "loss": 1.0, "supervised": 1, "vectors": list(vectors[:, i]), "info": ((i,), (i + 99,))}
            for i in range(ROWS)
        ]

    first, second = two(one)
    anchors, positives = (torch.stack([p["vectors"][k] for p in first]) for k in (0, 1))
    cosines = anchors @ positives.T
    ranks = (cosines >= cosines.diagonal()[:, None]).sum(1).double()
    return (
        task,
        first,
        second,
        {
            "recall_at_1": float((ranks <= 1).double().mean()),
            "recall_at_10": float((ranks <= 10).double().mean()),
            "mrr": float((1 / ranks).mean()),
            "loss": float(torch.nn.functional.cross_entropy(cosines / task.spec.temperature, torch.arange(ROWS))),
        },
    )


def pairs() -> Case:
    task = task_of("FEATURE_EXTRACTION")
    task.scored = True
    scores = [round(random.Random(i).random(), 1) for i in range(ROWS)]

    def one(draw: random.Random) -> list[Prediction]:
        return [
            {"row": i, "loss": draw.random(), "supervised": 1, "cosine": s + draw.gauss(0, 0.3), "score": s}
            for i, s in enumerate(scores)
        ]

    first, second = two(one)
    cosines = [p["cosine"] for p in first]
    expected = {"spearman": spearmanr(cosines, scores)[0], "pearson": pearsonr(cosines, scores)[0]}
    return task, first, second, losses(first) | expected


CASES = (
    single_label,
    multi_label,
    regression,
    entities,
    words,
    question_ans,
    causal_lm,
    seq_2_seq_lm,
    search,
    pairs,
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_value_interval_and_comparison_of_a_metric_are_one_definition(case, tmp_path, monkeypatch):
    task, first, second, expected = case()
    monkeypatch.setattr(task, "readable", lambda record, p: "an answer")
    assert task.metrics(first) == pytest.approx(expected, rel=2e-5, abs=1e-7)
    for folder, predictions in (("a", first), ("b", second)):
        (tmp_path / folder).mkdir()
        for name in task.metric_names:
            (tmp_path / folder / name).mkdir()
            example_scores.write(tmp_path / folder / name, task, name, predictions, [{}] * ROWS)
    for name, value in expected.items():
        ours, theirs = (example_scores.read(tmp_path / folder / name) for folder in ("a", "b"))
        assert ours is not None and theirs is not None, name
        assert (ours.value, ours.bounds) == (pytest.approx(value, rel=2e-5), task.metric(name).bounds)
        assert significance.interval(ours).holds(value), name
        gap = task.metrics(first)[name] - task.metrics(second)[name]
        assert ours.value - theirs.value == pytest.approx(gap, abs=1e-9), name
        low, high = np.nanpercentile(significance.replicates(ours) - significance.replicates(theirs), [2.5, 97.5])
        assert low <= gap <= high, name


def test_rare_class_of_several_labels_does_not_lift_the_interval():
    """Value 0.65 and an interval of 0.83 to 0.90 was what a class left out of the resamples made of it."""
    task, first, _, expected = multi_label()
    interval = significance.interval(task.metric("macro_f1").parts(first))
    assert interval.low < expected["macro_f1"] < interval.high < 0.75


@pytest.mark.parametrize("name", ["f1", "precision", "recall"])
def test_entity_score_without_an_entity_has_no_value(name):
    task, _, _ = tagged(["O", "B-x"])
    task.scheme = "IOB2"
    nothing = {"row": 0, "loss": 1.0, "supervised": 2, "label": ["O", "O"], "prediction": ["O", "B-x"]}
    assert math.isnan(task.metrics([nothing])[name])
    some = {"row": 1, "loss": 1.0, "supervised": 1, "label": ["B-x"], "prediction": ["O"]}
    assert task.metrics([nothing | {"prediction": ["O", "O"]}, some])[name] == 0


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlation_of_equal_numbers_has_no_value(name):
    task = task_of("SEQ_CLS", problem_type="regression")
    found = [{"row": i, "loss": 1.0, "supervised": 1, "label": 0.1, "prediction": float(i)} for i in range(7)]
    assert math.isnan(task.metrics(found)[name])


def test_metric_of_no_row_has_no_value():
    assert math.isnan(metric.LOSS.value([]))


def test_metric_needs_a_registered_combination():
    def other(weights_RN, first, second):
        return weights_RN.sum(1)

    with pytest.raises(TypeError, match="other must be decorated with @combination"):
        Metric("other", by_row(lambda p: (1, 1)), other)
    assert COMBINATIONS["ratio"] is ratio


def test_name_of_a_combination_is_nobody_elses():
    def ratio(weights_RN, first, second):
        return weights_RN.sum(1)

    with pytest.raises(ValueError, match=r"lorasweep\.tasks\.metric has a combination of this name"):
        metric.combination(ratio)


def test_mcc_of_rows_that_weigh_less_than_one_is_that_of_scikit_learn():
    predicted, true, weights = [0, 0, 1, 1, 3], [0, 1, 1, 0, 0], np.array([0.1, 0.05, 0.07, 0.02, 0.09])
    expected = sklearn.matthews_corrcoef(true, predicted, sample_weight=weights)
    assert metric.mcc(weights[None], predicted, true)[0] == pytest.approx(expected)
