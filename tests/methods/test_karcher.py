import math

import pytest
import torch

from harness.merge import MergeError, merge_state_dicts


def merged(*rows: list, **params) -> torch.Tensor:
    experts = {f"e{index}": {"w": torch.tensor(row)} for index, row in enumerate(rows)}
    return merge_state_dicts(None, experts, "karcher", params)["w"]


def at(degrees: float, length: float = 1.0) -> list[float]:
    return [length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees))]


def test_by_hand() -> None:
    """On a circle the mean of the angles, as long as they are on average."""
    torch.testing.assert_close(merged(at(0), at(30, 2.0), at(90, 3.0)), torch.tensor(at(40, 2.0)))
    torch.testing.assert_close(merged(at(0), at(80), weights=[3.0, 1.0]), torch.tensor(at(20)))


def test_arcs_balance_on_the_sphere() -> None:
    """The logarithms towards all directions sum to zero at the point that is found."""
    models = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    point = merged(*models.tolist(), steps=50, tolerance=1e-9).double()
    point /= point.norm()
    units = models / models.norm(dim=1, keepdim=True)
    angles = (units @ point).acos()
    balance = ((angles / angles.sin())[:, None] * (units - (units @ point)[:, None] * point)).sum(0)
    assert float(balance.norm()) < 1e-5


def test_what_has_no_direction() -> None:
    torch.testing.assert_close(merged([0.0, 0.0], [2.0, 0.0]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(merged([0.0, 0.0], [0.0, 0.0]), torch.tensor([0.0, 0.0]))
    torch.testing.assert_close(merged([1.0, 0.0], [-3.0, 0.0]), torch.tensor([-1.0, 0.0]))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="steps must be at least 0"):
        merged([1.0], [2.0], steps=-1)
    with pytest.raises(ValueError, match="tolerance must be positive"):
        merged([1.0], [2.0], tolerance=0.0)
    with pytest.raises(ValueError, match="weights must be positive"):
        merged([1.0], [2.0], weights=[1.0, -1.0])
    with pytest.raises(MergeError, match="weights lists 1 numbers for 2"):
        merged([1.0], [2.0], weights=[1.0])
