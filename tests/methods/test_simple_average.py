import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.merge import merge_state_dicts


def test_by_hand() -> None:
    experts = {"a": {"w": torch.tensor([1.0, -2.0])}, "b": {"w": torch.tensor([3.0, 4.0])}}
    assert merge_state_dicts(None, experts, "simple_average")["w"].tolist() == [2.0, 1.0]


def test_one_expert_is_itself() -> None:
    weights = torch.randn(5, 3)
    assert torch.equal(merge_state_dicts(None, {"a": {"w": weights}}, "simple_average")["w"], weights)


@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=1, max_size=6))
def test_the_mean_and_between_the_experts(rows: list[list[float]]) -> None:
    experts = {f"e{index}": {"w": torch.tensor(row)} for index, row in enumerate(rows)}
    merged = merge_state_dicts(None, experts, "simple_average")["w"].numpy()
    np.testing.assert_allclose(merged, np.mean(np.array(rows, dtype=np.float64), axis=0), rtol=1e-5, atol=1e-4)
    assert (merged <= np.max(rows, axis=0) + 1e-4).all()
    assert (merged >= np.min(rows, axis=0) - 1e-4).all()
