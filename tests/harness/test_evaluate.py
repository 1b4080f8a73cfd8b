"""Scores are exact: every row counts once, in whichever batch it comes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from harness.evaluate import TaskScore, evaluate
from harness.examples import Examples
from harness.execute import launch, own_share


class Feeds:
    def feed(self, rows):
        return {"x": torch.stack(list(rows))}


class Passes(nn.Module):
    """Gives its input back, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


@pytest.fixture(scope="module")
def fabric():
    return launch("cpu", 1, "32-true", 0)


def examples(n: int, n_classes: int) -> Examples:
    generator = torch.Generator().manual_seed(n)
    rows = [(torch.randn(4, generator=generator), index % n_classes) for index in range(n)]
    return Examples(rows, Feeds(), torch.randn(n_classes, 4, generator=generator), range(n))


@pytest.mark.parametrize("batch_size", [1, 4, 17, 1000])
def test_scores_are_those_of_all_rows_at_once(fabric, batch_size):
    tasks = {"a": examples(17, 3), "b": examples(5, 5)}
    ticks: list[int] = []
    found = list(evaluate(fabric, Passes(), tasks, batch_size, ticks.append))
    assert [score.task for score in found] == ["a", "b"]
    assert sum(ticks) == 22
    for score, fed in zip(found, tasks.values(), strict=True):
        logits = 2 * torch.stack([row for row, _ in fed.rows]) @ fed.head.T
        labels = torch.tensor([label for _, label in fed.rows])
        right = int((logits.argmax(1) == labels).sum())
        assert round(score.accuracy * len(fed), 4) == right
        assert score.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
        assert score.n == len(fed)


def test_a_result_comes_before_the_next_task_is_read(fabric):
    class Broken:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise RuntimeError("read")

    tasks = {"a": examples(3, 2), "b": Examples(Broken(), Feeds(), torch.ones(2, 4), range(3))}
    arriving = evaluate(fabric, Passes(), tasks, 8)
    assert isinstance(next(arriving), TaskScore)
    with pytest.raises(RuntimeError, match="read"):
        next(arriving)


def test_evaluation_leaves_no_gradients(fabric):
    module = Passes().train()
    list(evaluate(fabric, module, {"a": examples(3, 2)}, 8))
    assert module.scale.grad is None
    assert not module.training


@pytest.mark.parametrize(("n", "world"), [(21, 2), (1, 4), (8, 3), (0, 2)])
def test_every_row_belongs_to_just_one_process(n, world):
    class Rank:
        world_size = world

        def __init__(self, rank):
            self.global_rank = rank

    shares = [list(own_share(Rank(rank), n)) for rank in range(world)]
    assert sorted(itertools.chain(*shares)) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
