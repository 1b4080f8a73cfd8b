"""How long a stretch of work takes and how much memory it reaches, by watching the process while it runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

INTERVAL_S = 0.02  # one reading costs some 20 microseconds


@dataclass
class Measure:
    """What was seen; filled when the stretch ends."""

    seconds: float = 0.0
    peak_bytes: int = 0  # resident memory of this process, the highest reading
    device_peak_bytes: int | None = None  # CUDA memory allocated by torch; None without CUDA


class _Sampler(threading.Thread):
    def __init__(self) -> None:
        import psutil

        super().__init__(daemon=True, name="crucible-memory")
        self._process = psutil.Process()
        self._ended = threading.Event()
        self.peak_bytes = self._resident()

    def _resident(self) -> int:
        return self._process.memory_info().rss

    def run(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self.peak_bytes = max(self.peak_bytes, self._resident())

    def end(self) -> int:
        self._ended.set()
        self.join()
        return max(self.peak_bytes, self._resident())


def _cuda():
    """torch.cuda where torch is imported and has used CUDA, else None: a measurement loads nothing."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None


@contextmanager
def measure() -> Iterator[Measure]:
    """Measure the body; the numbers stand in the yielded object afterwards, also when the body raises."""
    found = Measure()
    if before := _cuda():
        before.reset_peak_memory_stats()
    sampler = _Sampler()
    sampler.start()
    start = time.perf_counter()
    try:
        yield found
    finally:
        found.seconds = time.perf_counter() - start
        found.peak_bytes = sampler.end()
        if cuda := _cuda():
            found.device_peak_bytes = cuda.max_memory_allocated()
