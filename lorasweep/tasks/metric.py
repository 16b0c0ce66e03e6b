"""A metric, defined once: what each example adds to it, and how the examples' parts become a number.

Its value on a split, the intervals around it (the bootstrap weighs the examples anew) and the comparison of two trials
come from this one definition. Definitions are scikit-learn's, seqeval's and sacrebleu's.

A metric that has no value (no entity to find, a correlation of equal numbers) is NaN, never 0.

Shapes: R sets of weights, N examples, U units (examples, or groups of them), K trials, C classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Prediction = dict[str, Any]
"""What a task says of one example: `row`, `loss`, `supervised`, and what its metrics read."""

Cell = Any
"""A number, or a list of numbers."""
Pairs = Mapping[int, tuple[Cell, Cell]]
"""Row -> what it adds to a metric, in two cells."""
Combine = Callable[[np.ndarray, Sequence[Cell], Sequence[Cell]], np.ndarray]
"""From weights [R, N] and the two cells of each of N rows to values [R]."""

MOST_NATS = 700
"""Beyond it, exp is beyond the largest number."""

MOST_NUMBERS = 4_000_000
"""Weights that are worked on at once: 32 MB."""

COMBINATIONS: dict[str, Combine] = {}
"""By name: predictions.parquet names the one that its two columns are for."""


def combination(combine: Combine) -> Combine:
    """Register a function that makes metrics of rows' cells, under its name. Raises ValueError for another's name."""
    known = COMBINATIONS.setdefault(combine.__name__, combine)
    if (known.__module__, known.__qualname__) != (combine.__module__, combine.__qualname__):
        raise ValueError(f"{combine.__module__}.{combine.__name__}: {known.__module__} has a combination of this name")
    COMBINATIONS[combine.__name__] = combine
    return combine


@dataclass(frozen=True, eq=False)
class Parts:
    """A metric of a split, taken apart: a number an example in each of two columns, or a list of them."""

    metric: str
    kind: str
    """Name of its combination."""
    rows: np.ndarray
    """Which example of the split, ascending, [N]."""
    first: Sequence[Cell]
    second: Sequence[Cell]
    bounds: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest value that the metric can have."""
    groups: np.ndarray | None = None
    """Which examples belong together (a passage's questions, a document's pieces), [N]; None: each stands alone."""

    def __len__(self) -> int:
        return len(self.rows)

    def combined(self, weights_RN: np.ndarray) -> np.ndarray:
        """Return the metric where each example counts as often as it weighs, [R]."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return COMBINATIONS[self.kind](weights_RN, self.first, self.second)

    @property
    def value(self) -> float:
        """The metric on all examples; NaN where it has no value."""
        return float(self.combined(np.ones((1, len(self))))[0]) if len(self) else math.nan


@dataclass(frozen=True)
class Metric:
    name: str
    columns: Callable[[Sequence[Prediction]], Pairs]
    """From the predictions of a split to what each row adds; a row left out has no part in it."""
    combine: Combine
    """One that `combination` has registered."""
    bounds: tuple[float, float] = (0.0, 1.0)
    unit: str = "0 to 1"
    maximize: bool = True
    """Whether more is better."""

    def __post_init__(self) -> None:
        if COMBINATIONS.get(self.combine.__name__) is not self.combine:
            raise TypeError(f"metric {self.name}: {self.combine.__name__} must be decorated with @combination")

    def parts(self, predictions: Sequence[Prediction]) -> Parts:
        pairs = self.columns(predictions)
        rows = sorted(pairs)
        first, second = [pairs[r][0] for r in rows], [pairs[r][1] for r in rows]
        return Parts(self.name, self.combine.__name__, np.array(rows, np.int64), first, second, self.bounds)

    def value(self, predictions: Sequence[Prediction]) -> float:
        return self.parts(predictions).value


def by_row(pair: Callable[[Prediction], tuple[Cell, Cell]]) -> Callable[[Sequence[Prediction]], Pairs]:
    """Return columns for a metric that each prediction adds to by itself."""
    return lambda predictions: {p["row"]: pair(p) for p in predictions}


def older_scale(metric: str) -> tuple[tuple[float, float], str]:
    """Return bounds and unit of a metric of a study that did not write them down."""
    match metric:
        case "loss":
            return LOSS.bounds, LOSS.unit
        case "perplexity":
            return PERPLEXITY.bounds, PERPLEXITY.unit
        case "mse":
            return (0.0, math.inf), "squared error"
        case "pearson" | "spearman" | "mcc":
            return CORRELATION["bounds"], CORRELATION["unit"]
    return (0.0, 1.0), "0 to 1"


# --- ratios ----------------------------------------------------------------------------------------------------------


def _sums(weights_RN: np.ndarray, columns_NC: np.ndarray) -> np.ndarray:
    """Return the weighted sums, [R, C]. A single one is added up in order: its last digit depends on no library."""
    if len(weights_RN) == 1:
        return np.cumsum(weights_RN[0][:, None] * columns_NC, axis=0)[-1:]
    return weights_RN @ columns_NC


def _both(first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """Return the cells of both columns side by side, [N, C]."""
    columns = [np.asarray(side, float) for side in (first, second)]
    return np.hstack([c[:, None] if c.ndim == 1 else c for c in columns])


@combination
def ratio(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """Accuracy, loss, recall, micro-averages: the sum of the first cells over that of the second."""
    above_R, below_R = _sums(weights_RN, _both(first, second)).T
    return above_R / below_R


def all_combined(found: Sequence[Parts], weights_RU: np.ndarray, unit_N: np.ndarray | None = None) -> np.ndarray:
    """Return the metric of several trials on the same examples, where each unit counts as often as it weighs, [K, R].

    `unit_N` says which unit each example is in; None: each is one. Ratios are sums, so theirs are one matrix product.
    """
    if any(f.kind != ratio.__name__ for f in found):
        return np.hstack([_each_combined(found, some_RU, unit_N) for some_RU in _portions(weights_RU, len(found[0]))])
    above, below = ([np.asarray(getattr(f, side), float) for f in found] for side in ("first", "second"))
    if all(np.array_equal(b, below[0]) for b in below):
        below = below[:1]
    columns_NC = np.stack([*above, *below], axis=1)
    if unit_N is not None:
        columns_UC = np.zeros((weights_RU.shape[1], columns_NC.shape[1]))
        np.add.at(columns_UC, unit_N, columns_NC)
        columns_NC = columns_UC
    sums_CR = _sums(weights_RU, columns_NC).T
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.divide(sums_CR[: len(found)], sums_CR[len(found) :], order="C")


def _each_combined(found: Sequence[Parts], weights_RU: np.ndarray, unit_N: np.ndarray | None) -> np.ndarray:
    weights_RN = weights_RU if unit_N is None else weights_RU[:, unit_N]
    return np.stack([f.combined(weights_RN) for f in found])


def _portions(weights_RU: np.ndarray, examples: int) -> list[np.ndarray]:
    """Return the sets of weights in portions that take no more than MOST_NUMBERS, a number an example."""
    return np.array_split(weights_RU, math.ceil(len(weights_RU) * examples / MOST_NUMBERS))


@combination
def exp_ratio(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """Perplexity."""
    return np.exp(np.minimum(ratio(weights_RN, first, second), MOST_NATS))


def _found(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> tuple[np.ndarray, ...]:
    """Return how many items are right, predicted and there, [R] each; none has a value where none is there.

    The first cell of a row holds the right ones, the second the predicted and those there.
    """
    right_R, predicted_R, there_R = _sums(weights_RN, _both(first, second)).T
    return right_R, predicted_R, np.where(there_R > 0, there_R, math.nan)


@combination
def found_f1(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """F1 of items to find."""
    right_R, predicted_R, there_R = _found(weights_RN, first, second)
    return 2 * right_R / (predicted_R + there_R)


@combination
def precision(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """Share of the predicted items that are right; 0 where none is predicted, as seqeval and scikit-learn have it."""
    right_R, predicted_R, there_R = _found(weights_RN, first, second)
    return np.where(there_R > 0, _share(right_R, predicted_R), math.nan)


@combination
def recall(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """Share of the items there that are found."""
    right_R, _, there_R = _found(weights_RN, first, second)
    return right_R / there_R


def summed_loss(predictions: Sequence[Prediction]) -> Pairs:
    """Loss and number of supervised items of each row; a row may have several windows."""
    sums: dict[int, tuple[float, int]] = {}
    for p in predictions:
        loss, count = sums.get(p["row"], (0.0, 0))
        sums[p["row"]] = (loss + p["loss"], count + p["supervised"])
    return sums


LOSS = Metric("loss", summed_loss, ratio, (0.0, math.inf), "nats", maximize=False)
PERPLEXITY = Metric("perplexity", summed_loss, exp_ratio, (1.0, math.inf), "perplexity", maximize=False)


def summed_bits(predictions: Sequence[Prediction]) -> Pairs:
    """Loss in bits and UTF-8 bytes of the supervised text of each row; none where the task does not say the bytes."""
    sums: dict[int, tuple[float, int]] = {}
    for p in predictions:
        bits, count = sums.get(p["row"], (0.0, 0))
        sums[p["row"]] = (bits + p["loss"] / math.log(2), count + p.get("text_bytes", 0))
    return sums if any(count for _, count in sums.values()) else {}


BITS_PER_BYTE = Metric("bits_per_byte", summed_bits, ratio, (0.0, math.inf), "bits a byte", maximize=False)
"""What the supervised text costs, whatever the tokens: trials with unlike tokenizers compare by it."""

A_TOKEN = ("loss", "perplexity", "token_accuracy")
"""Metrics by tokens: another tokenizer cuts the same text into others, and its numbers mean something else."""


# --- correlations ----------------------------------------------------------------------------------------------------

CORRELATION: Mapping[str, Any] = {"bounds": (-1.0, 1.0), "unit": "correlation, -1 to 1"}


@combination
def pearson(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """Correlation of two columns; NaN where one of them does not vary."""
    x_N, y_N = (np.asarray(side, float) for side in (first, second))
    return _correlation(weights_RN, x_N, y_N)


def _correlation(weights_RN: np.ndarray, x_N: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    x_N, y_N = _standard(x_N), _standard(y_N)
    columns_N5 = np.stack([x_N, y_N, x_N * y_N, x_N**2, y_N**2], axis=1)
    means_R5 = weights_RN @ columns_N5 / weights_RN.sum(1)[:, None]
    x, y, xy, xx, yy = means_R5.T
    spread_R = np.sqrt(np.maximum(xx - x**2, 0) * np.maximum(yy - y**2, 0))
    return np.where(spread_R > _SMALLEST_SPREAD, np.clip((xy - x * y) / spread_R, -1, 1), math.nan)


_SMALLEST_SPREAD = 1e-12
"""Of standardised numbers; below it is rounding."""


def _standard(values_N: np.ndarray) -> np.ndarray:
    apart_N = values_N - values_N.mean()
    spread = apart_N.std()
    return apart_N / spread if spread > 0 else apart_N


@combination
def spearman(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """Correlation of two columns' ranks among the examples that are there."""
    total_R = weights_RN.sum(1)
    x_RN, y_RN = (_ranks(weights_RN, np.asarray(side, float)) - (total_R[:, None] + 1) / 2 for side in (first, second))
    xy_R, xx_R, yy_R = ((weights_RN * a_RN * b_RN).sum(1) for a_RN, b_RN in ((x_RN, y_RN), (x_RN, x_RN), (y_RN, y_RN)))
    spread_R = np.sqrt(xx_R * yy_R)
    return np.where(spread_R > 0, np.clip(xy_R / spread_R, -1, 1), math.nan)


def _ranks(weights_RN: np.ndarray, values_N: np.ndarray) -> np.ndarray:
    """Return the rank of each example where each is there as often as it weighs, equal ones at their mean, [R, N]."""
    order_N = np.argsort(values_N, kind="stable")
    new_N = np.diff(values_N[order_N], prepend=-np.inf) != 0
    there_RV = np.add.reduceat(weights_RN[:, order_N], np.flatnonzero(new_N), axis=1)  # V different values
    value_N = np.empty(len(values_N), int)
    value_N[order_N] = np.cumsum(new_N) - 1
    return (np.cumsum(there_RV, axis=1) - (there_RV - 1) / 2)[:, value_N]


# --- classes ---------------------------------------------------------------------------------------------------------


def _classes(cell: Cell) -> np.ndarray:
    return np.atleast_1d(np.asarray(cell, int))


def _class_table(first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """Return how often each class is right, predicted and true in each example, [3, N, C].

    A cell holds a class, or a class for each word; negative ones count as none.
    """
    predicted, true = list(map(_classes, first)), list(map(_classes, second))
    owner = np.repeat(np.arange(len(predicted)), [len(cell) for cell in predicted])
    ours, theirs = np.concatenate(predicted), np.concatenate(true)
    classes = max(int(ours.max()), int(theirs.max())) + 1
    counts_3NC = np.zeros((3, len(predicted), classes))
    for table_NC, marked, cells in zip(
        counts_3NC, (ours == theirs, ours >= 0, theirs >= 0), (ours, ours, theirs), strict=True
    ):
        kept = marked & (cells >= 0)
        np.add.at(table_NC, (owner[kept], cells[kept]), 1)
    return counts_3NC


def _class_counts(
    weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how often each class is right, predicted and true, [R, C] each."""
    right_RC, predicted_RC, true_RC = weights_RN @ _class_table(first, second)
    return right_RC, predicted_RC, true_RC


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part over whole, 0 where there is nothing of it."""
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), 0.0)


def _over_occurring(values_RC: np.ndarray, predicted_RC: np.ndarray, true_RC: np.ndarray) -> np.ndarray:
    """Return the mean over the classes that are predicted or true, as scikit-learn's average='macro' takes it, [R]."""
    occurs_RC = predicted_RC + true_RC > 0
    return (values_RC * occurs_RC).sum(1) / occurs_RC.sum(1)


@combination
def macro_f1(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    right_RC, predicted_RC, true_RC = _class_counts(weights_RN, first, second)
    return _over_occurring(_share(2 * right_RC, predicted_RC + true_RC), predicted_RC, true_RC)


@combination
def macro_precision(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    right_RC, predicted_RC, true_RC = _class_counts(weights_RN, first, second)
    return _over_occurring(_share(right_RC, predicted_RC), predicted_RC, true_RC)


@combination
def macro_recall(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    right_RC, predicted_RC, true_RC = _class_counts(weights_RN, first, second)
    return _over_occurring(_share(right_RC, true_RC), predicted_RC, true_RC)


@combination
def balanced_accuracy(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """Mean recall of the classes that are true somewhere."""
    right_RC, _, true_RC = _class_counts(weights_RN, first, second)
    return _over_occurring(_share(right_RC, true_RC), np.zeros_like(true_RC), true_RC)


@combination
def mcc(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """Matthews' correlation; 0 where only one class is predicted or true, as scikit-learn has it."""
    right_RC, predicted_RC, true_RC = _class_counts(weights_RN, first, second)
    total_R = predicted_RC.sum(1)
    apart_R = right_RC.sum(1) * total_R - (predicted_RC * true_RC).sum(1)
    spread_R = (total_R**2 - (predicted_RC**2).sum(1)) * (total_R**2 - (true_RC**2).sum(1))
    return _share(apart_R, np.sqrt(np.maximum(spread_R, 0)))


@combination
def label_macro_f1(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """Mean of the classes' F1 on multi-label rows of zeros and ones; a class that is neither predicted nor true counts
    0, as it does in scikit-learn.
    """
    predicted_NC, true_NC = (np.asarray(list(side), float) for side in (first, second))
    right_RC, predicted_RC, true_RC = (weights_RN @ c_NC for c_NC in (predicted_NC * true_NC, predicted_NC, true_NC))
    return _share(2 * right_RC, predicted_RC + true_RC).mean(1)


def class_examples(found: Parts) -> np.ndarray | None:
    """Return which examples the part of each class in a macro average rests on, [N, C]; None for another metric."""
    if found.kind == label_macro_f1.__name__:
        predicted_NC, true_NC = (np.asarray(list(side)) > 0 for side in (found.first, found.second))
        return predicted_NC | true_NC
    by_true = (macro_recall.__name__, balanced_accuracy.__name__)
    if found.kind not in (macro_f1.__name__, macro_precision.__name__, *by_true):
        return None
    _, predicted_NC, true_NC = _class_table(found.first, found.second) > 0
    if found.kind == macro_f1.__name__:
        return predicted_NC | true_NC
    return predicted_NC if found.kind == macro_precision.__name__ else true_NC


# --- generated text --------------------------------------------------------------------------------------------------


@combination
def bleu(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """BLEU without smoothing from sums of `generation.counts`."""
    counts_RC = weights_RN @ _both(first, second)
    matched_R4, there_R4, ours_R, theirs_R = counts_RC[:, :4], counts_RC[:, 4:8], counts_RC[:, 8], counts_RC[:, 9]
    geometric_R = np.exp(np.log(matched_R4 / there_R4).mean(1))
    brevity_R = np.where(ours_R > theirs_R, 1.0, np.exp(1 - theirs_R / ours_R))
    return np.where(matched_R4.min(1) > 0, brevity_R * geometric_R, 0.0)


@combination
def chrf(weights_RN: np.ndarray, first: Sequence[Cell], second: Sequence[Cell]) -> np.ndarray:
    """chrF (beta 2) from sums of `generation.counts`."""
    counts_RC = weights_RN @ _both(first, second)
    matched_R6, ours_R6, theirs_R6 = np.split(counts_RC, 3, axis=1)
    precision_R6, recall_R6 = _share(matched_R6, ours_R6), _share(matched_R6, theirs_R6)
    return (5 * precision_R6 * recall_R6 / np.maximum(4 * precision_R6 + recall_R6, 1e-16)).mean(1)
