"""One file a task type; `make` gives the one a spec names."""

from lorasweep.errors import ConfigError
from lorasweep.spec import TaskSpec
from lorasweep.tasks.causal_lm import CausalLM
from lorasweep.tasks.seq_cls import SeqCls
from lorasweep.tasks.task import Batch, Example, Prediction, Task, maximize

TASKS: dict[str, type[Task]] = {cls.name: cls for cls in (SeqCls, CausalLM)}


def make(spec: TaskSpec) -> Task:
    """Return a new task of the spec's type. Raises ConfigError for a type that has no file here."""
    if spec.name not in TASKS:
        raise ConfigError([f"task_type.name: {spec.name} is not built yet; there are {', '.join(TASKS)}"])
    return TASKS[spec.name](spec)


__all__ = ["Batch", "Example", "Prediction", "Task", "make", "maximize"]
