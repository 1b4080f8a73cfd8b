import pytest
import torch

from harness.merge import merge_state_dicts

BASE = {"w": torch.tensor([1.0, 1.0]), "b": torch.tensor([0.0])}
EXPERTS = {
    "a": {"w": torch.tensor([2.0, 1.0]), "b": torch.tensor([0.0])},  # squared norms 1 and 0
    "b": {"w": torch.tensor([1.0, 3.0]), "b": torch.tensor([3.0])},  # squared norms 4 and 9
}


def test_by_hand() -> None:
    """Over the model: 1 / 14 and 13 / 14."""
    merged = merge_state_dicts(BASE, EXPERTS, "metagpt")
    expected = {"w": torch.tensor([1 + 1 / 14, 1 + 26 / 14]), "b": torch.tensor([39 / 14])}
    torch.testing.assert_close(merged, expected)


def test_norms_of_each_tensor() -> None:
    merged = merge_state_dicts(BASE, EXPERTS, "metagpt", {"scope": "tensor", "scale": 0.5})
    torch.testing.assert_close(merged, {"w": torch.tensor([1.1, 1.8]), "b": torch.tensor([1.5])})


def test_one_expert_is_itself_and_unknown_scopes_are_refused() -> None:
    assert torch.equal(merge_state_dicts(BASE, {"a": EXPERTS["a"]}, "metagpt")["w"], EXPERTS["a"]["w"])
    with pytest.raises(ValueError, match="scope is one of model, tensor"):
        merge_state_dicts(BASE, EXPERTS, "metagpt", {"scope": "layer"})
