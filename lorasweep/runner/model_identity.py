"""Which trials are one point on the real model: other words for the same modules make no other point."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from lorasweep.config.spec import TrialSpec
from lorasweep.lora import peft_config
from lorasweep.study import same_point
from lorasweep.training import workload
from lorasweep.training.workload import Workload


class ModelIdentity:
    """Returns the identity of a trial's point, as same_point.Identity; looks at each model and its targets once."""

    def __init__(self, workload_of: Callable[[TrialSpec], Workload]) -> None:
        self._workload = workload_of
        self._modules: dict[str, Sequence[str]] = {}

    def __call__(self, spec: TrialSpec, start_from: int | None = None) -> str:
        lora = asdict(spec.lora)
        words = [workload.key(spec), *(lora[key] for key in same_point.CHOOSE_MODULES)]
        known = json.dumps(words, sort_keys=True)
        if known not in self._modules:
            base = self._workload(spec).skeleton
            self._modules[known] = peft_config.adapted(spec.lora, spec.task_type, base)
        return same_point.identity(spec, start_from, self._modules[known])
