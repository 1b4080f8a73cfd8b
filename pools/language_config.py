"""What config.json tells of a language model before anything is read or imported: sizes, quantisation, own code."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pools.faults import Spec
from pools.headers import CheckpointError

CONFIG = "config.json"
# Keys whose difference makes a weight mean something else, whatever the shapes.
_STRUCTURE = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "n_embd", "n_layer", "n_head", "n_inner", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers",
    "num_heads", "encoder_layers", "decoder_layers", "num_local_experts", "num_experts", "num_experts_per_tok",
    "hidden_act", "hidden_activation", "activation_function", "feed_forward_proj", "position_embedding_type",
    "relative_attention_num_buckets", "scale_attn_weights", "parallel_attn", "use_parallel_residual",
)  # fmt: skip
# Keys whose difference moves the function gently: models for longer contexts are merged with what they came from.
_GENTLE = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "sliding_window", "use_sliding_window",
    "partial_rotary_factor", "rotary_pct", "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar",
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "logit_scale",
    "tie_word_embeddings",
)  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
_PACKED = {  # how quantised tensors are called -> by what
    "SCB": "bitsandbytes int8",
    "absmax": "bitsandbytes 4-bit",
    "quant_map": "bitsandbytes 4-bit",
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale": "compressed-tensors or FP8",
    "weight_scale_inv": "FP8 in blocks",
}
_MXFP4 = re.compile(r"_(blocks|scales)$")


def read_config(directory: Path) -> dict[str, Any] | None:
    """The content of config.json; None if there is none.

    Raises:
        CheckpointError: It cannot be read.
    """
    file = directory / CONFIG
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}, which says what the model is built like, cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is no configuration of a model: it holds a {type(content).__name__}")
    return content


def quantised(config: Mapping[str, Any], specs: Mapping[str, Spec]) -> str | None:
    """How a checkpoint is quantised, in words, or None; from config.json, and names and dtypes of the tensors."""
    told = config.get("quantization_config") or config.get("compression_config")
    if isinstance(told, Mapping):
        bits = next((f", {told[key]} bits" for key in ("bits", "w_bit") if key in told), "")
        bits = next((f", {n} bits" for n in (4, 8) if told.get(f"load_in_{n}bit")), bits)
        return f"{told.get('quant_method', 'an unnamed method')}{bits} (quantization_config in {CONFIG})"
    for name, spec in specs.items():
        leaf = name.rpartition(".")[2]
        narrow = str(spec.dtype).removeprefix("torch.") in ("int8", "uint8", "float8_e4m3fn", "float8_e5m2")
        if leaf in _PACKED:
            return f"{_PACKED[leaf]} (it has {name})"
        if _MXFP4.search(name) and narrow:
            return f"MXFP4 (it has {name})"
        if narrow and len(spec.shape) > 1:
            return f"{spec.dtype} weights (it has {name})"
    return None


def member_faults(
    source: str, config: Mapping[str, Any] | None, specs: Mapping[str, Spec], trust_remote_code: bool
) -> list[str]:
    """Why one member cannot be merged whatever the others are: it is quantised, or needs code of its own."""
    how = quantised(config or {}, specs)
    faults = []
    if how is not None:
        faults.append(
            f"{source} is quantised: {how}; packed numbers cannot be merged. Name the model it was made from, or write "
            "one that is not quantised (transformers: from_pretrained, dequantize(), save_pretrained)"
        )
    if config and config.get("auto_map") and not trust_remote_code and not is_native(str(config.get("model_type"))):
        faults.append(
            f"{source} needs code of its own to run (auto_map in {CONFIG}, model_type {config.get('model_type')!r}); "
            "look at the code, and set pool.trust_remote_code=true if it may run"
        )
    return faults


@cache
def is_native(model_type: str) -> bool:
    """Whether the installed transformers has a model type; found without importing it."""
    found = importlib.util.find_spec("transformers")
    places = list(found.submodule_search_locations or ()) if found else []
    quoted = f'"{model_type}"'
    for place in places:
        for file in sorted((Path(place) / "models" / "auto").glob("*.py")):
            if re.search(rf"^\s*\(?{re.escape(quoted)}\s*[,:]", file.read_text(encoding="utf-8"), re.MULTILINE):
                return True
    return False


def config_faults(
    member: str, config: Mapping[str, Any], reference: Mapping[str, Any], whose: str, restacked: bool = False
) -> tuple[list[str], list[str]]:
    """How a member's configuration differs from the reference's: what forbids a merge, and what is worth knowing.

    Args:
        member: What to call it.
        config: Its config.json.
        reference: The base's, or without one the first expert's.
        whose: What to call the reference.
        restacked: Layers are stacked anew, so that depths may differ.
    """
    mine, theirs = dict(_flat(config)), dict(_flat(reference))
    if mine.get("model_type") != theirs.get("model_type"):
        told = f"{mine.get('model_type')!r}, where {whose} is of {theirs.get('model_type')!r}"
        return [f"{member} is of the model_type {told}: weights of different architectures cannot be merged"], []
    faults = [
        f"{member} has {key}={mine[key]!r} in {CONFIG}, where {whose} has {theirs[key]!r}"
        for key in mine
        if key in theirs and mine[key] != theirs[key] and key.rpartition(".")[2] in _STRUCTURE
        and not (restacked and key.rpartition(".")[2] in _LAYERS)
    ]  # fmt: skip
    notes = [
        f"{member} was trained with {key}={mine[key]!r}, {whose} with {theirs[key]!r}; the merged model has the latter"
        for key in mine
        if key in theirs and mine[key] != theirs[key] and key.rpartition(".")[2] in (*_GENTLE, "rope")
    ]
    return faults, notes


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values, those of nested models as `text_config.hidden_size`; rotary settings under one name."""
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
    rope = _rope(config)
    if rope:
        yield f"{prefix}rope", rope


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, however the version of transformers wrote them.

    >>> _rope({"rope_theta": 1e4, "rope_scaling": None}) == _rope({"rope_parameters": {"rope_theta": 1e4}})
    True
    """
    new = config.get("rope_parameters")
    if isinstance(new, Mapping):
        return {"rope_type": "default"} | dict(new)
    if "rope_theta" not in config:
        return {}
    old = dict(config.get("rope_scaling") or {})
    kind = old.pop("type", old.get("rope_type", "default"))
    return {"rope_type": kind, "rope_theta": config["rope_theta"]} | old
