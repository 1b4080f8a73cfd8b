"""A rule on one piece: with its extras and its veneers, on made-up numbers too, and what comes out rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from harness.inputs import MergeError, Tensors
from harness.job import Merge
from harness.veneers import dresser
from methods.kinds import Base, Kind, Piece, Pieces, Place, Row, resolve
from methods.matrices import RankError
from methods.packing import position
from pools.faults import Spec

_ANYWHERE = Place(1, 1, linear=True)


def call(job: Merge, params: Any, piece: Piece, numbers: torch.Tensor | None) -> torch.Tensor:
    """The rule on one piece, with the extras that its row asks for; of a compression, the expert that is asked for."""
    made = job.row.load()(piece.base, piece.experts, params, **extras_of(job.row, piece, numbers))
    if job.row.kind is not Kind.compression:
        return made
    return restored(job.row, params, piece, made, index_of(job) or 0)


def index_of(job: Merge) -> int | None:
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


def rounded(result: torch.Tensor, job: Merge, piece: Piece, spec: Spec) -> tuple[torch.Tensor, float, float]:
    """A merged piece in the output's dtype on the CPU, the squared rounding error, and the sum of squares."""
    result = result.float()
    square = _squares(result)
    if not math.isfinite(square):
        raise MergeError(not_finite(piece, tuple(job.inputs.experts), spec))
    if spec.dtype is torch.float32:
        return result.cpu(), 0.0, square
    made = result.to(spec.dtype)
    lost = made.float().sub_(result)
    error = _squares(lost)
    if not math.isfinite(error):
        raise MergeError(not_finite(piece, tuple(job.inputs.experts), spec))
    return made.cpu(), error, square


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


def rehearse(job: Merge) -> None:
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
    return finish(call(job, job.params, seen, numbers))
