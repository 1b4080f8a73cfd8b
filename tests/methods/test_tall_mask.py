from __future__ import annotations

import pytest
import torch

from methods.tall_mask import TallMaskParams, restore, tall_mask

BASE = torch.tensor([10.0, 10.0, 10.0])
EXPERTS = BASE + torch.tensor([[1.0, -2.0, 0.0], [4.0, 1.0, 3.0]])


def restored(**params) -> list[list[float]]:
    packed = tall_mask(BASE, EXPERTS, TallMaskParams(**params))
    return [restore(BASE, packed, index, TallMaskParams(**params)).tolist() for index in (0, 1)]


def test_by_hand() -> None:
    """The sum is 5, -1, 3, and what the others leave of it 4, 1, 3 for the first expert, 1, -2, 0 for the second."""
    assert restored(selectivity=0.4) == [[10, 9, 10], [15, 9, 13]]
    assert restored(selectivity=0.6) == [[10, 9, 10], [15, 10, 13]]


def test_a_selectivity_of_zero_keeps_all_that_an_expert_has_changed() -> None:
    assert restored(selectivity=0.0) == [[15, 9, 10], [15, 9, 13]]


def test_each_expert_may_have_its_own() -> None:
    assert restored(selectivities=[0.0, 0.6]) == [[15, 9, 10], [15, 10, 13]]
    with pytest.raises(ValueError, match="selectivities lists 1 numbers for 2 experts"):
        restored(selectivities=[0.4])


def test_the_scale_is_of_the_summed_change_before_the_masks() -> None:
    """Half the sum, 2.5, -0.5, 1.5: it leaves 1.5, 1.5, 1.5 beside the first expert and -1.5, -1.5, -1.5."""
    assert restored(selectivity=0.6, scale=0.5) == [[12.5, 9.5, 10], [12.5, 9.5, 11.5]]


def test_params_are_checked() -> None:
    with pytest.raises(ValueError, match="selectivity must be at least 0"):
        TallMaskParams(selectivity=-0.1)
