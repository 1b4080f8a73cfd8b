"""Laws of searches, run against every catalogue row that learns something of a merge; devices: tests/harness."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methods.catalogue import CATALOGUE
from methods.kinds import Kind, Row, Stack
from tests.methods.stacks import SHAPES, searched, stack, targets

ROWS = [row for row in CATALOGUE.values() if row.kind is Kind.search and not row.rule]
PARTED = {"concrete_tsv_m": "TSV-M gives each of T copies one T-th of the directions"}
every = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def search_of(row: Row, own: Stack, **given: Any) -> Any:
    known = row.load_params().__dataclass_fields__
    return row.load()(own, row.load_params()(**{name: value for name, value in given.items() if name in known}))


@every
def test_copies_of_one_expert_at_shares_that_sum_to_one_are_that_expert(row: Row) -> None:
    one = stack(1)
    copies = {name: deltas.repeat(3, *[1] * len(deltas.shape[1:])) for name, deltas in one.deltas.items()}
    search = search_of(row, Stack(one.base, copies, one.places), scale=1 / 3, density=1.0)
    with torch.no_grad():
        search.finish()
    far = {
        name: float((search.weight(name) - one.base[name] - one.deltas[name][0]).abs().max().detach())
        for name in SHAPES
    }
    assert (max(far.values()) < 1e-5) == (row.name not in PARTED), far


@every
def test_equal_seeds_give_equal_weights_and_the_base_is_left(row: Row) -> None:
    found = []
    for _ in range(2):
        own = stack()
        base = {name: tensor.clone() for name, tensor in own.base.items()}
        search = search_of(row, own, steps=3, adamerging_steps=3, lr=0.1)
        searched(search, targets(stack()))
        assert all(torch.equal(own.base[name], tensor) for name, tensor in base.items())
        found.append({name: search.weight(name).detach() for name in SHAPES})
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
