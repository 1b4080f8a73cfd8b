from __future__ import annotations

import pytest

from harness import report
from harness.evaluate import TaskScore

SCORES = (TaskScore("digits", 0.9, 0.3, 300), TaskScore("letters", 0.6, 1.1, 400))
METRICS = {"average/accuracy": 0.75, "worst/accuracy": 0.6, "average/normalized": 0.775}


def described(**how) -> str:
    given = {"method": "ties", "pool": "mini_clip8", "metrics": METRICS, "run_id": "abc", "model_uri": "models:/m-1"}
    rows = report.results(SCORES, {"digits": 1.0, "letters": 1.0}, {"digits": 0.5, "letters": 0.25})
    return report.description(**{**given, "results": rows, **how})


def test_rows_hold_every_number():
    rows = report.results(SCORES, {"digits": 0.96}, {"digits": 0.5, "letters": 0.4})
    assert rows[0] == {
        "task": "digits",
        "accuracy": 0.9,
        "expert": 0.96,
        "base": 0.5,
        "normalized": pytest.approx(0.9375),
        "loss": 0.3,
        "n": 300,
    }
    assert rows[1]["expert"] is None
    assert rows[1]["normalized"] is None


def test_headline_names_average_share_and_worst():
    first = described().splitlines()[0]
    for part in ("ties", "mini_clip8", "75.0 %", "77.5 %", "2 tasks", "worst letters at 60.0 %"):
        assert part in first


def test_table_has_a_row_for_each_task_and_the_average():
    lines = [line for line in described().splitlines() if line.startswith("|")]
    assert lines[0] == "| task | merged | expert | base | merged / expert | examples |"
    assert lines[2] == "| digits | 90.0 % | 100.0 % | 50.0 % | 90.0 % | 300 |"
    assert lines[-1] == "| **average** | **75.0 %** | **100.0 %** | **37.5 %** | **75.0 %** | 700 |"


def test_without_references_there_are_no_empty_columns():
    rows = report.results(SCORES, {}, {})
    text = described(results=rows, metrics={"average/accuracy": 0.75, "worst/accuracy": 0.6})
    assert "| task | merged | examples |" in text
    assert "experts" not in text


def test_says_how_to_repeat_and_to_load():
    assert "crucible run --from-run abc" in described()
    assert 'load_model("models:/m-1")' in described()
    assert "load_model" not in described(model_uri=None)


def test_a_bar_in_a_name_does_not_break_the_table():
    rows = report.results([TaskScore("a|b", 1.0, 0.0, 1)], {}, {})
    assert "| a\\|b | 100.0 % | 1 |" in described(results=rows)
