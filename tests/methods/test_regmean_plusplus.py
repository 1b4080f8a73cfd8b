import pytest
import torch

from harness.merge import merge_state_dicts
from methods.regmean_plusplus import RegmeanPlusplusParams


def test_with_given_statistics_it_is_regmean() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = {name: {"fc.weight": torch.randn(4, 6, generator=generator), "norm": torch.ones(2)} for name in "ab"}
    inputs = {name: torch.randn(20, 6, generator=generator) for name in experts}
    grams = {name: {"fc": given.T @ given} for name, given in inputs.items()}
    ours = merge_state_dicts(None, experts, "regmean_plusplus", {}, grams)
    plain = merge_state_dicts(None, experts, "regmean", {"off_diagonal": 0.95}, grams)
    assert torch.equal(ours["fc.weight"], plain["fc.weight"])
    assert not torch.allclose(ours["fc.weight"], (experts["a"]["fc.weight"] + experts["b"]["fc.weight"]) / 2, atol=1e-2)


def test_parameters_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"off_diagonal is a share in \[0, 1\], got 95"):
        RegmeanPlusplusParams(off_diagonal=95)
    with pytest.raises(ValueError, match="ridge must be at least 0"):
        RegmeanPlusplusParams(ridge=-1.0)
