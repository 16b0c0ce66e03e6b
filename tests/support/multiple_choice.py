"""A seventh task, whole in this file, as somebody else would write one: which of several answers fits a question.

Each choice is read with the question as a pair; the head gives one number for each. Rows of a batch are examples, and
the choices beyond the first are the batch's `others`.

Shapes: B rows, C choices.
"""

from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lorasweep.config.spec import DataSpec
from lorasweep.data.dataset import Data, Record
from lorasweep.tasks import register
from lorasweep.tasks.metric import LOSS, Metric, Prediction, by_row, ratio
from lorasweep.tasks.task import Answer, Batch, Example, Fields, Task, in_order


@register
class MultipleChoice(Task):
    name = "MULTIPLE_CHOICE"
    auto_class = "AutoModelForSequenceClassification"
    head_names = ("classifier",)
    pipeline = "multiple-choice"
    state = ("choices",)
    one_answer = True
    choices = 0

    def measures(self) -> Sequence[Metric]:
        def right(prediction: Prediction) -> tuple[float, float]:
            return float(prediction["prediction"] == prediction["label"]), 1.0

        return (Metric("accuracy", by_row(right), ratio), LOSS)

    def columns(self, spec: DataSpec) -> dict[str, str]:
        return {"question": "question", "choices": "choices", "answer": "answer"}

    def fit(self, data: Data) -> list[str]:
        self.choices = len(data.splits["train"][0]["choices"])
        other = [r for rows in data.splits.values() for r in rows if len(r["choices"]) != self.choices]
        return [f"data: every row must have {self.choices} choices"] if other else []

    def model_kwargs(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def encode(self, records: Sequence[Record], tokenizer: Any, spec: DataSpec) -> list[Example]:
        out = []
        for row, record in enumerate(records):
            pairs = [
                tokenizer(record["question"], choice, truncation=True, max_length=spec.max_tokens)["input_ids"]
                for choice in record["choices"]
            ]
            target = [pairs[1:], int(record["answer"])]
            out.append(Example(row=row, inputs={"input_ids": pairs[0]}, target=target, supervised=1))
        return out

    def labels(self, examples: Sequence[Example], length: int) -> Tensor:
        return torch.tensor([e.target[1] for e in examples])

    def shape(self, example: Example) -> Hashable:
        return len(example.target[0])

    def collate(
        self,
        groups: Sequence[Sequence[Example]],
        pad_id: int,
        device: torch.device | str = "cpu",
        taken: Collection[int] = (),
    ) -> Batch:
        batch = super().collate(groups, pad_id, device, taken)
        lengths, others = dict(batch.lengths), []
        for k in range(len(groups[0][0].target[0])):
            parts = [[replace(e, inputs={"input_ids": e.target[0][k]}) for e in group] for group in groups]
            others.append(super().collate(parts, pad_id, device, lengths if len(groups) > 1 else ()))
            lengths |= others[-1].lengths
        return replace(batch, others=tuple(o.inputs for o in others), lengths=lengths)

    def _scores(self, model: Any, batch: Batch) -> Tensor:
        return torch.cat([model(**inputs).logits.float() for inputs in (batch.inputs, *batch.others)], dim=1)

    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        return cross_entropy(self._scores(model, batch), batch.labels, reduction="none")

    def predict(self, model: Any, batch: Batch) -> list[Prediction]:
        scores_BC = self._scores(model, batch)
        losses = cross_entropy(scores_BC, batch.labels, reduction="none").tolist()
        columns = zip(batch.rows, losses, scores_BC.argmax(1).tolist(), batch.labels.tolist(), strict=True)
        return [
            {"row": row, "loss": loss, "supervised": 1, "prediction": best, "label": label}
            for row, loss, best, label in columns
        ]

    def readable(self, record: Record, prediction: Prediction) -> str:
        return str(record["choices"][prediction["prediction"]])

    def baseline(self, data: Data, split: str) -> dict[str, float]:
        return {"random_accuracy": 1 / self.choices}

    def fields(self, spec: DataSpec) -> Fields:
        return Fields(("question", "choices"))

    def blank(self, fields: Record) -> Record:
        return fields | {"answer": 0}

    def answer(self, model: Any, batches: Sequence[Batch], records: Sequence[Record]) -> list[Answer]:
        predictions = [p for batch in batches for p in self.predict(model, batch)]
        return in_order({p["row"]: {"choice": self.readable(records[p["row"]], p)} for p in predictions})

    def answer_columns(self) -> dict[str, str]:
        return {"choice": "string"}

    def line(self, answer: Answer) -> str:
        return answer["choice"]
