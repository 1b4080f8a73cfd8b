import pytest
import torch

from harness.merge import merge_state_dicts

EXPERTS = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([3.0, 6.0])}}


def merged(**params) -> list[float]:
    return merge_state_dicts(None, EXPERTS, "weighted_average", params)["w"].tolist()


def test_by_hand() -> None:
    assert merged(weights=[1.0, 3.0]) == [2.5, 5.0]
    assert merged(weights=[1.0, 3.0], normalize=False) == [10.0, 20.0]


def test_equal_weights_by_default() -> None:
    assert merged() == merged(normalize=False) == [2.0, 4.0]


def test_negative_weights_are_divided_by_the_plain_sum() -> None:
    assert merged(weights=[3.0, -1.0]) == [0.0, 0.0]
    assert merged(weights=[-1.0, 2.0]) == [5.0, 10.0]


def test_the_order_is_the_pools() -> None:
    turned = dict(reversed(EXPERTS.items()))
    assert merge_state_dicts(None, turned, "weighted_average", {"weights": [1.0, 3.0]})["w"].tolist() == [1.5, 3.0]


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0]])
def test_as_many_weights_as_experts(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=rf"weights lists {len(weights)} numbers for 2 experts"):
        merged(weights=weights)


def test_weights_that_cancel_cannot_be_normalised() -> None:
    with pytest.raises(ValueError, match="must not sum to zero"):
        merged(weights=[1.0, -1.0])
    assert merged(weights=[1.0, -1.0], normalize=False) == [-2.0, -4.0]
