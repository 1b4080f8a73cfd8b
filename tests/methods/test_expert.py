import pytest
import torch

from harness.merge import merge_state_dicts

EXPERTS = {"digits": {"w": torch.tensor([1.0, 2.0])}, "letters": {"w": torch.tensor([3.0, 4.0])}}


def test_the_one_that_is_named() -> None:
    assert merge_state_dicts(None, EXPERTS, "expert", {"expert": "letters"})["w"].tolist() == [3.0, 4.0]


def test_the_first_where_none_is_named() -> None:
    assert merge_state_dicts(None, EXPERTS, "expert")["w"].tolist() == [1.0, 2.0]


def test_others_are_not_read() -> None:
    others = {**EXPERTS, "broken": {"v": torch.tensor([float("inf")])}}
    assert merge_state_dicts(None, others, "expert", {"expert": "letters"})["w"].tolist() == [3.0, 4.0]


def test_its_running_statistics_are_its_own() -> None:
    experts = {name: {"bn.running_mean": tensors["w"]} for name, tensors in EXPERTS.items()}
    merged = merge_state_dicts(None, experts, "expert", {"expert": "letters"})
    assert merged["bn.running_mean"].tolist() == [3.0, 4.0]


def test_an_unknown_expert_is_refused_with_the_closest() -> None:
    with pytest.raises(ValueError, match=r"'letter'; did you mean letters\?"):
        merge_state_dicts(None, EXPERTS, "expert", {"expert": "letter"})
    with pytest.raises(ValueError, match="there are digits, letters"):
        merge_state_dicts(None, EXPERTS, "expert", {"expert": "mnist"})
