import math

import pytest
import torch

from harness.merge import merge_state_dicts
from methods.opcm import Opcm, OpcmParams
from tests.methods.samples import SampleRoles

NAME = "layers.0.fc1.weight"
ROLES = SampleRoles()


def folded(base: dict[str, torch.Tensor], experts: list[dict[str, torch.Tensor]], alpha: float = 0.5) -> Opcm:
    fold = Opcm(base, OpcmParams(alpha=alpha), ROLES)
    for expert in experts:
        fold.update(expert)
    return fold


def random_models(n_experts: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {NAME: (6, 4), "layers.0.bias": (6,), "scalar": ()}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = [
        {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(n_experts)
    ]
    return base, experts


def norm(tensors: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((tensor - base[name]).double().square().sum()) for name, tensor in tensors.items()))


def test_by_hand() -> None:
    """First change diag(2, 1): its directions are the axes, 2 / 3 of the sum is in the first, so alpha 0.5 frees all
    but the diagonal. The second change keeps its off-diagonal (3, 4); the sum has norm sqrt(30), the changes have
    mean norm (sqrt 5 + sqrt 38) / 2."""
    base = {NAME: torch.zeros(2, 2)}
    first, second = torch.diag(torch.tensor([2.0, 1.0])), torch.tensor([[2.0, 3.0], [4.0, -3.0]])
    merged = folded(base, [{NAME: first}, {NAME: second}]).result()[NAME]
    total = torch.tensor([[2.0, 3.0], [4.0, 1.0]])
    torch.testing.assert_close(merged, total * (math.sqrt(5) + math.sqrt(38)) / 2 / math.sqrt(30))


def test_the_first_expert_is_itself() -> None:
    base, experts = random_models(1)
    merged = folded(base, experts).result()
    for name, tensor in experts[0].items():
        torch.testing.assert_close(merged[name], tensor)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_the_projected_change_is_orthogonal_to_what_is_merged(alpha: float) -> None:
    base, experts = random_models(2)
    fold = folded(base, experts[:1], alpha)
    merged = fold.merged[NAME].double()
    projected = fold._project(NAME, experts[1][NAME] - base[NAME]).double()
    assert float((merged * projected).sum()) == pytest.approx(0, abs=1e-6)
    u, s, vh = torch.linalg.svd(merged)
    rank = int((s.cumsum(0) / s.sum() <= alpha).sum())
    in_use = u[:, :rank].T @ projected @ vh[:rank].T  # between the leading directions nothing is left
    assert float(in_use.abs().max()) == pytest.approx(0, abs=1e-6) if rank else alpha == 0
    assert float(projected.norm()) > 0


def test_a_repeated_expert_adds_nothing_to_a_linear_layer() -> None:
    """Its change is the diagonal of the coordinates, all of which is in use."""
    base, experts = random_models(1)
    once = {NAME: base[NAME]}, [{NAME: experts[0][NAME]}]
    merged = folded(once[0], once[1] * 3).result()[NAME]
    torch.testing.assert_close(merged, experts[0][NAME])


@pytest.mark.parametrize("n_experts", [2, 3, 5])
def test_the_norm_is_the_mean_of_the_experts(n_experts: int) -> None:
    base, experts = random_models(n_experts)
    merged = folded(base, experts).result()
    assert norm(merged, base) == pytest.approx(sum(norm(expert, base) for expert in experts) / n_experts, rel=1e-5)


def test_what_is_no_linear_layer_is_summed() -> None:
    """One more bias: no projection, so two experts give the direction of the sum of their changes."""
    base, experts = random_models(2)
    merged = folded(base, experts).result()
    change = merged["layers.0.bias"] - base["layers.0.bias"]
    total = sum(expert["layers.0.bias"] - base["layers.0.bias"] for expert in experts)
    assert float(torch.nn.functional.cosine_similarity(change, total, dim=0)) == pytest.approx(1, abs=1e-5)


def test_experts_that_cancel_leave_the_base() -> None:
    base = {"bias": torch.zeros(6)}
    up, down = {"bias": torch.ones(6)}, {"bias": -torch.ones(6)}
    assert torch.equal(folded(base, [up, down]).result()["bias"], base["bias"])
    torch.testing.assert_close(folded(base, [up, down, up]).result()["bias"], up["bias"])


def test_one_expert_after_the_other_is_the_merge_of_all() -> None:
    """The fold that the engine runs is the same as updating by hand."""
    base, experts = random_models(3)
    whole = merge_state_dicts(base, {f"e{i}": e for i, e in enumerate(experts)}, "opcm", roles=ROLES)
    for name, tensor in folded(base, experts).result().items():
        assert torch.equal(whole[name], tensor)


@pytest.mark.parametrize("alpha", [1.0, -0.1, 50, float("nan")])
def test_alpha_is_a_share(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha is a share in \[0, 1\), got .*percentages are not accepted"):
        OpcmParams(alpha=alpha)
