"""The built-in corpus: the text of the Python that runs us, read with ast.

Real words and labels on every machine, no download. To parse it takes seconds, so a view's rows are kept on disk.
Its docstrings differ a little between Python versions; the data fingerprint tells them apart.
"""

import ast
import hashlib
import json
import keyword
import platform
import re
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from lorasweep.files import cache_folder, read_json, replace_file

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
MAX_LINE_TOKENS = 60
MAX_LINES = 2000
MAX_CONTEXT_WORDS = 120
MAX_ANSWER_WORDS = 15

RETURNS = re.compile(r"(?:^|(?<=[.!?:] ))(?P<verb>returns?|raises?) (?P<what>.+?)(?=[.;](?: |$)|$)", re.IGNORECASE)
"""A sentence that begins with Return or Raise, up to its end."""

FSTRING = re.compile(r"[a-z]*[ft][a-z]*['\"]", re.IGNORECASE)


@dataclass(frozen=True)
class Docstring:
    package: str
    module: str
    name: str
    kind: str
    text: str
    """First paragraph, white space collapsed."""
    arguments: tuple[str, ...] = ()
    """Names of a function's arguments, without self and cls."""


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


def naming() -> list[dict]:
    """Return SEQ_2_SEQ_LM rows: the docstring of a function, its name masked, and the name in words."""
    rows: dict[str, dict] = {}
    for doc in docstrings():
        target = in_words(doc.name)
        if doc.kind.endswith("FunctionDef") and target:
            text = re.sub(rf"\b{re.escape(doc.name)}\b", "[name]", doc.text, flags=re.IGNORECASE)
            rows.setdefault(text.casefold(), {"source": text, "target": target})
    return list(rows.values())


def described() -> list[dict]:
    """Return FEATURE_EXTRACTION rows: a docstring, and what it describes: module, name and arguments in words."""
    rows: dict[str, dict] = {}
    for doc in docstrings():
        module = "" if doc.kind == "Module" else in_words(doc.module.removesuffix(".__init__"))
        arguments = f" ({', '.join(map(in_words, doc.arguments))})" if doc.arguments else ""
        positive = f"{module} {in_words(doc.name.removesuffix('.__init__'))}{arguments}".strip()
        rows.setdefault(positive, {"anchor": doc.text, "positive": positive})
    return list(rows.values())


def in_words(name: str) -> str:
    """Return the words of a dotted, snake or camel name, lower case: `getFile_names` is `get file names`."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)).lower()


def topics() -> list[dict]:
    """Return CAUSAL_LM rows: the paragraphs of the language reference in pydoc_data, and the docstrings."""
    from pydoc_data.topics import topics as pages

    raw = chain.from_iterable(re.split(r"\n\s*\n", page) for page in pages.values())
    paragraphs = [" ".join(p.split()) for p in raw]
    texts = [p for p in paragraphs if len(p.split()) >= MIN_WORDS] + [d.text for d in docstrings()]
    return [{"text": text} for text in dict.fromkeys(texts)]


def python_tokens() -> list[dict]:
    """Return TOKEN_CLS rows: the tokens of a logical line of Python, each with its kind.

    Kinds are the tokenizer's (STRING, NUMBER, OP, COMMENT), and KEYWORD or NAME for a name. Lines with f-strings are
    left out: Python versions split them differently.
    """
    rows: dict[tuple[str, ...], dict] = {}
    for package in PACKAGES:
        for path in _files(package):
            for tokens, tags in _logical_lines(path):
                if MIN_WORDS <= len(tokens) <= MAX_LINE_TOKENS:
                    rows.setdefault(tuple(tokens), {"tokens": tokens, "tags": tags})
    found = list(rows.values())
    return found[:: -(-len(found) // MAX_LINES)]


def returned() -> list[dict]:
    """Return QUESTION_ANS rows: what a docstring says that its function returns or raises; a module is a group."""
    rows: dict[tuple[str, str], dict] = {}
    for package in PACKAGES:
        for module, tree in _modules(package):
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    for row in _answers(node):
                        rows.setdefault((row["question"], row["context"]), row | {"group": module})
    return list(rows.values())


def _answers(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[dict]:
    """Yield question, context and answer for each verb of RETURNS that begins a sentence of the docstring."""
    context = " ".join((ast.get_docstring(node) or "").split()[:MAX_CONTEXT_WORDS])
    asked = set()
    for found in RETURNS.finditer(context):
        verb = found["verb"].lower().rstrip("s")
        if verb not in asked and 1 < len(found["what"].split()) <= MAX_ANSWER_WORDS:
            asked.add(verb)
            answer = {"text": found["what"], "start": found.start("what")}
            yield {"question": f"What does {node.name} {verb}?", "context": context, "answers": [answer]}


def _logical_lines(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Yield tokens and kinds of each logical line; nothing of a file that this Python cannot read."""
    try:
        yield from list(_lines(path))
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
        return


def _lines(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    tokens: list[str] = []
    tags: list[str] = []
    with path.open(encoding="utf8") as file:
        for token in tokenize.generate_tokens(file.readline):
            kind = tokenize.tok_name[token.type]
            if kind == "NEWLINE":
                if not any(tag.startswith(("FSTRING", "TSTRING")) for tag in tags):
                    yield tokens, tags
                tokens, tags = [], []
            elif kind not in ("NL", "INDENT", "DEDENT", "ENDMARKER"):
                if kind == "STRING" and FSTRING.match(token.string):
                    kind = "FSTRING"
                tokens.append(" ".join(token.string.split()))
                tags.append("KEYWORD" if keyword.iskeyword(token.string) else kind)


def _files(package: str) -> Iterator[Path]:
    """Yield the source files of a package, its tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted((root / package).rglob("*.py")):
        if not {"test", "tests"} & set(path.relative_to(root).with_suffix("").parts):
            yield path


def _modules(package: str) -> Iterator[tuple[str, ast.Module]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _files(package):
        parts = path.relative_to(root).with_suffix("").parts
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
            yield Docstring(package, module, name, type(node).__name__, text, _arguments(node))


def _arguments(node: ast.AST) -> tuple[str, ...]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ()
    found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return tuple(a.arg for a in found if a.arg not in ("self", "cls"))


VIEWS: dict[str, Callable[[], list[dict]]] = {
    view.__name__: view for view in (labelled, naming, described, topics, python_tokens, returned)
}
"""What the corpus is to a task that names it so."""


# --- kept on disk ----------------------------------------------------------------------------------------------------


def rows(view: str) -> list[dict]:
    """Return a view's rows: those in the user's cache folder where they came from the very files that are here."""
    path = cache_folder() / "builtin" / f"{view}-{platform.python_version()}.json"
    key = _key()
    with suppress(OSError):
        kept = read_json(path)
        if kept is not None and kept.get("key") == key:
            return list(kept["rows"])
    made = VIEWS[view]()
    with suppress(OSError):  # a cache that cannot be written is a slow start, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"key": key, "rows": made}))
    return made


def _key() -> str:
    """Return a digest that changes with the Python that runs, a file that is read, and how they are read."""
    facts = [sys.version, hashlib.sha256(Path(__file__).read_bytes()).hexdigest()]
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in [*(path for package in PACKAGES for path in _files(package)), root / "pydoc_data" / "topics.py"]:
        with suppress(FileNotFoundError):
            seen = path.stat()
            facts.append(f"{path} {seen.st_size} {seen.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()
