"""FEATURE_EXTRACTION: texts to vectors whose cosine says how alike they are.

Two kinds of data. Pairs with a score: the cosine is fitted to the score by squared error; spearman first. Anchors with
a positive (and a negative): the anchor finds its positive among the slot's others by a softmax; recall_at_1 first.

Shapes: B rows, T tokens, D hidden, C candidates, N rows of a split.
"""

import functools
import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.data.dataset import Data, Record
from lorasweep.errors import ConfigError
from lorasweep.tasks import register, too_long
from lorasweep.tasks.metric import CORRELATION, Metric, Pairs, Prediction, by_row, pearson, ratio, spearman, summed_loss
from lorasweep.tasks.task import Answer, Batch, Example, Fields, Task, in_order

PAIR_LOSS = Metric("loss", summed_loss, ratio, (0.0, math.inf), "squared error", maximize=False)

SHOWN = 8
"""Numbers of an embedding in a line for people."""

EVAL_ROWS = 64
"""Anchors that the evaluation's loss sees at once, in the order of the split: it depends on no batch size."""


@register
class FeatureExtraction(Task):
    name = "FEATURE_EXTRACTION"
    auto_class = "AutoModel"
    peft_type = "FEATURE_EXTRACTION"
    pipeline = "feature-extraction"
    builtin = "described"
    state = ("low", "high")
    pools = True

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.low, self.high = 0.0, 1.0
        """Lowest and highest score of train."""
        self.scored = False
        """Whether the data are pairs with a score."""
        self._ranked: tuple[Any, list[int]] = (None, [])
        """Predictions and their ranks: three metrics read them."""

    def measures(self) -> Sequence[Metric]:
        if self.scored:
            return (
                Metric("spearman", by_row(_cosine_and_score), spearman, **CORRELATION),
                Metric("pearson", by_row(_cosine_and_score), pearson, **CORRELATION),
                PAIR_LOSS,
            )
        return (
            Metric("recall_at_1", functools.partial(self._within, 1), ratio),
            Metric("recall_at_10", functools.partial(self._within, 10), ratio),
            Metric("mrr", self._reciprocal, ratio),
            Metric("loss", self._search_losses, ratio, (0.0, math.inf), "nats", maximize=False),
        )

    def _ranks(self, predictions: Sequence[Prediction]) -> dict[int, int]:
        """Return the rank of each row's positive among the candidates of all rows."""
        if self._ranked[0] is not predictions:
            vectors, infos = _columns(predictions)
            self._ranked = predictions, search_ranks(vectors[0], vectors[1], infos).tolist()
        return dict(zip((p["row"] for p in predictions), self._ranked[1], strict=True))

    def _within(self, limit: int, predictions: Sequence[Prediction]) -> Pairs:
        return {row: (rank <= limit, 1) for row, rank in self._ranks(predictions).items()}

    def _reciprocal(self, predictions: Sequence[Prediction]) -> Pairs:
        return {row: (1 / rank, 1) for row, rank in self._ranks(predictions).items()}

    def _search_losses(self, predictions: Sequence[Prediction]) -> Pairs:
        """Return each anchor's own loss, among the texts that it is evaluated with."""
        vectors, infos = _columns(predictions)
        losses = batch_losses(vectors, infos, self.spec.temperature).tolist()
        return {p["row"]: (loss, 1) for p, loss in zip(predictions, losses, strict=True)}

    def undefined(self, data: Data, split: str) -> dict[str, str]:
        if not self.scored or len({float(r["score"]) for r in data.splits[split]}) > 1:
            return {}
        return dict.fromkeys(("spearman", "pearson"), "all scores are equal")

    @property
    def base_rate(self) -> float:
        """Of anchors and positives: the rows of a pass teach one another, and a lower rate is usual."""
        return super().base_rate if self.scored else 1e-4

    @property
    def divisible(self) -> bool:
        """Rows of a pass are one another's wrong answers, unless pairs have scores."""
        return self.scored

    def columns(self, spec: DataSpec) -> dict[str, str]:
        self.scored = spec.score_column is not None
        if spec.score_column:
            return {"text": spec.text_column, "text_pair": str(spec.text_pair_column), "score": spec.score_column}
        columns = {"anchor": spec.anchor_column, "positive": spec.positive_column}
        return columns | ({"negative": spec.negative_column} if spec.negative_column else {})

    def fit(self, data: Data) -> list[str]:
        """Learn the range of the scores."""
        if not self.scored:
            return []
        if "score" not in data.splits["train"][0]:
            return [f"data.score_column: {data.name} has no scores; set it to null"]
        wrong = list(chain.from_iterable(_not_numbers(rows, split) for split, rows in data.splits.items()))
        if wrong:
            return [f"data.score_column: {problem}" for problem in wrong]
        scores = [float(r["score"]) for r in data.splits["train"]]
        self.low, self.high = min(scores), max(scores)
        if self.low == self.high:
            return [f"data.score_column: train needs different scores, all are {self.low:g}"]
        return []

    def trim(self, model: Any, new: Collection[str] | None = None) -> None:
        """Take off the pooler, whose output nobody reads. Raises ConfigError for an encoder-decoder."""
        if model.config.is_encoder_decoder:
            raise ConfigError(
                [f"model.pretrained: FEATURE_EXTRACTION takes no encoder-decoder ({type(model).__name__})"]
            )
        if getattr(model, "pooler", None) is not None:
            model.pooler = None

    def prefixes(self, spec: DataSpec, prompts: Mapping[str, str]) -> dict[str, str]:
        """Return what stands before anchors, the prompt for queries, and before the others, that for documents."""
        every = prompts.get("", "")
        first = prompts.get("STS", every) if self.scored else prompts.get("query", every)
        second = next((prompts[name] for name in ("document", "passage") if name in prompts), every)
        found = {"anchor_prefix": first} | ({} if self.scored else {"positive_prefix": second})
        return {key: text for key, text in found.items() if getattr(spec, key) is None}

    def encode(self, records: Sequence[Record], tokenizer: Any, spec: DataSpec) -> list[Example]:
        """The first text is the example's input; the target holds the others' inputs and the score from 0 to 1."""
        names = [n for n in ("text", "text_pair", "anchor", "positive", "negative") if n in records[0]]
        texts = []
        for name in names:
            column = {"text": [_prefix(name, spec) + str(record[name]) for record in records]}
            tokens, cut = too_long.tokenised(tokenizer, column, spec.max_tokens, return_token_type_ids=False)
            texts.append(tokens["input_ids"])
            self.notes += too_long.cut_notes(spec, records, cut, f"texts in '{name}'")
        examples = []
        for i, record in enumerate(records):
            score = (float(record["score"]) - self.low) / (self.high - self.low) if self.scored else 0.0
            others = [ids[i] for ids in texts[1:]]
            info = (tuple(texts[0][i]), tuple(others[0]))
            examples.append(
                Example(row=i, inputs={"input_ids": texts[0][i]}, target=(others, score), supervised=1, info=info)
            )
        return examples

    def labels(self, examples: Sequence[Example], length: int) -> Tensor:
        return torch.tensor([e.target[1] for e in examples], dtype=torch.float32)

    def collate(
        self,
        groups: Sequence[Sequence[Example]],
        pad_id: int,
        device: torch.device | str = "cpu",
        taken: Collection[int] = (),
    ) -> Batch:
        """Return the batch of the first texts, with the inputs of the second (and third) in `others`."""
        batch = super().collate(groups, pad_id, device, taken)
        lengths = dict(batch.lengths)
        made: list[Batch] = []
        for k in range(len(groups[0][0].target[0])):
            parts = [_with_text(group, k) for group in groups]
            made.append(super().collate(parts, pad_id, device, lengths if len(groups) > 1 else ()))
            lengths |= made[-1].lengths
        tokens = tuple(map(sum, zip(batch.tokens, *(o.tokens for o in made), strict=True)))
        return replace(batch, others=tuple(o.inputs for o in made), tokens=tokens, lengths=lengths)

    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        return self._losses(embeddings(model, batch, self.pooling), batch)

    def _losses(self, vectors: Sequence[Tensor], batch: Batch) -> Tensor:
        if self.scored:
            return ((vectors[0] * vectors[1]).sum(-1) - batch.labels) ** 2
        return _losses_of(vectors, batch.infos, batch.groups or (slice(None),), self.spec.temperature)

    def predict(self, model: Any, batch: Batch) -> list[Prediction]:
        """Return cosine and score of each pair, or the vectors of each row, on the CPU; `loss` is the batch's."""
        vectors = embeddings(model, batch, self.pooling)
        losses = self._losses(vectors, batch).tolist()
        found: list[Prediction] = [
            {"row": r, "loss": loss, "supervised": 1} for r, loss in zip(batch.rows, losses, strict=True)
        ]
        if self.scored:
            cosines = (vectors[0] * vectors[1]).sum(-1).tolist()
            for p, cosine, score in zip(found, cosines, batch.labels.tolist(), strict=True):
                p |= {"cosine": cosine, "score": score}
            return found
        kept = [v_BD.cpu() for v_BD in vectors]
        for i, p in enumerate(found):
            p |= {"vectors": [v_BD[i] for v_BD in kept], "info": batch.infos[i]}
        return found

    def pairs(self, predictions: Sequence[Prediction]) -> dict[int, tuple[Any, Any]]:
        """Return cosine and score of each pair."""
        return {p["row"]: (p["cosine"], p["score"]) for p in predictions} if self.scored else {}

    def fields(self, spec: DataSpec) -> Fields:
        return Fields(("text",), ("text_pair",)) if self.scored else Fields(("anchor",), ("positive",))

    def blank(self, fields: Record) -> Record:
        """Return two texts, the first again where there is one."""
        second = "text_pair" if "text" in fields else "positive"
        return {second: next(iter(fields.values())), **fields, "score": self.low}

    def encode_input(self, fields: Record, tokenizer: Any, spec: DataSpec) -> list[Example]:
        examples = super().encode_input(fields, tokenizer, spec)
        return [replace(e, target=([], 0.0)) for e in examples] if len(fields) == 1 else examples

    def shape(self, example: Example) -> Hashable:
        """Return how many texts there are beside the first."""
        return len(example.target[0])

    def answer(self, model: Any, batches: Sequence[Batch], records: Sequence[Record]) -> list[Answer]:
        """Return the cosine of a pair, the unit vector of a text."""
        found: dict[int, Answer] = {}
        for batch in batches:
            vectors = embeddings(model, batch, self.pooling)
            if len(vectors) > 1:
                cosines = (vectors[0] * vectors[1]).sum(-1).tolist()
                found |= {row: {"similarity": v} for row, v in zip(batch.rows, cosines, strict=True)}
            else:
                found |= {row: {"embedding": v} for row, v in zip(batch.rows, vectors[0].tolist(), strict=True)}
        return in_order(found)

    def answer_columns(self) -> dict[str, str]:
        return {"embedding": "doubles"}

    def line(self, answer: Answer) -> str:
        if "similarity" in answer:
            return f"{answer['similarity']:.4f}"
        numbers = answer["embedding"]
        return f"{len(numbers)} numbers: {' '.join(f'{v:.4f}' for v in numbers[:SHOWN])} ..."

    def readable(self, record: Record, prediction: Prediction) -> str:
        cosine = prediction["cosine"] if self.scored else float(prediction["vectors"][0] @ prediction["vectors"][1])
        return f"cosine {cosine:.3f}"

    def baseline(self, data: Data, split: str) -> dict[str, float]:
        """Return the recall of naming a candidate at random."""
        if self.scored:
            return {}
        return {"random_recall_at_1": 1 / len({str(r["positive"]) for r in data.splits[split]})}


def _cosine_and_score(prediction: Prediction) -> tuple[float, float]:
    return prediction["cosine"], prediction["score"]


def _columns(predictions: Sequence[Prediction]) -> tuple[list[Tensor], list[Any]]:
    """Return the vectors of each text column, [N, D] each, and what tells equal texts."""
    columns = zip(*map(itemgetter("vectors"), predictions), strict=True)
    vectors = [torch.stack(list(column)) for column in columns]
    return vectors, [p["info"] for p in predictions]


def _prefix(name: str, spec: DataSpec) -> str:
    return (spec.anchor_prefix if name in ("text", "text_pair", "anchor") else spec.positive_prefix) or ""


def embeddings(model: Any, batch: Batch, pooling: str = "mean") -> list[Tensor]:
    """Return the unit vectors of each text column, [B, D] each."""
    out = []
    for inputs in (batch.inputs, *batch.others):
        hidden_BTD = model(**inputs).last_hidden_state.float()
        out.append(normalize(pooled(hidden_BTD, inputs["attention_mask"], pooling), dim=-1))
    return out


def pooled(hidden_BTD: Tensor, mask_BT: Tensor, pooling: str) -> Tensor:
    """Return one vector of each text, [B, D]: the mean of the tokens that are not padding, their first or last."""
    if pooling == "mean":
        weights_BT1 = mask_BT[..., None].float()
        return (hidden_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)
    places_T = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    order_T = places_T if pooling == "last" else places_T.flip(0)
    chosen_B = (mask_BT.to(places_T.dtype) * order_T).argmax(1)
    return hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), chosen_B]


def search_losses(vectors: Sequence[Tensor], infos: Sequence[Any], temperature: float) -> Tensor:
    """Return the cross-entropy [B] of each anchor's own positive among the positives and negatives of all rows.

    Another row's positive does not count against an anchor where either of the two texts is the same.
    """
    anchors_BD, candidates_CD = vectors[0], torch.cat(list(vectors[1:]))
    logits_BC = anchors_BD @ candidates_CD.T / temperature
    right_BB = _equal([i[0] for i in infos]) | _equal([i[1] for i in infos])
    right_BB.fill_diagonal_(False)
    hidden_BC = torch.zeros(logits_BC.shape, dtype=torch.bool)
    hidden_BC[:, : len(infos)] = right_BB
    logits_BC = logits_BC.masked_fill(hidden_BC.to(logits_BC.device), -torch.inf)
    return cross_entropy(logits_BC, torch.arange(len(infos), device=logits_BC.device), reduction="none")


def batch_losses(vectors: Sequence[Tensor], infos: Sequence[Any], temperature: float) -> Tensor:
    """Return the loss [N] of each anchor among the EVAL_ROWS rows that stand together."""
    parts = [slice(i, i + EVAL_ROWS) for i in range(0, len(infos), EVAL_ROWS)]
    return _losses_of(vectors, infos, parts, temperature)


def _losses_of(vectors: Sequence[Tensor], infos: Sequence[Any], parts: Iterable[slice], temperature: float) -> Tensor:
    """Return the loss [N] of each anchor among the rows of its part."""
    out = []
    for part in parts:
        out.append(search_losses([v_ND[part] for v_ND in vectors], infos[part], temperature))
    return torch.cat(out)


def _with_text(group: Sequence[Example], k: int) -> list[Example]:
    """Return the examples with their text number k behind the first as the input."""
    return [replace(e, inputs={"input_ids": e.target[0][k]}) for e in group]


def search_ranks(anchors_ND: Tensor, positives_ND: Tensor, infos: Sequence[Any]) -> Tensor:
    """Return the rank [N] of each anchor's positive among the split's distinct positives, 1 first.

    Candidates that score as high count as better, so that equal vectors find nothing. Other positives of the same
    anchor do not count.
    """
    first: dict[Any, int] = {}
    places: dict[Any, set[int]] = {}
    for i, (anchor, positive) in enumerate(infos):
        first.setdefault(positive, i)
        places.setdefault(anchor, set()).add(first[positive])
    column = {row: c for c, row in enumerate(first.values())}
    candidates_CD = positives_ND[list(first.values())]
    ranks = []
    for i, (anchor, positive) in enumerate(infos):
        cosines_C = candidates_CD @ anchors_ND[i]
        own = column[first[positive]]
        others = [column[row] for row in places[anchor] if column[row] != own]
        better = int((cosines_C >= cosines_C[own]).sum()) - 1 - int((cosines_C[others] >= cosines_C[own]).sum())
        ranks.append(1 + better)
    return torch.tensor(ranks)


def _equal(keys: Sequence[Any]) -> Tensor:
    """Return which keys are equal, [B, B]."""
    numbers: dict[Any, int] = {}
    ids_B = torch.tensor([numbers.setdefault(k, len(numbers)) for k in keys])
    return ids_B[:, None] == ids_B[None]


def _not_numbers(rows: Sequence[Mapping[str, Any]], split: str) -> list[str]:
    """Return a problem where scores are no finite numbers."""
    for number, row in enumerate(rows, 1):
        try:
            good = abs(float(row["score"])) < float("inf")
        except (TypeError, ValueError):
            good = False
        if not good:
            return [f"must hold finite numbers, {split} has {row['score']!r} in its row {number}"]
    return []
