"""Dense language models as one mixture of experts, whose feed-forward blocks stand beside each other behind a router.

Source: Komatsuzaki et al. 2022, arXiv:2212.05055 (sparse upcycling: copies of one model's blocks); one model's blocks
for each expert is mergekit's `mergekit-moe` and FusionBench's `mixtral_moe_merging`. The result is a checkpoint of
transformers' Mixtral, of Qwen2 models a Qwen2-MoE, whose shared expert adds nothing, of Qwen3 models a Qwen3-MoE. The
router's rows are random (Mixtral's initial spread), or, as mergekit's `hidden` and `cheap_embed`, each expert's mean
input of the block, or mean embedding, over the tokens of its texts, less the mean over the experts, of length one.
Differs: attention, norms, embeddings and head come along, which FusionBench leaves random; blocks are replaced in all
layers, where sparse upcycling does so in every other one. mergekit's texts are prompts, here also the inputs of the
expert's own task; it reads hidden states where a layer begins and does not centre them: here where the router reads,
after the norm.
Formula: y = sum over the top_k e of softmax(R x)_e MLP_e(x), R (T, n) the router; what is no MLP as `rest` says
Cost: O(T n) time, T + 1 chunks of memory; router=hidden takes one dense model in memory and a forward pass of all texts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from methods.lazy import torch
from methods.parameters import at_least, one_of, word


@dataclass(frozen=True)
class MoeUpscalingParams:
    """Parameters of `moe_upscaling`; also the schema of conf/method/moe_upscaling.yaml."""

    experts: int = 8  # copies of each feed-forward block, at least 1
    top_k: int = 2  # experts that a token is sent to, 1 to `experts`
    router_std: float = 0.02  # standard deviation of the router's random weights, at least 0

    def __post_init__(self) -> None:
        at_least("experts", self.experts, 1)
        at_least("top_k", self.top_k, 1)
        at_least("router_std", self.router_std, 0)
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} sends a token to more experts than experts={self.experts}")


@dataclass(frozen=True)
class MoeMergingParams:
    """Parameters of `moe_merging`; also the schema of conf/method/moe_merging.yaml."""

    top_k: int = 2  # experts that a token is sent to, 1 to as many as there are
    # All but the feed-forward blocks: base (without one, the first expert's) or mean, of the experts.
    rest: str = word("base", "mean")
    router: str = word("random", "hidden", "embed")  # its rows: random, or by the block's inputs or the embeddings
    router_std: float = 0.02  # standard deviation of the router's random weights, at least 0
    # Expert -> texts it is for, of all experts; where there are none, the inputs of each expert's own task are read.
    prompts: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least("top_k", self.top_k, 1)
        at_least("router_std", self.router_std, 0)
        one_of("rest", self.rest, ("base", "mean"))
        one_of("router", self.router, ("random", "hidden", "embed"))
        if self.prompts and self.router == "random":
            raise ValueError("prompts make routers with router=hidden or router=embed, and it is random")

    @property
    def from_tasks(self) -> bool:
        """Whether the experts' own tasks are read."""
        return self.router != "random" and not self.prompts


def mixture(params: Any, names: Sequence[str], seed: int) -> dict[str, Any]:
    """What the pool makes its models one by: `pool.mixture`.

    Args:
        params: Of one of the methods.
        names: The pool's models.
        seed: Of the random router.

    Raises:
        ValueError: Tokens are sent to more experts than there are, or the prompts are not those of the experts.
    """
    shared = {"top_k": params.top_k, "std": params.router_std, "seed": seed}
    if isinstance(params, MoeUpscalingParams):
        return {"experts": [names[0]] * params.experts, "rest": "mean", **shared}
    if params.top_k > len(names):
        raise ValueError(f"top_k={params.top_k} sends a token to more experts than there are, {len(names)}")
    if params.prompts and (set(params.prompts) != set(names) or not all(params.prompts.values())):
        raise ValueError(f"prompts are texts for {', '.join(params.prompts)}; give some for each of {', '.join(names)}")
    return {"experts": list(names), "rest": params.rest, **shared}


def moe_upscaling(base: torch.Tensor | None, experts: torch.Tensor, params: Any) -> torch.Tensor:
    """The tensor of the mixture, the mean where there are several, (T, *shape) -> (*shape); copies give it exactly."""
    if len(experts) == 1:
        return experts[0].clone()
    return (experts - experts[:1]).mean(0).add_(experts[0])
