"""Models made of several: their outputs combined, or their weights merged anew for each example.

What scorers ask of a language model besides its outputs (configuration, device, greedy continuations) they answer too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from methods.mixed_linear import low_rank
from methods.routed import Parts, Router
from methods.selection import count_kept

Outputs = Any  # embeddings (B, D), or a language model's output, of which the logits count


def combined(outputs: Sequence[Outputs], combine: Callable[[Sequence[torch.Tensor]], Any]) -> Any:
    """Tensors combined, or the outputs' logits, as an output of the same class."""
    if isinstance(outputs[0], torch.Tensor):
        return combine(outputs)
    return type(outputs[0])(logits=combine([output.logits for output in outputs]))


class Largest:
    """Embeddings of several models; `@ head` gives of each logit the largest."""

    def __init__(self, embeddings: Sequence[torch.Tensor]) -> None:
        self.embeddings = torch.stack(list(embeddings))  # (T, B, D)

    def __matmul__(self, head: torch.Tensor) -> torch.Tensor:
        """(D, K) -> logits (B, K)."""
        return (self.embeddings @ head).amax(0)


class Made(nn.Module):
    """A module around models, the first of which tells what a scorer wants to know of a language model."""

    def headed(self) -> list[Any]:
        """The models that are given a classifier's head."""
        raise NotImplementedError

    @property
    def config(self) -> Any:
        """The configuration of a language model."""
        return self.headed()[0].config

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.parameters()).device


class Ensemble(Made):
    """Several models' outputs: `mean`, each multiplied by its weight, or `max`, of each logit the largest."""

    weights: torch.Tensor

    def __init__(self, experts: Sequence[nn.Module], how: str = "mean", weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.experts, self.how = nn.ModuleList(experts), how
        given = [1 / len(experts)] * len(experts) if weights is None else list(weights)
        self.register_buffer("weights", torch.tensor(given), persistent=False)
        self.requires_grad_(False)

    def headed(self) -> list[Any]:
        """All of them."""
        return list(self.experts)

    def forward(self, **inputs: Any) -> Any:
        """Every expert's output -> one."""
        return combined([expert(**inputs) for expert in self.experts], self._combine)

    def _combine(self, outputs: Sequence[torch.Tensor]) -> Any:
        if self.how == "max":
            return torch.stack(list(outputs)).amax(0) if outputs[0].dim() > 2 or self._classifies else Largest(outputs)
        return torch.tensordot(self.weights, torch.stack(list(outputs)).to(self.weights), dims=1)

    @property
    def _classifies(self) -> bool:
        """Whether outputs are logits already."""
        return hasattr(self.experts[0], "config")

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generation_config: Any,
        stopping_criteria: Sequence[Callable[..., torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """Greedy continuations of prompts (B, L) that are padded on the left, every token by all experts.

        Returns:
            Token ids (B, L + n) of prompts and continuations; of encoder and decoder the decoder's (B, 1 + n).
        """
        settings, answers = generation_config, self.config.is_encoder_decoder
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        ids = torch.full_like(input_ids[:, :1], settings.decoder_start_token_id) if answers else input_ids
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for step in range(settings.max_new_tokens):
            if answers:
                inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": ids}
            else:
                mask = torch.cat([attention_mask, torch.ones_like(ids[:, attention_mask.shape[1] :])], 1)
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            token = self(**inputs, use_cache=False).logits[:, -1].argmax(-1)
            if answers and step == 0 and getattr(settings, "forced_bos_token_id", None) is not None:
                token = torch.full_like(token, settings.forced_bos_token_id)
            token = torch.where(done, settings.pad_token_id, token)
            ids = torch.cat([ids, token[:, None]], 1)
            done = done | torch.isin(token, torch.tensor([end for end in ends if end is not None], device=ids.device))
            for stops in stopping_criteria or ():
                done = done | stops(ids, None)
            if bool(done.all()):
                break
        return ids


class Change(nn.Module):
    """What the experts change of one parameter: as it is, or of a matrix the first singular directions."""

    def __init__(self, deltas: torch.Tensor, density: float = 1.0) -> None:
        """Take (T, *shape), and the share of its singular directions that a matrix keeps."""
        super().__init__()
        if deltas.dim() == 3 and density < 1:
            left, right = low_rank(deltas, count_kept(density, min(deltas.shape[1:])))
            self.left = nn.Parameter(left, requires_grad=False)
            self.right = nn.Parameter(right, requires_grad=False)
        else:
            self.deltas = nn.Parameter(deltas, requires_grad=False)

    def mixed(self, gates: torch.Tensor) -> torch.Tensor:
        """(T,) -> (*shape)."""
        if hasattr(self, "deltas"):
            return torch.tensordot(gates, self.deltas, dims=1)
        scaled = self.left * gates[:, None, None]
        return scaled.transpose(0, 1).flatten(1) @ self.right.flatten(0, 1)


class PerExample(Made):
    """One model, whose weights are merged for each example by gates of its own: body + sum_i gate_i change_i."""

    def __init__(self, body: nn.Module, changes: Mapping[str, Change], router: Router, roles: Parts) -> None:
        """Put it together.

        Args:
            body: The model that is changed; the router looks at its features of an input.
            changes: By the parameters' names in the body.
            router: Features (B, F) to gates (B, T).
            roles: How features come out.
        """
        super().__init__()
        self.body, self.router = body.requires_grad_(False), router
        self.changes: Any = nn.ModuleList(changes.values())
        self._names, self._features = tuple(changes), roles.features

    def headed(self) -> list[Any]:
        """The one model."""
        return [self.body]

    def forward(self, **inputs: Any) -> Outputs:
        """B examples -> their outputs, each of weights of its own."""
        gates = self.gates(inputs)
        outputs = [
            functional_call(self.body, self.weights(own), (), _row(inputs, index)) for index, own in enumerate(gates)
        ]
        return combined(outputs, lambda parts: torch.cat(list(parts)))

    def gates(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Mixing coefficients of each example, (B, T)."""
        return self.router.note(self.router(self.read(inputs)))

    @torch.no_grad()
    def read(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Features of each example, (B, F)."""
        return self._features(self.body, inputs)

    def weights(self, gates: torch.Tensor) -> dict[str, torch.Tensor]:
        """The merged parameters, by name, of gates (T,)."""
        own = dict(self.body.named_parameters())
        return {name: own[name] + change.mixed(gates) for name, change in zip(self._names, self.changes, strict=True)}

    @torch.no_grad()
    def generate(self, generation_config: Any, **inputs: Any) -> torch.Tensor:
        """Greedy continuations, row by row, each by weights merged for its prompt."""
        stops = inputs.pop("stopping_criteria", None)
        rows = []
        for index, own in enumerate(self.gates(inputs)):
            with _holding(self.body, self.weights(own)):
                body: Any = self.body
                rows.append(
                    body.generate(**_row(inputs, index), generation_config=generation_config, stopping_criteria=stops)[
                        0
                    ]
                )
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=generation_config.pad_token_id)


def _row(inputs: Mapping[str, Any], index: int) -> dict[str, Any]:
    """One example's inputs; what is no tensor is for all."""
    return {
        key: value[index : index + 1] if isinstance(value, torch.Tensor) else value for key, value in inputs.items()
    }


@contextmanager
def _holding(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """A module with other weights for a while."""
    own = dict(module.named_parameters())
    before = {name: own[name].data for name in weights}
    try:
        for name, weight in weights.items():
            own[name].data = weight
        yield
    finally:
        for name, weight in before.items():
            own[name].data = weight


def changes_of(body: nn.Module, experts: Sequence[nn.Module], roles: Parts, density: float = 1.0) -> dict[str, Change]:
    """What the experts change of every parameter of a body that is merged."""
    theirs = [dict(expert.named_parameters()) for expert in experts]
    return {
        name: Change(torch.stack([own[name].detach() - parameter.detach() for own in theirs]), density)
        for name, parameter in body.named_parameters()
        if roles.is_merged(name)
    }


def routing(
    module: nn.Module,
    experts: Sequence[str],
    total: Callable[[torch.Tensor], torch.Tensor] = lambda counts: counts,
) -> list[dict[str, Any]]:
    """What each router of a module has answered since it was asked last: a row for each expert.

    Args:
        module: Any.
        experts: Names.
        total: Sums over processes that each hold the module.

    Returns:
        `router` (path), `expert`, `mean` (of its gates over examples), `first` (share of examples in which its gate is
        the largest) and `examples`.
    """
    rows = []
    for path, router in module.named_modules():
        if not isinstance(router, Router):
            continue
        counts = total(torch.cat([torch.tensor([float(router.n)]), router.sums, router.wins])).tolist()
        router.forget()
        n, sums, wins = counts[0], counts[1 : 1 + router.n_experts], counts[1 + router.n_experts :]
        for name, gates, won in zip(experts, sums, wins, strict=True):
            if n:
                rows.append({"expert": name, "mean": gates / n, "first": won / n, "examples": int(n), "router": path})
    return rows


def fix_gates(module: nn.Module, gates: Sequence[float] | None) -> None:
    """Have every router answer the same whatever comes, one number for each expert; None sets them free again.

    Raises:
        ValueError: A router was made for more experts, or for fewer.
    """
    for router in module.modules():
        if isinstance(router, Router):
            router.fixed = None
            if gates is not None:
                if len(gates) != router.n_experts:
                    raise ValueError(f"the router was made for {router.n_experts} experts, got {len(gates)} gates")
                n_each = router.n_gates // router.n_experts
                router.fixed = torch.tensor(gates).repeat_interleave(n_each)
