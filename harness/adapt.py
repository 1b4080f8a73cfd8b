"""What methods are told of data: statistics of experts.

Every sum over examples is reduced over the devices, so that the number of devices changes nothing but the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import layer_norm

from harness.examples import Examples, Inputs, Texts
from harness.execute import own_share, sum_over_devices
from harness.routed_inputs import routed_squares

Named = Callable[[str], bool]  # whether a name is the weight of a linear layer that is asked for
Watched = dict[str, tuple[nn.Module, Callable[[nn.Module, torch.Tensor], torch.Tensor]]]

SAMPLED = 1024  # inputs of a layer that are kept for each task
_GOLDEN = (5**0.5 - 1) / 2  # its multiples lie evenly in [0, 1)


def gram_matrices(
    fabric: Fabric, module: nn.Module, examples: Examples | Texts, batch_size: int, is_linear: Named
) -> dict[str, torch.Tensor]:
    """Mean of x x^T over all tokens that enter each linear layer, weight's name -> (in, in), for RegMean."""
    watched: Watched = {f"{path}.weight": (layer, _outer) for path, layer in _linears(module, is_linear)}
    return _means_over_tokens(fabric, module, examples, batch_size, watched)


def features(
    fabric: Fabric, module: nn.Module, examples: Examples | Texts, batch_size: int, is_linear: Named
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
    fabric: Fabric, module: nn.Module, examples: Examples | Texts, batch_size: int, watched: Watched
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
    examples: Examples | Texts,
    batch_size: int,
    layers: Mapping[str, nn.Module],
    see: Callable[[str, torch.Tensor, range], None],
) -> None:
    """Run this process's examples; `see` is told a layer's name, what enters it (B, ..., in), and which examples.

    Of texts what enters at padding is left out, and `see` is told the rest of all examples together, (N, in).
    """
    share = own_share(fabric, len(examples))
    if isinstance(examples, Texts) and examples.pool.family == "seq2seq":
        batch_size = 1  # two lengths of padding: none is less
    batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    batch, read = range(0), torch.ones(())

    def watch(name: str) -> Callable[..., None]:
        return lambda layer, args: see(name, _unpadded(args[0].detach(), read), batch)

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            for batch in batches:
                if isinstance(examples, Examples):
                    module(**_on(fabric, examples.batch(batch)[0]))
                elif inputs := _on(fabric, fed_texts(examples, batch)):
                    read = inputs["attention_mask"].bool()
                    module(**inputs)
    finally:
        for handle in handles:
            handle.remove()


def fed_texts(examples: Texts, positions: Sequence[int]) -> Inputs:
    """Some texts as the module's inputs; nothing where all are empty. Labels are left where a decoder is fed them."""
    rows = [row for row in examples.chosen(positions) if row]
    if not rows:
        return {}
    inputs = examples.pool.feed([text for text, _ in rows] if examples.kind == "text_classification" else rows)
    return {key: value for key, value in inputs.items() if key != "labels" or examples.pool.family == "seq2seq"}


def _unpadded(entering: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """What enters a layer at tokens that are read, (N, in), of (B, L, in) or (B L, in); all where nothing is padded."""
    if read.dim() != 2 or bool(read.all()):
        return entering
    if entering.shape[:2] == read.shape:
        return entering[read]
    return entering[read.flatten()] if entering.shape[:1] == (read.numel(),) else entering


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
    "routed": routed_squares,
}
FROM_TEXTS = ("gram", "features", "routed")  # those that are collected from texts as well as from images
AT_BASE = ("gradient",)  # those that are collected from the base, the others from each expert


def _on(fabric: Fabric, inputs: Inputs) -> Inputs:
    """The inputs on the device."""
    return {key: tensor.to(fabric.device) for key, tensor in inputs.items()}
