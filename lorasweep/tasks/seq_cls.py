"""SEQ_CLS: one text or a pair, and one class (accuracy first), any number of them (micro_f1) or a number (pearson).

Shapes: B rows of a batch, N of a split, C classes.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.data.dataset import Data, Record
from lorasweep.data.table import at_first
from lorasweep.tasks.task import Batch, Example, Prediction, Task, mean_loss

METRICS: dict[str, tuple[str, ...]] = {
    "single_label": ("accuracy", "macro_f1", "mcc", "loss"),
    "multi_label": ("micro_f1", "macro_f1", "subset_accuracy", "loss"),
    "regression": ("pearson", "spearman", "mse", "loss"),
}

HF_NAMES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""The kinds as transformers' config.problem_type has them."""

SEPARATOR = "|"


class SeqCls(Task):
    name = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    one_answer = True
    metric_names = METRICS["single_label"]

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.classes: list[str] = []
        self.kind = "single_label" if spec.problem_type == "auto" else spec.problem_type
        self.metric_names = METRICS[self.kind]

    def columns(self, spec: DataSpec) -> dict[str, str]:
        columns = {"text": spec.text_column, "label": spec.label_column}
        if spec.text_pair_column:
            columns["text_pair"] = spec.text_pair_column
        return columns

    def fit(self, data: Data) -> list[str]:
        """Learn the kind of labels and the classes."""
        splits = {name: [r["label"] for r in rows] for name, rows in data.splits.items()}
        if self.spec.problem_type == "auto":
            self.kind = "multi_label" if any(isinstance(v, list) for v in splits["train"]) else "single_label"
            self.metric_names = METRICS[self.kind]
        problems = _type_problems(splits, self.kind)
        if problems or self.kind == "regression":
            return problems
        names = {split: {name for label in labels for name in self._names(label)} for split, labels in splits.items()}
        names["train"] |= {name for label in data.labels for name in self._names(label)}
        order = {name: i for i, name in enumerate(data.class_names)}
        self.classes = sorted(names["train"], key=lambda c: (order.get(c, len(order)), _numbers_first(c)))
        for split in ("eval", "test"):
            unseen = sorted(names[split] - names["train"])
            if unseen:
                some = ", ".join(f"'{u}'" for u in unseen[:5])
                first = at_first(data.splits[split], unseen[0], lambda r: self._names(r["label"]))
                problems.append(f"data.label_column: {len(unseen)} classes of {split} are not in train: {some}{first}")
        if len(self.classes) < 2:
            problems.append(f"data.label_column: train needs at least two classes, has {self.classes}")
        return problems

    def _names(self, label: Any) -> list[str]:
        """Return the classes that a label holds."""
        if self.kind == "single_label":
            return [str(label)]
        parts = label if isinstance(label, list) else str(label).split(SEPARATOR)
        return [name for part in parts if (name := str(part).strip())]

    def model_kwargs(self) -> dict[str, Any]:
        if self.kind == "regression":
            return {"num_labels": 1, "problem_type": HF_NAMES[self.kind]}
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {c: i for i, c in enumerate(self.classes)},
            "problem_type": HF_NAMES[self.kind],
        }

    def encode(self, records: Sequence[Record], tokenizer: Any, spec: DataSpec) -> list[Example]:
        pairs = [str(r["text_pair"]) for r in records] if "text_pair" in records[0] else None
        tokens = tokenizer(
            [str(r["text"]) for r in records],
            pairs,
            truncation=True,
            max_length=spec.max_tokens,
            return_attention_mask=False,
        )
        index = {c: i for i, c in enumerate(self.classes)}
        return [
            Example(
                row=i, inputs={k: tokens[k][i] for k in tokens}, target=self._target(r["label"], index), supervised=1
            )
            for i, r in enumerate(records)
        ]

    def _target(self, label: Any, index: Mapping[str, int]) -> Any:
        """Return a class number, a number, or a one or zero for each class."""
        if self.kind == "regression":
            return float(label)
        if self.kind == "single_label":
            return index[str(label)]
        names = self._names(label)
        return [float(c in names) for c in self.classes]

    def labels(self, examples: Sequence[Example], length: int) -> Tensor:
        return torch.tensor([e.target for e in examples])

    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        return self._losses(model(**batch.inputs).logits.float(), batch.labels)

    def _losses(self, logits_BC: Tensor, labels: Tensor) -> Tensor:
        """Return cross-entropy, the mean binary cross-entropy over the classes, or the squared error, [B]."""
        if self.kind == "single_label":
            return cross_entropy(logits_BC, labels, reduction="none")
        if self.kind == "multi_label":
            return binary_cross_entropy_with_logits(logits_BC, labels, reduction="none").mean(-1)
        return (logits_BC[:, 0] - labels) ** 2

    def predict(self, model: Any, batch: Batch) -> list[Prediction]:
        logits_BC = model(**batch.inputs).logits.float()
        losses = self._losses(logits_BC, batch.labels).tolist()
        if self.kind == "regression":
            best = logits_BC[:, 0].tolist()
        else:
            best = (logits_BC.argmax(-1) if self.kind == "single_label" else (logits_BC > 0).int()).tolist()
        return [
            {"row": r, "loss": loss, "supervised": 1, "prediction": p, "label": label}
            for r, loss, p, label in zip(batch.rows, losses, best, batch.labels.tolist(), strict=True)
        ]

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        predicted = torch.tensor([p["prediction"] for p in predictions])
        labels = torch.tensor([p["label"] for p in predictions])
        loss = {"loss": mean_loss(predictions)}
        if self.kind == "regression":
            return _regression(predicted.double(), labels.double()) | loss
        if self.kind == "multi_label":
            return _multi_label(predicted, labels.long(), len(self.classes)) | loss
        return _single_label(predicted, labels, len(self.classes)) | loss

    def readable(self, record: Record, prediction: Prediction) -> str:
        answer = prediction["prediction"]
        if self.kind == "regression":
            return f"{answer:.3f}"
        if self.kind == "multi_label":
            return SEPARATOR.join(c for c, on in zip(self.classes, answer, strict=True) if on)
        return self.classes[answer]

    def baseline(self, data: Data, split: str) -> dict[str, float]:
        """Return the score of always answering train's most frequent class or set of classes, or train's mean."""
        train, rows = ([r["label"] for r in data.splits[name]] for name in ("train", split))
        if self.kind == "regression":
            mean = sum(map(float, train)) / len(train)
            return {"mean_mse": sum((float(v) - mean) ** 2 for v in rows) / len(rows)}
        majority = Counter(frozenset(self._names(v)) for v in train).most_common(1)[0][0]
        share = sum(frozenset(self._names(v)) == majority for v in rows) / len(rows)
        return {"majority_accuracy" if self.kind == "single_label" else "majority_subset_accuracy": share}


def _single_label(predicted_N: Tensor, labels_N: Tensor, n: int) -> dict[str, float]:
    from torchmetrics.functional.classification import multiclass_f1_score, multiclass_matthews_corrcoef

    return {
        "accuracy": float((predicted_N == labels_N).double().mean()),  # torchmetrics' fp32 shows 0.3 as 0.30000001
        "macro_f1": float(multiclass_f1_score(predicted_N, labels_N, n, average="macro")),
        "mcc": float(multiclass_matthews_corrcoef(predicted_N, labels_N, n)),
    }


def _multi_label(predicted_NC: Tensor, labels_NC: Tensor, n: int) -> dict[str, float]:
    from torchmetrics.functional.classification import multilabel_f1_score

    return {
        "micro_f1": float(multilabel_f1_score(predicted_NC, labels_NC, n, average="micro")),
        "macro_f1": float(multilabel_f1_score(predicted_NC, labels_NC, n, average="macro")),
        "subset_accuracy": float((predicted_NC == labels_NC).all(dim=1).double().mean()),
    }


def _regression(predicted_N: Tensor, labels_N: Tensor) -> dict[str, float]:
    from torchmetrics.functional.regression import mean_squared_error, pearson_corrcoef, spearman_corrcoef

    return {
        "pearson": float(pearson_corrcoef(predicted_N, labels_N)),
        "spearman": float(spearman_corrcoef(predicted_N, labels_N)),
        "mse": float(mean_squared_error(predicted_N, labels_N)),
    }


def _type_problems(splits: Mapping[str, Sequence[Any]], kind: str) -> list[str]:
    """Return a problem where the labels are not what this kind takes, or words and numbers are mixed."""
    if kind == "regression":
        wrong = [
            f"data.label_column: regression needs finite numbers, {split} has {label!r} in its row {number}"
            for split, labels in splits.items()
            for number, label in enumerate(labels, 1)
            if not _is_number(label)
        ]
        return wrong[:1]
    if kind == "single_label" and any(isinstance(v, list) for labels in splits.values() for v in labels):
        return ["data.label_column: some labels are lists; set task_type.problem_type=multi_label"]
    flat = [
        v for labels in splits.values() for label in labels for v in (label if isinstance(label, list) else [label])
    ]
    first = {kind: v for v in reversed(flat) for kind in ["words" if isinstance(v, str) else "numbers"]}
    if len(first) > 1:
        return [f"data.label_column: words and numbers are mixed: {first['words']!r} and {first['numbers']!r}"]
    return []


def _is_number(label: Any) -> bool:
    try:
        return math.isfinite(float(label))
    except (TypeError, ValueError):
        return False


def _numbers_first(label: str) -> tuple[int, float, str]:
    """Sort '2' before '10', and numbers before words."""
    return (0, float(label), label) if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", label) else (1, 0.0, label)
