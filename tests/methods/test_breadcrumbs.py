import pytest
import torch

from harness.merge import merge_state_dicts
from methods.breadcrumbs import BreadcrumbsParams, BreadcrumbsTiesParams

CHANGE = torch.tensor([5.0, -4.0, 3.0, -2.0, 1.0, 0.5, -0.25, 0.125, 6.0, -7.0])  # -7, 6, 5 ... in magnitude


def merged(change: torch.Tensor = CHANGE, method: str = "breadcrumbs", **params) -> list[float]:
    base = {"w": torch.zeros_like(change)}
    return merge_state_dicts(base, {"a": {"w": change}}, method, {"scale": 1.0, **params})["w"].tolist()


def test_the_largest_and_the_small_ones_go() -> None:
    assert merged(density=0.3, gamma=0.2) == [5.0, -4.0, 3.0, 0, 0, 0, 0, 0, 0, 0]


def test_no_outliers_keep_the_largest() -> None:
    """As where the tensor is too small for its share of outliers to be one entry."""
    assert merged(density=0.2, gamma=0.0) == merged(density=0.2, gamma=0.09) == [0, 0, 0, 0, 0, 0, 0, 0, 6.0, -7.0]
    assert merged(torch.tensor([3.0, 1.0]), density=0.5, gamma=0.01) == [3.0, 0]
    assert merged(torch.tensor(3.0), density=0.1, gamma=0.01) == 3.0


def test_fewer_outliers_go_where_the_density_leaves_no_room() -> None:
    assert merged(density=0.9, gamma=0.5) == [5.0, -4.0, 3.0, -2.0, 1.0, 0.5, -0.25, 0.125, 6.0, 0]
    assert merged(density=1.0, gamma=0.5) == CHANGE.tolist()


def test_equal_magnitudes_are_kept_together() -> None:
    assert merged(torch.tensor([2.0, -2.0, 2.0, 1.0]), density=0.5, gamma=0.25) == [2.0, -2.0, 2.0, 0]


def test_each_expert_its_density_and_each_tensor_its_bounds() -> None:
    base = {name: torch.zeros(4) for name in ("v", "w")}
    first = {"v": torch.tensor([4.0, 3.0, 2.0, 1.0]), "w": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    second = {name: -tensor for name, tensor in first.items()}
    params = {"densities": [0.5, 1.0], "gamma": 0.25, "weights": [1.0, 0.5], "scale": 2.0}
    found = merge_state_dicts(base, {"a": first, "b": second}, "breadcrumbs", params)
    assert found["v"].tolist() == [-4.0, 3.0, 2.0, -1.0]
    torch.testing.assert_close(found["w"], torch.tensor([-0.1, 0.2, 0.3, -0.4]))


def test_signs_are_elected() -> None:
    experts = {"a": {"w": torch.tensor([3.0, 1.0])}, "b": {"w": torch.tensor([-2.0, 4.0])}}
    params = {"density": 1.0, "disjoint": "mean", "scale": 1.0}
    assert merge_state_dicts({"w": torch.zeros(2)}, experts, "breadcrumbs_ties", params)["w"].tolist() == [3.0, 2.5]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"gamma is a share in \[0, 1\), got 1"):
        BreadcrumbsParams(gamma=1)
    with pytest.raises(ValueError, match="base_rule is one of ties"):
        BreadcrumbsTiesParams(base_rule="linear")
    with pytest.raises(ValueError, match="densities lists 2 numbers for 1 experts"):
        merged(densities=[0.5, 0.25])
