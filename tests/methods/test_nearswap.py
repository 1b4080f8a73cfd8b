import pytest
import torch

from harness.merge import MergeError, merge_state_dicts

BASE = {"w": torch.tensor([1.0, 1.0, 1.0, 1.0])}
EXPERT = {"w": torch.tensor([1.25, 0.0, 3.0, 1.0])}


def test_by_hand() -> None:
    assert merge_state_dicts(BASE, {"a": EXPERT}, "nearswap", {"t": 0.5})["w"].tolist() == [1.25, 0.5, 1.5, 1.0]


def test_the_ends() -> None:
    assert torch.equal(merge_state_dicts(BASE, {"a": EXPERT}, "nearswap", {"t": 0.0})["w"], BASE["w"])
    assert torch.equal(merge_state_dicts(BASE, {"a": EXPERT}, "nearswap", {"t": 9.0})["w"], EXPERT["w"])


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="t must be at least 0"):
        merge_state_dicts(BASE, {"a": EXPERT}, "nearswap", {"t": -0.1})
    with pytest.raises(MergeError, match="nearswap merges 1 experts, got 2"):
        merge_state_dicts(BASE, {"a": EXPERT, "b": EXPERT}, "nearswap")
