"""Keep passwords and tokens out of everything that is written, logged or handed on."""

import os
import re
from urllib.parse import unquote

from lorasweep.errors import ConfigError

# --- taken out of what is asked --------------------------------------------------------------------------------------


def without_password(url: str) -> str:
    """Return a URL fit to be written down."""
    return re.sub(r"(//[^/:@]*):[^@/]*@", r"\1@", url)


def take_out(text: str) -> str:
    """Return an override, or a database's URL, without the password in it. The password goes into the environment.

    That is where this process and its workers look for it: PGPASSWORD for PostgreSQL, MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD for a tracking server. Raises ConfigError for a database that has no such variable.
    """
    return _of_storage(_of_tracking(text))


def _of_storage(text: str) -> str:
    found = re.search(r"postgresql://[^/:@]*:([^@/]*)@", text)
    if not found:
        return text
    os.environ["PGPASSWORD"] = unquote(found.group(1))
    return without_password(text)


def _of_tracking(text: str) -> str:
    found = re.search(r"^\+{0,2}tracking\.uri=['\"]?([\w+]+)://([^/:@]*)(?::([^@/]*))?@", text)
    if not found:
        return text
    scheme, user, password = found.groups()
    if scheme in ("http", "https"):
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(user)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(password or "")
        return re.sub(r"://[^/@]*@", "://", text, count=1)
    if password is None:
        return text
    if not scheme.startswith("postgresql"):
        rule = "must hold no password, it would be written into the study's folder"
        raise ConfigError([f"tracking.uri: {rule}, got {redact(text)}; use the driver's own password file"])
    os.environ["PGPASSWORD"] = unquote(password)
    return text.replace(f":{password}@", "@", 1)


# --- kept out of what is written -------------------------------------------------------------------------------------

_CREDENTIALS = re.compile(r"(\w\w:/{1,2})[^\s/'\"]*@")
"""User and password of a URL; one slash is left of two where it was taken for a path."""
_PASSWORD = re.compile(r"(?i)((?:password|passwd|pwd|token|secret)=)[^&\s'\"]+")
_SECRET_NAME = re.compile(r"(?i)(TOKEN|PASSWORD|PASSWD|SECRET|SECRET_KEY|ACCESS_KEY|API_KEY)$")
SECRET_LENGTH = 8
"""Shorter values of the environment's secrets are not looked for: they may be parts of words."""


def redact(text: str) -> str:
    """Return the text with *** for users and passwords of URLs and for the secrets in this process's environment."""
    text = _PASSWORD.sub(r"\1***", _CREDENTIALS.sub(r"\1***@", text))
    for name, value in os.environ.items():
        if len(value) >= SECRET_LENGTH and value in text and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return text
