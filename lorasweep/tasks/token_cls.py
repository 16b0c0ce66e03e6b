"""TOKEN_CLS: a tag for each word; F1 of entities first where the tags mark any, else accuracy.

The scheme of the tags (IOB1, IOB2, IOE1, IOE2, IOBES, BILOU) is recognised, and entities are scored strictly by it, as
seqeval's strict mode does: type, first and last word must all be right. Tags without one, as parts of speech, are
scored a word at a time.

Shapes: B rows, T tokens, C tags.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lorasweep.config.spec import DataSpec, TaskSpec, TrialSpec
from lorasweep.data.dataset import Data, Record
from lorasweep.data.table import at_first, place_of
from lorasweep.errors import ConfigError
from lorasweep.tasks import register, running_text, special_tokens, tag_schemes
from lorasweep.tasks.metric import (
    LOSS,
    Metric,
    Prediction,
    by_row,
    found_f1,
    macro_f1,
    macro_precision,
    macro_recall,
    precision,
    ratio,
    recall,
)
from lorasweep.tasks.tag_schemes import OUTSIDE
from lorasweep.tasks.task import IGNORE, Answer, Batch, Example, Fields, Task, in_order
from lorasweep.tasks.token_lengths import UNCUT


@register
class TokenCls(Task):
    name = "TOKEN_CLS"
    auto_class = "AutoModelForTokenClassification"
    peft_type = "TOKEN_CLS"
    head_names = ("classifier", "score")
    pipeline = "token-classification"
    builtin = "python_tokens"
    state = ("classes", "scheme")
    labels_tokens = True

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.classes: list[str] = []
        self.scheme: str | None = None
        """How the tags mark entities; None where they mark none."""

    def measures(self) -> Sequence[Metric]:
        if self.scheme is None:
            return (
                Metric("accuracy", by_row(_right_words), ratio),
                Metric("macro_f1", by_row(self._numbered), macro_f1),
                Metric("macro_precision", by_row(self._numbered), macro_precision),
                Metric("macro_recall", by_row(self._numbered), macro_recall),
                LOSS,
            )
        return (
            Metric("f1", by_row(self._entities), found_f1),
            Metric("precision", by_row(self._entities), precision),
            Metric("recall", by_row(self._entities), recall),
            Metric("accuracy", by_row(_right_words), ratio),
            LOSS,
        )

    def _numbered(self, prediction: Prediction) -> tuple[list[int], list[int]]:
        """Return the predicted and the true tags as numbers."""
        index = {c: i for i, c in enumerate(self.classes)}
        return [index[c] for c in prediction["prediction"]], [index[c] for c in prediction["label"]]

    def _entities(self, prediction: Prediction) -> tuple[int, list[int]]:
        """Return how many entities are right, and how many are predicted and there."""
        assert self.scheme is not None
        right, predicted, there = tag_schemes.counts(prediction["prediction"], prediction["label"], self.scheme)
        return right, [predicted, there]

    def undefined(self, data: Data, split: str) -> dict[str, str]:
        if self.scheme is None or any(tag_schemes.entities(r["tags"], self.scheme) for r in data.splits[split]):
            return {}
        return dict.fromkeys(("f1", "precision", "recall"), "no row has an entity")

    def restore(self, facts: Mapping[str, Any]) -> None:
        super().restore(facts)
        if "scheme" not in facts:  # of a trial from before schemes were told apart
            letters = {tag_schemes.mark_of(t)[0] for t in self.classes} - {OUTSIDE}
            self.scheme = "IOB2" if letters and letters <= {"B", "I"} else None

    def columns(self, spec: DataSpec) -> dict[str, str]:
        return {"tokens": spec.tokens_column, "tags": spec.tags_column}

    def fit(self, data: Data) -> list[str]:
        """Learn the tags of train, also of its rows beyond max_train_samples; return tags that only others have."""
        self.classes = sorted({*data.labels, *_tags(data, "train")})
        problems = []
        for split in ("eval", "test"):
            unseen = sorted({*_tags(data, split)} - {*self.classes})
            if unseen:
                some = ", ".join(f"'{u}'" for u in unseen[:5])
                first = at_first(data.splits[split], unseen[0], lambda r: r["tags"])
                problems.append(f"data.tags_column: {len(unseen)} tags of {split} are not in train: {some}{first}")
        if len(self.classes) < 2:
            problems.append(f"data.tags_column: train needs at least two tags, has {self.classes}")
        self.scheme = tag_schemes.recognise((r["tags"] for r in data.splits["train"]), self.classes)
        if self.scheme is None:
            self.notes.append("the tags mark no entities: words are scored one by one, by accuracy and macro F1")
            return problems
        self.notes.append(f"the tags mark entities as {self.scheme} does: they are scored strictly by it")
        stray = sum(tag_schemes.unmarked(r["tags"], self.scheme) for r in data.splits["eval"])
        if stray:
            self.notes.append(
                f"{stray} tagged words of eval are no entity by {self.scheme}: strict scoring leaves them out"
            )
        return problems

    def model_kwargs(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {c: i for i, c in enumerate(self.classes)},
        }

    def encode(self, records: Sequence[Record], tokenizer: Any, spec: DataSpec) -> list[Example]:
        """Label the first token of each word. Words beyond max_tokens, or that leave no token, are not scored.

        Raises ConfigError for a tokenizer that cannot tell which word a token comes from, and where words are lost
        that data.too_long does not allow to lose.
        """
        if not tokenizer.is_fast:
            raise ConfigError([f"model.tokenizer: TOKEN_CLS needs a fast tokenizer, got {type(tokenizer).__name__}"])
        texts = running_text.spaced(tokenizer, special_tokens.bare_words(tokenizer, [r["tokens"] for r in records]))
        index = {c: i for i, c in enumerate(self.classes)}
        tokens = tokenizer(
            texts,
            is_split_into_words=True,
            truncation=True,
            max_length=spec.max_tokens,
            return_attention_mask=False,
        )
        examples = []
        for row, record in enumerate(records):
            scored: list[int] = []
            labels: list[int] = []
            offsets = tokens.encodings[row].offsets
            for word, place in zip(tokens.word_ids(row), offsets, strict=True):
                first = word is not None and (not scored or word != scored[-1])
                first = first and not running_text.is_space(texts[row][word], place)
                labels.append(index[record["tags"][word]] if first else IGNORE)
                scored += [word] if first else []
            if scored:
                inputs = {k: tokens[k][row] for k in tokens}
                examples.append(
                    Example(row=row, inputs=inputs, target=labels, supervised=len(scored), info=tuple(scored))
                )
        self.notes += _lost_notes(records, examples, spec)
        return examples

    def labels(self, examples: Sequence[Example], length: int) -> Tensor:
        table = torch.full((len(examples), length), IGNORE)
        for i, e in enumerate(examples):
            table[i, : len(e.target)] = torch.tensor(e.target)
        return table

    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        return _losses(model(**batch.inputs).logits, batch.labels)

    def predict(self, model: Any, batch: Batch) -> list[Prediction]:
        """Return, with the loss, the predicted and the true tags of the scored words, and the words' places."""
        logits_BTC = model(**batch.inputs).logits
        losses = _losses(logits_BTC, batch.labels).tolist()
        best = logits_BTC.argmax(-1).tolist()
        out = []
        for i, (row, labels) in enumerate(zip(batch.rows, batch.labels.tolist(), strict=True)):
            pairs = [(self.classes[p], self.classes[t]) for p, t in zip(best[i], labels, strict=True) if t != IGNORE]
            out.append(
                {
                    "row": row,
                    "loss": losses[i],
                    "supervised": len(pairs),
                    "prediction": [p for p, _ in pairs],
                    "label": [t for _, t in pairs],
                    "words": list(batch.infos[i]),
                }
            )
        return out

    def pairs(self, predictions: Sequence[Prediction]) -> dict[int, tuple[Any, Any]]:
        """Return the tags of each row's words."""
        return {p["row"]: (p["prediction"], p["label"]) for p in predictions}

    def readable(self, record: Record, prediction: Prediction) -> str:
        """Return the words with entities as `[New York](location)`, or as `word/TAG` for other tags."""
        tags = dict(zip(prediction["words"], prediction["prediction"], strict=True))
        words = record["tokens"]
        if self.scheme is None:
            return " ".join(f"{w}/{tags[i]}" if i in tags else w for i, w in enumerate(words))
        out: list[str] = []
        end = 0
        for kind, start, stop in tag_schemes.entities([tags.get(i, OUTSIDE) for i in range(len(words))], self.scheme):
            out += [*words[end:start], f"[{' '.join(words[start:stop])}]({kind})"]
            end = stop
        return " ".join([*out, *words[end:]])

    def fields(self, spec: DataSpec) -> Fields:
        return Fields(("tokens",))

    def blank(self, fields: Record) -> Record:
        """Return the words, white space dividing those of a text."""
        given = fields["tokens"]
        words = given.split() if isinstance(given, str) else list(map(str, given))
        return {"tokens": words, "tags": [self.classes[0]] * len(words)}

    def answer(self, model: Any, batches: Sequence[Batch], records: Sequence[Record]) -> list[Answer]:
        """Return the words, their tags (None beyond max_tokens), and the text with its entities."""
        found: dict[int, Answer] = {}
        for p in self.predictions(model, batches):
            record = records[p["row"]]
            tags = dict(zip(p["words"], p["prediction"], strict=True))
            shown = [tags.get(i) for i in range(len(record["tokens"]))]
            found[p["row"]] = {"tokens": record["tokens"], "tags": shown, "tagged": self.readable(record, p)}
        return in_order(found)

    def answer_columns(self) -> dict[str, str]:
        return {"tokens": "strings", "tags": "strings", "tagged": "string"}

    def line(self, answer: Answer) -> str:
        return answer["tagged"].replace("\n", "\\n")

    def no_pipeline(self, spec: DataSpec, tokenizer: Any) -> str:
        return ""

    def as_pipeline(self, answer: Answer) -> Any:
        """Return what the words are named, neighbours of one name once, unless a new entity begins."""
        names: list[str] = []
        for tag in answer["tags"]:
            begins, name = tag.startswith("B-"), tag.removeprefix("B-").removeprefix("I-")
            if begins or not names or names[-1] != name:
                names.append(name)
        return ",".join(names)

    def read_alike(self, record: Record, tokenizer: Any, spec: DataSpec) -> bool:
        """Tell whether the tokenizer finds the very words in running text, all within what is read."""
        tokens = tokenizer(" ".join(record["tokens"]))
        words = {word for word in tokens.word_ids() if word is not None}
        return len(words) == len(record["tokens"]) and len(tokens["input_ids"]) <= (spec.max_tokens or UNCUT)

    def pipeline_arguments(self, model: Any, tokenizer: Any, spec: TrialSpec) -> dict[str, Any]:
        """Without O, MLflow fails on a text that has nothing else."""
        return {"aggregation_strategy": "first", "ignore_labels": []}

    def baseline(self, data: Data, split: str) -> dict[str, float]:
        """Return the accuracy of always answering train's most frequent tag."""
        majority = Counter(_tags(data, "train")).most_common(1)[0][0]
        tags = list(_tags(data, split))
        return {"majority_accuracy": tags.count(majority) / len(tags)}


def _lost_notes(records: Sequence[Record], examples: Sequence[Example], spec: DataSpec) -> list[str]:
    """Return a note on the words that are not scored. Raises ConfigError where data.too_long allows none."""
    scored = {e.row: e.supervised for e in examples}
    lost = [len(r["tokens"]) - scored.get(row, 0) for row, r in enumerate(records)]
    if not any(lost):
        return []
    words, rows = sum(len(r["tokens"]) for r in records), [row for row, count in enumerate(lost) if count]
    told = (
        f"{sum(lost)} words in {len(rows)} rows are not scored, of {words} in {len(records)}: beyond "
        f"{spec.max_tokens} tokens or without any"
    )
    if spec.too_long != "error":
        return [told]
    places = ", ".join(place_of(records[row], row + 1) for row in rows[:3])
    raise ConfigError(
        [f"data.too_long: {told} ({places}); give a larger data.max_tokens, shorter rows, or data.too_long=truncate"]
    )


def _tags(data: Data, split: str) -> Iterator[str]:
    """Yield the tag of every word of a split."""
    return chain.from_iterable(record["tags"] for record in data.splits[split])


def _right_words(prediction: Prediction) -> tuple[int, int]:
    pairs = zip(prediction["prediction"], prediction["label"], strict=True)
    return sum(p == t for p, t in pairs), len(prediction["label"])


def _losses(logits_BTC: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the summed cross-entropy of each row's labelled tokens, [B]."""
    return cross_entropy(logits_BTC.float().transpose(1, 2), labels_BT, reduction="none", ignore_index=IGNORE).sum(1)
