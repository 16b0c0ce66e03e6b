"""Tensors that are kept by key: in memory first, then on disk."""

import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SEGMENT = 2**26
"""Bytes that are asked for at once."""

SPARE = 2**31
"""Bytes of a disk that are left free."""

log = logging.getLogger(__name__)

Key = tuple[int, bytes]
"""Number of layers and the text's digest."""


class Store:
    """Tensors by key: in memory up to `budget` bytes, then in files of `folder` that have no name any more, so that
    nothing is left of them however the process ends.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.budget = 0
        self.full = False
        self.on_disk = 0
        """Bytes."""
        self._in_memory = 0
        self._places: dict[Key, tuple[int, int, torch.Size, torch.dtype]] = {}
        """Segment, first byte, shape and type."""
        self._segments: list[Tensor] = []
        self._used = 0
        """Bytes of the last segment."""

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def get(self, key: Key) -> Tensor:
        segment, start, shape, dtype = self._places[key]
        return self._segments[segment][start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def put(self, key: Key, value: Tensor) -> bool:
        """Keep a copy; return False where there is no room for it."""
        size = -(-value.numel() * value.element_size() // 16) * 16  # views of any type need an aligned start
        if not self._segments or len(self._segments[-1]) < self._used + size:
            segment = self._segment(size)
            if segment is None:
                self.full = True
                return False
            self._segments.append(segment)
            self._used = 0
        self._places[key] = (len(self._segments) - 1, self._used, value.shape, value.dtype)
        self._used += size
        self.get(key).copy_(value)
        return True

    def _segment(self, least: int) -> Tensor | None:
        with torch.inference_mode(False):  # what evaluation keeps, training reads
            size = max(least, min(SEGMENT, self.budget - self._in_memory))
            if self._in_memory + size <= self.budget:
                self._in_memory += size
                return torch.empty(size, dtype=torch.uint8)
            size = max(least, SEGMENT)
            found = _mapped(self.folder, size) if self.folder is not None else None
            self.on_disk += size if found is not None else 0
            return found


def _mapped(folder: Path, size: int) -> Tensor | None:
    """Return bytes of a file that is gone when they are, or None where the disk has too little room."""
    if shutil.disk_usage(folder).free < size + SPARE:
        return None
    handle, path = tempfile.mkstemp(prefix="prefix", dir=folder)
    try:
        reserve = getattr(os, "posix_fallocate", None)  # without it, a full disk would show in the middle of a copy
        if reserve is not None:
            reserve(handle, 0, size)
        else:
            os.ftruncate(handle, size)
        return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    except OSError as error:
        log.warning("%s: no room to keep hidden states (%s)", folder, error)
        return None
    finally:
        os.close(handle)
        os.unlink(path)
