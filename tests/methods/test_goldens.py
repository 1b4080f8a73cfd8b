"""What FusionBench and mergekit compute on the same inputs (../shared/goldens, laid beside the repository).

Where their conventions are ours, our result is theirs. Where we decided otherwise, an independent NumPy computation in
float64 stands between: with their convention it gives their result, with ours it gives ours.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import harness.pieces
from harness.merge import merge_state_dicts
from tests.methods.goldens import BOOK, CASES, State, assert_golden, assert_near, models_of, stats_of
from tests.methods.in_numpy import Arrays, arrays, opcm_in_numpy, ties_by_tensor, ties_over_model


def shares(name: str, percent: float, plus: int = 1) -> float:
    """Our density that keeps what FusionBench's `threshold` keeps: one entry more, integer buffers counted."""
    base, _ = models_of(name)
    theirs = int(sum(tensor.numel() for tensor in base.values()) * (percent / 100 if percent > 1 else percent)) + plus
    return theirs / sum(tensor.numel() for tensor in base.values() if tensor.is_floating_point())


# -- the conventions agree ------------------------------------------------------------------------------------------

SAME = {
    "simple_average": ("simple_average", {}),
    "simple_average_extras": ("simple_average", {}),
    "weighted_average_0": ("weighted_average", {"weights": [0.8, -0.3, 0.2, 0.1], "normalize": False}),
    "weighted_average_1": ("weighted_average", {"weights": [1.0, 2.0, 0.5, 1.5]}),
    "linear_interpolation_0": ("weighted_average", {"weights": [0.7, 0.3]}),
    "task_arithmetic_s0.3": ("task_arithmetic", {"scale": 0.3}),
    "task_arithmetic_s1.0": ("task_arithmetic", {"scale": 1.0}),
    "task_arithmetic_sm0.2": ("task_arithmetic", {"scale": -0.2}),
    "task_arithmetic_extras": ("task_arithmetic", {"scale": 0.3}),
    "slerp_0": ("slerp", {"t": 0.25}),
    "slerp_1": ("slerp", {"t": 0.7, "linear_above": 0.98}),
    "slerp_base_expert": ("slerp", {"t": 0.6}),
    "slerp_extras": ("slerp", {"t": 0.5}),
    "fisher_0": ("fisher", {}),
    "fisher_1": ("fisher", {"normalize": False}),
    "fisher_2": ("fisher", {"floor": 1e-4, "weights": [0.4, 0.3, 0.2, 0.1]}),
    "regmean_r1.0": ("regmean", {"off_diagonal": 1.0}),
    "regmean_r0.9": ("regmean", {"off_diagonal": 0.9}),
    "regmean_r0.1": ("regmean", {"off_diagonal": 0.1}),
    "mk_linear_norm": ("weighted_average", {"weights": [0.4, 0.3, 0.2, 0.3]}),
    "mk_linear_nonorm": ("weighted_average", {"weights": [0.4, 0.3, 0.2, 0.3], "normalize": False}),
    "mk_task_arithmetic": ("task_arithmetic", {"weights": [0.4, 0.3, 0.2, 0.3], "scale": 0.7}),
    "mk_ties_d0.2": ("ties", {"density": 0.2, "scope": "tensor"}),
    "mk_ties_extras": ("ties", {"density": 0.25, "scope": "tensor"}),
    "mk_ties_mixed": (
        "ties",
        {"densities": [0.1, 0.5, 0.9, 0.3], "weights": [0.4, 0.3, 0.2, 0.3], "scale": 0.8, "scope": "tensor"},
    ),
    "mk_ties_nonorm": (
        "ties",
        {"density": 0.4, "weights": [0.4, 0.3, 0.2, 0.3], "disjoint": "sum", "scope": "tensor"},
    ),
    "mk_ties_negative_weight": (
        "ties",
        {"density": 0.6, "weights": [0.8, -0.4, 0.6, 0.5], "disjoint": "sum", "scope": "tensor"},
    ),
    "mk_slerp_0": ("slerp", {"t": 0.3}),
    "mk_slerp_extras": ("slerp", {"t": 0.4}),
    "mk_cli_linear": ("weighted_average", {"weights": [0.5, 0.3, 0.7]}),
    "mk_cli_slerp": ("slerp", {"t": 0.35}),
}


@pytest.mark.parametrize("name", SAME)
def test_same_as_the_peer(name: str) -> None:
    method, params = SAME[name]
    base, experts = models_of(name)
    kinds = [which for which in ("fisher", "gram") if which in CASES[name]["inputs"]]
    stats = stats_of(name, kinds[0]) if kinds else None
    assert_golden(name, merge_state_dicts(base, experts, method, params, stats))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["method"] == "ties_merging"])
def test_ties_keeping_as_many_as_fusion_bench(name: str) -> None:
    given = CASES[name]["hyperparameters"]
    params = {
        "density": shares(name, given["threshold"]),
        "disjoint": given["merge_func"],
        "scale": given["scaling_factor"],
    }
    base, experts = models_of(name)
    assert_golden(name, merge_state_dicts(base, experts, "ties", params))


DARE = [name for name, case in CASES.items() if case["method"].startswith("dare_") and case["peer"] == "fusion_bench"]


@pytest.mark.parametrize("name", DARE)
def test_dare_with_the_peers_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our rule, fed numbers that drop what torch's generator dropped in FusionBench."""
    given = CASES[name]["hyperparameters"]
    base, experts = models_of(name)
    dropped = _fusion_bench_drops(given, base, tuple(experts))

    def drawer(seed, tensor, names, shape, offset, device):
        def draw(index: int) -> torch.Tensor:
            ours = dropped.get((names[index], tensor), torch.zeros_like(base[tensor]))
            return ours.reshape(-1)[offset : offset + math.prod(shape)].reshape(shape)

        return draw

    monkeypatch.setattr(harness.pieces, "drawer", drawer)
    rescale = "share" if given["rescale"] else "none"
    params = {"density": 1 - given["sparsity_ratio"], "scale": given["scaling_factor"], "rescale": rescale}
    if "threshold" in given:
        params |= {"base_rule": "ties", "trim": shares(name, given["threshold"]), "disjoint": given["merge_func"]}
    assert_golden(name, merge_state_dicts(base, experts, "dare", params))


def _fusion_bench_drops(
    given: dict[str, Any], base: State, experts: tuple[str, ...]
) -> dict[tuple[str, str], torch.Tensor]:
    """1 where the peer drops, 0 where it keeps: (expert, tensor) -> (*shape)."""
    linear = [f"{module}.weight" for module in BOOK["linear_module_order"]]
    visited = linear if given["only_on_linear_weights"] else BOOK["parameter_order"]
    generator = torch.Generator().manual_seed(given["torch_seed"])
    return {
        (expert, name): (torch.rand(base[name].shape, generator=generator) <= given["sparsity_ratio"]).float()
        for expert in experts
        for name in visited
    }


# -- the conventions differ: an independent computation stands between -----------------------------------------------


def test_ties_of_mergekit_but_for_matched_norms() -> None:
    """mergekit can rescale what is left to the L1 norm of each task vector; without that the computation gives ours."""
    name = "mk_ties_rescale"
    given = CASES[name]["hyperparameters"]
    base, experts = models_of(name)
    numbers = arrays(base), [arrays(expert) for expert in experts.values()]
    plain = [given["density"]] * len(experts), given["weight"], True, 1.0
    assert_golden(name, ties_by_tensor(*numbers, *plain, True))

    params = {"density": given["density"], "weights": given["weight"], "scope": "tensor"}
    assert_near(merge_state_dicts(base, experts, "ties", params), ties_by_tensor(*numbers, *plain, False), 2e-6)


@pytest.mark.parametrize("threshold", [20, 50, 80])
def test_ties_keeps_exactly_its_share(threshold: int) -> None:
    """FusionBench's reading keeps k + 1 entries and is its golden; k entries in the same computation give ours."""
    name = {20: "ties_t20_sum_s0.3", 50: "ties_t50_sum_s0.3", 80: "ties_t80_max_s0.5"}[threshold]
    given = CASES[name]["hyperparameters"]
    base, experts = models_of(name)
    numbers = arrays(base), [arrays(expert) for expert in experts.values()]
    n_entries = sum(tensor.numel() for tensor in base.values())
    n_kept = int(n_entries * threshold / 100)
    arguments = given["merge_func"], given["scaling_factor"]
    assert_golden(name, ties_over_model(*numbers, n_kept + 1, *arguments))

    params = {"density": threshold / 100, "disjoint": arguments[0], "scale": arguments[1]}
    ours = merge_state_dicts(base, experts, "ties", params)
    assert_near(ours, ties_over_model(*numbers, n_kept, *arguments), 2e-6)


def test_dare_divides_by_the_density_where_mergekit_matches_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """One computation with mergekit's masks: rescaled by L1 norms it is mergekit's golden, by the density ours."""
    name = "mk_dare_linear"
    given = CASES[name]["hyperparameters"]
    base, experts = models_of(name)
    generator = torch.Generator().manual_seed(given["torch_seed"])
    keep = {
        (key, expert): torch.bernoulli(torch.full(base[key].shape, given["density"]), generator=generator)
        for key in sorted(base)
        for expert in experts
    }

    def computed(weight: list[float], by_norm: bool) -> Arrays:
        merged = arrays(base)
        for key, start in arrays(base).items():
            for factor, (expert, tensors) in zip(weight, experts.items(), strict=True):
                delta = tensors[key].double().numpy() - start
                kept = delta * keep[key, expert].numpy()
                norm = np.abs(kept).sum()
                ratio = (np.abs(delta).sum() / norm if norm else 1) if by_norm else 1 / given["density"]
                merged[key] = merged[key] + factor * ratio * kept
        return merged

    def drawer(seed, tensor, names, shape, offset, device):
        return lambda index: (
            1 - keep[tensor, names[index]].reshape(-1)[offset : offset + math.prod(shape)].reshape(shape)
        )

    assert_golden(name, computed(given["weight"], by_norm=True))
    monkeypatch.setattr(harness.pieces, "drawer", drawer)
    ours = merge_state_dicts(base, experts, "dare", {"density": given["density"], "scale": 0.3})
    assert_near(ours, computed([0.3] * 4, by_norm=False), 2e-6)


CLASS_EMBEDDING = "vision_model.embeddings.class_embedding"


@pytest.mark.parametrize("name", ["opcm_0", "opcm_1", "opcm_2"])
def test_opcm_merges_the_class_embedding_where_fusion_bench_keeps_it(name: str) -> None:
    """One computation: with the class embedding held it is FusionBench's golden, without it is ours."""
    alpha = CASES[name]["hyperparameters"]["alpha"]
    base, experts = models_of(name)
    linear = {f"{module}.weight" for module in BOOK["linear_module_order"]}
    numbers = arrays(base), [arrays(expert) for expert in experts.values()]
    assert_golden(name, opcm_in_numpy(*numbers, alpha, linear, held={CLASS_EMBEDDING}))

    ours = merge_state_dicts(base, experts, "opcm", {"alpha": alpha})
    atol = CASES[name]["precision"]["suggested_atol"]
    assert_near(ours, opcm_in_numpy(*numbers, alpha, linear, held=set()), atol)
