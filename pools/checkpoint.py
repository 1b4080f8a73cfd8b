"""A checkpoint as a mapping from names to tensors: headers are read at once, each tensor when it is asked for."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
import xxhash  # fast enough that hashing while merging costs next to nothing; `datasets` relies on it too

from pools.headers import CheckpointError, Entry, OpenFiles, Stamp, closest_sibling, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STALE = ("position_ids",)  # buffers that were once written with the weights and follow from the configuration
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
BLOCK = 1 << 18  # elements of a tensor hashed together; whoever reads whole blocks gets their hashes for nothing
_scratch = threading.local()

# Names of a checkpoint -> {name to use: name in the file}; names left out are not part of the mapping.
Select = Callable[[tuple[str, ...]], dict[str, str]]


class Checkpoint(Mapping[str, torch.Tensor]):
    """Tensors of a directory (one safetensors file, or shards with an index) or of one file, read on access.

    Every access reads the tensor anew into memory of its own: nothing is shared between callers and nothing is kept.

    Attributes:
        path: The directory or file.
        source: What the user called it.
        entries: Name -> place, shape and dtype, from the headers alone.
        others: Names in the files that `select` left out.
        dropped: Those of them that older versions of transformers wrote and current models lack.
    """

    def __init__(self, path: str | os.PathLike[str], source: str | None = None, select: Select | None = None) -> None:
        """Read the headers.

        Args:
            path: A directory or a `.safetensors` file.
            source: What the user called it; by default the path.
            select: Which names to take and how to call them; by default all, as they are.

        Raises:
            CheckpointError: All that is wrong with the files, a line each.
        """
        self.path = Path(path)
        self.source = source if source is not None else str(path)
        self._stamps: dict[Path, Stamp] = {}
        self._hashes: dict[tuple[str, int], bytes] = {}  # of blocks that were read
        found = self._read_headers()
        names = select(tuple(found)) if select else {name: name for name in found}
        self.entries = {name: found[inside] for name, inside in names.items()}
        self._files = OpenFiles(self._stamps)
        taken = set(names.values())
        self.others = tuple(name for name in found if name not in taken)
        self.dropped = tuple(name for name in self.others if name.rpartition(".")[2] in STALE)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            KeyError: There is no tensor of that name.
            CheckpointError: The file has changed or become shorter since it was opened.
        """
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.nbytes:
            self._fill(name, 0, tensor.reshape(-1))
        return tensor

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Read elements [start, start + len(out)) of a tensor into `out`, 1-D float32; see `pools.reading.Source`.

        Raises:
            CheckpointError: The file has changed or become shorter since it was opened.
        """
        entry = self.entries[name]
        if entry.dtype is torch.float32:
            self._fill(name, start, out)
            return
        stop = start + len(out)
        while start < stop:
            n = min(stop, (start // BLOCK + 1) * BLOCK) - start  # to the end of a block
            raw = _buffer(n * entry.dtype.itemsize).view(entry.dtype)
            self._fill(name, start, raw)
            out[len(out) - (stop - start) :][:n].copy_(raw)
            start += n

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {len(self)} tensors)"

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, from the headers."""
        return {name: entry.shape for name, entry in self.entries.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Name -> dtype, from the headers."""
        return {name: entry.dtype for name, entry in self.entries.items()}

    @property
    def nbytes(self) -> int:
        """Size of all tensors together."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def stamp(self) -> str:
        """Paths, sizes and times of change of the files: different when one of them was replaced or written to."""
        return json.dumps([[str(file), *stamp] for file, stamp in sorted(self._stamps.items())])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all names, dtypes, shapes and contents in the order of names: however the files are cut.

        SHA-256 over the XXH3 hashes of blocks of each tensor: it tells contents apart, it does not resist forgery.
        Blocks that a merge has read are not read again.
        """
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(json.dumps([name, str(entry.dtype), entry.shape]).encode())
            size = math.prod(entry.shape)
            for block in range(-(-size // BLOCK)):
                if (name, block) not in self._hashes:
                    start = block * BLOCK
                    n = min(BLOCK, size - start)
                    self._fill(name, start, _buffer(n * entry.dtype.itemsize).view(entry.dtype))
                digest.update(self._hashes[name, block])
        return digest.hexdigest()

    def _fill(self, name: str, start: int, raw: torch.Tensor) -> None:
        """Read elements from `start` on into `raw`, of the tensor's own dtype; whole blocks are hashed as they pass."""
        entry = self.entries[name]
        width = entry.dtype.itemsize
        data = raw.view(torch.uint8).numpy().data
        self._files.fill(entry.file, data, entry.offset + start * width, name)
        size, stop = math.prod(entry.shape), start + len(raw)
        for begin in range(-(-start // BLOCK) * BLOCK, stop, BLOCK):
            end = min(begin + BLOCK, size)
            if end <= stop and (name, begin // BLOCK) not in self._hashes:
                part = data[(begin - start) * width : (end - start) * width]
                self._hashes[name, begin // BLOCK] = xxhash.xxh3_128_digest(part)

    def _read_headers(self) -> dict[str, Entry]:
        if not self.path.exists():
            raise CheckpointError(f"there is no checkpoint at {self.path}{closest_sibling(self.path)}")
        if self.path.is_file():
            if self.path.suffix != ".safetensors":
                raise CheckpointError(_refuse(self.path.parent, [self.path]))
            return self._read_header(self.path)
        if (self.path / INDEX).exists():
            return self._read_shards()
        files = sorted(self.path.glob("*.safetensors"))
        if (self.path / SINGLE).exists():
            files = [self.path / SINGLE]
        if len(files) == 1:
            return self._read_header(files[0])
        if files:
            raise CheckpointError(
                f"{self.path} has {len(files)} safetensors files ({', '.join(file.name for file in files[:3])}, ...) "
                f"and no {INDEX} that says which belong to the model; name one file"
            )
        raise CheckpointError(_refuse(self.path, sorted(self.path.iterdir())))

    def _read_header(self, file: Path) -> dict[str, Entry]:
        entries, stamp = read_header(file)
        self._stamps[file] = stamp
        return entries

    def _read_shards(self) -> dict[str, Entry]:
        """All shards that the index names, compared with it."""
        shard_of = _read_index(self.path / INDEX)
        faults: list[str] = []
        shards: dict[str, dict[str, Entry]] = {}
        for shard in dict.fromkeys(shard_of.values()):
            if Path(shard).name != shard or shard in ("", ".", ".."):
                faults.append(f"{self.path / INDEX} names {shard!r}, which leaves the checkpoint's directory; refused")
            elif not (self.path / shard).is_file():
                faults.append(f"{self.path} lacks the shard {shard} that its index names; fetch it again")
            else:
                try:
                    shards[shard] = self._read_header(self.path / shard)
                except CheckpointError as error:
                    faults.append(str(error))
        lacking = [name for name, shard in shard_of.items() if shard in shards and name not in shards[shard]]
        faults += [
            f"the index of {self.path} puts {name} into {shard_of[name]}, which lacks it" for name in lacking[:8]
        ]
        faults += [f"the index of {self.path}: and {len(lacking) - 8} more such tensors"] if len(lacking) > 8 else []
        for shard, entries in shards.items():
            stray = [name for name in entries if shard_of.get(name) != shard]
            if stray:
                faults.append(
                    f"{self.path / shard} holds {len(stray)} tensors ({stray[0]}, ...) its index does not name"
                )
        if faults:
            raise CheckpointError("\n".join(faults))
        return {name: shards[shard][name] for name, shard in shard_of.items()}


def _buffer(nbytes: int) -> torch.Tensor:
    """Bytes of this thread to read into, used again and again: new memory costs more than reading."""
    held = getattr(_scratch, "held", None)
    if held is None or len(held) < nbytes:
        held = _scratch.held = torch.empty(max(nbytes, BLOCK * 2), dtype=torch.uint8)
    return held[:nbytes]


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards: {error!r}") from error


def _refuse(directory: Path, files: list[Path]) -> str:
    """Why a directory without safetensors is refused."""
    pickled = [file.name for file in files if file.suffix in _PICKLED]
    if pickled:
        return (
            f"{directory} holds weights only as {', '.join(pickled[:4])}: pickles run code when they are read, and "
            "only safetensors is taken; convert it (transformers: from_pretrained, then save_pretrained), or name a "
            "revision of the hub that has model.safetensors (org/name@revision)"
        )
    names = ", ".join(file.name for file in files[:6])
    return f"{directory} holds no .safetensors file ({names or 'it is empty'})"
