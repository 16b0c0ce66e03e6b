"""When two trials are one point: all that what they compute depends on is equal, the seed too."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from lorasweep.config.spec import TrialSpec

Identity = Callable[[TrialSpec, int | None], str]
"""Takes a trial's settings and the trial that it starts from; what it returns is equal for trials of one point."""

OF_A_TRIAL = ("model", "task_type", "lora", "data", "train")
"""Sections that a trial's outcome depends on."""
CHOOSE_MODULES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
WITHOUT_ORDER = ("target_modules", "exclude_modules", "target_parameters", "modules_to_save")
"""Lists of names that are sets."""


def identity(spec: TrialSpec, start_from: int | None = None, modules: Sequence[str] | None = None) -> str:
    """Return a digest of what a trial computes; `modules` are those that it adapts, where the model is at hand."""
    settings = {name: asdict(getattr(spec, name)) for name in OF_A_TRIAL}
    lora = settings["lora"]
    lora.pop("alpha_ratio")
    lora["lora_alpha"] = spec.lora.alpha
    if modules is not None:
        lora = {key: value for key, value in lora.items() if key not in CHOOSE_MODULES}
        lora["target_modules"] = list(modules)
    for key in WITHOUT_ORDER:
        if isinstance(lora.get(key), list):
            lora[key] = sorted(set(lora[key]))
    text = json.dumps([settings | {"lora": lora}, start_from], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
