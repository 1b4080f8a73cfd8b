from __future__ import annotations

import io
import itertools

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from harness import plots

NAMES = [f"task_{index}_{'long_name' if index % 3 == 0 else 'x'}" for index in range(20)]


def rows(n: int, **less) -> list[dict]:
    return [{"task": name, "value": 0.7, "expert": 0.95, "base": 0.4, **less} for name in NAMES[:n]]


def drawn(figure: Figure) -> list[Text]:
    """All visible text, after drawing: a warning while drawing is an error."""
    figure.savefig(io.BytesIO(), format="png")
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def of_ticks(figure: Figure) -> list[Text]:
    labels = figure.axes[0].get_xticklabels()
    return [label for label in labels if label.get_text()]


def overlap(texts: list[Text]) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    return [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]


def outside(figure: Figure, texts: list[Text]) -> list[str]:
    page = figure.bbox.padded(1)
    extents = [(text.get_text(), text.get_window_extent()) for text in texts]
    return [name for name, box in extents if box.x0 < page.x0 or box.x1 > page.x1 or box.y0 < page.y0]


@pytest.mark.parametrize("n", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("plot", [plots.bars, plots.radar])
def test_tasks_are_labelled_inside_the_page(plot, n):
    figure = plot(rows(n))
    drawn(figure)
    labels = of_ticks(figure)
    assert [label.get_text() for label in labels] == NAMES[:n]
    assert outside(figure, labels) == []


@pytest.mark.parametrize("n", [3, 8, 20])
def test_spokes_of_the_radar_do_not_touch(n):
    figure = plots.radar(rows(n))
    drawn(figure)
    assert overlap(of_ticks(figure)) == []


def test_bars_are_annotated_where_numbers_fit():
    assert {"70", "95", "40"} <= {text.get_text() for text in drawn(plots.bars(rows(8)))}
    assert "95" not in {text.get_text() for text in drawn(plots.bars(rows(20)))}


@pytest.mark.parametrize("plot", [plots.bars, plots.radar])
def test_without_references_only_the_merged_model_shows(plot):
    shown = {text.get_text() for text in drawn(plot(rows(4, expert=None, base=None)))}
    assert "merged" in shown
    assert not {"own expert", "base"} & shown


def test_one_unknown_reference_leaves_a_gap():
    partly = [*rows(3), {"task": "new", "value": 0.5, "expert": None, "base": 0.2}]
    assert "own expert" in {text.get_text() for text in drawn(plots.bars(partly))}
    drawn(plots.radar(partly))


@pytest.mark.parametrize("low", [0.1, -0.4])
def test_coefficients_by_layer_and_expert(low):
    values = {str(layer): [low, 0.25, 0.5] for layer in range(6)}
    figure = plots.coefficients(values, NAMES[:3])
    shown = [text.get_text() for text in drawn(figure)]
    assert shown.count("0.25") == 6
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == NAMES[:3]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(values)
    assert "merging coefficient" in shown


def test_names_of_tensors_lose_what_all_begin_with():
    values = {f"vision_model.layers.{layer}.mlp": [0.1, 0.2] for layer in range(3)}
    shown = plots.coefficients(values, NAMES[:2]).axes[0].get_yticklabels()
    assert [label.get_text() for label in shown] == ["0.mlp", "1.mlp", "2.mlp"]


def test_coefficients_that_are_all_zero():
    drawn(plots.coefficients({"all": [0.0, 0.0]}, NAMES[:2]))


@pytest.mark.parametrize("n", [2, 8, 20])
def test_similarity_is_square(n):
    figure = plots.similarity([[1.0 if i == j else -0.001 for j in range(n)] for i in range(n)], NAMES[:n])
    shown = [text.get_text() for text in drawn(figure)]
    assert "-0.00" not in shown
    assert len(figure.axes[0].get_yticklabels()) == n


def result(task: str, metric: str, value: float, expert: float | None, base: float | None = None) -> dict:
    from harness.report import share

    own = {"task": task, "metric": metric, "value": value, "expert": expert, "base": base}
    return own | {"normalized": share(metric, value, expert)}


def test_shares_of_one_metric_are_drawn_as_they_are():
    shown, what = plots.comparable([result("a", "exact_match", 0.5, None), result("b", "exact_match", 0.7, 0.9)])
    assert what == "exact_match"
    assert [row["value"] for row in shown] == [0.5, 0.7]
    assert "exact match in %" in {text.get_text() for text in drawn(plots.bars(shown, what))}


def test_other_scores_are_drawn_relative_to_the_own_expert():
    rows = [result("a", "perplexity", 8.0, 4.0, 16.0), result("b", "exact_match", 0.9, 0.6, 0.0)]
    shown, what = plots.comparable([*rows, result("alone", "perplexity", 3.0, None)])
    assert what == "normalized"
    assert [(row["value"], row["expert"], row["base"]) for row in shown] == [(0.5, 1.0, 0.25), (1.5, 1.0, 0.0)]
    figure = plots.bars(shown, what)
    assert {"50", "150", "score in % of the own expert's"} <= {text.get_text() for text in drawn(figure)}
    low, high = figure.axes[0].get_ylim()
    assert (low, high > 150) == (0, True)
    drawn(plots.radar([*shown, {**shown[0], "task": "c"}], what))


def test_nothing_is_drawn_of_what_cannot_be_compared():
    assert plots.comparable([result("a", "perplexity", 8.0, None)])[0] == []
    assert plots.comparable([])[0] == []
