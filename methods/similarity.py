"""How alike task vectors are: the cosine between each pair, over the whole model.

Source: Ilharco et al. 2023, arXiv:2212.04089, figure 5.
"""

from __future__ import annotations

from methods.kinds import Piece, Pieces
from methods.lazy import torch


def cosine_similarities(pieces: Pieces) -> torch.Tensor:
    """Cosines between the experts' task vectors, (T, T) float64; a zero one is like nothing, itself included."""
    products = torch.zeros((), dtype=torch.float64)
    for found in pieces(_products):
        products = products + found
    norms = products.diagonal().sqrt()
    scale = norms[:, None] * norms[None, :]
    return torch.where(scale > 0, products / scale, torch.zeros_like(scale))


def _products(piece: Piece) -> torch.Tensor:
    """Inner products of a piece's task vectors, (T, T) float64."""
    deltas = piece.deltas.flatten(1)
    return (deltas @ deltas.T).double().cpu()
