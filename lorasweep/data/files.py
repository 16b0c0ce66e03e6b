"""A data file to bytes and text: compression, encoding, and files that only look like data."""

import bz2
import gzip
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from lorasweep.errors import ConfigError

COMPRESSED: dict[bytes, Callable[..., IO[Any]]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
"""First bytes of a compressed file, and what opens it."""

MOST_TIMES = 200
"""Text becomes 3 to 20 times smaller, repeated cells a hundred times; a file that grows more is a trap."""
SURELY_SMALL = 2**26
"""So many bytes are taken whatever they were compressed from."""

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz")

MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
"""Byte order marks, the longer before the shorter."""

SAMPLE_BYTES = 2**20
"""So much of a file that is not UTF-8 is looked at to find its encoding."""


def content(path: Path, at_most: int | None = None) -> bytes:
    """Return a file's bytes, decompressed. Raises ConfigError for what is no data at all."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            opener = next((o for mark, o in COMPRESSED.items() if head.startswith(mark)), None)
            if opener is None:
                data = head + file.read(-1 if at_most is None else at_most)
        if opener is not None:
            most = max(SURELY_SMALL, MOST_TIMES * path.stat().st_size)
            with opener(path, "rb") as packed:
                data = packed.read(most + 1)
            if len(data) > most:
                raise ConfigError(
                    [f"data.path: {path} grows to more than {MOST_TIMES} times its size; unpack it first"]
                )
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise ConfigError([f"data.path: cannot read {path} ({error})"]) from error
    _refuse_what_is_no_data(path, data)
    return data


def is_workbook(path: Path) -> bool:
    """Tell whether a file is an Excel workbook: a zip archive that is named as one, or that holds one's table."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "xl/workbook.xml" in archive.namelist()


PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
"""How Python's pickles begin, a DataFrame's and those of torch too."""


def _refuse_what_is_no_data(path: Path, data: bytes) -> None:
    start = data[:512].lstrip()
    if not start:
        raise ConfigError([f"data.path: {path} is empty"])
    reasons = {
        b"version https://git-lfs": "is a Git LFS pointer, not the data; fetch the file itself with `git lfs pull`",
        b"<!doctype html": "is a web page, not data; download the file itself",
        b"<html": "is a web page, not data; download the file itself",
        b"PK\x03\x04": "is a zip archive, or a broken Excel workbook; unpack it, or save the sheet as CSV",
        b"\xd0\xcf\x11\xe0": "is an old Excel workbook; save the sheet as CSV, or as .xlsx",
        b"SQLite format 3": "is a database; export the table as CSV",
        b"\x89HDF\r\n": "is an HDF5 file; save the table as CSV or Parquet",
        b"\x93NUMPY": "is a NumPy array; save the table as CSV or Parquet",
        b"Obj\x01": "is an Avro file; save the table as CSV or Parquet",
        b"ORC": "is an ORC file; save the table as CSV or Parquet",
        b"%PDF-": "is a PDF; export its text, or its table as CSV",
        b"{\\rtf": "is a text of a word processor (RTF); save it as plain text",
        b"7z\xbc\xaf": "is a 7-Zip archive; unpack it",
        b"Rar!\x1a\x07": "is a RAR archive; unpack it",
        **dict.fromkeys(
            PICKLES, "is a pickle, which may run any code; save the table as CSV or Parquet where it was made"
        ),
    }
    for mark, reason in reasons.items():
        if start.startswith(mark) or start.lower().startswith(mark):
            raise ConfigError([f"data.path: {path} {reason}"])


def text_of(path: Path, encoding: str | None = None) -> tuple[str, list[str]]:
    """Return a file's text and a note where its encoding was guessed, or null bytes were taken out.

    Raises ConfigError where it is not text in the `encoding` that was asked for.
    """
    data = content(path)
    name = encoding or encoding_of(data) or "utf-8"
    notes: list[str] = []
    try:
        text = data.decode(name)
    except LookupError:
        known = "utf-8, cp1252 or gb18030"
        raise ConfigError([f"data.encoding: Python knows no encoding '{encoding}'; try {known}"]) from None
    except UnicodeDecodeError as error:
        if encoding:
            raise ConfigError([f"data.encoding: {path} is not {encoding} ({error})"]) from error
        repaired = data.decode("utf-8", "replace")
        wrong, right = repaired.count("\ufffd"), sum(not c.isascii() for c in repaired)
        if 10 * wrong <= right:
            line = data[: error.start].count(b"\n") + 1
            notes.append(
                f"{wrong} bytes of {path.name} are not UTF-8, the first in line {line}; they are read as \ufffd"
            )
            text, name = repaired, "utf-8"
        else:
            name = _guess(data, path, error)
            text = data.decode(name)
    if not encoding and name not in ("utf-8", "utf-8-sig"):
        notes.append(f"{path.name} is not UTF-8 and was read as {name}; data.encoding=... if that is wrong")
    nulls = text.count("\0")
    if nulls:
        text = text.replace("\0", "")
        notes.append(f"{nulls} null bytes were taken out of {path.name}")
    return text.removeprefix("\ufeff"), notes


def encoding_of(data: bytes) -> str | None:
    """Return the encoding that a byte order mark tells, or that null bytes at every other place do."""
    name = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    if name is None and len(data) >= 4:
        sample = data[: 2 * (min(len(data), SAMPLE_BYTES) // 2)]
        even, odd = sample[::2].count(0), sample[1::2].count(0)
        half = len(sample) / 2
        if odd > 0.4 * half and even < 0.1 * half:
            return "utf-16-le"
        if even > 0.4 * half and odd < 0.1 * half:
            return "utf-16-be"
    return name


def _guess(data: bytes, path: Path, error: UnicodeDecodeError) -> str:
    """Return the encoding that makes the most likely text. Raises ConfigError where none fits all of it."""
    from charset_normalizer import from_bytes

    lines = b"\n".join(line for line in data.split(b"\n") if not line.isascii())[:SAMPLE_BYTES]
    best = from_bytes(lines).best()
    for name in [_japanese(lines), _western(lines), best.encoding if best else None, "gb18030", "cp1252"]:
        if name and _decodes(data, name):
            return name
    line = data[: error.start].count(b"\n") + 1
    raise ConfigError(
        [f"data.encoding: {path}:{line}: not UTF-8 ({error.reason}), and no other fits; give data.encoding=..."]
    )


def _western(lines: bytes) -> str | None:
    """Return cp1252 where what is not ASCII stands alone or in pairs between ASCII, as accents and quotes do."""
    foreign = sum(b > 127 for b in lines)
    longest = run = 0
    for b in lines:
        run = run + 1 if b > 127 else 0
        longest = max(longest, run)
    return "cp1252" if foreign < 0.15 * len(lines) and longest <= 3 else None


def _japanese(lines: bytes) -> str | None:
    """Return the Japanese encoding in which a fifth of what is not ASCII are kana, if one is."""
    for name in ("shift_jis", "euc_jp"):
        text = lines.decode(name, "replace")
        foreign = [c for c in text if not c.isascii()]
        kana = sum("\u3040" <= c <= "\u30ff" for c in foreign)
        if "\ufffd" not in text and 5 * kana > len(foreign):
            return name
    return None


def _decodes(data: bytes, name: str) -> bool:
    try:
        data.decode(name)
    except (UnicodeDecodeError, LookupError):
        return False
    return True
