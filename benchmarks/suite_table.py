"""Methods on the embedded suite, tuned on validation, scored on test: the table of docs/suite.md.

    python benchmarks/suite_table.py                             # all rows; each is an MLflow run
    python benchmarks/suite_table.py --rows ties "fw_merging oracle=soft"
    python benchmarks/suite_table.py --done rows.jsonl           # goes on with what an interrupted call has finished

Each row's grid below is scored on the validation split, nothing recorded; the best setting is then one tracked run on
test. What learns is fed the train split's inputs, since training on the inputs that settings are chosen by would favour
long training; Fisher and RegMean count on those of validation.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from harness.compose import compose
from harness.run import run
from harness.trials import Resident
from methods.catalogue import find

LEARN: dict[str, list] = {"steps": [100], "lr": [1e-3, 3e-3, 1e-2]}
# A row is a method and what makes it the variant that it is, with what is tried on validation.
GRIDS: dict[str, dict[str, list]] = {
    "base": {},
    "simple_average": {},
    "weighted_average": {},
    "fisher": {},
    "task_arithmetic": {"scale": [0.1, 0.15, 0.2, 0.25, 0.3, 0.4]},
    "ties": {"density": [0.2, 0.4, 0.7], "scale": [0.5, 0.75, 1.0, 1.3, 1.6]},
    "dare": {"density": [0.5, 0.8], "scale": [0.1, 0.15, 0.2, 0.25, 0.3]},
    "regmean": {"off_diagonal": [0.9, 0.95, 1.0]},
    "opcm": {"alpha": [0.1, 0.3, 0.5]},
    "simple_ensemble": {},
    "weighted_ensemble": {},
    "max_model_predictor": {},
    "emr": {},
    "smile": {"k": [32, 64], "gate_k": [16, 32], "average_rest": [False, True]},
    "adamerging granularity=task": LEARN,
    "adamerging granularity=layer": LEARN,
    "adamerging": LEARN,
    "adamerging_plus": LEARN,
    "concrete_task_arithmetic": {"steps": [100], "lr": [1e-2, 1e-1], "scale": [0.25]},
    "concrete_adamerging": {"steps": [60], "lr": [1e-2, 1e-1], "adamerging_steps": [60], "adamerging_lr": [1e-2]},
    "concrete_tsv_m": {"steps": [100], "lr": [1e-2, 1e-1], "scale": [0.7]},
    "ada_rank": LEARN,
    "fw_merging oracle=hard": {"scale": [0.125, 0.25], "step_size": [0.1, 1.0]},
    "fw_merging oracle=soft": {"scale": [0.125, 0.25], "steps": [4], "inner_steps": [6], "lr": [0.03, 0.1]},
    "gossip topology=ring": {"rounds": [4], "steps": [8], "lr": [1e-2], "weights": ["tied", "free"]},
    "gossip topology=rotate": {"rounds": [4], "steps": [8], "lr": [1e-2], "weights": ["tied", "free"]},
    "lorahub": {"steps": [80, 160], "l1": [0.0], "scale": [0.25], "spread": [0.1]},
    "expert_merging": {"lr": [1e-2, 3e-2], "steps": [50]},
    "we_moe": {"steps": [100], "lr": [1e-3, 3e-3, 1e-2]},
    "sparse_we_moe": {"steps": [100], "lr": [1e-3, 3e-3]},
    "rankone_moe": {"steps": [100], "lr": [1e-3, 3e-3]},
    "pwe_moe by=scalarization": {"steps": [100], "lr": [1e-3, 1e-2]},
    "pwe_moe by=epo": {"steps": [100], "lr": [1e-3, 1e-2]},
    "dawe": {"steps": [40], "lr": [1e-4, 1e-3]},
    "twin_merging": {"steps": [400], "lr": [3e-3], "scale": [0.25], "density": [0.1, 0.3]},
    "surgery": {"steps": [300], "lr": [1e-2, 3e-2], "scale": [0.25]},
    "surgery_v2": {"steps": [100], "lr": [3e-3, 1e-2], "scale": [0.25]},
}
FEW = "adaptation.examples=64"  # every loss of these methods is that of all their examples
FED = {"fw_merging": FEW, "lorahub": FEW, "expert_merging": FEW, "dawe": "adaptation.batch_size=4"}


def overrides(row: str) -> list[str]:
    """A row's method, its variant and what it is fed.

    >>> overrides("ties density=0.4")
    ['method=ties', 'method.density=0.4']
    """
    method, *fixed = row.split()
    fed = ["adaptation.split=train", FED.get(method, "adaptation.examples=1000")] if find(method).loss else []
    return [f"method={method}", *fed, *(f"method.{word}" for word in fixed)]


def settings(row: str) -> list[list[str]]:
    """The grid of a row as overrides."""
    grid = GRIDS.get(row, {})
    return [
        [f"method.{key}={value}" for key, value in zip(grid, point, strict=True)]
        for point in itertools.product(*grid.values())
    ]


class Done:
    """What was finished, a line for each; without a file nothing is kept."""

    def __init__(self, place: Path | None) -> None:
        lines = place.read_text("utf-8").splitlines() if place and place.exists() else []
        self._place, self._known = place, {line["of"]: line for line in map(json.loads, lines)}

    def find(self, of: list[str], work: Any) -> dict[str, Any]:
        """What was found for these overrides, now or before."""
        key = " ".join(of)
        if key not in self._known:
            self._known[key] = {"of": key, **work()}
            if self._place:
                with self._place.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(self._known[key]) + "\n")
        return self._known[key]


def tuned(row: str, given: list[str], resident: Resident, done: Done) -> list[str]:
    """The setting of a row's grid that is best on validation."""
    tried: list[tuple[float, list[str]]] = []
    points = settings(row)
    for point in points if len(points) > 1 else []:
        asked = [*given, *overrides(row), *point, "evaluation.split=validation"]

        def validated(asked: list[str] = asked) -> dict[str, Any]:
            config = compose(asked)
            *_, last = resident.score(config, config.seed)
            return {"accuracy": last.metrics["average/accuracy"], "seconds": last.metrics["time/merge_s"]}

        found = done.find(asked, validated)
        print(f"  {row} {' '.join(point)}: {found['accuracy']:.4f} in {found['seconds']:.0f} s", flush=True)
        tried.append((found["accuracy"], point))
    return max(tried)[1] if tried else points[0]


def scored(asked: list[str]) -> dict[str, Any]:
    """One tracked run on test."""
    outcome = run(compose(asked))
    return {
        "run": outcome.run_id,
        "scores": {score.task: score.value for score in outcome.scores},
        "experts": dict(outcome.references.experts),
        "average": outcome.metrics["average/accuracy"],
        "normalised": outcome.metrics["average/normalized"],
    }


def table(rows: list[tuple[str, str, dict[str, Any]]]) -> str:
    """Markdown, the least average first."""
    known = rows[0][2]["experts"]
    lines = [f"| method | tuned on validation | {' | '.join(known)} | average | normalised |"]
    lines.append(f"|---|---|{'---:|' * (len(known) + 2)}")
    for row, chosen, found in sorted(rows, key=lambda row: row[2]["average"]):
        method, *fixed = row.split()
        name = f"`{method}`" + (f", {', '.join(fixed)}" if fixed else "")
        numbers = [*(found["scores"][task] for task in known), found["average"], found["normalised"]]
        lines.append(f"| {name} | {chosen} | {_percents(numbers)} |")
    numbers = [*known.values(), sum(known.values()) / len(known), 1.0]
    return "\n".join([*lines, f"| experts, each on its own task | | {_percents(numbers)} |"])


def _percents(numbers: list[float]) -> str:
    return " | ".join(f"{100 * number:.1f}" for number in numbers)


def main() -> None:
    """Tune, run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="such as pool=my/pool.yaml tasks=my/tasks.yaml")
    parser.add_argument("--rows", nargs="+", help="some of the rows: a method, or a method and its variant")
    parser.add_argument("--done", type=Path, help="where finished lines are kept, and found again")
    options = parser.parse_args()
    given, done = options.overrides, Done(options.done)
    resident = Resident(compose([*given, "evaluation.split=validation"]))
    rows = []
    for row in options.rows or GRIDS:
        best = tuned(row, given, resident, done)
        asked = [*given, *overrides(row), *best]
        found = done.find(asked, lambda asked=asked: scored(asked))
        chosen = ", ".join(text.removeprefix("method.") for text in best) or "defaults"
        rows.append((row, chosen, found))
        print(f"{row}: {found['average']:.3f} with {chosen}", flush=True)
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
