import itertools
import math

import pytest
import torch

from harness.merge import MergeError, merge_state_dicts
from methods.expert_prune import ExpertPruneParams, chosen, mixed


def layer(seed: int = 0, n_experts: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (40, E) and outputs (40, E, 3)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(40, n_experts, generator=generator)
    return logits, torch.randn(40, n_experts, 3, generator=generator) * torch.rand(n_experts, 1, generator=generator)


def params(**given) -> ExpertPruneParams:
    return ExpertPruneParams(texts=["a"], **given)


def test_by_hand() -> None:
    """Three experts of one number each; all tokens go to the first, some to the others."""
    logits = torch.tensor([[9.0, 1.0, 0.0], [9.0, 0.0, 1.0], [0.0, 9.0, 1.0]])
    outputs = torch.tensor([1.0, 2.0, 30.0])[None, :, None].expand(3, 3, 1)
    assert chosen(logits, outputs, 1, params(keep=2, by="use")) == [0, 1]
    assert chosen(logits, outputs, 1, params(keep=1, by="use")) == [0]
    assert chosen(logits, outputs, 1, params(keep=1)) == [0], "two tokens' own, and one off by one"
    assert mixed(logits, outputs, [1, 2], 1).flatten().tolist() == [2, 30, 2]
    shares = [1 / (1 + math.exp(-difference)) for difference in (1, 1, 8)]
    expected = [2 * shares[0], 30 * shares[1], 2 * shares[2]]
    assert mixed(logits, outputs, [1, 2], 1, divided=False).flatten().tolist() == pytest.approx(expected)
    aim = torch.tensor([[2.0], [30.0], [2.0]])
    assert chosen(logits, outputs, 1, params(keep=2), aim=aim) == [1, 2]


def test_a_layer_by_definition() -> None:
    logits, outputs = layer()
    found = mixed(logits, outputs, [0, 2, 3], 2)
    for token in range(40):
        best = sorted([0, 2, 3], key=lambda e, t=token: -float(logits[t, e]))[:2]
        shares = torch.softmax(logits[token, best], dim=0)
        torch.testing.assert_close(found[token], shares @ outputs[token, best])


@pytest.mark.parametrize("seed", range(3))
def test_no_other_choice_is_nearer(seed: int) -> None:
    logits, outputs = layer(seed)
    whole = mixed(logits, outputs, range(5), 2)
    sets = list(itertools.combinations(range(5), 3))
    errors = {own: float((mixed(logits, outputs, own, 2) - whole).norm()) for own in sets}
    assert errors[tuple(chosen(logits, outputs, 2, params(keep=3)))] == min(errors.values())
    assert chosen(logits, outputs, 2, params(keep=5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("by", ["reconstruction", "use"])
def test_an_expert_that_no_token_is_sent_to_goes_first(by: str) -> None:
    logits, outputs = layer()
    logits[:, 1] = -50
    assert 1 not in chosen(logits, outputs, 2, params(keep=4, by=by))


def test_bad_input_is_named() -> None:
    logits, outputs = layer()
    for keep in (1, 6):
        with pytest.raises(ValueError, match=f"keep must be from 2, .*, to 5, got {keep}"):
            chosen(logits, outputs, 2, params(keep=keep))
    wide = torch.zeros(1, 24), torch.zeros(1, 24, 1)
    with pytest.raises(ValueError, match=r"12 of 24 experts can be chosen in 2,704,156 ways, .* set by=use"):
        chosen(*wide, 2, params(keep=12))
    with pytest.raises(ValueError, match="keep must be at least 1"):
        ExpertPruneParams(keep=0)
    with pytest.raises(ValueError, match="by is one of reconstruction, use; got 'size'"):
        ExpertPruneParams(by="size")
    with pytest.raises(MergeError, match="crucible merge method=expert_prune"):
        merge_state_dicts(None, {"a": {"w": torch.ones(1)}}, "expert_prune")
