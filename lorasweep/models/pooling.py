"""What a sentence-transformers checkpoint says of its embeddings: how token vectors are pooled, and its prompts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasweep.config.spec import ModelSpec
from lorasweep.errors import ConfigError

WAYS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
"""sentence-transformers' names of the ways that tasks know, and ours."""
DEFAULT = ""
"""Name of the prompt that a checkpoint puts before every text."""


def way(spec: ModelSpec, place: str) -> str:
    """Return how a checkpoint makes one vector of a text's token vectors: mean, cls or last.

    `place` is its folder or hub id. The mean where it does not say. Raises ConfigError for a way that no task knows.
    """
    if spec.pooling != "model":
        return spec.pooling
    folder = next((m["path"] for m in _modules(spec, place) if m.get("type", "").endswith(".Pooling")), "1_Pooling")
    found = _read(spec, place, f"{folder}/config.json") or {}
    mode = found.get("pooling_mode")
    named = [mode] if isinstance(mode, str) else list(mode or [])
    old = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "lasttoken"}
    others = {k: k.removeprefix("pooling_mode_") for k in found if k.startswith("pooling_mode_") and k not in old}
    ways = named or [name for key, name in {**old, **others}.items() if found.get(key) is True]
    if not ways:
        return "mean"
    if len(ways) > 1 or ways[0] not in WAYS:
        raise ConfigError(
            [
                f"model.pooling: {place} pools by {', '.join(ways)}, lorasweep by one of mean, cls and last; "
                "choose one, e.g. model.pooling=mean"
            ]
        )
    return WAYS[ways[0]]


def prompts(spec: ModelSpec, place: str) -> Mapping[str, str]:
    """Return name -> text to put before a text, that of every text by the name ""."""
    found = _read(spec, place, "config_sentence_transformers.json") or {}
    named = {k: v for k, v in (found.get("prompts") or {}).items() if isinstance(v, str)}
    default = found.get("default_prompt_name")
    return named | ({DEFAULT: named[default]} if default in named else {})


def left_out(spec: ModelSpec, place: str) -> list[str]:
    """Return a note on layers behind the pooling that the checkpoint's own embeddings pass through and ours do not."""
    kinds = [m.get("type", "").rpartition(".")[2] for m in _modules(spec, place)]
    dense = sum(kind in ("Dense", "CNN", "LSTM", "LayerNorm") for kind in kinds)
    if not dense:
        return []
    modules = f"{dense} modules" if dense > 1 else "a module"
    return [f"model.pretrained: {place} has {modules} behind its pooling, left out here: vectors are its transformer's"]


def _modules(spec: ModelSpec, place: str) -> list[dict[str, Any]]:
    return _read(spec, place, "modules.json") or []


def _read(spec: ModelSpec, place: str, name: str) -> Any:
    """Return the content of one of a checkpoint's JSON files, None where it has none, or none can be had."""
    path: Path | str | None = Path(place) / name
    if not Path(place).is_dir():
        from transformers.utils import cached_file

        path = cached_file(
            place,
            name,
            revision=spec.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    try:
        return json.loads(Path(path).read_text(encoding="utf8")) if path is not None else None
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError([f"model.pretrained: {place}/{name} is damaged ({error}); get the model again"]) from error
