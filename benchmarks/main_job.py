"""What the main job costs: start-up, a run from the command line, AdaMerging's steps, tracking.

    python benchmarks/main_job.py                 # everything, medians of 3
    python benchmarks/main_job.py --repeats 5

Each number is taken in a fresh process and, for runs, a fresh directory with a cache of its own, so that the first
run creates MLflow's store and scores the references, and the second finds both.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def seconds_of(command: list[str], directory: str) -> float:
    """Wall time of a command that must succeed."""
    environment = os.environ | {"XDG_CACHE_HOME": f"{directory}/cache", "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def command_line(repeats: int) -> dict[str, float]:
    """Start-up and runs as a user starts them."""
    found: dict[str, list[float]] = {}

    def add(what: str, seconds: float) -> None:
        found.setdefault(what, []).append(seconds)

    crucible = [sys.executable, "-m", "harness"]
    job = ["mlflow", "run", str(ROOT), "-P", "method=dare", "--env-manager", "local"]
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as directory:
            add("crucible --help", seconds_of([*crucible, "--help"], directory))
            add("crucible show method=ties", seconds_of([*crucible, "show", "method=ties"], directory))
            add("mlflow run . -P method=dare, first time", seconds_of(job, directory))
            add("mlflow run . -P method=dare, second time", seconds_of(job, directory))
            add("crucible run method=dare, after these", seconds_of([*crucible, "run", "method=dare"], directory))
    return {what: statistics.median(seconds) for what, seconds in found.items()}


def in_process() -> dict[str, float]:
    """AdaMerging's rate, and what tracking adds to a run: the same run recorded and not, taking turns."""
    from harness import run as running
    from harness.compose import compose
    from harness.track import open_run

    steps = 100
    config = compose(
        ["method=adamerging", f"method.steps={steps}", "tracking.log_model=false", "evaluation.plots=false"]
    )
    start = time.perf_counter()
    running.run(config)
    outcome = running.run(config)
    import mlflow

    merged_s = mlflow.get_run(outcome.run_id).data.metrics["time/merge_s"]
    found = {"AdaMerging, steps per second": steps / merged_s, "(two such runs took, s)": time.perf_counter() - start}
    plain = compose(["method=dare"])
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(6):
        active = turn % 2 == 0
        running.open_run = lambda *given, active=active, **named: open_run(*given, **{**named, "active": active})
        start = time.perf_counter()
        running.run(plain)
        seconds[active].append(time.perf_counter() - start)
    recorded, silent = (statistics.median(seconds[active]) for active in (True, False))
    found |= {"a run in a warm process, recorded, s": recorded, "the same, not recorded, s": silent}
    return found | {"tracking, plots and model, s a run": recorded - silent}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        print(json.dumps(in_process()))
        return
    found = command_line(options.repeats)
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {"XDG_CACHE_HOME": f"{directory}/cache", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, "--in-process"]
        done = subprocess.run(command, cwd=directory, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        found |= json.loads(done.stdout.splitlines()[-1])
    for what, value in found.items():
        print(f"{what:45} {value:8.2f}")


if __name__ == "__main__":
    main()
