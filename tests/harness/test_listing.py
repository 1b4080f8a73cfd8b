"""What `crucible list` prints of methods, and the pages generated from the same facts."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import cli, method_pages
from harness.method_pages import DOCS, FIGURE, about, changed_defaults, entry, pages, parameters, with_index
from methods.catalogue import CATALOGUE, FAMILIES, VENEERS, find
from methods.parameters import tunable

EVERY = {**CATALOGUE, **VENEERS}


def test_methods_are_listed_by_family_with_kind_needs_and_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "methods"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    rows = [line for line in lines if line.startswith("  ")]
    assert [line.split()[0] for line in rows] == ["name", *EVERY]
    headings = [line for line in lines if not line.startswith("  ")]
    assert headings == [name for name in FAMILIES if FAMILIES[name]] + ["veneers"] * bool(VENEERS)
    ties = next(line for line in rows if line.startswith("  ties "))
    assert all(part in ties for part in ("rule", "base, experts", "arXiv:2306.01708", "trim each expert's change"))


def test_one_method_is_told_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "methods", "slerp"]) == 0
    said = capsys.readouterr().out
    assert "https://arxiv.org/abs/2403.13257" in said
    assert "| `linear_above` | `0.9995` |  | \\|cosine\\| above which the interpolation is linear |" in said
    assert "| `t` | `0.5` | in [0.0, 1.0] | 0 is the first model, 1 the second |" in said
    assert "takes a base if there is one; the order of experts matters" in said


@pytest.mark.parametrize(
    ("given", "says"),
    [(("methods", "tise"), "no method is called 'tise'; did you mean ties?"), (("pools", "x"), "methods alone have")],
)
def test_a_page_that_is_not_there(given: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", *given]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", EVERY)
def test_a_method_says_what_its_page_needs(name: str) -> None:
    """Sections of the docstring, and a comment beside every parameter."""
    told = about(EVERY[name])
    assert told.summary
    assert not {"Source", "Differs", "Formula", "Cost"} - set(told.sections), "the module's docstring lacks sections"
    silent = [each.name for each in parameters(EVERY[name].load_params()) if not each.meaning]
    assert not silent, f"no comment beside {', '.join(silent)} says what it means"


def _without_figures(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith(FIGURE)]


def test_the_committed_pages_are_what_is_generated() -> None:
    """Figures of the benchmark aside."""
    stale = "run `python -m harness.method_pages` and commit docs/"
    made = pages({})
    assert {path.name for path in (DOCS / "methods").glob("*.md")} == set(made), stale
    for name, text in made.items():
        assert _without_figures((DOCS / "methods" / name).read_text()) == _without_figures(text), stale
    index = (DOCS / "methods.md").read_text()
    assert with_index(index) == index, stale


def test_every_method_has_one_entry() -> None:
    headings = [line for text in pages({}).values() for line in text.splitlines() if line.startswith("## ")]
    assert headings == [f"## `{name}`" for name in EVERY]


def test_a_figure_stands_on_one_line_of_its_own() -> None:
    row = find("ties")
    figure = {"method": "ties", "mean": 0.62, "low": 0.605, "high": 0.635, "settings": "density=0.4"}
    assert set(entry(row, figure).splitlines()) - set(entry(row).splitlines()) == {
        f"{FIGURE} 62.0 % (60.5 to 63.5), with density=0.4; [table](../benchmark.md)"
    }


def test_pages_are_written_and_those_of_no_family_go(tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "gone.md").write_text("old")
    (tmp_path / "methods.md").write_text(f"head\n{method_pages.BEGIN}\nold\n{method_pages.END}\ntail\n")
    rows = [{"method": "ties", "mean": 0.5, "low": 0.4, "high": 0.6}, {"method": "dare", "failed": "no disk"}]
    (tmp_path / "benchmark.json").write_text(json.dumps({"rows": rows}))
    method_pages.write(tmp_path)
    assert not (tmp_path / "methods" / "gone.md").exists()
    page = (tmp_path / "methods" / "task_vectors.md").read_text()
    assert f"{FIGURE} 50.0 % (40.0 to 60.0); [table](../benchmark.md)" in page
    assert f"{FIGURE} failed: no disk" in page
    text = (tmp_path / "methods.md").read_text()
    assert text.startswith("head\n")
    assert text.endswith("tail\n")
    assert "[`ties`](methods/task_vectors.md#ties)" in text


def test_an_index_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for the index"):
        with_index("# Methods\n")


@dataclass(frozen=True)
class _Plain:
    share: float = tunable(0.2, low=0.1, high=1.0)  # what is kept
    # said above,
    # in two lines
    above: int = 3
    long: float = tunable(
        0.5,
        low=0.0,
        high=1.0,
    )  # at the end
    choice: str = tunable("a", choices=("a", "b"))  # a # b


@dataclass(frozen=True)
class _Variant(_Plain):
    share: float = 0.4
    more: bool = True  # of the variant


def test_comments_are_read_wherever_they_stand() -> None:
    found = {each.name: (each.default, each.searched, each.meaning) for each in parameters(_Plain)}
    assert found == {
        "share": ("0.2", "in [0.1, 1.0]", "what is kept"),
        "above": ("3", "", "said above, in two lines"),
        "long": ("0.5", "in [0.0, 1.0]", "at the end"),
        "choice": ("a", "among a, b", "a # b"),
    }


def test_a_variant_inherits_what_is_said() -> None:
    found = {each.name: (each.default, each.meaning) for each in parameters(_Variant)}
    assert found["share"] == ("0.4", "what is kept")
    assert found["more"] == ("true", "of the variant")
    row = dataclasses.replace(find("ties"), params=f"{__name__}:_Variant")
    assert changed_defaults(row) == ["share=0.4"]
