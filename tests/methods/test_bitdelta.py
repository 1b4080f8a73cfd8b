from __future__ import annotations

import pytest
import torch

from harness.merge import merge_state_dicts
from methods.bitdelta import BitdeltaParams, bitdelta, members, restore
from methods.kinds import Place

BLOCK, OUTSIDE = Place(1, 2, linear=True), Place(0, 2, linear=True)
BASE = torch.zeros(2, 2)
EXPERTS = torch.tensor([[[1.0, -3.0], [0.0, 4.0]], [[-1.0, -1.0], [-1.0, -1.0]]])


def restored(place: Place = BLOCK, **params) -> list[list[list[float]]]:
    packed = bitdelta(BASE, EXPERTS, BitdeltaParams(**params), place=place)
    return [restore(BASE, packed, index, BitdeltaParams(**params), place=place).tolist() for index in (0, 1)]


def test_by_hand() -> None:
    """Signs, an untouched entry counting as raised, times mean magnitudes 2 and 1."""
    assert restored() == [[[2, -2], [2, 2]], [[-1, -1], [-1, -1]]]
    packed = bitdelta(BASE, EXPERTS, BitdeltaParams(), place=BLOCK)
    assert packed["signs"].tolist() == [[0b1101], [0]]
    assert packed["scales"].tolist() == [2, 1]


def test_a_scale_for_each_row() -> None:
    assert restored(rows=True) == [[[2, -2], [2, 2]], [[-1, -1], [-1, -1]]]
    wide = torch.tensor([[[1.0, -3.0], [0.0, 8.0]]])
    packed = bitdelta(BASE, wide, BitdeltaParams(rows=True), place=BLOCK)
    assert restore(BASE, packed, 0, BitdeltaParams(rows=True), place=BLOCK).tolist() == [[2, -2], [4, 4]]


def test_outside_of_the_blocks_changes_are_kept_as_they_are() -> None:
    assert restored(OUTSIDE) == EXPERTS.tolist()
    assert restored(OUTSIDE, matrices="linear") == restored()


def test_the_scale_is_best_by_least_squares() -> None:
    delta = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(0))
    base = torch.zeros(6, 5)
    packed = bitdelta(base, delta, BitdeltaParams(), place=BLOCK)

    def error(factor: float) -> float:
        changed = {**packed, "scales": packed["scales"] * factor}
        return float((restore(base, changed, 0, BitdeltaParams(), place=BLOCK) - delta[0]).square().sum())

    assert error(1.0) < min(error(0.99), error(1.01))


def test_an_expert_that_is_restored_is_read_alone() -> None:
    assert members(BitdeltaParams(expert="bee"), ("ant", "bee")) == ("bee",)
    assert members(BitdeltaParams(), ("ant", "bee")) == ("ant", "bee")
    with pytest.raises(ValueError, match="there are ant, bee"):
        members(BitdeltaParams(expert="x"), ("ant", "bee"))


def test_scales_are_not_learnt_without_inputs() -> None:
    base, experts = {"w": BASE}, {"ant": {"w": EXPERTS[0]}}
    with pytest.raises(ValueError, match=r"bitdelta with steps=5 is fed data: run `crucible run method=bitdelta`"):
        merge_state_dicts(base, experts, "bitdelta", {"expert": "ant", "steps": 5})


def test_params_are_checked() -> None:
    with pytest.raises(ValueError, match="steps must be at least 0"):
        BitdeltaParams(steps=-1)
    with pytest.raises(ValueError, match="matrices is one of blocks, linear, all, experts; got 'conv'"):
        BitdeltaParams(matrices="conv")
