"""Models whose feed-forward blocks are mixed for each input: routers, and what puts them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from methods.kinds import Roles
from methods.mixed_linear import Gates, MixedLinear
from methods.primitives import add_up, average


class Parts(Roles, Protocol):
    """What builds ask of a pool, besides what names mean."""

    experts: tuple[str, ...]  # names, in order
    n_features: int  # numbers of an example's features

    @property
    def features(self) -> Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]:
        """(module, inputs of B examples) -> what the module makes of each, (B, n_features), for routers."""
        ...

    def is_transposed(self, name: str) -> bool:
        """Whether the name is the weight of a linear layer stored as (in, out)."""
        ...

    def is_merged(self, name: str) -> bool:
        """Whether a parameter of the module is merged; a classifier's head, say, is not."""
        ...

    def is_causal(self, path: str) -> bool:
        """Whether what a module makes of a token may depend on the tokens before it only."""
        ...

    def feed_forwards(self) -> tuple[tuple[str, ...], ...]:
        """Of each feed-forward block the module paths, in order; tokens enter by the first."""
        ...

    def points(self) -> tuple[str, ...]:
        """Paths of the modules whose outputs are representations: blocks, and what makes the last one."""
        ...

    def width_at(self, path: str) -> int:
        """Numbers of a representation at such a path."""
        ...


class Router(nn.Module):
    """Features to gates; counts, while nothing is trained, what it answers."""

    def __init__(self, net: nn.Module, n_experts: int, soft: bool = False) -> None:
        """Take the network, (..., F) -> (..., G) with G a multiple of n_experts; `soft` makes its answers shares."""
        super().__init__()
        self.net, self.n_experts, self.soft = net, n_experts, soft
        self.n_gates = next(layer.out_features for layer in reversed([*net.modules()]) if isinstance(layer, nn.Linear))
        self.fixed: torch.Tensor | None = None  # answers that are given whatever comes, (G,)
        self.forget()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., F) -> (..., G)."""
        if self.fixed is not None:
            return self.fixed.to(features).expand(*features.shape[:-1], -1)
        found = self.net(features)
        found = found.softmax(-1) if self.soft else found
        return found.to(next(self.net.parameters()).dtype)  # in autocast they mix weights that stay as they are

    def forget(self) -> None:
        """Count anew."""
        self.n, self.sums, self.wins = 0, torch.zeros(self.n_experts), torch.zeros(self.n_experts)

    def note(self, gates: torch.Tensor) -> torch.Tensor:
        """Count each example's gates, (B, G) or (B, N, G), and hand them on."""
        if not torch.is_grad_enabled():
            each = gates.detach().reshape(len(gates), -1, self.n_experts, gates.shape[-1] // self.n_experts)
            own = each.mean((1, 3)).float().cpu()  # (B, T)
            self.n += len(own)
            self.sums += own.sum(0)
            self.wins += torch.bincount(own.argmax(1), minlength=self.n_experts)
        return gates


def network(width: int, n_gates: int, layers: int, start: float, hidden: int | None = None) -> nn.Module:
    """A router's network of one or two linear layers whose first answer is about `start` for every gate and input."""
    last = nn.Linear(width if layers == 1 else hidden or width, n_gates)
    nn.init.normal_(last.weight, std=0.01) if layers == 2 else nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, start)
    if layers == 1:
        return last
    first = nn.Linear(width, hidden or width)
    nn.init.normal_(first.weight, std=0.01)
    nn.init.zeros_(first.bias)
    return nn.Sequential(first, nn.ReLU(), last)


class Tokens:
    """Which tokens count: the mask that the model was last called with."""

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None

    def see(self, module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        mask = inputs.get("attention_mask")
        if mask is None or mask.dim() == 2:  # an encoder may be given what became of the mask, which was seen before
            self.mask = mask

    def average(self, gates: torch.Tensor, causal: bool, masked: bool) -> torch.Tensor:
        """Gates of tokens (B, N, G) to those of the example (B, G), or with `causal` of all tokens so far (B, N, G)."""
        weights = torch.ones(gates.shape[:2], device=gates.device, dtype=gates.dtype)
        if masked and self.mask is not None and self.mask.shape == weights.shape:
            weights = self.mask.to(gates)
        summed = (gates * weights[..., None]).cumsum(1) if causal else (gates * weights[..., None]).sum(1)
        counts = weights.cumsum(1) if causal else weights.sum(1)
        return summed / counts.clamp(min=1)[..., None]


class Routed(nn.Module):
    """The module by which tokens enter a block; its router looks at them, and the block's layers get the gates.

    The gates are the router's outputs averaged over the example's tokens (arXiv:2402.00433, equation 7).
    """

    def __init__(
        self, block: nn.Module, router: Router, gates: Gates, tokens: Tokens, causal: bool, masked: bool
    ) -> None:
        super().__init__()
        self.block, self.router = block, router
        self._held, self._tokens, self._causal, self._masked = gates, tokens, causal, masked

    def forward(self, hidden_states: torch.Tensor, *args: Any, **more: Any) -> Any:
        """(B, N, D) -> (B, N, D)."""
        self._held.now = self.router.note(self.gates(hidden_states))
        return self.block(hidden_states, *args, **more)

    def gates(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mixing coefficients, (B, N, D) -> (B, G), or (B, N, G) where the block is causal."""
        return self._tokens.average(self.router(hidden_states), self._causal, self._masked)


class Preference(nn.Module):
    """What a model is to trade tasks for each other by: its own shares, or others that it is asked for."""

    shares: torch.Tensor

    def __init__(self, n_experts: int) -> None:
        super().__init__()
        self.register_buffer("shares", torch.full((n_experts,), 1 / n_experts))
        self._asked: torch.Tensor | None = None

    @property
    def now(self) -> torch.Tensor:
        """The shares that count, (T,)."""
        return self.shares if self._asked is None else self._asked.to(self.shares)

    def set_to(self, numbers: Sequence[float] | None) -> None:
        """Make these its own, which are saved with the model; None: equal ones. Errors as `ask`."""
        self.shares.copy_(self._of([1.0] * len(self.shares) if numbers is None else numbers))

    def ask(self, numbers: Sequence[float] | None) -> None:
        """Numbers of at least 0, one for each expert, of which their shares count from now on; None: its own again.

        Raises:
            ValueError: There are as many as there are experts not, or one is below 0, or all are 0.
        """
        self._asked = None if numbers is None else self._of(numbers)

    def _of(self, numbers: Sequence[float]) -> torch.Tensor:
        given = list(numbers)
        if len(given) != len(self.shares) or min(given) < 0 or sum(given) <= 0:
            raise ValueError(
                f"a preference is {len(self.shares)} numbers of at least 0, one for each expert, not all 0; got {given}"
            )
        return torch.tensor(given) / sum(given)


class Preferred(nn.Module):
    """The module by which tokens enter a block whose gates a preference gives."""

    def __init__(self, block: nn.Module, router: Router, gates: Gates, preference: Preference) -> None:
        super().__init__()
        self.block, self.router, self.preference = block, router, preference
        self._held = gates

    def forward(self, hidden_states: torch.Tensor, *args: Any, **more: Any) -> Any:
        """(B, N, D) -> (B, N, D)."""
        self._held.now = self.router(self.preference.now)
        return self.block(hidden_states, *args, **more)


def route(
    base: nn.Module,
    experts: Sequence[nn.Module],
    roles: Parts,
    method: str,
    scale: float,
    changes: Callable[[torch.Tensor], nn.Module],
    entry: Callable[[nn.Module, Gates, Tokens, bool, bool, int], nn.Module],
    gated_biases: bool = True,
) -> nn.Module:
    """Task arithmetic on the base, in place, but feed-forward blocks' linear layers mixed by what `entry` puts in.

    Args:
        base: Changed and given back; nothing in it is trainable but what `entry` brings.
        experts: Left as they are.
        roles: What names and modules mean.
        method: For messages.
        scale: Of task arithmetic.
        changes: Makes of a layer's changes, (T, out, in), what is kept of them.
        entry: (module by which tokens enter a block, gates, tokens, causal, masked, its width) -> its replacement.
        gated_biases: Whether biases are mixed by the gates, or have task arithmetic.

    Raises:
        ValueError: The architecture has no feed-forward blocks that the pool can name, or one that has more than
            linear layers; the message names it.
    """
    blocks = roles.feed_forwards()
    if not blocks:
        raise ValueError(f"{method} mixes feed-forward blocks, and this architecture has none that the pool can name")
    tokens, causal = Tokens(), [roles.is_causal(paths[0]) for paths in blocks]
    layers = {paths: _layers(base, paths, roles, method) for paths in blocks}
    mixed, held = {}, {paths: Gates() for paths in blocks}
    for paths in blocks:
        for path in layers[paths]:
            mixed[path] = _mixed(base, experts, path, roles, changes, held[paths], gated_biases, scale)
    task_arithmetic_in_place(base, experts, scale)
    for path, layer in mixed.items():
        base.set_submodule(path, layer)
    for paths, own in zip(blocks, causal, strict=True):
        width = mixed[layers[paths][0]].weight.shape[1]
        masked = not own or all(causal)  # a decoder's mask is its encoder's
        base.set_submodule(paths[0], entry(base.get_submodule(paths[0]), held[paths], tokens, own, masked, width))
    encoder = getattr(base, "get_encoder", lambda: base)()
    for module in {id(module): module for module in (base, encoder)}.values():
        module.register_forward_pre_hook(tokens.see, with_kwargs=True)
    if any(causal):
        base.uncached = True  # type: ignore[assignment]  # gates look back at tokens that a cache would not show
    return base


def _layers(base: nn.Module, paths: tuple[str, ...], roles: Parts, method: str) -> list[str]:
    """Paths of the linear layers of a feed-forward block; norms between them have task arithmetic."""
    found = []
    for outer in paths:
        for inner, module in base.get_submodule(outer).named_modules():
            path = f"{outer}.{inner}" if inner else outer
            if roles.is_linear(f"{path}.weight") or roles.is_transposed(f"{path}.weight"):
                found.append(path)
            elif any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
                raise ValueError(f"{method} mixes linear layers, and {path} is a {type(module).__name__}")
    if not found:
        raise ValueError(f"{method} mixes linear layers, and the feed-forward block {paths[0]} has none")
    return found


def _mixed(
    base: nn.Module,
    experts: Sequence[nn.Module],
    path: str,
    roles: Parts,
    changes: Callable[[torch.Tensor], nn.Module],
    held: Gates,
    gated: bool,
    scale: float,
) -> MixedLinear:
    """One linear layer with its changes."""
    turned = roles.is_transposed(f"{path}.weight")

    def matrix(model: nn.Module) -> torch.Tensor:
        weight = model.get_parameter(f"{path}.weight").detach()
        return weight.T if turned else weight

    own = base.get_submodule(path)
    start, bias = matrix(base), getattr(own, "bias", None)
    layer = MixedLinear(start, bias, changes(torch.stack([matrix(expert) - start for expert in experts])), held)
    if bias is not None:
        moved = torch.stack([expert.get_parameter(f"{path}.bias").detach() - bias.detach() for expert in experts])
        if gated:
            layer.bias_changes = nn.Parameter(moved, requires_grad=False)
        else:
            layer.bias = nn.Parameter(bias.detach() + scale * add_up(moved), requires_grad=False)
    return layer


@torch.no_grad()
def task_arithmetic_in_place(base: nn.Module, experts: Sequence[nn.Module], scale: float) -> None:
    """Task arithmetic on every parameter of the base, none trainable afterwards; floating buffers are averaged."""
    theirs = [dict(expert.named_parameters()) for expert in experts]
    for name, parameter in base.named_parameters():
        deltas = torch.stack([parameters[name] - parameter for parameters in theirs])
        parameter.add_(add_up(deltas), alpha=scale).requires_grad_(False)
    statistics = [dict(expert.named_buffers()) for expert in experts]
    for name, buffer in base.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(average(torch.stack([buffers[name] for buffers in statistics])))
