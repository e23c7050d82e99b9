"""What the benchmarks share: their messages, their servers, rounds of several sides in turn, and how figures are shown."""

from __future__ import annotations

import base64
import contextlib
import gc
import hashlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
APPS = TESTS / "benchmarks" / "apps"
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(APPS)]

from kafka import KafkaProducer
from servers import ApacheKafka, RedisServer

from flowkit import Flowkit
from flowkit.consumer import Consumer
from flowkit.devstack import create_topics
from flowkit.server import Server

PARTITIONS = 4
SIZE = 200
"""Bytes of a message."""

PATIENCE = 300.0
"""Seconds that anything may take until a benchmark gives up."""


def payload(number: int, size: int = SIZE) -> bytes:
    """A JSON object of so many bytes, of which no two share more than their names: nothing for a compressor to find."""
    head = b'{"id":%d,"user":"u%06d","amount":%d.25,"kind":"click","text":"' % (
        number,
        number % 99_991,
        number % 5_000,
    )
    text = base64.b64encode(hashlib.shake_128(b"%d" % number).digest(size * 3 // 4))
    return head + text[: size - 2 - len(head)] + b'"}'


def fill(hosts: str, topic: str, numbers: Iterable[int], *, keyed: bool = False) -> None:
    """Puts the messages into the partitions of a topic in turn; the topic is made if it is not there."""
    create_topics(hosts, {topic: PARTITIONS})
    producer = KafkaProducer(bootstrap_servers=hosts, linger_ms=20, batch_size=262_144)
    sent = None
    for number in numbers:
        key = b"customer-%06d" % (number % 99_991) if keyed else None
        sent = producer.send(topic, payload(number), key=key, partition=number % PARTITIONS)
    producer.flush()
    if sent is not None:
        sent.get(timeout=30)
    producer.close()


class Tally:
    """The no-op handler: counts, and adds the ids up, so that a missing or repeated one shows."""

    def __init__(self) -> None:
        self.count = self.total = 0

    def __call__(self, data: dict) -> None:  # type: ignore[type-arg]
        self.count += 1
        self.total += data["id"]

    take = __call__

    def take_typed(self, data: Any, message: object) -> None:
        self.count += 1
        self.total += data.id

    def check(self, count: int, side: str) -> None:
        """Ends the run unless it has seen the messages 0 to ``count - 1``."""
        if (self.count, self.total) != (count, count * (count - 1) // 2):
            raise SystemExit(
                f"{side}: {self.count} messages, ids add up to {self.total}: some are missing or repeated"
            )


def consumer_of(app: Flowkit) -> Consumer:
    """The consumer of an application with one group, as ``flowkit run`` makes it. Call its ``turn`` until done."""
    app.start()
    (consumer,) = Server(app)._make_consumers()
    return consumer


@contextlib.contextmanager
def broker(hosts: str | None) -> Iterator[str]:
    """The hosts of a broker: the given ones, or those of an Apache Kafka started for this run."""
    if hosts:
        yield hosts
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory, ApacheKafka(Path(directory)) as node:
        yield node.hosts


@contextlib.contextmanager
def redis_server(url: str | None) -> Iterator[str]:
    """The URL of a Redis: the given one, or that of a server started for this run, which keeps an append-only file."""
    if url:
        yield url
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory, RedisServer(Path(directory)) as server:
        yield server.url


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE, every: float = 0.02) -> None:
    """Looks ``every`` so many seconds whether a condition holds; ends the run if it does not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {seconds:g} s")
        time.sleep(every)


Figures = dict[str, list[float]]


def in_turn(
    sides: Mapping[str, Callable[[str], float]], rounds: int, *, warm_up: bool = True, note: bool = True
) -> Figures:
    """Runs every side in turn, so many rounds, and one before that does not count. A side is given the name of its run."""
    figures: Figures = {side: [] for side in sides}
    for number in range(0 if warm_up else 1, rounds + 1):
        for side, run in sides.items():
            gc.collect()
            figure = run(f"{time.time_ns():x}")
            if number:
                figures[side].append(figure)
            if note:
                print(f"    round {number or 'warm-up'}: {side} {figure:,.0f}", file=sys.stderr)
    return figures


def show(figures: Figures, unit: str = "msg/s") -> None:
    width = max(map(len, figures))
    for side, found in figures.items():
        middle, least, most = statistics.median(found), min(found), max(found)
        print(f"  {side:>{width}}: median {middle:>11,.0f} {unit}   (from {least:,.0f} to {most:,.0f})")


def show_ratio(figures: Figures, over: str, under: str | Sequence[str], target: float | None = None) -> None:
    """The ratio of two sides, round by round; of several lower sides the best of each round counts."""
    names = [under] if isinstance(under, str) else list(under)
    lower = [max(found) for found in zip(*(figures[name] for name in names), strict=True)]
    ratios = [ours / theirs for ours, theirs in zip(figures[over], lower, strict=True)]
    middle = statistics.median(ratios)
    name = names[0] if len(names) == 1 else "the fastest of " + ", ".join(names)
    aim = "" if target is None else f"; aim {target:g}: {'reached' if middle >= target else 'MISSED'}"
    print(f"  {over} / {name}: median {middle:,.2f}   (from {min(ratios):,.2f} to {max(ratios):,.2f}{aim})")


def show_figure(what: str, value: float, unit: str, most: float) -> None:
    print(f"  {what}: {value:,.1f} {unit}   (aim: at most {most:g}: {'reached' if value <= most else 'MISSED'})")


def about() -> str:
    return f"messages of {SIZE} bytes, {PARTITIONS} partitions, Python {platform.python_version()}"
