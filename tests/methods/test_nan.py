import pytest
import torch

from harness.merge import MergeError, merge_state_dicts

BASE = {"w": torch.tensor([0.0, 4.0]), "b": torch.tensor([1.0])}
EXPERTS = {
    "a": {"w": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])},  # norms 5 and 1
    "b": {"w": torch.tensor([6.0, 8.0]), "b": torch.tensor([3.0])},  # norms 10 and 3
}


def test_by_hand() -> None:
    """Weights 2/3 and 1/3 in one tensor, 3/4 and 1/4 in the other."""
    merged = merge_state_dicts(None, EXPERTS, "nan")
    torch.testing.assert_close(merged, {"w": torch.tensor([4.0, 16 / 3]), "b": torch.tensor([1.5])})


def test_one_norm_for_a_model() -> None:
    share = (1 / 26**0.5) / (1 / 26**0.5 + 1 / 109**0.5)
    merged = merge_state_dicts(None, EXPERTS, "nan", {"scope": "model"})
    torch.testing.assert_close(merged["w"], torch.tensor([6 - 3 * share, 8 - 4 * share]))


def test_norms_of_changes_and_a_scale() -> None:
    """Of b the first has not changed at all, and so has all the weight; of w the changes are 3 and 52 ** 0.5 long."""
    merged = merge_state_dicts(BASE, EXPERTS, "nan", {"norm": "changes", "scale": 2.0})
    share = (1 / 3) / (1 / 3 + 1 / 52**0.5)
    expected = {"w": torch.tensor([12 - 6 * share, 12 - 8 * share]), "b": torch.tensor([1.0])}
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("params", [{"scale": 2.0}, {"norm": "changes"}])
def test_what_needs_a_base_says_so(params: dict) -> None:
    with pytest.raises(MergeError, match="base"):
        merge_state_dicts(None, EXPERTS, "nan", params)


@pytest.mark.parametrize("params", [{"scope": "layer"}, {"norm": "l1"}])
def test_unknown_words_are_refused(params: dict) -> None:
    with pytest.raises(ValueError, match="is one of"):
        merge_state_dicts(None, EXPERTS, "nan", params)
