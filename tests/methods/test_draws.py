import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.draws import drawer

CPU = torch.device("cpu")


def numbers(
    shape: tuple[int, ...], index: int = 0, seed: int = 0, name: str = "w", experts: tuple[str, ...] = ("a", "b"),
    offset: int = 0,
) -> torch.Tensor:  # fmt: skip
    return drawer(seed, name, experts, shape, offset, CPU)(index)


def test_these_bits() -> None:
    """A change of these numbers changes every seeded result: it needs a new major version."""
    expected = [0.4666595458984375, 0.030731201171875, 0.7677001953125, 0.2173614501953125]
    assert numbers((4,), seed=1, name="layer.weight").tolist() == expected


def test_uniform_in_zero_to_one() -> None:
    drawn = numbers((40_000,))
    assert drawn.dtype == torch.float32
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    counts = torch.histc(drawn, 20, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 45  # chi-squared of 19 degrees, p = 0.0007


@given(length=st.integers(1, 100), start=st.integers(0, 6), shape=st.sampled_from([(200,), (20, 10), (2, 5, 20)]))
def test_a_piece_is_the_same_as_in_the_whole(length: int, start: int, shape: tuple[int, ...]) -> None:
    whole = numbers(shape).flatten()
    assert torch.equal(numbers((length,), offset=16 * start), whole[16 * start : 16 * start + length])


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"name": "v"}, {"index": 1}, {"experts": ("c", "b")}],
    ids=["seed", "tensor", "expert", "name of the expert"],
)
def test_each_address_has_its_own(other: dict) -> None:
    assert not torch.isclose(numbers((64,)), numbers((64,), **other)).any()


def test_the_expert_counts_by_name_not_by_position() -> None:
    assert torch.equal(numbers((9,), index=0), numbers((9,), index=1, experts=("x", "a")))


def test_drawn_again_it_is_the_same() -> None:
    draw = drawer(0, "w", ("a",), (5,), 0, CPU)
    assert torch.equal(draw(0), draw(0))


def test_a_scalar() -> None:
    assert numbers(()).shape == ()
