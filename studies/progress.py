"""One line of progress: trials done, pruned and failed, the best so far, time left."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from studies.finished import TrialRow
from studies.objectives import Objective


class Progress:
    """A bar over trials."""

    def __init__(self, name: str, total: int, done: int, objectives: Sequence[Objective]) -> None:
        self._bar = tqdm(total=total, initial=done, desc=name, unit="trial", disable=None)
        self._objectives = objectives

    def show(self, rows: Sequence[TrialRow]) -> None:
        """Say where the study is."""
        retried = {row.retry_of for row in rows}
        ended = [row for row in rows if row.state in ("COMPLETE", "PRUNED", "FAIL") and row.number not in retried]
        pruned, failed = (sum(row.state == state for row in ended) for state in ("PRUNED", "FAIL"))
        told = {"best": best_in_words(rows, self._objectives), "pruned": pruned, "failed": failed}
        self._bar.set_postfix({name: value for name, value in told.items() if value}, refresh=False)
        self._bar.n = len(ended)
        self._bar.refresh()

    def close(self) -> None:
        """The end."""
        self._bar.close()


def best(rows: Sequence[TrialRow], objectives: Sequence[Objective]) -> list[float | None]:
    """The best value of each objective among trials that keep to the constraints."""
    found: list[float | None] = []
    for index, objective in enumerate(objectives):
        values = [row.values[index] for row in rows if row.state == "COMPLETE" and row.feasible and row.values]
        pick = max if objective.direction == "maximize" else min
        found.append(pick(values) if values else None)
    return found


def best_in_words(rows: Sequence[TrialRow], objectives: Sequence[Objective]) -> str:
    """The same for a line."""
    values = zip(objectives, best(rows, objectives), strict=True)
    return ", ".join(f"{objective.metric} {value:.4f}" for objective, value in values if value is not None)
