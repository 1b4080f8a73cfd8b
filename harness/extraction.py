"""The adapter between two checkpoints (`crucible extract-lora`)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from harness.direct import tracked_place
from harness.factors import Found, checked, module_paths
from methods.low_rank import approximate
from pools.adapter_files import write_adapter
from pools.checkpoint import Checkpoint
from pools.faults import header_faults, specs_of
from pools.headers import CheckpointError
from pools.locate import locate
from pools.lora import LINEAR, TRANSPOSED
from pools.roles import NamedRoles

_TRANSPOSED = (
    "gpt2",
    "openai-gpt",
    "imagegpt",
    "decision_transformer",
)  # model types whose layers are stored (in, out)
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}  # how an architecture's name ends -> peft's word for its task


def extract_lora(
    base: str, tuned: str, output: Path, rank: int | None, energy: float | None, save_rest: bool = False
) -> dict[str, Any]:
    """Write the adapter that is nearest to a fine-tuned model: the best approximation of each linear layer's change.

    Args:
        base: A member as `pools.locate.locate` takes it.
        tuned: Likewise: the same model, fine-tuned.
        output: The adapter's directory; must not exist yet, or be empty.
        rank: Of each matrix; or
        energy: the share of each matrix's squared norm to keep, in (0, 1].
        save_rest: Put embeddings, norms and biases that changed into the adapter whole; otherwise they are left out,
            and named.

    Returns:
        Facts: as `harness.adapters.merge_adapters`, and `left_out`: name -> its share of the squared change of all.

    Raises:
        CheckpointError: The checkpoints cannot be opened or differ in names or shapes, nothing but what cannot be held
            changed, or the adapter cannot be written.
        MergeError: Neither rank nor energy, both, or one out of range.
    """
    checked(rank, energy, needed=True)
    members = {"base": _opened(base), "tuned": _opened(tuned)}
    faults = header_faults(members["base"], {"tuned": members["tuned"]})
    if faults:
        raise CheckpointError("\n".join(faults))
    config = _config(members["base"].path)
    found, rest = _compared(
        members, NamedRoles(specs_of(members["base"]), config.get("model_type") in _TRANSPOSED), rank, energy
    )
    if save_rest:
        found.whole = _whole(members["tuned"], rest, found)
    total = math.fsum([*(square for square, _ in found.squares.values()), *rest.values()])
    left_out = {name: square / total for name, square in rest.items() if name not in found.whole}
    facts = found.facts() | {"left_out": dict(sorted(left_out.items(), key=lambda item: -item[1]))}
    files = write_adapter(
        Path(output),
        found.modules.values(),
        found.whole,
        module_paths(specs_of(members["base"])),
        base=base,
        task_type=_task(config),
        lineage={
            "method": "extract-lora",
            "params": {"rank": rank, "energy": energy, "save_rest": save_rest},
            "members": {name: (member.source, member.fingerprint) for name, member in members.items()},
            "relative_error": facts["relative_error"],
            "left_out": facts["left_out"],
        },
    )
    return facts | {"files": files}


def _opened(member: str) -> Checkpoint:
    """A checkpoint with full weights."""
    path = locate(member, resolve=tracked_place)
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(f"{member} is an adapter already; name full checkpoints")
    return Checkpoint(path, member)


def _compared(
    members: Mapping[str, Checkpoint], roles: NamedRoles, rank: int | None, energy: float | None
) -> tuple[Found, dict[str, float]]:
    """Factors of each linear layer's change; squared changes of the other tensors that changed."""
    base, tuned = members["base"], members["tuned"]
    found, rest = Found(), {}
    for name in tqdm(base, desc="extracting", unit="tensor", disable=None):
        if roles.is_buffer(name) or not base.dtypes[name].is_floating_point:
            continue
        delta = tuned[name].float() - base[name].float()
        if not torch.isfinite(delta).all():
            raise CheckpointError(f"{name} has NaN or infinite weights in {base.source} or {tuned.source}")
        if not delta.any():
            continue
        transposed = roles.is_transposed(name)
        if transposed or roles.is_linear(name):
            kind = TRANSPOSED if transposed else LINEAR
            path = name.rpartition(".")[0]
            found.add(name, path, kind, tuple(delta.shape), approximate(delta, rank, energy))
        else:
            rest[name] = float(delta.double().square().sum())
    return found, rest


def _whole(tuned: Checkpoint, rest: Mapping[str, float], found: Found) -> dict[str, torch.Tensor]:
    """The tensors that changed, with all of their modules', or alone where they are the bias of a layer with factors.

    Raises:
        CheckpointError: A tensor is neither: peft saves modules, and biases of those it adapts.
    """
    adapted = {module.path for module in found.modules.values()}
    whole: dict[str, torch.Tensor] = {}
    for name in rest:
        path, _, leaf = name.rpartition(".")
        if not path or (path in adapted and leaf != "bias"):
            raise CheckpointError(
                f"{name} changed, and peft's layout cannot hold it; leave it out with save_rest=false"
            )
        mates = [name] if path in adapted else [other for other in tuned if other.rpartition(".")[0] == path]
        whole |= {mate: tuned[mate] for mate in mates}
    return whole


def _config(path: Path) -> dict[str, Any]:
    """`config.json` beside the base's weights, where there is one."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    return config if isinstance(config, dict) else {}


def _task(config: Mapping[str, Any]) -> str | None:
    """What the model is for, in peft's words; None where its architecture does not tell."""
    names = config.get("architectures") or [""]
    return next((task for end, task in _TASKS.items() if str(names[0]).endswith(end)), None)
