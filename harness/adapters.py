"""LoRA experts merged into one adapter (output_kind=adapter)."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from harness.crew import ALONE, Crew
from harness.factors import Found, checked, module_paths
from harness.inputs import MergeError, Tensors
from harness.job import Merge, Tick
from harness.merge import merge_into, ready
from methods.kinds import Base, Row
from methods.low_rank import LowRank, approximate, concatenate, squared_norm, truncate
from pools.adapter_files import write_adapter
from pools.adapters import LoraExpert
from pools.lora import Change
from pools.picked import Picked
from pools.reading import read_into

# Rules that are linear in the experts: a merge of adapters is then the same sum of their factors, and exact.
_LINEAR = frozenset({"expert", "passthrough", "simple_average", "task_arithmetic", "weighted_average"})
_SHOWN = 6


def merge_adapters(
    job: Merge,
    output: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    lineage: Mapping[str, Any] | None = None,
    crew: Crew = ALONE,
    tick: Tick = lambda phase, n: None,
) -> dict[str, Any]:
    """Merge LoRA experts into one adapter of the same base.

    A method that is linear in the experts is applied to their factors, exactly, or cut down to a rank; any other is
    applied to the weights, and each matrix's change is cut down to a rank.

    Args:
        job: The merge, as the engine takes it; all experts are adapters.
        output: The adapter's directory; must not exist yet, or be empty.
        rank: Most ranks of a module; None keeps all, the sum of the experts' ranks.
        energy: Instead of a rank: the share of each matrix's squared norm to keep, in (0, 1].
        lineage: For the card: `method`, `params` and what else is known.
        crew: Workers of the engine, where the weights are needed.
        tick: Told of the bytes that the engine reads.

    Returns:
        Facts: `modules`, `rank_min`, `rank_max`, `parameters`, `relative_error` of the cut over all and
        `relative_errors` by tensor, `whole_tensors`, `files`.

    Raises:
        MergeError: An expert is no adapter, the method's result is none, or rank or energy is out of range.
        CheckpointError: The adapter cannot be written.
    """
    checked(rank, energy)
    job = ready(replace(job, inputs=replace(job.inputs, dtype=torch.float32)))
    adapters = _adapters(job.inputs.experts)
    whole, low = _sorted_out(adapters, job)
    found = Found()
    coefficients = {name: None if job.veneers else _coefficients(job.row, job.of(name), len(adapters)) for name in low}
    on_factors = {name for name in low if coefficients[name] and not _has_norms(adapters, name)}
    on_weights = [name for name in low if name not in on_factors]
    if on_weights and rank is None and energy is None:
        raise MergeError(_why_a_rank(job, adapters, on_weights))
    for name in tqdm([name for name in low if name in on_factors], desc="merging factors", unit="matrix", disable=None):
        path, kind = _agreed(name, adapters)
        made = _combined(name, adapters, coefficients[name] or [], rank, energy)
        found.add(name, path, kind, job.specs[name].shape, made)
    if on_weights or whole:
        kinds = {name: _agreed(name, adapters) for name in on_weights}
        merge_into(_Weights(job, kinds, whole, rank, energy, found), job, crew, tick)
    files = _write(output, found, job, list(adapters.values()), lineage or {})
    return found.facts() | {"files": files}


class _Weights:
    """A sink that makes factors of each merged matrix when all of it has come, and keeps whole tensors."""

    def __init__(
        self,
        job: Merge,
        kinds: Mapping[str, tuple[str, str]],
        whole: Iterable[str],
        rank: int | None,
        energy: float | None,
        found: Found,
    ) -> None:
        self._job, self._kinds, self._whole = job, dict(kinds), set(whole)
        self._rank, self._energy, self._found = rank, energy, found
        self._coming: dict[str, torch.Tensor] = {}
        self._left: dict[str, int] = {}
        self._lock = threading.Lock()

    def in_order(self) -> Sequence[str]:
        """Matrices and whole tensors."""
        return [*self._kinds, *sorted(self._whole)]

    def put_part(self, name: str, start: int, part: torch.Tensor) -> None:
        """Copy a part into its place; the last one sets off the work."""
        shape = self._job.specs[name].shape
        with self._lock:
            if name not in self._coming:
                self._coming[name] = torch.empty(math.prod(shape), dtype=part.dtype)
                self._left[name] = math.prod(shape)
        self._coming[name][start : start + len(part)] = part
        with self._lock:
            self._left[name] -= len(part)
            if self._left[name]:
                return
            tensor = self._coming.pop(name)
        self._complete(name, tensor.view(shape))

    def _complete(self, name: str, merged: torch.Tensor) -> None:
        base = self._job.inputs.base
        assert base is not None
        if name in self._whole:
            self._found.whole[name] = merged.to(self._job.inputs.specs[name].dtype)
            return
        path, kind = self._kinds[name]
        before = torch.empty(merged.numel())
        read_into(base, name, 0, before)
        delta = merged.flatten(1) - before.view(len(merged), -1)
        self._found.add(name, path, kind, tuple(merged.shape), approximate(delta, self._rank, self._energy))


def _adapters(experts: Mapping[str, Tensors]) -> dict[str, LoraExpert]:
    """The experts as adapters; some of an adapter's tensors (a view by patterns) are as good.

    Raises:
        MergeError: Some are none.
    """
    found, others = {}, []
    for name, expert in experts.items():
        sources = {id(tensors): tensors for tensors, _ in expert.parts.values()} if isinstance(expert, Picked) else {}
        inner = next(iter(sources.values())) if len(sources) == 1 else expert
        if isinstance(inner, LoraExpert) and all(
            inside == outside for outside, (_, inside) in getattr(expert, "parts", {}).items()
        ):
            found[name] = inner
        else:
            others.append(name)
    if others or not found:
        raise MergeError(
            f"output_kind=adapter merges adapters, and {', '.join(others) or 'no expert'} is none: leave it out with "
            "experts=[...], make an adapter of them with `crucible extract-lora`, or set output_kind=model"
        )
    return found


def _sorted_out(adapters: Mapping[str, LoraExpert], job: Merge) -> tuple[list[str], list[str]]:
    """Names of tensors that are written whole, and of those that are written as factors.

    Raises:
        MergeError: A bias changes whose weight is changed by factors, in a way that the file's layout cannot hold.
    """
    changes = [
        (name, change) for adapter in adapters.values() for name, change in adapter.changes.items() if name in job.specs
    ]
    replacing = {name for name, change in changes if change.whole or change.bias}
    low = {name for name, change in changes if change.factors} - replacing
    adapted = {name.rpartition(".")[0] for name in low}
    whole = set()
    for name in replacing:
        path = name.rpartition(".")[0]
        whole |= {name} if path in adapted else {other for other in job.specs if other.rpartition(".")[0] == path}
    faults = [name for name in whole if name.rpartition(".")[0] in adapted and name.rpartition(".")[2] != "bias"]
    if faults:
        raise MergeError(
            f"{', '.join(sorted(faults)[:_SHOWN])}: replaced beside a weight with factors; set output_kind=model"
        )
    return sorted(whole), sorted(low)


def _coefficients(row: Row, params: Any, n: int) -> list[float] | None:
    """What a linear rule multiplies each expert's change by, read off the rule itself; None for other rules.

    Raises:
        MergeError: The rule changes the base's own part, so that its result is no change by adapters.
    """
    if row.name not in _LINEAR:
        return None
    rule, base = row.load(), row.base is not Base.unused
    kept = float(rule(torch.ones(1) if base else None, torch.ones(n, 1), params))
    if abs(kept - 1) > 1e-6:
        raise MergeError(
            f"{row.name} with these parameters multiplies the base by {kept:.6g}, which no adapter can hold; choose "
            "ones that keep it (weights that sum to 1, normalize=true, scale=1), or set output_kind=model"
        )
    return rule(torch.zeros(n) if base else None, torch.eye(n), params).tolist()


def _has_norms(adapters: Mapping[str, LoraExpert], name: str) -> bool:
    """Whether one of them is a DoRA adapter here, whose change is of full rank."""
    changes = [adapter.changes[name].factors for adapter in adapters.values() if name in adapter.changes]
    return any(factors is not None and factors.magnitude for factors in changes)


def _why_a_rank(job: Merge, adapters: Mapping[str, LoraExpert], names: list[str]) -> str:
    if job.row.name in _LINEAR and not job.veneers:
        return f"{names[0]} is changed by DoRA, whose change has full rank: set adapter.rank or adapter.energy"
    ranks = ", ".join(str(adapter.config["r"]) for adapter in adapters.values())
    method = "+".join([job.row.name, *(worn.veneer.name for worn in job.veneers)])
    return (
        f"{method} is not linear in its experts, so that its result has full rank: set adapter.rank (the experts' "
        f"are {ranks}) or adapter.energy"
    )


def _agreed(name: str, adapters: Mapping[str, LoraExpert]) -> tuple[str, str]:
    """What the adapters call the module, and how they see its weight.

    Raises:
        MergeError: They differ.
    """
    changes: dict[str, Change] = {
        expert: adapter.changes[name] for expert, adapter in adapters.items() if name in adapter.changes
    }
    views = {(change.module, change.factors.kind) for change in changes.values() if change.factors}
    if len(views) > 1:
        told = ", ".join(f"{expert} as {change.module}" for expert, change in changes.items())
        raise MergeError(f"{name} is changed by modules of different names or kinds: {told}; set output_kind=model")
    return views.pop()


def _combined(
    name: str, adapters: Mapping[str, LoraExpert], coefficients: Sequence[float], rank: int | None, energy: float | None
) -> LowRank:
    """The weighted sum of the adapters' changes of one weight, as factors."""
    parts = []
    for adapter, coefficient in zip(adapters.values(), coefficients, strict=True):
        if name in adapter.changes:
            left, right, scale = adapter.factors(name)
            parts.append((left, right, coefficient * scale))
    left, right = concatenate(parts)
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise MergeError(f"{name} has NaN or infinite factors in {' or '.join(adapters)}; a merge would spread them")
    if rank is not None or energy is not None:
        return truncate(left, right, rank, energy)
    return LowRank(left, right, squared_norm(left, right), 0.0)


def _write(
    output: Path, found: Found, job: Merge, adapters: Sequence[LoraExpert], lineage: Mapping[str, Any]
) -> list[str]:
    """Write what was made; the adapters' own word for their base is kept where they agree."""
    called = {str(adapter.config.get("base_model_name_or_path") or "") for adapter in adapters}
    base = called.pop() if len(called) == 1 else ""
    tasks = {adapter.config.get("task_type") for adapter in adapters}
    members = {
        name: (adapter.source, adapter.adapter_fingerprint)
        for name, adapter in zip(job.inputs.experts, adapters, strict=True)
    }
    renamed = {change.module for adapter in adapters for change in adapter.changes.values()}
    return write_adapter(
        Path(output),
        found.modules.values(),
        found.whole,
        renamed | module_paths(job.inputs.specs),
        base=base or str(getattr(adapters[0].base, "source", "")),
        task_type=tasks.pop() if len(tasks) == 1 else None,
        lineage={"members": members, "relative_error": found.facts()["relative_error"], **lineage},
    )
