"""Chats written out by the tokenizer's template, and what of them is learned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from lorasweep.data.dataset import FEW
from lorasweep.data.table import Record, place_of
from lorasweep.errors import ConfigError

Turns = list[tuple[list[int], list[int]]]
"""Token ids that are only read, and those that are learned after them, in alternation."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + END + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""OpenAI's format; END is <|im_end|>, or the end token of a tokenizer that does not know that."""


def give_template(tokenizer: Any, asked: str | None) -> str | None:
    """Give the tokenizer the template that data.chat_template names, and return its text: `chatml`, a file, or the text
    itself. Raises ConfigError where there is no such file.
    """
    if asked is None:
        return None
    text = asked
    if asked == "chatml":
        known = "<|im_end|>" in tokenizer.get_vocab()
        text = CHATML.replace("END", "'<|im_end|>'" if known else "eos_token")
    elif "{" not in asked:
        path = Path(asked).expanduser()
        if not path.is_file():
            raise ConfigError([f"data.chat_template: must be chatml or a file with a template, no file '{asked}'"])
        text = path.read_text(encoding="utf8")
    tokenizer.chat_template = text
    return text


def chats(
    tokenizer: Any, records: Sequence[Record], bad_rows: str
) -> tuple[list[tuple[int, Turns]], list[list[int]], list[str]]:
    """Return row and turns of each example of the chats, the chat up to its last answer, opened as a model is asked for
    one, and a note on chats that are left out.

    A chat is one example, or one for each answer where the template rewrites earlier turns when one follows: each
    then has the history as the model sees it when it answers. Raises ConfigError where the tokenizer has no template,
    and where that refuses more chats than data.bad_rows allows.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            ["data.chat_template: the tokenizer has no chat template; give data.chat_template=chatml, or a file"]
        )
    found: list[tuple[int, Turns]] = []
    prompts: list[list[int]] = []
    problems: list[str] = []
    for row, record in enumerate(records):
        place = place_of(record, row + 1)
        try:
            messages, tools = record["messages"], record.get("tools")
            examples = _examples(tokenizer, messages, place, tools)
            last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
            prompt = written(tokenizer, messages[:last], True, place, tools)
            found += [(row, turns) for turns in examples]
            prompts += [prompt] * len(examples)
        except ConfigError as error:
            problems += error.problems
    few = {"auto": max(1, int(FEW * len(records))), "skip": len(records), "error": 0}[bad_rows]
    if len(problems) > few or not found:
        raise ConfigError(problems[:3])
    return found, prompts, [f"{len(problems)} chats left out: {problems[0]}"] if problems else []


def _examples(tokenizer: Any, messages: Sequence[Mapping[str, Any]], place: str, tools: Any) -> list[Turns]:
    try:
        return [chat_turns(tokenizer, messages, place, tools)]
    except Rewritten:
        ends = [i for i, m in enumerate(messages, 1) if m["role"] == "assistant"]
        return [[_last_turn(tokenizer, messages[:end], place, tools)] for end in ends]


REWRITES = "the chat template rewrites earlier turns when one follows, so that the answer cannot be told apart"


class Rewritten(ConfigError):
    """The template writes earlier turns otherwise when one follows."""


def chat_turns(tokenizer: Any, messages: Sequence[Mapping[str, Any]], place: str, tools: Any = None) -> Turns:
    """Return one part for each turn of the assistant: the tokens before it, and its own.

    The chat is written out once for each end of a turn; what one adds to the one before is the turn. Raises Rewritten
    where the template changes what was there, and ConfigError where it cannot write it.
    """
    parts: Turns = []
    done: list[int] = []
    for end, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        before, answer = _last_turn(tokenizer, messages[:end], place, tools)
        if before[: len(done)] != done:
            raise Rewritten([f"data.messages_column: {place}: {REWRITES}"])
        parts.append((before[len(done) :], answer))
        done = before + answer
    return parts


def _last_turn(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], place: str, tools: Any
) -> tuple[list[int], list[int]]:
    """Return the tokens before the last message, and its own, which begin behind what opens an answer: where a template
    opens one to be written otherwise than one that was given (DeepSeek-R1 adds <think>), behind what both share.
    """
    whole = written(tokenizer, messages, False, place, tools)
    before = written(tokenizer, messages[:-1], True, place, tools)
    if not before:
        before = _opening(tokenizer, whole, place, tools)
    if whole[: len(before)] != before:
        earlier = written(tokenizer, messages[:-1], False, place, tools)
        before = _common(whole, before)
        if len(before) < len(earlier) or whole[: len(earlier)] != earlier:
            before = earlier
    if whole[: len(before)] != before:
        raise Rewritten([f"data.messages_column: {place}: {REWRITES}"])
    return before, whole[len(before) :]


ASKED = ({"role": "user", "content": "a"},)


def _opening(tokenizer: Any, whole: Sequence[int], place: str, tools: Any) -> list[int]:
    """Return a chat that begins with an answer up to where that begins: behind the header that the template opens an
    answer with after a question, or as much of it as is there.
    """
    asked, bare = (written(tokenizer, ASKED, ask, place, tools) for ask in (True, False))
    header = asked[len(_common(asked, bare)) :]
    for length in range(len(header), 0, -1):
        for start in range(len(whole) - length + 1):
            if list(whole[start : start + length]) == header[:length]:
                return list(whole[: start + length])
    return []


def _common(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Return what both begin with."""
    same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return list(first[: min(len(first), len(second)) if same is None else same])


def written(tokenizer: Any, messages: Sequence[Mapping[str, Any]], ask: bool, place: str, tools: Any) -> list[int]:
    """Return a chat as token ids, with the opening of the assistant's answer for `ask`."""
    if not messages:
        return []
    try:
        found = tokenizer.apply_chat_template(
            [dict(m) for m in messages], tools=tools, add_generation_prompt=ask, return_dict=False
        )
    except (ValueError, TypeError, KeyError, TemplateError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            [f"data.messages_column: the tokenizer cannot write out the chat of {place} ({reason})"]
        ) from error
    return list(found)
