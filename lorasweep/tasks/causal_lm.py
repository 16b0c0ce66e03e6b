"""CAUSAL_LM: plain text, a prompt with the completion that is learned, or a chat; loss in nats a token first.

Shapes: B rows, T tokens, N supervised positions, D hidden, V words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorasweep.config.spec import DataSpec, TaskSpec, TrialSpec
from lorasweep.data.dataset import Data, Record
from lorasweep.data.table import Row
from lorasweep.errors import ConfigError
from lorasweep.tasks import generation, register, special_tokens
from lorasweep.tasks.chat_template import Turns, chats
from lorasweep.tasks.lm_head import Head
from lorasweep.tasks.metric import BITS_PER_BYTE, LOSS, PERPLEXITY, Metric, Prediction, by_row, ratio
from lorasweep.tasks.task import IGNORE, Answer, Batch, Example, Fields, Task, in_order
from lorasweep.tasks.too_long import Cutter

UNCUT = 1_000_000
"""A max_tokens that cuts nothing."""

NO_END = "the tokenizer has no end token: the model does not learn where a text ends"


@register
class CausalLM(Task):
    name = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    most_loss_ratio = 3.0
    pipeline = "text-generation"
    builtin = "topics"
    answers_with: ClassVar[Mapping[str, Any]] = {"generate": True, "generate_samples": None}
    labels_tokens = True
    always_masked = False

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.tokenizer: Any = None
        self.stop: tuple[int, ...] = ()
        """Token that ends an assistant's turn, beside the end token."""
        self.head = Head()

    @property
    def base_rate(self) -> float:
        return 3e-4

    def measures(self) -> Sequence[Metric]:
        return (*TOKEN_METRICS, generation.EXACT_MATCH) if self.spec.generate else TOKEN_METRICS

    def ready(self) -> Sequence[Metric]:
        return generation.ready(self.spec)

    no_pairs = generation.NO_TEXTS

    def pairs(self, predictions: Sequence[Prediction]) -> dict[int, tuple[Any, Any]]:
        """Return the generated text, and the expected one."""
        return {p["row"]: (p["text"], p["references"][0]) for p in predictions if generation.WRITTEN in p}

    def columns(self, spec: DataSpec) -> dict[str, str]:
        if spec.messages_column:
            return {"messages": spec.messages_column}
        if spec.prompt_column and spec.completion_column:
            return {"prompt": spec.prompt_column, "completion": spec.completion_column}
        return {"text": spec.text_column}

    def fit(self, data: Data) -> list[str]:
        """Learn nothing; return a problem where there is no answer to generate."""
        if self.spec.generate and "text" in data.splits["train"][0]:
            return [
                "task_type.generate: plain text asks for no answer; give data.prompt_column and "
                "data.completion_column, or data.messages_column"
            ]
        return []

    def encode(self, records: Sequence[Record], tokenizer: Any, spec: DataSpec) -> list[Example]:
        """Supervise the completion and the end token that follows it, or the assistant's turns of a chat; of plain
        text, every token but the first. Raises ConfigError where the chat template does not fit.
        """
        self.tokenizer = tokenizer
        texts: list[str] = []
        if "messages" in records[0]:
            turns, prompts, notes = chats(tokenizer, records, spec.bad_rows)
            special = [i for i in turns[0][1][-1][1] if i in tokenizer.all_special_ids]
            self.stop = tuple(special[-1:])
            self.notes += notes
            answers = [_last_answer(r["messages"]) for r in records]
        else:
            turns = list(enumerate(_one_turn(records, tokenizer, spec)))
            if not special_tokens.ends(tokenizer) and NO_END not in self.notes:
                self.notes.append(NO_END)
            answers = [str(r.get("completion", "")) for r in records]
            texts = [str(r[name]) for r in records for name in ("completion", "text") if name in r]
            prompts = [parts[-1][0] for _, parts in turns]
        last = {row: place for place, (row, _) in enumerate(turns)}
        cutter = Cutter(spec, special_tokens.around(tokenizer)[0])
        examples = []
        for place, (row, parts) in enumerate(turns):
            fitted = cutter.fit(row, parts)
            if fitted is None:
                continue
            ids, labels = fitted
            learned = [label for label in labels[1:] if label != IGNORE]
            if learned:
                asked = self.spec.generate and last[row] == place and prompts[place]
                info = (cutter.prompt(prompts[place]), answers[row]) if asked else None
                whole = list(chain.from_iterable(tail for _, tail in parts))
                examples.append(
                    Example(
                        row=row,
                        inputs={"input_ids": ids},
                        target=labels,
                        supervised=len(learned),
                        info=info,
                        text_bytes=text_bytes(tokenizer, learned, whole, texts[row] if texts else None),
                    )
                )
        self.notes += cutter.notes(records)
        return self._some_asked(examples)

    def _some_asked(self, examples: list[Example]) -> list[Example]:
        """Return the examples, the prompts of only some of them to be answered by generation."""
        asked = [e.row for e in examples if e.info]
        chosen = {asked[i] for i in generation.chosen(len(asked), self.spec.generate_samples)}
        return [e if e.info is None or e.row in chosen else replace(e, info=None) for e in examples]

    def labels(self, examples: Sequence[Example], length: int) -> Tensor:
        table = torch.full((len(examples), length), IGNORE)
        for i, e in enumerate(examples):
            table[i, : len(e.target)] = torch.tensor(e.target)
        return table

    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        return row_sums(batch, *self._token_losses(model, batch)[:2])

    def predict(self, model: Any, batch: Batch) -> list[Prediction]:
        found = token_predictions(batch, *self._token_losses(model, batch))
        asked = [(p, *info) for p, info in zip(found, batch.infos, strict=True) if info]
        if asked:
            prompts = [prompt for _, prompt, _ in asked]
            ids_BT, mask_BT = generation.padded_left(prompts, self.tokenizer.pad_token_id, batch.labels.device)
            texts = generation.greedy(model, ids_BT, mask_BT, self.tokenizer, self.spec.max_new_tokens, self.stop)
            for (p, _, answer), text in zip(asked, texts, strict=True):
                right = generation.same_answer(text, answer, self.spec.answer_pattern)
                p |= {"text": text, "right": right, "references": [answer]}
        return found

    def fields(self, spec: DataSpec) -> Fields:
        return Fields((next(n for n in ("messages", "prompt", "text") if n in self.columns(spec)),))

    def blank(self, fields: Record) -> Record:
        if "messages" not in fields:
            return {"prompt": fields.get("prompt", fields.get("text")), "completion": ""}
        chat = fields["messages"]
        turns = [{"role": "user", "content": chat}] if isinstance(chat, str) else list(chat)
        return {"messages": [*turns, {"role": "assistant", "content": "."}]}

    def encode_input(self, fields: Record, tokenizer: Any, spec: DataSpec) -> list[Example]:
        """A prompt is never cut, and plain text goes on as it stands."""
        suffix = spec.prompt_suffix if spec.prompt_column else ""
        return super().encode_input(fields, tokenizer, replace(spec, max_tokens=UNCUT, prompt_suffix=suffix))

    def answer(self, model: Any, batches: Sequence[Batch], records: Sequence[Record]) -> list[Answer]:
        """Return what the model writes. Raises ConfigError where a prompt and what follows are more than it reads."""
        room = getattr(model.config, "max_position_embeddings", None) or UNCUT
        more = self.spec.max_new_tokens
        lengths: dict[int, int] = {}
        for batch in batches:
            lengths |= {row: len(info[0]) for row, info in zip(batch.rows, batch.infos, strict=True)}
        problems = [
            f"input {row + 1}: has {length} tokens, and {more} are written; the model reads {room}"
            for row, length in sorted(lengths.items())
            if length + more > room
        ]
        if problems:
            raise ConfigError(problems)
        return in_order({p["row"]: {"text": p["text"]} for p in self.predictions(model, batches)})

    def answer_columns(self) -> dict[str, str]:
        return {"text": "string"}

    def line(self, answer: Answer) -> str:
        return answer["text"].replace("\n", "\\n")

    def no_pipeline(self, spec: DataSpec, tokenizer: Any) -> str:
        if "messages" in self.columns(spec):
            return "MLflow hands text to text-generation, not a chat's turns"
        if special_tokens.asked_for(tokenizer)[1] is None:
            return "the tokenizer, asked by the pipeline, would end each prompt as if nothing followed it"
        return ""

    def as_pipeline(self, answer: Answer) -> Any:
        return answer["text"]

    def pipeline_prompt(self, tokenizer: Any, spec: DataSpec) -> str:
        """Return, before the prompt, what the tokenizer would put there itself, and behind it the suffix."""
        _, before = special_tokens.asked_for(tokenizer)
        assert before is not None, "no_pipeline has asked"
        suffix = spec.prompt_suffix if "prompt" in self.columns(spec) else ""
        doubled = (text.replace("{", "{{").replace("}", "}}") for text in (before, suffix))
        return "{prompt}".join(doubled)

    def pipeline_arguments(self, model: Any, tokenizer: Any, spec: TrialSpec) -> dict[str, Any]:
        ends = model.generation_config.eos_token_id
        found = {*(ends if isinstance(ends, list | tuple) else [ends]), tokenizer.eos_token_id} - {None}
        return {
            "max_new_tokens": spec.task_type.max_new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "return_full_text": False,
            "add_special_tokens": special_tokens.asked_for(tokenizer)[0],
            "eos_token_id": sorted(found) or None,
            "pad_token_id": tokenizer.pad_token_id,
        }

    def readable(self, record: Record, prediction: Prediction) -> str:
        if "text" in prediction:
            return prediction["text"]
        return readable_tokens(prediction)

    def _token_losses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, row and hit of each supervised position, [N] each. Position t is scored against label t+1."""
        targets_BT = batch.labels.roll(-1, 1)
        targets_BT[:, -1] = IGNORE
        return self.head.losses(model, batch.inputs, targets_BT)


def text_bytes(tokenizer: Any, learned: Sequence[int], whole: Sequence[int], text: str | None) -> int:
    """Return the UTF-8 bytes of the text that supervised tokens stand for. `whole` are all tokens of `text`: where some
    are cut, or the first is not supervised, the bytes of the others are those of what they are decoded to.
    """
    if text is None or list(learned) not in (list(whole), list(whole[1:])):
        return _decoded_bytes(tokenizer, learned)
    return max(0, len(text.encode()) - _decoded_bytes(tokenizer, whole[: len(whole) - len(learned)]))


def _decoded_bytes(tokenizer: Any, ids: Sequence[int]) -> int:
    if not ids:
        return 0
    return len(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode())


def row_sums(batch: Batch, losses_N: Tensor, where: Tensor) -> Tensor:
    """Return the summed loss of each row, [B]; `where` holds the row of each supervised token."""
    return losses_N.new_zeros(len(batch.rows)).index_add(0, where, losses_N)


def token_predictions(batch: Batch, losses_N: Tensor, where: Tensor, correct_N: Tensor) -> list[Prediction]:
    """Return loss, number of supervised tokens and of right ones, a row."""
    sums = losses_N.new_zeros(3, len(batch.rows))
    sums.index_add_(1, where, torch.stack([losses_N, torch.ones_like(losses_N), correct_N.to(losses_N)]))
    losses, counts, correct = sums.tolist()
    return [
        {"row": r, "loss": loss, "supervised": int(count), "correct": int(right), "text_bytes": size}
        for r, loss, count, right, size in zip(batch.rows, losses, counts, correct, batch.text_bytes, strict=True)
    ]


TOKEN_METRICS = (
    LOSS,
    PERPLEXITY,
    Metric("token_accuracy", by_row(lambda prediction: (prediction["correct"], prediction["supervised"])), ratio),
    BITS_PER_BYTE,
)
"""Over all supervised tokens."""


def readable_tokens(prediction: Prediction) -> str:
    per_token = prediction["loss"] / prediction["supervised"]
    return f"{prediction['correct']} of {prediction['supervised']} tokens right, {per_token:.3f} nats a token"


def _one_turn(records: Sequence[Record], tokenizer: Any, spec: DataSpec) -> list[Turns]:
    """Return a single part for each record: prompt and completion, or nothing and the plain text. A block of a text
    that goes on in the next one teaches no end.
    """
    start, end = special_tokens.around(tokenizer)[0], special_tokens.ends(tokenizer)
    if "prompt" in records[0]:
        heads = _plain(tokenizer, [str(r["prompt"]) + spec.prompt_suffix for r in records])
        tails = _plain(tokenizer, [str(r["completion"]) for r in records])
    else:
        heads = [[]] * len(records)
        tails = _plain(tokenizer, [str(r["text"]) for r in records])
    tails = [tail[len(start) :] if start and tail[: len(start)] == start else tail for tail in tails]
    tails = [
        tail if isinstance(record, Row) and record.goes_on else special_tokens.ended(tail, end)
        for tail, record in zip(tails, records, strict=True)
    ]
    return [[(special_tokens.begun(head, start), tail)] for head, tail in zip(heads, tails, strict=True)]


def _plain(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]


def _last_answer(messages: Sequence[Mapping[str, Any]]) -> str:
    return str([m for m in messages if m["role"] == "assistant"][-1]["content"])
