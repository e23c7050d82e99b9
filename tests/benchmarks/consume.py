"""Messages per second: an inline flowkit route against a bare kafka-python loop, both sides in turn in one run.

    make bench                                        # or:
    python tests/benchmarks/consume.py [--count 300000] [--rounds 5] [--kafka HOST:PORT]

Bare: ``KafkaConsumer.poll`` with flowkit's own client options, ``orjson.loads``, a call of the handler, a commit a second.
flowkit: ``@app.topic(..., inline=True)`` with the same handler; at least once, offsets committed once a second.
Each side reads the same 200-byte JSON messages from 4 partitions, and its count is checked: none missing, none twice.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import orjson
from kafka import KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from servers import ApacheKafka

from flowkit import Flowkit
from flowkit.clients.kafka_options import CONSUMER
from flowkit.clients.kafka_python import Consumer as Client
from flowkit.consumer import Consumer
from flowkit.devstack import create_topics

PARTITIONS = 4


def payload(number: int) -> bytes:
    head = b'{"id":%d,"user":"u%06d","amount":%d.25,"kind":"click","pad":"' % (
        number,
        number % 99_991,
        number % 5_000,
    )
    return head + b"x" * (198 - len(head)) + b'"}'


def fill(hosts: str, topic: str, count: int) -> None:
    create_topics(hosts, {topic: PARTITIONS})
    producer = KafkaProducer(bootstrap_servers=hosts, linger_ms=20, batch_size=262_144)
    for number in range(count):
        producer.send(topic, payload(number), partition=number % PARTITIONS)
    producer.flush()
    producer.close()


class Tally:
    """The no-op handler: counts, and remembers the sum of the ids so that a missing or repeated one shows."""

    def __init__(self) -> None:
        self.count = self.total = 0

    def __call__(self, data: dict) -> None:  # type: ignore[type-arg]
        self.count += 1
        self.total += data["id"]

    def check(self, count: int, side: str) -> None:
        if (self.count, self.total) != (count, count * (count - 1) // 2):
            raise SystemExit(
                f"{side}: {self.count} messages, ids add up to {self.total}: some are missing or repeated"
            )


def bare(hosts: str, topic: str, group: str, count: int) -> float:
    tally = Tally()
    consumer = KafkaConsumer(topic, bootstrap_servers=hosts, group_id=group, max_poll_records=500, **CONSUMER)
    loads, handler = orjson.loads, tally
    while not consumer.assignment():
        consumer.poll(timeout_ms=50, max_records=1, update_offsets=False)
    start = time.perf_counter()
    committed = time.monotonic()
    while tally.count < count:
        for partition, records in consumer.poll(timeout_ms=500).items():
            for record in records:
                handler(loads(record.value))
            done = {TopicPartition(*partition): OffsetAndMetadata(records[-1].offset + 1, "", -1)}
        if time.monotonic() - committed > 1:
            committed = time.monotonic()
            consumer.commit(done)
    seconds = time.perf_counter() - start
    consumer.close(autocommit=False)
    tally.check(count, "bare")
    return count / seconds


def flowkit(hosts: str, topic: str, group: str, count: int) -> float:
    tally = Tally()
    app = Flowkit("bench", kafka={"hosts": hosts}, inline=True)

    @app.topic(topic, group=group)
    def handler(data: dict) -> None:  # type: ignore[type-arg]
        tally(data)

    consumer = Consumer(group, app.handlings, app.settings, app.monitor, app.producer, Client)
    while not consumer.tracks:
        consumer.turn()
    before = tally.count
    start = time.perf_counter()
    while tally.count < count:
        consumer.turn()
    seconds = time.perf_counter() - start
    consumer.stop()
    consumer.run()  # ends at once: settles, commits, leaves the group
    tally.check(count, "flowkit")
    return (count - before) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kafka", help="a running broker, instead of one started for this run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if options.kafka:
            measure(options.kafka, options)
        else:
            with ApacheKafka(Path(directory)) as node:
                measure(node.hosts, options)


def measure(hosts: str, options: argparse.Namespace) -> None:
    run = f"{time.time_ns():x}"
    topic = f"bench-{run}"
    fill(hosts, topic, options.count)
    rates: dict[str, list[float]] = {"bare": [], "flowkit": []}
    for number in range(options.rounds + 1):
        for side, function in (("bare", bare), ("flowkit", flowkit)):
            gc.collect()
            rate = function(hosts, topic, f"{side}-{run}-{number}", options.count)
            if number:  # the first round warms up
                rates[side].append(rate)
    print(f"{options.count} messages of 200 bytes, {options.rounds} rounds, Python {platform.python_version()}")
    for side, found in rates.items():
        print(
            f"{side:>8}: median {statistics.median(found):>9,.0f} msg/s   (from {min(found):,.0f} to {max(found):,.0f})"
        )
    ratios = [ours / theirs for ours, theirs in zip(rates["flowkit"], rates["bare"], strict=True)]
    print(f"   ratio: median {statistics.median(ratios):.2f}   (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
