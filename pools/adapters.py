"""A LoRA adapter read as an expert of its base, without writing its weights out.

Each weight is the base's plus scale * B A, worked out for the elements that are asked for. Everything runs element by
element in float32, one rank after the other, so that the bits depend neither on how a tensor is cut nor on threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from pools.checkpoint import Checkpoint
from pools.faults import specs_of
from pools.headers import CheckpointError
from pools.lora import Change, Factors, Read, read_changes
from pools.lora_config import CONFIG, WEIGHTS, config_faults, is_adapter, read_config
from pools.products import BLOCK, add_product, folded, multiply
from pools.reading import Source

__all__ = ["LoraExpert", "adapter_faults", "is_adapter"]

_KEPT_BYTES = 64 << 20  # of factors, as they were last used
_SHOWN = 8  # faults named; the rest is counted


class LoraExpert(Mapping[str, torch.Tensor]):
    """An adapter on its base: all names, shapes and dtypes of the base; implements `pools.reading.Source`.

    Attributes:
        source: What the user called the adapter.
        base: What it was trained on.
        config: `adapter_config.json`.
        changes: The base's names -> what the adapter does to them; the other tensors are the base's.
        own: Tensors of a head that the base lacks, or has for other classes -> their keys in `weights`.
        weights: The adapter's file.
    """

    def __init__(self, path: Path, source: str, base: Source) -> None:
        """Read headers and compare them with the base's.

        Args:
            path: The adapter's directory.
            source: What the user called it.
            base: Its base, in full precision (not quantised).

        Raises:
            CheckpointError: All that is wrong, a line each.
        """
        self.path, self.source, self.base = Path(path), source, base
        self._tensors = cast(Mapping[str, torch.Tensor], base)
        self.config = read_config(self.path)
        self.weights = Checkpoint(_weights_of(self.path), source)
        read = _read(self.config, self.weights, base)
        if read.faults:
            raise CheckpointError("\n".join(_short(read.faults, source)))
        self.changes, self.own = read.changes, read.own
        self._held: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self._norms: dict[str, torch.Tensor] = {}
        self._lock, self._norm_lock = threading.Lock(), threading.Lock()

    def __getitem__(self, name: str) -> torch.Tensor:
        """One whole tensor: in float32 where the adapter changes it, so that nothing is rounded; else the base's."""
        if name not in self.changes:
            return self._tensors[name]
        tensor = torch.empty(self.base.shapes[name], dtype=torch.float32)
        self.read(name, 0, tensor.view(-1))
        return tensor

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Read elements [start, start + len(out)) of a tensor into `out`; see `pools.reading.Source`."""
        change = self.changes.get(name)
        if change is None:
            self.base.read(name, start, out)
            return
        for begin in range(0, len(out), BLOCK):
            part = out[begin : begin + BLOCK]
            self._read_low_rank(name, change, start + begin, part)
            if change.factors is not None and change.factors.magnitude:
                by_column = change.factors.flipped
                multiply(part, self._magnitudes(name, change), start + begin, self._columns(name), by_column)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Left (m, r), right (r, n) and scale: the change is scale * left @ right of the tensor seen as (m, n).

        Raises:
            KeyError: The adapter does not change the tensor by factors.
        """
        factors = self.changes[name].factors
        if factors is None:
            raise KeyError(f"{self.source} has no factors for {name}")
        left, right = self._oriented(name, factors)
        return left, right, factors.scale

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        return f"LoraExpert({self.source!r}, {len(self.changes)} of {len(self)} tensors changed)"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The base's."""
        return self.base.shapes

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The base's."""
        return self.base.dtypes

    @property
    def nbytes(self) -> int:
        """Size of the base and of the adapter's file."""
        return self.base.nbytes + self.weights.nbytes

    @cached_property
    def adapter_fingerprint(self) -> str:
        """Content hash of the adapter alone: its tensors, and what is done with them."""
        facts = {name: asdict(change) for name, change in sorted(self.changes.items())}
        return _hashed([self.weights.fingerprint, facts, sorted(self.own.items())])

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of the adapter and its base."""
        return _hashed([self.base.fingerprint, self.adapter_fingerprint])

    @property
    def stamp(self) -> str:
        """What changes when a file of the adapter or of its base is changed."""
        found = os.stat(self.path / CONFIG)
        return json.dumps([self.base.stamp, self.weights.stamp, found.st_size, found.st_mtime_ns])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "source": self.source, "base": self.base}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _read_low_rank(self, name: str, change: Change, start: int, out: torch.Tensor) -> None:
        """The base's elements, or those of the tensor in its place, plus scale * B A; all but the norms of DoRA."""
        if change.whole:
            self.weights.read(change.whole, start, out)
        else:
            self.base.read(name, start, out)
        if change.bias is not None:
            key, scale = change.bias
            added = torch.empty(len(out))
            self.weights.read(key, start, added)
            out.add_(added.mul_(scale))
        if change.factors is not None:
            left, right = self._oriented(name, change.factors)
            add_product(out, left, right, change.factors.scale, start)

    def _oriented(self, name: str, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        """Left (m, r) and right (r, n) for the tensor as it stands on the disk, float32; the last used are kept."""
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
        a = self.weights[factors.a].float().flatten(1)
        b = self.weights[factors.b].float().flatten(1)
        pair = (a.t().contiguous(), b.t().contiguous()) if factors.flipped else (b.contiguous(), a.contiguous())
        with self._lock:
            self._held[name] = pair
            while len(self._held) > 1 and sum(x.nbytes + y.nbytes for x, y in self._held.values()) > _KEPT_BYTES:
                self._held.popitem(last=False)
        return pair

    def _columns(self, name: str) -> int:
        """Columns of the tensor seen as a matrix."""
        return math.prod(self.base.shapes[name][1:])

    def _magnitudes(self, name: str, change: Change) -> torch.Tensor:
        """DoRA: what each row (column, of a flipped tensor) is multiplied by: its magnitude over its norm, float32."""
        with self._norm_lock:
            if name not in self._norms:
                assert change.factors is not None
                norms = self._squares(name, change).sqrt_()
                magnitude = self.weights[change.factors.magnitude].reshape(-1)
                self._norms[name] = (magnitude.double() / norms).float()
            return self._norms[name]

    def _squares(self, name: str, change: Change) -> torch.Tensor:
        """Sum of squares of each row (column, of a flipped tensor) of the base plus the low-rank change, float64."""
        assert change.factors is not None
        rows, columns = self.base.shapes[name][0], self._columns(name)
        step = max(1, BLOCK // max(columns, 1))
        found = []
        total = torch.zeros(columns, dtype=torch.float64)
        for row in range(0, rows, step):
            block = torch.empty(min(step, rows - row) * columns)
            self._read_low_rank(name, change, row * columns, block)
            squares = block.view(-1, columns).double().square_()
            if change.factors.flipped:
                total += folded(squares.t())
            else:
                found.append(folded(squares))
        return total if change.factors.flipped else torch.cat(found)


def adapter_faults(path: Path, base: Source) -> list[str]:
    """All that headers tell of what keeps an adapter from being read on a base, a line each."""
    try:
        config = read_config(Path(path))
        weights = Checkpoint(_weights_of(Path(path)))
    except CheckpointError as error:
        return str(error).splitlines()
    return _read(config, weights, base).faults


def _read(config: Mapping[str, Any], weights: Checkpoint, base: Source) -> Read:
    faults = config_faults(config)
    return (
        Read(faults=faults)
        if faults
        else read_changes(config, specs_of(weights), specs_of(cast(Mapping[str, torch.Tensor], base)))
    )


def _short(faults: list[str], source: str) -> list[str]:
    """A few faults, with the adapter's name, and how many more there are."""
    shown = [f"{source}: {fault}" for fault in faults[:_SHOWN]]
    more = len(faults) - _SHOWN
    return [*shown, f"{source}: and {more} more"] if more > 0 else shown


def _weights_of(path: Path) -> Path:
    """The adapter's file.

    Raises:
        CheckpointError: There is none that can be read.
    """
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    if (path / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{path} holds its weights only as adapter_model.bin: pickles run code when they are read, and only "
            "safetensors is taken; load it with peft and save it again with save_pretrained"
        )
    raise CheckpointError(f"{path} has {CONFIG} and no {WEIGHTS}; fetch it again")


def _hashed(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
