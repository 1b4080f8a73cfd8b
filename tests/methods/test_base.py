import torch

from harness.merge import merge_state_dicts


def test_the_base_whatever_the_experts() -> None:
    base = {"w": torch.tensor([1.0, 2.0]), "bn.running_mean": torch.tensor([3.0])}
    experts = {"a": {"w": torch.tensor([9.0, 9.0]), "bn.running_mean": torch.tensor([9.0])}}
    for given in (experts, {}):
        merged = merge_state_dicts(base, given, "base")
        assert torch.equal(merged["w"], base["w"])
        assert torch.equal(merged["bn.running_mean"], base["bn.running_mean"])
    assert merged["w"] is not base["w"]


def test_experts_are_not_read() -> None:
    """Neither their weights nor their names: a faulty expert does not keep a reference from being scored."""
    base = {"w": torch.tensor([1.0])}
    merged = merge_state_dicts(base, {"broken": {"v": torch.tensor([float("nan")])}}, "base")
    assert torch.equal(merged["w"], base["w"])
