"""TOKEN_CLS: a tag for each word; entity F1 first.

BIO tags (O, B-x, I-x) are scored by entities as seqeval's strict mode does with IOB2: type, first and last word must
all be right, and an entity begins with B-. Tags without these prefixes are scored a word at a time, F1, precision and
recall as the mean over tags.

Shapes: B rows, T tokens, C tags.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.data.dataset import Data, Record
from lorasweep.data.table import at_first
from lorasweep.errors import ConfigError
from lorasweep.tasks import running_text
from lorasweep.tasks.task import IGNORE, Batch, Example, Prediction, Task, mean_loss

OUTSIDE = "O"


class TokenCls(Task):
    name = "TOKEN_CLS"
    auto_class = "AutoModelForTokenClassification"
    metric_names = ("f1", "precision", "recall", "accuracy", "loss")

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.classes: list[str] = []

    @property
    def bio(self) -> bool:
        """Whether the tags mark entities; else each word counts for itself."""
        return is_bio(self.classes)

    def columns(self, spec: DataSpec) -> dict[str, str]:
        return {"tokens": spec.tokens_column, "tags": spec.tags_column}

    def fit(self, data: Data) -> list[str]:
        """Learn the tags of train, also of its rows beyond max_train_samples; return tags that only others have."""
        self.classes = sorted({*data.labels, *(t for r in data.splits["train"] for t in r["tags"])})
        problems = []
        for split in ("eval", "test"):
            unseen = sorted({t for r in data.splits[split] for t in r["tags"]} - set(self.classes))
            if unseen:
                some = ", ".join(f"'{u}'" for u in unseen[:5])
                first = at_first(data.splits[split], unseen[0], lambda r: r["tags"])
                problems.append(f"data.tags_column: {len(unseen)} tags of {split} are not in train: {some}{first}")
        if len(self.classes) < 2:
            problems.append(f"data.tags_column: train needs at least two tags, has {self.classes}")
        begun = sum(_begun_inside(r["tags"]) for r in data.splits["eval"]) if self.bio else 0
        if begun:
            self.notes.append(f"{begun} entities of eval begin with I-, not B-: strict scoring leaves them out")
        return problems

    def model_kwargs(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {c: i for i, c in enumerate(self.classes)},
        }

    def encode(self, records: Sequence[Record], tokenizer: Any, spec: DataSpec) -> list[Example]:
        """Label the first token of each word. Words beyond max_tokens, or that leave no token, are not scored.

        Raises ConfigError for a tokenizer that cannot tell which word a token comes from.
        """
        if not tokenizer.is_fast:
            raise ConfigError([f"model.tokenizer: TOKEN_CLS needs a fast tokenizer, got {type(tokenizer).__name__}"])
        texts = running_text.spaced(tokenizer, [r["tokens"] for r in records])
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
        cut = sum(len(r["tokens"]) for r in records) - sum(e.supervised for e in examples)
        if cut:
            self.notes.append(
                f"{cut} words in {len(records)} rows are not scored: beyond {spec.max_tokens} tokens or without any"
            )
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

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        predicted, true = [p["prediction"] for p in predictions], [p["label"] for p in predictions]
        score = entity_scores if self.bio else word_scores
        right = sum(a == b for p, t in zip(predicted, true, strict=True) for a, b in zip(p, t, strict=True))
        return {
            **score(predicted, true),
            "accuracy": right / sum(len(t) for t in true),
            "loss": mean_loss(predictions),
        }

    def readable(self, record: Record, prediction: Prediction) -> str:
        """Return the words with entities as `[New York](location)`, or as `word/TAG` for other tags."""
        tags = dict(zip(prediction["words"], prediction["prediction"], strict=True))
        words = record["tokens"]
        if not self.bio:
            return " ".join(f"{w}/{tags[i]}" if i in tags else w for i, w in enumerate(words))
        out: list[str] = []
        end = 0
        for kind, start, stop in entities([tags.get(i, OUTSIDE) for i in range(len(words))]):
            out += [*words[end:start], f"[{' '.join(words[start:stop])}]({kind})"]
            end = stop
        return " ".join([*out, *words[end:]])

    def baseline(self, data: Data, split: str) -> dict[str, float]:
        """Return the accuracy of always answering train's most frequent tag."""
        majority = Counter(t for r in data.splits["train"] for t in r["tags"]).most_common(1)[0][0]
        tags = [t for r in data.splits[split] for t in r["tags"]]
        return {"majority_accuracy": tags.count(majority) / len(tags)}


def is_bio(tags: Sequence[str]) -> bool:
    """Tell whether all tags but O begin with B- or I-, and there is one."""
    marked = [t for t in tags if t != OUTSIDE]
    return bool(marked) and all(t[:2] in ("B-", "I-") for t in marked)


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return type, first word and the word after the last of each entity: a B-x and the I-x that follow it."""
    out: list[tuple[str, int, int]] = []
    for i, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        if mark == "B":
            out.append((kind, i, i + 1))
        elif mark == "I" and out and out[-1][0] == kind and out[-1][2] == i:
            out[-1] = (kind, out[-1][1], i + 1)
    return out


def entity_scores(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return F1, precision and recall over all entities, seqeval's strict mode; 0 where there is no entity."""
    from seqeval.metrics.v1 import precision_recall_fscore_support
    from seqeval.scheme import IOB2

    lists = [list(t) for t in true], [list(p) for p in predicted]
    precision, recall, f1, _ = precision_recall_fscore_support(*lists, average="micro", scheme=IOB2, zero_division=0)
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall)}


def word_scores(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return F1, precision and recall of each tag over all words, as their mean over the tags that occur."""
    pairs = Counter((p, t) for row in zip(predicted, true, strict=True) for p, t in zip(*row, strict=True))
    guessed: Counter[str] = Counter()
    there: Counter[str] = Counter()
    for (p, t), count in pairs.items():
        guessed[p] += count
        there[t] += count
    tags = sorted(guessed.keys() | there.keys())
    precision = [pairs[t, t] / guessed[t] if guessed[t] else 0.0 for t in tags]
    recall = [pairs[t, t] / there[t] if there[t] else 0.0 for t in tags]
    f1 = [2 * pairs[t, t] / (guessed[t] + there[t]) for t in tags]
    return {k: sum(v) / len(tags) for k, v in (("f1", f1), ("precision", precision), ("recall", recall))}


def _losses(logits_BTC: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the summed cross-entropy of each row's labelled tokens, [B]."""
    return cross_entropy(logits_BTC.float().transpose(1, 2), labels_BT, reduction="none", ignore_index=IGNORE).sum(1)


def _begun_inside(tags: Sequence[str]) -> int:
    """Return how many entities begin with I-, as the older IOB1 scheme has it."""
    before = [OUTSIDE, *tags]
    return sum(t.startswith("I-") and before[i][2:] != t[2:] for i, t in enumerate(tags))
