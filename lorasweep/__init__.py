"""LoRA sweeps: see README.md."""

import logging
from typing import Any

# bitsandbytes, where it is installed, tells at every start of a faster kernel that it does without
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

FROM_API = ("load_best", "load_study", "run")
"""What `lorasweep.NAME` takes from api.py, which loads torch, when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in FROM_API:
        raise AttributeError(f"module 'lorasweep' has no attribute '{name}'")
    from lorasweep import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *FROM_API])
