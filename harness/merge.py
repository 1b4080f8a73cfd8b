"""The engine: applies a method to base and experts, tensor by tensor, in bounded memory.

It asks the catalogue row what the method needs and never for its name. Arithmetic runs in float32 on one device;
what comes out has the base's dtype. Integer buffers come from the base, floating buffers are averaged over the experts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from harness.inputs import Inputs, MergeError, Tensors, check
from methods.catalogue import find
from methods.draws import drawer
from methods.kinds import Base, Kind, Piece, Pieces, Roles, Row, resolve
from methods.primitives import average
from methods.similarity import cosine_similarities
from pools.faults import specs_of
from pools.roles import NamedRoles

CHUNK = 1 << 20  # elements of an element-wise rule's piece; a multiple of 8, as draws ask


def merge_state_dicts(
    base: Tensors | None,
    experts: Mapping[str, Tensors],
    method: str,
    params: Mapping[str, Any] | None = None,
    stats: Mapping[str, Tensors] | None = None,
    seed: int = 0,
    roles: Roles | None = None,
) -> dict[str, torch.Tensor]:
    """Merge state dicts in memory: the same engine, checks and errors as a run.

    Args:
        base: The base's tensors by name, or None for methods that do without.
        experts: Name -> tensors by name; the order counts where the method says so.
        method: A name of the catalogue, of the kinds rule, informed or fold.
        params: Parameters by name; what is left out has its default.
        stats: For informed rules, expert -> tensor name (or its module's) -> Fisher diagonal (*shape) or
            Gram matrix (in, in).
        seed: Of random methods; masks depend on it, the tensor's name and the expert's name alone.
        roles: What names mean; by default read off the names.

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
    if roles is None:
        roles = NamedRoles(specs_of(base if base is not None else next(iter(experts.values()), {})))
    with torch.no_grad():
        return dict(merge(row, made, Inputs(base, experts, roles, stats, seed)))


def merge(
    row: Row,
    params: Any,
    inputs: Inputs,
    params_of: Callable[[str], Any] | None = None,
    report: Callable[[str, torch.Tensor], None] = lambda name, tensor: None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge, yielding each tensor as it is done; all checks that need no weights come before the first.

    Args:
        row: The method; a rule, an informed rule or a fold.
        params: Its params dataclass.
        inputs: What is merged.
        params_of: Params for each tensor's name, where they differ (coefficients that a search found).
        report: Called with each merged tensor's name and the tensor.
    """
    inputs = _selected(row, params, inputs)
    check(row, inputs)
    pairs = _fold(row, params, inputs) if row.kind is Kind.fold else _rules(row, params, inputs, params_of)

    def reported() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in pairs:
            report(name, tensor)
            yield name, tensor

    return reported()


def task_vector_cosines(inputs: Inputs) -> torch.Tensor:
    """Cosine similarity of each pair of task vectors over all weights, (T, T) float64."""
    return cosine_similarities(lambda: _all_pieces(find("task_arithmetic"), inputs))


def _make_params(row: Row, given: Mapping[str, Any]) -> Any:
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
        names = resolve(row.members)(params, names)
    stats = inputs.stats
    if stats is not None and set(stats) == set(inputs.experts):
        stats = {name: stats[name] for name in names}
    return replace(inputs, experts={name: inputs.experts[name] for name in names}, stats=stats)


def _rules(
    row: Row, params: Any, inputs: Inputs, params_of: Callable[[str], Any] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Apply a rule to every tensor."""
    _rehearse(row, params, inputs)
    over_model = getattr(params, "scope", "model") == "model"
    numbers = None
    if row.prepare and over_model and any(map(inputs.is_weight, inputs.specs)):
        numbers = _prepare(row, params, lambda: _all_pieces(row, inputs))
    for name, spec in inputs.specs.items():
        if not inputs.is_weight(name):
            yield name, _buffer(name, inputs)
            continue
        try:
            if row.prepare and not over_model:
                numbers = _prepare(row, params, functools.partial(_pieces, row, name, inputs))
            own = params_of(name) if params_of else params
            yield name, _apply(row, own, name, inputs, numbers)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, MergeError):
                raise
            raise MergeError(f"{row.name} failed on {name} {spec.shape}: {error}") from error


def _prepare(row: Row, params: Any, pieces: Pieces) -> torch.Tensor | None:
    """The numbers per expert that a rule is given."""
    return resolve(row.prepare)(pieces, params)


def _apply(row: Row, params: Any, name: str, inputs: Inputs, numbers: torch.Tensor | None) -> torch.Tensor:
    """One merged tensor, in the reference's dtype."""
    merged = torch.empty(inputs.specs[name].shape, dtype=inputs.specs[name].dtype)
    flat = merged.view(-1)
    offset = 0
    for piece in _pieces(row, name, inputs):
        result = _call(row, params, piece, numbers)
        flat[offset : offset + result.numel()] = result.reshape(-1)
        offset += result.numel()
    if not torch.isfinite(flat).all():
        raise MergeError(
            f"{name} {tuple(merged.shape)} came out beyond the range of {merged.dtype}; a smaller scale may help"
        )
    return merged


def _call(row: Row, params: Any, piece: Piece, numbers: torch.Tensor | None) -> torch.Tensor:
    """The rule on one piece, with the extras that its row asks for."""
    extras: dict[str, Any] = {}
    if row.prepare:
        extras["numbers"] = numbers
    if row.random:
        extras["draw"] = piece.draw
    if row.stats:
        extras["stats"] = piece.stats
    return row.load()(piece.base, piece.experts, params, **extras)


def _all_pieces(row: Row, inputs: Inputs) -> Iterator[Piece]:
    """Pieces of every tensor that the rule is applied to."""
    for name in filter(inputs.is_weight, inputs.specs):
        yield from _pieces(row, name, inputs)


def _pieces(row: Row, name: str, inputs: Inputs) -> Iterator[Piece]:
    """One tensor in float32, whole, or flat chunks of it where the rule is element-wise."""
    base = None if inputs.base is None or row.base is Base.unused else inputs.base[name]
    experts = [expert[name] for expert in inputs.experts.values()]
    stats = inputs.stats_of(name) if row.stats else None
    shape = inputs.specs[name].shape
    if not row.elementwise:
        yield _piece(row, name, inputs, base, experts, stats, shape, 0)
        return
    size = math.prod(shape)
    flat_base = None if base is None else base.reshape(-1)
    flat = [expert.reshape(-1) for expert in experts]
    flat_stats = None if stats is None else stats.flatten(1) if stats.dim() > 1 else stats[:, None]
    for start in range(0, size, CHUNK):
        cut = slice(start, min(start + CHUNK, size))
        yield _piece(
            row,
            name,
            inputs,
            None if flat_base is None else flat_base[cut],
            [expert[cut] for expert in flat],
            None if flat_stats is None else flat_stats[:, cut],
            (cut.stop - cut.start,),
            start,
        )


def _piece(
    row: Row,
    name: str,
    inputs: Inputs,
    base: torch.Tensor | None,
    experts: Sequence[torch.Tensor],
    stats: torch.Tensor | None,
    shape: tuple[int, ...],
    offset: int,
) -> Piece:
    """A piece on the device, checked to be finite."""
    stacked = torch.empty((len(experts), *shape), dtype=torch.float32, device=inputs.device)
    for index, expert in enumerate(experts):
        stacked[index] = expert
    first = None if base is None else base.to(inputs.device, torch.float32)
    _check_finite(name, first, stacked, tuple(inputs.experts))
    draw = drawer(inputs.seed, name, tuple(inputs.experts), shape, offset, inputs.device) if row.random else None
    return Piece(name, first, stacked, draw, stats)


def _check_finite(name: str, base: torch.Tensor | None, experts: torch.Tensor, names: tuple[str, ...]) -> None:
    """Refuse NaN and infinite weights, naming whose they are."""
    if (base is None or torch.isfinite(base).all()) and torch.isfinite(experts).all():
        return
    tensors = zip(names, experts, strict=True)
    whose = [f"expert {expert}" for expert, tensor in tensors if not torch.isfinite(tensor).all()]
    if base is not None and not torch.isfinite(base).all():
        whose.insert(0, "the base")
    raise MergeError(f"{name} has NaN or infinite weights in {', '.join(whose)}; a merge would spread them")


def _buffer(name: str, inputs: Inputs) -> torch.Tensor:
    """Integer buffers are the base's; floating ones (running statistics) the mean over the experts."""
    experts = [expert[name] for expert in inputs.experts.values()]
    if experts and inputs.specs[name].dtype.is_floating_point:
        return average(torch.stack([expert.float() for expert in experts])).to(inputs.specs[name].dtype)
    if inputs.base is not None:
        return inputs.base[name].clone()
    if any(not torch.equal(expert, experts[0]) for expert in experts):
        raise MergeError(
            f"{name} is an integer buffer that differs between experts, and there is no base to take it from"
        )
    return experts[0].clone()


def _fold(row: Row, params: Any, inputs: Inputs) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge expert after expert; the state, the base and one expert are in memory."""
    assert inputs.base is not None
    names = [name for name in inputs.specs if inputs.is_weight(name)]

    def weights(whose: str, tensors: Tensors) -> dict[str, torch.Tensor]:
        loaded = {name: tensors[name].to(inputs.device, torch.float32) for name in names}
        for name, tensor in loaded.items():
            if not torch.isfinite(tensor).all():
                raise MergeError(f"{name} has NaN or infinite weights in {whose}; a merge would spread them")
        return loaded

    fold = row.load()(weights("the base", inputs.base), params, inputs.roles)
    for expert, tensors in inputs.experts.items():
        fold.update(weights(f"expert {expert}", tensors))
    merged = fold.result()
    for name, spec in inputs.specs.items():
        yield name, merged[name].to("cpu", spec.dtype) if name in merged else _buffer(name, inputs)


def _rehearse(row: Row, params: Any, inputs: Inputs) -> None:
    """Run the rule on a few numbers: parameters that it refuses (a weight too many) fail before any weight is read."""
    n_experts = len(inputs.experts)
    base = None if inputs.base is None or row.base is Base.unused else torch.ones(2, 2)
    stats = torch.eye(2).repeat(n_experts, 1, 1) if row.stats else None  # non-negative and positive definite
    piece = Piece("rehearsal", base, torch.ones(n_experts, 2, 2), lambda index: torch.zeros(2, 2), stats)
    try:
        numbers = _prepare(row, params, lambda: [piece]) if row.prepare else None
        _call(row, params, piece, numbers)
    except ValueError as error:
        raise MergeError(str(error)) from error
