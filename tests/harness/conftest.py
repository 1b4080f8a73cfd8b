"""A place to run in: a working directory with MLflow's default store, the tiny pool, and a task for each expert."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

if TYPE_CHECKING:
    from mlflow.entities import Run

    from harness.run import Outcome

ROOT = Path(__file__).resolve().parents[2]
ROWS = {"red": "test", "green": "test[:20]", "blue": "test[4:]"}  # 21, 20 and 17 rows


@dataclass
class Workplace:
    """A directory in which runs are made."""

    directory: Path
    _done: dict[tuple[str, ...], Outcome] = field(default_factory=dict)

    @property
    def choices(self) -> tuple[str, str]:
        """The pool and the tasks, as overrides."""
        return f"pool={self.directory / 'pool.yaml'}", f"tasks={self.directory / 'tasks.yaml'}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of processes that run here."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        store = f"sqlite:///{self.directory}/mlflow.db"
        return {**kept, "MLFLOW_TRACKING_URI": store, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The working directory and the environment of this process, for the body."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.directory)
            patch.delenv("MLFLOW_RUN_ID", raising=False)
            patch.setenv("MLFLOW_TRACKING_URI", self.environment["MLFLOW_TRACKING_URI"])
            yield

    def run(self, *overrides: str) -> Outcome:
        """A run in this process."""
        from harness.compose import compose
        from harness.run import run

        with self.entered():
            return run(compose([*self.choices, *overrides]))

    def once(self, *overrides: str) -> Outcome:
        """A run in this process, made at most once in a session: for tests that only look."""
        if overrides not in self._done:
            self._done[overrides] = self.run(*overrides)
        return self._done[overrides]

    def command(self, *arguments: str) -> list[str]:
        """The command line `crucible COMMAND ...`, pool and tasks added."""
        return [sys.executable, "-m", "harness", arguments[0], *self.choices, *arguments[1:]]

    def cli(self, *arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command in a process of its own."""
        return subprocess.run(
            self.command(*arguments), cwd=self.directory, env={**self.environment, **environment},
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def runs(self) -> dict[str, Run]:
        """All runs that the store holds, by their id."""
        import mlflow

        with self.entered():
            client = mlflow.MlflowClient()
            found = client.search_experiments(filter_string="name = 'crucible'")
            return {run.info.run_id: run for run in client.search_runs([found[0].experiment_id])} if found else {}

    def models(self) -> list[Path]:
        """All files of models in the store."""
        return [file for file in self.directory.glob("mlruns/*/models/**/*") if file.is_file()]


@pytest.fixture(scope="session")
def build_workplace(tiny_pool, tiny_task):
    """Makes workplaces in directories of one's choice."""

    def build(directory: Path, pool: dict | None = None, tasks: dict | None = None) -> Workplace:
        own = {"family": "clip", "base": tiny_pool.base, "experts": tiny_pool.experts, "root": str(tiny_pool.root)}
        data = {
            name: {
                "path": str(tiny_task),
                "splits": {"train": "train", "validation": "validation", "test": test},
                "templates": ["a {} patch"],
            }
            for name, test in ROWS.items()
        }
        directory.mkdir(exist_ok=True)
        (directory / "pool.yaml").write_text(yaml.safe_dump({**own, **(pool or {})}, sort_keys=False))
        (directory / "tasks.yaml").write_text(yaml.safe_dump({"tasks": {**data, **(tasks or {})}}, sort_keys=False))
        return Workplace(directory)

    return build


@pytest.fixture(scope="session")
def shared_workplace(tmp_path_factory, build_workplace) -> Workplace:
    return build_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture
def workplace(shared_workplace) -> Iterator[Workplace]:
    """The session's workplace, entered; on one thread, as tensors of a few numbers are slower on several."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with shared_workplace.entered():
        yield shared_workplace
    torch.set_num_threads(before)
