"""The most memory that a process holds while something runs."""

import threading
from types import TracebackType

import psutil

PAUSE = 0.01
"""Seconds between two looks."""


class PeakMemory:
    """Looks at a process again and again, in a thread, until the ``with`` block ends.

    Attributes:
        resident: the most bytes seen that were resident.
        anonymous: the most bytes seen beyond the page cache: resident, but of no file. Shared
            memory counts as a file. Only Linux tells them apart.
    """

    def __init__(self, process: psutil.Process) -> None:
        self.resident = self.anonymous = 0
        self._process = process
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            try:
                held = self._process.memory_info()
            except psutil.Error:  # it has ended
                return
            self.resident = max(self.resident, held.rss)
            self.anonymous = max(self.anonymous, held.rss - held.shared)
            if self._ended.wait(PAUSE):
                return
