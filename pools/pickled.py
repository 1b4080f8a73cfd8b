"""Torch files (.pt, .pth, .bin, .ckpt) read as tensors alone: `weights_only=True`, mapped into memory, never run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pools.faults import Spec
from pools.headers import CheckpointError, closest_sibling
from pools.write import nbytes_of

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which training scripts keep the weights
_BLOCK = 1 << 20  # elements hashed at a time


class PickledCheckpoint(Mapping[str, torch.Tensor]):
    """Tensors of a torch file; the system reads them from the disk as they are touched.

    Attributes:
        path: The file.
        source: What the user called it.
        dropped: What the file holds besides the tensors: optimizer states, counters, settings.
    """

    def __init__(self, path: str | os.PathLike[str], source: str | None = None) -> None:
        """Open a file.

        Args:
            path: A file as `torch.save` writes it: tensors by name, or those under `state_dict`, `model_state_dict` or
                `model`.
            source: What the user called it; by default the path.

        Raises:
            CheckpointError: It is no such file, or holds more than tensors and plain values.
        """
        self.path = Path(path)
        self.source = source if source is not None else str(path)
        content = _load(self.path)
        self._stamp = _stamp(self.path)
        self._tensors, self.dropped = _unwrapped(content, self.path)

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor in memory of its own.

        Raises:
            KeyError: There is none of that name.
            CheckpointError: The file has changed since it was opened.
        """
        self._unchanged()
        return self._tensors[name].detach().clone(memory_format=torch.contiguous_format)

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Read elements [start, start + len(out)) of a tensor into `out`; see `pools.reading.Source`.

        Raises:
            CheckpointError: The file has changed since it was opened.
        """
        self._unchanged()
        tensor = self._tensors[name].detach()
        if tensor.is_contiguous():
            out.copy_(tensor.view(-1)[start : start + len(out)])
            return
        places = torch.arange(start, start + len(out))
        where = torch.unravel_index(places, tensor.shape)
        out.copy_(tensor[where])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        return f"PickledCheckpoint({self.source!r}, {len(self)} tensors)"

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Name -> dtype."""
        return {name: tensor.dtype for name, tensor in self._tensors.items()}

    @property
    def nbytes(self) -> int:
        """Size of all tensors together."""
        return sum(nbytes_of(Spec(self.shapes[name], self.dtypes[name])) for name in self)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all names, dtypes, shapes and contents in the order of names."""
        digest = hashlib.sha256()
        for name in sorted(self):
            digest.update(json.dumps([name, str(self.dtypes[name]), self.shapes[name]]).encode())
            flat = self._tensors[name].detach().reshape(-1)
            for start in range(0, len(flat), _BLOCK):
                digest.update(flat[start : start + _BLOCK].contiguous().view(torch.uint8).numpy().data)
        self._unchanged()
        return digest.hexdigest()

    @property
    def stamp(self) -> str:
        """Path, size and time of change of the file."""
        return json.dumps([str(self.path), *self._stamp])

    def _unchanged(self) -> None:
        if _stamp(self.path) != self._stamp:
            raise CheckpointError(f"{self.path} has changed since it was opened; start again when nothing writes to it")


def _load(path: Path) -> Any:
    """The content of a torch file, without running any of it."""
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}{closest_sibling(path)}")
    mapped = zipfile.is_zipfile(path)  # files of before torch 1.6 cannot be mapped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on protocols of pickles: what is read is right, or refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "")
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, and reading it would run code; it is refused "
            f"(torch.load, weights_only=True){': ' + named.strip()[:200] if named else ''}. Save the weights alone: "
            "torch.save(model.state_dict(), FILE), or safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        told = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is no torch file, or is truncated: {told}") from error


def _unwrapped(content: Any, path: Path) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The tensors of a file, and what else it holds."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, wanted tensors by name")
    key = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
    beside = [str(name) for name in content if name != key] if key is not None else []
    inside = content[key] if key is not None else content
    tensors = {str(name): value for name, value in inside.items() if isinstance(value, torch.Tensor)}
    beside += [str(name) for name, value in inside.items() if not isinstance(value, torch.Tensor)]
    unlike = [name for name, tensor in tensors.items() if tensor.is_sparse or tensor.is_quantized or tensor.is_meta]
    if unlike:
        raise CheckpointError(
            f"{path} has sparse, quantised or empty tensors ({', '.join(unlike[:4])}); dense ones are taken"
        )
    if not tensors:
        raise CheckpointError(
            f"{path} holds no tensors; its entries are {', '.join(map(str, list(content)[:6])) or 'none'}"
        )
    return tensors, tuple(beside)


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} can no longer be read: {error.strerror}") from error
    return (found.st_size, found.st_mtime_ns, found.st_ino)
