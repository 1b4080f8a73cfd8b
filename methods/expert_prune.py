"""Expert pruning: each layer of a mixture of experts keeps the experts whose output is nearest to that of all of them.

Source: Lu et al. 2024, arXiv:2402.14800, section 3.2 (layer-wise: every choice of experts is tried); `use` keeps those
that most tokens are sent to, the paper's baseline by frequency. `progressive` is that of the authors' code, and of
FusionBench's.
Differs: checkpoints of transformers' Mixtral, Qwen2-MoE and Qwen3-MoE, where the peers know Mixtral; the router's rows
of the other experts go with them, a shared expert stays. Texts are given, or the inputs of the model's own task. No
expert is skipped at run time (section 3.3): that takes code beside the checkpoint.
Formula: argmin over sets C of `keep` experts of sum_x ||y(x) - y_C(x')||^2, y_C(x) = sum over the top_k e in C of
share_e MLP_e(x), shares softmax(R x) over C, of Mixtral always divided by the top_k's sum; x' = x, the layer's inputs
in the unpruned model, with progressive those behind layers that are pruned already
Cost: O(N (E n + binomial(E, keep) top_k d)) time for N tokens of d numbers in each layer, N E d numbers; one model in
memory and a forward pass of all texts, with progressive one more for each layer
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from methods.lazy import torch
from methods.parameters import at_least, one_of

_MOST = 20_000  # choices of experts that are tried


@dataclass(frozen=True)
class ExpertPruneParams:
    """Parameters of `expert_prune`; also the schema of conf/method/expert_prune.yaml."""

    keep: int = 4  # experts of each layer that are kept, as many as a token is sent to at least
    by: str = field(default="reconstruction", metadata={"words": ("reconstruction", "use")})  # how they are chosen
    progressive: bool = False  # a layer is judged behind the pruned ones before it; false: in the unpruned model
    # What the layers are judged on; where there are none, the inputs of the task that is called as the model is.
    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        at_least("keep", self.keep, 1)
        one_of("by", self.by, ("reconstruction", "use"))

    @property
    def from_tasks(self) -> bool:
        """Whether the model's own task is read."""
        return not self.texts


def mixture(params: ExpertPruneParams, names: Sequence[str], seed: int) -> dict[str, Any]:
    """What is asked of the pool: `keep`; which experts these are shows when the model has been fed."""
    return {"keep": params.keep}


def chosen(
    logits: torch.Tensor,
    outputs: torch.Tensor,
    top_k: int,
    params: ExpertPruneParams,
    divided: bool = True,
    aim: torch.Tensor | None = None,
) -> list[int]:
    """The experts of one layer that are kept, rising.

    Args:
        logits: The router's, (N, E).
        outputs: What every expert makes of every token, (N, E, d).
        top_k: Experts that a token is sent to.
        params: Of the method.
        divided: Shares of the experts that a token is sent to are divided by their sum.
        aim: What the layer is to make of every token, (N, d); by default, what all its experts make of it.

    Raises:
        ValueError: There are fewer experts than are to be kept, a token is sent to more, or there are too many choices.
    """
    n_experts = logits.shape[1]
    if not top_k <= params.keep <= n_experts:
        raise ValueError(
            f"keep must be from {top_k}, experts that a token is sent to, to {n_experts}, got {params.keep}"
        )
    if params.by == "use":
        uses = torch.bincount(logits.topk(top_k, dim=1).indices.flatten(), minlength=n_experts)
        return sorted(uses.sort(descending=True, stable=True).indices[: params.keep].tolist())
    if math.comb(n_experts, params.keep) > _MOST:
        raise ValueError(
            f"{params.keep} of {n_experts} experts can be chosen in {math.comb(n_experts, params.keep):,} ways, of "
            f"which at most {_MOST:,} are tried; set by=use"
        )
    whole = mixed(logits, outputs, range(n_experts), top_k, divided) if aim is None else aim
    sets = itertools.combinations(range(n_experts), params.keep)
    best = min(sets, key=lambda own: float((mixed(logits, outputs, own, top_k, divided) - whole).square().sum()))
    return list(best)


def sent(
    logits: torch.Tensor, experts: Sequence[int], top_k: int, divided: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares and numbers of the experts that tokens are sent to, of some: logits (N, E) -> (N, top_k) each."""
    own = torch.tensor(list(experts), device=logits.device)
    shares, places = torch.softmax(logits[:, own], dim=1).topk(top_k, dim=1)
    return shares / shares.sum(1, keepdim=True) if divided else shares, own[places]


def mixed(
    logits: torch.Tensor, outputs: torch.Tensor, experts: Sequence[int], top_k: int, divided: bool = True
) -> torch.Tensor:
    """What a layer with some of the experts makes of tokens: logits (N, E), outputs (N, E, d) -> (N, d)."""
    shares, places = sent(logits, experts, top_k, divided)
    taken = outputs.gather(1, places[..., None].expand(-1, -1, outputs.shape[2]))
    return (shares[..., None] * taken).sum(1)


def expert_prune(base: torch.Tensor | None, experts: torch.Tensor, params: ExpertPruneParams) -> torch.Tensor:
    """A tensor of the one model, which the pool has thinned out, (1, *shape) -> (*shape)."""
    return experts[0].clone()
