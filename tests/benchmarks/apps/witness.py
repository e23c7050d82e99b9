"""What the handler of every side calls, and needs no package for: it counts, measures, and says so when it has seen the last.

Set by ``BENCH_COUNT``: how many messages there are; and for latencies by ``BENCH_WARM_UP``: how many do not count.
"""

import json
import os
import resource
import time
from typing import Any


def cpu() -> float:
    """Seconds of processor time that this process has had."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Rate:
    """Counts messages; from the first that it is given to the last one makes the rate."""

    def __init__(self) -> None:
        self.count = int(os.environ["BENCH_COUNT"])
        self.total = self.began = self.cpu = 0
        self.left = 1

    def take(self, data: dict[str, Any]) -> None:
        self.total += data["id"]
        self.left -= 1
        if not self.left:
            self.turn()

    def turn(self) -> None:
        if not self.began:
            self.began, self.cpu, self.left = time.perf_counter(), cpu(), self.count - 1
            return
        seconds, used = time.perf_counter() - self.began, cpu() - self.cpu
        tell(rate=(self.count - 1) / seconds, cpu=used / self.count, total=self.total)


class Waits:
    """Notes how long each message took from its producer, whose clock is ``time.monotonic`` of the same machine."""

    def __init__(self) -> None:
        self.count, self.warm_up = int(os.environ["BENCH_COUNT"]), int(os.environ["BENCH_WARM_UP"])
        self.waits: list[float] = []
        self.began = self.cpu = 0.0

    def take(self, data: dict[str, Any]) -> None:
        waits, now = self.waits, time.monotonic()
        waits.append(now - data["at"])
        if len(waits) == self.warm_up:
            self.began, self.cpu = now, cpu()
        elif len(waits) == self.count:
            used = (cpu() - self.cpu) / (now - self.began)
            found = sorted(waits[self.warm_up :])
            p50, p99, p999 = (found[int(len(found) * part)] * 1000 for part in (0.5, 0.99, 0.999))
            tell(p50=p50, p99=p99, p999=p999, most=found[-1] * 1000, cpu=used)


def tell(**figures: float) -> None:
    os.write(1, f"RESULT {json.dumps(figures)}\n".encode())  # some frameworks make log lines of what is printed


def witness() -> Any:
    return Waits() if os.environ["BENCH_CASE"] == "latency" else Rate()
