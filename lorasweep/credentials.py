"""Keep passwords and tokens out of everything that is written, logged or handed on.

What is asked passes `taken_out` at the door: what a password opens goes into the environment, where this process and
its workers look for it. What others say, such as a server's error, passes `redact` on its way out.
"""

import base64
import ctypes
import html
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote, quote_plus, unquote

from lorasweep.errors import ConfigError

HIDDEN = "***"

# --- what looks like a secret ----------------------------------------------------------------------------------------

DATABASES = (
    "postgres",
    "mysql",
    "mariadb",
    "mssql",
    "oracle",
    "redis",
    "mongodb",
    "amqp",
    "cockroachdb",
    "ssh",
    "sftp",
)
"""Schemes, by their beginnings, whose URLs name a user without harm, and whose paths hold no @."""

_BEGIN = r"(?:(?<![A-Za-z0-9\\])|(?<=\\)(?![nrt])|(?<=\\[nrt]))"
"""Where a word begins, in a text whose line ends may be written out, as in JSON."""
_QUOTE = r"(?:\\*['\"]|&quot;|&#x27;|&#3[49];)"
"""A quotation mark, however it is escaped."""


def _run(without: str) -> str:
    """Return a pattern of a sign that is no space, no quote, no line end that is written out, and none of these."""
    return rf"(?:[^\s'\"<>`\\{without}]|\\(?![nrt'\"\\]))"


_URL = re.compile(rf"(?<=[\w+])(:/{{1,2}})({_run('/')}{_run('')}*)")
"""A URL behind its scheme; one slash is left of two where it was taken for a path."""
_SCHEME = re.compile(rf"{_BEGIN}[A-Za-z][\w+.-]*[\w+]$")

_NAME = r"(?:token|secret|password|passwd|passphrase|pwd|credential|signature|(?:api|access|secret|account)[_-]?key)"
_QUERY = re.compile(
    rf"(?i)((?:[?&;#]|%3f|%26)(?:[\w.-]{{0,40}}{_NAME}|sig|key|auth|jwt|code|pass|sas|x-(?:amz|goog)-[\w-]+|"
    rf"awsaccesskeyid|subscription-key)(?:=|%3d)){_run('&;#')}+"
)
"""A parameter of a URL that opens something."""

_SETTING = re.compile(rf"(?i)({_NAME}=)(\\*'[^']*'|\\*\"[^\"]*\"|&#x27;[^&]*&#x27;|&quot;[^&]*&quot;|{_run('&,;)}')}+)")
"""`password=...` of a connection string, a shell line or an error."""
_IN_A_PATH = re.compile(r"(?:/|\\(?![nrt]))[\w.-]*$")
"""What stands before a folder's name: `/token=3/part.csv` is one."""

_FIELD = re.compile(
    rf"(?i)((?:password|passwd|passphrase|client_secret|(?:x-)?api[_-]?key|access_token|private-token|"
    rf"secret_access_key|(?:proxy-)?authorization){_QUOTE}?\s{{0,3}}:\s{{0,3}}{_QUOTE}?"
    rf"(?:(?:bearer|basic|token|digest)\s{{1,3}})?){_run('&,}')}+"
)
_QUOTED_FIELD = re.compile(rf"(?i)({_QUOTE}(?:token|secret|pwd){_QUOTE}\s{{0,3}}:\s{{0,3}}{_QUOTE})[^'\"&]+")
"""An entry of JSON, YAML or a dict, or a header."""

_HEADER = re.compile(
    r"(?i)((?:bearer|basic)\s{1,3})"
    r"(?=[\w.~+/=-]{0,200}\d|[\w.~+/=-]{20}|[\w+/]{0,200}=)[\w.~+/=-]{6,}"
)
"""A header's value; a word after the word `bearer` is none."""

_SHAPES = re.compile(
    rf"{_BEGIN}(?:"
    r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|sk-(?=[\w-]{0,99}[A-Za-z0-9]{20}|(?=[\w-]{0,99}\d)[\w-]{0,99}[A-Za-z0-9]{16})[\w-]{16,}"  # OpenAI and others
    r"|[srp]k_(?:live|test)_[A-Za-z0-9]{12,}"  # Stripe
    r"|gh[opusr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|gl(?:pat|ptt|dt|rt|cbt|ft|soat|agent|imt|oas|ffct)-[\w-]{16,}"  # GitLab
    r"|(?:AKIA|ASIA|ABIA|ACCA|AGPA|AIDA|AROA|AIPA|ANPA|ANVA)[A-Z0-9]{16}(?![A-Za-z0-9])"  # AWS
    r"|AIza[\w-]{30,}|ya29\.[\w-]{20,}"  # Google
    r"|xox[abeoprs]-[\w-]{10,}|xapp-[\w-]{10,}"  # Slack
    r"|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{40,}|dapi[0-9a-f]{32}|dckr_pat_[\w-]{20,}|r8_[A-Za-z0-9]{30,}"
    r"|eyJ[\w-]{6,4000}\.[\w-]{8,8000}\.[\w-]+"  # JSON web token
    r")"
)
_MARKS = (
    *(
        "hf_",
        "api_org_",
        "sk-",
        "k_live_",
        "k_test_",
        "gho_",
        "ghp_",
        "ghu_",
        "ghs_",
        "ghr_",
        "github_pat_",
        "gl",
        "AKIA",
    ),
    *("ASIA", "ABIA", "ACCA", "AGPA", "AIDA", "AROA", "AIPA", "ANPA", "ANVA", "AIza", "ya29.", "xox", "xapp-", "npm_"),
    *("pypi-", "dapi", "dckr_pat_", "r8_", "eyJ"),
)
"""A long text without any of these holds no such shape; to look for them takes a hundredth of the time."""
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)

_SECRET_NAME = re.compile(
    r"(?i)(TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIALS?|(?:SECRET|ACCESS|API|PRIVATE|ACCOUNT|STORAGE|SIGNING|"
    r"ENCRYPTION|AUTH|SERVICE|MASTER)_?KEY|_PASS|_PWD|_PAT|_SAS|_KEY_SECRET|CONNECTION_STRING|_AUTH)$"
)
SECRET_LENGTH = 8
"""Shorter values of the environment's secrets are not looked for: they may be parts of words."""
SHORT_SECRET = re.compile(r"(?=.*[A-Za-z])(?=.*\d)\w{6,7}")
"""Unless they are of such a kind, and then as words alone."""


def redact(text: str) -> str:
    """Return the text with *** for what looks like a secret, and for the secrets in this process's environment."""
    return _without_settings(_without_tokens(text))


def _without_tokens(text: str) -> str:
    """Leave out what is a secret wherever it stands, in a program or a pattern too."""
    text = _URL.sub(_without_userinfo, _PRIVATE_KEY.sub(HIDDEN, text))
    text = _HEADER.sub(rf"\1{HIDDEN}", _QUERY.sub(rf"\1{HIDDEN}", text))
    if any(mark in text for mark in _MARKS):
        text = _SHAPES.sub(HIDDEN, text)
    for value in _secrets_of_the_environment():
        for form in _forms(value) if len(value) >= SECRET_LENGTH else ():
            text = text.replace(form, HIDDEN)
        if len(value) < SECRET_LENGTH and value in text:
            text = re.sub(rf"\b{re.escape(value)}\b", HIDDEN, text)
    return text


def _without_settings(text: str) -> str:
    """Leave out the values of what is called a password."""
    text = _QUOTED_FIELD.sub(rf"\1{HIDDEN}", _FIELD.sub(rf"\1{HIDDEN}", text))
    return _SETTING.sub(_without_value, text)


def _without_value(found: re.Match[str]) -> str:
    before = found.string[max(0, found.start() - 40) : found.start()]
    return found.group() if _IN_A_PATH.search(before) else found.group(1) + HIDDEN


def _without_userinfo(found: re.Match[str]) -> str:
    mark, rest = found.groups()
    scheme = _SCHEME.search(found.string[max(0, found.start() - 40) : found.start()])
    if scheme is None:
        return found.group()
    end = _end_of_userinfo(scheme.group(), rest)
    if end < 0 or (scheme.group().startswith(DATABASES) and ":" not in rest[:end]):
        return found.group()
    return f"{mark}{HIDDEN}{rest[end:]}"


def _end_of_userinfo(scheme: str, rest: str) -> int:
    """Return where the @ stands that ends user and password, -1 where there are none.

    A password may hold @, / and ? as they are; an @ may also stand in a path, or in a query's value.
    """
    head, mark, query = rest.partition("?")
    before = query.rpartition("@")[0]
    at = head.rfind("@")
    if mark and "@" in query and (at < 0 or "=" not in before):
        at = len(head) + 1 + len(before)
    if at < 0:
        return -1
    authority, slash, _ = rest[:at].partition("/")
    if not slash or "@" in authority or len(head) < at:
        return at
    user, colon, port = authority.partition(":")
    is_port = port.isdigit() and not scheme.startswith(DATABASES)
    return at if colon and user and not is_port else -1


def _secrets_of_the_environment() -> Iterator[str]:
    """Yield values of variables that are named so, and passwords of URLs that any variable holds."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and name not in ("PWD", "OLDPWD") and not os.path.isabs(value):
            if len(value) >= SECRET_LENGTH or SHORT_SECRET.fullmatch(value):
                yield value
        elif "://" in value:
            yield from (p for p in _passwords(value) if len(p) >= SECRET_LENGTH)


def _passwords(url: str) -> Iterator[str]:
    scheme, _, rest = url.partition("://")
    password = rest[: max(0, _end_of_userinfo(scheme, rest))].partition(":")[2]
    yield from {password, unquote(password)}


def _forms(value: str) -> list[str]:
    """Return how a value may be written in a URL, in JSON, in HTML, in Python or in a header, the longest first."""
    forms = {value, quote(value), quote(value, safe=""), quote_plus(value), json.dumps(value)[1:-1]}
    forms |= {html.escape(value), repr(value)[1:-1], base64.b64encode(value.encode(errors="replace")).decode()}
    return sorted(forms, key=len, reverse=True)


# --- taken out of what is asked --------------------------------------------------------------------------------------

TEXTS = ("search.question", "tracking.experiment")
"""Keys that are read by people alone: they go on with *** in them."""
PROGRAMS = ("data.chat_template", "task_type.answer_pattern")
"""Keys in which `token=` is part of a language."""
REFUSAL = "holds what looks like a secret, and settings are written into the study's folder"


def without_password(url: str) -> str:
    """Return a URL fit to be written down, its user in it."""
    scheme, mark, rest = url.partition("://")
    end = _end_of_userinfo(scheme, rest)
    user = rest[:end].partition(":")[0]
    rest = rest if end < 0 else f"{quote(unquote(user), safe='')}{rest[end:]}"
    place, question, query = rest.partition("?")
    kept = [part for part in query.split("&") if part and not part.lower().startswith("password=")]
    return f"{scheme}{mark}{place}{question if kept else ''}{'&'.join(kept)}"


def database_url(url: str, key: str = "search.storage") -> str:
    """Return a database's URL without the password in it, which goes into PGPASSWORD.

    Raises ConfigError for a driver that has no such variable, and for other secrets.
    """
    scheme, _, rest = url.partition("://")
    end = _end_of_userinfo(scheme, rest)
    passwords = [rest[:end].partition(":")[2]] if end > 0 else []
    query = rest[max(end, 0) :].partition("?")[2]
    passwords += [part.partition("=")[2] for part in query.split("&") if part.lower().startswith("password=")]
    found = next((p for p in passwords if p), None)
    kept = without_password(url)
    if found and not scheme.startswith("postgresql"):
        rule = "must hold no password, it would be written into the study's folder"
        raise ConfigError([f"{key}: {rule}, got {redact(url)}; use the driver's own password file"])
    if redact(kept) != kept:
        raise ConfigError([f"{key}: {REFUSAL} ({redact(kept)}); use the driver's own password file"])
    if found:
        os.environ["PGPASSWORD"] = unquote(found)
    return kept


def tracking_uri(uri: str) -> str:
    """Return the URI of an MLflow store without user and password, which go into the environment.

    They are MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, PGPASSWORD for PostgreSQL. Raises
    ConfigError for what has no such variable.
    """
    scheme, _, rest = uri.partition("://")
    if not scheme.startswith("http"):
        return database_url(uri, "tracking.uri") if rest else uri
    end = _end_of_userinfo(scheme, rest)
    user, _, password = rest[: max(0, end)].partition(":")
    kept = f"{scheme}://{rest[end + 1 :]}"
    if redact(kept) != kept:
        raise ConfigError([f"tracking.uri: {REFUSAL} ({redact(kept)}); set MLFLOW_TRACKING_TOKEN in the environment"])
    if end >= 0:
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(user)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(password)
    return kept


FUNCTIONS: dict[str, Callable[[str], str]] = {"search.storage": database_url, "tracking.uri": tracking_uri}


def taken_out(key: str, value: Any) -> Any:
    """Return a setting's value fit to be written down: a text, or a list or mapping of them.

    Raises ConfigError where the value cannot do without its secret.
    """
    if isinstance(value, list | tuple):
        return [taken_out(key, entry) for entry in value]
    if isinstance(value, dict):
        return {name: taken_out(_longer(key, name), entry) for name, entry in value.items()}
    if not isinstance(value, str):
        return value
    if key in FUNCTIONS:
        return FUNCTIONS[key](value)
    kept = _without_tokens(value) if key in PROGRAMS else redact(value)
    is_secret = kept != value or (key.startswith("hydra.") and bool(value) and bool(_SECRET_NAME.search(key)))
    if is_secret and key not in TEXTS:
        shown = kept if kept != value else HIDDEN
        raise ConfigError([f"{key}: {REFUSAL} ({shown}); give it in an environment variable, which workers get too"])
    return kept


def _longer(key: str, name: object) -> str:
    return f"{key}.{name}" if key.startswith("hydra.") else key


# --- kept out of what is shown ---------------------------------------------------------------------------------------


class Redacting:
    """A text stream that writes to another one what `redact` leaves."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_stderr() -> None:
    """Let whatever this process writes to stderr, libraries and tracebacks too, pass `redact`."""
    if sys.stderr is not None and not isinstance(sys.stderr, Redacting):
        sys.stderr = Redacting(sys.stderr)


def hide_arguments() -> None:
    """Write *** over secrets in this process's command line, which every user of the machine can read in `ps`.

    Linux alone lets a process do so.
    """
    with suppress(OSError, ValueError, IndexError):
        after_name = Path("/proc/self/stat").read_text(encoding="utf8").rpartition(")")[2].split()
        start, end = int(after_name[45]), int(after_name[46])
        words = Path("/proc/self/cmdline").read_bytes().split(b"\0")
        if not start or len(b"\0".join(words)) != end - start:
            return
        for word in words:
            hidden = redact(word.decode(errors="surrogateescape")).encode(errors="surrogateescape")
            if hidden != word:
                ctypes.memmove(start, hidden[: len(word)].ljust(len(word), b"*"), len(word))
            start += len(word) + 1
