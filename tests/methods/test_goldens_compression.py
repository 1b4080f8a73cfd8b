"""What FusionBench computes for compressed experts on the same inputs.

Where it does otherwise than the papers, an independent NumPy computation in float64 stands between: with its convention
it gives its result, with ours it gives ours.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import harness.pieces
from harness.compress import pack
from harness.inputs import Inputs
from harness.merge import Merge, merge_state_dicts
from methods.catalogue import CATALOGUE
from methods.packing import from_bits
from pools.faults import specs_of
from pools.roles import NamedRoles
from tests.methods.goldens import BOOK, GOLDENS, State, assert_golden, assert_near, models_of
from tests.methods.goldens import CASES as GOLDEN
from tests.methods.in_numpy import Arrays, arrays

ONE = "expert_1"


def beside(name: str, which: str) -> State:
    return load_file(GOLDENS / GOLDEN[name]["additional_outputs"][which])


def parts_of(name: str, method: str, **params: float) -> State:
    base, experts = models_of(name)
    row = CATALOGUE[method]
    found = pack(Merge(row, row.load_params()(**params), Inputs(base, experts, NamedRoles(specs_of(base)))))
    return dict(found.tensors)


def assert_same_masks(parts: State, masks: State, base: State) -> None:
    for key, mask in masks.items():
        expert, _, name = key.partition("::")
        bits = parts[f"{name}/masks"][int(expert.removeprefix("expert_"))]
        assert torch.equal(from_bits(bits, base[name]), mask.float()), key


def deltas_of(name: str) -> tuple[Arrays, list[Arrays]]:
    base, experts = models_of(name)
    start = arrays(base)
    return start, [{key: arrays(expert)[key] - start[key] for key in start} for expert in experts.values()]


def emr_in_numpy(base: Arrays, deltas: list[Arrays], one: int, by_tensor: bool) -> tuple[Arrays, list[float]]:
    """One expert's model and all rescalers: by means of tensors, as FusionBench has them, or over all entries."""
    unified = {}
    for name in base:
        stacked = np.stack([delta[name] for delta in deltas])
        sign = np.where(stacked.sum(0) > 0, 1.0, -1.0)
        unified[name] = sign * np.where(stacked * sign > 0, np.abs(stacked), 0).max(0)
    size = np.mean if by_tensor else np.sum
    masked = [{name: unified[name] * (delta[name] * unified[name] > 0) for name in base} for delta in deltas]
    scales = [
        sum(size(np.abs(delta[name])) for name in base) / sum(size(np.abs(kept[name])) for name in base)
        for delta, kept in zip(deltas, masked, strict=True)
    ]
    return {name: base[name] + scales[one] * masked[one][name] for name in base}, scales


def test_emr_elects_and_masks_alike() -> None:
    base, _ = models_of("emr_merging")
    parts = parts_of("emr_merging", "emr")
    assert_golden("emr_merging", {name: parts[f"{name}/unified"] for name in base})
    assert_same_masks(parts, beside("emr_merging", "masks"), base)


def test_emr_rescales_over_all_entries_where_fusion_bench_averages_tensors() -> None:
    name = "emr_merging"
    numbers = deltas_of(name)
    theirs, scales = emr_in_numpy(*numbers, 1, by_tensor=True)
    assert_near(theirs, beside(name, "applied_expert_1"), 2e-6)
    np.testing.assert_allclose(scales, beside(name, "rescalers")["rescalers"], rtol=1e-6)

    ours, scales = emr_in_numpy(*numbers, 1, by_tensor=False)
    base, experts = models_of(name)
    assert_near(merge_state_dicts(base, experts, "emr", {"expert": ONE}), ours, 2e-6)
    np.testing.assert_allclose(parts_of(name, "emr")[f"{next(iter(base))}/scales"], scales, rtol=1e-6)


def test_tall_masks_are_those_of_the_function() -> None:
    name = "tall_mask_utils_0"
    base, experts = models_of(name)
    params = {"selectivity": GOLDEN[name]["hyperparameters"]["tall_mask_lambda"]}
    assert_golden(name, merge_state_dicts(base, experts, "tall_mask", {"expert": ONE, **params}))
    assert_same_masks(parts_of(name, "tall_mask", **params), beside(name, "masks"), base)


def test_tall_masks_compare_changes_where_fusion_benchs_algorithm_compares_weights() -> None:
    name = "tall_mask_ta_class_0"
    base, deltas = deltas_of(name)
    multi = {key: sum(delta[key] for delta in deltas) for key in base}

    def computed(start: Arrays) -> Arrays:
        masks = {key: np.abs(start[key] - deltas[1][key]) > 0.6 * np.abs(multi[key] - deltas[1][key]) for key in base}
        return {key: base[key] + masks[key] * multi[key] for key in base}

    assert_golden(name, computed(base))
    ours = merge_state_dicts(*models_of(name), "tall_mask", {"expert": ONE, "selectivity": 0.6})
    assert_near(ours, computed({key: np.zeros_like(value) for key, value in base.items()}), 2e-6)


def test_randes_with_the_peers_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "randes_ta_0"
    given = GOLDEN[name]["hyperparameters"]
    base, experts = models_of(name)

    def drawer(seed, tensor, names, shape, offset, device):
        def draw(index: int) -> torch.Tensor:
            drawn = np.random.RandomState(given["random_seed"] + index)
            signs = drawn.binomial(p=0.5, n=1, size=(1, shape[-1]))
            return torch.from_numpy(signs).float().expand(shape)

        return draw

    monkeypatch.setattr(harness.pieces, "drawer", drawer)
    merged = merge_state_dicts(base, experts, "randes", {"expert": ONE, "scale": given["scaling_factor"]})
    assert_golden(name, merged)


def test_bitdelta_before_its_scales_are_trained() -> None:
    name = "bitdelta_untrained_expert_2"
    assert_golden(name, merge_state_dicts(*models_of(name), "bitdelta", {"expert": "expert_2"}))


def test_tsv_keeps_plain_singular_vectors_where_fusion_bench_makes_them_orthogonal_across_tasks() -> None:
    name = "tsvm_single_models"
    base, deltas = deltas_of(name)

    def computed(orthogonal: bool) -> Arrays:
        found = {}
        for key, start in base.items():
            if start.ndim != 2:
                found[key] = start + (np.mean([delta[key] for delta in deltas], 0) if orthogonal else deltas[1][key])
                continue
            k = min(start.shape) // len(deltas)
            parts = [np.linalg.svd(delta[key], full_matrices=False) for delta in deltas]
            u, v = np.hstack([one[0][:, :k] for one in parts]), np.vstack([one[2][:k] for one in parts])
            if orthogonal:
                u, v = polar(u), polar(v)
            own = slice(k, 2 * k)  # of the second expert
            found[key] = start + u[:, own] @ np.diag(parts[1][1][:k]) @ v[own]
        return found

    golden = beside(name, "single_expert_1")
    assert_near(computed(orthogonal=True), golden, GOLDEN[name]["precision"]["suggested_atol"])
    ours = merge_state_dicts(*models_of(name), "tsv_compress", {"expert": ONE})
    assert_near(ours, computed(orthogonal=False), 2e-6)


def polar(matrix: np.ndarray) -> np.ndarray:
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return u @ v


def test_every_golden_of_this_family_is_looked_at() -> None:
    family = ("emr", "tall_mask", "randes", "bitdelta", "tsvm_single")
    found = {case["id"] for case in BOOK["cases"] if case["id"].startswith(family)}
    assert found == {
        "emr_merging", "tall_mask_utils_0", "tall_mask_ta_class_0", "randes_ta_0", "bitdelta_untrained_expert_2",
        "tsvm_single_models",
    }  # fmt: skip
