"""Writes a model's directory: shards laid out before any data exists, complete before it has its name."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from pools.checkpoint import INDEX, SINGLE
from pools.faults import Spec
from pools.headers import DTYPES, CheckpointError

SHARD_BYTES = 5_000_000_000  # most bytes of one weights file, unless one tensor is larger
_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_PARTIAL = re.compile(r"^\..+\.partial-(\d+)$")
_GIB = 1 << 30


def write_directory(
    directory: Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    copies: Iterable[Path] = (),
    texts: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write tensors and the files beside them; the directory gets its name when all of it is on the disk.

    Args:
        directory: Must not exist yet, or be empty.
        specs: Shape and dtype of every tensor that will come.
        tensors: Names and tensors in any order, each once, taken one at a time.
        copies: Files to copy into the directory as they are.
        texts: File name -> content.
        shard_bytes: Most bytes of one weights file.

    Returns:
        The names of the files, sorted.

    Raises:
        CheckpointError: The directory is taken; the disk cannot hold the model; tensors are missing, come twice or are
            unlike their specs. Nothing is left behind.
    """
    copies, texts = list(copies), dict(texts or {})
    needed = sum(_nbytes(spec) for spec in specs.values()) + sum(file.stat().st_size for file in copies)
    with partial_directory(directory, needed) as partial:
        with Shards(partial, specs, shard_bytes) as shards:
            for name, tensor in tensors:
                shards.put(name, tensor)
        for file in copies:
            shutil.copyfile(file, partial / file.name)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        return sorted(file.name for file in partial.iterdir())


class Shards:
    """Safetensors files whose headers and sizes are fixed at the start; tensors are then put in their places."""

    def __init__(self, directory: Path, specs: Mapping[str, Spec], shard_bytes: int = SHARD_BYTES) -> None:
        self.directory, self.specs = directory, dict(specs)
        self._waiting = dict.fromkeys(specs)
        self._places: dict[str, tuple[FileIO, int]] = {}
        self._stack = ExitStack()
        cuts = _cut(self.specs, shard_bytes)
        self._names = [SINGLE]
        if len(cuts) > 1:
            self._names = [f"model-{i:05d}-of-{len(cuts):05d}.safetensors" for i in range(1, len(cuts) + 1)]
        self._cuts = cuts

    def __enter__(self) -> Shards:
        with ExitStack() as stack:
            for file, names in zip(self._names, self._cuts, strict=True):
                self._lay_out(stack.enter_context(FileIO(self.directory / file, "w")), names)
            if len(self._cuts) > 1:
                (self.directory / INDEX).write_text(self._index(), encoding="utf-8")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        with self._stack:
            if kind is None and self._waiting:
                some = ", ".join(list(self._waiting)[:5])
                raise CheckpointError(f"{len(self._waiting)} tensors of the model never came: {some}")

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor.

        Raises:
            CheckpointError: It is not one of the model's, has come already, or is unlike its spec.
        """
        if name not in self.specs:
            raise CheckpointError(f"{name} {tuple(tensor.shape)} is none of the model's tensors")
        if name not in self._waiting:
            raise CheckpointError(f"{name} came twice")
        came = Spec(tuple(tensor.shape), tensor.dtype)
        if came != self.specs[name]:
            wanted = self.specs[name]
            raise CheckpointError(f"{name} came as {came.shape} {came.dtype}, wanted {wanted.shape} {wanted.dtype}")
        stream, offset = self._places[name]
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        if flat.numel():
            _write_at(stream, offset, flat.view(torch.uint8).numpy().data)
        del self._waiting[name]

    def _lay_out(self, stream: FileIO, names: list[str]) -> None:
        """Write one file's header, and give the file its size."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            spec = self.specs[name]
            end = offset + _nbytes(spec)
            header[name] = {"dtype": _WORDS[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
            offset = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)  # data starts at a multiple of 8
        start = 8 + len(raw)
        _write_at(stream, 0, memoryview(len(raw).to_bytes(8, "little") + raw))
        stream.truncate(start + offset)
        self._places |= {name: (stream, start + header[name]["data_offsets"][0]) for name in names}

    def _index(self) -> str:
        weight_map = {name: file for file, names in zip(self._names, self._cuts, strict=True) for name in names}
        total = sum(map(_nbytes, self.specs.values()))
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


@contextmanager
def partial_directory(directory: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A sibling of the directory to fill, `.<name>.partial-<pid>`: synced and renamed at the end, removed on any error.

    Raises:
        CheckpointError: The directory is taken, or the disk cannot hold what is to be written.
    """
    directory = Path(directory)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists already and is not overwritten; name another directory or remove it")
    partial = directory.parent / f".{directory.name}.partial-{os.getpid()}"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory.parent).free
        if needed_bytes > free:
            raise CheckpointError(
                f"{directory} cannot be written: {_sizes(needed_bytes, free)}; make room, or write elsewhere"
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for path in (*(path for path in partial.rglob("*")), partial):
            sync(path)
        os.rename(partial, directory)
        sync(directory.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise CheckpointError(_failed(directory, needed_bytes, error)) from error
        raise


def find_partials(parent: Path) -> list[Path]:
    """Directories that writers of this machine left half-written when they were killed."""
    found = [path for path in sorted(Path(parent).glob(".*.partial-*")) if path.is_dir()]
    return [path for path in found if (match := _PARTIAL.match(path.name)) and not _lives(int(match[1]))]


def _cut(specs: Mapping[str, Spec], shard_bytes: int) -> list[list[str]]:
    """Names of each file; in a file by falling size of an element, so that each tensor is aligned."""
    if shard_bytes < 1:
        raise CheckpointError(f"shard_bytes must be at least 1, got {shard_bytes}")
    cuts: list[list[str]] = [[]]
    filled = 0
    for name in sorted(specs):
        if specs[name].dtype not in _WORDS:
            raise CheckpointError(f"{name} has the dtype {specs[name].dtype}, which safetensors does not know")
        size = _nbytes(specs[name])
        if cuts[-1] and filled + size > shard_bytes:
            cuts.append([])
            filled = 0
        cuts[-1].append(name)
        filled += size
    return [sorted(names, key=lambda name: (-specs[name].dtype.itemsize, name)) for names in cuts]


def _nbytes(spec: Spec) -> int:
    return spec.dtype.itemsize * torch.Size(spec.shape).numel()


def _write_at(stream: FileIO, offset: int, block: memoryview) -> None:
    stream.seek(offset)
    done = 0
    while done < len(block):
        done += stream.write(block[done:])


def sync(path: Path) -> None:
    """Have a file or directory reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sizes(needed: int, free: int) -> str:
    return f"{needed / _GIB:.3g} GiB are needed, its disk has {free / _GIB:.3g} GiB free"


def _failed(directory: Path, needed: int, error: OSError) -> str:
    """What to say when the system refuses to write."""
    try:
        room = _sizes(needed, shutil.disk_usage(directory.parent).free)
    except OSError:
        room = f"{needed / _GIB:.3g} GiB are needed"
    return f"{directory} could not be written: {error.strerror or error} ({room}); nothing of it was left"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
