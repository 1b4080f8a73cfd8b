"""Compressed experts in memory: packed tensor by tensor, restored one at a time, in one module that becomes any."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.apply import extras_of, not_finite, restored
from harness.config import UserError
from harness.crew import ALONE, Crew
from harness.inputs import Inputs, MergeError, Tensors
from harness.job import Merge, Tick, sized
from harness.look import look_ahead
from harness.merge import ready
from harness.pieces import Job, cut, own_stream, pieces
from methods.draws import drawer
from methods.kinds import Kind, Piece, Roles, Row, resolve
from methods.packing import position
from pools.faults import Spec, recast

if TYPE_CHECKING:
    from pools.open import Pool

OWN = "own"  # the part of what no method packs: buffers that differ from the base's, as each expert has them


@dataclass(frozen=True)
class Packed:
    """What is kept of experts besides their base."""

    row: Row
    params: Any
    experts: tuple[str, ...]
    tensors: Tensors  # "<tensor>/<part>"
    n_parameters: int  # of one expert, merged by the method
    expert_bytes: int  # of one expert's tensors, as it is
    seed: int = 0
    dtype: torch.dtype | None = None  # of restored floating tensors; None: the base's

    @property
    def nbytes(self) -> int:
        """Size of all that is kept besides the base."""
        known = getattr(self.tensors, "nbytes", None)  # a checkpoint's headers say
        return sum(tensor.nbytes for tensor in self.tensors.values()) if known is None else known

    @property
    def with_base_bytes(self) -> int:
        """Size of what is kept and of the base, which is as large as an expert."""
        return self.nbytes + self.expert_bytes

    def metrics(self) -> dict[str, float]:
        """How small it is: bytes, bits for each parameter of each expert, and how often it goes into the experts."""
        n = len(self.experts)
        left, entries = self._entries
        sparsity = {"prune/sparsity": 1 - left / max(1, entries)} if self.row.entries else {}
        return {
            **sparsity,
            "compression/bytes": float(self.nbytes),
            "compression/bits_per_parameter": 8 * self.nbytes / max(1, n * self.n_parameters),
            "compression/ratio": n * self.expert_bytes / max(1, self.nbytes),
        }

    def summary(self) -> list[tuple[str, str]]:
        """The same in words."""
        found, sparse = self.metrics(), []
        if "prune/sparsity" in found:
            share = found["prune/sparsity"]
            sparse = [("sparsity", f"{share:.4f} of {self._entries[1]:,} entries of the sparse parts are zero")]
        return [
            ("experts", ", ".join(self.experts)),
            *sparse,
            ("packed", f"{sized(self.nbytes)} besides the base"),
            ("bits per parameter", f"{found['compression/bits_per_parameter']:.3g} of each expert"),
            ("ratio", f"{found['compression/ratio']:.3g} times smaller than the experts"),
        ]

    @functools.cached_property
    def _entries(self) -> tuple[int, int]:
        """Of sparse parts: entries that are not zero, and all."""
        if not self.row.entries:
            return 0, 0
        count = resolve(self.row.entries)
        found = [count({part: self.tensors[f"{name}/{part}"] for part in parts}) for name, parts in self.parts.items()]
        return sum(left for left, _ in found), sum(entries for _, entries in found)

    @functools.cached_property
    def parts(self) -> dict[str, list[str]]:
        """The parts of each tensor."""
        found: dict[str, list[str]] = {}
        for key in self.tensors:
            name, _, part = key.rpartition("/")
            found.setdefault(name, []).append(part)
        return found


def is_packed(row: Row, params: Any) -> bool:
    """Whether a method keeps all experts, packed, instead of making one model."""
    return row.kind is Kind.compression and params.expert is None


@torch.no_grad()
def pack(job: Merge, crew: Crew = ALONE, tick: Tick = lambda phase, n: None) -> Packed:
    """Compress all experts; what is packed is held in memory, of the weights one tensor for each worker.

    Raises:
        MergeError: The inputs cannot be compressed; the message names tensors and experts.
    """
    job = ready(job)
    inputs, numbers = job.inputs, look_ahead(job, crew, tick)
    names = [name for name in inputs.specs if inputs.is_weight(name)]
    tasks = list(cut(names, inputs, whole=True))
    tensors = _own(job)
    work = functools.partial(_pack_one, job, numbers)
    for task, found in zip(tasks, crew.map(work, tasks), strict=True):
        tensors |= found
        tick("merge", (task.stop - task.start) * job.width[task.name])
    sizes = {name: math.prod(spec.shape) for name, spec in inputs.specs.items()}
    return Packed(
        job.row,
        job.params,
        tuple(inputs.experts),
        tensors,
        sum(sizes[name] for name in names),
        sum(sizes[name] * spec.dtype.itemsize for name, spec in inputs.specs.items()),
        inputs.seed,
        inputs.dtype,
    )


def _pack_one(job: Merge, numbers: Any, task: Job) -> dict[str, torch.Tensor]:
    """All that is stored of one tensor."""
    with own_stream(job.inputs.device), torch.no_grad():
        (piece,) = pieces(replace(job.row, elementwise=False), job.inputs, task)
        _refuse_non_finite(job, piece)
        parts = job.row.load()(piece.base, piece.experts, job.params, **extras_of(job.row, piece, numbers))
    for part, tensor in parts.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise MergeError(f"{task.name}: its {part} is beyond the range of {tensor.dtype}; set dtype=float32")
    return {f"{task.name}/{part}": tensor.cpu().contiguous() for part, tensor in parts.items()}


def _refuse_non_finite(job: Merge, piece: Piece) -> None:
    """Bits would hide it."""
    if not (torch.isfinite(piece.experts).all() and torch.isfinite(piece.base).all()):  # type: ignore[arg-type]
        raise MergeError(not_finite(piece, tuple(job.inputs.experts), job.specs[piece.name]))


def _own(job: Merge) -> dict[str, torch.Tensor]:
    """What the method does not pack, as each expert has it, (T, *shape), where any differs from the base."""
    inputs, found = job.inputs, {}
    assert inputs.base is not None, "a compression needs a base"
    for name, spec in inputs.specs.items():
        if inputs.is_weight(name) or 0 in spec.shape:
            continue
        experts = [tensors[name] for tensors in inputs.experts.values()]
        if any(not torch.equal(expert, inputs.base[name]) for expert in experts):
            found[f"{name}/{OWN}"] = torch.stack(experts)
    return found


class Expert(Mapping[str, torch.Tensor]):
    """One expert's tensors by name, each restored when it is asked for, into memory of its own."""

    def __init__(self, packed: Packed, base: Tensors, roles: Roles, name: str) -> None:
        """Nothing is read yet.

        Raises:
            ValueError: No expert of that name was packed.
        """
        self._packed, self._index = packed, position(name, packed.experts)
        self._inputs = Inputs(base, {}, roles, seed=packed.seed, dtype=packed.dtype)
        self.specs: dict[str, Spec] = recast(self._inputs.specs, packed.dtype)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tuple(spec.shape) for name, spec in self.specs.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Name -> dtype."""
        return {name: spec.dtype for name, spec in self.specs.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        """Restore one tensor.

        Raises:
            KeyError: There is no tensor of that name.
        """
        dtype, parts = self.specs[name].dtype, self._parts(name)
        if not parts:
            return self._inputs.base[name].to(dtype, copy=True)  # type: ignore[index]
        if OWN in parts:
            return parts[OWN][self._index].to(dtype, copy=True)
        with torch.no_grad():
            return self._restored(name, parts, self._index).to(dtype)

    def with_part(self, name: str, part: str, own: torch.Tensor) -> torch.Tensor:
        """The tensor in float32 if one of its parts were another, as a function of that part that has a gradient."""
        parts = {key: tensor[self._index][None] for key, tensor in self._parts(name).items()}
        return self._restored(name, {**parts, part: own[None]}, 0)

    def _parts(self, name: str) -> dict[str, torch.Tensor]:
        return {part: self._packed.tensors[f"{name}/{part}"] for part in self._packed.parts.get(name, ())}

    def _restored(self, name: str, parts: Tensors, index: int) -> torch.Tensor:
        packed, base = self._packed, self._inputs.base[name]  # type: ignore[index]
        draw = drawer(packed.seed, name, packed.experts, tuple(base.shape), 0, base.device)
        piece = Piece(name, base.float(), base[None], draw, place=self._inputs.place(name))
        return restored(packed.row, packed.params, piece, parts, index)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


class Restored(nn.Module):
    """One module that becomes any of the packed experts; with it memory is one model's, however many there are."""

    def __init__(self, packed: Packed, pool: Pool) -> None:
        """Keep what was packed and the pool of its base."""
        super().__init__()
        self.packed, self._pool = packed, pool
        self.current: str | None = None
        self.module = nn.Module()  # of `current`

    def of(self, expert: str) -> nn.Module:
        """The module with an expert's weights; it has them until another expert is asked for.

        Raises:
            ValueError: No expert of that name was packed.
        """
        if expert == self.current:
            return self.module
        assert self._pool.base is not None, "a compression needs a base"
        tensors = Expert(self.packed, self._pool.base, self._pool.roles, expert)
        if self.current is None or not _filled(self.module, tensors):
            self.module = self._pool.module(tensors).eval()
        if expert in getattr(self._pool, "heads", {}):  # a classifier's, which is of its task and not packed
            self.module = self._pool.with_head(self.module, expert)  # type: ignore[attr-defined]
        self.current = expert
        return self.module


@torch.no_grad()
def _filled(module: nn.Module, tensors: Expert) -> bool:
    """Put weights into a module that has them by the same names; whether it does."""
    own = module.state_dict()
    if any(name not in own or own[name].shape != shape for name, shape in tensors.shapes.items()):
        return False
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return True


def by_task(module: nn.Module, tasks: Iterable[str]) -> Callable[[str], nn.Module]:
    """The module that a task is scored with: of compressed experts the one of its name, else always the same.

    Raises:
        UserError: Some tasks have no expert.
    """
    if not isinstance(module, Restored):
        return getattr(module, "of", lambda task: module)  # a build may be another for each task
    refuse_strangers(module.packed.row, module.packed.experts, tasks)
    return module.of


def refuse_strangers(row: Row, experts: Iterable[str], tasks: Iterable[str]) -> None:
    """Every task is scored with the expert of its name.

    Raises:
        UserError: Some tasks have no expert.
    """
    known = list(experts)
    lacking = [task for task in tasks if task not in known]
    if lacking:
        raise UserError(
            f"{row.name} keeps each expert apart, and a task is scored with the one of its name: there is none for "
            f"{', '.join(lacking)}; experts are {', '.join(known)}: leave these tasks out with tasks=..., add the "
            "experts, or score one expert on all tasks with method.expert=NAME"
        )
