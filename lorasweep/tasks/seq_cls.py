"""SEQ_CLS: one text or a pair, and one class (accuracy first), any number of them (micro_f1) or a number (pearson).

Shapes: B rows of a batch, N of a split, C classes.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from lorasweep.config.spec import DataSpec, TaskSpec, TrialSpec
from lorasweep.data.dataset import Data, Record
from lorasweep.data.table import at_first
from lorasweep.errors import did_you_mean
from lorasweep.tasks import class_metrics, register, too_long
from lorasweep.tasks.metric import (
    CORRELATION,
    LOSS,
    Metric,
    Prediction,
    balanced_accuracy,
    by_row,
    label_macro_f1,
    macro_f1,
    mcc,
    pearson,
    ratio,
    spearman,
    summed_loss,
)
from lorasweep.tasks.task import Answer, Batch, Example, Fields, Task, in_order

REGRESSION_LOSS = Metric(
    "loss", summed_loss, ratio, (0.0, math.inf), "squared error of standardised targets", maximize=False
)

HF_NAMES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""The kinds as transformers' config.problem_type has them."""

SEPARATOR = "|"

MOST_NOISE = 0.5
"""Standard deviations of the numbers by which a head without a bias may at first miss their mean, by the text."""

OWN_UNITS = 2.0
"""A finished head's numbers are in the data's units where their deviation is within this factor of the data's, and
their mean within one deviation.
"""


LEAST_CORRELATION = 0.3
"""Of a finished head's numbers with the data's, below which it tells nothing of them."""

LEAST_SPREAD = 0.1
"""Deviation that a finished head's numbers count for at least: what stretches them stretches each step of training."""


@register
class SeqCls(Task):
    name = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    head_names = ("classifier", "score")
    pipeline = "text-classification"
    builtin = "labelled"
    state = ("classes", "kind", "mean", "sd", "scale", "offset")
    one_answer = True

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.classes: list[str] = []
        self.kind = "single_label" if spec.problem_type == "auto" else spec.problem_type
        self.mean, self.sd = 0.0, 1.0
        """Of train's numbers (regression)."""
        self.scale, self.offset = 1.0, 0.0
        """A number is the model's output times scale, plus offset."""
        self.head = ""
        """The module whose output is the number."""
        self._is_head_biased = True
        self._is_finished = False
        """Whether the head is the checkpoint's own."""
        self._are_units_known = False
        self.weights: list[float] | None = None
        """What a row's training loss is multiplied by, by its class."""

    def measures(self) -> Sequence[Metric]:
        def cells(prediction: Prediction) -> tuple[Any, Any]:
            return prediction["prediction"], prediction["label"]

        def equal(prediction: Prediction) -> tuple[float, float]:
            return float(prediction["prediction"] == prediction["label"]), 1.0

        match self.kind:
            case "single_label":
                return (
                    Metric("accuracy", by_row(equal), ratio),
                    Metric("macro_f1", by_row(cells), macro_f1),
                    Metric("mcc", by_row(cells), mcc, **CORRELATION),
                    LOSS,
                )
            case "multi_label":
                return (
                    Metric("micro_f1", by_row(_on_both), ratio),
                    Metric("macro_f1", by_row(cells), label_macro_f1),
                    Metric("subset_accuracy", by_row(equal), ratio),
                    LOSS,
                )
        return (
            Metric("pearson", by_row(cells), pearson, **CORRELATION),
            Metric("spearman", by_row(cells), spearman, **CORRELATION),
            Metric("mse", by_row(_squared), ratio, (0.0, math.inf), "squared error", maximize=False),
            REGRESSION_LOSS,
        )

    def ready(self) -> Sequence[Metric]:
        if self.kind == "regression":
            return ()
        curves = [
            Metric(name, by_row(self._shares_and_truth), combine)
            for name, combine in (("auroc", class_metrics.auroc), ("auprc", class_metrics.auprc))
        ]
        if self.kind == "multi_label":
            return curves

        def cells(prediction: Prediction) -> tuple[Any, Any]:
            return prediction["prediction"], prediction["label"]

        def sure(prediction: Prediction) -> tuple[float, float]:
            return max(prediction["shares"]), float(prediction["prediction"] == prediction["label"])

        most = max([price for row in (self.spec.costs or {}).values() for price in row.values()], default=1.0)
        return [
            *curves,
            Metric("balanced_accuracy", by_row(cells), balanced_accuracy),
            Metric("calibration_error", by_row(sure), class_metrics.calibration_error, maximize=False),
            Metric("cost", by_row(self._cost), ratio, (0.0, most or 1.0), "cost a row", maximize=False),
        ]

    f_beta_names = ("f0.5", "f2")

    def f_beta(self, name: str) -> Metric | None:
        found = re.fullmatch(r"f(\d+(?:\.\d+)?)", name)
        if found is None or float(found[1]) == 0 or self.kind != "single_label":
            return None
        beta = float(found[1])
        return Metric(name, by_row(lambda p: (p["prediction"], [p["label"], beta])), class_metrics.f_beta)

    def _shares_and_truth(self, prediction: Prediction) -> tuple[Any, Any]:
        label = prediction["label"]
        if self.kind == "multi_label":
            return prediction["shares"], [float(on) for on in label]
        if len(self.classes) == 2:
            return [prediction["shares"][1]], [float(label)]
        return prediction["shares"], [float(c == label) for c in range(len(self.classes))]

    def _cost(self, prediction: Prediction) -> tuple[float, float]:
        predicted, true = (self.classes[prediction[key]] for key in ("prediction", "label"))
        return (self.spec.costs or {}).get(true, {}).get(predicted, 0.0), 1.0

    def pairs(self, predictions: Sequence[Prediction]) -> dict[int, tuple[Any, Any]]:
        """Return the classes' names, a list of them, or numbers."""
        return {p["row"]: (self._named(p["prediction"]), self._named(p["label"])) for p in predictions}

    def _named(self, answer: Any) -> Any:
        if self.kind == "regression":
            return answer
        if self.kind == "multi_label":
            return [c for c, on in zip(self.classes, answer, strict=True) if on]
        return self.classes[answer]

    def undefined(self, data: Data, split: str) -> dict[str, str]:
        labels = [r["label"] for r in data.splits[split]]
        if self.kind == "regression" and len({float(v) for v in labels}) < 2:
            return dict.fromkeys(("pearson", "spearman"), f"all labels are {float(labels[0]):g}")
        if self.kind == "multi_label" and not any(self._names(v) for v in labels):
            return {"micro_f1": "no row has a class"}
        return {}

    def columns(self, spec: DataSpec) -> dict[str, str]:
        columns = {"text": spec.text_column, "label": spec.label_column}
        if spec.text_pair_column:
            columns["text_pair"] = spec.text_pair_column
        return columns

    def fit(self, data: Data) -> list[str]:
        """Learn the kind of labels and the classes."""
        splits = {name: _labels(rows) for name, rows in data.splits.items()}
        if self.spec.problem_type == "auto":
            self.kind = "multi_label" if any(isinstance(v, list) for v in splits["train"]) else "single_label"
        problems = _type_problems(splits, self.kind)
        if problems:
            return problems
        if self.kind == "regression":
            if self.spec.class_weights is not None:
                return ["task_type.class_weights: is for one class a text, and these data are numbers; leave it out"]
            return self._fit_numbers([float(v) for v in splits["train"]])
        names = {split: set(chain.from_iterable(map(self._names, labels))) for split, labels in splits.items()}
        names["train"].update(chain.from_iterable(map(self._names, data.labels)))
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
        return problems or self._fit_weights(splits["train"])

    def _fit_weights(self, labels: Sequence[Any]) -> list[str]:
        """Learn the weights of the classes in the loss; return what is named and is no class."""
        asked, costs = self.spec.class_weights, self.spec.costs or {}
        priced = {*costs, *chain.from_iterable(costs.values())}
        named = {"class_weights": asked if isinstance(asked, dict) else (), "costs": priced}
        problems = [
            f"task_type.{key}: '{name}' is no class of the data{did_you_mean(name, self.classes)}"
            for key, names in named.items()
            for name in names
            if name not in self.classes
        ]
        if asked is None or problems:
            return problems
        if self.kind != "single_label":
            return [f"task_type.class_weights: is for one class a text, and these data are {self.kind}; leave it out"]
        counts = Counter(str(label) for label in labels)
        weights = asked if isinstance(asked, dict) else {c: len(labels) / (len(counts) * n) for c, n in counts.items()}
        self.weights = [weights.get(c, 1.0) for c in self.classes]
        return []

    def _fit_numbers(self, numbers: Sequence[float]) -> list[str]:
        """Learn mean and standard deviation of the numbers; return a problem where they do not vary."""
        self.mean, self.sd = statistics.fmean(numbers), statistics.pstdev(numbers)
        if self.sd > 0:
            return []
        return [f"data.label_column: regression needs different numbers in train, all are {numbers[0]:g}"]

    def restore(self, facts: Mapping[str, Any]) -> None:
        super().restore(facts)
        self._are_units_known = "scale" in facts

    def trim(self, model: Any, new: Collection[str] | None = None) -> None:
        """Find the head of a regression; a new one learns standardised numbers, as far as it can hold the mean."""
        heads = [n for n, m in model.named_modules() if getattr(m, "out_features", 0) == 1]
        if self.kind != "regression" or new is None or not heads:
            return
        self.head = heads[-1]
        self._is_head_biased = model.get_submodule(self.head).bias is not None
        self._is_finished = f"{self.head}.weight" not in new
        if not self._is_finished and not self._are_units_known:
            self.scale, self.offset = self.sd, self.mean if self._is_head_biased else 0.0

    def meet(self, model: Any, examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
        """Let a finished head of other units than the data's begin at their mean and deviation, and a new one without
        a bias, as decoders have it, at the mean: in the direction that all texts share. Where the texts share too
        little for a mean that far from zero, it is added to what the model gives.
        """
        if self.kind != "regression" or not self.head:
            return {}
        alone = [self.collate([[e]], pad_id, model.device) for e in examples]
        is_first, self._are_units_known = not self._are_units_known, True
        if self._is_finished:
            if is_first:
                self._settle_units(model, alone, [e.target for e in examples])
            return {}
        if self._is_head_biased or self.unexported:
            return {}
        read_ND = _head_inputs(model, self.head, alone)
        shared_D = read_ND.mean(0)
        start_D = self.mean / self.scale * shared_D / shared_D.square().sum()
        if is_first and not (read_ND @ start_D).std(correction=0) <= MOST_NOISE:  # nor nan
            self.offset = self.mean
            self._note_unexported(model)
            return {}
        return {f"{self.head}.weight": start_D[None]}

    def _settle_units(self, model: Any, alone: Sequence[Batch], numbers: Sequence[float]) -> None:
        """Find how a finished head's numbers become the data's."""
        outputs = [float(model(**b.inputs).logits[0, 0]) for b in alone]
        mean, sd = statistics.fmean(outputs), statistics.pstdev(outputs)
        if self.sd / OWN_UNITS <= sd <= self.sd * OWN_UNITS and abs(mean - self.mean) <= self.sd:
            return
        varies = sd > 0 and len(set(numbers)) > 1
        tells = varies and abs(statistics.correlation(outputs, numbers)) >= LEAST_CORRELATION
        self.scale = self.sd / max(sd, LEAST_SPREAD) if tells else self.sd
        self.offset = self.mean - self.scale * mean
        self._note(
            f"the base's own head gives numbers around {mean:.3g} (standard deviation {sd:.3g}) for the data's texts, "
            f"and the data have {self.mean:.3g} ({self.sd:.3g}): a number is what it gives times {self.scale:.4g} plus "
            f"{self.offset:.4g}, and it trains on from there"
        )
        self._note_unexported(model)

    def _note_unexported(self, model: Any) -> None:
        if self.unexported:
            self._note(
                f"the head of {type(model).__name__} has no bias, which {self.unexported:.6g} would be: it is added to "
                "what the model gives; an exported model gives numbers less that, as its card says"
            )

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    @property
    def unexported(self) -> float:
        return 0.0 if self._is_head_biased else self.offset

    def finished(self, weights: dict[str, Tensor]) -> None:
        """Let the head give numbers in the user's units, less the mean where it has no bias to hold it."""
        for name, weight in weights.items():
            if self.head and _is_of(name, self.head, "weight"):
                weight.mul_(self.scale)
            if self.head and _is_of(name, self.head, "bias"):
                weight.mul_(self.scale).add_(self.offset)

    def finish(self, model: Any) -> None:
        super().finish(model)
        if not self.unexported:
            return
        name = next(n for n, _ in model.named_parameters() if _is_of(n, self.head, "weight"))
        head = model.get_submodule(name.rpartition(".")[0])
        head.bias = torch.nn.Parameter(head.weight.new_tensor([self.offset]), requires_grad=False)

    def in_units(self, answer: Tensor) -> Tensor:
        return answer * self.scale + self.offset - self.unexported if self.kind == "regression" else answer

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
        texts = {"text": [str(r["text"]) for r in records]}
        if "text_pair" in records[0]:
            texts["text_pair"] = [str(r["text_pair"]) for r in records]
        tokens, cut = too_long.tokenised(tokenizer, texts, spec.max_tokens)
        self.notes += too_long.cut_notes(spec, records, cut)
        index = {c: i for i, c in enumerate(self.classes)}
        examples = []
        for i, record in enumerate(records):
            inputs = {name: column[i] for name, column in tokens.items()}
            target = self._target(record["label"], index)
            info = target if self.kind == "regression" else None
            examples.append(Example(row=i, inputs=inputs, target=target, supervised=1, info=info))
        return examples

    def _target(self, label: Any, index: Mapping[str, int]) -> Any:
        """Return a class number, a number, or a one or zero for each class."""
        if self.kind == "regression":
            return float(label)
        if self.kind == "single_label":
            return index[str(label)]
        names = self._names(label)
        return [float(c in names) for c in self.classes]

    def labels(self, examples: Sequence[Example], length: int) -> Tensor:
        """Return class numbers, ones and zeros, or numbers as the head is to give them."""
        if self.kind == "regression":
            return torch.tensor([(e.target - self.offset) / self.scale for e in examples], dtype=torch.float32)
        return torch.tensor([e.target for e in examples])

    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        losses_B = self._losses(model(**batch.inputs).logits.float(), batch.labels)
        return losses_B if self.weights is None else losses_B * losses_B.new_tensor(self.weights)[batch.labels]

    def _losses(self, logits_BC: Tensor, labels: Tensor) -> Tensor:
        """Return cross-entropy, the mean binary cross-entropy over the classes, or the squared error, [B]."""
        if self.kind == "single_label":
            return cross_entropy(logits_BC, labels, reduction="none")
        if self.kind == "multi_label":
            return binary_cross_entropy_with_logits(logits_BC, labels, reduction="none").mean(-1)
        standard = 1.0 if self.scale == 1.0 else self.scale / self.sd  # a head in the data's units is as it is
        return ((logits_BC[:, 0] - labels) * standard) ** 2

    def predict(self, model: Any, batch: Batch) -> list[Prediction]:
        logits_BC = model(**batch.inputs).logits.float()
        losses = self._losses(logits_BC, batch.labels).tolist()
        labels = batch.labels.tolist()
        if self.kind == "regression":
            best = [v * self.scale + self.offset for v in logits_BC[:, 0].tolist()]
            labels = list(batch.infos)
        else:
            best = (logits_BC.argmax(-1) if self.kind == "single_label" else (logits_BC > 0).int()).tolist()
        found: list[Prediction] = [
            {"row": r, "loss": loss, "supervised": 1, "prediction": p, "label": label}
            for r, loss, p, label in zip(batch.rows, losses, best, labels, strict=True)
        ]
        if self.spec.metrics and self.kind != "regression":
            shares_BC = logits_BC.sigmoid() if self.kind == "multi_label" else logits_BC.softmax(-1)
            for p, shares in zip(found, shares_BC.tolist(), strict=True):
                p["shares"] = shares
        return found

    def fields(self, spec: DataSpec) -> Fields:
        return Fields(("text", "text_pair") if spec.text_pair_column else ("text",))

    def blank(self, fields: Record) -> Record:
        blank: dict[str, Any] = {"multi_label": [], "regression": 0.0}
        return fields | {"label": blank[self.kind] if self.kind in blank else self.classes[0]}

    def answer(self, model: Any, batches: Sequence[Batch], records: Sequence[Record]) -> list[Answer]:
        """Return the class with its probability, the classes above one half, or the number."""
        found: dict[int, Answer] = {}
        for batch in batches:
            logits_BC = model(**batch.inputs).logits.float()
            found |= zip(batch.rows, self._answers(logits_BC), strict=True)
        return in_order(found)

    def _answers(self, logits_BC: Tensor) -> list[Answer]:
        if self.kind == "regression":
            return [{"value": v * self.scale + self.offset} for v in logits_BC[:, 0].tolist()]
        shares_BC = logits_BC.sigmoid() if self.kind == "multi_label" else logits_BC.softmax(-1)
        out: list[Answer] = []
        for shares in shares_BC.tolist():
            by_name = dict(zip(self.classes, shares, strict=True))
            if self.kind == "multi_label":
                out.append({"labels": [n for n, p in by_name.items() if p > 0.5], "probabilities": by_name})
            else:
                best = max(by_name, key=by_name.__getitem__)
                out.append({"label": best, "probability": by_name[best], "probabilities": by_name})
        return out

    def answer_columns(self) -> dict[str, str]:
        return {
            "single_label": {"label": "string", "probability": "double", "probabilities": "doubles by name"},
            "multi_label": {"labels": "strings", "probabilities": "doubles by name"},
            "regression": {"value": "double"},
        }[self.kind]

    def line(self, answer: Answer) -> str:
        match self.kind:
            case "single_label":
                return f"{answer['label']}\t{answer['probability']:.4f}"
            case "multi_label":
                return SEPARATOR.join(f"{n} {answer['probabilities'][n]:.4f}" for n in answer["labels"]) or "(no class)"
        return f"{answer['value']:.4f}"

    def no_pipeline(self, spec: DataSpec, tokenizer: Any) -> str:
        if self.kind != "single_label":
            return "MLflow's text-classification names one class and its score"
        return "MLflow's signature of text-classification has no pairs" if spec.text_pair_column else ""

    def pipeline_columns(self) -> dict[str, str]:
        return {"label": "string", "score": "double"}

    def as_pipeline(self, answer: Answer) -> Any:
        return {"label": answer["label"], "score": answer["probability"]}

    def pipeline_arguments(self, model: Any, tokenizer: Any, spec: TrialSpec) -> dict[str, Any]:
        return {"truncation": True, "max_length": spec.data.max_tokens}

    def readable(self, record: Record, prediction: Prediction) -> str:
        answer = prediction["prediction"]
        if self.kind == "regression":
            return f"{answer:.3f}"
        if self.kind == "multi_label":
            return SEPARATOR.join(c for c, on in zip(self.classes, answer, strict=True) if on)
        return self.classes[answer]

    def baseline(self, data: Data, split: str) -> dict[str, float]:
        """Return the score of always answering train's most frequent class or set of classes, or train's mean."""
        train, rows = _labels(data.splits["train"]), _labels(data.splits[split])
        if self.kind == "regression":
            mean = sum(map(float, train)) / len(train)
            return {"mean_mse": sum((float(v) - mean) ** 2 for v in rows) / len(rows)}
        majority = Counter(frozenset(self._names(v)) for v in train).most_common(1)[0][0]
        share = sum(frozenset(self._names(v)) == majority for v in rows) / len(rows)
        return {"majority_accuracy" if self.kind == "single_label" else "majority_subset_accuracy": share}


def _is_of(name: str, head: str, part: str) -> bool:
    """Tell whether a parameter, in a model or an adapter, is that part of the head that trains."""
    return f".{name.replace('.modules_to_save.default', '')}".endswith(f".{head}.{part}")


def _head_inputs(model: Any, head: str, alone: Sequence[Batch]) -> Tensor:
    """Return what the head reads of each text, [N, D]: of the tokens that it is given, the one whose output is the
    model's.
    """
    read: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(_: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        read.append(args[0].flatten(0, -2).float())
        outputs.append(output.flatten().float())

    found = []
    with model.get_submodule(head).register_forward_hook(keep):
        for batch in alone:
            answer = model(**batch.inputs).logits[0, 0].float()
            found.append(read[-1][(outputs[-1] - answer).abs().argmin()])
    return torch.stack(found)


def _on_both(prediction: Prediction) -> tuple[float, float]:
    """Return twice the classes that are both predicted and true, and the predicted and the true ones."""
    predicted, true = prediction["prediction"], prediction["label"]
    return 2.0 * sum(p and t for p, t in zip(predicted, true, strict=True)), sum(predicted) + sum(true)


def _squared(prediction: Prediction) -> tuple[float, float]:
    return (prediction["prediction"] - prediction["label"]) ** 2, 1.0


def _type_problems(splits: Mapping[str, Sequence[Any]], kind: str) -> list[str]:
    """Return a problem where the labels are not what this kind takes, or words and numbers are mixed."""
    if kind == "regression":
        for split, labels in splits.items():
            for number, label in enumerate(labels, 1):
                if not _is_number(label):
                    return [
                        f"data.label_column: regression needs finite numbers, {split} has {label!r} in its row {number}"
                    ]
        return []
    everything = list(chain.from_iterable(splits.values()))
    if kind == "single_label" and any(isinstance(label, list) for label in everything):
        return ["data.label_column: some labels are lists; set task_type.problem_type=multi_label"]
    names = list(chain.from_iterable(label if isinstance(label, list) else [label] for label in everything))
    word = next((name for name in names if isinstance(name, str)), None)
    figure = next((name for name in names if not isinstance(name, str)), None)
    if word is not None and figure is not None:
        return [f"data.label_column: words and numbers are mixed: {word!r} and {figure!r}"]
    return []


def _labels(rows: Sequence[Record]) -> list[Any]:
    return [row["label"] for row in rows]


def _is_number(label: Any) -> bool:
    try:
        return math.isfinite(float(label))
    except (TypeError, ValueError):
        return False


def _numbers_first(label: str) -> tuple[int, float, str]:
    """Sort '2' before '10', and numbers before words."""
    return (0, float(label), label) if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", label) else (1, 0.0, label)
