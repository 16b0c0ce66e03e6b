"""What each example of the eval split adds to a trial's primary metric: <trial>/predictions.parquet, a row an example.

A metric is made of two columns, by its kind: the ratio of two sums (accuracy, loss, F1 over entities, ...), a
correlation of two columns, an average over classes of lists of them, or bleu and chrf of sums of counts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorasweep.files import replacing
from lorasweep.tasks.feature_extraction import FeatureExtraction, batch_losses, search_ranks
from lorasweep.tasks.question_ans import QuestionAns, score
from lorasweep.tasks.seq_cls import SeqCls
from lorasweep.tasks.task import Prediction, Task
from lorasweep.tasks.token_cls import TokenCls, entities

NAME = "predictions.parquet"
LONGEST = 500
"""Characters of an answer that are kept."""

NOBODY = -1
"""Class of a place where no class is predicted, or none is right."""

RATIO, EXP_RATIO, PEARSON, SPEARMAN = "ratio", "exp_ratio", "pearson", "spearman"
OVER_CLASSES = ("macro_f1", "macro_precision", "macro_recall", "mcc")
OF_COUNTS = ("bleu", "chrf")

Pair = tuple[Any, Any]


@dataclass(frozen=True, eq=False)
class Scores:
    """A trial's primary metric, taken apart. `first` and `second` hold a number an example, or a list of them."""

    metric: str
    kind: str
    rows: np.ndarray
    """Which example of the eval split, ascending, [N]."""
    first: Sequence[Any] | np.ndarray
    second: Sequence[Any] | np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


# --- taking a metric apart -------------------------------------------------------------------------------------------


def of(task: Task, metric: str, predictions: Sequence[Prediction]) -> Scores | None:
    """Return a metric taken apart; None where nobody knows how."""
    found = _parts(task, metric, predictions)
    if found is None:
        return None
    kind, pairs = found
    rows = sorted(pairs)
    return Scores(metric, kind, np.array(rows), [pairs[r][0] for r in rows], [pairs[r][1] for r in rows])


def _parts(task: Task, metric: str, predictions: Sequence[Prediction]) -> tuple[str, dict[int, Pair]] | None:
    """Return a metric's kind and the two columns of each row."""
    if isinstance(task, FeatureExtraction):
        return _alike(task, metric, predictions)
    if metric in ("loss", "perplexity"):
        sums: dict[int, Pair] = {}
        for p in predictions:  # a row may have several windows
            loss, count = sums.get(p["row"], (0.0, 0))
            sums[p["row"]] = (loss + p["loss"], count + p["supervised"])
        return (EXP_RATIO if metric == "perplexity" else RATIO), sums
    if isinstance(task, SeqCls):
        return _classes(task.kind, metric, predictions)
    if isinstance(task, TokenCls):
        return _tags(task, metric, predictions)
    if isinstance(task, QuestionAns):
        facts = {p["row"]: p for p in predictions}
        place = ("f1", "exact_match").index(metric)
        texts = task.answers(predictions)
        scored = {r: score(t, facts[r]["answers"], facts[r]["by_character"])[place] for r, t in texts.items()}
        return RATIO, {r: (value, 1) for r, value in scored.items()}
    return _written(metric, predictions)


def _classes(kind: str, metric: str, predictions: Sequence[Prediction]) -> tuple[str, dict[int, Pair]]:
    """Return a metric of SEQ_CLS."""
    given = {p["row"]: (p["prediction"], p["label"]) for p in predictions}
    if metric in (PEARSON, SPEARMAN):
        return metric, given
    if metric == "mse":
        return RATIO, {r: ((p - t) ** 2, 1) for r, (p, t) in given.items()}
    if metric in ("accuracy", "subset_accuracy"):
        return RATIO, {r: (p == t, 1) for r, (p, t) in given.items()}
    if metric == "micro_f1":
        return RATIO, {r: (2 * sum(_both(p, t)), sum(p) + sum(t)) for r, (p, t) in given.items()}
    if kind == "multi_label":
        return metric, {r: (_on(p), _on(t)) for r, (p, t) in given.items()}
    return metric, {r: ([p], [t]) for r, (p, t) in given.items()}


def _both(predicted: Sequence[float], true: Sequence[float]) -> list[bool]:
    return [bool(p and t) for p, t in zip(predicted, true, strict=True)]


def _on(flags: Sequence[float]) -> list[int]:
    """Return the class at each place whose flag is set, NOBODY at the others."""
    return [c if flag else NOBODY for c, flag in enumerate(flags)]


def _tags(task: TokenCls, metric: str, predictions: Sequence[Prediction]) -> tuple[str, dict[int, Pair]]:
    """Return a metric of TOKEN_CLS: of words, or of entities."""
    given = {p["row"]: (p["prediction"], p["label"]) for p in predictions}
    if metric == "accuracy":
        return RATIO, {r: (sum(a == b for a, b in zip(p, t, strict=True)), len(t)) for r, (p, t) in given.items()}
    if not task.bio:
        index = {c: i for i, c in enumerate(task.classes)}
        return f"macro_{metric}", {r: ([index[c] for c in p], [index[c] for c in t]) for r, (p, t) in given.items()}
    counts = {r: _counts(p, t) for r, (p, t) in given.items()}
    if metric == "f1":
        return RATIO, {r: (2 * right, found + there) for r, (right, found, there) in counts.items()}
    at = 1 if metric == "precision" else 2
    return RATIO, {r: (c[0], c[at]) for r, c in counts.items()}


def _counts(predicted: Sequence[str], true: Sequence[str]) -> tuple[int, int, int]:
    """Return how many entities are right, predicted and there."""
    ours, theirs = Counter(entities(predicted)), Counter(entities(true))
    return (ours & theirs).total(), ours.total(), theirs.total()


def _alike(
    task: FeatureExtraction, metric: str, predictions: Sequence[Prediction]
) -> tuple[str, dict[int, Pair]] | None:
    """Return a metric of FEATURE_EXTRACTION; an anchor keeps its rank among the whole split's candidates."""
    rows = [p["row"] for p in predictions]
    if metric in (PEARSON, SPEARMAN):
        return metric, {p["row"]: (p["cosine"], p["score"]) for p in predictions}
    if task.scored:
        return RATIO, {p["row"]: (p["loss"], 1) for p in predictions}
    import torch

    vectors = [torch.stack(list(column)) for column in zip(*(p["vectors"] for p in predictions), strict=True)]
    infos = [p["info"] for p in predictions]
    if metric == "loss":  # an anchor's own, among the texts that it was evaluated with
        losses = batch_losses(vectors, infos, task.spec.temperature).tolist()
        return RATIO, {r: (loss, 1) for r, loss in zip(rows, losses, strict=True)}
    ranks = search_ranks(vectors[0], vectors[1], infos).tolist()
    if metric == "mrr":
        return RATIO, {r: (1 / rank, 1) for r, rank in zip(rows, ranks, strict=True)}
    within = int(metric.rpartition("_")[2])
    return RATIO, {r: (rank <= within, 1) for r, rank in zip(rows, ranks, strict=True)}


def _written(metric: str, predictions: Sequence[Prediction]) -> tuple[str, dict[int, Pair]] | None:
    """Return a metric of language models."""
    if metric == "token_accuracy":
        return RATIO, {p["row"]: (p["correct"], p["supervised"]) for p in predictions}
    written = [p for p in predictions if "text" in p]
    if metric == "exact_match":
        return RATIO, {p["row"]: (p["right"], 1) for p in written}
    from lorasweep.tasks import generation

    if metric in OF_COUNTS:
        return metric, {p["row"]: generation.counts(metric, p["text"], p["references"]) for p in written}
    if metric == "rouge_l":
        found = {p["row"]: generation.scores([p["text"]], [p["references"]])["rouge_l"] for p in written}
        return RATIO, {r: (value, 1) for r, value in found.items()}
    return None


# --- the file --------------------------------------------------------------------------------------------------------


def write(
    folder: Path, task: Task, metric: str, predictions: Sequence[Prediction], records: Sequence[Mapping[str, Any]]
) -> None:
    """Write predictions.parquet whole or not at all: row, loss, supervised, answer, and the metric's two columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = {p["row"]: p for p in reversed(predictions)}
    rows = sorted(first)
    columns: dict[str, Any] = {
        "row": pa.array(rows, pa.int64()),
        "loss": pa.array([float(first[r]["loss"]) for r in rows]),
        "supervised": pa.array([int(first[r]["supervised"]) for r in rows]),
        "answer": pa.array([str(task.readable(records[r], first[r]))[:LONGEST] for r in rows]),
    }
    found = of(task, metric, predictions)
    if found is not None:
        cell = pa.list_(pa.int32()) if found.kind in OVER_CLASSES + OF_COUNTS else pa.float64()
        known = {int(r): i for i, r in enumerate(found.rows)}
        for name, values in (("score", found.first), ("of", found.second)):
            cells = [values[known[r]] if r in known else None for r in rows]
            columns[name] = pa.array([_cell(c) for c in cells], cell)
    told = {"metric": metric, "kind": found.kind if found else ""}
    with replacing(folder / NAME) as file:
        pq.write_table(pa.table(columns).replace_schema_metadata(told), file)


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, list) else float(value)


def read(folder: Path) -> Scores | None:
    """Return what predictions.parquet says of the primary metric; None where there is none, or it has no parts."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = folder / NAME
    if not path.is_file():
        return None
    table = pq.read_table(path)
    told = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    if not told.get("kind"):
        return None
    table = table.filter(pc.is_valid(table["score"]))
    rows = table["row"].to_numpy()
    first, second = table["score"], table["of"]
    if told["kind"] in OVER_CLASSES + OF_COUNTS:
        return Scores(told["metric"], told["kind"], rows, first.to_pylist(), second.to_pylist())
    return Scores(told["metric"], told["kind"], rows, first.to_numpy(), second.to_numpy())
