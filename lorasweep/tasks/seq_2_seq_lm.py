"""SEQ_2_SEQ_LM: a source text, and a target that is learned; loss in nats a target token first.

Shapes: B rows, T target tokens, N supervised positions, D hidden, V words.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.data.dataset import Record
from lorasweep.errors import ConfigError
from lorasweep.tasks import generation, register, too_long
from lorasweep.tasks.causal_lm import TOKEN_METRICS, readable_tokens, row_sums, text_bytes, token_predictions
from lorasweep.tasks.lm_head import Head
from lorasweep.tasks.metric import Metric, Prediction
from lorasweep.tasks.task import IGNORE, Answer, Batch, Example, Fields, Task, free_length, in_order


@register
class Seq2SeqLM(Task):
    name = "SEQ_2_SEQ_LM"
    auto_class = "AutoModelForSeq2SeqLM"
    peft_type = "SEQ_2_SEQ_LM"
    most_loss_ratio = 3.0
    pipeline = "text2text-generation"
    builtin = "naming"
    answers_with: ClassVar[Mapping[str, Any]] = {"generate": True, "generate_samples": None}
    joins_decoder = True

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.tokenizer: Any = None
        self.start_id: int | None = None
        self.head = Head()

    @property
    def base_rate(self) -> float:
        return 1e-3

    def measures(self) -> Sequence[Metric]:
        return (*TOKEN_METRICS, *generation.measures()) if self.spec.generate else TOKEN_METRICS

    def ready(self) -> Sequence[Metric]:
        return generation.ready(self.spec)

    no_pairs = generation.NO_TEXTS

    def pairs(self, predictions: Sequence[Prediction]) -> dict[int, tuple[Any, Any]]:
        """Return the generated text, and the list of its references."""
        return {p["row"]: (p["text"], p["references"]) for p in predictions if generation.WRITTEN in p}

    def columns(self, spec: DataSpec) -> dict[str, str]:
        return {"source": spec.source_column, "target": spec.target_column}

    def trim(self, model: Any, new: Collection[str] | None = None) -> None:
        """Note the token that the decoder begins with. Raises ConfigError where the model has no such token."""
        self.start_id = model.config.decoder_start_token_id
        if self.start_id is None:
            raise ConfigError([f"model.pretrained: {type(model).__name__} has no decoder_start_token_id in its config"])

    def encode(self, records: Sequence[Record], tokenizer: Any, spec: DataSpec) -> list[Example]:
        """Supervise the target and its end token. A source's first example carries all of the source's targets."""
        self.tokenizer = tokenizer
        texts = {"text": [spec.source_prefix + str(r["source"]) for r in records]}
        written = {"text_target": [str(r["target"]) for r in records]}
        sources, cut = too_long.tokenised(tokenizer, texts, spec.max_tokens, return_token_type_ids=False)
        self.notes += too_long.cut_notes(spec, records, cut, "sources")
        targets, cut = too_long.tokenised(tokenizer, written, spec.max_target_tokens, return_token_type_ids=False)
        self.notes += too_long.cut_notes(spec, records, cut, "targets")
        references = self._references(records)
        return [
            Example(
                row=i,
                inputs={"input_ids": source},
                target=(labels := _without_start(target, tokenizer)),
                supervised=len(labels),
                info=references.get(i),
                text_bytes=text_bytes(
                    tokenizer,
                    target,
                    target,
                    None if i in cut else str(records[i]["target"]),
                ),
            )
            for i, (source, target) in enumerate(zip(sources["input_ids"], targets["input_ids"], strict=True))
        ]

    def _references(self, records: Sequence[Record]) -> dict[int, list[str]]:
        """Return first row -> targets of the sources that are answered by generation."""
        if not self.spec.generate:
            return {}
        first: dict[str, int] = {}
        targets: dict[int, list[str]] = {}
        for i, record in enumerate(records):
            row = first.setdefault(str(record["source"]), i)
            targets.setdefault(row, []).append(str(record["target"]))
        rows = list(targets)
        chosen = sorted(generation.chosen(len(rows), self.spec.generate_samples))
        return {rows[k]: targets[rows[k]] for k in chosen}

    def labels(self, examples: Sequence[Example], length: int) -> Tensor:
        """Return the targets [B, T], padded to the longest of them; `length` is that of the sources."""
        table = torch.full((len(examples), _longest_target(examples)), IGNORE)
        for i, e in enumerate(examples):
            table[i, : len(e.target)] = torch.tensor(e.target)
        return table

    def collate(
        self,
        groups: Sequence[Sequence[Example]],
        pad_id: int,
        device: torch.device | str = "cpu",
        taken: Collection[int] = (),
    ) -> Batch:
        """Return the batch of the sources; the decoder reads the targets shifted right behind its start token."""
        assert self.start_id is not None, "trim has not seen the model"
        batch = super().collate(groups, pad_id, device, taken)
        labels_BT = batch.labels
        width = labels_BT.shape[1]
        more = free_length(width, batch.lengths) - width if len(groups) > 1 else 0
        labels_BT = nn.functional.pad(labels_BT, (0, more), value=IGNORE)
        shifted_BT = labels_BT.roll(1, 1).masked_fill(labels_BT.roll(1, 1) == IGNORE, pad_id)
        shifted_BT[:, 0] = self.start_id
        own = tuple(map(_longest_target, groups))
        inputs = {**batch.inputs, "decoder_input_ids": shifted_BT}
        return replace(batch, inputs=inputs, labels=labels_BT, lengths={**batch.lengths, width + more: own})

    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        return row_sums(batch, *self._token_losses(model, batch)[:2])

    def predict(self, model: Any, batch: Batch) -> list[Prediction]:
        found = token_predictions(batch, *self._token_losses(model, batch))
        asked = [i for i, references in enumerate(batch.infos) if references]
        if asked:
            ids_BT, mask_BT = batch.inputs["input_ids"][asked], batch.inputs["attention_mask"][asked]
            texts = generation.greedy(model, ids_BT, mask_BT, self.tokenizer, self.spec.max_new_tokens)
            for i, text in zip(asked, texts, strict=True):
                found[i] |= {"text": text, "references": batch.infos[i]}
        return found

    def fields(self, spec: DataSpec) -> Fields:
        return Fields(("source",))

    def blank(self, fields: Record) -> Record:
        return fields | {"target": "."}

    def answer(self, model: Any, batches: Sequence[Batch], records: Sequence[Record]) -> list[Answer]:
        return in_order({p["row"]: {"text": p["text"]} for p in self.predictions(model, batches)})

    def answer_columns(self) -> dict[str, str]:
        return {"text": "string"}

    def line(self, answer: Answer) -> str:
        return answer["text"].replace("\n", "\\n")

    def readable(self, record: Record, prediction: Prediction) -> str:
        if "text" in prediction:
            return prediction["text"]
        return readable_tokens(prediction)

    def _token_losses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, row and hit of each target token, [N] each; position t of the logits meets label t."""
        return self.head.losses(model, batch.inputs, batch.labels)


def _without_start(ids: list[int], tokenizer: Any) -> list[int]:
    """Return a target without BERT's leading [CLS]: there the decoder begins with it, so nothing has to predict it."""
    starts = tokenizer.bos_token_id is None and tokenizer.cls_token_id is not None and ids[0] == tokenizer.cls_token_id
    return ids[1:] if starts else ids


def _longest_target(group: Sequence[Example]) -> int:
    return max(len(e.target) for e in group)
