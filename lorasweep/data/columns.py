"""Which column holds what: the columns that were asked for, or those with a usual name where none was given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from lorasweep.config.spec import DataSpec
from lorasweep.data.table import Row, Table
from lorasweep.errors import ConfigError

USUAL: dict[str, tuple[str, ...]] = {
    "text": (
        *("text", "sentence", "content", "review", "review_text", "reviewtext", "review_body", "tweet"),
        *(
            "comment",
            "comment_text",
            "message",
            "body",
            "document",
            "utterance",
            "question",
            "query",
            "title",
            "headline",
            "email",
        ),
        *("sms", "description", "abstract", "article", "post", "input", "texts", "sentences", "content_text", "prompt"),
    ),
    "label": (
        *("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "emotion", "tag", "tags"),
        *("y", "output", "airline_sentiment", "label_text", "label_name", "classes", "categories", "genre", "genres"),
        *("stars", "rating", "score", "type", "polarity", "is_duplicate", "gold_label", "answer"),
    ),
    "messages": ("messages", "conversations", "conversation", "chat", "dialog", "dialogue", "chats", "turns"),
    "tokens": ("tokens", "words", "token", "word", "sentence", "text"),
    "tags": ("tags", "ner_tags", "ner", "labels", "tag", "label", "upos", "pos_tags", "pos", "entities", "word_labels"),
    "question": ("question", "query", "questions"),
    "context": ("context", "passage", "paragraph", "document", "article", "text"),
    "answers": ("answers", "answer"),
    "source": (
        *(
            "source",
            "src",
            "input",
            "inputs",
            "document",
            "article",
            "dialogue",
            "text",
            "input_text",
            "source_text",
            "mr",
        ),
        *("prompt", "question", "en"),
    ),
    "target": (
        *(
            "target",
            "targets",
            "tgt",
            "output",
            "summary",
            "highlights",
            "abstract",
            "target_text",
            "label",
            "ref",
            "completion",
        ),
        *("reference", "answer", "response", "translation", "de", "fr", "zh", "es"),
    ),
    "anchor": ("anchor", "query", "question", "sentence1", "sent1", "text1", "premise", "source"),
    "positive": ("positive", "pos", "passage", "answer", "sentence2", "sent2", "text2", "document", "hypothesis"),
}
"""Field -> the names that its column usually has, the more telling first."""

PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("text1", "text2")),
    ("question1", "question2"),
    ("question", "passage"),
)
"""Two columns of text that SEQ_CLS reads together."""

PROMPTS = (
    *(("prompt", "chosen"), ("question", "chosen")),
    *(("prompt", "completion"), ("prompt", "response"), ("prompt", "output"), ("prompt", "answer")),
    *(("instruction", "output"), ("instruction", "response"), ("instruction", "completion")),
    *(("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer")),
    *(("input", "output"), ("source", "target"), ("inputs", "targets"), ("instruction", "answer")),
    *(("mr", "ref"), ("dialogue", "summary"), ("article", "highlights"), ("document", "summary")),
)
"""Columns of a prompt and of what is learned after it."""

OPTIONAL = ("tools", "system")
"""Fields that may be absent or empty."""


@dataclass(frozen=True)
class Columns:
    by_field: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def changed(self, spec: DataSpec) -> dict[str, Any]:
        """Return the keys of data.* that were found, with their values."""
        found = {f"{name}_column": column for name, column in self.by_field.items()}
        return {k: v for k, v in found.items() if hasattr(spec, k) and getattr(spec, k) != v}


DEFAULTS = {f.name: f.default for f in fields(DataSpec)}


def find_columns(asked: Mapping[str, str], table: Table, spec: DataSpec) -> Columns:
    """Return field -> column for what the task reads. Raises ConfigError for a column that is not there."""
    present = table.columns
    given = {f: c for f, c in asked.items() if DEFAULTS.get(f"{f}_column", c) != c or c in present}
    by_field: dict[str, str] = {}
    missing: list[str] = []
    for name, column in given.items():
        found = column if _holds(column, table) else same_name(column, present)
        if found is None:
            missing.append(name)
        else:
            by_field[name] = found
    open_fields = [f for f in asked if f not in given]
    if open_fields == ["text"] and len(asked) == 1:
        by_field |= _of_language_model(table)
        open_fields = [] if by_field else open_fields
    if "label" in asked and "text" in open_fields and "text_pair" not in asked:
        pair = next((p for p in PAIRS if set(p) <= set(present)), None)
        if pair and not any(c in present for c in USUAL["text"][:4]):
            by_field |= {"text": pair[0], "text_pair": pair[1]}
            open_fields = [f for f in open_fields if f != "text"]
    if set(open_fields) == {"source", "target"}:
        by_field |= _of_translations(table)
        open_fields = [] if by_field else open_fields
    for name in open_fields:
        taken = {*by_field.values(), *[c for f, c in given.items() if f != name]}
        found = next((c for word in USUAL.get(name, ()) if (c := same_name(word, present)) and c not in taken), None)
        rest = [c for c in present if c not in taken and not c.startswith("Unnamed: ")]
        if found is None and len(rest) == 1 and open_fields == [name]:
            found = rest[0]
        if found is None:
            missing.append(name)
        else:
            by_field[name] = found
    if missing:
        raise ConfigError([_absent({name: asked[name] for name in missing}, table, spec)])
    if "messages" in by_field:
        by_field |= {f: c for f in OPTIONAL if (c := getattr(spec, f"{f}_column", None) or f) in present}
    return Columns(by_field, _notes(by_field, asked, table, spec))


def _holds(column: str, table: Table) -> bool:
    inside = "." in column and bool(table.rows) and value_at(table.rows[0], column) is not None
    return column in table.columns or inside


def value_at(row: Row, column: str) -> Any:
    """Return a cell; `a.b` reads the key b of an object in the column a."""
    if column in row or "." not in column:
        return row.get(column)
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def same_name(word: str, present: Sequence[str]) -> str | None:
    """Return the column of that name, or else the one that differs only in case, spaces and the like."""
    if word in present:
        return word
    return next((c for c in present if _plain(c) == _plain(word)), None)


def _plain(name: str) -> str:
    return name.strip().casefold().replace(" ", "_").replace("-", "_")


def _of_language_model(table: Table) -> dict[str, str]:
    """Return the fields of chats, prompts with answers, or plain text, whichever the table has."""
    present = table.columns
    chat = next((c for word in USUAL["messages"] if (c := same_name(word, present))), None)
    chosen = same_name("chosen", present)
    if not chat and chosen and table.rows and isinstance(table.rows[0][chosen], list):
        chat = chosen  # of a chat that was preferred to another one
    if chat:
        return {"messages": chat}
    for words in PROMPTS:
        pair = [same_name(w, present) for w in words]
        if pair[0] and pair[1]:
            found = {"prompt": pair[0], "completion": pair[1]}
            more = same_name("input", present) or same_name("context", present)
            if more is not None and more not in pair and words[0] == "instruction":
                found["input"] = more
            return found
    text = next((c for word in USUAL["text"] if (c := same_name(word, present))), None)
    return {"text": text or present[0]} if text or len(present) == 1 else {}


def _of_translations(table: Table) -> dict[str, str]:
    """Return source and target where a column holds objects of two texts, as translations of the hub do."""
    for column, cell in table.rows[0].items() if table.rows else ():
        if isinstance(cell, dict) and len(cell) == 2 and all(isinstance(v, str) for v in cell.values()):
            source, target = cell
            return {"source": f"{column}.{source}", "target": f"{column}.{target}"}
    return {}


def _absent(missing: Mapping[str, str], table: Table, spec: DataSpec) -> str:
    """Return notes on columns that are missing; what the table has is listed once."""
    present = table.columns
    near = {c: get_close_matches(c, present, n=1, cutoff=0.6) for c in missing.values()}
    hints = "".join(f"; did you mean '{found[0]}' for '{c}'?" for c, found in near.items() if found)
    has = ", ".join(present[:30]) + (f" and {len(present) - 30} more" if len(present) > 30 else "")
    if spec.source in ("csv", "auto") and spec.header is None and any(len(c.split()) > 3 for c in present):
        hints += "; if its first line is no header, give data.header=[name,name,...]"
    divider = next((d for d in ";\t|," if len(present) == 1 and d in present[0]), None)
    if divider:
        name = "tab" if divider == "\t" else divider
        hints = f"; its cells seem to be divided by '{name}': data.delimiter=\"{name}\""
    keys = ", ".join(f"data.{name}_column" for name in missing)
    columns = " and ".join(f"'{c}'" for c in missing.values())
    return f"{keys}: no column {columns} in {spec.path}{hints}; it has {has}"


def _notes(by_field: Mapping[str, str], asked: Mapping[str, str], table: Table, spec: DataSpec) -> list[str]:
    notes = []
    found = [f"data.{f}_column={c}" for f, c in by_field.items() if asked.get(f) != c]
    if found:
        notes.append(f"columns taken by their usual names: {', '.join(found)}")
    read = {c.split(".")[0] if c not in table.columns else c for c in by_field.values()} | set(spec.label_columns or [])
    unread = [c for c in table.columns if c not in read]
    if unread:
        more = f" and {len(unread) - 10} more" if len(unread) > 10 else ""
        notes.append(f"columns that are not read: {', '.join(unread[:10])}{more}")
    return notes
