import pytest
import torch

from harness.merge import merge_state_dicts
from methods.consensus import ConsensusTaParams, ConsensusTiesParams, consensus_ta
from methods.primitives import tall_mask

BASE = torch.ones(3)
DELTAS = torch.tensor([[4.0, 1.0, 1.0], [1.0, 1.0, -1.0], [1.0, 1.0, 3.0]])  # sums 6, 3, 3


def merged(**params) -> list[float]:
    return (consensus_ta(BASE, BASE + DELTAS, ConsensusTaParams(scale=1.0, **params)) - BASE).tolist()


def test_a_mask_is_where_a_change_outweighs_what_is_left() -> None:
    """|delta| > scale |sum - delta|, strictly: 4 against 2, 1 against 2, 3 against 0."""
    total = DELTAS.sum(0)
    assert tall_mask(DELTAS[0], total, 0.6).tolist() == [1.0, 0.0, 0.0]
    assert tall_mask(DELTAS[2], total, 0.6).tolist() == [0.0, 0.0, 1.0]
    assert tall_mask(DELTAS[0], total, 0.5).tolist() == [1.0, 0.0, 0.0]  # 1 is not above 0.5 * 2
    assert tall_mask(torch.zeros(1), torch.zeros(1), 0.0).tolist() == [0.0]


def test_what_enough_experts_need_is_kept() -> None:
    assert merged(selectivity=0.4, agree=1) == [6.0, 3.0, 3.0]
    assert merged(selectivity=0.4, agree=2) == [0.0, 3.0, 3.0]
    assert merged(selectivity=0.15, agree=2) == [6.0, 3.0, 3.0]
    assert merged(selectivity=0.4, agree=0) == [6.0, 3.0, 3.0]
    assert merged(selectivities=[0.4, 0.4, 9.0], agree=3) == [0.0, 0.0, 0.0]


def test_of_ties() -> None:
    """The mask is of the elected change: 4 + 1 + 1, 1 + 1 + 1 and 1 + 3."""
    experts = {name: {"w": BASE + delta} for name, delta in zip("abc", DELTAS, strict=True)}
    params = {"density": 1.0, "scale": 1.0, "selectivity": 0.3, "agree": 2, "disjoint": "sum"}
    found = merge_state_dicts({"w": BASE}, experts, "consensus_ties", params)["w"] - BASE
    assert found.tolist() == [0.0, 3.0, 4.0]  # of the third, 1 of 3, -1 of 5 and 3 of 1: two agree


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="agree is 4 for 3 experts"):
        merged(agree=4)
    with pytest.raises(ValueError, match="selectivities must be at least 0"):
        ConsensusTaParams(selectivities=[-1.0])
    with pytest.raises(ValueError, match="disjoint is one of"):
        ConsensusTiesParams(disjoint="median")
    one = {"w": BASE}
    with pytest.raises(ValueError, match="2"):
        merge_state_dicts(one, {"a": one}, "consensus_ta")
