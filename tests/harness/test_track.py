"""The run in MLflow: what it holds, and how it ends, on real stores and with real processes."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest
from matplotlib.figure import Figure

from harness import track
from harness.provenance import is_dead, process_tags
from harness.record import LONGEST_PARAM, shortened

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory) -> bytes:
    """The bytes of a store without runs: creating the tables takes a second, once is enough."""
    directory = tmp_path_factory.mktemp("empty")
    file = directory / "mlflow.db"
    subprocess.run(
        [sys.executable, "-c", "import mlflow; mlflow.MlflowClient().search_experiments()"],
        cwd=directory,
        env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{file}"},
        check=True,
        capture_output=True,
    )
    return file.read_bytes()


@pytest.fixture
def store(tmp_path, monkeypatch, empty_store) -> Path:
    """A directory with a store of MLflow's default kind, which is the working directory."""
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def opened(**how):
    return track.open_run(**{"experiment": "crucible", "name": "ties", "tags": {}, "params": {}, **how})


def test_default_store_is_mlflows_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with opened() as run:
        run.metric("digits/accuracy", 0.5)
    assert (tmp_path / "mlflow.db").exists()
    assert [each.info.run_id for each in mlflow.MlflowClient().search_runs(["1"])] == [run.id]


def test_first_use_says_nothing(tmp_path):
    code = "from harness.track import open_run\nwith open_run('e', 'n', {}, {}): pass"
    done = _python(code, tmp_path, check=True)
    assert done.stdout + done.stderr == ""


def test_a_run_holds_what_it_is_told(store):
    with opened(tags={"method": "ties"}, params={"method.density": 0.3, "output": None}, config="seed: 0\n") as run:
        run.metric("digits/accuracy", 0.9)
        run.describe("# 91 %")
        run.table([{"task": "digits", "accuracy": 0.9}], "results.json")
        run.figure(Figure(), "plots/empty.png")
        run.lineage({"base": {"source": "org/base", "fingerprint": "ab" * 32}})
        run.inputs([track.DataInput("digits", "org/digits", "cd" * 32, "test", 300, ["0", "1"])])
    found = mlflow.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "ties"
    assert found.data.params == {"method.density": "0.3", "output": "null", "fingerprint.base": "ab" * 32}
    assert found.data.metrics == {"digits/accuracy": 0.9}
    tags = found.data.tags
    assert tags["method"] == "ties"
    assert tags["mlflow.note.content"] == "# 91 %"
    assert tags["version.mlflow"] == mlflow.__version__
    assert track.config_of(run.id) == "seed: 0\n"
    artifacts = {each.path for each in mlflow.MlflowClient().list_artifacts(run.id)}
    assert artifacts == {"config.yaml", "results.json", "lineage.json", "plots"}
    data = found.inputs.dataset_inputs[0]
    assert (data.dataset.name, data.dataset.digest) == ("digits/test", "cd" * 6)


def test_a_checkout_names_its_commit(store):
    with opened() as run:
        pass
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    tracked = ["git", "-C", str(ROOT), "ls-files", "--error-unmatch", "harness/provenance.py"]
    if head.returncode or subprocess.run(tracked, capture_output=True, check=False).returncode:
        pytest.skip("not a git checkout")
    assert mlflow.get_run(run.id).data.tags["mlflow.source.git.commit"] == head.stdout.strip()


def test_many_and_long_parameters(store):
    values = {f"pool.experts.{index}": index for index in range(250)}
    with opened(params={**values, "long": "x" * 9000}) as run:
        pass
    params = mlflow.get_run(run.id).data.params
    assert len(params) == 251
    assert len(params["long"]) <= LONGEST_PARAM
    assert "9000 characters" in params["long"]


def test_shortened_leaves_what_fits():
    assert shortened("abc", 3) == "abc"
    assert len(shortened("x" * 500, 200)) == 200


def test_parameters_of_mlflow_run_stay(store, monkeypatch):
    client = mlflow.MlflowClient()
    theirs = client.create_run("0", tags={"mlflow.source.type": "PROJECT"})
    client.log_param(theirs.info.run_id, "method.density", "0.30")
    monkeypatch.setenv("MLFLOW_RUN_ID", theirs.info.run_id)
    with opened(name="ties density=0.3", params={"method.density": 0.3, "seed": 0}) as run:
        assert run.id == theirs.info.run_id
    found = client.get_run(run.id)
    assert found.data.params == {"method.density": "0.30", "seed": "0"}
    assert (found.info.status, found.info.run_name, found.info.experiment_id) == ("FINISHED", "ties density=0.3", "0")
    assert found.data.tags["mlflow.source.type"] == "PROJECT"
    with opened() as second:
        assert second.id != run.id


def test_ranks_above_zero_record_nothing(store):
    with opened(active=False) as run:
        run.metric("a", 1.0)
        with run.phase("merge"):
            pass
        assert run.log_model(lambda path: pytest.fail("written")) is None
    assert run.id is None
    assert mlflow.MlflowClient().search_experiments(filter_string="name = 'crucible'") == []


def test_series_are_complete_and_cheap(store):
    with opened() as run:
        start = time.perf_counter()
        for step in range(3000):
            run.metric("adaptation/loss", 1 / (step + 1), step)
        assert time.perf_counter() - start < 10
    history = mlflow.MlflowClient().get_metric_history(run.id, "adaptation/loss")
    assert [each.step for each in history] == list(range(3000))


def test_a_phase_is_measured(store):
    with opened() as run, run.phase("merge"):
        block = bytearray(150_000_000)
        block[::4096] = b"x" * len(block[::4096])
        time.sleep(0.1)
        del block
    metrics = mlflow.get_run(run.id).data.metrics
    assert metrics["time/merge_s"] >= 0.1
    assert metrics["memory/merge_peak_bytes"] > 150_000_000


def test_a_failure_leaves_its_traceback(store):
    with contextlib.suppress(ZeroDivisionError), opened() as run:
        run.metric("adaptation/loss", 1.0, step=0)
        _ = 1 / 0
    found = mlflow.get_run(run.id)
    assert found.info.status == "FAILED"
    assert found.data.metrics == {"adaptation/loss": 1.0}
    file = mlflow.MlflowClient().download_artifacts(run.id, "traceback.txt", str(store))
    assert "ZeroDivisionError" in Path(file).read_text()


def _python(code: str, cwd: Path, check: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=_environment(**env), capture_output=True, text=True, check=check
    )


def _environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


# A shell's background job, as a CI step may be, starts its children with SIGINT ignored.
WAITING = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from harness.track import open_run
def write(path):
    path.mkdir()
    (path / "weights").write_bytes(b"half")
    print(run.id, flush=True)
    time.sleep(60)
with open_run("crucible", "waiting", {}, {}) as run:
    run.log_model(write)
"""


def _interrupted(store: Path, number: int) -> tuple[str, str]:
    """A run that got a signal in the middle of writing its model: its id, and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        cwd=store,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    run_id = process.stdout.readline().strip()
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    return run_id, said


def _model_files(store: Path) -> list[Path]:
    return [each for each in store.glob("mlruns/*/models/**/*") if each.is_file()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_kills_the_run_and_leaves_no_model(store, number):
    run_id, said = _interrupted(store, number)
    found = mlflow.get_run(run_id)
    assert found.info.status == "KILLED"
    assert "KeyboardInterrupt" in said or "Terminated" in said
    assert mlflow.get_logged_model(found.outputs.model_outputs[0].model_id).status == "FAILED"
    assert _model_files(store) == []


def test_the_next_run_buries_the_dead(store, capfd):
    run_id, _ = _interrupted(store, signal.SIGKILL)
    assert mlflow.get_run(run_id).info.status == "RUNNING"
    assert len(_model_files(store)) == 1
    assert not list(store.glob("mlruns/*/models/*/artifacts"))
    with opened() as living:
        assert mlflow.get_run(run_id).info.status == "KILLED"
        with opened(name="beside"):
            assert mlflow.get_run(living.id).info.status == "RUNNING"
    said = capfd.readouterr().err
    assert run_id in said
    assert "half-written model" in said
    assert said.count("\n") == 1
    assert _model_files(store) == []
    model = mlflow.get_run(run_id).outputs.model_outputs[0].model_id
    assert mlflow.get_logged_model(model).status == "FAILED"


def test_only_processes_of_this_host_are_judged():
    assert not is_dead(process_tags())
    assert not is_dead({**process_tags(), "crucible.host": "elsewhere", "crucible.pid": "999999999"})
    assert is_dead({**process_tags(), "crucible.pid": "999999999"})


def test_another_thread_may_open_a_run(store):
    found = []

    def work():
        with opened() as run:
            found.append(run.id)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert mlflow.get_run(found[0]).info.status == "FINISHED"


@pytest.mark.parametrize("kind", ["http", "postgresql"])
def test_a_closed_port_is_said_soon(store, monkeypatch, kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    user = "me:secret@" if kind == "postgresql" else ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{kind}://{user}127.0.0.1:{port}")
    start = time.monotonic()
    with pytest.raises(track.TrackingError, match="nothing was started") as caught, opened():
        pytest.fail("opened")
    assert time.monotonic() - start < 15
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_a_silent_server_is_given_up(store, monkeypatch):
    monkeypatch.setattr("harness.store.WAIT_S", 2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(track.TrackingError, match="no answer within 2 seconds"), opened():
            pytest.fail("opened")


def test_something_else_on_the_port(store, monkeypatch):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(track.TrackingError, match="nothing was started"), opened():
        pytest.fail("opened")
    server.shutdown()
    server.server_close()


def test_a_deleted_experiment_is_named(store):
    client = mlflow.MlflowClient()
    client.delete_experiment(client.create_experiment("crucible"))
    with pytest.raises(track.TrackingError, match="mlflow experiments restore"), opened():
        pytest.fail("opened")


def test_configuration_of_an_unknown_run(store):
    with pytest.raises(track.TrackingError, match="holds no run 'abc'"):
        track.config_of("abc")
    other = mlflow.MlflowClient().create_run("0").info.run_id
    with pytest.raises(track.TrackingError, match=r"holds no config.yaml"):
        track.config_of(other)
