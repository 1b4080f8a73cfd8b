"""The engine: applies a method to base and experts, piece by piece, in bounded memory, by any number of workers.

It asks the catalogue row what the method needs and never for its name. Arithmetic runs in float32; what comes out has
the base's dtype, or a chosen one. Integer buffers come from the base, floating buffers are averaged over the experts.
The same bits come out for any number of workers and processes on one kind of device.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch

from harness.crew import ALONE, Crew
from harness.inputs import Inputs, MergeError, Tensors, check
from harness.pieces import Job, cut, own_stream, pieces
from harness.stacking import restacked
from harness.veneers import Dress, Worn, dresser, faults, undressed, veneered
from methods.catalogue import VENEERS, find
from methods.kinds import Base, Kind, Piece, Pieces, Place, Roles, Row, Veneer, resolve
from methods.matrices import RankError
from methods.packing import position
from methods.primitives import average
from methods.similarity import cosine_similarities
from pools.faults import Spec, recast, specs_of
from pools.headers import CheckpointError
from pools.roles import NamedRoles

Tick = Callable[[str, int], None]  # (phase, bytes read)
_ANYWHERE = Place(1, 1, linear=True)


class Sink(Protocol):
    """Where merged tensors go, in any order and from several threads."""

    def in_order(self) -> Sequence[str]:
        """The names that are wanted, in the order in which they are best made."""
        ...

    def put_part(self, name: str, start: int, part: torch.Tensor) -> None:
        """Take elements [start, start + len(part)) of a tensor, 1-D on the CPU, in the dtype it will have."""
        ...


class Memory:
    """A sink that keeps the merged tensors."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        self.tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}

    def in_order(self) -> Sequence[str]:
        """All names."""
        return list(self.tensors)

    def put_part(self, name: str, start: int, part: torch.Tensor) -> None:
        """Copy a part into its place."""
        self.tensors[name].view(-1)[start : start + len(part)] = part


@dataclass(frozen=True)
class Merge:
    """A merge that is ready to be done."""

    row: Row
    params: Any
    inputs: Inputs
    params_of: Callable[[str], Any] | None = None  # for each tensor's name, where parameters differ
    veneers: tuple[Worn, ...] = ()  # around the rule, the first innermost
    dress: Dress = undressed  # what the veneers make of a piece; known once they have looked at the model

    @functools.cached_property
    def specs(self) -> dict[str, Spec]:
        """Names, shapes and dtypes of what comes out."""
        return recast(self.inputs.specs, self.inputs.dtype)

    def of(self, name: str) -> Any:
        """The parameters for a tensor."""
        return self.params_of(name) if self.params_of else self.params

    @functools.cached_property
    def width(self) -> dict[str, int]:
        """Bytes that are read for one element of each tensor."""
        members = [specs_of(tensors) for tensors in self.inputs.experts.values()]
        if self.inputs.base is not None and self.row.base is not Base.unused:
            members.append(specs_of(self.inputs.base))
        return {name: sum(member[name].dtype.itemsize for member in members) for name in self.inputs.specs}


@dataclass(frozen=True)
class Done:
    """What a merge, or a part of it, came to."""

    bytes_read: int = 0
    bytes_written: int = 0
    error: float = 0.0  # sum of squared differences that rounding to the output's dtype has made
    square: float = 0.0  # sum of squares of the merged weights
    seconds: Mapping[str, float] | None = None  # by phase: prepare, merge

    @property
    def rounding_error(self) -> float:
        """What rounding changed, relative to the merged weights: ||rounded - merged|| / ||merged||."""
        return math.sqrt(self.error / self.square) if self.square else 0.0

    def summary(self) -> list[tuple[str, str]]:
        """The figures in words."""
        seconds = sum((self.seconds or {}).values())
        rate = (self.bytes_read + self.bytes_written) / max(seconds, 1e-9)
        phases = ", ".join(f"{phase} {value:.2f} s" for phase, value in (self.seconds or {}).items())
        return [
            ("read", sized(self.bytes_read)),
            ("written", sized(self.bytes_written)),
            ("time", phases),
            ("rate", f"{sized(rate)}/s"),
            ("rounding error", f"{self.rounding_error:.2e}, relative"),
        ]


def sized(nbytes: float) -> str:
    """Bytes in a handy unit.

    >>> sized(2_200_000_000), sized(512)
    ('2.05 GiB', '512 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} TiB"


def merge_state_dicts(
    base: Tensors | None,
    experts: Mapping[str, Tensors],
    method: str,
    params: Mapping[str, Any] | None = None,
    stats: Mapping[str, Tensors] | None = None,
    seed: int = 0,
    roles: Roles | None = None,
    veneers: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, torch.Tensor]:
    """Merge state dicts in memory: the same engine, checks and errors as a run.

    Args:
        base: The base's tensors by name, or None for methods that do without.
        experts: Name -> tensors by name; the order counts where the method says so.
        method: A name of the catalogue, of the kinds rule, informed, fold or compression.
        params: Parameters by name; what is left out has its default. A compression restores the one `expert` named.
        stats: For informed rules, expert -> tensor name (or its module's) -> Fisher diagonal (*shape) or
            Gram matrix (in, in).
        seed: Of random methods; masks depend on it, the tensor's name and the expert's name alone.
        roles: What names mean; by default read off the names.
        veneers: What goes around the rule, name -> parameters by name, the first innermost.

    Returns:
        The merged tensors, with the base's (or the first expert's) names, shapes and dtypes.

    Raises:
        KeyError: No method has that name.
        TypeError: A parameter is unknown.
        ValueError: A parameter, the number of experts or a tensor is refused; the message names it.

    >>> one = {"w": torch.tensor([1.0, 2.0])}
    >>> merge_state_dicts(None, {"a": one, "b": {"w": torch.tensor([3.0, 4.0])}}, "simple_average")
    {'w': tensor([2., 3.])}
    """
    row = find(method)
    made = _make_params(row, params or {})
    if row.learns and made.steps:
        raise MergeError(f"{row.name} with steps={made.steps} is fed data: run `crucible run method={row.name}`")
    around = _veneers(row, veneers or {})
    if row.ranges:
        base, experts = None, restacked(row, made, experts)
    if roles is None:
        roles = NamedRoles(specs_of(base if base is not None else next(iter(experts.values()), {})))
    return merge(Merge(row, made, Inputs(base, experts, roles, stats, seed), veneers=around))


def merge(job: Merge, crew: Crew = ALONE, tick: Tick = lambda phase, n: None) -> dict[str, torch.Tensor]:
    """Merge in memory; all checks that need no weights come before any is read."""
    job = ready(job)
    sink = Memory(job.specs)
    merge_into(sink, job, crew, tick)
    return sink.tensors


def ready(job: Merge) -> Merge:
    """The same merge, checked, with only the experts that the method reads.

    Raises:
        MergeError: All that is wrong, a line each; no weight was read.
    """
    row = veneered(job.row, job.veneers)
    job = replace(job, row=row, inputs=_selected(row, job.params, job.inputs))
    check(job.row, job.inputs)
    if job.row.kind is not Kind.fold:
        _rehearse(job)
    return job


@torch.no_grad()
def merge_into(
    sink: Sink,
    job: Merge,
    crew: Crew = ALONE,
    tick: Tick = lambda phase, n: None,
    share: tuple[int, int] = (0, 1),
) -> Done:
    """Merge what the sink wants.

    Args:
        sink: Takes the merged parts.
        job: What `ready` has passed.
        crew: Workers.
        tick: Told of the bytes that were read, by phase.
        share: This process's rank and how many there are: each merges its part of the bytes.

    Raises:
        MergeError: Weights are NaN or infinite, or the rule fails on a tensor.
    """
    started = time.perf_counter()
    if job.row.kind is Kind.compression and job.params.expert is None:
        named = ", ".join(job.inputs.experts)
        raise MergeError(f"{job.row.name} makes no single model: expert=NAME says which is restored; there are {named}")
    if job.row.kind is Kind.fold:
        return _fold(sink, job, tick) if share[0] == 0 else Done()
    job = replace(job, dress=dresser(job.veneers, functools.partial(_walk, job, crew, tick)))
    numbers = look_ahead(job, crew, tick)
    prepared = time.perf_counter()
    whole = not job.row.elementwise or bool(job.row.stats) or _per_tensor(job)
    wanted = [name for name in sink.in_order() if name in job.specs]
    tasks = _own(list(cut(wanted, job.inputs, whole)), *share)
    parts = []
    with closing(crew.map(functools.partial(_work, job, numbers, sink), tasks)) as results:
        for task, part in zip(tasks, results, strict=True):
            parts.append(part)
            tick("merge", (task.stop - task.start) * job.width[task.name])
    return Done(
        sum(part.bytes_read for part in parts),
        sum(part.bytes_written for part in parts),
        math.fsum(part.error for part in parts),
        math.fsum(part.square for part in parts),
        {"prepare": prepared - started, "merge": time.perf_counter() - prepared},
    )


def task_vector_cosines(inputs: Inputs, crew: Crew = ALONE) -> torch.Tensor:
    """Cosine similarity of each pair of task vectors over all weights, (T, T) float64."""
    job = Merge(find("task_arithmetic"), None, inputs)
    return cosine_similarities(functools.partial(_walk, job, crew, lambda phase, n: None))


def _veneers(row: Row, given: Mapping[str, Mapping[str, Any]]) -> tuple[Worn, ...]:
    """Veneers from names and keywords."""
    wrong = faults(row, list(given))
    if wrong:
        raise ValueError("\n".join(wrong))
    return tuple(Worn(VENEERS[name], _make_params(VENEERS[name], own)) for name, own in given.items())


def _make_params(row: Row | Veneer, given: Mapping[str, Any]) -> Any:
    """The params dataclass from keywords; unknown ones are named with those that are known."""
    cls = row.load_params()
    known = [field.name for field in fields(cls)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"{row.name} has no parameter {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    return cls(**given)


def _selected(row: Row, params: Any, inputs: Inputs) -> Inputs:
    """Only the experts that the method reads, in their order; statistics in the same order."""
    names = tuple(inputs.experts)
    if row.members:
        try:
            names = resolve(row.members)(params, names)
        except ValueError as error:
            raise MergeError(str(error)) from error
    stats = inputs.stats
    if stats is not None and set(stats) == set(inputs.experts):
        stats = {name: stats[name] for name in names}
    return replace(inputs, experts={name: inputs.experts[name] for name in names}, stats=stats)


# -- numbers before the merge ------------------------------------------------------------------------------------------


def _per_tensor(job: Merge) -> bool:
    """Whether the prepare pass is over each tensor on its own."""
    return bool(job.row.prepare) and (job.row.per_tensor or getattr(job.params, "scope", "model") == "tensor")


def look_ahead(job: Merge, crew: Crew, tick: Tick) -> torch.Tensor | None:
    """The numbers over the whole model that the rule is given."""
    if not job.row.prepare or _per_tensor(job) or not any(map(job.inputs.is_weight, job.inputs.specs)):
        return None
    walk, held = functools.partial(_walk, job, crew, tick), job.inputs.held
    prepare = resolve(job.row.prepare)
    if held is None:
        return prepare(walk, job.params)
    kept = held.made(job.row, lambda: resolve(job.row.kept)(walk))
    extras = {"kept": kept} if job.row.kept else {}
    return held.numbers(job.row, job.params, job.inputs.seed, lambda: prepare(walk, job.params, **extras), job.veneers)


def _walk(
    job: Merge, crew: Crew, tick: Tick, function: Callable[[Piece], Any], limit: int | None = None
) -> Iterator[Any]:
    """`methods.kinds.Pieces` over the whole model."""
    names = filter(job.inputs.is_weight, job.inputs.specs)
    whole = not job.row.elementwise or bool(job.row.stats)
    tasks = list(cut(names, job.inputs, whole))

    def work(task: Job) -> list[Any]:
        with own_stream(job.inputs.device), torch.no_grad():
            return [function(job.dress(piece)[0]) for piece in pieces(job.row, job.inputs, task, limit)]

    for task, found in zip(tasks, crew.map(work, tasks), strict=True):
        tick("prepare", min(task.stop - task.start, limit or task.stop) * job.width[task.name])
        yield from found


def _numbers_of(job: Merge, task: Job, params: Any) -> torch.Tensor | None:
    """The numbers over one tensor that the rule is given."""

    def walk(function: Callable[[Piece], Any], limit: int | None = None) -> Iterator[Any]:
        return (function(job.dress(piece)[0]) for piece in pieces(job.row, job.inputs, task, limit))

    return resolve(job.row.prepare)(walk, params)


# -- the merge ---------------------------------------------------------------------------------------------------------


def _own(tasks: list[Job], rank: int, n: int) -> list[Job]:
    """A rank's share of the tasks: a run of them with its part of the elements."""
    if n == 1:
        return tasks
    total = sum(task.stop - task.start for task in tasks)
    own, before = [], 0
    for task in tasks:
        if min(before * n // max(total, 1), n - 1) == rank:
            own.append(task)
        before += task.stop - task.start
    return own


def _work(job: Merge, numbers: torch.Tensor | None, sink: Sink, task: Job) -> Done:
    """Merge one job's elements and put them where they belong."""
    name, spec = task.name, job.specs[task.name]
    read = (task.stop - task.start) * job.width[name]
    if not job.inputs.is_weight(name):
        flat = _buffer_of(name, job).reshape(-1)[task.start : task.stop]
        sink.put_part(name, task.start, flat)
        return Done(read, flat.nbytes)
    try:
        with own_stream(job.inputs.device), torch.no_grad():
            params = job.of(name)
            if _per_tensor(job):
                numbers = _numbers_of(job, task, params)
            start, found = task.start, []
            for piece in pieces(job.row, job.inputs, task):
                seen, finish = job.dress(piece)
                result = finish(_call(job, params, seen, numbers)).reshape(-1)
                rounded, error, square = _rounded(result, job, piece, spec)
                sink.put_part(name, start, rounded)
                start += len(rounded)
                found.append(Done(0, rounded.nbytes, error, square))
    except (RuntimeError, ValueError) as error:
        if isinstance(error, MergeError | CheckpointError):
            raise
        raise MergeError(f"{job.row.name} failed on {name} {spec.shape}: {error}") from error
    return Done(
        read,
        sum(part.bytes_written for part in found),
        math.fsum(part.error for part in found),
        math.fsum(part.square for part in found),
    )


def _rounded(result: torch.Tensor, job: Merge, piece: Piece, spec: Spec) -> tuple[torch.Tensor, float, float]:
    """A merged piece in the output's dtype on the CPU, the squared rounding error, and the sum of squares."""
    result = result.float()
    square = _squares(result)
    if not math.isfinite(square):
        raise MergeError(not_finite(piece, tuple(job.inputs.experts), spec))
    if spec.dtype is torch.float32:
        return result.cpu(), 0.0, square
    rounded = result.to(spec.dtype)
    lost = rounded.float().sub_(result)
    error = _squares(lost)
    if not math.isfinite(error):
        raise MergeError(not_finite(piece, tuple(job.inputs.experts), spec))
    return rounded.cpu(), error, square


def _squares(values: torch.Tensor) -> float:
    """Sum of squares, (n,) float32; NaN or infinite if and only if a value is."""
    found = float(torch.dot(values, values))
    return found if math.isfinite(found) else float(values.double().square().sum())


def not_finite(piece: Piece, names: tuple[str, ...], spec: Spec) -> str:
    """Whose weights are NaN or infinite, or that the merged ones are beyond their range."""
    tensors = zip(names, piece.experts, strict=True)
    whose = [f"expert {expert}" for expert, tensor in tensors if not torch.isfinite(tensor).all()]
    if piece.base is not None and not torch.isfinite(piece.base).all():
        whose.insert(0, "the base")
    if whose:
        return f"{piece.name} has NaN or infinite weights in {', '.join(whose)}; a merge would spread them"
    return f"{piece.name} {tuple(spec.shape)} came out beyond the range of {spec.dtype}; a smaller scale may help"


def _call(job: Merge, params: Any, piece: Piece, numbers: torch.Tensor | None) -> torch.Tensor:
    """The rule on one piece, with the extras that its row asks for; of a compression, the expert that is asked for."""
    made = job.row.load()(piece.base, piece.experts, params, **extras_of(job.row, piece, numbers))
    if job.row.kind is not Kind.compression:
        return made
    return restored(job.row, params, piece, made, _index(job) or 0)


def _index(job: Merge) -> int | None:
    """Where the one expert stands that a compression restores; None where none is asked for.

    Raises:
        ValueError: There is no such expert.
    """
    one = job.params.expert if job.row.kind is Kind.compression else None
    return None if one is None else position(one, tuple(job.inputs.experts))


def restored(row: Row, params: Any, piece: Piece, parts: Tensors, index: int) -> torch.Tensor:
    """One expert's tensor from the base's and what a compression has stored, (*shape) float32."""
    extras = {name: value for name, value in extras_of(row, piece, None).items() if name != "numbers"}
    return resolve(row.restore)(piece.base, parts, index, params, **extras)


def extras_of(row: Row, piece: Piece, numbers: torch.Tensor | None) -> dict[str, Any]:
    """What a row asks for besides base, experts and parameters."""
    extras: dict[str, Any] = {}
    if row.prepare:
        extras["numbers"] = numbers
    if row.random:
        extras["draw"] = piece.draw
    if row.stats:
        extras["stats"] = piece.stats
    if row.placed:
        extras["place"] = piece.place
    return extras


def _buffer_of(name: str, job: Merge) -> torch.Tensor:
    """Integer buffers are the base's; floating ones (running statistics) the mean over the experts."""
    inputs, dtype = job.inputs, job.specs[name].dtype
    experts = [expert[name] for expert in inputs.experts.values()]
    if (index := _index(job)) is not None:
        return experts[index].to(dtype, copy=True)
    if experts and dtype.is_floating_point:
        return average(torch.stack([expert.float() for expert in experts])).to(dtype)
    if inputs.base is not None:
        return inputs.base[name].to(dtype, copy=True)
    if any(not torch.equal(expert, experts[0]) for expert in experts):
        raise MergeError(
            f"{name} is an integer buffer that differs between experts, and there is no base to take it from"
        )
    return experts[0].to(dtype, copy=True)


def _fold(sink: Sink, job: Merge, tick: Tick) -> Done:
    """Merge expert after expert; the state, the base and one expert are in memory."""
    inputs = job.inputs
    names = [name for name in inputs.specs if inputs.is_weight(name)]

    def weights(whose: str, tensors: Tensors) -> dict[str, torch.Tensor]:
        loaded = {name: tensors[name].to(inputs.device, torch.float32) for name in names}
        tick("merge", sum(tensor.nbytes for tensor in loaded.values()))
        for name, tensor in loaded.items():
            if not torch.isfinite(tensor).all():
                raise MergeError(f"{name} has NaN or infinite weights in {whose}; a merge would spread them")
        return loaded

    started = time.perf_counter()
    base = inputs.base if job.row.base is not Base.unused else None
    fold = job.row.load()(weights("the base", base) if base is not None else {}, job.params, inputs.roles)
    for expert, tensors in inputs.experts.items():
        fold.update(weights(f"expert {expert}", tensors))
    merged = fold.result()
    done = []
    for name in sink.in_order():
        if name not in job.specs:
            continue
        spec = job.specs[name]
        if name in merged:
            flat = merged[name].reshape(-1)
            part, error, square = _rounded(flat, job, Piece(name, None, flat[None]), spec)
        else:
            part, error, square = _buffer_of(name, job).reshape(-1), 0.0, 0.0
        sink.put_part(name, 0, part)
        done.append(Done(0, part.nbytes, error, square))
    read = sum(math.prod(spec.shape) * job.width[name] for name, spec in job.specs.items())
    return Done(
        read,
        sum(part.bytes_written for part in done),
        math.fsum(part.error for part in done),
        math.fsum(part.square for part in done),
        {"prepare": 0.0, "merge": time.perf_counter() - started},
    )


def _rehearse(job: Merge) -> None:
    """Run the rule on a few numbers: parameters that it refuses (a weight too many) fail before any weight is read."""
    row, inputs = job.row, job.inputs
    n_experts = len(inputs.experts)
    base = None if inputs.base is None or row.base is Base.unused else torch.ones(2, 2)
    stats = torch.eye(2).repeat(n_experts, 1, 1) if row.stats else None  # non-negative and positive definite
    piece = Piece("rehearsal", base, torch.ones(n_experts, 2, 2), lambda index: torch.zeros(2, 2), stats, _ANYWHERE)
    try:
        rule_on(job, piece)
    except RankError:
        pass  # the tensors' own shapes decide
    except ValueError as error:
        raise MergeError(str(error)) from error


def rule_on(job: Merge, piece: Piece) -> torch.Tensor:
    """The rule with its prepare pass and its veneers on one piece alone."""

    def alone(piece: Piece) -> Pieces:
        def walk(function: Callable[[Piece], Any], limit: int | None = None) -> Iterable[Any]:
            return [function(piece)]

        return walk

    seen, finish = dresser(job.veneers, alone(piece))(piece)
    numbers = resolve(job.row.prepare)(alone(seen), job.params) if job.row.prepare else None
    return finish(_call(job, job.params, seen, numbers))
