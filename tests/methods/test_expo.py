import pytest
import torch

import harness.pieces
from harness.compose import compose
from harness.direct import merge_only
from harness.merge import merge_state_dicts
from pools.checkpoint import Checkpoint

BASE = {"w": torch.tensor([1.0, 2.0, 0.0])}
EXPERTS = {"a": {"w": torch.tensor([2.0, 2.0, 0.5])}, "b": {"w": torch.tensor([4.0, 3.0, 0.5])}}


def test_by_hand() -> None:
    """The mean is (3, 2.5, 0.5); alpha 0.5 goes on by half of its change."""
    assert merge_state_dicts(BASE, EXPERTS, "expo", {"scale": 1.5})["w"].tolist() == [4.0, 2.75, 0.75]
    assert merge_state_dicts(BASE, EXPERTS, "expo", {"scale": 1.0})["w"].tolist() == [3.0, 2.5, 0.5]


def test_only_the_largest_entries_are_extrapolated() -> None:
    merged = merge_state_dicts(BASE, EXPERTS, "expo", {"scale": 1.5, "density": 1 / 3})
    assert merged["w"].tolist() == [4.0, 2.5, 0.5]


def test_the_same_bits_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"w": torch.randn(50, 7, generator=torch.Generator().manual_seed(0))}
    experts = {"a": {"w": base["w"] + 0.1 * base["w"].flip(0)}}
    whole = merge_state_dicts(base, experts, "expo", {"density": 0.3})["w"]
    monkeypatch.setattr(harness.pieces, "CHUNK", 64)
    assert torch.equal(merge_state_dicts(base, experts, "expo", {"density": 0.3})["w"], whole)
    kept = (whole - experts["a"]["w"]).abs() > 1e-7
    assert int(kept.sum()) == 105


def test_decoder_only_with_an_attention_factor_and_skipped_layers(tmp_path) -> None:
    """What FusionBench's llama_expo does, by filters: conf/experiment/expo_decoder.yaml, the first block left out."""
    entries = '[{layers: [0, 1], value: 1.0}, {match: "*self_attn*_proj.weight", value: 1.15}, {match: "*mlp*_proj.weight", value: 1.3}, {value: 1.0}]'  # noqa: E501
    out = tmp_path / "out"
    config = compose(
        ["experiment=expo_decoder", "pool=mini_lm", "experts=[code,docs]", f"method.scale={entries}", f"output={out}"]
    )
    merge_only(config)
    root = config.pool.root
    base, code, docs = (Checkpoint(f"{root}/{place}") for place in ("base", "experts/code", "experts/docs"))
    found = Checkpoint(out)
    alphas = {
        "model.layers.0.mlp.up_proj.weight": 0.0, "model.layers.1.mlp.up_proj.weight": 0.3,
        "model.layers.1.self_attn.q_proj.weight": 0.15, "model.layers.1.input_layernorm.weight": 0.0,
        "model.embed_tokens.weight": 0.0,
    }  # fmt: skip
    for name, alpha in alphas.items():
        mean = (code[name].double() + docs[name].double()) / 2
        expected = mean + alpha * (mean - base[name].double())
        torch.testing.assert_close(found[name].double(), expected, atol=5e-4, rtol=5e-3, msg=name)


@pytest.mark.parametrize(
    ("params", "said"), [({"density": 0.0}, "density is a share"), ({"scale": 1e999}, "scale must")]
)
def test_what_is_refused(params: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        merge_state_dicts(BASE, EXPERTS, "expo", params)
