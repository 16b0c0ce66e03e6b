"""Chats as people have them, to messages with role and content: OpenAI's, ShareGPT's, with tools, with parts."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "developer": "system",
}
"""Other words for the roles that chat templates know."""

NAMES = (("role", "content"), ("from", "value"), ("role", "value"), ("speaker", "text"), ("role", "text"))
"""What the keys of a message are called."""


NUMPY = re.compile(r"array\((\[.*?\])(?:,\s*dtype=\w+)?\)", re.DOTALL)
"""A list as numpy writes it, and pandas with it into a CSV."""


def parsed(value: Any) -> Any:
    """Return the list or object that a text writes out as JSON or as Python does; any other value as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    plain = NUMPY.sub(r"\1", value)
    for read in (json.loads, ast.literal_eval):
        try:
            return read(plain)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return value


def messages_of(value: Any) -> list[Message]:
    """Return a chat's messages. Raises ValueError for what is none, or has an answer with nothing in it."""
    value = parsed(value)
    if isinstance(value, dict):
        value = next((v for k in ("messages", "conversations") if isinstance(v := value.get(k), list)), value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f'must be a list of {{"role", "content"}}, got {value!r:.80}')
    found = [_message(m) for m in value]
    answers = [m for m in found if m["role"] == "assistant"]
    if not answers:
        raise ValueError("has no message of the role assistant, so there is nothing to learn")
    if any(not m["content"].strip() and not m.get("tool_calls") for m in answers):
        raise ValueError("has an answer of the assistant with nothing in it")
    return found


def _message(message: Any) -> Message:
    names = next((n for n in NAMES if isinstance(message, Mapping) and n[0] in message), None)
    if names is None or (names[1] not in message and not message.get("tool_calls")):
        raise ValueError(f'must be a list of {{"role", "content"}}, got {message!r:.80}')
    role, content = str(message[names[0]]).strip(), _text(message.get(names[1]))
    if content is None and not message.get("tool_calls"):
        raise ValueError(f"has a message of the role {role} without content")
    more = {k: v for k, v in message.items() if k not in names and v is not None}
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(parsed(content))], **more}
    if "tool_calls" in more:
        more["tool_calls"] = [_call(c) for c in parsed(more["tool_calls"]) or []]
        more = more if more["tool_calls"] else {k: v for k, v in more.items() if k != "tool_calls"}
    return {"role": ROLES.get(role.casefold(), role.casefold()), "content": content or "", **more}


def _text(content: Any) -> str | None:
    """Return a message's text; its parts of the type text are joined."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence):
        return str(content)
    other = [p for p in content if not isinstance(p, str) and not (isinstance(p, Mapping) and "text" in p)]
    if other:
        kind = other[0].get("type", "?") if isinstance(other[0], Mapping) else type(other[0]).__name__
        raise ValueError(f"has a part of the type {kind}; only text is read")
    return "\n".join(p if isinstance(p, str) else str(p["text"] or "") for p in content)


def _call(call: Any) -> Any:
    """Return a tool call with its arguments as an object: templates write them out themselves."""
    if not isinstance(call, Mapping):
        return call
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        return dict(call)
    arguments = {k: v for k, v in function.items() if v is not None}
    arguments["arguments"] = _without_nulls(parsed(function.get("arguments", {})))
    if "function" not in call:
        return {"type": "function", "function": arguments}
    return {k: v for k, v in call.items() if v is not None} | {"function": arguments}


def _without_nulls(value: Any) -> Any:
    """Return an object without its empty keys: a Parquet file gives each call the keys of all others."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else value


def tools_of(value: Any) -> list[Any] | None:
    """Return the tools that a chat may call. Raises ValueError for what is no list."""
    value = parsed(value)
    if value is None or value == "" or value == []:
        return None
    if not isinstance(value, list):
        raise ValueError(f"must be a list of tools, got {value!r:.80}")
    return value
