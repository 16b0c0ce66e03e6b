"""SEQ_CLS: one text or a pair, one label out of several; accuracy first."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lorasweep.data import Data, Record
from lorasweep.spec import DataSpec, TaskSpec
from lorasweep.tasks.task import Batch, Example, Prediction, Task, mean_loss


class SeqCls(Task):
    name = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    metric_names = ("accuracy", "macro_f1", "mcc", "loss")

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.classes: list[str] = []

    def columns(self, spec: DataSpec) -> dict[str, str]:
        columns = {"text": spec.text_column, "label": spec.label_column}
        if spec.text_pair_column:
            columns["text_pair"] = spec.text_pair_column
        return columns

    def fit(self, data: Data) -> list[str]:
        self.classes = sorted({str(r["label"]) for r in data.splits["train"]}, key=_numbers_first)
        problems = []
        for split in ("eval", "test"):
            unseen = sorted({str(r["label"]) for r in data.splits[split]} - set(self.classes))
            if unseen:
                some = ", ".join(f"'{u}'" for u in unseen[:5])
                problems.append(f"data.label_column: {len(unseen)} classes of {split} are not in train: {some}")
        if len(self.classes) < 2:
            problems.append(f"data.label_column: train needs at least two classes, has {self.classes}")
        return problems

    def model_kwargs(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {c: i for i, c in enumerate(self.classes)},
        }

    def encode(self, records: Sequence[Record], tokenizer: Any, spec: DataSpec) -> list[Example]:
        index = {c: i for i, c in enumerate(self.classes)}
        pairs = [str(r["text_pair"]) for r in records] if "text_pair" in records[0] else None
        tokens = tokenizer(
            [str(r["text"]) for r in records],
            pairs,
            truncation=True,
            max_length=spec.max_tokens,
            return_attention_mask=False,
        )
        return [
            Example(row=i, inputs={k: tokens[k][i] for k in tokens}, target=index[str(r["label"])], supervised=1)
            for i, r in enumerate(records)
        ]

    def labels(self, examples: Sequence[Example], length: int) -> Tensor:
        return torch.tensor([e.target for e in examples])

    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        return cross_entropy(model(**batch.inputs).logits.float(), batch.labels, reduction="none")

    def predict(self, model: Any, batch: Batch) -> list[Prediction]:
        logits_BC = model(**batch.inputs).logits.float()
        losses = cross_entropy(logits_BC, batch.labels, reduction="none").tolist()
        best = logits_BC.argmax(-1).tolist()
        return [
            {"row": r, "loss": loss, "supervised": 1, "prediction": p, "label": label}
            for r, loss, p, label in zip(batch.rows, losses, best, batch.labels.tolist(), strict=True)
        ]

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        from torchmetrics.functional.classification import (
            multiclass_accuracy,
            multiclass_f1_score,
            multiclass_matthews_corrcoef,
        )

        predicted = torch.tensor([p["prediction"] for p in predictions])
        labels = torch.tensor([p["label"] for p in predictions])
        n = len(self.classes)
        return {
            "accuracy": float(multiclass_accuracy(predicted, labels, n, average="micro")),
            "macro_f1": float(multiclass_f1_score(predicted, labels, n, average="macro")),
            "mcc": float(multiclass_matthews_corrcoef(predicted, labels, n)),
            "loss": mean_loss(predictions),
        }

    def readable(self, record: Record, prediction: Prediction) -> str:
        return self.classes[prediction["prediction"]]

    def baseline(self, data: Data, split: str) -> dict[str, float]:
        """Return the accuracy of always answering train's most frequent class."""
        majority = Counter(str(r["label"]) for r in data.splits["train"]).most_common(1)[0][0]
        rows = data.splits[split]
        return {"majority_accuracy": sum(str(r["label"]) == majority for r in rows) / len(rows)}


def _numbers_first(label: str) -> tuple[int, float, str]:
    """Sort '2' before '10', and numbers before words."""
    return (0, float(label), "") if label.lstrip("-").isdigit() else (1, 0.0, label)
