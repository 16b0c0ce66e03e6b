"""Tables as people have them: each file, the words typed after it, and what comes of it.

A table works at the first try, checked to the rows of each split, the class names and the metric, or is refused in one
sentence with the key, before anything is made.
"""
# ruff: noqa: E501  (a case is a line)

import bz2
import gzip
import io
import json
import lzma
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import openpyxl
import pandas
import pytest

from lorasweep import tasks
from lorasweep.cli import main
from lorasweep.config import compose
from lorasweep.errors import ConfigError
from lorasweep.training import workload

WORDS = (
    "stone",
    "garden",
    "bread",
    "yellow",
    "paper",
    "cloud",
    "engine",
    "river",
    "forest",
    "lamp",
    "winter",
    "silver",
)
ROWS = 60
TENTH = (48, 6, 6)
"""Rows of train, eval and test that a table of 60 gives."""


def text(i: int) -> str:
    return " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, 7)) + f" {i}"


def label(i: int) -> str:
    return ("neg", "pos")[i % 2]


def rows(**columns: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [{name: cell(i) for name, cell in columns.items()} for i in range(ROWS)]


def plain(name: Callable[[int], Any] = label) -> list[dict[str, Any]]:
    return rows(text=text, label=name)


def csv(header: str = "text,label", line: str = "{text},{label}", end: str = "\n", odd: str = "") -> bytes:
    """Return a file of 60 rows; `odd` stands in the place of row 20, which is line 22."""
    lines = [line.format(text=text(i), label=label(i), i=i) for i in range(ROWS)]
    if odd:
        lines[20] = odd
    return (end.join([header, *lines]) + end).encode()


def jsonl(table: list[dict[str, Any]], odd: str = "") -> bytes:
    lines = [json.dumps(r, ensure_ascii=False) for r in table]
    if odd:
        lines[20] = odd
    return ("\n".join(lines) + "\n").encode()


def labels_of(*names: Any) -> bytes:
    return jsonl(plain(lambda i: names[i % len(names)]))


def cells(*names: str) -> bytes:
    """Return a CSV whose labels are these texts in turn, quoted."""
    lines = [f'{text(i)},"{names[i % len(names)]}"'.replace("\\", "") for i in range(ROWS)]
    return "\n".join(["text,label", *lines]).encode()


def conll(sentence: str = "the O\nrome B-LOC\nis O\nplace{i} O\n", head: str = "") -> bytes:
    return (head + "\n".join(sentence.format(i=i) for i in range(ROWS))).encode()


def conllu(words: str = "1\tThe\tthe\tDET\tDT\t_\t2\tdet\t_\t_\n2\tdog{i}\tdog\tNOUN\tNN\t_\t0\troot\t_\t_\n") -> bytes:
    return "\n".join(f"# sent_id = {i}\n{words.format(i=i)}" for i in range(ROWS)).encode()


def chat(i: int, answer: Any = "good {i}", **more: Any) -> list[dict[str, Any]]:
    answer = answer.format(i=i) if isinstance(answer, str) else answer
    return [{"role": "user", "content": text(i)}, {"role": "assistant", "content": answer, **more}]


def chats(*, odd: list[dict[str, Any]] | None = None, name: str = "messages", **more: Any) -> bytes:
    table = [{name: chat(i, **more)} for i in range(ROWS)]
    if odd is not None:
        table[20] = {name: odd}
    return jsonl(table)


def parquet(table: list[dict[str, Any]], classes: list[str] | None = None) -> bytes:
    found = datasets.Dataset.from_list(table)
    if classes:
        found = found.cast_column("label", datasets.ClassLabel(names=classes))
    out = io.BytesIO()
    found.to_parquet(out)
    return out.getvalue()


def feather(table: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pandas.DataFrame(table).to_feather(out)
    return out.getvalue()


def word_rows(header: str, first: str, other: str = "", between: str = "") -> bytes:
    """Return a table of words, a row a word: two rows a sentence."""
    lines = [header]
    for i in range(ROWS):
        lines += [first.format(i=i), (other or first).format(i=i), *([between] if between != "none" else [])]
    return "\n".join(lines).encode()


def workbook(table: list[list[Any]], *more: str) -> bytes:
    """Return an Excel workbook of a sheet, and of further empty ones."""
    book = openpyxl.Workbook()
    for row in table:
        book.active.append(row)
    for name in more:
        book.create_sheet(name)
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def sheet(*columns: str) -> list[list[Any]]:
    return [list(columns or ("text", "label")), *([text(i), label(i)] for i in range(ROWS))]


@dataclass(frozen=True)
class Works:
    rows: tuple[int, int, int] = TENTH
    classes: tuple[str, ...] = ("neg", "pos")
    primary: str = "accuracy"
    says: tuple[str, ...] = ()
    """Parts of the notes."""
    first: dict[str, Any] | None = None
    """Fields that a training record has, as they are read."""


@dataclass(frozen=True)
class Refused:
    key: str
    says: tuple[str, ...] = ()


Files = dict[str, bytes]
Case = tuple[str, bytes | Files, str, Works | Refused]
"""File name (a folder's for several files), content, what is typed after data.path, the outcome."""

C, T, L, Q, S, F = (
    f"task_type={name}"
    for name in ("seq_cls", "token_cls", "causal_lm", "question_ans", "seq_2_seq_lm", "feature_extraction")
)
LM = Works(classes=(), primary="loss")
NER = Works(classes=("B-LOC", "O"), primary="f1")
MULTI = Works(classes=("law", "tax", "war"), primary="micro_f1")
SEVERAL = ("", "tax", "law", "{0}", "war", "{1}", "{2}", "{3}")
TOGETHER = (("tax", "law"), ("tax", "war"), ("law", "war"), ("tax", "law", "war"))


def several(join: Callable[[tuple[str, ...]], str], none: str = "") -> bytes:
    names = [none, join(("tax",)), join(("law",)), join(("war",)), *map(join, TOGETHER)]
    return cells(*(n.replace('"', '""') for n in names))


UNCLOSED = '"this one is never closed,neg'
LONG = "word " * 40_000
ALPACA = rows(instruction=text, input=lambda i: "green" if i % 2 else "", output=lambda i: f"answer {i}")
PAIRS = rows(prompt=text, completion=lambda i: f"answer {i}")
SHAREGPT = rows(
    conversations=lambda i: [
        {"from": "system", "value": "be kind"},
        {"from": "human", "value": text(i)},
        {"from": "gpt", "value": f"good {i}"},
    ]
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"town": "x"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
TOOL_CHATS = rows(
    messages=lambda i: [
        {"role": "user", "content": text(i)},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": f"it is sunny {i}"},
    ],
    tools=lambda _: TOOLS,
)
ASKED = rows(
    question=lambda i: f"what {i}?",
    context=lambda i: f"the answer{i} is here",
    answers=lambda i: {"text": [f"answer{i}"], "answer_start": [4]},
)
SQUAD = {
    "data": [
        {
            "title": f"t{i}",
            "paragraphs": [
                {
                    "context": f"the answer{i} is here",
                    "qas": [{"question": "what?", "answers": [{"text": f"answer{i}", "answer_start": 4}]}],
                }
            ],
        }
        for i in range(ROWS)
    ]
}
TEXT = "\n\n".join(f"{text(i)}. {text(i + 1)}.\n{text(i + 2)}." for i in range(200)).encode()

CASES: list[Case] = [
    # --- CSV ---
    ("plain.csv", csv(), C, Works(says=("read as csv",))),
    ("plain.csv", csv(), f"{C} data=csv", Works()),
    ("crlf.csv", csv(end="\r\n"), C, Works()),
    ("mac.csv", csv(end="\r"), C, Works()),
    ("bom.csv", b"\xef\xbb\xbf" + csv(), C, Works()),
    ("blank.csv", csv(end="\n\n"), C, Works()),
    ("semicolon.csv", csv("text;label", "{text};{label}"), C, Works(says=("divided by ';'",))),
    ("semicolon.csv", csv("text;label", "{text};{label}"), f"{C} data=csv data.delimiter=','", Refused("data.text_column", ("';'",))),
    ("tab.tsv", csv("text\tlabel", "{text}, and\t{label}"), C, Works(says=("divided by 'tab'",))),
    ("tab.txt", csv("text\tlabel", "{text}\t{label}"), C, Works(says=("read as csv",))),
    ("pipe.csv", csv("text|label", "{text}|{label}"), C, Works(says=("divided by '|'",))),
    ("excel.csv", b"sep=;\r\n" + csv("text;label", "{text};{label}", "\r\n"), C, Works()),
    ("spaces.csv", csv(" text , label ", '"{text}, yes", {label}'), C, Works()),
    ("spaced.csv", csv("text, label", '"{text}, yes", {label}'), C, Works(first={"text": f"{text(0)}, yes"})),
    ("trailing.csv", csv("text,label,", "{text},{label},"), C, Works()),
    ("trailing_rows.csv", csv() + b",\n,\n,\n", C, Works()),
    ("index.csv", csv(",text,label", "{i},{text},{label}"), C, Works(says=("not read: Unnamed: 0",))),
    ("r.csv", csv("text,label", "{i},{text},{label}"), C, Works()),
    ("inch.csv", csv(line='{text} 5" disk,{label}'), C, Works()),
    ("said.csv", csv(line='"{text}" he said,{label}'), C, Works()),
    ("escaped.csv", csv(line='"he said \\"{text}\\", loud",{label}'), C, Works(says=('written \\"',))),
    ("lines.csv", csv(line='"{text}\nsecond, line ""{i}""",{label}'), C, Works(first={"text": f'{text(0)}\nsecond, line "0"'})),
    ("title.csv", b"Survey 2024,\n\n" + csv(), C, Works(says=("the header of title.csv is line 3",))),
    ("comments.csv", b"# source: shop\n# licence: none\n" + csv(), C, Works(says=("the header of comments.csv is line 3",))),
    ("ids.csv", csv(line="{text},id{i}"), C, Refused("data.label_column", ("another class in each of 60 rows",))),
    ("null.csv", csv(line="{text}\0,{label}"), C, Works(says=("60 null bytes",))),
    ("long.csv", csv(odd=f"{LONG},neg"), C, Works()),
    ("open.csv", csv(odd=UNCLOSED), C, Works((47, 6, 6), says=("1 of 60 rows left out", "open.csv:22: a quote opens"))),
    ("open_last.csv", csv("label,text", "{label},{text}", odd='neg,"never closed'), C, Works((47, 6, 6), says=("open_last.csv:22",))),
    ("open_twice.csv", csv(odd=UNCLOSED).replace(b" 40,neg", b' 40",neg'), C, Works((47, 6, 6), says=("open_twice.csv:22",))),
    ("open.csv", csv(odd=UNCLOSED), f"{C} data.bad_rows=error", Refused("data.bad_rows", ("open.csv:22",))),
    ("open.csv", csv(odd=UNCLOSED), f"{C} data.quoting=false", Works()),
    ("wide.csv", csv(odd="a, b and c,neg"), C, Works((47, 6, 6), says=("wide.csv:22: 3 cells, the header has 2",))),
    ("wide_all.csv", csv(line="{text}, yes,{label}"), C, Refused("data.bad_rows", ("wide_all.csv:2: 3 cells",))),
    ("twice.csv", csv("text,label,text", "{text},{label},x"), C, Refused("data.text_column", ("'text'",))),
    ("twice_unread.csv", csv("text,label,id,id", "{text},{label},1,2"), C, Works(says=("called id",))),
    ("headless.csv", csv()[11:], f"{C} data.header=[text,label]", Works()),
    ("other.csv", csv("text,rating_of_it", "{text},{label}"), f"{C} data.label_column=rating", Refused("data.label_column", ("it has text, rating_of_it",))),
    ("empty.csv", b"", C, Refused("data.path", ("is empty",))),
    ("header_only.csv", b"text,label\n", C, Refused("data.path", ("holds no row",))),
    ("one_class.csv", csv(line="{text},pos"), C, Refused("data.label_column", ("at least two classes",))),
    # --- what only looks like data ---
    ("pointer.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", C, Refused("data.path", ("Git LFS",))),
    ("page.csv", b"<!DOCTYPE html><html></html>", C, Refused("data.path", ("web page",))),
    ("sheet.xlsx.csv", b"PK\x03\x04" + bytes(50), C, Refused("data.path", ("Excel",))),
    ("table.csv", parquet(plain()), f"{C} data=csv", Refused("data.source", ("data=parquet",))),
    ("table.csv", parquet(plain()), C, Works(says=("read as parquet",))),
    ("paper.csv", b"%PDF-1.7\n" + bytes(50), C, Refused("data.path", ("is a PDF",))),
    ("frame.pkl", pickle.dumps(plain()), C, Refused("data.path", ("is a pickle",))),
    ("web", {}, f"{C} data.path=https://example.com/x.csv", Refused("data.path", ("is a web address",))),
    # --- encodings and compression ---
    ("cp1252.csv", csv(line="\u201c{text}\u201d it\u2019s,{label}").decode().encode("cp1252"), C, Works(says=("read as cp1252",), first={"text": f"\u201c{text(0)}\u201d it\u2019s"})),
    ("utf16.csv", csv().decode().encode("utf-16"), C, Works(says=("read as utf-16",))),
    ("utf16le.csv", csv().decode().encode("utf-16-le"), C, Works(says=("read as utf-16-le",))),
    ("chinese.csv", csv(line="\u8fd9\u662f\u4e00\u4e2a\u5f88\u597d\u7684\u4ea7\u54c1{i},{label}").decode().encode("gb18030"), C, Works(first={"text": "\u8fd9\u662f\u4e00\u4e2a\u5f88\u597d\u7684\u4ea7\u54c10"})),
    ("russian.csv", csv(line="\u044d\u0442\u043e \u0445\u043e\u0440\u043e\u0448\u0438\u0439 \u0442\u043e\u0432\u0430\u0440 {i},{label}").decode().encode("cp1251"), C, Works(says=("read as cp1251",))),
    ("one_byte.csv", csv(line="caf\u00e9 {text},{label}").replace(b" 40,", b" \xe9,"), C, Works(says=("1 bytes of one_byte.csv are not UTF-8, the first in line 42",), first={"text": f"caf\u00e9 {text(0)}"})),
    ("said.csv", csv(line="caf\u00e9 {text},{label}").decode().encode("latin-1"), f"{C} data.encoding=latin-1", Works(first={"text": f"caf\u00e9 {text(0)}"})),
    ("wrong.csv", csv(line="caf\u00e9 {text},{label}").decode().encode("latin-1"), f"{C} data.encoding=utf-8", Refused("data.encoding")),
    ("unknown.csv", csv(), f"{C} data.encoding=utf9", Refused("data.encoding", ("'utf9'",))),
    ("plain.csv.gz", gzip.compress(csv()), C, Works()),
    ("plain.jsonl.bz2", bz2.compress(jsonl(plain())), C, Works()),
    ("plain.csv.xz", lzma.compress(csv()), C, Works()),
    # --- JSON ---
    ("lines.jsonl", jsonl(plain()), C, Works(says=("read as jsonl",))),
    ("lines.json", jsonl(plain()), C, Works()),
    ("array.json", json.dumps(plain()).encode(), C, Works()),
    ("pretty.json", json.dumps(plain(), indent=1).encode(), C, Works()),
    ("under_key.json", json.dumps({"version": 1, "data": plain()}).encode(), C, Works()),
    ("columns.json", json.dumps({k: [r[k] for r in plain()] for k in ("text", "label")}).encode(), C, Works()),
    ("pandas.json", json.dumps({k: {str(i): r[k] for i, r in enumerate(plain())} for k in ("text", "label")}).encode(), C, Works()),
    ("pandas_split.json", json.dumps({"columns": ["text", "label"], "index": [], "data": [list(r.values()) for r in plain()]}).encode(), C, Works()),
    ("after_another.json", "\n".join(json.dumps(r, indent=2) for r in plain()).encode(), C, Works()),
    ("array.txt", json.dumps(plain()).encode(), C, Works(says=("read as jsonl",))),
    ("broken.jsonl", jsonl(plain(), odd='{"text": "a'), C, Works((47, 6, 6), says=("broken.jsonl:21: broken JSON",))),
    ("list.jsonl", jsonl(plain(), odd="[1, 2]"), C, Works((47, 6, 6), says=("list.jsonl:21: must be a JSON object",))),
    ("twice.jsonl", b"".join(b'{"text": "a %d", "label": "x", "text": "b"}\n' % i for i in range(ROWS)), C, Refused("data.text_column", ("'text'",))),
    ("cut.json", json.dumps(plain(), indent=1).encode()[:-40], C, Works((47, 6, 6), says=("broken JSON",))),
    ("late_column.jsonl", jsonl([{"id": 1}, *plain()]), C, Works((48, 6, 6), says=("1 of 61 rows left out", "late_column.jsonl:1: "))),
    ("one_text.jsonl", jsonl(rows(text=lambda i: [text(i)], label=label)), C, Works(first={"text": text(0)})),
    ("texts.jsonl", jsonl(rows(text=lambda i: [text(i), text(i + 1)], label=label)), C, Refused("data.bad_rows", ("holds a list of 2 texts",))),
    ("fasttext.txt", "\n".join(f"__label__{label(i)} {text(i)}" for i in range(ROWS)).encode(), C, Works(says=("begin with __label__",), first={"text": text(0)})),
    ("fasttext_several.txt", "\n".join(f"__label__tax __label__{('law', 'war')[i % 2]} {text(i)}" for i in range(ROWS)).encode(), C, MULTI),
    ("frame.feather", feather(plain()), C, Works(says=("read as arrow",))),
    ("nested.jsonl", jsonl(rows(body=lambda i: {"text": text(i)}, label=label)), f"{C} data.text_column=body.text", Works(first={"text": text(0)})),
    # --- folders ---
    ("shards", {f"train-0000{k}-of-00002.parquet": parquet(plain()) for k in (0, 1)} | {"validation-00000-of-00001.parquet": parquet(plain()[:20])}, C, Works((108, 20, 12), says=("train: 2 files", "eval: validation-00000"))),
    ("clone", {"README.md": b"x", "data/train-00000-of-00001.parquet": parquet(plain())}, C, Works()),
    ("named", {f"{s}.csv": csv() for s in ("train", "dev", "test")}, C, Works((60, 60, 60), says=("eval: dev.csv", "test: test.csv"))),
    ("named", {f"{s}.csv": csv() for s in ("train", "dev", "test")}, f"{C} data.eval_split=dev data.test_split=dev", Works((60, 60, 60))),
    ("json_folder", {"train.json": jsonl(plain())}, C, Works()),
    ("single", {"reviews.csv": csv()}, C, Works()),
    ("parts", {f"part_{k}.jsonl.gz": gzip.compress(jsonl(plain())) for k in range(3)}, C, Works((144, 18, 18), says=("train: 3 files",))),
    ("imdb", {f"{s}/{label(i)}/{i}_7.txt": text(i).encode() for i in range(ROWS) for s in ("train", "test")} | {f"train/unsup/{i}_0.txt": b"more" for i in range(9)} | {"README": b"x", "imdbEr.txt": b"1\n", "train/urls_pos.txt": b"x"}, C, Works((54, 6, 60), says=("a folder for each class, a file for each text (neg, pos), train: train, test: test", "the folder unsup holds no class"), first={"text": text(0)})),
    ("imdb_train", {f"{label(i)}/{i}_7.txt": text(i).encode() for i in range(ROWS)}, C, Works(says=("a folder for each class",))),
    ("imdb_text", {f"{label(i)}/{i}_7.txt": text(i).encode() for i in range(ROWS)}, f"{C} data=text", Works()),
    ("imdb_empty", {f"{label(i)}/{i}_7.txt": text(i).encode() * (i != 20) for i in range(ROWS)}, C, Works((47, 6, 6), says=("1 of 60 rows left out", "neg/20_7.txt is empty"))),
    ("imdb_cp1252", {f"{label(i)}/{i}_7.txt": f"it\u2019s {text(i)}".encode("cp1252") for i in range(ROWS)}, C, Works(says=("the same or the like of 59 other files",), first={"text": f"it\u2019s {text(0)}"})),
    ("imdb_dev", {f"{s}/{label(i)}/{i}.txt": text(i).encode() for i in range(ROWS) for s in ("train", "dev", "test")}, f"{C} data.eval_split=dev", Works((60, 60, 60))),
    ("imdb_no_dev", {f"train/{label(i)}/{i}.txt": text(i).encode() for i in range(ROWS)}, f"{C} data.eval_split=dev", Refused("data.eval_split", ("'dev'",))),
    ("20news", {f"20news-bydate-{s}/{('alt.atheism', 'sci.med')[i % 2]}/{100 + i}": text(i).encode() for i in range(ROWS) for s in ("train", "test")}, C, Works((54, 6, 60), ("alt.atheism", "sci.med"))),
    ("by_split", {f"{s}/{k}.jsonl": jsonl(plain()) for s in ("train", "test") for k in (0, 1)}, C, Works((108, 12, 120))),
    ("unlabelled", {"train.csv": csv(), "test.csv": csv("text", "{text}")}, C, Works(says=("test: the file found has no column 'label'",))),
    ("several", {"books.csv": csv(), "films.csv": csv()}, C, Refused("data.train_split", ("books.csv, films.csv",))),
    ("rare", {"train.csv": csv(), "eval.csv": csv(odd="odd one,z"), "test.csv": csv()}, C, Refused("data.label_column", ("'z'", "eval.csv:22"))),
    ("nothing", {"notes.pdf": b"x"}, C, Refused("data.train_split")),
    ("gone.csv", {}, f"{C} data.path=no_such_file.csv", Refused("data.path", ("no_such_file.csv",))),
    # --- labels ---
    ("int.jsonl", labels_of(0, 1), C, Works(classes=("0", "1"))),
    ("float.jsonl", labels_of(0.0, 1.0), C, Works(classes=("0", "1"))),
    ("mixed.jsonl", labels_of(0, 1.0, "0.0", 1), C, Works(classes=("0", "1"), says=("are one class",))),
    ("fraction.jsonl", labels_of(0.5, 1.0, 1), C, Works(classes=("0.5", "1"))),
    ("space.csv", cells("pos", " pos", "neg", "neg "), C, Works(says=("' pos' and 'pos' are 'pos'",))),
    ("true.csv", cells("True", "true", "False", "false"), C, Works(classes=("False", "True"))),
    ("bool.jsonl", labels_of(True, False), C, Works(classes=("False", "True"))),
    ("case.csv", cells("Pos", "pos", "neg"), C, Works(classes=("Pos", "neg", "pos"), says=("nearly equal: 'Pos' and 'pos'",))),
    ("squared.jsonl", labels_of("\u00b2", "--2", "3"), C, Works(classes=("3", "--2", "\u00b2"))),
    ("ten.jsonl", labels_of(2, 10, -1), C, Works(classes=("-1", "2", "10"))),
    ("zero.jsonl", labels_of("007", "7"), C, Works(classes=("007", "7"))),
    ("nan.jsonl", jsonl(plain(lambda i: float("nan") if i == 30 else i % 2)), C, Works((47, 6, 6), ("0", "1"), says=("nan.jsonl:31: has no label",))),
    ("none.jsonl", jsonl(plain(lambda i: None if i == 30 else i % 2)), C, Works((47, 6, 6), ("0", "1"), says=("none.jsonl:31",))),
    ("many_none.jsonl", jsonl(plain(lambda i: None if i < 5 else i % 2)), C, Refused("data.bad_rows", ("5 of 60 rows", "data.bad_rows=skip"))),
    ("many_none.jsonl", jsonl(plain(lambda i: None if i < 10 else i % 2)), f"{C} data.bad_rows=skip", Works((40, 5, 5), ("0", "1"))),
    ("names.parquet", parquet(plain(lambda i: i % 2), ["sad", "glad"]), C, Works(classes=("sad", "glad"))),
    ("no_label.parquet", parquet(plain(lambda i: -1 if i == 30 else i % 2), ["sad", "glad"]), C, Works((47, 6, 6), ("sad", "glad"), says=("row 31: has no label",))),
    ("rare.csv", csv() + b"".join(b"only one %d,rare%d\n" % (i, i) for i in range(5)), C, Works((53, 6, 6), ("neg", "pos", *(f"rare{i}" for i in range(5))))),
    ("five.csv", cells(*"abcde"), C, Works(classes=tuple("abcde"))),
    ("numbers.csv", cells("0.5", "1,5", "2", "3.25"), f"{C} task_type.problem_type=regression", Works(classes=(), primary="pearson", first={"label": 0.5})),
    ("word.csv", csv("text,label", "{text},{i}", odd="a,much"), f"{C} task_type.problem_type=regression", Works((47, 6, 6), (), "pearson", says=("word.csv:22: the label must be a finite number, got 'much'",))),
    # --- several classes ---
    ("lists.jsonl", labels_of([], ["tax"], ["law", "war"]), C, MULTI),
    ("bars.csv", several("|".join), C, MULTI),
    ("commas.csv", several(", ".join), C, MULTI),
    ("semicolons.csv", several(";".join), C, MULTI),
    ("python.csv", several(lambda names: str(list(names)), "[]"), C, MULTI),
    ("json.csv", several(lambda names: json.dumps(list(names)), "[]"), C, MULTI),
    ("places.csv", cells("Paris, France", "Lyon, France"), C, Works(classes=("Lyon, France", "Paris, France"))),
    ("commas.csv", several(", ".join, "none"), f"{C} task_type.problem_type=single_label", Works((48, 6, 6), classes=("law", "law, war", "none", "tax", "tax, law", "tax, law, war", "tax, war", "war"))),
    ("onehot.csv", csv("text,toxic,insult", "{text},{i},{i}").replace(b",0,0", b",0,1"), f"{C} data.label_columns=[toxic,insult]", Refused("data.bad_rows", ("'toxic' must hold 0 or 1",))),
    ("onehot.jsonl", jsonl(rows(text=text, toxic=lambda i: i % 2, insult=lambda i: i // 2 % 2)), f"{C} data.label_columns=[toxic,insult]", Works(classes=("toxic", "insult"), primary="micro_f1", first={"label": []})),
    ("onehot.jsonl", jsonl(rows(text=text, toxic=lambda i: i % 2, insult=lambda i: i // 2 % 2)), C, Works(classes=("toxic", "insult"), primary="micro_f1")),
    # --- columns by their usual names ---
    ("usual.csv", csv("review,sentiment", "{text},{label}"), C, Works(says=("data.text_column=review, data.label_column=sentiment",))),
    ("capitals.csv", csv("Text,LABEL", "{text},{label}"), C, Works()),
    ("pair.jsonl", jsonl(rows(premise=text, hypothesis=lambda i: text(i + 1), label=label)), C, Works(first={"text": text(0), "text_pair": text(1)})),
    ("unread.jsonl", jsonl(rows(id=lambda i: i, text=text, label=label, url=text)), C, Works(says=("not read: id, url",))),
    ("summary.jsonl", jsonl(rows(document=text, summary=text)), S, LM),
    ("pairs.csv", csv("query,passage", "{text},{i}"), F, Works(classes=(), primary="recall_at_1")),
    # --- words with tags ---
    ("plain.conll", conll(), T, NER),
    ("docstart.conll", conll(head="-DOCSTART- -X- O\n\n"), T, NER),
    ("columns.conll", conll("the DT O\nrome NN B-LOC\nis VB O\nplace{i} NN O\n"), T, NER),
    ("comment.conll", conll("# id {i}\tdomain=train\nthe _ _ O\nrome{i} _ _ B-LOC\n"), T, Works(classes=("B-LOC", "O"), primary="f1", first={"tokens": ["the", "rome0"]})),
    ("hash.conll", conll("# O\nrome{i} B-LOC\n"), T, Works(classes=("B-LOC", "O"), primary="f1", first={"tokens": ["#", "rome0"]})),
    ("nobreak.conll", conll("10\u00a0000 O\nrome{i} B-LOC\n"), T, Works(classes=("B-LOC", "O"), primary="f1", first={"tokens": ["10\u00a0000", "rome0"]})),
    ("zero_width.conll", conll("\u200b O\nthe O\nrome{i} B-LOC\n"), T, Works(classes=("B-LOC", "O"), primary="f1", says=("60 words without a visible",), first={"tokens": ["the", "rome0"]})),
    ("hyphen.conll", conll("\u00ad B-LOC\nrome{i} I-LOC\nis O\n"), T, Works(classes=("B-LOC", "O"), primary="f1", first={"tags": ["B-LOC", "O"]})),
    ("short.conll", conll().replace(b"place20 O", b"place20"), T, Works((47, 6, 6), ("B-LOC", "O"), "f1", says=("short.conll:104: must be a word and a tag",))),
    ("tags.txt", conll(), T, NER),
    ("plain.conllu", conllu(), T, Works(classes=("DET", "NOUN"), primary="accuracy", says=("data.tags_column=upos",), first={"tokens": ["The", "dog0"]})),
    ("plain.conllu", conllu(), f"{T} data.tags_column=xpos", Works(classes=("DT", "NN"), primary="accuracy")),
    ("joined.conllu", conllu("1-2\tThedog\t_\t_\t_\t_\t_\t_\t_\t_\n1\tThe\tthe\tDET\t_\t_\t2\tdet\t_\t_\n1.1\tx\tx\tX\t_\t_\t_\t_\t_\t_\n2\tdog{i}\tdog\tNOUN\t_\t_\t0\troot\t_\t_\n"), T, Works(classes=("DET", "NOUN"), primary="accuracy", says=("60 words written as one", "60 empty nodes"), first={"tokens": ["The", "dog0"]})),
    ("lists.jsonl", jsonl(rows(words=lambda i: ["the", f"rome{i}"], ner_tags=lambda _: ["O", "B-LOC"])), T, NER),
    ("strings.csv", csv("tokens,tags", "\"['the', 'rome{i}']\",\"['O', 'B-LOC']\""), T, NER),
    ("unequal.jsonl", jsonl(rows(tokens=lambda i: ["a", f"b{i}"], tags=lambda i: ["O", "B-LOC"][: 1 if i == 20 else 2])), T, Works((47, 6, 6), ("B-LOC", "O"), "f1", says=("unequal.jsonl:21: 2 words in 'tokens', 1 tags",))),
    # --- brought by strangers ---
    ("spam.csv", ("v1,v2,,,\n" + "\n".join(f"{label(i)},{text(i)} \xe9,,," for i in range(ROWS))).encode("cp1252"), f"{C} data.text_column=v2 data.label_column=v1", Works(says=("read as cp1252",))),
    ("by_id.json", json.dumps({str(i): r for i, r in enumerate(plain())}).encode(), C, Works()),
    ("by_column.json", json.dumps({k: {str(i): r[k] for i, r in enumerate(plain())} for k in ("text", "label")}).encode(), C, Works()),
    ("headless.csv", csv(f"{text(1)},neg"), C, Refused("data.text_column", ("give data.header=",))),
    ("nested.jsonl", jsonl(rows(data=lambda i: {"text": text(i)}, label=label)), f"{C} data.text_column=data.text", Works()),
    ("object_label.jsonl", jsonl(rows(text=text, label=lambda i: {"name": label(i)})), f"{C} data.label_column=label.name", Works()),
    ("object_label.jsonl", jsonl(rows(text=text, label=lambda i: {"name": label(i)})), C, Refused("data.bad_rows", ("data.label_column=label.name",))),
    ("preferences.jsonl", jsonl(rows(prompt=text, chosen=lambda i: f"good {i}", rejected=lambda _: "bad")), L, Works(classes=(), primary="loss", says=("data.completion_column=chosen", "not read: rejected"), first={"prompt": text(0), "completion": "good 0"})),
    ("decimal.csv", ("text;score\n" + "\n".join(f"{text(i)};{i % 5},5" for i in range(ROWS))).encode(), f"{C} data.label_column=score task_type.problem_type=regression", Works(classes=(), primary="pearson", first={"label": 0.5})),
    ("wmt.jsonl", jsonl(rows(translation=lambda i: {"en": text(i), "de": f"gut {i}"})), S, Works(classes=(), primary="loss", first={"source": text(0), "target": "gut 0"})),
    ("flan.jsonl", jsonl(rows(inputs=text, targets=lambda i: f"t {i}")), S, Works(classes=(), primary="loss", first={"source": text(0), "target": "t 0"})),
    ("numpy.csv", ("question,context,answers\n" + "\n".join(f"where {i}?,in rome {i} it is,\"{{'text': array(['rome'], dtype=object), 'answer_start': array([3])}}\"" for i in range(ROWS))).encode(), Q, Works(classes=(), primary="f1", first={"answers": [{"text": "rome", "start": 3}]})),
    ("answer.csv", ("question,context,answer\n" + "\n".join(f"where {i}?,in rome {i} it is,{'rome' if i != 20 else 'paris'}" for i in range(ROWS))).encode(), Q, Works((47, 6, 6), (), "f1", says=("answer.csv:22: 'answer' does not stand in 'context'",), first={"answers": [{"text": "rome", "start": 3}]})),
    ("boolq.jsonl", jsonl(rows(question=lambda i: f"is it {i}?", passage=text, answer=lambda i: bool(i % 2))), C, Works(classes=("False", "True"), first={"text": "is it 0?", "text_pair": text(0)})),
    ("nli.jsonl", jsonl(rows(premise=text, hypothesis=lambda i: text(i + 1), gold_label=label)), C, Works(says=("data.label_column=gold_label",))),
    ("duplicates.csv", csv("id,qid1,qid2,question1,question2,is_duplicate", "{i},1,2,{text},{text},{label}"), C, Works(says=("data.label_column=is_duplicate",))),
    ("dolly.jsonl", jsonl(rows(instruction=text, context=lambda i: f"c {i}", response=lambda i: f"r {i}", category=label)), L, Works(classes=(), primary="loss", first={"prompt": f"{text(0)}\nc 0", "completion": "r 0"})),
    ("percent.jsonl", jsonl(rows(text=text, label=lambda i: ("5%", "10%")[i % 2])), C, Works(classes=("10%", "5%"))),
    ("old_mac.csv", csv(end="\r"), C, Works()),
    ("spans.jsonl", jsonl(rows(text=lambda i: f"in rome {i}", entities=lambda _: [[3, 7, "LOC"]])), T, Refused("data.bad_rows", ("'entities' must be a list of words",))),
    ("strings.jsonl", jsonl(rows(tokens=lambda i: f"in rome{i}", ner_tags=lambda _: "O B-LOC")), T, NER),
    ("one_class.jsonl", jsonl(rows(text=text, label=lambda i: [label(i)])), C, Works(primary="micro_f1")),
    ("headings.csv", csv("id,title,text,label", "{i},head {i},{text},{label}"), C, Works(says=("not read: id, title",))),
    # --- words, a row a word ---
    ("blank_lines.csv", word_rows("word,tag", "the,O", "rome{i},B-LOC"), T, Works(classes=("B-LOC", "O"), primary="f1", says=("120 rows of a word each are 60 sentences, divided by blank lines",), first={"tokens": ["the", "rome0"], "tags": ["O", "B-LOC"]})),
    ("commas.csv", word_rows("word,tag", "the,O", "rome{i},B-LOC", ","), T, NER),
    ("numbered.csv", word_rows("sentence_id,token,label", "{i},the,O", "{i},rome{i},B-LOC", "none"), T, Works(classes=("B-LOC", "O"), primary="f1", says=("divided by the column sentence_id",), first={"tokens": ["the", "rome0"]})),
    ("kaggle.csv", word_rows("Sentence #,Word,POS,Tag", "Sentence: {i},the,DT,O", ",rome{i},NN,B-LOC", "none"), T, Works(classes=("B-LOC", "O"), primary="f1", says=("divided by the column Sentence #",), first={"tokens": ["the", "rome0"]})),
    ("kaggle.csv", word_rows("Sentence #,Word,POS,Tag", "Sentence: {i},the,DT,O", ",rome{i},NN,B-LOC", "none"), f"{T} data.tags_column=POS", Works(classes=("DT", "NN"), primary="accuracy")),
    ("numbered_rows.csv", word_rows("id,word,tag", "1{i},the,O", "2{i},rome{i},B-LOC"), T, Works(classes=("B-LOC", "O"), primary="f1", says=("divided by blank lines",))),
    ("headless.tsv", word_rows("the\tO", "the\tO", "rome{i}\tB-LOC"), T, Works(classes=("B-LOC", "O"), primary="f1", says=("read as conll",))),
    ("tabs.tsv", word_rows("word\ttag", "the\tO", "rome{i}\tB-LOC"), T, NER),
    ("words.jsonl", jsonl([{"sent_id": i // 2, "word": ("the", f"rome{i}")[i % 2], "ner": ("O", "B-LOC")[i % 2]} for i in range(2 * ROWS)]), T, NER),
    ("endless.csv", word_rows("word,tag", "the,O", "rome{i},B-LOC", "none"), T, Refused("data.tokens_column", ("nothing tells where a sentence ends", "sentence_id"))),
    # --- splits in one file; workbooks ---
    ("splits.json", json.dumps({"train": plain(), "validation": plain()[:10], "test": plain()[:8]}).encode(), C, Works((60, 10, 8), says=("eval: the 10 rows under 'validation' of splits.json",))),
    ("splits.json", json.dumps({"train": plain(), "dev": plain()[:10]}).encode(), f"{C} data.eval_split=dev", Works((54, 10, 6))),
    ("two_splits.json", json.dumps({"version": "1", "train": plain(), "dev": plain()[:10]}).encode(), C, Works((54, 10, 6))),
    ("splits.json", json.dumps({"train": plain(), "dev": plain()[:10]}).encode(), f"{C} data.eval_split=val", Refused("data.eval_split", ("'val'",))),
    ("sheet.xlsx", workbook(sheet()), C, Works(says=("read as excel",))),
    ("sheets.xlsx", workbook(sheet(), "notes", "old"), C, Works(says=("the sheet 'Sheet' of sheets.xlsx is read, the first of 3",))),
    ("top.xlsx", workbook([[], ["Text ", "Label"], *sheet()[1:]]), C, Works()),
    ("hole.xlsx", workbook([*sheet()[:21], ["no label", None], *sheet()[21:]]), C, Works(says=("hole.xlsx row 22: has no label",))),
    ("numbers.xlsx", workbook([["text", "label"], *([text(i), i % 2] for i in range(ROWS))]), C, Works(classes=("0", "1"))),
    ("empty.xlsx", workbook([["text", "label"]]), C, Refused("data.path", ("holds no row",))),
    ("named.csv", workbook(sheet()), C, Works(says=("read as excel",))),
    ("named.csv", workbook(sheet()), f"{C} data=csv", Refused("data.source", ("not csv but excel",))),
    # --- chats and prompts ---
    ("pairs.jsonl", jsonl(PAIRS), L, LM),
    ("alpaca.json", json.dumps(ALPACA, indent=1).encode(), L, Works(classes=(), primary="loss", says=("data.input_column=input",))),
    ("openai.jsonl", chats(), L, LM),
    ("sharegpt.jsonl", jsonl(SHAREGPT), L, Works(classes=(), primary="loss", first={"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": text(0)}, {"role": "assistant", "content": "good 0"}]})),
    ("string.jsonl", jsonl(rows(messages=lambda i: json.dumps(chat(i)))), L, LM),
    ("parts.jsonl", chats(answer=[{"type": "text", "text": "good"}, {"type": "text", "text": "day"}]), L, Works(classes=(), primary="loss", first={"messages": [{"role": "user", "content": text(0)}, {"role": "assistant", "content": "good\nday"}]})),
    ("preferred.jsonl", jsonl(rows(chosen=chat, rejected=chat)), L, LM),
    ("image.jsonl", chats(odd=[{"role": "user", "content": [{"type": "image_url"}]}, *chat(1)[1:]]), L, Works((47, 6, 6), (), "loss", says=("image.jsonl:21: 'messages' has a part of the type image_url",))),
    ("tools.jsonl", jsonl(TOOL_CHATS), L, Works(classes=(), primary="loss", first={"tools": TOOLS})),
    ("empty_answer.jsonl", chats(odd=chat(1, "")), L, Works((47, 6, 6), (), "loss", says=("empty_answer.jsonl:21", "with nothing in it"))),
    ("null_answer.jsonl", chats(odd=chat(1, None)), L, Works((47, 6, 6), (), "loss", says=("null_answer.jsonl:21",))),
    ("no_answer.jsonl", chats(odd=chat(1)[:1]), L, Works((47, 6, 6), (), "loss", says=("no_answer.jsonl:21", "nothing to learn"))),
    ("no_content.jsonl", chats(odd=[{"role": "user"}, *chat(1)[1:]]), L, Works((47, 6, 6), (), "loss", says=("no_content.jsonl:21",))),
    ("chats.parquet", parquet([{"messages": chat(i)} for i in range(ROWS)]), L, LM),
    ("blank.jsonl", jsonl(PAIRS, odd='{"prompt": "a", "completion": "  "}'), L, Works((47, 6, 6), (), "loss", says=("blank.jsonl:21: has nothing in 'completion'",))),
    ("texts.jsonl", jsonl(rows(content=text)), L, LM),
    # --- questions ---
    ("asked.jsonl", jsonl(ASKED), Q, Works(classes=(), primary="f1")),
    ("squad.json", json.dumps(SQUAD).encode(), Q, Works(classes=(), primary="f1", says=("read as squad",))),
    ("squad.json", json.dumps(SQUAD).encode(), f"{Q} data=squad", Works(classes=(), primary="f1")),
    ("byte_offset.jsonl", jsonl([r | {"answers": {"text": ["x"], "answer_start": [4]}} if i == 20 else r for i, r in enumerate(ASKED)]), Q, Works(classes=(), primary="f1", says=("1 of ",))),
    ("no_offset.jsonl", jsonl([r | {"answers": {"text": ["x"]}} if i == 20 else r for i, r in enumerate(ASKED)]), Q, Works((47, 6, 6), (), "f1", says=("no_offset.jsonl:21",))),
]  # fmt: skip


def placed(folder: Path, name: str, content: bytes | Files) -> Path:
    """Write a case's file, or folder of files."""
    if isinstance(content, bytes):
        content, folder, name = {name: content}, folder, ""
        target = folder / next(iter(content))
    else:
        target = folder / name
    for file, data in content.items():
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return target


def words_of(typed: str, path: Path) -> list[str]:
    """Return what is typed; quotes keep spaces and commas together."""
    own = [w.strip("'") if w.startswith("'") else w for w in typed.split()]
    named = [] if "data.path=" in typed else [f"data.path='{path}'"]
    return [*own, *named]


IDS = [f"{name} {typed.replace('task_type=', '')}" for name, _, typed, _ in CASES]


@pytest.mark.parametrize(("name", "content", "typed", "outcome"), CASES, ids=IDS)
def test_table(name, content, typed, outcome, tmp_path, tiny_bert, capsys):
    path = placed(tmp_path, name, content)
    words = words_of(typed, path)
    if isinstance(outcome, Refused):
        refused(outcome, [*words, f"model.pretrained={tiny_bert}"], tmp_path / "outputs", capsys)
        return
    spec = compose.compose_trial(words)
    task = tasks.make(spec.task_type)
    data = workload.load_rows(spec, task)
    assert task.fit(data) == []
    assert tuple(len(data.splits[s]) for s in ("train", "eval", "test")) == outcome.rows, data.notes
    assert tuple(getattr(task, "classes", ())) == outcome.classes
    assert task.primary == outcome.primary
    notes = " | ".join([*data.notes, *task.notes])
    assert not [part for part in outcome.says if part not in notes], notes
    if outcome.first:
        found = [r for split in data.splits.values() for r in split]
        assert any(outcome.first.items() <= r.items() for r in found), found[0]


def refused(outcome: Refused, words: list[str], outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a command ends with 1 and one sentence, and makes nothing."""
    capsys.readouterr()
    assert main.main([*words, f"outputs={outputs}"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert [line for line in lines if line.strip().startswith(outcome.key)], lines
    assert len(lines) == 2 and lines[0].endswith("1 problem in the configuration"), lines
    assert not [part for part in outcome.says if part not in lines[1]], lines
    assert not outputs.exists()


def test_workbook_without_its_reader_is_refused_with_both_ways_out(tmp_path, monkeypatch):
    (tmp_path / "a.xlsx").write_bytes(workbook(sheet()))
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    spec = compose.compose_trial([C, f"data.path={tmp_path / 'a.xlsx'}"])
    with pytest.raises(
        ConfigError, match=r"a.xlsx is an Excel workbook; save the sheet as CSV, or: pip install openpyxl"
    ):
        workload.load_rows(spec, tasks.make(spec.task_type))


def test_texts_in_folders_are_running_text_to_a_language_model(tmp_path, tiny_bert):
    path = placed(tmp_path, "books", {f"{k}/{i}.txt": TEXT for i in range(2) for k in ("sea", "land")})
    spec = compose.compose_trial([L, f"data.path={path}", "data.max_tokens=40", f"model.pretrained={tiny_bert}"])
    records = workload.load_rows(spec, tasks.make(spec.task_type)).splits["train"]
    assert len(records) > 100 and all(len(r["text"].split()) < 40 for r in records)
    assert {Path(r.file).parent.name for r in records} == {"sea", "land"}


def test_folders_that_save_to_disk_wrote_are_read(tmp_path):
    table = datasets.Dataset.from_list(plain(lambda i: i % 2)).cast_column(
        "label", datasets.ClassLabel(names=["no", "yes"])
    )
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(tmp_path / "dict")
    for name, sizes in (("one", (48, 6, 6)), ("dict", (54, 60, 6))):
        spec = compose.compose_trial([C, f"data.path={tmp_path / name}"])
        task = tasks.make(spec.task_type)
        data = workload.load_rows(spec, task)
        assert task.fit(data) == [] and task.classes == ["no", "yes"]
        assert tuple(len(data.splits[s]) for s in ("train", "eval", "test")) == sizes


def test_there_are_well_over_eighty_cases_and_each_is_named_once():
    assert len(CASES) > 120 and len(set(IDS)) == len(IDS)
