"""What every task answers: which fields it reads, how text becomes tokens, the loss of each row, the metrics, and how a
trained model answers.

A task is one file here (or in an outside package) and one file conf/task_type/NAME.yaml: no other code knows a task by
its name. A batch may hold rows of several trials (its groups); losses come back a row at a time, so that no trial sees
another's.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorasweep.config import registry
from lorasweep.config.spec import DataSpec, TaskSpec, TrialSpec
from lorasweep.data.dataset import Data, Record
from lorasweep.errors import ConfigError
from lorasweep.tasks import asked_metrics
from lorasweep.tasks.metric import Metric, Prediction

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
    text_bytes: int = 0
    """UTF-8 bytes of the text that the supervised items stand for; 0 where they are no text."""

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
    text_bytes: tuple[int, ...] = field(default=())
    """UTF-8 bytes of each row's supervised text."""
    others: tuple[Mapping[str, Tensor], ...] = field(default=())
    """Inputs of each row's further texts, where a task has any: the model reads them by themselves."""
    lengths: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Padded length of a text -> the length that each slot's rows would be padded to without the others."""


Answer = dict[str, Any]
"""What a model answers to one input, as JSON can hold it."""


@dataclass(frozen=True)
class Fields:
    """Which of a task's fields an input has that a model is to answer."""

    must: tuple[str, ...]
    may: tuple[str, ...] = ()


class Task(ABC):
    name: ClassVar[str]
    """Value of task_type.name."""
    auto_class: ClassVar[str]
    """Name of the transformers auto class that brings the head."""
    peft_type: ClassVar[str | None] = None
    """peft's TaskType; None for a task that peft has no name for."""
    head_names: ClassVar[tuple[str, ...]] = ()
    """Modules that peft's `all-linear` leaves out as heads, where the model has no output embeddings."""
    pipeline: ClassVar[str]
    """The hub's name for what the task does."""
    builtin: ClassVar[str] = ""
    """View of the built-in corpus that has the task's fields (data/builtin.py); "" where there is none."""
    state: ClassVar[tuple[str, ...]] = ()
    """Attributes that `fit` sets and that answering needs: task.json keeps them."""
    held: ClassVar[tuple[type, ...]] = ()
    """Classes besides plain values that its examples hold: the token cache reads no others."""
    answers_with: ClassVar[Mapping[str, Any]] = {}
    """Keys of task_type that differ where the model is to answer."""
    most_loss_ratio: ClassVar[float] = 10.0
    """What train.max_loss_ratio=auto means."""
    one_answer: ClassVar[bool] = False
    """Whether the model answers once a text, not once a token."""
    labels_tokens: ClassVar[bool] = False
    """Whether a target holds a label for each token of the input."""
    always_masked: ClassVar[bool] = True
    """Whether the model gets an attention mask where nothing is padding, too."""
    joins_decoder: ClassVar[bool] = False
    """Whether a model may be joined of an encoder and a decoder."""
    pools: ClassVar[bool] = False
    """Whether the task makes one vector of a text's tokens itself."""
    pooling: str = "mean"
    """How it does: mean, cls or last. What loads the model sets it."""

    def __init__(self, spec: TaskSpec) -> None:
        self.spec = spec
        self.padding_side = "right"
        """Where a batch's shorter texts are padded: on the left only for a model that answers once a text and reads its
        last token, which loading finds out."""
        self.notes: list[str] = []
        """What `fit` and `encode` dropped or cut, for a person to read."""
        self.found: dict[str, Any] = {}
        """Keys of data.* that were left open, with what the data say: columns by their usual names."""
        self.records: Mapping[str, Sequence[Record]] = {}
        """Rows of each split, for metrics that look at them."""

    @abstractmethod
    def measures(self) -> Sequence[Metric]:
        """Return the task's metrics, the primary one first. Final after `columns` and `fit`: it may go by the data."""

    def ready(self) -> Sequence[Metric]:
        """Return the metrics that task_type.metrics may ask for by name."""
        return ()

    def f_beta(self, name: str) -> Metric | None:
        """Return F-beta by its name, such as f2 or f0.5, where the task has classes."""
        return None

    f_beta_names: ClassVar[tuple[str, ...]] = ()
    """Examples of such names."""

    def pairs(self, predictions: Sequence[Prediction]) -> dict[int, tuple[Any, Any]]:
        """Return what the model says of each row, and the reference, as a function of the user's sees them."""
        return {}

    no_pairs: ClassVar[str] = "the task gives no answers to functions"
    """Why `pairs` may have none, and the next move."""

    @property
    def all_metrics(self) -> list[Metric]:
        """The task's own metrics, those that task_type.metrics asks for, and those of outside packages that fit."""
        own = [*self.measures(), *self._asked()]
        names = {metric.name for metric in own}
        return own + [metric for metric in _outside_metrics(self) if metric.name not in names]

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(m.name for m in self.all_metrics)

    @property
    def primary(self) -> str:
        return self.measures()[0].name

    def _asked(self) -> list[Metric]:
        return asked_metrics.asked(self) if self.spec.metrics else []

    def metric(self, name: str) -> Metric:
        """Return a metric by its name. Raises ConfigError where there is none."""
        found = next((m for m in self.all_metrics if m.name == name), None)
        if found is None:
            raise ConfigError([f"task_type.primary: {self.name} has {', '.join(self.metric_names)}, got '{name}'"])
        return found

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Return the metrics of a whole split, `loss` among them; NaN for one that has no value there."""
        return {m.name: m.value(predictions) for m in self.all_metrics}

    def undefined(self, data: Data, split: str) -> dict[str, str]:
        """Return metric -> reason for metrics that have no value on a split, whatever the model answers."""
        return {}

    def loss_ratio(self, asked: float | str | None) -> float | None:
        """Return train.max_loss_ratio as a number, or None for no limit."""
        return self.most_loss_ratio if isinstance(asked, str) else asked

    @property
    def base_rate(self) -> float:
        """What train.learning_rate=auto starts from: the rate for 16 examples a step and 2,000 hidden units."""
        return 4e-4

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

    def trim(self, model: Any, new: Collection[str] | None = None) -> None:  # noqa: B027
        """Take off the freshly loaded model what the task does not use, or raise ConfigError if it is unfit.

        `new` names the parameters that its checkpoint lacks; None where no weights are read.
        """

    def meet(self, model: Any, examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
        """Look at what the freshly loaded model makes of some of train, before anything trains on it; return what is
        added, by its name, to a parameter that its checkpoint lacks, however that is drawn.
        """
        return {}

    def prefixes(self, spec: DataSpec, prompts: Mapping[str, str]) -> dict[str, str]:
        """Return the keys of data.* that the checkpoint's prompts, by name, settle; "" is that of every text."""
        return {}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take back what `fit` learned, by attribute, from a trial's task.json."""
        for name, value in facts.items():
            setattr(self, name, value)

    def finished(self, weights: dict[str, Tensor]) -> None:  # noqa: B027
        """Change the weights of a trained adapter or model, in place, so that other code gets the answers in the
        user's units from it; names may have a prefix.
        """

    def finish(self, model: Any) -> None:
        """Let a trained model that stays here answer in the user's units."""
        self.finished(dict(model.named_parameters()))

    @property
    def unexported(self) -> float:
        """What is to be added to an exported model's numbers, since the model has no place for it."""
        return 0.0

    def in_units(self, answer: Tensor) -> Tensor:
        """Return what a model gives in the user's units, as a model with finished weights gives it by itself."""
        return answer

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

    def predictions(self, model: Any, batches: Iterable[Batch]) -> Iterator[Prediction]:
        """Yield the predictions of all batches."""
        for batch in batches:
            yield from self.predict(model, batch)

    @abstractmethod
    def readable(self, record: Record, prediction: Prediction) -> str:
        """Return what the model answers to a record, as a person would read it."""

    def baseline(self, data: Data, split: str) -> dict[str, float]:
        """Return the score of the trivial answer, to be read beside the trial's."""
        return {}

    # --- answering ---

    @abstractmethod
    def fields(self, spec: DataSpec) -> Fields:
        """Return the fields of an input to predict for."""

    @abstractmethod
    def blank(self, fields: Record) -> Record:
        """Return an input's fields as a record for `encode`: what would be learned is filled in, nobody reads it."""

    def encode_input(self, fields: Record, tokenizer: Any, spec: DataSpec) -> list[Example]:
        """Return the examples of an input: one, or several that are answered together; none where no token is left."""
        return self.encode([self.blank(fields)], tokenizer, replace(spec, too_long="truncate"))

    def shape(self, example: Example) -> Hashable:
        """Return what examples of one batch have in common."""
        return None

    @abstractmethod
    def answer(self, model: Any, batches: Sequence[Batch], records: Sequence[Record]) -> list[Answer]:
        """Return the answer to each record, in order; a batch's rows are places among the records."""

    @abstractmethod
    def answer_columns(self) -> dict[str, str]:
        """Return what each part of an answer is, for a table's schema: string, double, strings, doubles or doubles by
        name.
        """

    @abstractmethod
    def line(self, answer: Answer) -> str:
        """Return an answer as one line for people."""

    def no_pipeline(self, spec: DataSpec, tokenizer: Any) -> str:
        """Return why no pipeline of transformers answers as the trial does; "" where `pipeline` does."""
        return f"no pipeline answers for {self.name} as it was trained"

    def pipeline_columns(self) -> dict[str, str]:
        """Return the columns that the pipeline gives; "" is MLflow's column without a name."""
        return {"": "string"}

    def as_pipeline(self, answer: Answer) -> Any:
        """Return an answer as the pipeline gives it through MLflow: columns by name, or a text."""
        raise NotImplementedError(f"{self.name} has no pipeline")

    def read_alike(self, record: Record, tokenizer: Any, spec: DataSpec) -> bool:
        """Tell whether the pipeline reads of a record just what the trial reads of it."""
        return True

    def pipeline_arguments(self, model: Any, tokenizer: Any, spec: TrialSpec) -> dict[str, Any]:
        """Return the pipeline's arguments with which it reads and writes as the trial did."""
        return {}

    def pipeline_prompt(self, tokenizer: Any, spec: DataSpec) -> str:
        """Return what the pipeline reads in place of a `{prompt}`; other braces are doubled."""
        return "{prompt}"

    # --- batches ---

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
        examples = list(chain.from_iterable(groups))
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
        if int(lengths.min()) < length or self.always_masked:
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
            text_bytes=tuple(e.text_bytes for e in examples),
            lengths={length: own},
        )


def free_length(length: int, taken: Collection[int]) -> int:
    """Return the next length from `length` on that is not taken."""
    return next(n for n in range(length, length + len(taken) + 1) if n not in taken)


def _outside_metrics(task: Task) -> list[Metric]:
    """Return the metrics that others have registered for a task. Raises ConfigError where one cannot be loaded."""
    found = []
    for name in registry.METRICS:
        if name.startswith(f"{task.name}."):
            entry = registry.METRICS.get(name, lambda entry: isinstance(entry, Metric) or callable(entry))
            metric = entry if isinstance(entry, Metric) else entry(task)
            found += [metric] if metric is not None else []
    return found


def in_order(answers: Mapping[int, Answer]) -> list[Answer]:
    return [answers[row] for row in sorted(answers)]
