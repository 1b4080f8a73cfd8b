"""What is put around a rule: goldens, examples small enough to check by hand, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from harness.compose import compose, flat, from_yaml, to_yaml
from harness.config import ConfigError
from harness.merge import merge_state_dicts
from methods.kinds import Piece, Place
from methods.knots import KnotsParams, knots
from methods.larv import LarvParams, effective_rank, factors
from methods.svc import left_directions
from tests.methods.samples import SampleRoles, models

try:
    from tests.methods.goldens import CASES, GOLDENS, assert_golden, models_of
except pytest.skip.Exception:  # this clone stands alone
    CASES = {}

with_goldens = pytest.mark.skipif(not CASES, reason="needs ../shared/goldens beside the repository")


@with_goldens
@pytest.mark.parametrize("name", ["svc_task_arithmetic_0", "svc_task_arithmetic_1"])
def test_svc_around_task_arithmetic_is_the_peers(name: str) -> None:
    given = CASES[name]["hyperparameters"]
    base, experts = models_of(name)
    around = {"svc": {"alpha": given["alpha"]}}
    merged = merge_state_dicts(base, experts, "task_arithmetic", {"scale": given["scaling_factor"]}, veneers=around)
    assert_golden(name, merged)


@with_goldens
def test_svc_around_ties_is_the_peers() -> None:
    """The peer's TIES keeps one entry more of all numbers: as many are kept here."""
    name = "svc_ties"
    base, experts = models_of(name)
    n_entries = sum(tensor.numel() for tensor in base.values())
    density = (int(0.2 * n_entries) + 1) / n_entries
    params = {"density": density, "disjoint": "sum", "scale": 0.3}
    assert_golden(name, merge_state_dicts(base, experts, "ties", params, veneers={"svc": {"alpha": 0.5}}))


@with_goldens
def test_knots_aligns_as_the_peer_does() -> None:
    """Up to the sign of each direction, which no decomposition fixes."""
    name = "knots_alignment"
    golden = load_file(GOLDENS / CASES[name]["output"])
    base, experts = models_of(name)
    keys = [key.removesuffix("::aligned") for key in golden if key.endswith("::aligned")]
    assert keys
    for key in keys:
        stacked = torch.stack([expert[key] for expert in experts.values()])
        turned, _ = knots(Piece(key, base[key], stacked), KnotsParams(eps=1e-4), None)
        assert turned.experts.shape == golden[f"{key}::aligned"].shape
        atol = 10 * CASES[name]["precision"]["suggested_atol"]
        np.testing.assert_allclose(turned.experts.abs(), golden[f"{key}::aligned"].abs(), atol=atol)


def test_lines_goes_from_alpha_to_alpha_and_beta() -> None:
    base = {f"layers.{index}.fc1.weight": torch.zeros(2, 2) for index in range(3)} | {"head": torch.zeros(2)}
    expert = {name: torch.ones_like(tensor) for name, tensor in base.items()}
    around = {"lines": {"alpha": 0.2, "beta": 0.8}}
    merged = merge_state_dicts(base, {"a": expert}, "task_arithmetic", {"scale": 1.0}, veneers=around)
    assert [float(tensor.mean()) for tensor in merged.values()] == pytest.approx([0.2, 0.6, 1.0, 1.0])


def test_knots_changes_nothing_for_a_linear_rule_and_something_for_one_that_votes() -> None:
    base, experts = models()
    for method, same in (("task_arithmetic", True), ("ties", False)):
        plain = merge_state_dicts(base, experts, method, roles=SampleRoles())
        turned = merge_state_dicts(base, experts, method, roles=SampleRoles(), veneers={"knots": {}})
        near = all(torch.allclose(plain[name], turned[name], atol=1e-5) for name in base)
        assert near is same


def test_svc_shrinks_what_all_experts_share_to_one_share() -> None:
    """T experts with one change: its overlaps are T with the sum, so that the change itself is left."""
    base = {"w": torch.zeros(3, 2)}
    change = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    experts = {name: {"w": change.clone()} for name in "abc"}
    merged = merge_state_dicts(base, experts, "task_arithmetic", {"scale": 1.0}, veneers={"svc": {"alpha": 0.1}})
    torch.testing.assert_close(merged["w"], change)


def test_left_directions_leave_out_what_is_nil() -> None:
    matrix = torch.outer(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 1.0])).double()
    found = left_directions(matrix)
    assert found.shape == (3, 1)
    torch.testing.assert_close(found.abs()[:, 0], torch.tensor([1.0, 2.0, 2.0]).double() / 3)


def test_larv_scales_up_the_layers_whose_change_is_concentrated() -> None:
    """Full-rank, middling and rank-one changes beside bases of full rank."""
    generator = torch.Generator().manual_seed(0)
    changes = [torch.eye(6), torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0])), torch.diag(torch.eye(6)[0])]
    pieces = []
    for layer, change in enumerate(changes, start=1):
        base = torch.randn(6, 6, generator=generator)
        place = Place(layer, 3, linear=True)
        pieces.append(Piece(f"layers.{layer}.weight", base, (base + change)[None], place=place))
    found = factors(lambda function, limit=None: map(function, pieces), LarvParams(low=0.5, high=2.0))
    assert {layer: scale.tolist() for layer, scale in found.items()} == {1: [0.5], 2: [1.0], 3: [2.0]}
    assert effective_rank(changes[1]) == pytest.approx(3.0)


def test_order_of_veneers_is_that_of_the_list() -> None:
    base, experts = models()
    one = merge_state_dicts(base, experts, "ties", veneers={"svc": {}, "knots": {}}, roles=SampleRoles())
    other = merge_state_dicts(base, experts, "ties", veneers={"knots": {}, "svc": {}}, roles=SampleRoles())
    assert any(not torch.equal(one[name], other[name]) for name in base)


@pytest.mark.parametrize(
    ("veneers", "words"),
    [
        ({"scv": {}}, "no veneer|none is called 'scv'; did you mean svc"),
        ({"svc": {"alpha": 2.0}}, "alpha is a share"),
        ({"knots": {"eps": -1.0}}, "eps must be at least 0"),
        ({"lines": {"alpha": float("nan")}}, "alpha must be a finite number"),
    ],
)
def test_refused(veneers: dict[str, dict[str, float]], words: str) -> None:
    base, experts = models()
    with pytest.raises(ValueError, match=words):
        merge_state_dicts(base, experts, "ties", veneers=veneers)


def test_unknown_parameters_are_named() -> None:
    base, experts = models()
    with pytest.raises(TypeError, match="svc has no parameter alfa; it has alpha, matrices"):
        merge_state_dicts(base, experts, "ties", veneers={"svc": {"alfa": 1}})


@pytest.mark.parametrize(
    ("method", "words"),
    [("simple_ensemble", "builds a module"), ("adamerging", "learns coefficients"), ("opcm", "one after the other")],
)
def test_no_veneer_around_what_is_no_rule(method: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose([f"method={method}", "veneers=[svc]"])


def test_configured_and_written_again() -> None:
    config = compose(["method=ties", "veneers=[lines,svc]", "veneer.lines.alpha=0.3"])
    again = from_yaml(to_yaml(config))
    assert again == config
    assert flat(config)["veneer.lines.alpha"] == "0.3"
    assert not [key for key in flat(compose(["method=ties"])) if key.startswith("veneer.")]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("veneers=[scv]", "did you mean svc"),
        ("veneers=[svc,svc]", "each one once"),
        ("veneer.svc.alfa=1", "no such key; did you mean veneer.svc.alpha"),
        ("veneer.svc.alpha=2", "alpha is a share"),
    ],
)
def test_refused_before_anything_is_read(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose(["method=ties", override])
