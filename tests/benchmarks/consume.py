"""Messages per second: an inline flowkit route against a bare kafka-python loop, both sides in turn in one run.

    make bench                                        # or:
    python tests/benchmarks/consume.py [--count 300000] [--rounds 5] [--kafka HOST:PORT]

Bare: ``KafkaConsumer.poll`` with flowkit's own client options, ``orjson.loads``, a call of the handler, a commit a second.
flowkit: ``@app.topic(..., inline=True)`` with the same handler; at least once, offsets committed once a second.
Each side reads the same 200-byte JSON messages from 4 partitions, and its count is checked: none missing, none twice.
"""

from __future__ import annotations

import argparse
import time

import orjson
from common import Tally, about, broker, consumer_of, fill, in_turn, show, show_ratio
from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition

from flowkit import Flowkit
from flowkit.clients.kafka_options import CONSUMER


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

    consumer = consumer_of(app)
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
    with broker(options.kafka) as hosts:
        measure(hosts, options.count, options.rounds)


def measure(hosts: str, count: int, rounds: int) -> None:
    topic = f"bench-{time.time_ns():x}"
    fill(hosts, topic, range(count))
    figures = in_turn(
        {
            "bare": lambda run: bare(hosts, topic, f"bare-{run}", count),
            "flowkit": lambda run: flowkit(hosts, topic, f"flowkit-{run}", count),
        },
        rounds,
    )
    print(f"inline: {count} {about()}, {rounds} rounds")
    show(figures)
    show_ratio(figures, "flowkit", "bare")


if __name__ == "__main__":
    main()
