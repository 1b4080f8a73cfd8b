"""Laws of each family, held over shapes of every sort: scalars, nothing, one row, kernels of convolutions.

Which laws a row must keep follows from its family, its facts and its parameters, so that a new row is held to them by
itself. Where a paper's method breaks a law of its family, `BREAKS` says why, and the test must then find it broken.
Base and changes are multiples of 1/1024 without equal magnitudes: sums and differences are exact, nothing is a draw.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from methods.catalogue import FAMILIES, find
from methods.kinds import Base, Row
from tests.methods.samples import CASES, EXPERTS, SERVED, Case, State, few, merge_case, stats_for

Rng = torch.Generator
SHAPES = [(), (1,), (0,), (6,), (1, 5), (5, 1), (3, 0), (6, 4), (4, 7), (4, 3, 2, 2), (2, 3, 1)]
FAMILY = {row.name: family for family, rows in FAMILIES.items() for row in rows}
MEANS = ("averages", "geometry", "informed by data")  # families that stay between the experts
MATRICES = ("averages", "geometry", "spectra", "one after the other")  # families that know no single entries

# law -> row -> why the method of the paper breaks it. What is broken by all of a sort of rows is a condition instead.
BREAKS: dict[str, dict[str, str]] = {
    "homogeneous": {
        "ace": "`epsilon` is added to the changes' products, and the logarithms of norms are compared",
        "nearswap": "a weight moves by a number that does not grow with its change",
    },
    "in_any_unit": {"arcee_fusion": "importance is a divergence of the weights' softmax"},
    "translated": {
        "arcee_fusion": "divergences are of softmaxes of the weights",
        "nan": "experts are weighed by the norms of their weights",
        "singular_projection": "directions are those of the base's weights",
    },
    "rotated": {
        "ace": "the rows' mean is taken off each change",
        "arcee_fusion": "entries are chosen by their own importance",
        "continual_ties": "signs are elected entry by entry",
    },
    "equal_experts_are_the_mean": {
        "arcee_fusion": "only the most important of the changes are taken over",
        "nearswap": "what is farther from the base than `t` is not reached",
    },
    "equal_experts_keep_their_direction": {
        "cabs": "an expert is left what those before it have not taken",
        "pcb": "entries are weighed by how they compete",
    },
    "density_one_trims_nothing": {
        "pcb": "entries are weighed by how they compete",
        "sce": "experts are weighed by the squares of their changes",
    },
}


@dataclass(frozen=True)
class Models:
    """A base and experts."""

    base: State
    experts: dict[str, State]

    def moved(self, base: State, factor: float = 1.0) -> Models:
        """Another base, and the changes to it times a number."""

        def expert(own: State) -> State:
            return {name: base[name] + factor * (tensor - self.base[name]) for name, tensor in own.items()}

        return Models(base, {name: expert(own) for name, own in self.experts.items()})


def models_of(shapes: list[tuple[int, ...]], rng: Rng, n_experts: int) -> Models:
    """Models of these shapes; matrices are weights of linear layers."""
    sorts = {2: "fc1.weight", 4: "conv.weight"}
    named = {f"layers.{i}.{sorts.get(len(shape), 'bias')}": shape for i, shape in enumerate(shapes)}
    sizes = [math.prod(shape) for shape in named.values()]

    def change() -> list[torch.Tensor]:
        magnitudes = 1 + torch.randperm(sum(sizes), generator=rng)
        signs = 2 * torch.randint(2, (sum(sizes),), generator=rng) - 1
        return list((magnitudes * signs / 1024).split(sizes))

    base = {name: torch.randint(-512, 512, shape, generator=rng) / 256 for name, shape in named.items()}
    experts = {
        expert: {name: base[name] + delta.reshape(shape) for (name, shape), delta in zip(named.items(), change())}  # noqa: B905
        for expert in EXPERTS[:n_experts]
    }
    return Models(base, experts)


_DRAWN = {
    "shapes": st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    "seed": st.integers(0, 2**16),
    "n_experts": st.integers(2, len(EXPERTS)),
}
_CALM: dict[str, Any] = {
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate],
}
_PECULIAR = {row for rows in BREAKS.values() for row in rows}  # in rarer cases they break other laws too
_broken: set[tuple[str, str]] = set()  # the laws and rows of BREAKS that are held to be broken
_FEW, _MANY = settings(max_examples=3, **_CALM), settings(max_examples=40, **_CALM)
Check = Callable[[Case, Models, Rng], None]


def law(holds_for: Callable[[Case], bool], **changed: Any) -> Callable[[Check], Callable[..., None]]:
    """A law for the rows that a condition picks: few examples of their defaults, and when slow many of every variant.

    Args:
        holds_for: Which cases it is a law for.
        changed: Parameters that are set where a row has them.
    """

    def decorate(check: Check) -> Callable[..., None]:
        name = check.__name__.removeprefix("test_")
        broken = BREAKS.get(name, {})

        def cases(given: list[Case], many: bool) -> list[Any]:
            found = []
            for case in given:
                own = {key: value for key, value in {"steps": 4, **changed}.items() if key in _fields(case.row)}
                fitted = dataclasses.replace(case, params=case.params | own)
                if not holds_for(fitted) or (many and (case.veneers or case.row.name in _PECULIAR)):
                    continue
                marks = [pytest.mark.slow] if many else []
                if case.row.name in broken:
                    _broken.add((name, case.row.name))
                    marks.append(pytest.mark.xfail(reason=broken[case.row.name], raises=AssertionError, strict=True))
                found.append(pytest.param(fitted, many, marks=marks, id=f"{fitted}{'-many' if many else ''}"))
            return found

        params = cases([Case(row, few(row)) for row in SERVED], many=False) + cases(CASES, many=True)

        @pytest.mark.parametrize(("case", "many"), params)
        def test(case: Case, many: bool) -> None:
            @(_MANY if many else _FEW)
            @given(**_DRAWN)
            def holds(shapes: list[tuple[int, ...]], seed: int, n_experts: int) -> None:
                n = case.n_experts if many else min(n_experts, case.n_experts)  # lists are of as many as samples have
                rng = torch.Generator().manual_seed(seed)
                given = [(6, 4), *shapes] if case.row.prunes else shapes  # something to prune
                check(case, models_of(given, rng, n), rng)

            holds()

        test.__doc__ = check.__doc__
        return test

    return decorate


def _fields(row: Row) -> set[str]:
    return {field.name for field in dataclasses.fields(row.load_params())}


def _family(case: Case) -> str:
    return FAMILY[case.row.name]


def _optimised(case: Case) -> bool:
    """Whether it takes steps, which have a size of their own, along axes of their own."""
    return "lr" in _fields(case.row)


def _on_changes(case: Case) -> bool:
    """Whether it multiplies what it has made of the changes: a merge that need not lie between the experts."""
    return case.row.base is Base.needed and "scale" in _fields(case.row)


def merged(case: Case, models: Models, **given: Any) -> State:
    return merge_case(case, models.base, models.experts, **given)


def assert_states(found: State, expected: State, tolerance: float = 1e-5) -> None:
    for name, tensor in found.items():
        size = 1 + float(expected[name].abs().max()) if expected[name].numel() else 1.0
        assert torch.allclose(tensor, expected[name], rtol=0, atol=tolerance * size), name


@law(lambda case: not case.ordered)
def test_any_order_of_experts(case: Case, models: Models, rng: Rng) -> None:
    """Where the row says that the order does not matter, no permutation of the experts does."""
    names = [list(models.experts)[i] for i in torch.randperm(len(models.experts), generator=rng).tolist()]
    turned = Models(models.base, {name: models.experts[name] for name in names})
    assert_states(merged(case, turned), merged(case, models))


@law(lambda case: case.row.base is Base.needed and "scale" in _fields(case.row), scale=0.0)
def test_scale_zero_gives_the_base(case: Case, models: Models, rng: Rng) -> None:
    """To the bit, whatever the shapes."""
    for name, tensor in merged(case, models).items():
        assert torch.equal(tensor, models.base[name]), name


@law(lambda case: case.row.base is Base.needed and not _optimised(case) and "epsilon" not in case.params)
def test_homogeneous(case: Case, models: Models, rng: Rng) -> None:
    """Experts that have gone twice as far from the base give a merge that has."""
    stats = stats_for(case.row, models.experts)
    once = merged(case, models, stats=stats)
    twice = merged(case, models.moved(models.base, 2.0), stats=stats)
    assert_states(twice, {name: 2 * once[name] - models.base[name] for name in once})


@law(lambda case: case.row.name not in BREAKS["homogeneous"] and not _optimised(case) and "epsilon" not in case.params)
def test_in_any_unit(case: Case, models: Models, rng: Rng) -> None:
    """All models times two give the merge times two."""
    stats = stats_for(case.row, models.experts)
    doubled = models.moved({name: 2 * tensor for name, tensor in models.base.items()}, 2.0)
    once = merged(case, models, stats=stats)
    assert_states(merged(case, doubled, stats=stats), {name: 2 * tensor for name, tensor in once.items()})


@law(lambda case: case.row.base is Base.needed or _family(case) == "averages")
def test_translated(case: Case, models: Models, rng: Rng) -> None:
    """The same numbers added to base and experts are added to the merge: changes alone decide."""
    stats = stats_for(case.row, models.experts)
    by = {name: torch.randint(-64, 64, tensor.shape, generator=rng) / 64 for name, tensor in models.base.items()}
    there = models.moved({name: tensor + by[name] for name, tensor in models.base.items()})
    once = merged(case, models, stats=stats)
    assert_states(merged(case, there, stats=stats), {name: tensor + by[name] for name, tensor in once.items()})


@law(
    lambda case: _family(case) in MATRICES and not _optimised(case) and not {"along", "filter_wise"} & set(case.params)
)
def test_rotated(case: Case, models: Models, rng: Rng) -> None:
    """Orthogonal bases of a layer's inputs and outputs are arbitrary: merging rotated weights is rotating the merge."""
    matrices = {name: shape.shape for name, shape in models.base.items() if shape.dim() == 2}
    sides = {
        name: tuple(torch.linalg.qr(torch.randn((n, n), generator=rng, dtype=torch.float64))[0] for n in shape)
        for name, shape in matrices.items()
    }

    def rotated(state: State) -> State:
        turned = {name: (u @ state[name].double() @ v.mT).float() for name, (u, v) in sides.items()}
        return state | turned

    there = Models(rotated(models.base), {name: rotated(state) for name, state in models.experts.items()})
    assert_states(merged(case, there), rotated(merged(case, models)), 2e-4)


@law(lambda case: _family(case) in MEANS and not _on_changes(case), density=1.0)
def test_equal_experts_are_the_mean(case: Case, models: Models, rng: Rng) -> None:
    """Copies of one expert, or two, merge to that expert, whatever shares they have."""
    assert_states(merged(case, _equal(models)), next(iter(models.experts.values())))


@law(
    lambda case: _family(case) == "task vectors" and "epsilon" not in case.params,
    density=1.0, densities=None, trim=1.0, weights=None,
)  # fmt: skip
def test_equal_experts_keep_their_direction(case: Case, models: Models, rng: Rng) -> None:
    """Copies of one expert: its change, untrimmed, times `scale` where changes are averaged, T times it where added."""
    equal = _equal(models)
    scale = getattr(case.row.load_params()(**case.params), "scale", 1.0)
    found = merged(case, equal)
    expert, n = next(iter(models.experts.values())), len(models.experts)
    farthest = []
    for factor in (scale, n * scale):
        wanted = {name: models.base[name] + factor * (expert[name] - models.base[name]) for name in expert}
        farthest.append(
            max((float((found[k] - wanted[k]).abs().max()) for k in found if found[k].numel()), default=0.0)
        )
    assert min(farthest) < 1e-5


def _equal(models: Models) -> Models:
    first = next(iter(models.experts.values()))
    return Models(
        models.base, {name: {key: tensor.clone() for key, tensor in first.items()} for name in models.experts}
    )


@law(
    lambda case: _family(case) == "task vectors" and "density" in _fields(case.row),
    density=1.0, densities=None, trim=1.0, agree=0,
)  # fmt: skip
def test_density_one_trims_nothing(case: Case, models: Models, rng: Rng) -> None:
    """The same merge as by the rule that a trim is put before: task arithmetic, or TIES' election where one is held."""
    params = case.row.load_params()(**case.params)
    votes = "disjoint" in _fields(case.row) and getattr(params, "base_rule", "ties") == "ties"
    given = {
        key: getattr(params, key) for key in ("scale", "weights", *(["elect"] if votes else [])) if hasattr(params, key)
    }
    if votes:
        given |= {"density": 1.0, "disjoint": params.disjoint}
    plain = Case(find("ties" if votes else "task_arithmetic"), given)
    assert_states(merged(case, models), merged(plain, models))


def test_every_exception_is_of_a_law_that_the_row_would_be_held_to() -> None:
    assert _broken == {(name, row) for name, rows in BREAKS.items() for row in rows}
