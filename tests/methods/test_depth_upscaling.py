from pathlib import Path

import pytest
import torch

from harness.compose import compose
from harness.config import ConfigError, UserError
from harness.direct import look, merge_only
from harness.merge import MergeError, merge_state_dicts
from pools.checkpoint import Checkpoint

ROWS = {f"layers.{layer}.w": torch.tensor([float(layer)]) for layer in range(4)}
MODEL = {"embed.w": torch.tensor([-1.0]), **ROWS, "norm.w": torch.tensor([9.0])}


def stacked(**params) -> list[float]:
    merged = merge_state_dicts(None, {"a": MODEL}, "depth_upscaling", params)
    names = ["embed.w", *(f"layers.{layer}.w" for layer in range(len(merged) - 2)), "norm.w"]
    assert list(merged) == names
    return [float(merged[name]) for name in names]


def test_by_hand() -> None:
    """Four blocks, one dropped of each copy at the seam: six; none dropped: eight; a list as it says."""
    assert stacked(dropped=1) == [-1, 0, 1, 2, 1, 2, 3, 9]
    assert stacked(dropped=0) == [-1, 0, 1, 2, 3, 0, 1, 2, 3, 9]
    assert stacked(layers=[0, 1, 1, 3, 2]) == [-1, 0, 1, 1, 3, 2, 9]


def test_more_dropped_than_there_are_is_refused() -> None:
    with pytest.raises(MergeError, match="is empty"):
        stacked()
    with pytest.raises(MergeError, match=r"a has 4 layers, the range \[4, 5\] leaves it"):
        stacked(layers=[4])
    with pytest.raises(MergeError, match="stacks the layers of 1 expert, got 2: a, b"):
        merge_state_dicts(None, {"a": MODEL, "b": MODEL}, "depth_upscaling")


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"dropped": -1}, "dropped is a number of blocks"),
        ({"layers": []}, "layers lists"),
        ({"layers": [-1]}, "layers lists"),
    ],
)
def test_what_is_refused(params: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        stacked(**params)


@pytest.mark.parametrize(("experts", "source"), [("[code]", "experts/code"), ("[]", "base")])
def test_end_to_end_on_a_language_model(experts: str, source: str, tmp_path: Path) -> None:
    """Of the one expert, or of the base where there is none; the written model says how deep it is and runs."""
    from transformers import AutoModelForCausalLM

    words = [
        "pool=mini_lm",
        "method=depth_upscaling",
        f"experts={experts}",
        "method.dropped=1",
        f"output={tmp_path / 'up'}",
    ]
    config = compose(words)
    look(config)
    merge_only(config)
    own, found = Checkpoint(f"{config.pool.root}/{source}"), Checkpoint(tmp_path / "up")
    for layer, origin in enumerate([0, 1, 2, 1, 2, 3]):
        ours, theirs = (f"model.layers.{number}.mlp.up_proj.weight" for number in (layer, origin))
        assert torch.equal(found[ours], own[theirs])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "up")
    assert model.config.num_hidden_layers == 6
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_what_the_pool_lacks_or_says_itself() -> None:
    with pytest.raises(ConfigError, match="depth_upscaling merges at most 1 experts, the pool mini_lm has 5"):
        compose(["pool=mini_lm", "method=depth_upscaling"])
    with pytest.raises(UserError, match=r"leave pool\.slices out"):
        look(
            compose(
                ["pool=mini_lm", "method=depth_upscaling", "experts=[code]", "pool.slices=[{experts: {code: [0, 1]}}]"]
            )
        )
    with pytest.raises(UserError, match="the pool has neither"):
        look(compose(["pool=mini_lm", "method=depth_upscaling", "experts=[]", "pool.base=null"]))


def test_a_list_of_layers_is_none_of_numbers_for_experts() -> None:
    config = compose(["pool=mini_lm", "method=depth_upscaling", "experts=[code]", "method.layers=[0,1,1]"])
    assert config.method.layers == [0, 1, 1]
