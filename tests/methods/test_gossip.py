from collections.abc import Callable
from typing import Any

import pytest
import torch

from methods.gossip import GossipParams, gossip, neighbourhood
from tests.methods.searching import quadratic, searched

TARGET = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.4, 0.1, 0.4, 0.1]])  # (groups, T)


def no_loss(coefficients: torch.Tensor, tasks: list[int]) -> tuple[float, torch.Tensor]:
    raise AssertionError("nothing is to be asked")


def noted(seen: list[list[int]]) -> Callable[..., tuple[float, torch.Tensor]]:
    """A flat loss that writes down the tasks it was asked for."""

    def objective(coefficients: torch.Tensor, tasks: list[int]) -> tuple[float, torch.Tensor]:
        seen.append(tasks)
        return 1.0, torch.zeros_like(coefficients)

    return objective


@pytest.mark.parametrize(
    ("params", "n", "expected"),
    [
        ({}, 5, [[0, 1, 4], [0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 3, 4]]),
        ({}, 2, [[0, 1], [0, 1]]),
        ({}, 1, [[0]]),
        ({"topology": "rotate", "neighbours": 1}, 3, [[0, 1], [1, 2], [0, 2]]),
        ({"topology": "rotate", "neighbours": 2}, 4, [[0, 1, 2], [1, 2, 3], [0, 2, 3], [0, 1, 3]]),
        ({"topology": "rotate", "neighbours": 9}, 3, [[0, 1, 2]] * 3),
    ],
)
def test_neighbourhoods(params: dict, n: int, expected: list[list[int]]) -> None:
    assert [neighbourhood(index, n, GossipParams(**params)) for index in range(n)] == expected


def test_one_round_without_learning_by_hand() -> None:
    """Each node is the mean of itself and the next; a node's own coefficients are the row of a matrix."""
    params = {"topology": "rotate", "neighbours": 1, "rounds": 1, "steps": 0}
    found, _ = searched(gossip, (1, 3), no_loss, GossipParams(**params, node=2))
    assert found.tolist() == [[0.5, 0.0, 0.5]]
    average, _ = searched(gossip, (1, 3), no_loss, GossipParams(**params))
    torch.testing.assert_close(average, torch.full((1, 3), 1 / 3))
    shrunk, _ = searched(gossip, (1, 3), no_loss, GossipParams(**params, node=2, weights="free", scale=0.3))
    torch.testing.assert_close(shrunk, torch.tensor([[0.3, 0.0, 0.3]]))


def test_mixing_alone_spreads_every_expert_evenly() -> None:
    found, _ = searched(gossip, (1, 4), no_loss, GossipParams(rounds=30, steps=0, node=0))
    torch.testing.assert_close(found, torch.full((1, 4), 0.25))


def test_nodes_of_a_round_see_those_of_the_round_before() -> None:
    """Two rounds of passing half on: binomial weights, whichever node is merged first."""
    params = {"topology": "rotate", "neighbours": 1, "rounds": 2, "steps": 0}
    for node in range(4):
        found, _ = searched(gossip, (1, 4), no_loss, GossipParams(**params, node=node))
        expected = torch.tensor([0.25, 0.5, 0.25, 0.0]).roll(node)
        torch.testing.assert_close(found[0], expected)


def test_a_node_is_fed_the_tasks_that_have_reached_it() -> None:
    seen: list[list[int]] = []
    params = {"topology": "rotate", "neighbours": 1, "rounds": 2, "steps": 1}
    searched(gossip, (1, 4), noted(seen), GossipParams(**params))
    assert seen == [[0, 1], [1, 2], [2, 3], [0, 3], [0, 1, 2], [1, 2, 3], [0, 2, 3], [0, 1, 3]]
    seen.clear()
    searched(gossip, (1, 4), noted(seen), GossipParams(**params, own_tasks=False))
    assert seen == [[0, 1, 2, 3]] * 8


def test_the_first_step_by_hand() -> None:
    """Adam's first step is the learning rate against the sign of the slope of a member: that of its coefficients."""
    slopes = torch.tensor([[4.0, -1.0, 1.0]])

    def objective(coefficients: torch.Tensor, tasks: list[int]) -> tuple[float, torch.Tensor]:
        return 1.0, slopes

    params = {"topology": "rotate", "neighbours": 1, "rounds": 1, "steps": 1, "lr": 0.1}
    free, _ = searched(gossip, (1, 3), objective, GossipParams(**params, weights="free", node=0))
    torch.testing.assert_close(free, torch.tensor([[0.4, 0.6, 0.0]]))
    tied, _ = searched(gossip, (1, 3), objective, GossipParams(**params, node=2))  # members 0 and 2: both fall by 0.1
    torch.testing.assert_close(tied, torch.tensor([[0.5, 0.0, 0.5]]))


@pytest.mark.parametrize("weights", ["tied", "free"])
@pytest.mark.parametrize("topology", ["ring", "rotate"])
def test_learning_lowers_the_loss(weights: str, topology: str) -> None:
    params = GossipParams(topology=topology, weights=weights, rounds=4, steps=60, lr=0.02)
    objective = quadratic(TARGET)
    found, reports = searched(gossip, (2, 4), objective, params)
    still, _ = searched(gossip, (2, 4), objective, GossipParams(topology=topology, rounds=4, steps=0))
    assert objective(found)[0] < 0.3 * objective(still)[0]
    assert len(reports) == params.evaluations(4) == 4 * 60 * 4
    assert [step for step, _, _ in reports] == list(range(len(reports)))


def test_copies_of_one_expert_give_that_expert() -> None:
    """Tied weights keep the sum of the coefficients at one, whatever the loss would have."""
    found, _ = searched(gossip, (2, 4), quadratic(torch.full((2, 4), 5.0)), GossipParams(rounds=3, steps=10, lr=0.1))
    torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_equal_searches_are_equal() -> None:
    params = GossipParams(rounds=2, steps=10, lr=0.1)
    first, second = (searched(gossip, (2, 4), quadratic(TARGET), params)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_loss_that_is_no_number_ends_the_search() -> None:
    def objective(coefficients: torch.Tensor, **how: Any) -> tuple[float, torch.Tensor]:
        return float("inf"), torch.zeros_like(coefficients)

    with pytest.raises(FloatingPointError, match=r"loss is inf at step 0, where .* a smaller lr than 0.001 may help"):
        searched(gossip, (2, 4), objective, GossipParams())


def test_a_node_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="node is one of 0 to 2, one for each expert; got 3"):
        searched(gossip, (1, 3), no_loss, GossipParams(node=3))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"topology": "star"}, "topology is one of ring, rotate"),
        ({"weights": "fixed"}, "weights is one of tied, free"),
        ({"neighbours": 0}, "neighbours must be at least 1"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"node": -1}, "node must be at least 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"scale": float("inf")}, "scale must be a finite number"),
    ],
)
def test_params_are_checked(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GossipParams(**params)
