"""What a merge will do, found from headers alone: the tensors and their parameters, memory, disk, time."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.apply import rule_on
from harness.job import Merge, sized
from harness.pieces import CHUNK
from methods.kinds import Kind, Piece, Place
from pools.faults import Spec
from pools.write import Layout

_READ_BYTES_S, _WRITE_BYTES_S = 2e9, 1e9  # assumed of a disk with a warm cache; what it is can only be found by reading
_PATIENCE_S = 0.1  # after which a rule is not tried again
_TEMPORARIES = 6  # arrays of a piece's size that a rule holds besides its inputs, at most


@dataclass(frozen=True)
class Preflight:
    """What is known of a merge before any weight is read."""

    rows: tuple[Mapping[str, Any], ...]  # one for each tensor of the output
    dropped: Mapping[str, tuple[str, ...]]  # member -> names of its tensors that do not reach the output
    nbytes_read: int
    nbytes_written: int
    nbytes_free: int | None  # on the output's disk; None where there is no output
    peak_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()  # what is worth knowing and forbids nothing

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Every tensor with what is done to it and with which parameters."""
        keys = list(dict.fromkeys(key for row in self.rows for key in row))
        return tuple(keys), [tuple(str(row.get(key, "")) for key in keys) for row in self.rows]

    def summary(self) -> list[tuple[str, str]]:
        """The figures in words."""
        merged = sum(row["how"] == "merged" for row in self.rows)
        lines = [
            ("tensors", f"{len(self.rows)}, of which {merged} are merged"),
            ("to read", sized(self.nbytes_read)),
            ("to write", sized(self.nbytes_written)),
            ("free on the disk", "-" if self.nbytes_free is None else sized(self.nbytes_free)),
            ("peak memory, about", sized(self.peak_bytes)),
            ("time, about", f"{self.seconds:.0f} s with a warm file cache"),
        ]
        for member, names in self.dropped.items():
            lines.append((f"not in the output, of {member}", ", ".join(names)))
        return lines + [("note", note) for note in self.notes]


def preflight(
    job: Merge,
    layout: Layout,
    workers: int,
    output: Path | None,
    dropped: Mapping[str, tuple[str, ...]],
    notes: tuple[str, ...] = (),
) -> Preflight:
    """Look at a merge that `harness.merge.ready` has passed; no weight is read."""
    elements = {name: math.prod(spec.shape) for name, spec in job.specs.items()}
    passes = 2 if job.row.prepare else 1
    read = sum(elements[name] * width for name, width in job.width.items())
    free = None if output is None else shutil.disk_usage(_existing(output)).free
    arithmetic = sum(elements.values()) * _seconds_per_element(job) * passes / min(workers, os.cpu_count() or 1)
    disk = passes * read / _READ_BYTES_S + layout.nbytes / _WRITE_BYTES_S
    return Preflight(
        tuple(_rows(job, layout)),
        dropped,
        read,
        layout.nbytes,
        free,
        _peak(job, elements, workers),
        max(arithmetic, disk),
        notes,
    )


def _rows(job: Merge, layout: Layout) -> list[dict[str, Any]]:
    """Each tensor of the output: where it comes from, and with which parameters."""
    rows = []
    for name, spec in layout.specs.items():
        facts: dict[str, Any] = {"tensor": name, "shape": list(spec.shape), "dtype": _word(spec)}
        if name not in job.specs:
            facts["how"] = "copied"
        elif not job.inputs.is_weight(name):
            facts["how"] = "buffer"
        else:
            facts |= {"how": "merged", **vars(job.of(name))}
        rows.append(facts)
    return rows


def _peak(job: Merge, elements: Mapping[str, int], workers: int) -> int:
    """This process as it is, and what the workers will hold."""
    import psutil

    held = psutil.Process().memory_info().rss  # not its peak so far, which a process has from the one that started it
    members = len(job.inputs.experts) + 1
    if job.row.kind is Kind.fold:
        return held + 4 * sum(elements.values()) * (3 + _TEMPORARIES // 2)
    largest = max((n for name, n in elements.items() if job.inputs.is_weight(name)), default=0)
    piece = min(CHUNK, largest) if job.row.elementwise else largest
    return held + workers * 4 * piece * (2 * members + _TEMPORARIES)


def _seconds_per_element(job: Merge) -> float:
    """How long the rule takes for one element, tried on one piece of made-up numbers."""
    if job.row.kind is Kind.fold:
        return 0.0
    flat = job.row.elementwise and not job.row.stats  # statistics of made-up numbers are a matrix
    n, shape = (CHUNK, (CHUNK,)) if flat else (256 * 256, (256, 256))
    numbers = torch.linspace(-1, 1, n).reshape(shape)
    experts = numbers.expand(len(job.inputs.experts), *shape).clone()
    stats = torch.eye(256).expand(len(job.inputs.experts), 256, 256) if job.row.stats else None
    piece = Piece("rehearsal", numbers, experts, lambda index: numbers.abs(), stats, Place(1, 1, linear=True))
    spans: list[float] = []
    while len(spans) < 3 and sum(spans) < _PATIENCE_S:
        started = time.perf_counter()
        rule_on(job, piece)
        spans.append(time.perf_counter() - started)
    return min(spans) / n


def _existing(path: Path) -> Path:
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path


def _word(spec: Spec) -> str:
    return str(spec.dtype).removeprefix("torch.")
