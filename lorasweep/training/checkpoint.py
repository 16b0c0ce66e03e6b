"""A running trial as a file to go on from: written whole or not at all, read back as plain data and tensors only."""

import io
import json
import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasweep.config.fields import Affects
from lorasweep.config.spec import TrialSpec, flattened, is_earlier_default
from lorasweep.errors import ConfigError
from lorasweep.files import replacing

VERSION = 3
"""Of the file's layout; a file of another version is not read. In 1, moments of B lay the other way round; in 2, the
last evaluation was not sealed."""

UNREADABLE = (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, AssertionError)
"""What zipfile and torch raise on a file that was cut short or holds something else."""

log = logging.getLogger(__name__)


def identity(number: int, spec: TrialSpec, examples: int) -> dict[str, Any]:
    """Return what has to be the same for a checkpoint to fit, by name: the spec, key by key, and the data's size."""
    keys = flattened(spec.affecting(Affects.RESULT))
    return json.loads(json.dumps({"number": number, "training examples": examples} | keys))


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path`; a failure on the way leaves what was there before."""
    with replacing(path, durable=True) as file:
        torch.save({"version": VERSION, **state}, file)


def read(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what `write` was given, on the CPU; None where there is no file or, with a warning, a damaged one.

    Raises ConfigError where the file belongs to another trial than `wanted`, which `identity` made.
    """
    for part in path.parent.glob(f"{path.name}.*.part"):  # of processes that died while writing
        part.unlink(missing_ok=True)
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:  # torch itself does not look at the checksums
                raise zipfile.BadZipFile("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["version"] != VERSION:
            raise ValueError(f"its layout is version {state['version']}, not {VERSION}")
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        log.warning("%s cannot be read, the trial starts afresh: %s", path, " ".join(str(error).split())[:200])
        return None
    _refuse_others(path, state["identity"], wanted)
    return state


def _refuse_others(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    problems = [
        f"{name}: the checkpoint was written with {found[name]!r}, the trial has {value!r}; go on with the same value, "
        "or remove the file to start afresh"
        for name, value in wanted.items()
        if name in found and found[name] != value and not is_earlier_default(name, found[name], value)
    ]
    if problems:
        raise ConfigError(problems, str(path))


def plain(value: Any) -> Any:
    """Return a copy in Python's own types and tensors, all that `read` takes. Raises TypeError for anything else."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(v) for v in value)
    for kind in (bool, int, float, str):  # numpy's float64 is a float, too
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    raise TypeError(f"a checkpoint holds numbers, strings, lists, dicts and tensors, got {type(value).__name__}")


def sealed(value: Any) -> Tensor:
    """Return plain data as one tensor of bytes: many numbers that stay the same are then taken apart only once."""
    buffer = io.BytesIO()
    torch.save(plain(value), buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def opened(written: Tensor) -> Any:
    """Return what `sealed` was given."""
    return torch.load(io.BytesIO(written.numpy().tobytes()), map_location="cpu", weights_only=True)


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies: a view would be written with all that it is a view of."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's own random numbers on the CPU and on `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `random_state` gave, as far as it is of this kind of device."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])
