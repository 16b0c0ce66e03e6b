"""One file a task type; `make` gives the one a spec names, `register` takes another in.

Nothing is imported here but names: a task's file is read when the task is first asked for.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from lorasweep.config import registry
from lorasweep.config.spec import TaskSpec

if TYPE_CHECKING:
    from lorasweep.tasks.metric import Metric
    from lorasweep.tasks.task import Task

Class = TypeVar("Class", bound=type)


def register(cls: Class) -> Class:
    """Let task_type.name say `cls.name`: a decorator for a subclass of lorasweep.tasks.task.Task.

    With a file conf/task_type/NAME.yaml like ours, `task_type=NAME` chooses it. A task of another package is an entry
    point of the group lorasweep.tasks, of the task's name.
    """
    registry.TASKS.add(cls.name, cls)  # type: ignore[attr-defined]
    return cls


def register_metric(task: str, name: str, metric: "Metric | Callable[[Task], Metric | None]") -> None:
    """Give a task one more metric, or what makes one of the task, or None where it does not fit its data.

    One of another package is an entry point of the group lorasweep.metrics, called TASK.NAME.
    """
    registry.METRICS.add(f"{task}.{name}", metric)


def kind(name: str) -> "type[Task]":
    """Return the class of a task. Raises ConfigError for an unknown one, and where an outside one cannot be loaded."""
    return registry.TASKS.get(name, _is_task)


def make(spec: TaskSpec) -> "Task":
    """Return a new task of the spec's type. Raises ConfigError where it, or a metric of it, cannot be loaded."""
    return kind(spec.name)(spec)


def task_type_of_saved(task_type: str | None) -> str | None:
    """Return the task type that a saved adapter names: for spans none, since peft's model of that type keeps the token
    types, which tell question from context, from the model; its model of no type hands on all inputs.
    """
    return None if task_type == "QUESTION_ANS" else task_type


def load_all(name: str) -> None:
    """Import a task and its outside metrics, so that their combinations are there; ConfigError where that fails."""
    kind(name)
    for metric in registry.METRICS:
        if metric.startswith(f"{name}."):
            registry.METRICS.get(metric)


def _is_task(entry: Any) -> bool:
    from lorasweep.tasks.task import Task

    return isinstance(entry, type) and issubclass(entry, Task)
