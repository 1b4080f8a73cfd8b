"""What every catalogue row promises, whatever its kind."""

import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest

from methods.catalogue import CATALOGUE, find
from methods.kinds import Kind, Row, resolve
from methods.parameters import Range

ROOT = Path(__file__).parents[2]
every_row = pytest.mark.parametrize("row", CATALOGUE.values(), ids=lambda row: row.name)


def fields_of(row: Row) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(row.load_params())


@every_row
def test_a_name_stands_in_five_places(row: Row) -> None:
    assert CATALOGUE[row.name] is find(row.name) is row
    file = row.function.partition(":")[0].removeprefix("methods.")  # its own, or its family's
    assert row.params.startswith(f"methods.{file}:")
    for path in (f"methods/{file}.py", f"conf/method/{row.name}.yaml", f"tests/methods/test_{file}.py"):
        assert (ROOT / path).is_file(), path


def test_every_file_of_values_is_a_methods() -> None:
    assert {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")} == set(CATALOGUE)


@every_row
def test_everything_a_row_names_is_there(row: Row) -> None:
    assert callable(row.load())
    for dotted in (row.prepare, row.members):
        assert not dotted or callable(resolve(dotted))
    if row.rule:
        assert CATALOGUE[row.rule].kind is Kind.rule
    assert row.paper
    assert row.needs()


@every_row
def test_what_is_asked_for_is_accepted(row: Row) -> None:
    """Extras by keyword, as the row's facts promise them; none that the row does not ask for."""
    if row.kind not in (Kind.rule, Kind.informed):
        return
    parameters = inspect.signature(row.load()).parameters.values()
    asked = {"numbers": row.prepare, "draw": row.random, "stats": row.stats, "place": row.placed}
    keywords = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert keywords == {name for name, wanted in asked.items() if wanted}


@every_row
def test_facts_fit_the_kind(row: Row) -> None:
    low, high = row.n_experts
    assert low >= 0
    assert high is None or low <= high
    assert bool(row.stats) == (row.kind is Kind.informed) or row.entries, "a compression may choose entries by inputs"
    assert not row.rule or row.kind is Kind.search
    assert row.kind is not Kind.fold or not row.elementwise
    told = hasattr(row.load_params(), "from_tasks")  # some look at data only as their parameters say
    assert bool(row.data) == (bool(row.stats) or row.kind is Kind.search or bool(row.loss) or told)


@every_row
def test_params_are_frozen_and_have_defaults(row: Row) -> None:
    params = row.load_params()()
    assert row.load_params().__dataclass_params__.frozen
    for field in fields_of(row):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(params, field.name, getattr(params, field.name))


@every_row
def test_a_default_lies_in_the_range_that_studies_search(row: Row) -> None:
    """And so do the ends of the range pass the params' own checks."""
    for field in fields_of(row):
        searched = field.metadata.get("range")
        if searched is None:
            continue
        assert isinstance(searched, Range)
        if searched.choices:
            assert field.default in searched.choices
            ends = searched.choices
        else:
            assert searched.low <= field.default <= searched.high
            assert not searched.log or searched.low > 0
            ends = (searched.low, searched.high)
        for value in ends:
            row.load_params()(**{field.name: value})


@every_row
def test_numbers_that_are_none_are_refused(row: Row) -> None:
    for field in fields_of(row):
        if isinstance(field.default, float):
            for value in (float("nan"), float("inf"), float("-inf")):
                with pytest.raises(ValueError, match=field.name):
                    row.load_params()(**{field.name: value})
        if "list[float]" in str(field.type):
            for value in ([], [1.0, float("nan")]):
                with pytest.raises(ValueError, match=field.name):
                    row.load_params()(**{field.name: value})


@every_row
def test_the_module_says_where_the_method_is_from(row: Row) -> None:
    module = importlib.import_module(row.function.partition(":")[0])
    first, *rest = module.__doc__.strip().split("\n\n")
    assert first.endswith(".")
    assert "\nSource: " in module.__doc__
    assert "\nDiffers: " in module.__doc__
    if row.paper.startswith("arXiv:"):
        assert row.paper in "".join(rest)


@every_row
def test_the_file_of_values_starts_with_the_same_sentence(row: Row) -> None:
    module = importlib.import_module(row.function.partition(":")[0])
    sentence = " ".join(module.__doc__.strip().split("\n\n")[0].split())
    assert (ROOT / "conf" / "method" / f"{row.name}.yaml").read_text().startswith(f"# {sentence}\n")


def test_an_unknown_name_is_told_the_closest() -> None:
    with pytest.raises(KeyError, match=r"no method is called 'tie'; did you mean ties\?"):
        find("tie")
    with pytest.raises(KeyError, match="known are base, expert, simple_average"):
        find("zzz")
