"""Handlers that wait, many at once: how near to the ideal rate 100 of them come that wait for 10 ms each.

    make bench-waiting                                # or:
    python tests/benchmarks/waiting.py [--rounds 5] [--messages 20000] [--client kafka-python] [--kafka HOST:PORT]

An ``async def`` handler with ``concurrency=100``, and one that blocks, on as many threads; 1,000 keys in 4 partitions. The rate
counts from the first message that is begun to the end of the last one. Ideal are 100 messages each 10 ms. Then the same where
one message of 999 waits for a whole second: ideal is that all 100 are busy until the last message ends. Beside them tasks of
a bare event loop, without Kafka and without an order. That each message was handled, and those of a key in order, is checked
in each round.
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
SLOW, EVERY = 1.0, 999
"""Seconds that one message of so many waits, where some are slow."""
AIM = 0.8


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


def seconds(number: int, *, slow: bool) -> float:
    """What a message waits for."""
    return SLOW if slow and number % EVERY == 0 else WAIT


def ideal(count: int, *, slow: bool) -> float:
    """Messages a second, if all are busy all the time."""
    return count * AT_ONCE / sum(seconds(number, slow=slow) for number in range(count))


def bare(count: int, *, slow: bool) -> float:
    """The same, of tasks that do nothing else, on as many slots."""

    async def run() -> float:
        left = iter(range(count))

        async def slot() -> None:
            for number in left:
                await asyncio.create_task(asyncio.sleep(seconds(number, slow=slow)))

        began = time.monotonic()
        await asyncio.gather(*(slot() for _ in range(AT_ONCE)))
        return count / (time.monotonic() - began)

    return asyncio.run(run())


def rate(hosts: str, topic: str, count: int, client: str, run: str, *, tasks: bool, slow: bool) -> float:
    """Messages a second."""
    app = Flowkit("waiting", kafka={"hosts": hosts}, log_level="warning", client=client)
    waiting = Waiting()

    def on_a_thread(number: int, message: Message) -> None:
        waiting.begin()
        time.sleep(seconds(number, slow=slow))
        waiting.end(number, message)

    async def as_a_task(number: int, message: Message) -> None:
        waiting.begin()
        await asyncio.sleep(seconds(number, slow=slow))
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
    parser.add_argument("--client", choices=["kafka-python", "confluent"], default="kafka-python")
    parser.add_argument("--kafka", metavar="HOST:PORT", help="a running broker; one is started if not given")
    options = parser.parse_args()
    count = options.messages
    with broker(options.kafka) as hosts:
        topic = f"waiting-{time.time_ns():x}"
        fill(hosts, topic, count)
        for slow in (False, True):
            sides = {
                "a bare event loop": lambda _, slow=slow: bare(count, slow=slow),
                "async def": lambda run, slow=slow: rate(
                    hosts, topic, count, options.client, f"tasks-{run}", tasks=True, slow=slow
                ),
                "threads": lambda run, slow=slow: rate(
                    hosts, topic, count, options.client, f"threads-{run}", tasks=False, slow=slow
                ),
            }
            figures = in_turn(sides, options.rounds)
            most, beside = ideal(count, slow=slow), statistics.median(figures["a bare event loop"])
            some = f", but one of {EVERY} for {SLOW:g} s" if slow else ""
            print(
                f"\n{AT_ONCE} handlers at once that wait for {WAIT * 1000:g} ms{some}, {KEYS} keys, {options.client}: {about()}"
            )
            print(f"  ideal: {most:,.0f} msg/s")
            for side, found in figures.items():
                middle = statistics.median(found)
                print(
                    f"  {side}: {middle:,.0f} msg/s, {middle / most:.2f} of it, {middle / beside:.2f} of the bare event loop"
                )
    print(f"  (aim, where none is slow: at least {AIM} of the ideal)")


if __name__ == "__main__":
    sys.exit(main())
