"""What a trial was made from, written before its first step: config, overrides, versions, commit, seed."""

import importlib.metadata
import json
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lorasweep.config.spec import TrialSpec
from lorasweep.credentials import redact
from lorasweep.data.dataset import Data
from lorasweep.files import replace_file

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""libyaml's where PyYAML was built with it: a tenth of the time."""

REGISTERS = "tracking.register="
PACKAGES = ("lorasweep", "torch", "transformers", "peft", "datasets", "hydra-core", "optuna", "mlflow", "torchmetrics")


def write(folder: Path, spec: TrialSpec) -> dict[str, Any]:
    """Write config.yaml and run.json into a trial's folder; return what run.json holds."""
    facts = {
        "overrides": list(spec.overrides),
        "rerun": rerun_line(spec),
        "seed": spec.train.seed,
        "commit": commit(),
        "versions": versions(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "began": now(),
    }
    replace_file(folder / "config.yaml", redact(yaml.dump(spec.to_dict(), Dumper=DUMPER, sort_keys=False)))
    replace_file(folder / "run.json", redact(json.dumps(facts, indent=1)))
    return facts


def add_data(folder: Path, data: Data, notes: Sequence[str]) -> None:
    """Add to a trial's run.json what its data are: fingerprint, rows of each split, rows left out, notes."""
    path = folder / "run.json"
    facts = json.loads(path.read_text(encoding="utf8"))
    facts["data"] = {
        "fingerprint": data.fingerprint,
        "rows": {split: len(rows) for split, rows in data.splits.items()},
        "left_out": dict(data.skipped),
        "notes": list(notes),
    }
    path.write_text(redact(json.dumps(facts, indent=1)), encoding="utf8")


def now() -> str:
    """Return the local time with its offset, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def rerun_line(spec: TrialSpec) -> str:
    """Return the command that runs the trial again. It registers nothing: that was asked of the study."""
    return shlex.join(["python", "-m", "lorasweep", *(o for o in spec.overrides if not o.startswith(REGISTERS))])


@cache
def versions() -> dict[str, str]:
    """Return the version of each package that can change a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def commit() -> str | None:
    """Return the commit of the folder the command was run in, with `+` where files differ from it; None outside git."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if dirty.strip() else "")
