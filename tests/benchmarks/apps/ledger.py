"""What was handled, told to another process: a file in memory with a cell for each message. It costs 0.2 us a message.

It tells of each message how often it was handled, and when for the last time. What a killed process has written stays.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

CELL = 9
"""Bytes for each message: a counter, and a time as a double."""


class Ledger:
    def __init__(self, path: str | os.PathLike[str], size: int | None = None) -> None:
        """The ledger in a file; a ``size`` in messages (a multiple of 8) makes it anew."""
        self.path = str(path)
        if size is not None:
            assert size % 8 == 0
            Path(path).write_bytes(b"")
            os.truncate(path, size * CELL)
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.size = len(self._map) // CELL
        view = memoryview(self._map)
        self.counts = view[: self.size]
        self.times = view[self.size :].cast("d")

    def noter(self) -> Callable[[int], None]:
        """The function that notes a message by its number."""
        counts, times, clock = self.counts, self.times, time.monotonic

        def note(number: int) -> None:
            counts[number] += 1
            times[number] = clock()

        return note

    def clear(self) -> None:
        self._map[:] = bytes(len(self._map))

    def missing(self, count: int) -> int:
        """How many of the first ``count`` messages were not handled yet."""
        return bytes(self.counts[:count]).count(0)

    def check(self, count: int, side: str) -> None:
        """Ends the run unless each of the first ``count`` messages, and no other, was handled once."""
        found = bytes(self.counts)
        if found != b"\1" * count + bytes(self.size - count):
            missing, once = found[:count].count(0), found[:count].count(1)
            raise SystemExit(
                f"{side}: of {count} messages {missing} are missing and {count - missing - once} were handled more than"
                f" once; {self.size - count - found[count:].count(0)} others were handled"
            )

    def span(self, count: int) -> tuple[float, float]:
        """When the first and the last of ``count`` messages were handled, on the clock of ``time.monotonic``."""
        times = self.times[:count]
        return min(times), max(times)


def noter() -> Callable[[int], None]:
    """Of the ledger that the environment names."""
    return Ledger(os.environ["BENCH_LEDGER"]).noter()
