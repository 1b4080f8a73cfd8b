"""TIES and OPCM once more, in NumPy and float64, with the conventions of other tools as arguments."""

from __future__ import annotations

import math

import numpy as np
import torch

Arrays = dict[str, np.ndarray]


def arrays(state: dict[str, torch.Tensor]) -> Arrays:
    return {name: tensor.numpy().astype(np.float64) for name, tensor in state.items()}


def trimmed(delta: np.ndarray, density: float) -> np.ndarray:
    """Exactly max(1, density * n) entries of one tensor."""
    flat = delta.ravel().copy()
    order = np.argsort(-np.abs(flat), kind="stable")
    flat[order[max(1, int(density * flat.size + 1e-9)) :]] = 0
    return flat.reshape(delta.shape)


def ties_by_tensor(
    base: Arrays, experts: list[Arrays], density: list[float], weight: list[float], normalize: bool, scale: float,
    rescale: bool = False,
) -> Arrays:  # fmt: skip
    """mergekit's reading of TIES; with equal weights it is ours, zero votes aside."""
    merged = {}
    for name, start in base.items():
        changes = []
        for expert, share, factor in zip(experts, density, weight, strict=True):
            delta = expert[name] - start
            kept = trimmed(delta, share)
            if rescale and np.abs(kept).sum() > 0:
                kept *= np.abs(delta).sum() / np.abs(kept).sum()
            changes.append(factor * kept)
        stacked = np.stack(changes)
        sign = np.where(stacked.sum(0) >= 0, 1, -1)
        agree = np.sign(stacked) == sign
        total = (stacked * agree).sum(0)
        if normalize:
            divisor = (agree * np.reshape(weight, (-1, *[1] * start.ndim))).sum(0)
            total = total / np.where(divisor == 0, 1, divisor)
        merged[name] = start + scale * total
    return merged


def ties_over_model(base: Arrays, experts: list[Arrays], n_kept: int, disjoint: str, scale: float) -> Arrays:
    flat = np.concatenate([base[name].ravel() for name in base])
    deltas = np.stack([np.concatenate([expert[name].ravel() for name in base]) for expert in experts]) - flat
    for delta in deltas:
        delta[np.argsort(-np.abs(delta), kind="stable")[n_kept:]] = 0
    sign = np.sign(deltas.sum(0))
    agree = np.where((np.sign(deltas) == sign) & (deltas != 0), deltas, 0)
    merged = agree.sum(0) if disjoint == "sum" else np.abs(agree).max(0) * sign
    merged = flat + scale * merged
    ends = np.cumsum([base[name].size for name in base])[:-1]
    return {n: part.reshape(base[n].shape) for n, part in zip(base, np.split(merged, ends), strict=True)}


def opcm_in_numpy(base: Arrays, experts: list[Arrays], alpha: float, linear: set[str], held: set[str]) -> Arrays:
    """Sequential merging; `held` tensors never see a later expert."""

    def norm(deltas: Arrays) -> float:
        return math.sqrt(sum(float((delta**2).sum()) for delta in deltas.values()))

    changes = [{name: expert[name] - base[name] for name in base} for expert in experts]
    merged, scale = dict(changes[0]), 1.0
    for position, change in enumerate(changes[1:], start=2):
        for name, delta in change.items():
            if name in held:
                continue
            if name in linear:
                u, s, vh = np.linalg.svd(merged[name], full_matrices=True)
                parts = u.T @ delta @ vh.T
                np.fill_diagonal(parts, 0)
                split = int(np.argmax(np.cumsum(s) / max(s.sum(), 1e-300) > alpha))
                parts[:split, :split] = 0
                delta = u @ parts @ vh
            merged[name] = scale * merged[name] + delta
        target = sum(norm(seen) for seen in changes[:position]) / position
        scale = norm(merged) / target
        merged = {name: delta / scale for name, delta in merged.items()}
    return {name: base[name] + merged[name] for name in base}
