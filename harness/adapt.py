"""What methods learn from data: statistics of experts, coefficients of a rule, routers of a build.

Every sum over examples is reduced over the devices, so that the number of devices changes nothing but the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import layer_norm

from harness.examples import Examples, Inputs, endless
from harness.execute import own_share, sum_over_devices
from methods.primitives import add_up

Report = Callable[[int, float, torch.Tensor | None], None]
Named = Callable[[str], bool]  # whether a name is the weight of a linear layer that is asked for
Watched = dict[str, tuple[nn.Module, Callable[[nn.Module, torch.Tensor], torch.Tensor]]]

SAMPLED = 1024  # inputs of a layer that are kept for each task
_GOLDEN = (5**0.5 - 1) / 2  # its multiples lie evenly in [0, 1)


def gram_matrices(
    fabric: Fabric, module: nn.Module, examples: Examples, batch_size: int, is_linear: Named
) -> dict[str, torch.Tensor]:
    """Mean of x x^T over all tokens that enter each linear layer, weight's name -> (in, in), for RegMean."""
    watched: Watched = {f"{path}.weight": (layer, _outer) for path, layer in _linears(module, is_linear)}
    return _means_over_tokens(fabric, module, examples, batch_size, watched)


def features(
    fabric: Fabric, module: nn.Module, examples: Examples, batch_size: int, is_linear: Named
) -> dict[str, torch.Tensor]:
    """Gram matrices, and for layer norms' scales the mean squares of what they scale, name -> (in,), for CAT."""
    watched: Watched = {f"{path}.weight": (layer, _outer) for path, layer in _linears(module, is_linear)}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.LayerNorm) and layer.elementwise_affine:
            watched[f"{path}.weight"] = (layer, _normalised_squares)
    return _means_over_tokens(fabric, module, examples, batch_size, watched)


def _linears(module: nn.Module, is_linear: Named) -> list[tuple[str, nn.Module]]:
    """Paths and modules of linear layers."""
    return [(path, layer) for path, layer in module.named_modules() if is_linear(f"{path}.weight")]


def _outer(layer: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    wide = tokens.double()
    return wide.T @ wide


def _normalised_squares(layer: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    assert isinstance(layer, nn.LayerNorm)
    return layer_norm(tokens, layer.normalized_shape, eps=layer.eps).double().square().sum(0)


def _means_over_tokens(
    fabric: Fabric, module: nn.Module, examples: Examples, batch_size: int, watched: Watched
) -> dict[str, torch.Tensor]:
    """The mean over all tokens that enter a layer, of what its function makes of tokens (N, in), summed over them."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}

    def add(name: str, entering: torch.Tensor, batch: range) -> None:
        layer, function = watched[name]
        tokens = entering.flatten(0, -2)
        sums[name] = sums.get(name, 0) + function(layer, tokens)
        counts[name] = counts.get(name, 0) + torch.tensor(float(len(tokens)), device=tokens.device)

    layers = {name: layer for name, (layer, _) in watched.items()}
    _show_inputs(fabric, module, examples, batch_size, layers, add)
    return {
        name: (sum_over_devices(fabric, total) / sum_over_devices(fabric, counts[name])).float().cpu()
        for name, total in sums.items()
    }


def input_samples(
    fabric: Fabric, module: nn.Module, examples: Examples, batch_size: int, is_linear: Named
) -> dict[str, torch.Tensor]:
    """A sample of what enters each linear layer, weight's name -> (SAMPLED, in), for AdaSVD.

    Every example gives as many as any other, to within one, of tokens spread evenly; nothing is drawn.
    """
    rows = torch.arange(SAMPLED)
    owners = rows * len(examples) // SAMPLED  # each row's example
    spread = (rows.double() * _GOLDEN) % 1  # and where in it
    samples: dict[str, torch.Tensor] = {}

    def pick(name: str, entering: torch.Tensor, batch: range) -> None:
        tokens = entering.reshape(len(batch), -1, entering.shape[-1])
        if name not in samples:
            samples[name] = torch.zeros(SAMPLED, tokens.shape[2], device=tokens.device)
        own = torch.isin(owners, torch.tensor(batch)).nonzero()[:, 0]
        positions = (owners[own] - batch.start) // batch.step
        samples[name][own] = tokens[positions, (spread[own] * tokens.shape[1]).long()].float()

    layers = {f"{path}.weight": layer for path, layer in _linears(module, is_linear)}
    _show_inputs(fabric, module, examples, batch_size, layers, pick)
    return {name: sum_over_devices(fabric, sample).cpu() for name, sample in samples.items()}


def _show_inputs(
    fabric: Fabric,
    module: nn.Module,
    examples: Examples,
    batch_size: int,
    layers: Mapping[str, nn.Module],
    see: Callable[[str, torch.Tensor, range], None],
) -> None:
    """Run this process's examples; `see` is told a layer's name, what enters it (B, ..., in), and which examples."""
    share = own_share(fabric, len(examples))
    batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    batch = range(0)

    def watch(name: str) -> Callable[..., None]:
        return lambda layer, args: see(name, args[0].detach(), batch)

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            for batch in batches:
                module(**_on(fabric, examples.batch(batch)[0]))
    finally:
        for handle in handles:
            handle.remove()


def fisher_diagonals(
    fabric: Fabric, module: nn.Module, examples: Examples, batch_size: int, is_linear: Named
) -> dict[str, torch.Tensor]:
    """Diagonal of the Fisher information, parameter's name -> (*shape), exact over the classes.

    Mean over examples of sum_y p(y|x) (d log p(y|x) / d theta)^2, from per-sample gradients
    (Matena and Raffel 2022, arXiv:2111.09832, equation 3).
    """
    head = examples.head.to(fabric.device)
    slopes = _Slopes(module, head)
    for inputs, _ in examples.batches(own_share(fabric, len(examples)), batch_size):
        inputs = _on(fabric, inputs)
        with torch.no_grad():
            chances = torch.softmax(module(**inputs) @ head.T, dim=1)  # (B, K)
        for label in range(len(head)):
            labels = torch.full((len(chances),), label, device=fabric.device)
            for name, slope in slopes(inputs, labels).items():
                slopes.sums[name] += torch.tensordot(chances[:, label], slope.square(), dims=1)
    return {name: (sum_over_devices(fabric, total) / len(examples)).cpu() for name, total in slopes.sums.items()}


def gradient_magnitudes(
    fabric: Fabric, module: nn.Module, examples: Examples, batch_size: int, is_linear: Named
) -> dict[str, torch.Tensor]:
    """Mean over labelled examples of |d loss / d theta|, parameter's name -> (*shape), loss the cross-entropy."""
    slopes = _Slopes(module, examples.head.to(fabric.device))
    for inputs, labels in examples.batches(own_share(fabric, len(examples)), batch_size):
        for name, slope in slopes(_on(fabric, inputs), labels.to(fabric.device)).items():
            slopes.sums[name] += slope.abs().sum(0)
    return {name: (sum_over_devices(fabric, total) / len(examples)).cpu() for name, total in slopes.sums.items()}


class _Slopes:
    """Each example's gradient of log p(label | inputs), parameter's name -> (B, *shape), and room for sums of them."""

    def __init__(self, module: nn.Module, head: torch.Tensor) -> None:
        self._weights = {name: tensor.detach() for name, tensor in module.named_parameters()}
        self.sums = {name: torch.zeros_like(tensor) for name, tensor in self._weights.items()}

        def log_probability(weights: dict[str, torch.Tensor], inputs: Inputs, label: torch.Tensor) -> torch.Tensor:
            outputs = functional_call(module, weights, (), {key: value[None] for key, value in inputs.items()})
            return torch.log_softmax((outputs @ head.T)[0], dim=0).gather(0, label[None])[0]

        self._slopes = vmap(grad(log_probability), in_dims=(None, 0, 0))

    def __call__(self, inputs: Inputs, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
            return self._slopes(self._weights, inputs, labels)


STATISTICS = {
    "gram": gram_matrices,
    "features": features,
    "inputs": input_samples,
    "fisher": fisher_diagonals,
    "gradient": gradient_magnitudes,
}
AT_BASE = ("gradient",)  # those that are collected from the base, the others from each expert


class Entropy:
    """Mean entropy of the predictions on unlabelled inputs, summed over tasks; one batch of each task a call.

    A call leaves the gradient in `.grad` of whatever needs one and gives back the loss.
    """

    def __init__(self, fabric: Fabric, tasks: Mapping[str, Examples], batch_size: int, seed: int) -> None:
        self.fabric, self.tasks = fabric, tasks
        self.heads = {task: examples.head.to(fabric.device) for task, examples in tasks.items()}
        self.orders = {
            task: endless(len(examples), min(batch_size, len(examples)), seed) for task, examples in tasks.items()
        }

    def __call__(self, forward: Callable[[Inputs], torch.Tensor]) -> float:
        """Loss of the next batches under `forward`: inputs -> outputs (B, D)."""
        parts: list[Inputs] = []
        sizes: list[tuple[str, int, int]] = []  # task, rows here, rows on all devices
        for task, examples in self.tasks.items():
            positions = next(self.orders[task])
            own = [positions[index] for index in own_share(self.fabric, len(positions))]
            if own:
                parts.append(examples.batch(own)[0])
                sizes.append((task, len(own), len(positions)))
        loss = torch.zeros((), device=self.fabric.device)
        if parts:
            joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            outputs = forward(_on(self.fabric, joined)).split([rows for _, rows, _ in sizes])
            for (task, _, rows), output in zip(sizes, outputs, strict=True):
                logits = output @ self.heads[task].T
                loss = loss - (torch.softmax(logits, 1) * torch.log_softmax(logits, 1)).sum() / rows
            loss.backward()
        return float(sum_over_devices(self.fabric, loss.detach()))


LOSSES = {"entropy": Entropy}


class CoefficientObjective:
    """Loss of a rule's coefficients and its gradient, the merged weights built once a step from stacked task vectors.

    The rule is linear in its coefficients, theta = base + sum_t c_t delta_t, so the gradient is the inner product of
    the weights' gradient with each task vector: no graph through the merge, no expert as a module.
    """

    def __init__(
        self,
        fabric: Fabric,
        module: nn.Module,
        base: Mapping[str, torch.Tensor],
        experts: Mapping[str, Mapping[str, torch.Tensor]],
        group_of: Callable[[str], int],
        loss: Entropy,
    ) -> None:
        self.fabric, self.module, self.loss, self.group_of = fabric, module, loss, group_of
        self.base = {name: tensor.to(fabric.device, torch.float32) for name, tensor in base.items()}
        self.deltas = {
            name: torch.stack([expert[name].to(fabric.device, torch.float32) - tensor for expert in experts.values()])
            for name, tensor in self.base.items()
        }

    def __call__(self, coefficients: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Coefficients (groups, T) -> loss, gradient (groups, T)."""
        own = coefficients.to(self.fabric.device)
        merged = {
            name: (base + add_up(self.deltas[name], own[self.group_of(name)])).requires_grad_()
            for name, base in self.base.items()
        }
        loss = self.loss(lambda inputs: functional_call(self.module, merged, (), inputs))
        gradient = torch.zeros_like(own)
        for name, weight in merged.items():
            if weight.grad is not None:
                gradient[self.group_of(name)] += self.deltas[name].flatten(1) @ weight.grad.flatten()
        return loss, sum_over_devices(self.fabric, gradient).cpu()


def train(fabric: Fabric, module: nn.Module, loss: Entropy, lr: float, steps: int, report: Report) -> None:
    """Train what a build left trainable, by Adam.

    Raises:
        FloatingPointError: The loss is no number; the message names the step.
    """
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(lambda inputs: module(**inputs))
        if value != value:
            raise FloatingPointError(f"the loss is not a number at step {step}; a smaller lr than {lr} may help")
        if fabric.world_size > 1:
            for weight in weights:
                own = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = sum_over_devices(fabric, own)
        optimizer.step()
        report(step, value, None)


def _on(fabric: Fabric, inputs: Inputs) -> Inputs:
    """The inputs on the device."""
    return {key: tensor.to(fabric.device) for key, tensor in inputs.items()}
