"""A search from pool and data to merged tensors: stacks the task vectors, has them learnt, hands on what came out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from harness.bench import Bench
from harness.checkpoint import Saved, refuse
from harness.config import AdaptationSettings
from harness.inputs import Inputs, Tensors
from harness.job import Merge
from harness.losses import Shells
from harness.merge import merge
from harness.pieces import CHUNK
from methods.catalogue import find
from methods.kinds import Row, Stack
from pools.checkpoint import Checkpoint
from pools.reading import read_into

HELD_BYTES = 2 << 30  # of task vectors that `auto` holds in memory


def stacked(inputs: Inputs, shells: Shells, device: torch.device, where: str = "auto") -> Stack:
    """The base's tensors, which share the module's memory, and all task vectors.

    Args:
        inputs: Base and experts.
        shells: The modules.
        device: Where the weights are.
        where: The vectors are held in `memory`, or read from the experts' `files` at each step, a chunk at a time.
            `auto`: in memory, but what is over `HELD_BYTES` on a CPU and lies in files as it is.
    """
    base = shells.base()
    experts = inputs.experts.values()
    if where == "auto":
        large = 4 * len(experts) * sum(tensor.numel() for tensor in base.values()) > HELD_BYTES
        plain = all(isinstance(tensors, Checkpoint) for tensors in experts)  # of others reading is computing
        where = "files" if large and plain and device.type == "cpu" else "memory"
    read = FromFiles(base, inputs)
    return read if where == "files" else Stack(base, read.deltas, read.places, inputs.seed)


class FromFiles(Stack):
    """Task vectors that are read from the experts whenever they are asked for, a chunk at a time.

    What asks for `deltas` has them all read into memory, and works with these from then on.
    """

    def __init__(self, base: dict[str, torch.Tensor], inputs: Inputs) -> None:
        places = {name: inputs.place(name) for name in base}
        self.__dict__.update(base=base, places=places, seed=inputs.seed, _inputs=inputs)  # it is frozen

    @functools.cached_property
    def deltas(self) -> dict[str, torch.Tensor]:
        """All of them, (T, *shape); experts are read one at a time."""
        deltas = {name: tensor.new_empty(self.n_experts, *tensor.shape) for name, tensor in self.base.items()}
        for index, tensors in enumerate(self._experts):
            for name, tensor in self.base.items():
                torch.sub(tensors[name].to(tensor.device, torch.float32), tensor, out=deltas[name][index])
        return deltas

    @property
    def n_experts(self) -> int:
        """How many task vectors there are."""
        return len(self._experts)

    def change(self, name: str, coefficients: torch.Tensor) -> torch.Tensor:
        """As `Stack` says."""
        if "deltas" in self.__dict__:
            return super().change(name, coefficients)
        found = self.base[name].new_empty(self.base[name].shape)
        for rows, part in zip(self._chunks(name), found.view(-1).split(CHUNK), strict=True):
            torch.mv(rows.T, coefficients, out=part)
        return found

    def products(self, name: str, slope: torch.Tensor) -> torch.Tensor:
        """As `Stack` says."""
        if "deltas" in self.__dict__:
            return super().products(name, slope)
        parts = slope.reshape(-1).split(CHUNK)
        return sum(rows @ part for rows, part in zip(self._chunks(name), parts, strict=True))

    def expert(self, name: str, index: int) -> torch.Tensor:
        """As `Stack` says."""
        if "deltas" in self.__dict__:
            return super().expert(name, index)
        return self._experts[index][name].to(self.device, torch.float32)

    @functools.cached_property
    def _experts(self) -> list[Tensors]:
        inputs: Inputs = self.__dict__["_inputs"]
        return list(inputs.experts.values())

    @functools.cached_property
    def _buffer(self) -> torch.Tensor:
        """A chunk of every expert, read into again and again."""
        return torch.empty(self.n_experts * min(CHUNK, max(tensor.numel() for tensor in self.base.values())))

    def _chunks(self, name: str) -> Iterator[torch.Tensor]:
        """Task vectors, (T, n), each valid until the next is taken."""
        for index, part in enumerate(self.base[name].reshape(-1).split(CHUNK)):
            rows = self._buffer[: self.n_experts * len(part)].view(self.n_experts, -1)
            for row, tensors in zip(rows, self._experts, strict=True):
                read_into(tensors, name, index * CHUNK, row)
            yield rows.to(part.device).sub_(part)


def weights_of(inputs: Inputs) -> list[str]:
    """The tensors that are merged by the method, and not as buffers."""
    return [name for name in inputs.specs if inputs.is_weight(name)]


def done(row: Row, params: Any, inputs: Inputs, weight: Callable[[str], torch.Tensor]) -> Merge:
    """What was learnt as a merge of one member that has nothing left to do; buffers go the engine's way."""
    rest = [name for name in inputs.specs if not inputs.is_weight(name)]
    with torch.no_grad():
        member = {name: weight(name).cpu() for name in weights_of(inputs)}
    if rest:
        plain = find("simple_average")
        member |= merge(Merge(plain, plain.load_params()(), _only(inputs, rest)))
    member = {name: member[name] for name in inputs.specs}
    own = replace(find("expert"), name=row.name, params=row.params, members="")
    return Merge(own, params, replace(inputs, experts={"merged": member}))


def _only(inputs: Inputs, names: list[str]) -> Inputs:
    """The inputs of some tensors."""
    base = None if inputs.base is None else {name: inputs.base[name] for name in names}
    experts = {expert: {name: tensors[name] for name in names} for expert, tensors in inputs.experts.items()}
    return replace(inputs, base=base, experts=experts)


def saved(settings: AdaptationSettings, row: Row, params: Any, bench: Bench, fabric: Fabric, seed: int) -> Saved | None:
    """Where learning is saved, and all that its result depends on.

    Raises:
        UserError: What is there is of another run, broken, or not to be gone on with.
    """
    if settings.checkpoint is None:
        return None
    pool = bench.pool
    members: Mapping[str, Any] = {"base": pool.base, **pool.experts}
    own = {name: task for name, task in bench.tasks.items() if row.all_tasks or name in pool.experts}
    facts = {
        "method": row.name,
        "params": asdict(params),
        "seed": seed,
        "precision": fabric.strategy.precision.precision,
        "adaptation": {
            "split": settings.split,
            "examples": settings.examples,
            "batch_size": settings.batch_size,
            "task_vectors": settings.task_vectors,
        },
        "pool": pool.context_fingerprint,
        "experts": list(pool.experts),  # in order
        "members": {name: member.fingerprint for name, member in members.items() if member is not None},
        "tasks": {name: [task.fingerprint(settings.split), task.labels, task.templates] for name, task in own.items()},
    }
    found = Saved(Path(settings.checkpoint), settings.checkpoint_every, settings.resume, facts)
    refuse(found)
    return found
