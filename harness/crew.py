"""Worker threads: torch, file reads and writes let go of the interpreter, so threads share the cores and the memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_AHEAD = 4  # tasks in flight for each worker


class Crew:
    """A number of workers; with one of them the caller does the work itself."""

    def __init__(self, pool: ThreadPoolExecutor | None, n: int) -> None:
        self._pool, self._n = pool, n

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Generator[R]:
        """The function's results in the order of the items, however the work was shared; a few are worked on ahead.

        Whoever may stop early closes the iterator: then, as after an error, no item is being worked on any more.
        """
        if self._pool is None:
            yield from map(function, items)
            return
        running: deque[Future[R]] = deque()
        try:
            for item in items:
                running.append(self._pool.submit(function, item))
                if len(running) >= _AHEAD * self._n:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
            wait(running)


ALONE = Crew(None, 1)


@contextmanager
def crew(workers: int) -> Iterator[Crew]:
    """Workers for a while, each with one thread for torch's kernels: that beats one worker with kernels of many."""
    _hold_memory()
    if workers <= 1:
        yield ALONE
        return
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "merge", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield Crew(pool, workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)  # a part of the setting holds for all threads


def count_workers(wanted: Any, processes: int = 1) -> int:
    """A number of workers; `auto` is one for each core that this process may use, shared among processes."""
    if wanted != "auto":
        return int(wanted)
    return max(1, len(os.sched_getaffinity(0)) // processes)


@functools.cache
def _hold_memory() -> None:
    """Have glibc keep freed memory up to a limit: fresh pages cost a merge more than its arithmetic."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 64 << 20)):
            mallopt(parameter, value)
