import pytest
import torch

from harness.merge import MergeError, merge_state_dicts
from methods.moe_upscaling import MoeMergingParams, MoeUpscalingParams, mixture, moe_upscaling


def test_by_hand() -> None:
    """One tensor as it is; of several the mean, exactly theirs where they are the same."""
    one = torch.tensor([0.1, 0.7])
    assert torch.equal(moe_upscaling(None, one[None], MoeUpscalingParams()), one)
    assert torch.equal(moe_upscaling(None, one.repeat(3, 1), MoeMergingParams()), one)
    assert moe_upscaling(None, torch.tensor([[1.0], [4.0]]), MoeMergingParams()).item() == 2.5


def test_what_is_asked_of_the_pool() -> None:
    assert mixture(MoeUpscalingParams(experts=3), ["a"], 7) == {
        "experts": ["a", "a", "a"], "rest": "mean", "top_k": 2, "std": 0.02, "seed": 7,
    }  # fmt: skip
    assert mixture(MoeMergingParams(top_k=1), ["a", "b"], 0)["experts"] == ["a", "b"]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="top_k=3 sends a token to more experts than experts=2"):
        MoeUpscalingParams(experts=2, top_k=3)
    with pytest.raises(ValueError, match="top_k=3 sends a token to more experts than there are, 2"):
        mixture(MoeMergingParams(top_k=3), ["a", "b"], 0)
    with pytest.raises(ValueError, match="prompts are texts for a; give some for each of a, b"):
        mixture(MoeMergingParams(prompts={"a": ["x"]}, router="hidden"), ["a", "b"], 0)
    with pytest.raises(ValueError, match="router_std must be at least 0"):
        MoeMergingParams(router_std=-1)
    with pytest.raises(ValueError, match="prompts make routers with router=hidden or router=embed, and it is random"):
        MoeMergingParams(prompts={"a": ["x"]})
    with pytest.raises(ValueError, match="router is one of random, hidden, embed; got 'cheap'"):
        MoeMergingParams(router="cheap")
    with pytest.raises(ValueError, match="rest is one of base, mean; got 'sum'"):
        MoeMergingParams(rest="sum")
    with pytest.raises(MergeError, match="crucible merge method=moe_upscaling"):
        merge_state_dicts(None, {"a": {"w": torch.ones(1)}}, "moe_upscaling")
