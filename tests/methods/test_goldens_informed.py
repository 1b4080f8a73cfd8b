"""What FusionBench computes with AdaSVD's pieces on the same inputs: router, average and merge of each linear layer."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from harness.merge import merge_state_dicts
from tests.methods.goldens import CASES, GOLDENS, assert_golden, models_of

PIECES = [name for name, case in CASES.items() if case["method"].startswith("ada_svd")]


@pytest.mark.parametrize("name", PIECES)
def test_ada_svd_of_given_inputs(name: str) -> None:
    """The peer leaves at the base what is no linear layer."""
    case = CASES[name]
    base, experts = models_of(name)
    tokens = load_file(GOLDENS / case["inputs"]["stats_dir"] / f"{case['inputs']['linear_inputs']}.safetensors")
    given = case["hyperparameters"]
    params = {"rank": given["gate_k"], "scale": given["scaling_factor"] or 1.0, "average_rest": False}
    assert_golden(name, merge_state_dicts(base, experts, "ada_svd", params, dict.fromkeys(experts, tokens)))
