"""Settings that run code which comes with a checkpoint or a study: they hold where they are given, not by a study."""

from collections.abc import Sequence
from dataclasses import replace

from lorasweep.config.overrides import Override
from lorasweep.config.spec import TrialSpec
from lorasweep.errors import ConfigError

FLAG = "--trust-remote-code"
FUNCTIONS = "task_type.metrics"
"""Key of metrics, of which those with a colon are functions to call."""
CODE = {"trust_remote_code": True, "use_safetensors": False}
"""Keys of `model` with the value that runs a checkpoint's Python code, or opens its pickles."""

PLAIN = (
    *("n_jobs", "backend", "prefer", "verbose", "batch_size", "pre_dispatch", "timeout_min", "nodes", "tasks_per_node"),
    *(
        "cpus_per_task",
        "cpus_per_gpu",
        "gpus_per_node",
        "gpus_per_task",
        "mem_gb",
        "mem_per_gpu",
        "mem_per_cpu",
        "gres",
    ),
    *("partition", "qos", "account", "constraint", "exclude", "comment", "array_parallelism", "max_num_timeout"),
    *("signal_delay_s", "ray.init.num_cpus", "ray.init.num_gpus", "ray.init.address", "ray.init.object_store_memory"),
    *("ray.remote.num_cpus", "ray.remote.num_gpus", "ray.remote.max_calls", "ray.remote.scheduling_strategy"),
)
"""Keys of hydra.launcher that name sizes and places, and run nothing."""
LAUNCHERS = ("basic", "joblib", "submitit_local", "submitit_slurm", "ray")


def code_of(spec: TrialSpec) -> list[str]:
    """Return the settings of a trial that run code, as overrides."""
    functions = [name for name in spec.task_type.metrics or () if ":" in name]
    own = [f"{FUNCTIONS}=[{','.join(functions)}]"] if functions else []
    return own + [f"model.{key}={str(v).lower()}" for key, v in CODE.items() if getattr(spec.model, key) is v]


def without_code(spec: TrialSpec) -> TrialSpec:
    """Return the trial with the settings that run no code."""
    if not code_of(spec):
        return spec
    plain = replace(spec, model=replace(spec.model, trust_remote_code=False, use_safetensors=True))
    return without_functions(plain)


def without_functions(spec: TrialSpec) -> TrialSpec:
    """Return the trial without metrics that are functions: who answers with it needs none."""
    metrics = [name for name in spec.task_type.metrics or () if ":" not in name]
    return replace(spec, task_type=replace(spec.task_type, metrics=metrics or None))


def refuse_code(specs: Sequence[TrialSpec], where: object) -> None:
    """Raise ConfigError where trials that came with a study would run code of their checkpoint."""
    asked = dict.fromkeys((word, spec.model.pretrained) for spec in specs for word in code_of(spec))
    problems = [
        f"{word}: {where} asks to call these functions of this machine's modules; if you trust it, add {FLAG}"
        if word.startswith(FUNCTIONS)
        else f"{word}: {where} asks to run code that comes with '{name}'; if you trust both, add {FLAG}"
        for word, name in asked
    ]
    if problems:
        raise ConfigError(problems, str(where))


def refuse_commands(launcher: Sequence[str], where: object) -> None:
    """Raise ConfigError where a launcher's settings that came with a study could run commands."""
    problems = []
    for word in launcher:
        key, text = Override.of(word)
        names = key == "hydra/launcher" and text in LAUNCHERS
        plain = key.removeprefix("hydra.launcher.") in PLAIN and key.startswith("hydra.launcher.")
        if not names and not (plain and text.isprintable() and "_target_" not in text and "${" not in text):
            problems.append(f"{key}: {where} asks for it, and it may run commands; give it here again, or add {FLAG}")
    if problems:
        raise ConfigError(problems, str(where))
