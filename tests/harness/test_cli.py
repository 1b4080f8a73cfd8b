"""The command line: what it imports, what it says, and what reaches the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness import cli
from harness.compose import compose, to_yaml
from harness.config import ROOT, UserError

HEAVY = ("torch", "mlflow", "transformers", "datasets", "lightning", "matplotlib", "sklearn", "optuna", "peft")

PROBE = f"""
import sys
sys.argv[0] = "crucible"
from harness.cli import main
try:
    status = main()
except SystemExit as exit:
    status = exit.code
# methods/lazy.py enters torch unexecuted: it has no version before its first use
inside = {{name: object.__getattribute__(sys.modules[name], "__dict__") for name in {HEAVY!r} if name in sys.modules}}
loaded = [name for name, names in inside.items() if "__version__" in names]
print("loaded", loaded, "status", status, file=sys.stderr)
"""


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, from a directory that is not the repository."""
    return subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        cwd=cwd, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("--help",), 0),
        (("run", "--help"), 0),
        (("list", "methods"), 0),
        (("list", "pools"), 0),
        (("list", "tasks"), 0),
        (("show", "method=ties"), 0),
        (("run", "method=tise", "seed=x"), 2),
        (("evaluate", "expert=nobody"), 2),
        (("evaluate", "method=ties"), 2),
    ],
)
def test_nothing_heavy_is_imported_before_work_starts(tmp_path: Path, arguments: tuple[str, ...], status: int) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == f"loaded [] status {status}"
    assert "Traceback" not in done.stderr


def test_the_module_and_the_console_script_are_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness", "run", "method=tise"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "crucible: 1 fault in the configuration, nothing was started:",
        "  - method=tise: no method is called 'tise'; did you mean ties?",
    ]
    assert 'crucible = "harness.cli:main"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("command", ["run", "evaluate", "show", "list", "build-suite"])
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    assert exit.value.code == 0
    assert f"examples:\n  crucible {command}" in said


def test_pools_and_tasks_are_listed_with_those_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "mine.yaml").write_text("# My own.\nfamily: clip\nexperts: {x: x}\n")
    assert cli.main(["list", "pools", "--config-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["mine", "1", "x", "My", "own."] for line in lines)
    assert any(line.split()[:2] == ["clip_vit_b32_ta8", "8"] for line in lines)
    (tmp_path / "pool" / "bad.yaml").write_text("family: clap\nexperts: {x: x}\n")
    assert cli.main(["list", "pools", "--config-dir", str(tmp_path)]) == 0
    assert "got 'clap'" in capsys.readouterr().out
    assert cli.main(["list", "tasks"]) == 0
    assert "sun397, stanford_cars, resisc45" in capsys.readouterr().out


def test_show_prints_yaml_with_the_search_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "method=ties", "method.density=0.3"]) == 0
    said = capsys.readouterr().out
    assert "  density: 0.3  # searched in [0.05, 1.0]\n" in said
    from harness.compose import from_yaml

    assert from_yaml(said) == compose(["method=ties", "method.density=0.3"])


@pytest.mark.parametrize(
    ("given", "means"),
    [
        (["--method.density", "0.30"], ["method.density=0.30"]),
        (["--seed=3", "method=ties"], ["seed=3", "method=ties"]),
        (["--method.t", "-0.5"], ["method.t=-0.5"]),
        (["--tracking.experiment", "a b"], ["tracking.experiment=a b"]),
        (["a=1", "--from-run", "ab12"], ["--from-run", "ab12", "a=1"]),
        (["a=1", "--config-dir=d"], ["--config-dir=d", "a=1"]),
        (["--lonely"], ["lonely"]),
    ],
)
def test_the_spelling_of_mlflow_means_an_override(given: list[str], means: list[str]) -> None:
    assert cli._spelled(["run", *given]) == ["run", *means]
    assert cli._spelled(["list", *given]) == ["list", *given]


def test_values_in_the_spelling_of_mlflow_are_composed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "method=ties", "--method.density", "0.30", "--seed=3"]) == 0
    said = capsys.readouterr().out
    assert "density: 0.3 " in said
    assert "\nseed: 3\n" in said


def composed(*overrides: str, fresh: bool = True):
    return compose(cli._evaluated(overrides, fresh=fresh))


def test_evaluate_scores_the_base_an_expert_or_a_model_and_logs_no_copy() -> None:
    name = list(compose().pool.experts)[-1]
    assert composed().method_name == "base"
    expert = composed(f"expert={name}", "method=base")  # what MLproject passes beside it
    assert (expert.method_name, expert.method.expert) == ("expert", name)
    model = composed("model=models:/champion/1")
    assert (model.method_name, model.model) == ("base", "models:/champion/1")
    assert not model.tracking.log_model
    assert composed("tracking.log_model=true").tracking.log_model


def test_expert_and_model_together_are_refused() -> None:
    with pytest.raises(UserError, match="give one of them"):
        composed("expert=a", "model=b")


def test_run_refuses_a_model_and_evaluate_a_method_that_merges(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "model=x"]) == 2
    assert "crucible evaluate" in capsys.readouterr().err
    assert cli.main(["evaluate", "method=ties"]) == 2
    assert "merge with `crucible run`" in capsys.readouterr().err


def test_an_earlier_run_is_repeated_with_overrides_on_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(None)
    config = compose(["method=ties", "method.density=0.7", "seed=5"])
    with mlflow.start_run() as started:
        mlflow.log_text(to_yaml(config), "config.yaml")
    assert cli.main(["show", "--from-run", started.info.run_id, "method.scale=0.5"]) == 0
    said = capsys.readouterr().out
    assert "density: 0.7 " in said
    assert "scale: 0.5 " in said
    assert "\nseed: 5\n" in said
    assert cli.main(["show", "--from-run", "0" * 32]) == 2
    assert "0" * 32 in capsys.readouterr().err


def test_errors_that_are_not_the_users_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(given) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli, "_show", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["show"])


def test_a_table_is_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    cli.print_table(("name", "kind"), [("ties", "rule")])
    said = capsys.readouterr().out
    assert "ties" in said
    assert "│" in said
