"""The spectral rules against FusionBench's results on the same inputs (../shared/goldens)."""

from __future__ import annotations

from typing import Any

import pytest

from harness.merge import merge_state_dicts
from tests.methods.goldens import CASES, assert_golden, models_of


class Roles:
    """Every matrix but the excluded is a linear layer's: what FusionBench's `exclude_keys` leaves."""

    n_layers = 2

    def __init__(self, linear: set[str]) -> None:
        self._linear = linear

    def is_buffer(self, name: str) -> bool:
        return name.endswith("position_ids")

    def is_linear(self, name: str) -> bool:
        return name in self._linear

    def is_transposed(self, name: str) -> bool:
        return False

    def layer_of(self, name: str) -> int:
        return 0

    def mlps(self) -> tuple[str, ...]:
        return ()


def merged(name: str, method: str, params: dict[str, Any]) -> dict[str, Any]:
    base, experts = models_of(name)
    assert base is not None
    excluded = CASES[name]["hyperparameters"].get("exclude_keys") or ()
    linear = {key for key, tensor in base.items() if tensor.dim() == 2 and key not in excluded}
    return merge_state_dicts(base, experts, method, params, roles=Roles(linear))


SCALES: dict[str, tuple[str, dict[str, Any]]] = {
    "iso_c_0": ("iso_c", {}),
    "iso_c_1": ("iso_c", {"scale": 1.5, "matrices": "linear"}),
    "iso_cts_0": ("iso_cts", {}),
    "iso_cts_1": ("iso_cts", {"scale": 1.2, "common_space_fraction": 0.5, "matrices": "linear"}),
    "iso_cts_2": ("iso_cts", {"scale": 0.9, "common_space_fraction": 0.0}),
    "tsvm_0": ("tsv_m", {}),
    "tsvm_1": ("tsv_m", {"scale": 0.6, "matrices": "linear"}),
    "tsvm_2": ("tsv_m", {"weights": [0.8, 1.2, 0.5, 1.0]}),
    "tsvm_single_models": ("tsv_m", {"scale": 0.7}),
    "tsvm_extras": ("tsv_m", {}),
}


@pytest.mark.parametrize("name", SCALES)
def test_isotropic_and_task_singular_vectors(name: str) -> None:
    assert_golden(name, merged(name, *SCALES[name]))


@pytest.mark.parametrize(
    ("name", "params"),
    [("singular_projection_0", {}), ("singular_projection_1", {"part": "high", "rank": 8})],
)
def test_singular_projection(name: str, params: dict[str, Any]) -> None:
    """Their linear layers are all two-dimensional weights but the position embedding."""
    base, experts = models_of(name)
    assert base is not None
    linear = {key for key, tensor in base.items() if tensor.dim() == 2 and "position" not in key}
    assert_golden(name, merge_state_dicts(base, experts, "singular_projection", params, roles=Roles(linear)))
