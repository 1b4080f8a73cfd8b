"""Every method on the embedded suite, tuned on the validation split, scored on test: the table of docs/methods.md.

    python benchmarks/suite_table.py                        # all methods; each row is an MLflow run
    python benchmarks/suite_table.py --methods ties dare

Each method's grid below is scored on the validation split, nothing recorded; the best setting is then one tracked run
on test. AdaMerging and WE-MoE learn on the inputs of the train split, Fisher and RegMean count on those of validation.
"""

from __future__ import annotations

import argparse
import itertools
import math

from lightning.fabric import Fabric

from harness.bench import Bench, open_bench
from harness.compose import compose
from harness.evaluate import evaluate
from harness.execute import launch
from harness.make import Job, make
from harness.merge import merge
from harness.run import run
from harness.track import local_path
from methods.catalogue import CATALOGUE, find

GRIDS: dict[str, dict[str, list]] = {
    "task_arithmetic": {"scale": [0.1, 0.15, 0.2, 0.25, 0.3, 0.4]},
    "ties": {"density": [0.2, 0.4, 0.7], "scale": [0.5, 0.75, 1.0, 1.3, 1.6]},
    "dare": {"density": [0.5, 0.8], "scale": [0.1, 0.15, 0.2, 0.25, 0.3]},
    "regmean": {"off_diagonal": [0.9, 0.95, 1.0]},
    "opcm": {"alpha": [0.1, 0.3, 0.5]},
    "adamerging": {"lr": [1e-3, 3e-3], "steps": [100, 300]},
    "we_moe": {"lr": [1e-3], "steps": [100, 200, 400]},
}
# Training on the inputs that settings are chosen by would favour long training: these two are fed the train split's.
FED = {name: ["adaptation.split=train", "adaptation.examples=1000"] for name in ("adamerging", "we_moe")}
FIXED = {"expert": "one expert, on its own and the other tasks", "slerp": "merges two"}


def settings(method: str) -> list[list[str]]:
    """The grid of a method as overrides."""
    grid = GRIDS.get(method, {})
    return [
        [f"method.{key}={value}" for key, value in zip(grid, point, strict=True)]
        for point in itertools.product(*grid.values())
    ]


def validated(fabric: Fabric, bench: Bench, method: str, overrides: list[str]) -> float:
    """Mean accuracy on the validation split."""
    config = compose([f"method={method}", *overrides, "evaluation.split=validation"])
    made = make(Job(find(method), config.method, bench, fabric, config.adaptation, config.seed))
    module = made.module if made.module is not None else bench.pool.module(merge(made.merge))
    tasks = bench.evaluation(config.evaluation, config.seed)
    scores = [score.value for score in evaluate(fabric, module, tasks, config.evaluation.batch_size)]
    return math.fsum(scores) / len(scores)


def main() -> None:
    """Tune, run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="such as pool=my/pool.yaml tasks=my/tasks.yaml")
    parser.add_argument("--methods", nargs="+", default=[name for name in CATALOGUE if name not in FIXED])
    options = parser.parse_args()
    plain = compose(options.overrides)
    fabric = launch(plain.fabric.accelerator, 1, plain.fabric.precision, plain.seed)
    bench = open_bench(plain.pool, plain.tasks, local_path)
    rows = []
    for method in options.methods:
        given = [*options.overrides, *FED.get(method, [])]
        points = [[*given, *point] for point in settings(method)] if method in GRIDS else []
        tried = [(validated(fabric, bench, method, point), point) for point in points]
        best = max(tried)[1] if tried else []
        outcome = run(compose([f"method={method}", *(best or given)]))
        found = [text.removeprefix("method.") for text in best if text.startswith("method.")]
        chosen = ", ".join(found) or "defaults"
        rows.append((method, chosen, outcome))
        print(f"{method}: {outcome.metrics['average/accuracy']:.3f} with {chosen}", flush=True)
    known = rows[0][2].references
    experts = math.fsum(known.experts.values()) / len(known.experts)
    tasks = list(known.experts)
    print(f"\n| method | tuned on validation | {' | '.join(tasks)} | average | normalised |")
    print(f"|---|---|{'---:|' * (len(tasks) + 2)}")
    for method, chosen, outcome in sorted(rows, key=lambda row: row[2].metrics["average/accuracy"]):
        cells = " | ".join(f"{100 * score.value:.1f}" for score in outcome.scores)
        metrics = outcome.metrics
        shares = f"{100 * metrics['average/accuracy']:.1f} | {100 * metrics['average/normalized']:.1f}"
        print(f"| `{method}` | {chosen} | {cells} | {shares} |")
    cells = " | ".join(f"{100 * known.experts[task]:.1f}" for task in tasks)
    print(f"| experts, each on its own task | | {cells} | {100 * experts:.1f} | 100.0 |")


if __name__ == "__main__":
    main()
