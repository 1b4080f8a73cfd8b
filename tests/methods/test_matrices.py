"""Which tensors are matrices, and how they are laid out."""

from __future__ import annotations

import pytest
import torch

from methods.cart import CartParams
from methods.kinds import Place
from methods.matrices import RankError, as_matrices, as_matrix, changes_as_matrices, check_rank_of

LINEAR = Place(linear=True)


@pytest.mark.parametrize("word", ["all", "linear", "conv"])
def test_a_linear_weight_is_a_matrix_for_every_word(word: str) -> None:
    tensors = torch.randn(3, 4, 5)
    assert as_matrices(tensors, LINEAR, word) is tensors


def test_other_matrices_are_left_out_where_only_linear_layers_count() -> None:
    assert as_matrices(torch.randn(3, 4, 5), Place(), "linear") is None
    assert as_matrices(torch.randn(3, 4, 5), Place(), "all") is not None


def test_kernels_are_rows_of_their_output_channels() -> None:
    kernel = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert as_matrix(kernel, Place(), "all") is None
    found = as_matrix(kernel, Place(), "conv")
    assert found is not None
    assert torch.equal(found, kernel.reshape(2, 12))
    assert torch.equal(found.reshape(kernel.shape), kernel)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 5), (5, 0), (1, 2, 2, 2, 2, 2)])
def test_what_is_no_matrix(shape: tuple[int, ...]) -> None:
    assert as_matrices(torch.zeros(2, *shape), LINEAR, "conv") is None


def test_changes_have_memory_of_their_own() -> None:
    base, experts = torch.ones(2, 2), torch.zeros(1, 2, 2)
    found = changes_as_matrices(base, experts, Place(), "all")
    assert found is not None
    found.fill_(7)
    assert experts.sum() == 0


def test_unknown_words_and_ranks_that_are_too_large_are_refused() -> None:
    with pytest.raises(ValueError, match="matrices is one of all, linear, conv; got '2d'"):
        CartParams(matrices="2d")
    with pytest.raises(RankError, match=r"rank must be at most 3 for a matrix of shape \(3, 7\), got 4"):
        check_rank_of("rank", 4, (3, 7))
