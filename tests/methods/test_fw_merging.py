import pytest
import torch

from methods.fw_merging import FwMergingParams, fw_merging
from tests.methods.searching import INSIDE, quadratic, searched

HARD, SOFT = {"oracle": "hard"}, {"oracle": "soft", "inner_steps": 30, "lr": 0.3}
both = pytest.mark.parametrize("how", [HARD, SOFT], ids=["hard", "soft"])


def test_hard_by_hand() -> None:
    """From the average, wholly to the expert with the least slope, then two thirds of the way to the next."""
    slopes = iter([[3.0, 1.0, 2.0], [-1.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
    losses = iter([3.0, 2.0, 1.0])

    def objective(coefficients: torch.Tensor) -> tuple[float, torch.Tensor]:
        return next(losses), torch.tensor([next(slopes)])

    found, reports = searched(fw_merging, (1, 3), objective, FwMergingParams(steps=2))
    torch.testing.assert_close(reports[0][2], torch.full((1, 3), 1 / 3))
    assert reports[1][2].tolist() == [[0.0, 1.0, 0.0]]
    torch.testing.assert_close(found, torch.tensor([[2 / 3, 1 / 3, 0.0]]))


def test_an_expert_is_chosen_for_each_group_or_for_the_model() -> None:
    def objective(coefficients: torch.Tensor) -> tuple[float, torch.Tensor]:
        return 0.0, torch.tensor([[-1.0, 0.0], [0.0, -3.0]])

    for choose, second in (("group", [[1.0, 0.0], [0.0, 1.0]]), ("model", [[0.0, 1.0], [0.0, 1.0]])):
        _, reports = searched(fw_merging, (2, 2), objective, FwMergingParams(steps=1, choose=choose))
        assert reports[1][2].tolist() == second


@both
def test_the_least_loss_in_the_hull_is_found(how: dict) -> None:
    """Frank-Wolfe's error falls as 2 L d^2 / (t + 2); here L d^2 is 4."""
    found, reports = searched(fw_merging, (2, 3), quadratic(INSIDE), FwMergingParams(**how, steps=60))
    loss = quadratic(INSIDE)(found)[0]
    assert loss < 8 / 62 < reports[0][1]
    assert float(found.min()) >= 0
    torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_soft_needs_fewer_steps() -> None:
    soft, _ = searched(fw_merging, (2, 3), quadratic(INSIDE), FwMergingParams(**SOFT, steps=3))
    hard, _ = searched(fw_merging, (2, 3), quadratic(INSIDE), FwMergingParams(**HARD, steps=3))
    assert quadratic(INSIDE)(soft)[0] < 1e-4 < quadratic(INSIDE)(hard)[0]


@both
@pytest.mark.parametrize("scale", [None, 0.0, 0.3])
def test_what_is_kept_has_the_least_loss_of_all(how: dict, scale: float | None) -> None:
    params = FwMergingParams(**how, steps=4, scale=scale)
    found, reports = searched(fw_merging, (2, 3), quadratic(INSIDE), params)
    assert len(reports) == params.evaluations(3)
    assert [step for step, _, _ in reports] == list(range(params.evaluations(3)))
    assert quadratic(INSIDE)(found)[0] == min(loss for _, loss, _ in reports) < reports[0][1]


@both
def test_a_start_that_nothing_beats_is_kept(how: dict) -> None:
    found, _ = searched(fw_merging, (2, 3), quadratic(torch.full((2, 3), 1 / 3)), FwMergingParams(**how, steps=3))
    torch.testing.assert_close(found, torch.full((2, 3), 1 / 3))


@both
def test_copies_of_one_expert_give_that_expert(how: dict) -> None:
    """The loss knows the sum alone; whatever it is, coefficients sum to one, so that the copies' change is kept."""

    def objective(coefficients: torch.Tensor) -> tuple[float, torch.Tensor]:
        total = coefficients.sum(1, keepdim=True)
        return float((total - 0.2).square().sum()), (2 * (total - 0.2)).expand(2, 3)

    found, _ = searched(fw_merging, (2, 3), objective, FwMergingParams(**how, steps=5))
    torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_more_vertices_than_experts_are_all() -> None:
    few, _ = searched(fw_merging, (2, 3), quadratic(INSIDE), FwMergingParams(**SOFT, vertices=3))
    many, _ = searched(fw_merging, (2, 3), quadratic(INSIDE), FwMergingParams(**SOFT, vertices=8))
    assert torch.equal(few, many)


def test_a_loss_that_is_no_number_ends_the_search_with_its_step_and_coefficients() -> None:
    losses = iter([1.0, float("nan")])

    def objective(coefficients: torch.Tensor) -> tuple[float, torch.Tensor]:
        return next(losses), torch.tensor([[1.0, 0.0]])

    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1, where the coefficients are 0, 1; a smaller"):
        searched(fw_merging, (1, 2), objective, FwMergingParams())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"oracle": "firm"}, "oracle is one of hard, soft; got 'firm'"),
        ({"granularity": "block"}, "granularity is one of layer, task, tensor"),
        ({"choose": "task"}, "choose is one of group, model"),
        ({"step_size": 1.5}, r"step_size is a share in \(0, 1\]"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"vertices": 0}, "vertices must be at least 1"),
        ({"inner_steps": 0}, "inner_steps must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"scale": float("nan")}, "scale must be a finite number"),
    ],
)
def test_params_are_checked(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FwMergingParams(**params)
