"""CART: from the experts' average go along each expert's leading directions away from it.

Source: Choi et al. 2024, arXiv:2412.12153 (centered arithmetic with rank-reduced task vectors).
Differs: nothing; the base takes no part. What is no matrix is averaged: its changes from the average cancel.
Formula: mean = sum_i expert_i / T; merged = mean + scale * sum_i truncate(expert_i - mean, rank).
Cost: O(T m n min(m, n)) time, 6 m n numbers besides the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.kinds import Place
from methods.lazy import torch
from methods.matrices import as_matrices
from methods.parameters import Params, share, tunable, word
from methods.primitives import average
from methods.spectra import leading, one_thread


@dataclass(frozen=True)
class CartParams(Params):
    """Parameters of `cart`; also the schema of conf/method/cart.yaml."""

    rank: float = share(0.08, low=0.01, high=0.32, log=True)  # share of the directions kept, in (0, 1]; at least one
    scale: float = tunable(1.0, low=0.3, high=3.0)  # multiplies the sum over the experts (lambda in the paper)
    matrices: str = word("all", "linear", "conv")  # what is a matrix: all, linear or conv; methods/matrices.py


@one_thread
def cart(base: torch.Tensor | None, experts: torch.Tensor, params: CartParams, *, place: Place) -> torch.Tensor:
    """Merge one tensor: experts (T, *shape) -> (*shape), all float32."""
    mean = average(experts)
    laid = as_matrices(experts, place, params.matrices)
    if laid is None or params.rank == 1:
        return mean  # whole changes from the mean cancel
    centre = mean.reshape(laid.shape[1:])
    rank = max(int(params.rank * min(centre.shape)), 1)
    total = torch.zeros_like(centre)
    for expert in laid:
        total += leading(expert - centre, rank).matrix()
    return mean + params.scale * total.reshape(mean.shape)
