import pytest
import torch

from harness.merge import merge_state_dicts
from methods.ram import RamParams, RamplusTlParams, ram

DELTAS = [[2.0, 0.0, 4.0, 0.01], [0.0, 0.0, 2.0, 0.0]]  # own, none, shared, too small


def test_own_entries_are_kept_whole_and_shared_ones_averaged() -> None:
    experts = 1 + torch.tensor(DELTAS)
    merged = ram(torch.ones(4), experts, RamParams(epsilon=0.1))
    assert merged.tolist() == [3.0, 1.0, 4.0, 1.0]
    assert ram(torch.ones(4), experts, RamParams(epsilon=0.1, scale=0.5)).tolist() == [2.0, 1.0, 2.5, 1.0]


def test_own_entries_are_enlarged_by_what_is_shared() -> None:
    """In the tensor v the first expert shares one entry for one of its own, in w none."""
    base = {"v": torch.zeros(4), "w": torch.zeros(2)}
    first = {"v": torch.tensor(DELTAS[0]), "w": torch.tensor([1.0, 1.0])}
    second = {"v": torch.tensor(DELTAS[1]), "w": torch.zeros(2)}
    experts = {"a": first, "b": second}
    given = {"r": 0.5, "alpha": 2.0, "epsilon": 0.1}
    found = merge_state_dicts(base, experts, "ramplus_tl", given)
    assert found["v"].tolist() == [3.0, 0.0, 3.0, 0.0]
    assert found["w"].tolist() == [1.0, 1.0]
    found = merge_state_dicts(base, experts, "ramplus_tl", {**given, "alpha": 0.5})
    assert found["v"].tolist() == [2.5, 0.0, 3.0, 0.0]
    found = merge_state_dicts(base, experts, "ramplus_tl", {**given, "scope": "model"})  # one shared, three own
    torch.testing.assert_close(found["w"], torch.full((2,), 1 + 0.5 / 3))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="epsilon must be at least 0"):
        RamParams(epsilon=-1)
    with pytest.raises(ValueError, match="alpha must be at least 0"):
        RamplusTlParams(alpha=-0.5)
