"""Handlers that wait, many at once: how near to the ideal rate 100 of them come that wait for 10 ms each.

    python tests/benchmarks/waiting.py [--rounds 5] [--messages 20000] [--kafka HOST:PORT]

An ``async def`` handler with ``concurrency=100``, and one that blocks, on as many threads; 1,000 keys in 4 partitions. The rate
counts from the first message that is begun to the end of the last one. Ideal are 100 messages each 10 ms. That each message was
handled, and those of a key in order, is checked in each round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from typing import Any

from common import PARTITIONS, about, broker, consumer_of, in_turn
from kafka import KafkaProducer

from flowkit import Flowkit, Message
from flowkit.coroutines import close_loop
from flowkit.devstack import create_topics

AT_ONCE, WAIT, KEYS = 100, 0.01, 1_000
IDEAL, AIM = AT_ONCE / WAIT, 0.8


def fill(hosts: str, topic: str, count: int) -> None:
    create_topics(hosts, {topic: PARTITIONS})
    with contextlib.closing(KafkaProducer(bootstrap_servers=hosts, linger_ms=20)) as producer:
        for number in range(count):
            producer.send(topic, b"%d" % number, key=b"%d" % (number % KEYS))
        producer.flush()


class Waiting:
    """What the handlers note."""

    def __init__(self) -> None:
        self.began = 0.0
        self.last: dict[bytes | None, int] = {}
        self.count = 0

    def begin(self) -> None:
        self.began = self.began or time.monotonic()

    def end(self, number: int, message: Message) -> None:
        if number <= self.last.get(message.key, -1):
            raise SystemExit(f"{number} was handled behind {self.last[message.key]}, which has its key")
        self.last[message.key] = number
        self.count += 1


def rate(hosts: str, topic: str, count: int, run: str, *, tasks: bool) -> float:
    """Messages a second."""
    app, waiting = Flowkit("waiting", kafka={"hosts": hosts}, log_level="warning"), Waiting()

    def on_a_thread(number: int, message: Message) -> None:
        waiting.begin()
        time.sleep(WAIT)
        waiting.end(number, message)

    async def as_a_task(number: int, message: Message) -> None:
        waiting.begin()
        await asyncio.sleep(WAIT)
        waiting.end(number, message)

    handler: Any = as_a_task if tasks else on_a_thread
    app.add_topic(topic, handler, group=run, inline=True, concurrency=AT_ONCE)
    consumer = consumer_of(app)
    while waiting.count < count:
        consumer.turn()
    took = time.monotonic() - waiting.began
    consumer.stop()
    consumer.run()
    close_loop()
    return count / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--kafka", metavar="HOST:PORT", help="a running broker; one is started if not given")
    options = parser.parse_args()
    with broker(options.kafka) as hosts:
        topic = f"waiting-{time.time_ns():x}"
        fill(hosts, topic, options.messages)
        sides = {
            "async def": lambda run: rate(hosts, topic, options.messages, f"tasks-{run}", tasks=True),
            "threads": lambda run: rate(hosts, topic, options.messages, f"threads-{run}", tasks=False),
        }
        figures = in_turn(sides, options.rounds)
    print(f"\n{AT_ONCE} handlers at once that wait for {WAIT * 1000:g} ms, {KEYS} keys: {about()}")
    print(f"  ideal: {IDEAL:,.0f} msg/s")
    for side, found in figures.items():
        part = statistics.median(found) / IDEAL
        verdict = "reached" if part >= AIM else "MISSED"
        print(f"  {side}: {statistics.median(found):,.0f} msg/s, {part:.2f} of it   (aim: at least {AIM}: {verdict})")


if __name__ == "__main__":
    sys.exit(main())
