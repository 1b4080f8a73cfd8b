from __future__ import annotations

import pytest

from harness import report
from harness.evaluate import TaskScore

SCORES = (
    TaskScore("digits", "accuracy", 0.9, True, 0.3, 300),
    TaskScore("letters", "accuracy", 0.6, True, 1.1, 400),
)
MIXED = (
    TaskScore("code", "perplexity", 8.0, False, 2.079, 30, {"tokens": 900.0}),
    TaskScore("docs", "perplexity", 2.0, False, 0.693, 20),
    TaskScore("sums", "exact_match", 0.5, True, 0.4, 50),
)
METRICS = {"average/accuracy": 0.75, "worst/accuracy": 0.6, "average/normalized": 0.775}


def described(**how) -> str:
    given = {"method": "ties", "pool": "mini_clip8", "metrics": METRICS, "run_id": "abc", "model_uri": "models:/m-1"}
    rows = report.results(SCORES, {"digits": 1.0, "letters": 1.0}, {"digits": 0.5, "letters": 0.25})
    return report.description(**{**given, "results": rows, **how})


def test_rows_hold_every_number():
    rows = report.results(SCORES, {"digits": 0.96}, {"digits": 0.5, "letters": 0.4})
    assert rows[0] == {
        "task": "digits",
        "metric": "accuracy",
        "value": 0.9,
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
    rows = report.results([TaskScore("a|b", "accuracy", 1.0, True, 0.0, 1)], {}, {})
    assert "| a\\|b | 100.0 % | 1 |" in described(results=rows)


def test_metrics_stand_beside_each_other_each_in_its_direction():
    rows = report.results(MIXED, {"code": 4.0, "docs": 2.0, "sums": 1.0}, {"code": 16.0, "docs": 8.0, "sums": 0.0})
    assert [row["normalized"] for row in rows] == [0.5, 1.0, 0.5]
    assert rows[0]["tokens"] == 900.0
    metrics = {"average/perplexity": 4.0, "average/exact_match": 0.5, "average/normalized": 2 / 3}
    text = described(results=rows, metrics=metrics, family="causal_lm")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == "| task | metric | merged | expert | base | of expert | examples |"
    assert lines[2] == "| code | perplexity ↓ | 8 | 4 | 16 | 50.0 % | 30 |"
    assert lines[4] == "| sums | exact match ↑ | 50.0 % | 100.0 % | 0.0 % | 50.0 % | 50 |"
    assert lines[5] == "| **average** | perplexity ↓ | **4** | **2.828** | **11.31** | **75.0 %** | 50 |"
    assert lines[6].startswith("| **average** | exact match ↑ | **50.0 %** |")
    first = text.splitlines()[0]
    for part in ("**4** average perplexity over 2 tasks; worst code at 8", "exact match over 1 task", "**66.7 %**"):
        assert part in first
    assert "AutoModelForCausalLM.from_pretrained(path)" in text


def test_a_mean_with_a_gap_is_left_out():
    titles, lines = report.summary(MIXED, {"code": 4.0, "sums": 1.0}, {})
    assert titles == ("task", "metric", "merged", "expert", "base", "of expert")
    assert lines[1] == ("docs", "perplexity ↓", "2", "-", "-", "-")
    assert lines[3] == ("average", "perplexity ↓", "4", "-", "-", "-")
    assert lines[4] == ("average", "exact match ↑", "50.0 %", "100.0 %", "-", "50.0 %")


def test_shares_alone_keep_their_plain_table():
    titles, lines = report.summary(SCORES, {"digits": 1.0, "letters": 1.0}, {})
    assert titles == ("task", "merged", "expert", "base", "merged / expert")
    assert lines[-1] == ("average", "75.0 %", "100.0 %", "-", "75.0 %")


def test_a_run_without_tasks_says_so():
    text = described(results=[], metrics={}, family="causal_lm")
    assert text.startswith("**ties** on **mini_clip8**: merged, and scored on no task.")
    assert "|" not in text
    assert "crucible run --from-run abc" in text
    assert 'download_artifacts("models:/m-1")' in described(results=[], metrics={}, family="state_dict")
    assert report.summary([], {}, {})[1] == []


def test_what_lm_eval_found_has_a_table_of_its_own():
    asked = [{"task": "arc", "metric": "acc", "value": 0.25, "stderr": 0.0125, "n": 40}]
    asked.append({"task": "all", "metric": "acc.first", "value": 0.5, "stderr": None, "n": None})
    text = described(asked=asked)
    assert "| arc | acc | 0.2500 | 0.0125 | 40 |" in text
    assert "| all | acc.first | 0.5000 | - | - |" in text
