"""result.json: what a trial came to."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasweep.credentials import redact

OBJECTIVES = ("trainable", "adapter_mb", "train_s", "peak_gib")
"""What a study may make small besides its primary metric."""


def objective(result: Mapping[str, Any], name: str) -> float:
    """Return what a result has to say about one of OBJECTIVES; infinity, the worst, where that is not known."""
    found = result["params"]["trainable"] if name == "trainable" else result[name]
    return math.inf if found is None else float(found)


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write result.json whole or not at all."""
    temporary = folder / "result.json.part"
    temporary.write_text(redact(json.dumps(result, indent=1)), encoding="utf8")
    os.replace(temporary, folder / "result.json")


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return what result.json holds, None where there is none."""
    try:
        return json.loads((folder / "result.json").read_text(encoding="utf8"))
    except FileNotFoundError:
        return None
