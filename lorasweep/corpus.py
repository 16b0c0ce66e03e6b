"""The built-in corpus: the text of the Python that runs us, read with ast.

Real words and labels on every machine, no download.
Its docstrings differ a little between Python versions; the data fingerprint tells them apart.
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGES = (
    "asyncio",
    "collections",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
"""Ten packages that Python 3.11 to 3.14 all have, whatever the installation leaves out."""

MIN_WORDS = 5


@dataclass(frozen=True)
class Docstring:
    package: str
    module: str
    name: str
    kind: str
    text: str
    """First paragraph, white space collapsed."""


@cache
def docstrings() -> tuple[Docstring, ...]:
    """Return the docstrings of five words or more of PACKAGES, in order of module and line, each text once."""
    seen: dict[str, Docstring] = {}
    for package in PACKAGES:
        for module, tree in _modules(package):
            for doc in _of_module(package, module, tree):
                seen.setdefault(doc.text.casefold(), doc)
    return tuple(seen.values())


def labelled() -> list[dict]:
    """Return SEQ_CLS rows: a docstring with every package's name masked, and the package it comes from."""
    names = re.compile(r"\b(" + "|".join(PACKAGES) + r")\b", re.IGNORECASE)
    rows: dict[str, dict] = {}
    for doc in docstrings():
        text = names.sub("[package]", doc.text)
        rows.setdefault(text.casefold(), {"text": text, "label": doc.package})
    return list(rows.values())


def topics() -> list[dict]:
    """Return CAUSAL_LM rows: the paragraphs of the language reference in pydoc_data, and the docstrings."""
    from pydoc_data.topics import topics as pages

    paragraphs = [" ".join(p.split()) for page in pages.values() for p in re.split(r"\n\s*\n", page)]
    texts = [p for p in paragraphs if len(p.split()) >= MIN_WORDS] + [d.text for d in docstrings()]
    return [{"text": text} for text in dict.fromkeys(texts)]


def _modules(package: str) -> Iterator[tuple[str, ast.Module]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if "test" in parts or "tests" in parts:
            continue
        try:
            yield ".".join(parts), ast.parse(path.read_text(encoding="utf8"))
        except (SyntaxError, UnicodeDecodeError):
            continue


def _of_module(package: str, module: str, tree: ast.Module) -> Iterator[Docstring]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if len(text.split()) >= MIN_WORDS:
            name = module if isinstance(node, ast.Module) else node.name
            yield Docstring(package, module, name, type(node).__name__, text)
