"""Further metrics of classes, for those who ask for them by task_type.metrics. Definitions are scikit-learn's.

Shapes: R sets of weights, N examples, C classes, V different scores, B bins.
"""

from collections.abc import Callable, Sequence

import numpy as np

from lorasweep.tasks.metric import Cell, _class_counts, _over_occurring, _share, combination

Area = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""From weights [R, N], scores [N] and ones and zeros [N] to values [R]."""

BINS = 15
"""Of the calibration error: C. Guo et al., On Calibration of Modern Neural Networks, 2017."""


@combination
def f_beta(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """Macro F-beta of predicted classes against [true class, beta]."""
    square = float(second[0][1]) ** 2
    right_RC, predicted_RC, true_RC = _class_counts(weights_RN, first, [int(label) for label, _ in second])
    scores_RC = _share((1 + square) * right_RC, square * true_RC + predicted_RC)
    return _over_occurring(scores_RC, predicted_RC, true_RC)


@combination
def auroc(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """Area under the ROC curve from probabilities [C] and ones and zeros [C]: the mean over the classes that some rows
    have and some have not.
    """
    return _mean_over_classes(weights_RN, first, second, _area_below_roc)


@combination
def auprc(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """Average precision, likewise."""
    return _mean_over_classes(weights_RN, first, second, _average_precision)


def _mean_over_classes(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell], area: Area) -> np.ndarray:
    scores_NC, true_NC = (np.asarray(list(side), float) for side in (first, second))
    found = [area(weights_RN, scores_NC[:, c], true_NC[:, c]) for c in range(scores_NC.shape[1])]
    values_RC = np.stack(found, axis=1)
    known_RC = np.isfinite(values_RC)
    return np.where(known_RC, values_RC, 0).sum(1) / known_RC.sum(1)


def _by_score(weights_RN: np.ndarray, scores_N: np.ndarray, true_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight of true and of other rows at each different score, from the highest down, [R, V] each."""
    order_N = np.argsort(-scores_N, kind="stable")
    new_N = np.diff(-scores_N[order_N], prepend=-np.inf) != 0
    starts = np.flatnonzero(new_N)
    sorted_RN = weights_RN[:, order_N]
    all_RV = np.add.reduceat(sorted_RN, starts, axis=1)
    true_RV = np.add.reduceat(sorted_RN * true_N[order_N], starts, axis=1)
    return true_RV, all_RV - true_RV


def _area_below_roc(weights_RN: np.ndarray, scores_N: np.ndarray, true_N: np.ndarray) -> np.ndarray:
    """Return how often a true row has a higher score than another one, equal ones half, [R]; NaN without one kind."""
    true_RV, other_RV = _by_score(weights_RN, scores_N, true_N)
    lower_RV = other_RV.sum(1, keepdims=True) - np.cumsum(other_RV, axis=1)
    return (true_RV * (lower_RV + other_RV / 2)).sum(1) / (true_RV.sum(1) * other_RV.sum(1))


def _average_precision(weights_RN: np.ndarray, scores_N: np.ndarray, true_N: np.ndarray) -> np.ndarray:
    true_RV, other_RV = _by_score(weights_RN, scores_N, true_N)
    found_RV = np.cumsum(true_RV, axis=1)
    precision_RV = _share(found_RV, found_RV + np.cumsum(other_RV, axis=1))
    return (true_RV * precision_RV).sum(1) / true_RV.sum(1)


@combination
def calibration_error(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """Mean distance of confidence and accuracy over bins of equal width, from [confidence] and [whether right]."""
    sure_N, right_N = (np.asarray(side, float) for side in (first, second))
    bin_N = np.clip(np.ceil(sure_N * BINS) - 1, 0, BINS - 1).astype(int)
    gaps_NB = np.zeros((len(sure_N), BINS))
    gaps_NB[np.arange(len(sure_N)), bin_N] = sure_N - right_N
    return np.abs(weights_RN @ gaps_NB).sum(1) / weights_RN.sum(1)
