from __future__ import annotations

import pytest
import torch

from methods.kinds import Place
from methods.randes import RandesParams, randes, restore

BLOCK, OUTSIDE = Place(1, 2, linear=True), Place(0, 2, linear=True)
BASE = torch.zeros(2, 2)
EXPERTS = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]])
UNIFORM = torch.tensor([[0.1, 0.9], [0.7, 0.8]])  # signs -1, 1 and 1, 1


def draw(index: int) -> torch.Tensor:
    return UNIFORM[index].expand(2, 2)


def restored(place: Place = BLOCK, **params) -> list[list[list[float]]]:
    made = RandesParams(**params)
    packed = randes(BASE, EXPERTS, made, draw=draw, place=place)
    return [restore(BASE, packed, index, made, draw=draw, place=place).tolist() for index in (0, 1)]


def test_by_hand() -> None:
    """The first column of the first expert is turned: what is stored is 9, 22 and 27, 44."""
    packed = randes(BASE, EXPERTS, RandesParams(), draw=draw, place=BLOCK)
    assert packed["superposed"].tolist() == [[9, 22], [27, 44]]
    assert restored(scale=1.0) == [[[-9, 22], [-27, 44]], [[9, 22], [27, 44]]]
    assert restored() == [[[-4.5, 11], [-13.5, 22]], [[4.5, 11], [13.5, 22]]]


def test_outside_of_the_blocks_the_summed_change_is_shared() -> None:
    assert restored(OUTSIDE, scale=1.0) == [[[11, 22], [33, 44]]] * 2
    assert restored(OUTSIDE, scale=1.0, matrices="linear") == restored(scale=1.0)


def test_other_experts_become_noise_of_mean_zero() -> None:
    """Against the summed change: what the others put upon a common direction is gone, the expert's own stays."""
    generator = torch.Generator().manual_seed(0)
    base, n = torch.zeros(4, 4000), 5
    experts = torch.ones(n, 4, 4000)
    signs = torch.rand(n, 4000, generator=generator)

    def own(index: int) -> torch.Tensor:
        return signs[index].expand(4, 4000)

    params = RandesParams(scale=1.0)
    packed = randes(base, experts, params, draw=own, place=BLOCK)
    for index in range(n):
        found = restore(base, packed, index, params, draw=own, place=BLOCK)
        assert float(found.mean()) == pytest.approx(1, abs=0.1)  # of the sum it is n


def test_params_are_checked() -> None:
    with pytest.raises(ValueError, match="scale must be a finite number"):
        RandesParams(scale=float("nan"))
