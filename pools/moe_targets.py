"""Which mixtures of experts transformers knows, what their tensors are called, and which dense models become them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PLAIN = ("gate_proj", "down_proj", "up_proj")  # parts of a dense block, called the same in an expert


@dataclass(frozen=True)
class Target:
    """A mixture of experts as it stands on the disk."""

    model_type: str
    architecture: str
    block: str  # of a layer, what holds router and experts
    parts: Mapping[str, str]  # of a dense block -> of an expert
    count: str  # key of config.json: experts of a layer
    rest: str  # besides weights of norms, attention, embeddings and head: a pattern of more names within a layer
    settings: Mapping[str, Any]  # of config.json, so that a mixture of copies is the dense model
    shared: bool = False  # every layer has an expert that all tokens are sent to as well

    def fits(self, name: str) -> bool:
        """Whether a tensor of a dense model, no part of a feed-forward block, has a place in the mixture."""
        usual = r"(self_attn\.[qkvo]_proj|input_layernorm|post_attention_layernorm)\.weight"
        inside = rf"layers\.\d+\.({usual}{'|' + self.rest if self.rest else ''})"
        return bool(re.fullmatch(rf"(model\.)?((embed_tokens|norm)\.weight|{inside})|lm_head\.weight", name))


MIXTRAL = Target(
    "mixtral", "MixtralForCausalLM", "block_sparse_moe", {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    "num_local_experts", "", {},
)  # fmt: skip
QWEN2_MOE = Target(
    "qwen2_moe", "Qwen2MoeForCausalLM", "mlp", dict(zip(_PLAIN, _PLAIN, strict=True)), "num_experts",
    r"self_attn\.[qkv]_proj\.bias", {"norm_topk_prob": True, "shared_expert_intermediate_size": 1}, shared=True,
)  # fmt: skip
QWEN3_MOE = Target(
    "qwen3_moe", "Qwen3MoeForCausalLM", "mlp", dict(zip(_PLAIN, _PLAIN, strict=True)), "num_experts",
    r"self_attn\.([qkvo]_proj\.bias|[qk]_norm\.weight)", {"norm_topk_prob": True},
)  # fmt: skip
MIXTURES = {target.model_type: target for target in (MIXTRAL, QWEN2_MOE, QWEN3_MOE)}
# Model types that compute what the mixture does around its feed-forward blocks.
TARGETS = {"llama": MIXTRAL, "mistral": MIXTRAL, "qwen2": QWEN2_MOE, "qwen3": QWEN3_MOE}


def config_of_mixture(config: Mapping[str, Any], n_experts: int, top_k: int) -> dict[str, Any]:
    """The mixture's config.json from a dense model's: what this leaves to its model type's defaults is written out."""
    from transformers import AutoConfig

    target = TARGETS[str(config["model_type"])]
    full = AutoConfig.for_model(**config).to_dict()
    known = AutoConfig.for_model(target.model_type).to_dict().keys() | {"head_dim", "sliding_window"}
    found = {key: value for key, value in full.items() if key in known} | {
        "model_type": target.model_type,
        "architectures": [target.architecture],
        target.count: n_experts,
        "num_experts_per_tok": top_k,
        "sliding_window": full.get("sliding_window"),
        **target.settings,
    }
    if target.block == "mlp":
        found |= {"moe_intermediate_size": full["intermediate_size"], "decoder_sparse_step": 1, "mlp_only_layers": []}
    return found
