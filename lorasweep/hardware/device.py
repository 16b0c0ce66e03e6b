"""Where trials compute, in which number format, and how exactly: the device, its precision, determinism."""

import getpass
import importlib.util
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import takewhile
from pathlib import Path

import torch

from lorasweep.config.spec import ModelSpec, TrainSpec
from lorasweep.errors import ConfigError
from lorasweep.files import FileLock
from lorasweep.hardware import container

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable that is read once, at the first product: without it, cuBLAS's sums have no fixed order."""


def device_of(train: TrainSpec) -> torch.device:
    """Return the device that `train.device` names. Raises ConfigError where it is not there."""
    if train.device == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[train.device]:
        has = ", ".join(name for name, is_there in there.items() if is_there)
        why = _why_no_gpu() if train.device == "cuda" else "torch finds no Apple GPU here"
        raise ConfigError([f"train.device: must be auto or what this machine has ({has}), got {train.device}; {why}"])
    return torch.device(train.device)


def _why_no_gpu() -> str:
    """Say what keeps torch from a GPU that may well be there."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"torch {torch.__version__} sees no GPU" + (f", CUDA_VISIBLE_DEVICES={hidden}" if hidden is not None else "")


def dtype_of(train: TrainSpec, device: torch.device) -> torch.dtype:
    """Return the base model's number format; auto is bf16 on a GPU that has it, else fp32.

    Raises ConfigError for bf16 on a GPU without it: it would be emulated, and slow.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if train.precision == "auto":
        return torch.bfloat16 if native else torch.float32
    if train.precision == "bf16" and device.type == "cuda" and not native:
        name = torch.cuda.get_device_name(device)
        raise ConfigError([f"train.precision: {name} has no bf16; use fp16 or fp32"])
    return FORMATS[train.precision]


def attention(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return transformers' name of the attention kernel; auto is flash attention where it is installed and can run,
    else None: transformers chooses, sdpa where the model has it (DeBERTa does not).

    Raises ConfigError where flash attention is asked for and cannot run.
    """
    half = device.type == "cuda" and dtype != torch.float32
    installed = importlib.util.find_spec("flash_attn") is not None
    if spec.attn_implementation == "auto":
        return "flash_attention_2" if half and installed else None
    if spec.attn_implementation == "flash_attention_2" and not (half and installed):
        kind = str(dtype).removeprefix("torch.")
        lack = f"here is {kind} on the {device.type}" if not half else "flash_attn is not installed"
        raise ConfigError(
            [
                "model.attn_implementation: flash_attention_2 needs the package flash_attn and bf16 or fp16 on a GPU, "
                f"{lack}; use auto or sdpa"
            ]
        )
    return spec.attn_implementation


def set_up(train: TrainSpec, device: torch.device) -> None:
    """Set torch's switches of this process: TF32 for fp32 products on a GPU, and determinism as the trial asks.

    To be called before the first product on a GPU: cuBLAS has to know its workspace by then, and torch refuses
    determinism where it did not. So it is set for all trials, as a later one may be the first that asks.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(train.deterministic)
    torch.backends.cudnn.deterministic = train.deterministic
    if train.deterministic:
        torch.backends.cudnn.benchmark = False


@contextmanager
def own(workers: int, every: bool = False, *, divide: bool = True) -> Iterator[bool]:
    """Take a GPU that no other worker of this machine has, or all for `every`, or with `divide` this worker's part of
    the CPU's threads; yield whether it was that. Raises ConfigError where several workers want all GPUs.
    """
    if every and workers > 1:
        raise ConfigError([f"search.workers: must be 1 with model.device_map, got {workers}; one trains on all GPUs"])
    if every:
        yield False
        return
    if torch.cuda.is_available() and torch.cuda.device_count() > 1:
        with ExitStack() as held:
            for device, name in enumerate(device_names()):
                lock = FileLock(runtime_folder() / f"gpu-{name}.lock")
                if lock.acquire(blocking=False):
                    held.callback(lock.release)
                    torch.cuda.set_device(device)
                    break
            yield False
        return
    divide = divide and workers > 1 and "SLURM_JOB_ID" not in os.environ
    if divide:  # joblib says our part, too; Ray what it likes
        divide = os.environ.get("OMP_NUM_THREADS") in (None, str(_part(workers)))
    if divide:
        divide_threads(workers)
    yield divide


def device_names() -> list[str]:
    """Return a name for each device that torch sees, the same in every process of this machine.

    Parts of one GPU (MIG) have its UUID in torch's eyes: they go by the names under which they were made visible.
    """
    count = torch.cuda.device_count()
    visible = visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES"))
    entries = visible if visible is not None and len(visible) == count else [""] * count
    return [
        re.sub(r"[^A-Za-z0-9-]", "-", entry) if entry.startswith("MIG-") else _uuid(device)
        for device, entry in enumerate(entries)
    ]


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def visible_devices(text: str | None) -> list[str] | None:
    """Return the devices that CUDA_VISIBLE_DEVICES names, as CUDA reads it; None where it names all.

    CUDA goes by the list up to the first entry that is no index and no UUID (-1 is none), and sees nothing where an
    entry is there twice.
    """
    if text is None:
        return None
    named = list(takewhile(_names_a_device, (entry.strip() for entry in text.split(","))))
    return named if len(set(named)) == len(named) else []


def _names_a_device(entry: str) -> bool:
    return bool(re.fullmatch(r"\d+|(?:GPU|MIG)-[\w/-]+", entry))


def runtime_folder() -> Path:
    """Return a folder for this user's locks, which no other user can write to or take: XDG_RUNTIME_DIR's, else one in
    the temporary folder.

    Raises ConfigError where somebody else has that name.
    """
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    is_ours = os.path.isabs(given) and os.access(given, os.W_OK | os.X_OK) and os.stat(given).st_uid == user
    folder = Path(given) / "lorasweep" if is_ours else Path(tempfile.gettempdir()) / f"lorasweep-{user}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    open_to_others = hasattr(os, "getuid") and (found.st_uid != user or stat.S_IMODE(found.st_mode) & 0o022)
    if not stat.S_ISDIR(found.st_mode) or open_to_others:
        raise ConfigError([f"{folder}: is not a folder of this user alone; remove it, or set XDG_RUNTIME_DIR"])
    return folder


def divide_threads(workers: int) -> bool:
    """Let the thread that calls this compute with one worker's part of the CPU's threads; return whether it had
    another number of them.
    """
    threads = _part(workers)
    if threads == torch.get_num_threads():
        return False
    torch.set_num_threads(threads)
    return True


def _part(workers: int) -> int:
    return max(1, _cores() // workers)


def _cores() -> int:
    """Return how many cores this process may use, and its container has time on."""
    there = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on Windows, not on macOS
        there = len(os.sched_getaffinity(0))
    limit = container.cpus()
    return there if limit is None else max(1, min(there, math.floor(limit)))
