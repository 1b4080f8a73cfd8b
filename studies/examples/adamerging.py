"""AdaMerging against Optuna on the same coefficients: one table, on the terminal and as a run of its own.

    python -m studies.examples.adamerging              # ten minutes on two cores
    python -m studies.examples.adamerging trials=20    # with overrides of the two searches

Both move the coefficients of task arithmetic, one for each expert or one for each expert and depth, from the same
start. AdaMerging minimises the entropy of its predictions on unlabelled inputs of the train split; Optuna maximises
accuracy on the labelled validation split. Every row is a run that is scored once on test.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from harness.compose import compose, flat
from harness.config import ROOT
from harness.run import run
from harness.track import open_run
from studies.run import run_study
from studies.settings import compose_study

STUDY = f"study={ROOT}/studies/examples/adamerging.yaml"
UNLABELLED = ["adaptation.split=train", "adaptation.examples=1000", "method.lr=0.003", "method.steps=300"]
GRAINS = {"expert": "task", "expert_layer": "layer"}  # what a study calls it -> what AdaMerging does


def compare(
    searches: Sequence[str] = (), runs: Sequence[str] = (), learned: Sequence[str] = UNLABELLED
) -> list[dict[str, Any]]:
    """A row for each way to choose the coefficients, each an MLflow run.

    Args:
        searches: Overrides of the two studies.
        runs: Overrides of the three runs without a study.
        learned: What AdaMerging is fed, and how long it learns.
    """
    rows = [_run("default", "one", "nothing", ["method=task_arithmetic", *runs])]
    for grain, own in GRAINS.items():
        choice = ["method=adamerging", f"method.granularity={own}", *learned, *runs]
        rows.append(_run("AdaMerging", grain, "unlabelled train inputs", choice))
        rows.append(_study(grain, searches))
    return rows


def _run(by: str, grain: str, sees: str, overrides: Sequence[str]) -> dict[str, Any]:
    started = time.perf_counter()
    outcome = run(compose(["pool=mini_clip8", "tasks=mini_clip8", *overrides]))
    return _row(by, grain, sees, time.perf_counter() - started, outcome.metrics, str(outcome.run_id))


def _study(grain: str, overrides: Sequence[str]) -> dict[str, Any]:
    started = time.perf_counter()
    finished = run_study(compose_study([STUDY, f"study.coefficients={grain}", *overrides], compose))
    winner = finished.winners[0]
    by = f"Optuna, {finished.settings.sampler}, {len(finished.rows)} trials"
    seconds = time.perf_counter() - started
    return _row(by, grain, "labelled validation split", seconds, winner.metrics, str(winner.run_id))


def _row(by: str, grain: str, sees: str, seconds: float, metrics: Any, run_id: str) -> dict[str, Any]:
    named = {"average on test": "average/accuracy", "worst on test": "worst/accuracy"}
    scores = {title: round(float(metrics[metric]), 4) for title, metric in named.items()}
    return {"chosen by": by, "coefficients": grain, "seen": sees, "seconds": round(seconds, 1), **scores, "run": run_id}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row.values())) + " |" for row in rows)])


def main(arguments: Sequence[str]) -> None:
    """Compare, print, record."""
    rows = compare(arguments)
    told = markdown(rows)
    config = compose(["method=task_arithmetic", "pool=mini_clip8", "tasks=mini_clip8"])
    name = "AdaMerging against Optuna on the same coefficients"
    with open_run(config.tracking.experiment, name, {"kind": "comparison"}, flat(config)) as tracked:
        tracked.table(rows, "comparison.json")
        tracked.describe(f"{name}.\n\n{told}\n")
    print(told)


if __name__ == "__main__":
    main(sys.argv[1:])
