"""What every task answers: which fields it reads, how text becomes tokens, the loss of each row, and the metrics.

A batch may hold rows of several trials (its groups); losses come back a row at a time, so that no trial sees another's.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.data.dataset import Data, Record

IGNORE = -100
"""Label of a position that is not supervised; torch's and transformers' convention."""


@dataclass(frozen=True)
class Example:
    row: int
    """Index of the record in its split."""
    inputs: Mapping[str, Sequence[int]]
    """Token-level model inputs, all of one length."""
    target: Any
    """What is supervised: a class index, a list of labels, ..."""
    supervised: int
    """Number of supervised items: 1 for a class, the number of labelled tokens for a language model."""
    info: Any = None
    """What the metrics need and the model does not see: offsets, answers, ..."""

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Return the tokens of each; those that are on disk need not be read for it."""
    known: list[int] | None = getattr(examples, "lengths", None)
    return known if known is not None else [len(e) for e in examples]


@dataclass(frozen=True)
class Batch:
    rows: tuple[int, ...]
    inputs: Mapping[str, Tensor]
    """[B, T] each."""
    labels: Tensor
    supervised: int
    tokens: tuple[int, ...]
    """Tokens of each slot that are not padding."""
    groups: tuple[slice, ...] = field(default=())
    """Rows of each slot, in the order of the slots."""
    infos: tuple[Any, ...] = field(default=())
    others: tuple[Mapping[str, Tensor], ...] = field(default=())
    """Inputs of each row's further texts, where a task has any: the model reads them by themselves."""
    lengths: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Padded length of a text -> the length that each slot's rows would be padded to without the others."""


Prediction = dict[str, Any]

LESS_IS_BETTER = ("loss", "perplexity", "mse")


def maximize(metric: str) -> bool:
    """Tell whether more of a metric is better."""
    return metric not in LESS_IS_BETTER


class Task(ABC):
    name: ClassVar[str]
    auto_class: ClassVar[str]
    """Name of the transformers auto class that brings the head."""
    one_answer: ClassVar[bool] = False
    """Whether the model answers once a text, not once a token."""
    metric_names: tuple[str, ...]
    """What `metrics` returns, the primary one first. Final after `columns` and `fit`: it may depend on the data."""

    def __init__(self, spec: TaskSpec) -> None:
        self.spec = spec
        self.padding_side = "right"
        """Where a batch's shorter texts are padded: on the left only for a model that answers once a text and reads its
        last token, which loading finds out."""
        self.notes: list[str] = []
        """What `fit` and `encode` dropped or cut, for a person to read."""
        self.found: dict[str, Any] = {}
        """Keys of data.* that were left open, with what the data say: columns by their usual names."""

    @property
    def primary(self) -> str:
        return self.metric_names[0]

    @property
    def divisible(self) -> bool:
        """Whether a row's loss is the same whoever is in its pass, so that a step may be taken in more passes."""
        return True

    @abstractmethod
    def columns(self, spec: DataSpec) -> dict[str, str]:
        """Return field name -> column name for the columns that must be there."""

    def fit(self, data: Data) -> list[str]:
        """Learn what depends on the data (the labels); return problems."""
        return []

    def trim(self, model: Any) -> None:  # noqa: B027
        """Take off the freshly loaded model what the task does not use, or raise ConfigError if it is unfit."""

    def model_kwargs(self) -> dict[str, Any]:
        """Return what the model's config needs to know of the data."""
        return {}

    @abstractmethod
    def encode(self, records: Sequence[Record], tokenizer: Any, spec: DataSpec) -> list[Example]:
        """Return the examples in order; records that leave nothing to learn are left out."""

    @abstractmethod
    def labels(self, examples: Sequence[Example], length: int) -> Tensor:
        """Return the labels of a batch padded to `length` tokens."""

    @abstractmethod
    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        """Return the summed loss of each row in nats, [B], differentiable; a mean divides by `supervised`."""

    @abstractmethod
    def predict(self, model: Any, batch: Batch) -> list[Prediction]:
        """Return one prediction a row, each with `row`, `loss` and `supervised`, without gradients."""

    @abstractmethod
    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Return the metrics of a whole split, `loss` among them."""

    @abstractmethod
    def readable(self, record: Record, prediction: Prediction) -> str:
        """Return what the model answers to a record, as a person would read it."""

    def baseline(self, data: Data, split: str) -> dict[str, float]:
        """Return the score of the trivial answer, to be read beside the trial's."""
        return {}

    def collate(
        self,
        groups: Sequence[Sequence[Example]],
        pad_id: int,
        device: torch.device | str = "cpu",
        taken: Collection[int] = (),
    ) -> Batch:
        """Return the rows of all groups padded to the longest, with an attention mask.

        `taken` are lengths that other texts of several slots' rows are padded to: each text has another, so that a
        layer can tell from its input which one it sees.
        """
        examples = [e for group in groups for e in group]
        own = tuple(max(map(len, group)) for group in groups)
        length = free_length(max(own), taken)
        inputs: dict[str, Tensor] = {}
        for name in examples[0].inputs:
            fill = pad_id if name == "input_ids" else 0
            table = torch.full((len(examples), length), fill, dtype=torch.long)
            for i, e in enumerate(examples):
                place = slice(length - len(e), length) if self.padding_side == "left" else slice(len(e))
                table[i, place] = torch.as_tensor(e.inputs[name])
            inputs[name] = table.to(device)
        lengths = torch.tensor([len(e) for e in examples])
        if int(lengths.min()) < length or self.name != "CAUSAL_LM":
            mask_BT = (torch.arange(length)[None] < lengths[:, None]).long()
            inputs["attention_mask"] = (mask_BT.flip(1) if self.padding_side == "left" else mask_BT).to(device)
        ends = torch.tensor([len(g) for g in groups]).cumsum(0).tolist()
        return Batch(
            rows=tuple(e.row for e in examples),
            inputs=inputs,
            labels=self.labels(examples, length).to(device),
            supervised=sum(e.supervised for e in examples),
            tokens=tuple(sum(map(len, group)) for group in groups),
            groups=tuple(slice(end - len(g), end) for end, g in zip(ends, groups, strict=True)),
            infos=tuple(e.info for e in examples),
            lengths={length: own},
        )


def free_length(length: int, taken: Collection[int]) -> int:
    """Return the next length from `length` on that is not taken."""
    return next(n for n in range(length, length + len(taken) + 1) if n not in taken)


def mean_loss(predictions: Iterable[Prediction]) -> float:
    """Return the loss a supervised item in nats. Raises ZeroDivisionError when nothing is supervised."""
    rows = list(predictions)
    return sum(p["loss"] for p in rows) / sum(p["supervised"] for p in rows)
