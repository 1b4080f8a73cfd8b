"""Goldens of the peers (../shared/goldens, laid beside the repository): their inputs, outputs and how near is near."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

GOLDENS = Path(__file__).parents[2].parent / "shared" / "goldens"
if not GOLDENS.is_dir():
    pytest.skip("needs ../shared/goldens beside the repository; this clone stands alone", allow_module_level=True)

BOOK = json.loads((GOLDENS / "cases.json").read_text())
CASES = {case["id"]: case for case in BOOK["cases"]}

State = dict[str, torch.Tensor]


def models_of(name: str) -> tuple[State | None, dict[str, State]]:
    """Base and experts of a case, in its order."""
    inputs = CASES[name]["inputs"]

    def load(member: str) -> State:
        folder = GOLDENS / inputs["dir"] / member
        return load_file(folder / "model.safetensors" if folder.is_dir() else folder.with_suffix(".safetensors"))

    base = load(inputs["base"]) if inputs["base"] else None
    return base, {expert: load(expert) for expert in inputs["experts"]}


def stats_of(name: str, which: str) -> dict[str, State]:
    inputs = CASES[name]["inputs"]
    files = zip(inputs["experts"], inputs[which], strict=True)
    return {expert: load_file(GOLDENS / inputs["stats_dir"] / f"{file}.safetensors") for expert, file in files}


def assert_golden(name: str, merged: dict[str, Any]) -> None:
    golden = load_file(GOLDENS / CASES[name]["output"])
    assert set(merged) == set(golden)
    assert_near(merged, golden, CASES[name]["precision"]["suggested_atol"])


def assert_near(merged: dict[str, Any], expected: dict[str, Any], atol: float) -> None:
    for key, tensor in expected.items():
        np.testing.assert_allclose(np.asarray(merged[key]), np.asarray(tensor), rtol=1e-5, atol=atol, err_msg=key)
