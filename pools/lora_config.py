"""The configuration of a LoRA adapter: which kinds are read, and how much each module's change counts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pools.headers import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_INSTEAD = "merge it into its base with peft first"
_REFUSED = {
    "use_qalora": "QA-LoRA pools the inputs of quantised groups",
    "use_bdlora": "block-diagonal LoRA has factors of another form",
    "alora_invocation_tokens": "activated LoRA applies to some tokens only, so that no merged weights exist",
    "arrow_config": "Arrow chooses among adapters for each token, so that no merged weights exist",
    "kasa_config": "KaSA changes the base's own weights",
    "monteclora_config": "MonteCLoRA samples its factors",
    "target_parameters": "LoRA on bare parameters (mixtures of experts) has factors of another form",
    "trainable_token_indices": "single tokens were trained besides the factors",
    "layer_replication": "layers of the base are repeated",
}
_OWN_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # initialisations that take a part out of the base's weights


def is_adapter(path: Path) -> bool:
    """Whether a path is the directory of an adapter in peft's layout."""
    return (Path(path) / CONFIG).is_file()


def read_config(path: Path) -> dict[str, Any]:
    """The adapter's configuration.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / CONFIG} is no configuration of an adapter: it holds a {type(config).__name__}")
    return config


def config_faults(config: Mapping[str, Any]) -> list[str]:
    """Kinds of adapter whose change of the weights is not scale * B A on the base's own weights."""
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"its kind (peft_type) is {kind}, and only LORA, with rsLoRA and DoRA, is read; {_INSTEAD}"]
    faults = [f"{key} is set: {why}; {_INSTEAD}" for key, why in _REFUSED.items() if config.get(key)]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_OWN_BASE):
        faults.append(
            f"init_lora_weights is {init}, which changes the base's weights too, and they are not among the files; "
            "save it with peft's path_initial_model_for_weight_conversion, which makes it an adapter of the base itself"
        )
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        faults.append(f"r, the rank, is {r!r}, not a whole number above zero")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        faults.append(f"lora_alpha is {alpha!r}, not a number")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or {}:
            try:
                re.compile(pattern)
            except re.error as error:
                faults.append(f"{key} has {pattern!r}, which is no regular expression: {error}")
    return faults


def scaling_of(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and scaling of a module: alpha / r, or alpha / sqrt(r) of rsLoRA, each with its pattern."""
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that fits the module's path or the end of it."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
