"""Inputs of experts by the router's share, against the model's own modules taken apart by hand; MoE-Pruner on them."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig, set_seed

from harness.examples import Texts
from harness.execute import launch
from harness.inputs import Inputs, MergeError
from harness.layerwise import merged_by_layers
from harness.merge import Merge
from harness.routed_inputs import routed_squares
from methods.catalogue import find
from pools.checkpoint import Checkpoint
from pools.open import open_pool
from tests.harness.test_language_run import settings
from tests.pools.language_models import VOCABULARY, write_tokenizer

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "intermediate_size": 24,
}  # fmt: skip
QWEN = {"num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 12}
KINDS = {"mixtral": MixtralConfig(**SIZES, num_local_experts=4), "qwen2_moe": Qwen2MoeConfig(**SIZES, **QWEN)}
NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
ROWS = ["the quick brown fox", "jumps", "over the dog"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixtures")
    for kind, config in KINDS.items():
        set_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight.normal_()
        model.save_pretrained(root / kind)
        write_tokenizer(root / kind)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand(place: Path, kind: str) -> None:
    """Token by token, expert by expert, whatever the batches; attention's inputs are plain, and only what is wanted."""
    pool = open_pool("causal_lm", str(place / kind), {})
    module, texts, fabric = pool.module(), Texts("perplexity", ROWS, pool, range(3)), launch("cpu", 1, "32-true", 0)
    inputs = {key: value for key, value in pool.feed(ROWS).items() if key != "labels"}
    read, seen = inputs["attention_mask"].bool(), {}
    block = module.model.layers[1].mlp
    hooks = [
        part.register_forward_pre_hook(lambda part, given, name=name: seen.update({name: given[0][read]}))
        for name, part in (("block", block), ("q", module.model.layers[1].self_attn.q_proj))
    ]
    with torch.no_grad():
        module(**inputs)
    for hook in hooks:
        hook.remove()
    own = Checkpoint(place / kind)
    inner, first, second, last = NAMES[kind]
    path = f"model.layers.1.{inner}"
    enter, between = torch.zeros(4, 16), torch.zeros(4, 8 if kind == "qwen2_moe" else 24)
    for token in seen["block"]:
        shares = (own[f"{path}.gate.weight"] @ token).softmax(0)
        best = shares.topk(2)
        scale = best.values.sum() if kind == "mixtral" else 1.0
        for expert in best.indices.tolist():
            gate, up = (own[f"{path}.experts.{expert}.{part}.weight"] @ token for part in (first, second))
            enter[expert] += (token * shares[expert] / scale).square()
            between[expert] += (nn.functional.silu(gate) * up * shares[expert] / scale).square()
    n = len(seen["block"])
    for size in (1, 3):
        found = routed_squares(fabric, module, texts, size, lambda name: "self_attn" in name or "experts" in name)
        for expert in range(4):
            for part, expected in ((first, enter), (second, enter), (last, between)):
                torch.testing.assert_close(found[f"{path}.experts.{expert}.{part}.weight"], expected[expert] / n)
        expected = seen["q"].square().mean(0)
        torch.testing.assert_close(found["model.layers.1.self_attn.q_proj.weight"], expected)
        assert f"{path}.gate.weight" not in found
        assert not any("shared" in name for name in found)


def test_what_is_no_mixture_is_named() -> None:
    with pytest.raises(MergeError, match="a Linear has none; such are mixtral, qwen2_moe, qwen3_moe"):
        routed_squares(launch("cpu", 1, "32-true", 0), nn.Linear(2, 2), [], 1, lambda name: True)


def test_wanda_does_not_know_inputs_of_experts(place: Path) -> None:
    """transformers keeps all experts of a layer in one tensor, which no linear layer multiplies by."""
    pool, row = open_pool("causal_lm", None, {"one": str(place / "mixtral")}), find("wanda")
    asked = Merge(row, row.load_params()(), Inputs(None, pool.experts, pool.roles))
    said = r"this MixtralForCausalLM keeps .*block_sparse_moe.* in tensors of other names; .* pruned by moe_pruner"
    with pytest.raises(MergeError, match=said):
        merged_by_layers(asked, pool.module(pool.experts["one"]), pytest.fail)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_prunes_experts_alone(place: Path, tmp_path: Path, build_workplace, kind: str) -> None:
    columns = {"prompt": ["1+1=", "12+3="], "target": ["2", "15"]}
    data = settings(tmp_path / "data", "exact_match", columns, max_new_tokens=2)
    pool = {"family": "causal_lm", "base": None, "experts": {"one": kind}, "root": str(place)}
    work = build_workplace(tmp_path / "work", pool)
    (work.directory / "tasks.yaml").write_text(yaml.safe_dump({"tasks": {"one": data}}))
    out = tmp_path / "out"
    outcome = work.run("method=moe_pruner", "method.n=2", "evaluation.plots=false", f"output={out}")
    with work.entered():
        metrics = mlflow.get_run(outcome.run_id).data.metrics
    assert metrics["prune/sparsity"] == 0.5
    before, after = Checkpoint(place / kind), Checkpoint(out)
    for name in before:
        assert torch.equal(before[name], after[name]) != (".experts." in name), name
