"""QUESTION_ANS: the span of a context that answers a question, or none; F1 first.

A long context becomes several windows that overlap, each an example of the same row; metrics take a row's best window.
Scores are SQuAD 2.0's. Where the context is mostly Chinese or Japanese they are CMRC 2018's, which count characters.
Sources: arXiv:1806.03822 and arXiv:1810.07366, each with its evaluation script.

Shapes: B windows, T tokens, S lengths of a span.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.data.dataset import Data, Record
from lorasweep.data.table import place_of
from lorasweep.errors import ConfigError
from lorasweep.tasks import register, special_tokens
from lorasweep.tasks.metric import LOSS, Metric, Pairs, Prediction, ratio
from lorasweep.tasks.task import Answer, Batch, Example, Fields, Task, in_order
from lorasweep.tasks.token_lengths import UNCUT

MAX_ANSWER_TOKENS = 30
"""Longest span that is predicted, as in BERT's own SQuAD code."""

MAX_MISPLACED = 0.05
"""Share of records with an answer that is not where it should be, above which the data is refused."""

CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Kana and Chinese characters: a token each in CMRC's scores."""

CMRC_PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》…·、「」（）－～『』")  # noqa: RUF001
"""Left out of CMRC's scores; its script strips these and no others."""


@dataclass(frozen=True)
class Window:
    """What scoring needs of one window of a context."""

    offsets: Sequence[tuple[int, int] | None]
    """Where each token lies in the context; None for tokens outside it."""
    null: int
    """Position that stands for `no answer`: the CLS token, or the first where the tokenizer has none."""
    context: str
    answers: tuple[str, ...]
    by_character: bool
    """Score by CMRC's rule."""

    def text(self, start: int, end: int) -> str:
        """Return the context from token `start` to token `end`, both in it and included."""
        first, last = self.offsets[start], self.offsets[end]
        assert first is not None and last is not None
        return self.context[first[0] : last[1]].strip()


@register
class QuestionAns(Task):
    name = "QUESTION_ANS"
    auto_class = "AutoModelForQuestionAnswering"
    head_names = ("qa_outputs",)
    peft_type = "QUESTION_ANS"
    pipeline = "question-answering"
    builtin = "returned"
    state = ("may_abstain",)
    held = (Window,)

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.may_abstain = False
        """Whether train holds a question without an answer; if not, none is ever predicted."""

    def measures(self) -> Sequence[Metric]:
        return (Metric("f1", self._f1, ratio), Metric("exact_match", self._exact, ratio), LOSS)

    def _f1(self, predictions: Sequence[Prediction]) -> Pairs:
        return {row: (f1, 1) for row, (f1, _) in self._scores(predictions).items()}

    def _exact(self, predictions: Sequence[Prediction]) -> Pairs:
        return {row: (exact, 1) for row, (_, exact) in self._scores(predictions).items()}

    def _scores(self, predictions: Sequence[Prediction]) -> dict[int, tuple[float, float]]:
        """Return F1 and exact match of each row's answer."""
        facts = {p["row"]: p for p in predictions}
        texts = self.answers(predictions)
        return {row: score(text, facts[row]["answers"], facts[row]["by_character"]) for row, text in texts.items()}

    def columns(self, spec: DataSpec) -> dict[str, str]:
        if spec.source == "squad":
            return {name: name for name in ("question", "context", "answers", "group")}
        return {"question": spec.question_column, "context": spec.context_column, "answers": spec.answers_column}

    def fit(self, data: Data) -> list[str]:
        self.may_abstain = any(not r["answers"] for r in data.splits["train"])
        problems = []
        for split, records in data.splits.items():
            misplaced = [_misplaced(record) for record in records]
            bad = [i for i, answers in enumerate(misplaced) if answers]
            if not bad:
                continue
            example = misplaced[bad[0]][0]
            found = (
                f"{len(bad)} of {len(records)} records of {split} have an answer that the context does not hold at its "
                f"start, e.g. '{example['text'][:40]}' at {example['start']}"
            )
            if len(bad) > max(1, MAX_MISPLACED * len(records)):
                problems.append(f"data.answers_column: {found}; at most {MAX_MISPLACED:.0%} may")
            self.notes.append(f"{found}; these answers are left out")
        return problems

    def encode(self, records: Sequence[Record], tokenizer: Any, spec: DataSpec) -> list[Example]:
        """Return the windows of all records. A window that does not hold the whole answer is labelled as without one.

        A record whose answers are all misplaced is left out; a question takes at most half of the tokens.
        Raises ConfigError for a tokenizer that keeps no offsets, and for too few tokens.
        """
        if not tokenizer.is_fast:
            raise ConfigError([f"model.tokenizer: QUESTION_ANS needs a fast tokenizer, got {type(tokenizer).__name__}"])
        limit = spec.max_tokens or UNCUT
        free = limit - tokenizer.num_special_tokens_to_add(pair=True)
        if free < 4:
            raise ConfigError([f"data.max_tokens: must leave 4 tokens for question and context, leaves {free}"])
        rows = [i for i, r in enumerate(records) if not r["answers"] or _placed(r)]
        asked = special_tokens.bare(tokenizer, [records[i]["question"].strip() for i in rows])
        questions = _cut(asked, tokenizer, free // 2)
        start = special_tokens.written_out(tokenizer)[0]
        by_stride: dict[int, list[int]] = defaultdict(list)
        for k, (_, length) in enumerate(questions):
            by_stride[min(spec.doc_stride, (free - length) * 3 // 4)].append(k)
        examples: list[Example] = []
        for stride, members in by_stride.items():
            tokens = tokenizer(
                [questions[k][0] for k in members],
                [_without(start, records[rows[k]]["context"]) for k in members],
                truncation="only_second",
                max_length=limit,
                stride=stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_attention_mask=False,
            )
            examples += _windows(tokens, [rows[k] for k in members], records, tokenizer.cls_token_id)
        cut = [rows[k] for k, (text, _) in enumerate(questions) if text != asked[k]]
        self.notes += _lost_notes(records, cut, examples, spec)
        return sorted(examples, key=lambda e: e.row)

    def labels(self, examples: Sequence[Example], length: int) -> Tensor:
        """Return first and last token of the answer, [B, 2]."""
        return torch.tensor([e.target for e in examples])

    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        return _losses(*_logits(model, batch), batch.labels)

    def predict(self, model: Any, batch: Batch) -> list[Prediction]:
        """Return, a window, its best span with the score and the score of no answer."""
        starts_BT, ends_BT = _logits(model, batch)
        losses = _losses(starts_BT, ends_BT, batch.labels).tolist()
        scores_B, first_B, last_B = best_spans(starts_BT, ends_BT, _in_context(batch).to(starts_BT.device))
        spans = zip(scores_B.tolist(), first_B.tolist(), last_B.tolist(), strict=True)
        places_B = torch.tensor([window.null for window in batch.infos], device=starts_BT.device)[:, None]
        nulls = (starts_BT.gather(1, places_B) + ends_BT.gather(1, places_B))[:, 0].tolist()
        out = []
        for i, (score, first, last) in enumerate(spans):
            window = batch.infos[i]
            out.append(
                {
                    "row": batch.rows[i],
                    "loss": losses[i],
                    "supervised": 1,
                    "prediction": window.text(first, last) if score > float("-inf") else "",
                    "score": score,
                    "null_score": nulls[i],
                    "answers": window.answers,
                    "by_character": window.by_character,
                }
            )
        return out

    def answers(self, predictions: Iterable[Prediction]) -> dict[int, str]:
        """Return the answer to each row out of all its windows, empty for no answer."""
        windows: dict[int, list[Prediction]] = defaultdict(list)
        for p in predictions:
            windows[p["row"]].append(p)
        return {row: self._answer(found) for row, found in windows.items()}

    def pairs(self, predictions: Sequence[Prediction]) -> dict[int, tuple[Any, Any]]:
        """Return the answer to each row's question, and the list of right ones."""
        facts = {p["row"]: p["answers"] for p in predictions}
        return {row: (text, list(facts[row])) for row, text in self.answers(predictions).items()}

    def fields(self, spec: DataSpec) -> Fields:
        return Fields(("question", "context"))

    def blank(self, fields: Record) -> Record:
        return fields | {"answers": []}

    def answer(self, model: Any, batches: Sequence[Batch], records: Sequence[Record]) -> list[Answer]:
        """Return the best answer of all windows, "" for none."""
        texts = self.answers(self.predictions(model, batches))
        return in_order({row: {"answer": text} for row, text in texts.items()})

    def answer_columns(self) -> dict[str, str]:
        return {"answer": "string"}

    def line(self, answer: Answer) -> str:
        return answer["answer"].replace("\n", "\\n") or "(no answer)"

    def readable(self, record: Record, prediction: Prediction) -> str:
        """Return the answer of one window; `answers` has that of a whole row."""
        return self._answer([prediction]) or "(no answer)"

    def baseline(self, data: Data, split: str) -> dict[str, float]:
        """Return the F1 of never answering, where train has questions without an answer."""
        if not self.may_abstain:
            return {}
        rows = [r for r in data.splits[split] if not r["answers"] or _placed(r)]
        return {"no_answer_f1": sum(not r["answers"] for r in rows) / len(rows)}

    def _answer(self, windows: Sequence[Prediction]) -> str:
        """Return the best span, or nothing where the least null score of the windows is above the best span's."""
        best = max(windows, key=lambda p: p["score"])
        silent = self.may_abstain and min(p["null_score"] for p in windows) > best["score"]
        return "" if silent else best["prediction"]


# --- windows ---------------------------------------------------------------------------------------------------------


def _in_place(context: str, answer: Mapping[str, Any]) -> bool:
    return answer["start"] >= 0 and context.startswith(answer["text"], answer["start"])


def _placed(record: Record) -> list[Mapping[str, Any]]:
    """Return the answers that the context holds where they say."""
    return [a for a in record["answers"] if _in_place(record["context"], a)]


def _cut(questions: Sequence[str], tokenizer: Any, limit: int) -> list[tuple[str, int]]:
    """Return each question, of at most `limit` tokens, and its number of tokens."""
    if not questions:
        return []
    tokens = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True)
    out = []
    for text, offsets in zip(questions, tokens["offset_mapping"], strict=True):
        out.append((text[: offsets[limit - 1][1]] if len(offsets) > limit else text, min(len(offsets), limit)))
    return out


def _windows(tokens: Any, rows: Sequence[int], records: Sequence[Record], cls_id: int | None) -> list[Example]:
    """Return the examples of tokenised windows; rows[k] is the row of the k-th text that was tokenised."""
    names = [k for k in tokens if k not in ("offset_mapping", "overflow_to_sample_mapping")]
    examples = []
    judged: dict[int, tuple[tuple[str, ...], bool]] = {}
    for i, k in enumerate(tokens["overflow_to_sample_mapping"]):
        row, context = rows[k], records[rows[k]]["context"]
        answers = _placed(records[row])
        if row not in judged:
            judged[row] = tuple(a["text"] for a in answers), counts_characters(context)
        places = zip(tokens["offset_mapping"][i], tokens.sequence_ids(i), strict=True)
        offsets = [tuple(place) if part == 1 and place[1] > place[0] else None for place, part in places]
        ids = tokens["input_ids"][i]
        null = ids.index(cls_id) if cls_id in ids else 0
        target = _target(offsets, answers[0]) if answers else None
        window = Window(offsets, null, context, *judged[row])
        inputs = {n: tokens[n][i] for n in names}
        examples.append(Example(row=row, inputs=inputs, target=target or (null, null), supervised=1, info=window))
    return examples


def _target(offsets: Sequence[tuple[int, ...] | None], answer: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return first and last token of the answer, or None where the window does not hold all of it."""
    start, end = answer["start"], answer["start"] + len(answer["text"])
    inside = [(t, place) for t, place in enumerate(offsets) if place]
    over = [(t, place) for t, place in inside if place[0] < end and place[1] > start]
    if not over:
        return None
    whole = over[0][1][0] <= start or over[0][0] > inside[0][0]
    whole &= over[-1][1][1] >= end or over[-1][0] < inside[-1][0]
    return (over[0][0], over[-1][0]) if whole else None


def _without(start: str, context: str) -> str:
    """Return a context with blanks where it begins with what the tokenizer puts before a text: offsets stay."""
    begins = start and context.startswith(start)
    return " " * len(start) + context[len(start) :] if begins else context


def _lost_notes(
    records: Sequence[Record], cut: Sequence[int], examples: Sequence[Example], spec: DataSpec
) -> list[str]:
    """Return notes on questions that were cut, and on answers that no window holds whole.

    Raises ConfigError where data.too_long allows none.
    """
    taught = {e.row for e in examples if not e.info.answers or e.target[0] != e.info.null}
    lost = sorted({e.row for e in examples} - taught)
    notes = []
    if cut:
        notes.append(
            f"{len(cut)} of {len(records)} questions fill more than half of data.max_tokens, and are cut to that"
        )
    if lost:
        notes.append(
            f"{len(lost)} of {len(records)} records have an answer that no window of data.max_tokens={spec.max_tokens} "
            "holds, and are learned as without one"
        )
    if notes and spec.too_long == "error":
        places = ", ".join(place_of(records[row], row + 1) for row in (lost or cut)[:3])
        raise ConfigError(
            [f"data.too_long: {'; '.join(notes)} ({places}); give a larger data.max_tokens, or data.too_long=truncate"]
        )
    return notes


def _in_context(batch: Batch) -> Tensor:
    """Return which tokens belong to the context, [B, T]."""
    mask_BT = torch.zeros(batch.inputs["input_ids"].shape, dtype=torch.bool)
    for i, window in enumerate(batch.infos):
        mask_BT[i, : len(window.offsets)] = torch.tensor([place is not None for place in window.offsets])
    return mask_BT


def _logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the start and end logits, [B, T] each; padding has no share, so that a row's loss is its own."""
    out = model(**batch.inputs)
    padding_BT = batch.inputs["attention_mask"] == 0
    low = torch.finfo(torch.float32).min
    return out.start_logits.float().masked_fill(padding_BT, low), out.end_logits.float().masked_fill(padding_BT, low)


def _losses(starts_BT: Tensor, ends_BT: Tensor, labels_B2: Tensor) -> Tensor:
    """Return the mean of the start's and the end's cross-entropy, [B]."""
    first = cross_entropy(starts_BT, labels_B2[:, 0], reduction="none")
    return (first + cross_entropy(ends_BT, labels_B2[:, 1], reduction="none")) / 2


def best_spans(starts_BT: Tensor, ends_BT: Tensor, context_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return score, first and last token of the best span of each row, [B] each.

    A span begins and ends in the context and has at most MAX_ANSWER_TOKENS tokens; where there is none, its score is
    minus infinity.
    """
    never = float("-inf")
    starts_BT = starts_BT.masked_fill(~context_BT, never)
    ends_BT = pad(ends_BT.masked_fill(~context_BT, never), (0, MAX_ANSWER_TOKENS - 1), value=never)
    scores_BTS = starts_BT[:, :, None] + ends_BT.unfold(1, MAX_ANSWER_TOKENS, 1)
    best_B, at_B = scores_BTS.flatten(1).max(1)
    first_B = at_B // MAX_ANSWER_TOKENS
    return best_B, first_B, first_B + at_B % MAX_ANSWER_TOKENS


# --- scores ----------------------------------------------------------------------------------------------------------


def counts_characters(context: str) -> bool:
    """Tell whether a text has more Chinese or Japanese characters than words between white space."""
    return len(CJK.findall(context)) > len(context.split())


def score(predicted: str, answers: Sequence[str], by_character: bool) -> tuple[float, float]:
    """Return F1 and exact match against the nearest answer; without an answer, 1 for an empty prediction, else 0."""
    normal, f1 = (_cmrc_normal, _cmrc_f1) if by_character else (squad_normal, _squad_f1)
    answers = [a for a in answers if normal(a)] or [""]
    given = normal(predicted)
    return max(f1(predicted, a) for a in answers), max(float(given == normal(a)) for a in answers)


def squad_normal(text: str) -> str:
    """Return the text in lower case without ASCII punctuation, articles and surplus white space."""
    bare = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _squad_f1(predicted: str, answer: str) -> float:
    ours, theirs = squad_normal(predicted).split(), squad_normal(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1((Counter(ours) & Counter(theirs)).total(), len(ours), len(theirs))


def _cmrc_normal(text: str) -> str:
    return "".join(c for c in text.lower().strip() if c not in CMRC_PUNCTUATION)


def cmrc_tokens(text: str) -> list[str]:
    """Return each Chinese or Japanese character and each other word between them or between white space."""
    return CJK.sub(lambda found: f" {found[0]} ", _cmrc_normal(text)).split()


def _cmrc_f1(predicted: str, answer: str) -> float:
    """Return the F1 of the longest run of tokens that both have."""
    ours, theirs = cmrc_tokens(predicted), cmrc_tokens(answer)
    if not ours or not theirs:
        return float(ours == theirs)
    longest = 0
    ends = [0] * (len(theirs) + 1)
    for a in ours:
        ends = [0, *(ends[j] + 1 if a == b else 0 for j, b in enumerate(theirs))]
        longest = max(longest, *ends)
    return _f1(longest, len(ours), len(theirs))


def _f1(shared: int, ours: int, theirs: int) -> float:
    return 2 * shared / (ours + theirs)


def _misplaced(record: Record) -> list[Mapping[str, Any]]:
    """Return the answers that the context does not hold where they say."""
    return [answer for answer in record["answers"] if not _in_place(record["context"], answer)]
