"""A place to search in: a working directory with a store of its own, the tiny pool, and a task for each expert."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from studies.finished import Finished
    from studies.settings import Composed

ROOT = Path(__file__).resolve().parents[2]
QUICK = (
    "tracking.log_model=false", "evaluation.references=false", "evaluation.plots=false",
    "study.plots=false", "study.bootstrap=20", "study.final_seeds=1",
)  # fmt: skip


@dataclass(frozen=True)
class StudyPlace:
    """A directory in which studies are made."""

    directory: Path

    @property
    def choices(self) -> list[str]:
        """Pool, tasks and what makes a study short, as overrides."""
        return [f"pool={self.directory / 'pool.yaml'}", f"tasks={self.directory / 'tasks.yaml'}", *QUICK]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of processes that run here."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        store = f"sqlite:///{self.directory}/mlflow.db"
        return {**kept, "MLFLOW_TRACKING_URI": store, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    @property
    def storage(self) -> str:
        """The default storage."""
        return f"sqlite:///{self.directory}/studies.db"

    def composed(self, *overrides: str) -> Composed:
        """A study's settings and configurations."""
        from harness.compose import compose
        from studies.settings import compose_study

        return compose_study([*self.choices, *overrides], compose)

    def study(self, *overrides: str) -> Finished:
        """A study in this process."""
        from studies.run import run_study

        return run_study(self.composed(*overrides))

    def command(self, *overrides: str) -> list[str]:
        """The command line of a study."""
        return [sys.executable, "-m", "harness", "study", *self.choices, *overrides]

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        """A study in a process of its own, in a session of its own; Ctrl-C reaches it wherever the tests run.

        A shell has what it starts in the background ignore Ctrl-C, and all that this starts.
        """
        return subprocess.Popen(
            self.command(*overrides), cwd=self.directory, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def trial_runs(self, study: str) -> list[Any]:
        """MLflow's child runs of a study's trials."""
        import mlflow

        client = mlflow.MlflowClient(self.environment["MLFLOW_TRACKING_URI"])
        found = client.search_experiments(filter_string="name = 'crucible'")
        query = f"tags.study = '{study}' and tags.kind = 'trial'"
        return list(client.search_runs([found[0].experiment_id], query, max_results=1000))


@pytest.fixture(scope="session")
def study_files(tiny_pool, tiny_task) -> dict[str, Any]:
    pool = {"family": "clip", "base": tiny_pool.base, "experts": tiny_pool.experts, "root": str(tiny_pool.root)}
    splits = {"train": "train", "validation": "validation", "test": "test"}
    tasks = {
        name: {"path": str(tiny_task), "splits": splits, "templates": ["a {} patch"]} for name in tiny_pool.experts
    }
    return {"pool.yaml": pool, "tasks.yaml": {"tasks": tasks}}


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracking store without runs: making its tables takes longer than a small study."""
    from harness.store import connect

    place = tmp_path_factory.mktemp("store") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.parent)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}")
        connect()
    return place


@pytest.fixture
def place(
    tmp_path: Path, study_files: dict[str, Any], empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StudyPlace]:
    """A fresh place, entered; on one thread, as tensors of a few numbers are slower on several."""
    import torch

    for name, content in study_files.items():
        (tmp_path / name).write_text(yaml.safe_dump(content, sort_keys=False))
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    made = StudyPlace(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.environment["MLFLOW_TRACKING_URI"])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield made
    torch.set_num_threads(before)
