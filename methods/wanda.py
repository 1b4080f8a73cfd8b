"""Wanda: a weight counts by its magnitude times the norm of the input that it multiplies; the least go to zero.

Source: Sun et al. 2023, arXiv:2306.11695, equation 1 and section 3; block after block, each fed what the pruned blocks
before it make.
Differs: of several experts the mean is pruned, by the mean of their inputs' squares; `expert` names one. density is
what is kept; of n:m n are kept, where FusionBench prunes n. Inputs are those of the experts' tasks, of which the mean
over tokens is taken; the paper's are texts of C4. What is not pruned is the mean. `moe_pruner` is the same for mixtures
of experts (Xie et al. 2024, arXiv:2410.12013, without the distillation there): an expert's inputs count times the
router's share, those of the model as it is; with matrices=blocks attention is pruned as well, by its plain inputs.
Formula: merged_ij = mask_ij * mean_ij, mask 1 for the largest |mean_ij| ||x_j||_2 of each output i; of an expert e
|mean_ij| ||x_j g_e(x)||_2, g_e the share that the router gives it, 0 for tokens that it does not see
Cost: O(T m n + m n log(n)) time for m x n, T n^2 + 4 m n numbers; inputs take L forward passes for each example, L the
blocks, whose Gram matrices (of which only the diagonal is asked) are held for one at a time
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.kinds import Place
from methods.lazy import torch
from methods.parameters import word
from methods.primitives import average
from methods.prune import PruningParams, as_rows, chosen, is_pruned


@dataclass(frozen=True)
class WandaParams(PruningParams):
    """Parameters of `wanda`; also the schema of conf/method/wanda.yaml."""

    scope: str = word("row", "tensor")  # keep the share of each output's weights, or of each tensor's


@dataclass(frozen=True)
class MoePrunerParams(WandaParams):
    """Parameters of `moe_pruner`; also the schema of conf/method/moe_pruner.yaml."""

    matrices: str = "experts"  # what is pruned: matrices of `experts`, linear layers of `blocks`, all `linear` ones


def wanda(
    base: torch.Tensor | None,
    experts: torch.Tensor,
    params: WandaParams,
    *,
    stats: torch.Tensor | None,
    place: Place,
) -> torch.Tensor:
    """Prune one tensor: experts (T, *shape), `stats` (T, in, in) or (T, in) -> (*shape), float32.

    Of the Gram matrices the diagonals are asked, which may be given alone.

    Raises:
        ValueError: What is pruned has no Gram matrices, or they are not (in, in).
    """
    mean = average(experts)
    if not is_pruned(mean.shape, place, params):
        return mean
    weights = as_rows(mean, place)
    if stats is not None and stats.shape[1:] == weights.shape[1:]:
        squares = average(stats)
    else:
        squares = gram_of(stats, weights, params).diagonal()
    norms = squares.clamp(min=0).sqrt()
    return as_rows(weights.where(chosen(weights.abs() * norms, params, params.scope), 0.0), place)


def gram_of(stats: torch.Tensor | None, weights: torch.Tensor, params: PruningParams) -> torch.Tensor:
    """Mean over experts of the Gram matrices of a layer's inputs, (T, in, in) -> (in, in).

    Raises:
        ValueError: There are none, or they are not (in, in).
    """
    width = weights.shape[1]
    if stats is None:
        raise ValueError(f"no inputs of it are known, and matrices={params.matrices} has it pruned by its inputs")
    if stats.shape[1:] != (width, width):
        raise ValueError(f"a Gram matrix is (in, in) for a weight (out, in), got {tuple(stats.shape[1:])}")
    return average(stats)
