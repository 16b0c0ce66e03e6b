"""FEATURE_EXTRACTION: texts to vectors whose cosine says how alike they are.

Two kinds of data. Pairs with a score: the cosine is fitted to the score by squared error; spearman first. Anchors with
a positive (and a negative): the anchor finds its positive among the slot's others by a softmax; recall_at_1 first.

Shapes: B rows, T tokens, D hidden, C candidates, N rows of a split.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.data.dataset import Data, Record
from lorasweep.errors import ConfigError
from lorasweep.tasks.task import Batch, Example, Prediction, Task, mean_loss

PAIR_METRICS: tuple[str, ...] = ("spearman", "pearson", "loss")
SEARCH_METRICS: tuple[str, ...] = ("recall_at_1", "recall_at_10", "mrr", "loss")

EVAL_ROWS = 64
"""Anchors that the evaluation's loss sees at once, in the order of the split: it depends on no batch size."""


class FeatureExtraction(Task):
    name = "FEATURE_EXTRACTION"
    auto_class = "AutoModel"
    metric_names: tuple[str, ...] = SEARCH_METRICS

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.low, self.high = 0.0, 1.0
        """Lowest and highest score of train."""

    @property
    def scored(self) -> bool:
        """Whether the data are pairs with a score."""
        return self.metric_names == PAIR_METRICS

    @property
    def divisible(self) -> bool:
        """Rows of a pass are one another's wrong answers, unless pairs have scores."""
        return self.scored

    def columns(self, spec: DataSpec) -> dict[str, str]:
        self.metric_names = PAIR_METRICS if spec.score_column else SEARCH_METRICS
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
        wrong = [f"data.score_column: {p}" for name, rows in data.splits.items() for p in _not_numbers(rows, name)]
        if wrong:
            return wrong
        scores = [float(r["score"]) for r in data.splits["train"]]
        self.low, self.high = min(scores), max(scores)
        if self.low == self.high:
            return [f"data.score_column: train needs different scores, all are {self.low:g}"]
        return []

    def trim(self, model: Any) -> None:
        """Take off the pooler, whose output nobody reads. Raises ConfigError for an encoder-decoder."""
        if model.config.is_encoder_decoder:
            raise ConfigError(
                [f"model.pretrained: FEATURE_EXTRACTION takes no encoder-decoder ({type(model).__name__})"]
            )
        if getattr(model, "pooler", None) is not None:
            model.pooler = None

    def encode(self, records: Sequence[Record], tokenizer: Any, spec: DataSpec) -> list[Example]:
        """The first text is the example's input; the target holds the others' inputs and the score from 0 to 1."""
        names = [n for n in ("text", "text_pair", "anchor", "positive", "negative") if n in records[0]]
        texts = [
            tokenizer(
                [str(r[name]) for r in records],
                truncation=True,
                max_length=spec.max_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
            for name in names
        ]
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
            parts = [[replace(e, inputs={"input_ids": e.target[0][k]}) for e in group] for group in groups]
            made.append(super().collate(parts, pad_id, device, lengths if len(groups) > 1 else ()))
            lengths |= made[-1].lengths
        tokens = tuple(map(sum, zip(batch.tokens, *(o.tokens for o in made), strict=True)))
        return replace(batch, others=tuple(o.inputs for o in made), tokens=tokens, lengths=lengths)

    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        return self._losses(embeddings(model, batch), batch)

    def _losses(self, vectors: Sequence[Tensor], batch: Batch) -> Tensor:
        if self.scored:
            return ((vectors[0] * vectors[1]).sum(-1) - batch.labels) ** 2
        parts = batch.groups or (slice(None),)
        infos = batch.infos
        return torch.cat(
            [search_losses([v_BD[part] for v_BD in vectors], infos[part], self.spec.temperature) for part in parts]
        )

    def predict(self, model: Any, batch: Batch) -> list[Prediction]:
        """Return cosine and score of each pair, or the vectors of each row, on the CPU; `loss` is the batch's."""
        vectors = embeddings(model, batch)
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

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        if self.scored:
            from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

            cosines = torch.tensor([p["cosine"] for p in predictions], dtype=torch.float64)
            scores = torch.tensor([p["score"] for p in predictions], dtype=torch.float64)
            return {
                "spearman": float(spearman_corrcoef(cosines, scores)),
                "pearson": float(pearson_corrcoef(cosines, scores)),
                "loss": mean_loss(predictions),
            }
        infos = [p["info"] for p in predictions]
        vectors = [torch.stack(list(column)) for column in zip(*(p["vectors"] for p in predictions), strict=True)]
        ranks_N = search_ranks(vectors[0], vectors[1], infos).double()
        return {
            "recall_at_1": float((ranks_N <= 1).double().mean()),
            "recall_at_10": float((ranks_N <= 10).double().mean()),
            "mrr": float((1 / ranks_N).mean()),
            "loss": float(batch_losses(vectors, infos, self.spec.temperature).double().mean()),
        }

    def readable(self, record: Record, prediction: Prediction) -> str:
        cosine = prediction["cosine"] if self.scored else float(prediction["vectors"][0] @ prediction["vectors"][1])
        return f"cosine {cosine:.3f}"

    def baseline(self, data: Data, split: str) -> dict[str, float]:
        """Return the recall of naming a candidate at random."""
        if self.scored:
            return {}
        return {"random_recall_at_1": 1 / len({str(r["positive"]) for r in data.splits[split]})}


def embeddings(model: Any, batch: Batch) -> list[Tensor]:
    """Return the unit vectors of each text column, [B, D] each: the mean over the tokens that are not padding."""
    out = []
    for inputs in (batch.inputs, *batch.others):
        hidden_BTD = model(**inputs).last_hidden_state
        weights_BT1 = inputs["attention_mask"][..., None].float()
        out.append(normalize((hidden_BTD.float() * weights_BT1).sum(1) / weights_BT1.sum(1), dim=-1))
    return out


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
    return torch.cat([search_losses([v_ND[part] for v_ND in vectors], infos[part], temperature) for part in parts])


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
