"""A trial as an MLflow model: the adapter and how to answer with it; the base's weights are never copied.

Where transformers has a pipeline that answers as the trial was trained, the model is one of mlflow.transformers; who
loads it needs no lorasweep. MLflow loads the base from a folder: <outputs>/.bases/<digest> holds the config with the
trial's classes and links to the base's weights, so that nothing is downloaded. Elsewhere `base_model_path=FOLDER` of
mlflow.transformers.load_model names another one. The pipeline for tags takes a text and finds its words itself: it
splits at punctuation, where `predict` splits at spaces.

Everything else is a pyfunc model of adapter and settings, which finds the base by the settings, as every trial does:
what `no_pipeline` names, of the task or of the trial. MLflow calls `_load_pyfunc` of this file.
"""

import hashlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasweep.config import trust
from lorasweep.config.spec import TrialSpec
from lorasweep.credentials import redact
from lorasweep.errors import MlflowRefused
from lorasweep.files import replace_file
from lorasweep.models import base_model
from lorasweep.serving import predict, winner
from lorasweep.serving.winner import Loaded
from lorasweep.tasks import task_state
from lorasweep.tasks.task import Answer, Task
from lorasweep.tracking.mlflow_store import load as load_mlflow

PARTS = ("adapter", task_state.CONFIG, task_state.NAME)
BASES = ".bases"
TRUSTS = "LORASWEEP_TRUST_REMOTE_CODE"
"""Environment variable that is 1 where MLflow may load models whose base brings its own code."""


class Answerer:
    """What mlflow.pyfunc.load_model returns wraps this."""

    def __init__(self, folder: Path) -> None:
        self._loaded = predict.load(folder, trusted=os.environ.get(TRUSTS) == "1")

    def predict(self, model_input: Any, params: Any = None) -> list[Answer]:
        """Return an answer for each row of a pandas DataFrame, as `lorasweep predict --json` prints it."""
        return predict.answers(self._loaded, model_input.to_dict("records"))


def _load_pyfunc(path: str) -> Answerer:
    """MLflow's entry point: `path` holds config.yaml, task.json and the adapter."""
    return Answerer(Path(path))


def save(folder: Path, place: Path, bases: Path, *, trusted: bool = False) -> None:
    """Write the trial in `folder` as an MLflow model to `place`; what it needs of a base goes under `bases`.

    Raises MlflowRefused where MLflow does not take it, ConfigError where the base is gone.
    """
    load_mlflow()
    from mlflow.exceptions import MlflowException

    spec = task_state.settings(folder)
    if not trusted:
        trust.refuse_code([spec], folder)
    task = task_state.task_of(folder, spec)
    with _quiet():
        try:
            if no_pipeline(spec, task):
                _save_pyfunc(folder, place)
            else:
                _save_pipeline(winner.load(folder, trusted=trusted), place, bases)
        except MlflowException as error:
            raise MlflowRefused(redact(str(error))) from error


def no_pipeline(spec: TrialSpec, task: Task) -> str:
    """Return why no pipeline of transformers answers as the trial does, "" where one does."""
    reason = task.no_pipeline(spec.data, base_model.load_tokenizer(spec.model))
    if reason:
        return reason
    if spec.model.pooling != "model":
        return "the pipeline does not pool by the mean (model.pooling)"
    if spec.lora.rounds_base:
        return f"the pipeline does not quantise its base as {spec.lora.init.name} did"
    if spec.model.trust_remote_code:
        return "MLflow would run the checkpoint's own code without asking"
    return ""


# --- a pipeline ------------------------------------------------------------------------------------------------------


def _save_pipeline(loaded: Loaded, place: Path, bases: Path) -> None:
    """Write a model of mlflow.transformers: MLflow saves adapter and tokenizer, and where the base lies."""
    import mlflow.transformers
    import transformers

    task, spec = loaded.task, loaded.spec
    made: Any = transformers.pipeline(task.pipeline, model=loaded.model, tokenizer=loaded.tokenizer)  # type: ignore[call-overload]
    inputs = dict.fromkeys(task.fields(spec.data).must, "string")
    template = task.pipeline_prompt(loaded.tokenizer, spec.data)
    mlflow.transformers.save_model(
        made,
        str(place),
        base_model_path=str(base_folder(loaded, bases)),
        signature=_signature(inputs, task.pipeline_columns()),
        model_config=task.pipeline_arguments(loaded.inner, loaded.tokenizer, spec),
        prompt_template=template if template != "{prompt}" else None,
        pip_requirements=["mlflow", "torch", "transformers", "peft"],
    )


def base_folder(loaded: Loaded, bases: Path) -> Path:
    """Return a folder with the config of the base as the trial has it, and links to its weights; made where missing."""
    config = loaded.inner.config.to_json_string(use_diff=False)
    source = checkpoint(loaded.spec)
    digest = hashlib.sha256(f"{source}\n{config}".encode()).hexdigest()[:16]
    place = bases.resolve() / digest
    if not (place / "config.json").is_file():
        place.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            link = place / file.name
            if file.is_file() and file.name != "config.json" and not link.is_symlink():
                link.symlink_to(file.resolve())
        replace_file(place / "config.json", config)
    return place


def checkpoint(spec: TrialSpec) -> Path:
    """Return the folder of the base's checkpoint: for one of the hub, the snapshot that is here already."""
    from transformers.utils import cached_file

    where = Path(base_model.source(spec.model))
    if where.is_dir():
        return where.resolve()
    found = cached_file(str(where), "config.json", revision=spec.model.revision, local_files_only=True)
    assert found is not None, "the base has just been loaded"
    return Path(found).parent


# --- pyfunc ----------------------------------------------------------------------------------------------------------


def _save_pyfunc(folder: Path, place: Path) -> None:
    import mlflow.pyfunc

    parts = place.with_name("parts")
    parts.mkdir()
    for name in PARTS:
        source = folder / name
        if source.is_dir():
            shutil.copytree(source, parts / name)
        elif source.exists():
            shutil.copyfile(source, parts / name)
    mlflow.pyfunc.save_model(
        str(place),
        loader_module=__name__,
        data_path=str(parts),
        signature=_signature(*signature(folder)),
        pip_requirements=["lorasweep", "mlflow"],
    )


def signature(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the columns that a trial's pyfunc model takes and those of its answers, each with its kind."""
    spec = task_state.settings(folder)
    task = task_state.task_of(folder, spec)
    return dict.fromkeys(task.fields(spec.data).must, "string"), task.answer_columns()


def _signature(inputs: dict[str, str], outputs: dict[str, str]) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import Array, DataType, Map

    kinds: dict[str, Any] = {"string": DataType.string, "double": DataType.double}
    kinds |= {"strings": Array(DataType.string), "doubles": Array(DataType.double)}
    kinds |= {"doubles by name": Map(DataType.double)}
    first, second = (Schema([ColSpec(kinds[k], name or None) for name, k in s.items()]) for s in (inputs, outputs))
    return ModelSignature(first, second)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's hints and transformers' remarks on a pipeline with a peft model to ourselves."""
    loud = [logging.getLogger(name) for name in ("mlflow.transformers", "transformers", "transformers.pipelines.base")]
    levels = [(log, log.level) for log in loud]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*An input example was not provided")  # the signature is given
        for log in loud:
            log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for log, level in levels:
                log.setLevel(level)
