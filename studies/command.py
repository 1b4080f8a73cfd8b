"""`crucible study`: composes, runs, tells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from studies.run import run_study, told
from studies.settings import ComposeRun, compose_study


def main(overrides: Sequence[str], compose_run: ComposeRun, config_dir: Path | None = None) -> list[tuple[str, str]]:
    """Run a study; returns what it came to, in words.

    Args:
        overrides: Of the study and of the runs.
        compose_run: Composes a run's configuration.
        config_dir: A directory like conf/ with choices of the user's own.
    """
    finished = run_study(compose_study(overrides, compose_run, config_dir=config_dir))
    return [*told(finished), ("run", finished.parent)]
