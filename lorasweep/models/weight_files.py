"""What is wrong with the files of a checkpoint, read without loading it: config, weights, tokenizer.

Only the first bytes and the header of a safetensors file are read: format at huggingface.co/docs/safetensors.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PICKLED = "pytorch_model.bin"
INDEX = ".index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "source.spm",
)
VOCABULARIES = tuple(name for name in TOKENIZER_FILES if name not in ("tokenizer_config.json", "merges.txt"))
"""Any of them makes a tokenizer; without one, transformers gives a tokenizer that knows no word."""

HEAD_BYTES = 512
MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""
LFS_POINTER = b"version https://git-lfs"
OTHER_WEIGHTS = {".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX", ".gguf": "llama.cpp (GGUF)"}
"""What the name of a file ends in that holds weights which transformers does not train."""
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


def problems(folder: Path, tokenizer: bool, pickled: bool) -> list[str]:
    """Return what is wrong with a checkpoint's files, as `model.pretrained: ...`.

    `tokenizer` says that the folder is to hold one, `pickled` that weights may be a pytorch_model.bin.
    """
    found = _config_problems(folder) or _weight_problems(folder, pickled)
    if tokenizer and not found:
        found = tokenizer_problems(folder)
    return [f"model.pretrained: {p}" for p in found]


def tokenizer_problems(folder: Path) -> list[str]:
    """Return what is wrong with a folder's tokenizer files."""
    there = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    found = [p for path in there if (p := _no_content(path))]
    if found:
        return found
    has_own_code = (folder / "tokenizer_config.json").is_file() and any(folder.glob("*.py"))
    if not has_own_code and not any(path.name in VOCABULARIES for path in there):
        return [f"{folder} holds no tokenizer; set model.tokenizer to the folder or hub id that does"]
    return [p for path in there if path.suffix == ".json" and (p := _no_json(path))]


# --- config.json -----------------------------------------------------------------------------------------------------


def _config_problems(folder: Path) -> list[str]:
    path = folder / CONFIG
    if not path.is_file():
        return [_no_model(folder)]
    problem = _no_content(path) or _no_json(path)
    if problem:
        return [problem]
    config = json.loads(path.read_text(encoding="utf8"))
    if not isinstance(config, dict) or not config.get("model_type"):
        return [f"{path} names no model_type, so nobody can tell which model it is; take the file of the original"]
    return []


def _no_model(folder: Path) -> str:
    """Say what a folder without config.json holds, and what was probably meant."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        try:
            base = json.loads(adapter.read_text(encoding="utf8")).get("base_model_name_or_path") or "its base model"
        except (ValueError, AttributeError):
            base = "its base model"
        return f"{folder} holds an adapter, no model; name the model that it belongs to ({base})"
    inside = sorted(p.parent for p in [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"snapshots/*/{CONFIG}")])
    if inside:
        names = ", ".join(str(p) for p in inside[:3])
        return f"{folder} has no {CONFIG}; meant may be one of its folders: {names}"
    if any(folder.glob("*.gguf")):
        return f"{folder} holds GGUF files, which do not train; name the model in safetensors"
    return f"{folder} has no {CONFIG}, so it is no model; name the folder that `save_pretrained` wrote"


# --- weights ---------------------------------------------------------------------------------------------------------


def _weight_problems(folder: Path, pickled: bool) -> list[str]:
    """Return what is wrong with the file that transformers would load: one file or an index of several."""
    names = (WEIGHTS, WEIGHTS + INDEX, *((PICKLED, PICKLED + INDEX) if pickled else ()))
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return [_no_weights(folder)]
    if path.name.endswith(INDEX):
        return _shard_problems(path)
    return _one_file_problems(path)


def _no_weights(folder: Path) -> str:
    for path in (folder / PICKLED, folder / (PICKLED + INDEX)):
        if not path.is_file():
            continue
        if problem := _no_content(path):
            return problem
        return f"{folder} holds pickled weights ({PICKLED}); if you trust it, set model.use_safetensors=false"
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if others:
        return f"{folder} has no {WEIGHTS} and no {WEIGHTS}{INDEX} (it has {', '.join(others[:3])}); download it again"
    for end, kind in OTHER_WEIGHTS.items():
        if found := sorted(folder.glob(f"*{end}")):
            return f"{folder} holds weights for {kind} alone ({found[0].name}); take the model with {WEIGHTS}"
    return f"{folder} holds no weights ({WEIGHTS}); download it again, whole"


def _shard_problems(index: Path) -> list[str]:
    """Return what is wrong with an index, or with the shards that it names."""
    problem = _no_content(index) or _no_json(index)
    if problem:
        return [problem]
    content = json.loads(index.read_text(encoding="utf8"))
    parts = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or not parts:
        return [f"{index} names no shard (weight_map); download it again"]
    shards = sorted(set(map(str, parts.values())))
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        return [
            f"{index} names {len(shards)} files, of which {', '.join(missing[:3])} "
            f"{'is' if len(missing) == 1 else 'are'} missing; download the rest"
        ]
    return [p for name in shards for p in _one_file_problems(index.parent / name)]


def _one_file_problems(path: Path) -> list[str]:
    problem = _no_content(path)
    if problem:
        return [problem]
    if path.suffix != ".safetensors":
        return []
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            kind = "is cut short" if 0 < length <= MAX_HEADER_BYTES else "is no safetensors file"
            return [f"{path} {kind} ({size:,} bytes); download it again"]
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return [f"{path} is no safetensors file (its header is broken); download it again"]
    tensors = {k: v for k, v in header.items() if k != "__metadata__"} if isinstance(header, dict) else {}
    if not tensors:
        return [f"{path} holds no tensor; download it again"]
    whole = 8 + length + max(t["data_offsets"][1] for t in tensors.values())
    if size != whole:
        kind = "is cut short" if size < whole else "has too many bytes"
        return [f"{path} {kind}: {size:,} of {whole:,} bytes; download it again"]
    return list(_dtype_problems(path, tensors))


def _dtype_problems(path: Path, tensors: dict[str, Any]) -> Iterator[str]:
    """Yield a problem where weights are stored as something else than floating-point numbers, and not by a quantiser
    that config.json names: transformers knows how to read those.
    """
    config = json.loads((path.parent / CONFIG).read_text(encoding="utf8"))
    if config.get("quantization_config"):
        return
    odd = {n: t["dtype"] for n, t in tensors.items() if n.endswith("weight") and t["dtype"] not in FLOAT_DTYPES}
    if odd:
        name, dtype = next(iter(odd.items()))
        yield (
            f"{path} keeps {len(odd)} of {len(tensors)} tensors in a number format that does not train ('{name}' in "
            f"{dtype}); take the model in {', '.join(FLOAT_DTYPES[1:])} and set model.quantization to quantise it"
        )


# --- any file --------------------------------------------------------------------------------------------------------


def _no_content(path: Path) -> str:
    """Return what a file is in place of its content: empty, a Git LFS pointer, a web page; or nothing."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head.strip():
        return f"{path} is empty; download it again"
    if head.startswith(LFS_POINTER):
        return f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"{path} is a web page (HTML), not the file itself; download it again"
    return ""


def _no_json(path: Path) -> str:
    try:
        json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        return f"{path} is no JSON ({error}); download it again"
    return ""
