"""What a trial costs: a study with one and two workers against the same trials as separate commands, and pruning.

    python benchmarks/study.py                          # two rounds of everything
    python benchmarks/study.py --trials 20 --rounds 1   # shorter
    python benchmarks/study.py --only pruning

A round runs the studies and then some of the very same trials one by one as `crucible run`, so that a machine that is
busy for a while slows both. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CRUCIBLE = [sys.executable, "-m", "harness"]
JOB = ["method=ties", "pool=mini_clip8", "tasks=mini_clip8"]
PARTS = ("merge", "evaluate", "optuna", "mlflow")
PLAIN = ["study.sampler=random", "study.plots=false", "study.bootstrap=0", "study.warm_start=false"]


@dataclass(frozen=True)
class Done:
    """A study that has ended."""

    seconds: float  # of the whole command
    busy_s: float  # from the first trial's start to the last one's end
    trials: list[dict[str, Any]]  # rows of trials.json
    took: dict[str, float]  # seconds of all workers by what they went into


def command(arguments: list[str], directory: str) -> float:
    """Wall time of a command that must succeed."""
    own = {"XDG_CACHE_HOME": f"{directory}/cache", "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    done = subprocess.run(
        [*CRUCIBLE, *arguments], cwd=directory, env=os.environ | own, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return time.perf_counter() - start


def study(directory: str, name: str, *overrides: str) -> Done:
    """Run a study of `JOB` and read what it left."""
    from mlflow import MlflowClient

    seconds = command(["study", *JOB, *PLAIN, f"study.name={name}", *overrides], directory)
    client = MlflowClient(f"sqlite:///{directory}/mlflow.db")
    where = [experiment.experiment_id for experiment in client.search_experiments()]
    parent = client.search_runs(where, f"tags.kind = 'study' and tags.study = '{name}'")[0]
    below = f"tags.mlflow.parentRunId = '{parent.info.run_id}' and tags.kind = 'trial'"
    runs = list(client.search_runs(where, below, max_results=1000))
    busy_ms = max(run.info.end_time for run in runs) - min(run.info.start_time for run in runs)
    with tempfile.TemporaryDirectory() as place:
        file = client.download_artifacts(parent.info.run_id, "trials.json", place)
        table = json.loads(Path(file).read_text())
    trials = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    metrics = parent.data.metrics
    took = {part: metrics.get(f"time/{part}_s", 0.0) for part in (*PARTS, "mlflow_beside", "total")}
    return Done(seconds, busy_ms / 1000, trials, took)


def params(trial: dict[str, Any]) -> list[str]:
    """A trial's parameters as overrides of a run."""
    return [f"{key}={value}" for key, value in trial.items() if key.startswith("method.") and value is not None]


def rates(directory: str, trials: int, rounds: int, separate: int) -> None:
    """Trials per minute, and where a trial's time goes."""
    found: dict[str, list[float]] = {}
    last: dict[int, Done] = {}
    run = [*JOB, "evaluation.split=validation", "evaluation.plots=false", "tracking.log_model=false"]
    for index in range(rounds):
        for workers in (1, 2):
            name = f"round-{index}-workers-{workers}"
            done = study(directory, name, f"study.trials={trials}", f"study.workers={workers}", f"seed={index}")
            last[workers] = done
            found.setdefault(f"study, {workers} worker(s), first trial to last", []).append(60 * trials / done.busy_s)
            found.setdefault(f"study, {workers} worker(s), whole command", []).append(60 * trials / done.seconds)
        seconds = sum(command(["run", *run, *params(trial)], directory) for trial in last[1].trials[:separate])
        found.setdefault("separate `crucible run` commands", []).append(60 * separate / seconds)
    base = statistics.median(found["separate `crucible run` commands"])
    print("| what | trials a minute, each round | median | times the separate commands |\n|---|---|---:|---:|")
    for what, values in found.items():
        each, median = ", ".join(f"{value:.1f}" for value in values), statistics.median(values)
        print(f"| {what} | {each} | {median:.1f} | {median / base:.1f} |")
    print("\n| of a trial's time | 1 worker | 2 workers |\n|---|---:|---:|")
    parts = {workers: _shares(done.took) for workers, done in last.items()}
    for part in parts[1]:
        print(f"| {part} | {parts[1][part]:.1%} | {parts[2][part]:.1%} |")
    mean = {workers: statistics.fmean(row["total_s"] for row in done.trials) for workers, done in last.items()}
    print(f"| seconds, mean | {mean[1]:.3f} | {mean[2]:.3f} |")


def _shares(took: dict[str, float]) -> dict[str, float]:
    """Of the trials' time; MLflow's thread works beside them, so that its share is on top."""
    found = {part: took[part] / took["total"] for part in PARTS}
    own = found["optuna"] + found["mlflow"]
    rest = {"optuna and mlflow": own, "other": 1 - sum(found.values())}
    return found | rest | {"beside: MLflow's thread": took["mlflow_beside"] / took["total"]}


def pruning(directory: str, trials: int, rounds: int) -> None:
    """The same random trials to their end, and with Wilcoxon's pruner looking on."""
    print("\n| seed | all to their end | Wilcoxon | time saved | pieces scored | pruned | same winner | its value |")
    print("|---:|---:|---:|---:|---:|---:|---|---:|")
    stepped = [f"study.trials={trials}", "study.step_rows=40"]
    wilcoxon = ["study.pruner=wilcoxon", "study.pruner_settings.p_threshold=0.1"]
    for seed in range(rounds):
        full = study(directory, f"full-{seed}", f"seed={seed}", *stepped)
        cut = study(directory, f"cut-{seed}", f"seed={seed}", *stepped, *wilcoxon)
        best, found = (max(done.trials, key=_value) for done in (full, cut))
        pruned = sum(row["state"] == "pruned" for row in cut.trials)
        same = "yes" if params(best) == params(found) else f"no: {_value(found):.4f}"
        saved = 1 - cut.busy_s / full.busy_s
        steps = [row["steps"] for row in cut.trials]
        scored = sum(steps) / (max(steps) * len(steps))
        print(
            f"| {seed} | {full.busy_s:.1f} s | {cut.busy_s:.1f} s | {saved:.0%} | {scored:.0%} | "
            f"{pruned} of {trials} | {same} | {_value(best):.4f} |"
        )


def _value(trial: dict[str, Any]) -> float:
    """The objective of a complete trial; the least of all for others."""
    return trial["average/accuracy"] if trial["state"] == "complete" else -1.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--separate", type=int, default=3, help="separate commands in a round")
    parser.add_argument("--only", choices=["rates", "pruning"])
    options = parser.parse_args()
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    sys.stdout.reconfigure(line_buffering=True)
    with tempfile.TemporaryDirectory() as directory:
        command(["run", *JOB, "tracking.log_model=false"], directory)  # the store and the references are there
        if options.only != "pruning":
            rates(directory, options.trials, options.rounds, options.separate)
        if options.only != "rates":
            pruning(directory, options.trials, options.rounds)


if __name__ == "__main__":
    main()
