"""Workers of a study: one in this process, or several processes that are watched and replaced when they die."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from harness.config import UserError
from studies.worker import EXHAUSTED, Errand, work

NONE = -1
HOPELESS = 3  # workers in a row that end without a single trial, and rounds without one
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
    """Tickets of several processes; a killed worker's lock on a file goes with it, a semaphore would stay taken."""

    def __init__(self, n: int, workers: int, until_s: float | None, place: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._left = context.RawValue("i", n)
        self._holds = context.RawArray("i", workers)
        self._current = context.RawArray("i", [NONE] * workers)
        self._until_s, self._lock = until_s, place / "tickets"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def take(self, worker: int) -> bool:
        """Whether one more trial may begin."""
        with self._alone():
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
        self._holds[worker] = 0
        self._current[worker] = NONE

    def bury(self, worker: int) -> tuple[bool, int]:
        """Whether a dead worker held a ticket, and its trial (or NONE)."""
        found = bool(self._holds[worker]), self._current[worker]
        self.ended(worker)
        return found

    def give_back(self) -> None:
        """One more trial may begin."""
        with self._alone():
            self._left.value += 1

    @property
    def left(self) -> int:
        """Trials that may still begin."""
        return 0 if _late(self._until_s) else self._left.value


class _Hand(NamedTuple):
    """A worker at work."""

    process: Any
    result: Any  # connection on which it says at its end what its time went into


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
        alive: dict[int, _Hand] = {}
        idle = 0
        try:
            for worker in range(self.errand.processes):
                alive[worker] = self._started(context, worker)
            while alive:
                wait([hand.process.sentinel for hand in alive.values()], timeout=POLL_S)
                self.after()
                for worker in [worker for worker, hand in alive.items() if not hand.process.is_alive()]:
                    process, result = alive.pop(worker)
                    process.join()
                    if process.exitcode == 0:
                        self._add(result.recv())
                        continue
                    held, number = self.tickets.bury(worker)
                    idle = 0 if number != NONE else idle + 1
                    if idle >= HOPELESS:
                        raise UserError(f"workers end before they begin a trial, the last {_ending(process.exitcode)}")
                    # Dead while it asked for a trial: whether there is one is seen when all have ended.
                    if held and number != NONE and self.on_death(number, _ending(process.exitcode)):
                        self.tickets.give_back()
                    if self.tickets.left:
                        alive[worker] = self._started(context, worker)
        finally:
            for hand in alive.values():
                hand.process.kill()
            for hand in alive.values():
                hand.process.join()

    def _started(self, context: Any, worker: int) -> _Hand:
        device = worker % self.devices if self.devices else None
        errand = replace(self.errand, worker=worker, device=device, done=self.errand.done + int(time.monotonic()))
        result, send = context.Pipe(duplex=False)
        process = context.Process(target=_enter, args=(errand, self.tickets, send), name=f"crucible-{worker}")
        process.start()
        send.close()
        return _Hand(process, result)

    def _add(self, found: Mapping[str, float]) -> None:
        for part in PARTS:
            self.totals[part] += found[part]
        self.exhausted = self.exhausted or bool(found[EXHAUSTED])


def _enter(errand: Errand, tickets: Shared, result: Any) -> None:
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
        result.send(work(errand, tickets))
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
