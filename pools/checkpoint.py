"""A checkpoint as a mapping from names to tensors: headers are read at once, each tensor when it is asked for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch

from pools.headers import CheckpointError, Entry, Stamp, closest_sibling, fill, opened, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STALE = ("position_ids",)  # buffers that were once written with the weights and follow from the configuration
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_BLOCK = 1 << 22  # bytes hashed at a time

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
        found = self._read_headers()
        names = select(tuple(found)) if select else {name: name for name in found}
        self.entries = {name: found[inside] for name, inside in names.items()}
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
            block = tensor.reshape(-1).view(torch.uint8).numpy().data
            with opened(entry.file, self._stamps[entry.file]) as stream:
                fill(stream, block, entry.offset, name)
        return tensor

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

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all names, dtypes, shapes and bytes in the order of names: however the files are cut."""
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(json.dumps([name, str(entry.dtype), entry.shape]).encode())
            with opened(entry.file, self._stamps[entry.file]) as stream:
                buffer = memoryview(bytearray(min(_BLOCK, entry.nbytes)))
                for start in range(0, entry.nbytes, _BLOCK):
                    block = buffer[: min(_BLOCK, entry.nbytes - start)]
                    fill(stream, block, entry.offset + start, name)
                    digest.update(block)
        return digest.hexdigest()

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
