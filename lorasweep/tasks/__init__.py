"""One file a task type; `make` gives the one a spec names."""

from lorasweep.config.spec import TaskSpec
from lorasweep.errors import ConfigError
from lorasweep.tasks.causal_lm import CausalLM
from lorasweep.tasks.feature_extraction import FeatureExtraction
from lorasweep.tasks.question_ans import QuestionAns
from lorasweep.tasks.seq_2_seq_lm import Seq2SeqLM
from lorasweep.tasks.seq_cls import SeqCls
from lorasweep.tasks.task import Batch, Example, Prediction, Task, lengths_of, maximize
from lorasweep.tasks.token_cls import TokenCls

TASKS: dict[str, type[Task]] = {
    cls.name: cls for cls in (SeqCls, CausalLM, TokenCls, QuestionAns, Seq2SeqLM, FeatureExtraction)
}


def make(spec: TaskSpec) -> Task:
    """Return a new task of the spec's type. Raises ConfigError for a type that has no file here."""
    if spec.name not in TASKS:
        raise ConfigError([f"task_type.name: {spec.name} is not built yet; there are {', '.join(TASKS)}"])
    return TASKS[spec.name](spec)


__all__ = ["Batch", "Example", "Prediction", "Task", "lengths_of", "make", "maximize"]
