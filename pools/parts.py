"""What builds ask of a pool's modules: feed-forward blocks, representations, features, what is causal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pools.roles import ModuleRoles, block_of

if TYPE_CHECKING:
    from torch import nn

_PAIRS = (("intermediate", "output"), ("fc1", "fc2"), ("linear1", "linear2"))  # blocks that are no module of their own


class ModuleParts(ModuleRoles):
    """Roles of a module's own names, and its parts.

    Attributes:
        experts: Names, in order.
        n_features: Numbers of an example's features.
        features: (module, inputs of B examples) -> what the module makes of each, (B, n_features).
    """

    def __init__(self, module: Any, names: Iterable[str], family: str, experts: Sequence[str]) -> None:
        """Look at a module.

        Args:
            module: What the pool's `skeleton` or `module` gives.
            names: The parameters that are merged, by their names in the module.
            family: The pool's.
            experts: Their names.
        """
        self.merged = frozenset(names)
        super().__init__(module, self.merged)
        self.family, self.experts = family, tuple(experts)
        self.features: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]
        if family == "clip":
            self.features, self.n_features = image_features, module.visual_projection.out_features
            self._width = module.vision_model.config.hidden_size
        else:
            self.features = prompt_features if family == "causal_lm" else text_features
            self.n_features = self._width = module.config.get_text_config().hidden_size

    def is_merged(self, name: str) -> bool:
        """Whether a parameter of the module is merged; a classifier's head, say, is not."""
        return name in self.merged

    def is_causal(self, path: str) -> bool:
        """Whether what a module makes of a token may depend on the tokens before it only."""
        return self.family == "causal_lm" or (self.family == "seq2seq" and "decoder" in path.split("."))

    def feed_forwards(self) -> tuple[tuple[str, ...], ...]:
        """Of each feed-forward block the module paths, in order; tokens enter by the first."""
        found: list[tuple[str, ...]] = [(path,) for path in self.mlps()]
        inside = tuple(f"{path}." for (path,) in found)
        paths = [path for path, _ in self._module.named_modules()]
        for path in paths:
            outer, _, leaf = path.rpartition(".")
            for first, second in _PAIRS:
                pair = (path, f"{outer}.{second}")
                if leaf == first and pair[1] in paths and not path.startswith(inside) and self._holds(pair):
                    found.append(pair)
        return tuple(sorted(found, key=lambda pair: paths.index(pair[0])))

    def points(self) -> tuple[str, ...]:
        """Paths of the modules whose outputs are representations: blocks, and what makes the last one."""
        blocks = dict.fromkeys(block for name in self._names if (block := block_of(name)) is not None)
        return (*blocks, "visual_projection") if self.family == "clip" else tuple(blocks)

    def width_at(self, path: str) -> int:
        """Numbers of a representation."""
        return self.n_features if path == "visual_projection" else self._width

    def _holds(self, pair: tuple[str, str]) -> bool:
        """Whether both parts have linear layers that are merged."""
        linear = [name for name in self._names if self.is_linear(name) or self.is_transposed(name)]
        return all(any(name.startswith(f"{path}.") for name in linear) for path in pair)


def image_features(module: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Embeddings, (B, D)."""
    return module(**inputs)


def text_features(module: Any, inputs: Mapping[str, Any], **more: Any) -> torch.Tensor:
    """The mean of the last hidden states over a text's tokens, of an encoder where there is one, (B, D)."""
    inner = module.get_encoder() if module.config.is_encoder_decoder else module.base_model
    kept = {key: inputs[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in inputs}
    hidden = inner(**kept, **more).last_hidden_state
    counts = inputs["attention_mask"].to(hidden) if "attention_mask" in inputs else hidden.new_ones(hidden.shape[:2])
    return (hidden * counts[..., None]).sum(1) / counts.sum(1).clamp(min=1)[:, None]


def prompt_features(module: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The same of a model that continues texts, on whichever side they are padded."""
    mask = inputs.get("attention_mask")
    positions = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return text_features(module, inputs, **positions, use_cache=False)
