"""Writes a model's directory: shards laid out before any data exists, complete before it has its name."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from pools.checkpoint import INDEX, SINGLE
from pools.faults import Spec
from pools.headers import DTYPES, CheckpointError
from pools.partial import JOURNAL, partial_directory, sync

SHARD_BYTES = 5_000_000_000  # most bytes of one weights file, unless one tensor is larger
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Layout:
    """What a model's directory will hold, known before any weight is read."""

    specs: Mapping[str, Spec]  # every tensor that is written
    around: Mapping[str, torch.Tensor] = field(default_factory=dict)  # those that are written as they are, not merged
    copies: tuple[Path, ...] = ()  # files to copy into the directory
    texts: Callable[[], Mapping[str, str]] = dict  # file name -> content; asked for last

    @property
    def nbytes(self) -> int:
        """Size of all that is written, but for the texts."""
        return sum(map(nbytes_of, self.specs.values())) + sum(file.stat().st_size for file in self.copies)


def write_directory(
    directory: Path,
    layout: Layout,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write tensors and the files beside them; the directory gets its name when all of it is on the disk.

    Args:
        directory: Must not exist yet, or be empty.
        layout: What will be in it.
        tensors: Names and merged tensors in any order, each once, taken one at a time.
        shard_bytes: Most bytes of one weights file.

    Returns:
        The names of the files, sorted.

    Raises:
        CheckpointError: The directory is taken; the disk cannot hold the model; tensors are missing, come twice or are
            unlike their specs. Nothing is left behind.
    """
    with partial_directory(directory, layout.nbytes) as partial:
        with Shards(partial, layout.specs, shard_bytes) as shards:
            for name, tensor in tensors:
                shards.put(name, tensor)
            write_around(shards, layout)
        return write_beside(partial, layout)


def write_around(shards: Shards, layout: Layout) -> None:
    """Write the tensors that are not merged."""
    for name in layout.around:
        if shards.wants(name):
            shards.put(name, layout.around[name])


def write_beside(partial: Path, layout: Layout) -> list[str]:
    """Write the files beside the weights; returns the names of all files, sorted."""
    for file in layout.copies:
        shutil.copyfile(file, partial / file.name)
    for name, text in layout.texts().items():
        (partial / name).write_text(text, encoding="utf-8")
    return sorted(file.name for file in partial.iterdir() if file.name != JOURNAL)


class Shards:
    """Safetensors files whose headers and sizes are fixed at the start; tensors, or parts of them, are put in place.

    Several threads may put at once, and several processes: one lays the files out, the others join.
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, Spec],
        shard_bytes: int = SHARD_BYTES,
        *,
        finished: Collection[str] = (),
        join: bool = False,
        shared: bool = False,
        done: Callable[[str], None] = lambda file: None,
    ) -> None:
        """Cut the tensors into files.

        Args:
            directory: Where to.
            specs: Shape and dtype of every tensor that will come.
            shard_bytes: Most bytes of one file.
            finished: Files that are there already, whole: nothing of them is wanted.
            join: The files have been laid out by another process; this one need not write all of them.
            shared: Other processes have joined and write what this one does not.
            done: Called with a file's name when all of it is written and on the disk.
        """
        self.directory, self.specs = directory, dict(specs)
        self._finished, self._join, self._done = frozenset(finished), join, done
        self._shared = shared or join
        self._places: dict[str, tuple[str, FileIO, int]] = {}
        self._left: dict[str, int] = {}  # tensor -> elements that have not come
        self._waiting: dict[str, int] = {}  # file -> tensors that are not complete
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._cuts = _cut(self.specs, shard_bytes)
        self.files = [SINGLE]
        if len(self._cuts) > 1:
            count = len(self._cuts)
            self.files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]

    def __enter__(self) -> Shards:
        with ExitStack() as stack:
            for file, names in zip(self.files, self._cuts, strict=True):
                if file in self._finished:
                    continue
                stream = stack.enter_context(FileIO(self.directory / file, "r+" if self._join else "w"))
                self._lay_out(file, stream, names)
            if len(self._cuts) > 1 and not self._join:
                (self.directory / INDEX).write_text(self._index(), encoding="utf-8")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        with self._stack:
            lacking = [name for name, left in self._left.items() if left]
            if kind is None and lacking and not self._shared:
                raise CheckpointError(f"{len(lacking)} tensors of the model never came: {', '.join(lacking[:5])}")

    def wants(self, name: str) -> bool:
        """Whether any of a tensor has still to come."""
        return self._left.get(name, 0) > 0

    def in_order(self) -> list[str]:
        """Names of the wanted tensors as they follow each other in the files."""
        return [name for names in self._cuts for name in names if name in self._left]

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one whole tensor.

        Raises:
            CheckpointError: It is not one of the model's, has come already, or is unlike its spec.
        """
        if name not in self.specs:
            raise CheckpointError(f"{name} {tuple(tensor.shape)} is none of the model's tensors")
        wanted = self.specs[name]
        came = Spec(tuple(tensor.shape), tensor.dtype)
        if came != wanted:
            raise CheckpointError(f"{name} came as {came.shape} {came.dtype}, wanted {wanted.shape} {wanted.dtype}")
        self.put_part(name, 0, tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1))

    def put_part(self, name: str, start: int, part: torch.Tensor) -> None:
        """Write elements [start, start + len(part)) of a tensor, 1-D contiguous on the CPU, in the spec's dtype.

        Raises:
            CheckpointError: More elements came than the tensor has.
        """
        file, stream, offset = self._places[name]
        if part.numel():
            _write_at(stream, offset + start * part.dtype.itemsize, part.view(torch.uint8).numpy().data)
        with self._lock:
            left = self._left[name] = self._left[name] - max(part.numel(), 1)
            if left < 0:
                raise CheckpointError(f"{name} came twice")
            if left == 0:
                self._waiting[file] -= 1
            complete = left == 0 and self._waiting[file] == 0
        if complete:
            os.fdatasync(stream.fileno())
            self._done(file)

    def flush(self) -> None:
        """Have what was written so far reach the disk, so that little is left to wait for at the end.

        Errors are left to whoever completes a file: the system tells them once to each that has the file open.
        """
        for file in [file for file, n_tensors in list(self._waiting.items()) if n_tensors]:
            with suppress(OSError):
                sync(self.directory / file, os.fdatasync)

    def _lay_out(self, file: str, stream: FileIO, names: list[str]) -> None:
        """Write one file's header, and give the file its size."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            spec = self.specs[name]
            end = offset + nbytes_of(spec)
            header[name] = {"dtype": _WORDS[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
            offset = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)  # data starts at a multiple of 8
        start = 8 + len(raw)
        if not self._join:
            _write_at(stream, 0, memoryview(len(raw).to_bytes(8, "little") + raw))
            stream.truncate(start + offset)
        self._places |= {name: (file, stream, start + header[name]["data_offsets"][0]) for name in names}
        self._left |= {name: max(torch.Size(self.specs[name].shape).numel(), 1) for name in names}
        self._waiting[file] = len(names)

    def _index(self) -> str:
        weight_map = {name: file for file, names in zip(self.files, self._cuts, strict=True) for name in names}
        total = sum(map(nbytes_of, self.specs.values()))
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def _cut(specs: Mapping[str, Spec], shard_bytes: int) -> list[list[str]]:
    """Names of each file; in a file by falling size of an element, so that each tensor is aligned."""
    if shard_bytes < 1:
        raise CheckpointError(f"shard_bytes must be at least 1, got {shard_bytes}")
    cuts: list[list[str]] = [[]]
    filled = 0
    for name in sorted(specs):
        if specs[name].dtype not in _WORDS:
            raise CheckpointError(f"{name} has the dtype {specs[name].dtype}, which safetensors does not know")
        size = nbytes_of(specs[name])
        if cuts[-1] and filled + size > shard_bytes:
            cuts.append([])
            filled = 0
        cuts[-1].append(name)
        filled += size
    return [sorted(names, key=lambda name: (-specs[name].dtype.itemsize, name)) for names in cuts]


def nbytes_of(spec: Spec) -> int:
    """Size of a tensor."""
    return spec.dtype.itemsize * torch.Size(spec.shape).numel()


def _write_at(stream: FileIO, offset: int, block: memoryview) -> None:
    done = 0
    while done < len(block):
        done += os.pwrite(stream.fileno(), block[done:], offset + done)
