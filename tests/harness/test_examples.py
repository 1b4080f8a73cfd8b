"""Rows as tensors: fed once where they fit, anew where they do not, and always in the order asked for."""

from __future__ import annotations

import itertools

import pytest
import torch

from harness import examples
from harness.examples import Examples, Texts, choose, endless


class Counts:
    """Feeds numbers, and remembers how often."""

    def __init__(self) -> None:
        self.fed: list[int] = []

    def feed(self, rows):
        self.fed += rows
        return {"x": torch.tensor(rows, dtype=torch.float32)[:, None], "y": -torch.tensor(rows)}


def rows(n: int) -> list[tuple[int, int]]:
    return [(10 * index, index % 3) for index in range(n)]


@pytest.mark.parametrize("kept", [True, False])
def test_batches_are_the_rows_asked_for(monkeypatch, kept):
    monkeypatch.setattr(examples, "KEPT_BYTES", 1 << 20 if kept else 10)
    pool = Counts()
    fed = Examples(rows(150), pool, torch.ones(3, 1), range(149, -1, -1))
    inputs, labels = fed.batch([0, 4, 149])
    assert inputs["x"].flatten().tolist() == [1490, 1450, 0]
    assert inputs["y"].tolist() == [-1490, -1450, 0]
    assert labels.tolist() == [149 % 3, 145 % 3, 0]
    sizes = [len(labels) for _, labels in fed.batches(range(0, 150, 2), 20)]
    assert sizes == [20, 20, 20, 15]
    assert pool.fed.count(1450) == (1 if kept else 2)
    assert pool.fed.count(10) == 1
    assert len(pool.fed) == (151 if kept else 1 + 3 + 75)  # the first was fed to see whether all would fit


def test_no_positions_no_batches():
    assert list(Examples(rows(3), Counts(), torch.ones(3, 1), range(3)).batches([], 4)) == []


def test_texts_come_the_longest_first_and_each_once():
    rows = ["aa", "b", ("ccc", "dd"), ("e" * 9, 1), ""]
    texts = Texts("perplexity", rows, Counts(), range(5))
    assert list(texts.batches(range(5), 2)) == [[rows[3], rows[2]], [rows[0], rows[1]], [""]]
    assert list(Texts("perplexity", rows, Counts(), [4, 1]).batches([0, 1], 9)) == [["b", ""]]
    assert (len(texts), texts.chosen([2, 0])) == (5, [rows[2], "aa"])


def test_a_choice_is_seeded_sorted_and_without_repeats():
    chosen = choose(1000, 20, seed=1)
    assert chosen == choose(1000, 20, seed=1) == sorted(set(chosen))
    assert len(chosen) == 20
    assert chosen != choose(1000, 20, seed=2)
    assert choose(5, None, 0) == choose(5, 5, 0) == choose(5, 9, 0) == range(5)


@pytest.mark.parametrize(("n", "size"), [(5, 2), (3, 7), (4, 4)])
def test_endless_batches_take_every_position_equally_often(n, size):
    batches = list(itertools.islice(endless(n, size, seed=0), n))
    assert {len(batch) for batch in batches} == {size}
    taken = list(itertools.chain(*batches))
    assert [taken.count(position) for position in range(n)] == [size] * n
    assert batches == list(itertools.islice(endless(n, size, seed=0), n))
    for start in range(0, n * size, n):
        assert sorted(taken[start : start + n]) == list(range(n))
