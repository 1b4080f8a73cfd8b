"""Two processes give what one gives, and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TWO = "fabric.accelerator=cpu", "fabric.devices=2"
QUICK = "evaluation.plots=false", "tracking.log_model=false"


def left_of(place) -> list[str]:
    """Processes that still work in a place."""
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in shown.splitlines() if str(place.directory) in line]


def routes_of(run_id: str) -> list[dict]:
    """The table of routing statistics."""
    import mlflow

    place = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="routing.json")
    found = json.loads(Path(place).read_text("utf-8"))
    return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]


@pytest.mark.parametrize("method", ["fisher", "adamerging", "we_moe"])
def test_two_processes_give_the_metrics_of_one(workplace, method):
    """And routers are counted over both."""
    given = f"method={method}", *(() if method == "fisher" else ("method.steps=3",)), *QUICK
    one = workplace.run(*given)
    before = set(workplace.runs())
    done = workplace.cli("run", *given, *TWO)
    assert (done.returncode, done.stderr) == (0, "")
    (run_id,) = set(workplace.runs()) - before
    two = workplace.runs()[run_id]
    assert two.info.status == "FINISHED"
    assert two.data.tags["device"] == "2 x cpu"
    for score in one.scores:
        assert two.data.metrics[f"{score.task}/accuracy"] == score.value  # of 21, 20 and 17 rows
        assert two.data.metrics[f"{score.task}/loss"] == pytest.approx(score.loss, abs=1e-5)
    for name, value in one.metrics.items():
        assert two.data.metrics[name] == pytest.approx(value, abs=1e-5)
    if method == "we_moe":
        rows, same = routes_of(one.run_id), routes_of(run_id)
        assert rows
        assert [{**row, "mean": pytest.approx(row["mean"], abs=1e-5)} for row in rows] == same
    assert done.stdout.count("look at it with") == 1
    assert left_of(workplace) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("pool.experts.blue=/nowhere/blue", "there is no checkpoint"),  # found by both
        ("output={taken}", "exists already"),
        ("server", "cannot be used, nothing was started"),  # found by rank zero alone
    ],
)
def test_a_failure_is_told_once_and_ends_both(workplace, tmp_path, fault, message):
    (tmp_path / "file").touch()
    environment = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"} if fault == "server" else {}
    overrides = [] if fault == "server" else [fault.format(taken=tmp_path)]
    start = time.monotonic()
    done = workplace.cli("run", *overrides, *TWO, *QUICK, **environment)
    assert done.returncode == 2
    assert time.monotonic() - start < 60
    assert done.stderr.count("crucible: ") == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert left_of(workplace) == []
    assert "RUNNING" not in {run.info.status for run in workplace.runs().values()}


def test_ctrl_c_ends_both_and_the_run_killed(workplace):
    before = set(workplace.runs())
    process = subprocess.Popen(
        workplace.command("run", "method=adamerging", "method.steps=1000000", *TWO, *QUICK),
        cwd=workplace.directory, env=workplace.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip

    def adapting() -> bool:
        new = [run for run_id, run in workplace.runs().items() if run_id not in before]
        return any("adaptation/loss" in run.data.metrics for run in new)

    end = time.monotonic() + 90
    while not adapting() and time.monotonic() < end:
        time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    process.communicate(timeout=30)
    assert process.returncode != 0
    (run_id,) = set(workplace.runs()) - before
    assert workplace.runs()[run_id].info.status == "KILLED"
    assert left_of(workplace) == []
