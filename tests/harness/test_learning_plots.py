"""What is drawn of learning and of routers."""

from __future__ import annotations

import pytest

from harness.learning_plots import learning_curve, routing
from tests.harness.test_plots import NAMES, drawn


@pytest.mark.parametrize("n", [1, 15, 1000])
def test_learning_curve(n):
    shown = {text.get_text() for text in drawn(learning_curve([1 / (step + 1) for step in range(n)]))}
    assert {"step", "loss in nats"} <= shown


@pytest.mark.parametrize("n", [1, 8, 20])
def test_coefficients_are_drawn_beside_the_loss(n):
    courses = [[step / 10 + index for index in range(n)] for step in range(5)]
    figure = learning_curve([1.0] * 5, "adamerging", "loss", courses, NAMES[:n])
    shown = {text.get_text() for text in drawn(figure)}
    assert {"adamerging: loss", "adamerging: coefficients", "loss"} <= shown
    lines = figure.axes[1].get_lines()
    assert [list(line.get_ydata()) for line in lines[:2]] == [[row[i] for row in courses] for i in range(min(n, 2))]


def test_what_is_kept_is_drawn_over_each_step():
    figure = learning_curve(
        [3.0, 1.0, 2.0, 0.5], "lorahub", coefficients=[[0.1], [0.2], [0.3], [0.4]], experts=["a"], best=True
    )
    shown = [[list(line.get_ydata()) for line in axes.get_lines()] for axes in figure.axes]
    assert shown == [[[3.0, 1.0, 2.0, 0.5], [3.0, 1.0, 1.0, 0.5]], [[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.2, 0.4]]]


def test_routing_is_the_mean_over_routers():
    rows = [
        {"task": task, "router": router, "expert": expert, "mean": mean}
        for router, share in (("a", 0.5), ("b", 1.0))
        for task, own in (("digits", "one"), ("letters", "two"))
        for expert, mean in {"one": 1 - share, "two": 1 - share, own: share}.items()
    ]
    figure = routing(rows, ["one", "two"], "we_moe")
    shown = {text.get_text() for text in drawn(figure)}
    assert {"digits", "letters", "one", "two", "we_moe", "mean gate of 2 routers", "0.75", "0.25"} <= shown
    assert figure.axes[0].images[0].get_array().tolist() == [[0.75, 0.25], [0.25, 0.75]]
