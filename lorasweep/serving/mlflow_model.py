"""A trial as an MLflow model: the adapter and how to answer with it; the base's weights are never copied.

Where transformers has a pipeline that answers as the trial was trained, the model is one of mlflow.transformers; who
loads it needs no lorasweep. MLflow loads the base from a folder: <outputs>/.bases/<digest> holds the config with the
trial's classes and links to the base's weights, so that nothing is downloaded. Elsewhere `base_model_path=FOLDER` of
mlflow.transformers.load_model names another one. The pipeline of TOKEN_CLS takes a text and finds its words itself: it
splits at punctuation, where `predict` splits at spaces.

Everything else is a pyfunc model of adapter and settings, which finds the base by the settings, as every trial does:
QUESTION_ANS and SEQ_2_SEQ_LM (transformers 5 has no pipeline for them), FEATURE_EXTRACTION (its pipeline gives vectors
of tokens, not the mean that was trained), and what `no_pipeline` names. MLflow calls `_load_pyfunc` of this file.
"""

import hashlib
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasweep.config.spec import TrialSpec
from lorasweep.credentials import redact
from lorasweep.errors import MlflowRefused
from lorasweep.files import replace_file
from lorasweep.models import base_model
from lorasweep.serving import predict, winner
from lorasweep.serving.predict import Answer
from lorasweep.serving.winner import Loaded
from lorasweep.tasks import special_tokens, task_state
from lorasweep.tasks.task import Task
from lorasweep.tracking.mlflow_store import load as load_mlflow

PARTS = ("adapter", task_state.CONFIG, task_state.NAME)
PIPELINES = {"SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification", "CAUSAL_LM": "text-generation"}
"""Tasks with a pipeline that answers as we do."""
BASES = ".bases"


class Answerer:
    """What mlflow.pyfunc.load_model returns wraps this."""

    def __init__(self, folder: Path) -> None:
        self._loaded = predict.load(folder)

    def predict(self, model_input: Any, params: Any = None) -> list[Answer]:
        """Return an answer for each row of a pandas DataFrame, as `lorasweep predict --json` prints it."""
        return predict.answers(self._loaded, model_input.to_dict("records"))


def _load_pyfunc(path: str) -> Answerer:
    """MLflow's entry point: `path` holds config.yaml, task.json and the adapter."""
    return Answerer(Path(path))


def save(folder: Path, place: Path, bases: Path) -> None:
    """Write the trial in `folder` as an MLflow model to `place`; what it needs of a base goes under `bases`.

    Raises MlflowRefused where MLflow does not take it, ConfigError where the base is gone.
    """
    load_mlflow()
    from mlflow.exceptions import MlflowException

    spec = task_state.settings(folder)
    task = task_state.task_of(folder, spec)
    with _quiet():
        try:
            if no_pipeline(spec, task):
                _save_pyfunc(folder, place)
            else:
                _save_pipeline(winner.load(folder), place, bases)
        except MlflowException as error:
            raise MlflowRefused(redact(str(error))) from error


def no_pipeline(spec: TrialSpec, task: Task) -> str:
    """Return why no pipeline of transformers answers as the trial does, "" where one does."""
    fields, _ = predict.asked(task, spec.data)
    if task.name not in PIPELINES:
        return f"no pipeline answers for {task.name} as it was trained"
    if getattr(task, "kind", "single_label") != "single_label":
        return "MLflow's text-classification names one class and its score"
    if fields == ("messages",):
        return "MLflow hands text to text-generation, not a chat's turns"
    if len(fields) > 1:
        return "MLflow's signature of text-classification has no pairs"
    if spec.model.pooling != "model":
        return "the pipeline does not pool by the mean (model.pooling)"
    if spec.lora.rounds_base:
        return f"the pipeline does not quantise its base as {spec.lora.init.name} did"
    if spec.model.trust_remote_code:
        return "MLflow would run the checkpoint's own code without asking"
    if task.name == "CAUSAL_LM" and special_tokens.asked_for(base_model.load_tokenizer(spec.model))[1] is None:
        return "the tokenizer, asked by the pipeline, would end each prompt as if nothing followed it"
    return ""


# --- a pipeline ------------------------------------------------------------------------------------------------------


def _save_pipeline(loaded: Loaded, place: Path, bases: Path) -> None:
    """Write a model of mlflow.transformers: MLflow saves adapter and tokenizer, and where the base lies."""
    import mlflow.transformers
    import transformers

    name = PIPELINES[loaded.task.name]
    made: Any = transformers.pipeline(name, model=loaded.model, tokenizer=loaded.tokenizer)  # type: ignore[call-overload]
    inputs, outputs = _columns(loaded)
    template = _prompt_template(loaded, inputs)
    mlflow.transformers.save_model(
        made,
        str(place),
        base_model_path=str(base_folder(loaded, bases)),
        signature=_signature(inputs, outputs),
        model_config=_call(loaded),
        prompt_template=template if template != "{prompt}" else None,
        pip_requirements=["mlflow", "torch", "transformers", "peft"],
    )


def _prompt_template(loaded: Loaded, inputs: dict[str, str]) -> str:
    """Return what the tokenizer reads for a prompt: before it what it would put there itself, behind it the suffix."""
    if loaded.task.name != "CAUSAL_LM":
        return "{prompt}"
    _, before = special_tokens.asked_for(loaded.tokenizer)
    assert before is not None, "no_pipeline has asked"
    suffix = loaded.spec.data.prompt_suffix if "prompt" in inputs else ""
    return before.replace("{", "{{").replace("}", "}}") + "{prompt}" + suffix.replace("{", "{{").replace("}", "}}")


def _columns(loaded: Loaded) -> tuple[dict[str, str], dict[str, str]]:
    """Return what a pipeline's model takes and gives; "" is MLflow's column without a name."""
    must, _ = predict.asked(loaded.task, loaded.spec.data)
    gives = {"label": "string", "score": "double"} if loaded.task.name == "SEQ_CLS" else {"": "string"}
    return dict.fromkeys(must, "string"), gives


def _call(loaded: Loaded) -> dict[str, Any]:
    """Return the pipeline's arguments with which it reads and writes as the trial did."""
    if loaded.task.name == "SEQ_CLS":
        return {"truncation": True, "max_length": loaded.spec.data.max_tokens}
    if loaded.task.name == "TOKEN_CLS":  # without O, MLflow fails on a text that has nothing else
        return {"aggregation_strategy": "first", "ignore_labels": []}
    ends = loaded.inner.generation_config.eos_token_id
    found = {*(ends if isinstance(ends, list | tuple) else [ends]), loaded.tokenizer.eos_token_id} - {None}
    return {
        "max_new_tokens": loaded.spec.task_type.max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "return_full_text": False,
        "add_special_tokens": special_tokens.asked_for(loaded.tokenizer)[0],
        "eos_token_id": sorted(found) or None,
        "pad_token_id": loaded.tokenizer.pad_token_id,
    }


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
    must, _ = predict.asked(task, spec.data)
    shapes: dict[str, dict[str, str]] = {
        "SEQ_CLS": {
            "single_label": {"label": "string", "probability": "double", "probabilities": "doubles by name"},
            "multi_label": {"labels": "strings", "probabilities": "doubles by name"},
            "regression": {"value": "double"},
        }.get(getattr(task, "kind", ""), {}),
        "QUESTION_ANS": {"answer": "string"},
        "FEATURE_EXTRACTION": {"embedding": "doubles"},
    }
    return dict.fromkeys(must, "string"), shapes.get(task.name, {"text": "string"})


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
