"""How runs end that do not finish: by an error of ours, by a signal, by kill -9, on a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import mlflow
import pytest

from harness.config import UserError

QUICK = "evaluation.plots=false", "evaluation.references=false"


def test_an_error_in_the_middle_ends_the_run_failed_with_its_traceback(workplace, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("in the middle")

    before, models = set(workplace.runs()), workplace.models()
    monkeypatch.setattr("harness.assess.evaluate", broken)
    with pytest.raises(ZeroDivisionError):
        workplace.run("method=ties", "tracking.log_model=false", *QUICK)
    (run_id,) = set(workplace.runs()) - before
    assert mlflow.get_run(run_id).info.status == "FAILED"
    text = mlflow.artifacts.load_text(f"runs:/{run_id}/traceback.txt")
    assert "ZeroDivisionError: in the middle" in text
    assert "harness/run.py" in text
    assert workplace.models() == models


def test_what_the_user_can_put_right_is_told_and_traced(workplace):
    before = set(workplace.runs())
    with pytest.raises(UserError, match="there is no checkpoint"):
        workplace.run("pool.experts.red=/nowhere/red", *QUICK)
    (run_id,) = set(workplace.runs()) - before
    assert "there is no checkpoint" in mlflow.artifacts.load_text(f"runs:/{run_id}/traceback.txt")


@pytest.fixture
def lonely(tmp_path, build_workplace):
    """A workplace with runs of this test alone."""
    place = build_workplace(tmp_path / "lonely")
    with place.entered():
        yield place


# A shell's background job, as a CI step may be, starts its children with SIGINT ignored.
WITH_CTRL_C = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
MAIN = "from harness.cli import main; sys.exit(main())"
SLOW_WRITE = """
import os, time
pwrite = os.pwrite
def slow(*arguments):
    time.sleep(0.5)
    return pwrite(*arguments)
os.pwrite = slow
"""


def started(place, code: str, *overrides: str) -> subprocess.Popen[str]:
    command = place.command("run", *overrides, *QUICK)
    return subprocess.Popen(
        [command[0], "-c", WITH_CTRL_C + code + MAIN, *command[3:]],
        cwd=place.directory, env=place.environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def until(condition, process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"it did not come to that: {process.communicate()}")
        time.sleep(0.2)


def adapting(place) -> bool:
    """Whether losses of an adaptation have been recorded."""
    if not (place.directory / "mlflow.db").exists():
        return False
    try:
        return any("adaptation/loss" in run.data.metrics for run in place.runs().values())
    except mlflow.exceptions.MlflowException:  # tables are being made
        return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_adaptation_ends_the_run_killed(lonely, tmp_path, number):
    output = tmp_path / "merged"
    lonely.run("method=base", "tracking.log_model=false", *QUICK)  # the store's tables are there
    process = started(lonely, "\n", "method=adamerging", "method.steps=1000000", f"output={output}")
    until(lambda: adapting(lonely), process)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    killed = [run for run in lonely.runs().values() if run.info.status == "KILLED"]
    assert [run.data.tags["method"] for run in killed] == ["adamerging"]
    assert {run.info.status for run in lonely.runs().values()} == {"FINISHED", "KILLED"}
    assert lonely.models() == []
    assert not output.exists()
    assert not list(tmp_path.glob(".merged*"))


@pytest.mark.slow
def test_kill_9_while_the_model_is_written(lonely, capfd):
    process = started(lonely, SLOW_WRITE, "method=ties")
    until(lambda: lonely.models() != [], process)
    process.kill()
    process.communicate()
    assert lonely.models() != []
    assert not list(lonely.directory.glob("mlruns/*/models/*/artifacts"))
    assert [run.info.status for run in lonely.runs().values()] == ["RUNNING"]
    (dead,) = lonely.runs()
    capfd.readouterr()
    outcome = lonely.run("method=base", "tracking.log_model=false", *QUICK)
    said = capfd.readouterr().err
    assert f"found run ties on pool ({dead})" in said
    assert "marked KILLED; removed its half-written model" in said
    assert lonely.runs()[dead].info.status == "KILLED"
    assert lonely.runs()[outcome.run_id].info.status == "FINISHED"
    assert lonely.models() == []


@pytest.mark.slow
def test_a_disk_that_is_really_full(lonely, tmp_path, capfd):
    """A small file system of its own, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        pytest.skip("no right to mount; tests/harness/test_bad_input.py has the same with /dev/full")
    try:
        from harness import cli

        command = ["run", *lonely.choices, *QUICK, "method=ties", f"output={disk / 'merged'}"]
        assert cli.main([*command, "tracking.log_model=false"]) == 2
        assert "are needed, its disk has" in capfd.readouterr().err
        assert [each.name for each in Path(disk).iterdir()] == []
        assert [run.info.status for run in lonely.runs().values()] == ["FAILED"]
    finally:
        subprocess.run(["umount", disk], check=True)
