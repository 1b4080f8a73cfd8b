"""Headers of safetensors files: what each file holds and where, found without reading a weight."""

from __future__ import annotations

import difflib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # safetensors' words
_HEADER_LIMIT = 100_000_000  # bytes, the format's own limit

Stamp = tuple[int, ...]


class CheckpointError(ValueError):
    """A checkpoint cannot be opened or read; the message says which file, and what to do."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor is."""

    file: Path
    offset: int  # of its first byte in the file
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_header(file: Path) -> tuple[dict[str, Entry], Stamp]:
    """Entries of a safetensors file, and a stamp that changes when the file does.

    Raises:
        CheckpointError: The file is truncated or no safetensors file.
    """
    with file.open("rb") as stream:
        stamp = _stamp(stream.fileno())
        size = os.fstat(stream.fileno()).st_size
        if size < 8:
            raise CheckpointError(
                f"{file} is truncated: {size} bytes, a safetensors file has at least 8; fetch it again"
            )
        length = int.from_bytes(stream.read(8), "little")
        if length > _HEADER_LIMIT:
            raise CheckpointError(f"{file} is no safetensors file: its header would have {length} bytes")
        if 8 + length > size:
            raise CheckpointError(
                f"{file} is truncated: its header ends at byte {8 + length}, the file has {size} bytes; fetch it again"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {name: _entry(file, name, value, 8 + length) for name, value in header.items()}
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} is no safetensors file: its header cannot be read ({error})") from error
    end = max((entry.offset + entry.nbytes for entry in entries.values()), default=8 + length)
    if end > size:
        raise CheckpointError(
            f"{file} is truncated: its tensors end at byte {end}, the file has {size}; fetch it again"
        )
    return entries, stamp


def _entry(file: Path, name: str, value: Mapping[str, Any], start: int) -> Entry:
    """One line of a header, with the offset counted from the file's first byte."""
    if value["dtype"] not in DTYPES:
        raise CheckpointError(f"{file}: {name} has the dtype {value['dtype']}, known are {', '.join(DTYPES)}")
    shape, dtype = tuple(value["shape"]), DTYPES[value["dtype"]]
    begin, end = value["data_offsets"]
    expected = dtype.itemsize * int(torch.Size(shape).numel())
    if min(shape, default=0) < 0 or begin < 0 or end - begin != expected:
        raise CheckpointError(f"{file}: {name} {shape} takes {expected} bytes, the header gives it {end - begin}")
    return Entry(file, start + begin, expected, shape, dtype)


class OpenFiles:
    """Files of a checkpoint, each opened once, known to be what their headers were read from at every read."""

    def __init__(self, stamps: Mapping[Path, Stamp]) -> None:
        self._stamps = stamps
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def fill(self, file: Path, block: memoryview, offset: int, name: str) -> None:
        """Read a tensor's bytes from an offset on into a block; several threads may read at once.

        Raises:
            CheckpointError: The file has changed since its header was read, or is gone.
        """
        descriptor = self._opened(file)
        done, count = 0, 1
        while done < len(block) and count:
            count = os.preadv(descriptor, [block[done:]], offset + done)
            done += count
        if _stamp(file) != self._stamps[file]:  # asked afterwards: a change while this was read counts too
            raise CheckpointError(f"{file} has changed since it was opened; start again when nothing writes to it")
        if done < len(block):
            raise CheckpointError(f"{file} ended while {name} was read; it was truncated after it was opened")

    def _opened(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{file} can no longer be read: {error.strerror}") from error
            return self._descriptors[file]

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {"_stamps": self._stamps}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["_stamps"])  # type: ignore[misc]


def _stamp(file: Path | int) -> Stamp:
    """Size, time of change and identity of a file.

    Raises:
        CheckpointError: It is gone.
    """
    try:
        found = os.stat(file)
    except OSError as error:
        raise CheckpointError(f"{file} can no longer be read: {error.strerror}") from error
    return (found.st_size, found.st_mtime_ns, found.st_ino)


def closest_sibling(path: Path) -> str:
    """A hint for a path that does not exist."""
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        path, parent = parent, parent.parent
    try:
        siblings = [entry.name for entry in parent.iterdir()]
    except OSError:
        return ""
    matches = difflib.get_close_matches(path.name, siblings, n=1)
    return (
        f"; {parent} has {matches[0]}" if matches else f"; {parent} has {', '.join(sorted(siblings)[:8]) or 'nothing'}"
    )
