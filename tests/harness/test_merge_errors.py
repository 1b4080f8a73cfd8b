"""What the engine refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch

from harness.merge import MergeError, merge_state_dicts

State = dict[str, torch.Tensor]


def models(n_experts: int = 2) -> tuple[State, dict[str, State]]:
    base = {"fc.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(2)}
    experts = {f"e{i}": {name: tensor + i + 1 for name, tensor in base.items()} for i in range(n_experts)}
    return base, experts


# -- names and parameters --------------------------------------------------------------------------------------------


def test_an_unknown_method() -> None:
    with pytest.raises(KeyError, match=r"did you mean task_arithmetic\?"):
        merge_state_dicts(*models(), "task_arithmetics")


def test_an_unknown_parameter_is_told_the_known_ones() -> None:
    with pytest.raises(TypeError, match="ties has no parameter densty, lambda; it has density, scale, scope, disjoint"):
        merge_state_dicts(*models(), "ties", {"densty": 0.2, "lambda": 1.0})
    with pytest.raises(TypeError, match="simple_average has no parameter scale; it has none"):
        merge_state_dicts(*models(), "simple_average", {"scale": 1.0})


@pytest.mark.parametrize("density", [20, 0, -0.5, float("nan")])
def test_a_parameter_out_of_its_range(density: float) -> None:
    with pytest.raises(ValueError, match=rf"density is a share in \(0, 1\], got {density}"):
        merge_state_dicts(*models(), "dare", {"density": density})


# -- numbers of models -----------------------------------------------------------------------------------------------


def test_zero_experts() -> None:
    base, _ = models()
    with pytest.raises(MergeError, match="simple_average merges at least 1 experts, got 0: none"):
        merge_state_dicts(base, {}, "simple_average")
    with pytest.raises(MergeError, match="got 0: none"):
        merge_state_dicts(None, {}, "simple_average")


def test_too_many_experts() -> None:
    with pytest.raises(MergeError, match="nuslerp merges 2 experts, got 3: e0, e1, e2"):
        merge_state_dicts(*models(3), "nuslerp")


def test_a_base_that_is_missing() -> None:
    with pytest.raises(MergeError, match="ties needs a base model, and there is none"):
        merge_state_dicts(None, models()[1], "ties")


@pytest.mark.parametrize("method", ["adamerging", "we_moe", "simple_ensemble"])
def test_what_needs_models_and_data(method: str) -> None:
    with pytest.raises(MergeError, match=f"run it as `crucible run method={method}`"):
        merge_state_dicts(*models(), method)


# -- tensors that do not fit -----------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_listed_at_once() -> None:
    base, experts = models()
    del experts["e0"]["fc.bias"]
    experts["e0"]["head"] = torch.zeros(1)
    experts["e1"]["fc.weight"] = torch.zeros(3, 2)
    experts["e1"]["fc.bias"] = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(MergeError) as caught:
        merge_state_dicts(base, experts, "simple_average")
    assert str(caught.value).splitlines() == [
        "expert e0 misses fc.bias (2,), which the base has",
        "expert e0 has head (1,), which the base lacks",
        "expert e1 has fc.weight of shape (3, 2), where the base has (2, 3)",
        "expert e1 has fc.bias as torch.int64, where the base has torch.float32",
    ]


def test_the_number_of_experts_and_the_tensors_are_listed_together() -> None:
    base, experts = models(3)
    del experts["e2"]["fc.bias"]
    with pytest.raises(MergeError, match=r"(?s)nuslerp merges 2 experts.*expert e2 misses fc.bias"):
        merge_state_dicts(base, experts, "nuslerp")


def test_many_faults_are_counted() -> None:
    base = {f"w{index}": torch.zeros(1) for index in range(20)}
    with pytest.raises(MergeError, match="expert a: and 11 more"):
        merge_state_dicts(base, {"a": {"w0": torch.zeros(1)}}, "simple_average")


def test_without_a_base_the_first_expert_is_the_measure() -> None:
    _, experts = models()
    del experts["e1"]["fc.bias"]
    with pytest.raises(MergeError, match=r"expert e1 misses fc.bias \(2,\), which expert e0 has"):
        merge_state_dicts(None, experts, "simple_average")


def test_names_with_a_prefix_are_recognised() -> None:
    base, experts = models()
    experts["e0"] = {f"model.{name}": tensor for name, tensor in experts["e0"].items()}
    with pytest.raises(MergeError, match=r"names differ by a prefix: 'model\.fc\.weight' against 'fc\.weight'"):
        merge_state_dicts(base, experts, "simple_average")


def test_nothing_to_merge() -> None:
    with pytest.raises(MergeError, match="the base has no tensors"):
        merge_state_dicts({}, {"a": {}}, "simple_average")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["simple_average", "ties", "slerp", "opcm"])
def test_weights_that_are_no_numbers_are_named(value: float, method: str) -> None:
    base, experts = models()
    experts["e1"]["fc.bias"][1] = value
    with pytest.raises(
        MergeError, match=r"fc.bias has NaN or infinite weights in expert e1; a merge would spread them"
    ):
        merge_state_dicts(base, experts, method)


def test_a_base_that_is_no_number_is_named_too() -> None:
    base, experts = models()
    base["fc.bias"][0] = experts["e0"]["fc.bias"][0] = float("nan")
    with pytest.raises(MergeError, match=r"fc.bias has NaN or infinite weights in the base, expert e0;"):
        merge_state_dicts(base, experts, "task_arithmetic")
    with pytest.raises(MergeError, match=r"fc.bias has NaN or infinite weights in the base;"):
        merge_state_dicts(base, experts, "opcm")


def test_an_error_inside_a_method_carries_the_tensor_and_its_shape() -> None:
    _, experts = models()
    grams = {name: {"fc": torch.zeros(3, 3)} for name in experts}
    grams["e0"]["fc"][0, 0] = 1
    with pytest.raises(MergeError, match=r"regmean failed on fc.weight \(2, 3\): .*singular"):
        merge_state_dicts(None, experts, "regmean", {"ridge": 0.0}, grams)


# -- statistics ------------------------------------------------------------------------------------------------------


def test_statistics_that_are_missing() -> None:
    with pytest.raises(MergeError, match="fisher needs `stats`: for each expert, fisher by tensor name"):
        merge_state_dicts(*models(), "fisher")


def test_statistics_of_other_experts() -> None:
    with pytest.raises(MergeError, match="statistics are given for x; experts are e0, e1"):
        merge_state_dicts(*models(), "regmean", stats={"x": {}})


def test_statistics_that_no_tensor_has() -> None:
    stats = {name: {"model.fc": torch.eye(3)} for name in ("e0", "e1")}
    with pytest.raises(MergeError, match=r"none of expert e0's statistics has the name of a tensor.*first is model.fc"):
        merge_state_dicts(*models(), "regmean", stats=stats)


def test_statistics_that_nothing_reads() -> None:
    with pytest.raises(MergeError, match="ties takes no `stats`; leave them out"):
        merge_state_dicts(*models(), "ties", stats={"e0": {}, "e1": {}})


def test_statistics_in_another_order_than_the_experts() -> None:
    """They belong to experts by name."""
    base, experts = models()
    stats = {
        name: {key: torch.full_like(t, size) for key, t in base.items()} for name, size in (("e1", 0.0), ("e0", 1.0))
    }
    merged = merge_state_dicts(None, experts, "fisher", {"normalize": False}, stats)
    torch.testing.assert_close(merged["fc.bias"], experts["e0"]["fc.bias"], atol=1e-5, rtol=1e-5)
