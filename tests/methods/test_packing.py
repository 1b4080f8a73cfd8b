from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.kinds import Place
from methods.packing import PackingParams, from_bits, is_packed, position, stored, to_bits


@given(shape=st.lists(st.integers(0, 9), max_size=3).map(tuple), n=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_bits_come_back(shape: tuple[int, ...], n: int, seed: int) -> None:
    masks = torch.randint(0, 2, (n, *shape), generator=torch.Generator().manual_seed(seed))
    bits = to_bits(masks.float())
    assert bits.dtype == torch.uint8
    assert bits.shape == (n, -(-masks[0].numel() // 8))
    assert torch.equal(bits, to_bits(masks.bool()))
    for mask, own in zip(masks, bits, strict=True):
        assert torch.equal(from_bits(own, torch.zeros(shape)), mask.float())


def test_the_lowest_bit_is_the_first_entry() -> None:
    assert to_bits(torch.tensor([[0.0, -2.0, 0, 0, 0, 0, 0, 1.0, 0.5]])).tolist() == [[2 + 128, 1]]
    assert from_bits(torch.tensor([5], dtype=torch.uint8), torch.zeros(2, 2)).tolist() == [[1, 0], [1, 0]]


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="9 bits take 2 bytes, got 1"):
        from_bits(torch.zeros(1, dtype=torch.uint8), torch.zeros(3, 3))


def test_an_expert_is_found_by_its_name() -> None:
    names = ("ant", "bee", "cat")
    assert position("bee", names) == 1
    with pytest.raises(ValueError, match=r"expert=NAME says which .* there are ant, bee, cat"):
        position(None, names)
    with pytest.raises(ValueError, match=r"got 'bees'; did you mean bee\?"):
        position("bees", names)


def test_numbers_are_kept_as_asked_for() -> None:
    assert stored(torch.ones(2), PackingParams(dtype="bfloat16")).dtype is torch.bfloat16
    with pytest.raises(ValueError, match="dtype is one of float32, float16, bfloat16; got 'float64'"):
        PackingParams(dtype="float64")


@pytest.mark.parametrize(
    ("shape", "place", "packed"),
    [
        ((4, 3), Place(1, 2, linear=True), {"blocks", "linear", "all"}),
        ((4, 3), Place(0, 2, linear=True), {"linear", "all"}),  # before the blocks
        ((4, 3), Place(3, 2, linear=True), {"linear", "all"}),  # after them
        ((4, 3), Place(0, 0, linear=True), {"blocks", "linear", "all"}),  # there are none
        ((4, 3), Place(1, 2), {"all"}),  # an embedding
        ((4,), Place(1, 2), set()),
        ((4, 3, 2, 2), Place(1, 2), set()),
    ],
)
def test_which_tensors_are_packed(shape: tuple[int, ...], place: Place, packed: set[str]) -> None:
    assert {word for word in ("blocks", "linear", "all") if is_packed(shape, place, word)} == packed
