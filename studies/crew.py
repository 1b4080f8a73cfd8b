"""Workers of a study: one in this process, or several processes that are watched and replaced when they die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from typing import Any

from harness.config import UserError
from studies.worker import EXHAUSTED, Errand, work

NONE = -1
HOPELESS = 3  # workers in a row that end without a single trial
POLL_S = 0.3
PARTS = ("merge", "evaluate", "optuna", "mlflow", "mlflow_beside", "total")  # beside: requests while it worked on


class Alone:
    """Tickets of a single worker in this process."""

    def __init__(self, n: int, until_s: float | None = None) -> None:
        self.left, self.until_s = n, until_s
        self.current = NONE

    def take(self, worker: int) -> bool:
        """Whether one more trial may begin."""
        if self.left < 1 or _late(self.until_s):
            return False
        self.left -= 1
        return True

    def begun(self, worker: int, number: int) -> None:
        """Which trial it is."""
        self.current = number

    def ended(self, worker: int) -> None:
        """The trial has ended."""
        self.current = NONE


class Shared:
    """Tickets of several processes."""

    def __init__(self, n: int, workers: int, until_s: float | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._left = context.Value("i", n)
        self._holds = context.Array("i", workers)
        self._current = context.Array("i", [NONE] * workers)
        self._until_s = until_s

    def take(self, worker: int) -> bool:
        """Whether one more trial may begin."""
        with self._left.get_lock():
            if self._left.value < 1 or _late(self._until_s):
                return False
            self._left.value -= 1
            self._holds[worker] = 1
        return True

    def begun(self, worker: int, number: int) -> None:
        """Which trial it is."""
        self._current[worker] = number

    def ended(self, worker: int) -> None:
        """The trial has ended."""
        with self._left.get_lock():
            self._current[worker], self._holds[worker] = NONE, 0

    def bury(self, worker: int) -> tuple[bool, int]:
        """Whether a dead worker held a ticket, and its trial (or NONE)."""
        found = bool(self._holds[worker]), self._current[worker]
        self.ended(worker)
        return found

    def give_back(self) -> None:
        """One more trial may begin."""
        with self._left.get_lock():
            self._left.value += 1

    @property
    def left(self) -> int:
        """Trials that may still begin."""
        return 0 if _late(self._until_s) else self._left.value


@dataclass
class Crew:
    """What several workers are watched with."""

    errand: Errand
    tickets: Shared
    devices: int | None
    on_death: Callable[[int, str], bool]  # the trial, and how the worker ended -> whether it is tried again
    after: Callable[[], None]
    exhausted: bool = False
    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def run(self) -> None:
        """Until there are no tickets.

        Raises:
            UserError: Workers end without doing anything.
        """
        context = multiprocessing.get_context("spawn")
        results = context.SimpleQueue()
        alive: dict[int, Any] = {}
        idle = 0
        try:
            for worker in range(self.errand.processes):
                alive[worker] = self._started(context, worker, results)
            while alive:
                wait([process.sentinel for process in alive.values()], timeout=POLL_S)
                self.after()
                for worker in [worker for worker, process in alive.items() if not process.is_alive()]:
                    process = alive.pop(worker)
                    process.join()
                    if process.exitcode == 0:
                        continue
                    held, number = self.tickets.bury(worker)
                    idle = 0 if number != NONE else idle + 1
                    if idle >= HOPELESS:
                        raise UserError(f"workers end before they begin a trial, the last {_ending(process.exitcode)}")
                    if held and (number == NONE or self.on_death(number, _ending(process.exitcode))):
                        self.tickets.give_back()
                    if self.tickets.left:
                        alive[worker] = self._started(context, worker, results)
            self._collect(results)
        finally:
            for process in alive.values():
                process.kill()
            for process in alive.values():
                process.join()

    def _started(self, context: Any, worker: int, results: Any) -> Any:
        device = worker % self.devices if self.devices else None
        errand = replace(self.errand, worker=worker, device=device, done=self.errand.done + int(time.monotonic()))
        process = context.Process(target=_enter, args=(errand, self.tickets, results), name=f"crucible-{worker}")
        process.start()
        return process

    def _collect(self, results: Any) -> None:
        while not results.empty():
            found: Mapping[str, float] = results.get()
            for part in PARTS:
                self.totals[part] += found[part]
            self.exhausted = self.exhausted or bool(found[EXHAUSTED])


def _enter(errand: Errand, tickets: Shared, results: Any) -> None:
    """A worker process: it ends with its parent, and leaves Ctrl-C to that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="crucible-parent").start()
    try:
        results.put(work(errand, tickets))
    except UserError as error:
        print(f"crucible: worker {errand.worker}: {error}", file=sys.stderr)
        sys.exit(1)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"ended with status {code}"


def _late(until_s: float | None) -> bool:
    return until_s is not None and time.time() > until_s
