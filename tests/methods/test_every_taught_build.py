"""What every catalogue row that makes modules learns, over pools of every family of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from harness.built import Built
from harness.examples import Examples, Texts
from harness.execute import launch
from harness.learn import Course, learn
from harness.losses import Losses
from methods.kinds import Row
from tests.methods.test_every_build import KINDS, ROWS, TEXTS, built, places, pool_of, rows_of  # noqa: F401

pytestmark = pytest.mark.slow


def fed(pool: Any, kind: str) -> dict[str, Any]:
    """Two tasks of the experts' names."""
    if kind == "clip":
        heads = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)) * 5
        found = {}
        for index, name in enumerate(pool.experts):
            images = [Image.new("RGB", (16, 16), (60 * label, 250 * index, 0)) for label in range(3)]
            found[name] = Examples([*zip(images, range(3), strict=True)], pool, heads[index], range(3))
        return found
    task = {"t5": "exact_match", "bert": "text_classification"}.get(kind, "perplexity")
    found = {}
    for index, name in enumerate(pool.experts):
        rows = [(text, index % 2) for index, text in enumerate(TEXTS)] if kind == "bert" else rows_of(kind)
        found[name] = Texts(task, rows[index:], pool, range(len(rows) - index), expert=name)
    return found


@pytest.fixture(scope="module")
def fabric():
    return launch("cpu", 1, "32-true", 0)


def taught(row: Row, pool: Any, kind: str, fabric: Any, steps: int, lr: float) -> tuple[Any, list[float]]:
    """The module, and the losses: on the way, and of all that it is fed, first before and then after learning."""
    module = built(row, pool, density=0.5, rank=4)

    def subject() -> Built:
        return Built(module, losses(), pool, 3)

    def losses() -> Losses:
        return Losses(fabric, fed(pool, kind), 8, 0, row.loss)  # all rows in every batch

    own = subject()
    assert own.learnt
    found = [own.slope(0, losses())]
    course = Course(row.name, steps, lr, lambda step, loss, shown: found.insert(len(found) - 1, loss))
    learn(fabric, own, losses(), course)
    found.append(subject().slope(0, losses()))
    own.finish()
    return module.eval(), found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [row for row in ROWS if row.loss], ids=lambda row: row.name)
def test_learning_lowers_the_loss_and_repeats_itself(places, fabric, row, kind) -> None:  # noqa: F811
    pool = pool_of(places, kind, {"ant": "ant", "bee": "bee"})
    before = {name: {key: expert[key].clone() for key in expert} for name, expert in pool.experts.items()}
    module, losses = taught(row, pool, kind, fabric, 8, 0.01)
    assert losses[-1] < losses[-2]
    again, same = taught(row, pool, kind, fabric, 8, 0.01)
    assert same == losses
    state, other = module.state_dict(), again.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    for name, expert in pool.experts.items():
        assert all(torch.equal(expert[key], tensor) for key, tensor in before[name].items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [row for row in ROWS if row.loss == "own"], ids=lambda row: row.name)
def test_a_rows_loss_does_not_depend_on_the_others(places, row, kind) -> None:  # noqa: F811
    """Nor on their length."""
    pool = pool_of(places, kind, {"ant": "ant", "bee": "bee"})
    module = built(row, pool)

    def losses(rows: list[Any]) -> torch.Tensor:
        inputs = pool.feed(rows)
        if kind in ("gpt2", "llama"):
            del inputs["labels"]
        return module.lesson.loss(module, 1, inputs).detach()

    together = losses(rows_of(kind))
    assert together.shape == (len(rows_of(kind)),)
    torch.testing.assert_close(together, torch.cat([losses([own]) for own in rows_of(kind)]), atol=1e-5, rtol=1e-4)
