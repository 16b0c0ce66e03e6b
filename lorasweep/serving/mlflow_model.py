"""A trial as an MLflow model: the adapter and how to answer with it; the base's weights are never copied.

Where transformers has a pipeline that answers as the trial was trained, the model is one of mlflow.transformers; who
loads it needs no lorasweep. MLflow loads the base from a folder: <outputs>/.bases/<digest> holds the config with the
trial's classes and links to the base's weights, so that nothing is downloaded. Elsewhere `base_model_path=FOLDER` of
mlflow.transformers.load_model names another one. The pipeline for tags takes a text and finds its words itself: it
splits at punctuation, where `predict` splits at spaces.

Everything else is a pyfunc model of adapter and settings, which finds the base by the settings, as every trial does:
what `no_pipeline` names, of the task or of the trial. MLflow calls `_load_pyfunc` of this file.

Either is loaded again by MLflow and asked some eval rows; a pipeline that answers otherwise than the trial gives way to
a pyfunc model.
"""

import hashlib
import itertools
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lorasweep import tasks
from lorasweep.config import trust
from lorasweep.config.spec import TrialSpec
from lorasweep.credentials import redact
from lorasweep.errors import ConfigError, MlflowRefused
from lorasweep.files import replace_file
from lorasweep.models import base_model
from lorasweep.serving import predict
from lorasweep.serving.winner import Loaded
from lorasweep.tasks import special_tokens, task_state
from lorasweep.tasks.task import Answer, Task
from lorasweep.tracking.mlflow_store import load as load_mlflow
from lorasweep.training import workload

PARTS = ("adapter", task_state.CONFIG, task_state.NAME)
BASES = ".bases"
TRUSTS = "LORASWEEP_TRUST_REMOTE_CODE"
"""Environment variable that is 1 where MLflow may load models whose base brings its own code."""

ROWS = 4
"""Rows of the eval split that a model is asked before it is logged."""

CHARACTERS, TOKENS = 60, 8
"""What it reads of each of them, and writes for it, at most, where it writes text."""

ROUNDING = 1e-3
"""Largest difference of two probabilities or of two vectors' numbers that are the same but for rounding."""


class Answerer:
    """What mlflow.pyfunc.load_model returns wraps this."""

    def __init__(self, folder: Path, **task_keys: Any) -> None:
        self._loaded = predict.load(folder, trusted=os.environ.get(TRUSTS) == "1", **task_keys)

    def predict(self, model_input: Any, params: Any = None) -> list[Answer]:
        """Return an answer for each row of a pandas DataFrame, as `lorasweep predict --json` prints it."""
        return predict.answers(self._loaded, model_input.to_dict("records"))


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Answerer:
    """MLflow's entry point: `path` holds config.yaml, task.json and the adapter; `model_config` changes keys of
    task_type.
    """
    return Answerer(Path(path), **(model_config or {}))


def save(folder: Path, place: Path, bases: Path, *, trusted: bool = False) -> None:
    """Write the trial in `folder` as an MLflow model to `place`; what it needs of a base goes under `bases`.

    Raises MlflowRefused where MLflow does not take it, ConfigError where base or data are gone, or where the model that
    MLflow loads answers otherwise than the trial.
    """
    load_mlflow()
    from mlflow.exceptions import MlflowException

    if not trusted:
        trust.refuse_code([trust.without_functions(task_state.settings(folder))], folder)
    with _quiet():
        try:
            _save(folder, place, bases, trusted)
        except MlflowException as error:
            raise MlflowRefused(redact(str(error))) from error


def _save(folder: Path, place: Path, bases: Path, trusted: bool) -> None:
    """Write a pipeline where one answers as the trial does, else a pyfunc model, and prove it."""
    few = _writing(folder, TOKENS)
    loaded = predict.load(folder, trusted=trusted, **few)
    task, spec = loaded.task, loaded.spec
    rows, answers = _asked(loaded)
    if not no_pipeline(spec, task) and rows and not _bring_marks(loaded):
        _save_pipeline(loaded, place, bases)
        if not _wrong(place, rows, [task.as_pipeline(a) for a in answers], few):
            return
        shutil.rmtree(place)
    del loaded  # MLflow loads its own
    _save_pyfunc(folder, place)
    with _trusting() if trusted else nullcontext():
        wrong = _wrong(place, rows, answers, few)
    if wrong:
        raise ConfigError([wrong])


def no_pipeline(spec: TrialSpec, task: Task) -> str:
    """Return why no pipeline of transformers answers as the trial does, "" where one does."""
    reason = task.no_pipeline(spec.data, base_model.load_tokenizer(spec.model))
    if reason:
        return reason
    if spec.model.pooling != "model":
        return "the pipeline does not pool by the mean (model.pooling)"
    if spec.lora.rounds_base:
        return f"the pipeline does not quantise its base as {spec.lora.init.name} did"
    if base_model.replaces_head(spec.model, task):
        return "the base is a finished classifier of other classes, which MLflow refuses to load for these"
    if spec.model.trust_remote_code:
        return "MLflow would run the checkpoint's own code without asking"
    return ""


# --- the proof -------------------------------------------------------------------------------------------------------


def _writing(folder: Path, most: int | None = None) -> dict[str, int]:
    """Return how many tokens the trial writes, at `most` so many, by task_type's key; nothing where it writes none."""
    task = task_state.settings(folder).task_type
    if "generate" not in tasks.kind(task.name).answers_with:
        return {}
    return {"max_new_tokens": min(most or task.max_new_tokens, task.max_new_tokens)}


def _asked(loaded: Loaded) -> tuple[list[dict[str, str]], list[Answer]]:
    """Return some eval rows as MLflow takes them, and the trial's answers. Raises ConfigError without its data."""
    task, spec = loaded.task, loaded.spec
    records = workload.load_rows(spec, tasks.make(spec.task_type)).splits["eval"]
    must = task.fields(spec.data).must
    longest = _longest_prompt(loaded) if task.spec.generate else None
    chosen = (record for record in records if task.read_alike(record, loaded.tokenizer, spec.data))
    texts = ({name: _as_text(record[name])[:longest].strip() for name in must} for record in chosen)
    rows = list(itertools.islice((row for row in texts if all(row.values())), ROWS))
    return rows, predict.answers(loaded, rows)


def _bring_marks(loaded: Loaded) -> bool:
    """Tell whether texts of the data bring along what the tokenizer puts around each, which a pipeline reads twice."""
    must = loaded.task.fields(loaded.spec.data).must
    splits = workload.load_rows(loaded.spec, tasks.make(loaded.spec.task_type)).splits
    records = itertools.chain.from_iterable(splits.values())
    texts = list(itertools.chain.from_iterable([_as_text(record[name]) for name in must] for record in records))
    return special_tokens.bare(loaded.tokenizer, texts) != texts


def _longest_prompt(loaded: Loaded) -> int:
    """Return how many characters, each at most four tokens, leave room for what is written."""
    room = getattr(loaded.inner.config, "max_position_embeddings", None) or 4 * CHARACTERS + TOKENS
    return min(CHARACTERS, max(1, (room - TOKENS) // 4))


def _as_text(value: Any) -> str:
    """Return a text, words with spaces between them, or the first turn of a chat."""
    if isinstance(value, str):
        return value
    return str(value[0]["content"]) if isinstance(value[0], Mapping) else " ".join(map(str, value))


def _wrong(place: Path, rows: Sequence[dict[str, str]], expected: Sequence[Any], config: dict[str, Any]) -> str:
    """Return where the model that MLflow loads answers otherwise than expected, "" where it does not."""
    import mlflow.pyfunc
    import pandas as pd

    if not rows:
        return ""
    found = mlflow.pyfunc.load_model(str(place), model_config=config or None).predict(pd.DataFrame(rows))
    answers = found.to_dict("records") if isinstance(found, pd.DataFrame) else list(found)
    for row, one, other in zip(rows, answers, expected, strict=True):
        if not _same(one, other):
            return f"the model that MLflow loads answers {one!r} to {row!r}, the trial {other!r}"
    return ""


def _same(found: Any, expected: Any) -> bool:
    """Tell whether two answers are equal but for rounding."""
    if isinstance(expected, Mapping):
        return found.keys() == expected.keys() and all(_same(found[k], v) for k, v in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(_same, found, expected))
    if isinstance(expected, float):
        return bool(abs(found - expected) <= ROUNDING * max(1.0, abs(expected)))
    return bool(found == expected)


@contextmanager
def _trusting() -> Iterator[None]:
    """Let MLflow load, in this process, a model whose base brings the code that its owner has agreed to."""
    before = os.environ.get(TRUSTS)
    os.environ[TRUSTS] = "1"
    try:
        yield
    finally:
        os.environ.pop(TRUSTS)
        os.environ |= {} if before is None else {TRUSTS: before}


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
        model_config=_writing(folder) or None,
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
    names = ("mlflow.transformers", "mlflow.pyfunc", "transformers", "transformers.pipelines.base")
    loud = [logging.getLogger(name) for name in names]
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
