"""Mixtures of experts with fewer of them: what is written is a Mixtral that transformers opens and runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig, set_seed

from harness.compose import compose
from harness.config import UserError
from harness.direct import look, merge_only
from pools.checkpoint import Checkpoint
from pools.headers import CheckpointError
from pools.open import open_pool
from pools.thinned import mixtures, thin
from tests.harness.test_language_run import settings
from tests.pools.language_models import VOCABULARY, write_model, write_tokenizer

TOKENS = torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
TEXTS = "method.texts=[the quick brown fox,jumps over]"


SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "intermediate_size": 24,
}  # fmt: skip
QWEN = {"num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
KINDS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **QWEN, shared_expert_intermediate_size=12),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **QWEN, norm_topk_prob=True, mlp_only_layers=[]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtures of four experts that are told apart, by their kinds, and `dense`, which has none."""
    root = tmp_path_factory.mktemp("mixtures")
    for kind, config in KINDS.items():
        set_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight.normal_()
                layer.mlp.experts.gate_up_proj.mul_(20)
                layer.mlp.experts.down_proj.mul_(20)
        model.save_pretrained(root / kind)
        write_tokenizer(root / kind)
    write_model(root / "dense", "llama")
    return root


def pruned(place: Path, out: Path, *more: str, model: str = "mixtral") -> dict:
    given = [f"+pool.experts.one={place / model}", "method=expert_prune", TEXTS, f"output={out}"]
    merge_only(compose(["pool=causal_lm", *given, *more]))
    return json.loads((out / "config.json").read_text())


def model_at(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_all_kept_is_the_same_model(place: Path, tmp_path: Path, kind: str) -> None:
    config = pruned(place, tmp_path / "out", model=kind)
    assert [config[key] for key in ("num_local_experts", "num_experts") if key in config] == [4]
    torch.testing.assert_close(logits(model_at(tmp_path / "out")), logits(model_at(place / kind)))


def dropped(whole, kept: list[list[int]]):
    """By hand: routers send tokens to those kept only."""
    for layer, own in zip(whole.model.layers, kept, strict=True):

        def only(gate, given, out, own=tuple(own)):
            scores, places = out[0][:, list(own)].softmax(1).topk(2, dim=1)
            divided = getattr(whole.config, "norm_topk_prob", True)
            return out[0], scores / scores.sum(1, keepdim=True) if divided else scores, torch.tensor(own)[places]

        layer.mlp.gate.register_forward_hook(only)
    return whole


def kept_in(place: Path, out: Path, kind: str) -> list[list[int]]:
    """Which experts were kept of each layer; their routers' rows are checked."""
    own, thin_one = Checkpoint(place / kind), Checkpoint(out)
    inner, part = ("block_sparse_moe", "w1") if kind == "mixtral" else ("mlp", "gate_proj")
    found = []
    for layer in range(2):
        path = f"model.layers.{layer}.{inner}"
        there = [own[f"{path}.experts.{expert}.{part}.weight"] for expert in range(4)]
        here = [thin_one[f"{path}.experts.{expert}.{part}.weight"] for expert in range(2)]
        kept = [next(i for i, tensor in enumerate(there) if torch.equal(tensor, mine)) for mine in here]
        assert kept == sorted(kept)
        assert torch.equal(thin_one[f"{path}.gate.weight"], own[f"{path}.gate.weight"][kept])
        found.append(kept)
    return found


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("mixtral", ()),
        ("mixtral", ("method.by=use",)),
        ("qwen2_moe", ()),
        ("qwen3_moe", ("method.progressive=true",)),
    ],
)
def test_what_is_written_is_the_model_without_those_experts(place: Path, tmp_path: Path, kind: str, more) -> None:
    config = pruned(place, tmp_path / "out", "method.keep=2", *more, model=kind)
    assert (config["model_type"], config["num_experts_per_tok"]) == (kind, 2)
    assert [config[key] for key in ("num_local_experts", "num_experts") if key in config] == [2]
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    expected = dropped(model_at(place / kind), kept_in(place, tmp_path / "out", kind))
    torch.testing.assert_close(logits(model.eval()), logits(expected), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def outputs_of(model, layer: int, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a layer's mixture makes of the tokens that are read, (N, d)."""
    told = []
    hook = model.model.layers[layer].mlp.register_forward_hook(lambda module, given, out: told.append(out))
    model(**inputs)
    hook.remove()
    return told[0][inputs["attention_mask"].bool()]


def test_progressive_comes_nearest_behind_pruned_layers(place: Path, tmp_path: Path) -> None:
    """No other choice in the second layer, behind the first layer's, is nearer to the unpruned model's."""
    pruned(place, tmp_path / "out", "method.keep=2", "method.progressive=true")
    first, second = kept_in(place, tmp_path / "out", "mixtral")
    pool = open_pool("causal_lm", str(place / "mixtral"), {})
    inputs = {key: value for key, value in pool.feed(["the quick brown fox", "jumps over"]).items() if key != "labels"}
    aim = outputs_of(model_at(place / "mixtral"), 1, inputs)
    far = {
        own: float((outputs_of(dropped(model_at(place / "mixtral"), [first, list(own)]), 1, inputs) - aim).norm())
        for own in itertools.combinations(range(4), 2)
    }
    assert min(far, key=far.__getitem__) == tuple(second)


@pytest.mark.slow
def test_without_texts_the_models_own_task_is_read(place: Path, tmp_path: Path) -> None:
    """The rows of a task that is called as the model is; of more or other rows experts may be others."""
    texts = ["the quick brown fox", "jumps over"]
    task = settings(tmp_path / "data", "perplexity", {"text": texts})
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"tasks": {"one": task}}))
    given = ["method.texts=[]", "method.keep=2", f"tasks={tmp_path / 'tasks.yaml'}"]
    pruned(place, tmp_path / "told", "method.keep=2", "method.progressive=true")
    pruned(place, tmp_path / "read", *given, "method.progressive=true")
    assert kept_in(place, tmp_path / "told", "mixtral") == kept_in(place, tmp_path / "read", "mixtral")
    with pytest.raises(UserError, match=r"choose tasks of texts, one of which is called one.*; tasks are digits"):
        pruned(place, tmp_path / "no", "method.texts=[]", "method.keep=2")


def test_headers_alone_and_bad_input(place: Path, tmp_path: Path) -> None:
    given = ["pool=causal_lm", f"+pool.experts.one={place / 'mixtral'}", "method=expert_prune", TEXTS]
    assert look(compose([*given, "method.keep=3"])).rows
    for more, said in (
        (["method.texts=['']"], "have no token"),
        (["method.keep=1"], r"layers.0.block_sparse_moe: keep must be from 2, .*, to 4, got 1"),
        (["method.keep=5"], "got 5"),
        (["pool=seq2seq"], "of the family seq2seq"),
    ):
        with pytest.raises(UserError, match=said):
            pruned(place, tmp_path / "no", *more)
    with pytest.raises(UserError, match=r"'llama' and has no mixtures of experts .* of mixtral, qwen2_moe, qwen3_moe"):
        pruned(place, tmp_path / "no", model="dense")
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_thinned_is_named(place: Path) -> None:
    one, config = Checkpoint(place / "mixtral"), {"model_type": "mixtral"}
    assert mixtures(one, config) == {f"model.layers.{layer}.block_sparse_moe": 4 for layer in range(2)}
    for kept, said in (
        ([[0, 1]], "kept in 1 layers, .* mixtures in 2 layers"),
        ([[0, 1], [0]], r"2 layers, \[1, 2\] of each"),
        ([[0, 4], [0, 1]], r"layers.0.block_sparse_moe has experts 0 to 3, and those kept are \[0, 4\]"),
        ([[0, 0], [0, 1]], r"those kept are \[0, 0\]"),
    ):
        with pytest.raises(CheckpointError, match=said):
            thin({"one": one}, config, kept, {"one": []})
    gone: dict = {"one": []}
    members, changes = thin({"one": one}, config, [[1, 3], [0, 2]], gone)
    assert changes == {"num_local_experts": 2}
    assert len(gone["one"]) == 2 * 2 * 3
    assert torch.equal(
        members["one"]["model.layers.0.block_sparse_moe.experts.1.w2.weight"],
        one["model.layers.0.block_sparse_moe.experts.3.w2.weight"],
    )
