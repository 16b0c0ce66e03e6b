"""Metrics of examples drawn from populations whose true value is known: does an interval hold it?"""

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import norm

from lorasweep.tasks.metric import Parts

Draw = Callable[[np.random.Generator, int], Parts]
"""From a number of examples to their part in the metric."""
CLASSES = 10
PRIOR_C = 1 / np.arange(1, CLASSES + 1) / (1 / np.arange(1, CLASSES + 1)).sum()
RIGHT_C = np.linspace(0.9, 0.55, CLASSES)
"""Share of each class that is recognised; a wrong answer is drawn like the classes."""


def _latent(rng: np.random.Generator, count: int, each: int, correlated: float) -> np.ndarray:
    """Return normal numbers, `each` in a row of one group correlated."""
    of_group = rng.standard_normal(math.ceil(count / each)).repeat(each)[:count]
    return math.sqrt(correlated) * of_group + math.sqrt(1 - correlated) * rng.standard_normal(count)


def _groups(count: int, each: int) -> np.ndarray | None:
    return None if each == 1 else np.arange(count) // each


def accuracy(share: float, each: int = 1, correlated: float = 0.0) -> tuple[Draw, float]:
    def draw(rng: np.random.Generator, count: int) -> Parts:
        right_N = (_latent(rng, count, each, correlated) < norm.ppf(share)).astype(float)
        return Parts("accuracy", "ratio", np.arange(count), right_N, np.ones(count), groups=_groups(count, each))

    return draw, share


def answer_f1(each: int = 1, correlated: float = 0.0) -> tuple[Draw, float]:
    """F1 of answers to questions on passages: a third none, nearly half whole."""

    def draw(rng: np.random.Generator, count: int) -> Parts:
        score_N = np.clip((norm.cdf(_latent(rng, count, each, correlated)) - 0.35) / 0.2, 0, 1)
        return Parts("f1", "ratio", np.arange(count), score_N, np.ones(count), groups=_groups(count, each))

    return draw, 0.55


def macro_f1() -> tuple[Draw, float]:
    """Of ten classes, the first ten times as frequent as the last."""

    def draw(rng: np.random.Generator, count: int) -> Parts:
        true_N = rng.choice(CLASSES, count, p=PRIOR_C)
        other_N = rng.choice(CLASSES, count, p=PRIOR_C)
        answer_N = np.where(rng.random(count) < RIGHT_C[true_N], true_N, other_N)
        return Parts("macro_f1", "macro_f1", np.arange(count), answer_N.tolist(), true_N.tolist())

    joint_CC = np.outer(PRIOR_C, PRIOR_C * (1 - RIGHT_C)) + np.diag(PRIOR_C * RIGHT_C)  # answer, true
    return draw, float((2 * np.diag(joint_CC) / (joint_CC.sum(0) + joint_CC.sum(1))).mean())


def entity_f1(a_sentence: float) -> tuple[Draw, float]:
    """So many entities a sentence on average, found with the chance of their sentence, and some that are none."""

    def draw(rng: np.random.Generator, count: int) -> Parts:
        there_N = rng.poisson(a_sentence, count)
        right_N = rng.binomial(there_N, rng.beta(3, 2, count))
        wrong_N = rng.poisson(0.3 * a_sentence, count)
        pairs_N2 = np.stack([right_N + wrong_N, there_N], axis=1).astype(float)
        return Parts("f1", "found_f1", np.arange(count), right_N.astype(float), pairs_N2.tolist())

    return draw, 2 * 0.6 / (0.6 + 0.3 + 1)


def token_loss(spread: float, kind: str = "ratio") -> tuple[Draw, float]:
    """Nats a token of documents whose lengths are spread; longer ones are a little easier."""

    def draw(rng: np.random.Generator, count: int) -> Parts:
        tokens_N = np.exp(rng.normal(4, spread, count))
        nats_N = 1.2 * np.exp(rng.normal(0, 0.35, count)) * (tokens_N / 55) ** -0.1
        return Parts("loss", kind, np.arange(count), nats_N * tokens_N, tokens_N, (0.0, math.inf))

    truth = 1.2 * math.exp(0.35**2 / 2) * 55**0.1 * math.exp(4 * 0.9 + (0.9 * spread) ** 2 / 2 - 4 - spread**2 / 2)
    return draw, math.exp(truth) if kind == "exp_ratio" else truth


def correlation(kind: str, correlated: float = 0.85) -> tuple[Draw, float]:
    def draw(rng: np.random.Generator, count: int) -> Parts:
        x_N = rng.standard_normal(count)
        y_N = correlated * x_N + math.sqrt(1 - correlated**2) * rng.standard_normal(count)
        return Parts(kind, kind, np.arange(count), x_N, y_N, (-1.0, 1.0))

    return draw, correlated if kind == "pearson" else 6 / math.pi * math.asin(correlated / 2)


POPULATIONS: dict[str, tuple[Draw, float]] = {
    "accuracy 0.80": accuracy(0.8),
    "accuracy 0.95": accuracy(0.95),
    "accuracy 0.99": accuracy(0.99),
    "macro F1, 10 classes, the last 3 %": macro_f1(),
    "entity F1, 1.5 a sentence": entity_f1(1.5),
    "entity F1, 0.2 a sentence": entity_f1(0.2),
    "loss a token, lengths spread 0.5": token_loss(0.5),
    "loss a token, lengths spread 1.3": token_loss(1.3),
    "perplexity, lengths spread 1.3": token_loss(1.3, "exp_ratio"),
    "Pearson 0.85": correlation("pearson"),
    "Spearman 0.83": correlation("spearman"),
    "QA F1, each passage one question": answer_f1(),
    "QA F1, 5 questions a passage": answer_f1(5, 0.3),
    "QA F1, 20 questions an article": answer_f1(20, 0.2),
    "accuracy 0.80, 8 a group": accuracy(0.8, 8, 0.5),
}
"""By name: a draw, and the true value."""
