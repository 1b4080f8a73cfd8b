"""Child runs written beside the work: a store waits for its disk several times a trial, and a trial need not."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from harness.nested import Children
from studies.agree import child_tags, write
from studies.finished import TrialRow


class Recorder:
    """Writes one trial's run while the next trial is being scored; what it raises reaches a later call."""

    def __init__(self, children: Children, tags: Mapping[str, str]) -> None:
        self._children, self._tags = children, tags
        self._thread = ThreadPoolExecutor(1, "crucible-record")
        self._begun: Future[str] | None = None
        self._ending: deque[Future[None]] = deque()
        self.seconds = 0.0  # of requests

    def begin(self, number: int, name: str) -> None:
        """Open a trial's run; all but the run before have been written by then."""
        while len(self._ending) > 1:
            self._ending.popleft().result()
        self._begun = self._thread.submit(self._timed_begin, name, child_tags(number, self._tags))

    def run_id(self) -> str:
        """The id of the run that was begun last."""
        assert self._begun is not None
        return self._begun.result()

    def end(self, row: TrialRow, status: str) -> None:
        """Write all of the trial into the run that was begun last, and end it."""
        self._ending.append(self._thread.submit(self._timed_write, self.run_id(), row, status))

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Wait for what is being written when the body ends well; leave it when it was interrupted."""
        try:
            yield
            while self._ending:
                self._ending.popleft().result()
        finally:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _timed_begin(self, name: str, tags: Mapping[str, str]) -> str:
        started = time.perf_counter()
        run_id = self._children.begin(name, tags)
        self.seconds += time.perf_counter() - started
        return run_id

    def _timed_write(self, run_id: str, row: TrialRow, status: str) -> None:
        started = time.perf_counter()
        write(self._children, run_id, row, status)
        self.seconds += time.perf_counter() - started
