"""A small stack of task vectors, and searches run on a loss of the weights themselves."""

from __future__ import annotations

import torch

from methods.kinds import Place, Search, Stack

SHAPES = {"before": (5,), "layers.0.q": (6, 4), "layers.1.q": (4, 6), "scalar": ()}
PLACES = {
    "before": Place(0, 2, name="before"),
    "layers.0.q": Place(1, 2, linear=True, name="layers.0.q"),
    "layers.1.q": Place(2, 2, linear=True, name="layers.1.q"),
    "scalar": Place(3, 2, name="scalar"),
}


def stack(n_experts: int = 3, seed: int = 0) -> Stack:
    """Noise around a base."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    deltas = {name: 0.3 * torch.randn(n_experts, *shape, generator=generator) for name, shape in SHAPES.items()}
    return Stack(base, deltas, PLACES, seed=7)


def targets(own: Stack, seed: int = 5) -> dict[str, torch.Tensor]:
    """Weights to be reached: some way along each task vector."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, base in own.base.items():
        ways = torch.rand(own.n_experts, generator=generator)
        found[name] = base + torch.tensordot(ways, own.deltas[name], dims=1)
    return found


def loss_of(weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> torch.Tensor:
    """A smooth loss that is no sum over tensors."""
    away = sum(((weights[name] - wanted[name]) ** 2).sum() for name in wanted)
    return torch.log1p(torch.as_tensor(away))


def pulled(search: Search, wanted: dict[str, torch.Tensor]) -> float:
    """A pass: the loss, its gradient in `.grad` of what is learnt."""
    for tensor in search.learnt.values():
        tensor.grad = None
    weights = {name: search.weight(name).requires_grad_() for name in wanted}
    loss = loss_of(weights, wanted)
    loss.backward()
    for name, weight in weights.items():
        search.pull(name, weight.grad)
    return float(loss.detach())


def searched(search: Search, wanted: dict[str, torch.Tensor], steps: int | None = None) -> list[float]:
    """Plain Adam; the losses of every step, and of what came out."""
    groups = [
        {"params": [tensor], "lr": next(rate for start, rate in search.rates.items() if name.startswith(start))}
        for name, tensor in search.learnt.items()
    ]
    adam, losses = torch.optim.Adam(groups), []
    for step in range(search.steps if steps is None else steps):
        search.begin(step, lambda: pulled(search, wanted))
        losses.append(pulled(search, wanted))
        adam.step()
        search.settle()
    search.finish()
    return [*losses, float(loss_of({name: search.weight(name) for name in wanted}, wanted))]


def assert_slopes(search: Search, wanted: dict[str, torch.Tensor], names: list[str], rel: float = 2e-2) -> None:
    """What is pulled is the slope of the loss, entry by entry, for the weights as they are."""
    pulled(search, wanted)
    slopes = {name: search.learnt[name].grad.clone() for name in names}
    for name, slope in slopes.items():
        flat, tensor = slope.flatten(), search.learnt[name].view(-1)
        for index in range(0, len(flat), max(1, len(flat) // 6)):
            before, values = float(tensor[index]), []
            for step in (1e-2, -1e-2):
                tensor[index] = before + step
                values.append(_refreshed(search, wanted))
            tensor[index] = before
            _refreshed(search, wanted)
            measured = (values[0] - values[1]) / 2e-2
            assert abs(float(flat[index]) - measured) <= rel * abs(measured) + 2e-4, (name, index)


def _refreshed(search: Search, wanted: dict[str, torch.Tensor]) -> float:
    """The loss with what was just changed, the step's noise as it was."""
    redraw = getattr(search, "redraw", None)
    if redraw is not None:
        redraw()
    return float(loss_of({name: search.weight(name) for name in wanted}, wanted))
