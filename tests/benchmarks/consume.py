"""Messages per second of an inline flowkit route against a bare loop of the same Kafka client, both sides in turn in one run.

    make bench-inline                                 # or:
    python tests/benchmarks/consume.py [consume] [respond] [typed] [--client kafka-python] [--client confluent] \\
        [--count 300000] [--rounds 5] [--kafka HOST:PORT]

consume   JSON to a handler of the payload.
respond   the same, and a message sent for each.
typed     a dataclass and the Message.

Bare: the client's own poll with flowkit's options, ``orjson.loads`` (typed: a dataclass validated by pydantic), a call of the
handler; after each ``INTERVAL`` everything sent is flushed and looked at, and the offsets are committed: at least once, as
flowkit does. flowkit: ``@app.topic(..., inline=True)``. The handler and the options are the same.

Each side reads the same 200-byte JSON messages from 4 partitions, and its count is checked: none missing, none twice.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import confluent_kafka
import orjson
from common import PARTITIONS, Tally, about, broker, consumer_of, fill, in_turn, show, show_ratio
from kafka import KafkaConsumer, KafkaProducer, OffsetAndMetadata
from pydantic import TypeAdapter

from flowkit import Flowkit, Message
from flowkit.clients import confluent_options, kafka_options
from flowkit.devstack import create_topics
from flowkit.server import collecting_less
from flowkit.settings import Kafka, Settings

INTERVAL = 0.2
"""Seconds between commits; flowkit's default."""

CASES = {
    "consume": {"kafka-python": 0.95, "confluent": 0.8},
    "respond": {"kafka-python": 0.85, "confluent": 0.85},
    "typed": {"kafka-python": 0.6, "confluent": 0.6},
}
"""What part of the bare loop's rate flowkit is to reach."""


@dataclass
class Click:
    id: int
    user: str
    amount: float
    kind: str
    text: str


READ: Callable[[Any], Click] = TypeAdapter(Click).validator.validate_json


class BareKafkaPython:
    def __init__(self, hosts: str, topic: str, group: str, tally: Tally) -> None:
        self.handler, self.typed_handler = tally.take, tally.take_typed
        options = kafka_options.CONSUMER
        self.consumer = KafkaConsumer(topic, bootstrap_servers=hosts, group_id=group, max_poll_records=500, **options)
        self.producer = KafkaProducer(bootstrap_servers=hosts, **kafka_options.PRODUCER)
        self.sent: list[Any] = []
        self.done: dict[Any, int] = {}
        while not self.consumer.assignment():
            self.consumer.poll(timeout_ms=50, max_records=1, update_offsets=False)

    def consume(self) -> None:
        loads, handler = orjson.loads, self.handler
        for place, records in self.consumer.poll(timeout_ms=500).items():
            for record in records:
                handler(loads(record.value))
            self.done[place] = records[-1].offset + 1

    def respond(self, out: str) -> None:
        loads, dumps, handler, send, sent = orjson.loads, orjson.dumps, self.handler, self.producer.send, self.sent
        for place, records in self.consumer.poll(timeout_ms=500).items():
            for record in records:
                data = loads(record.value)
                handler(data)
                sent.append(send(out, value=dumps(data)))
            self.done[place] = records[-1].offset + 1

    def typed(self) -> None:
        handler = self.typed_handler
        for place, records in self.consumer.poll(timeout_ms=500).items():
            for record in records:
                handler(READ(record.value), record)
            self.done[place] = records[-1].offset + 1

    def settle(self) -> None:
        if self.sent:
            self.producer.flush()
            for future in self.sent:
                if not future.succeeded():
                    raise SystemExit(f"not confirmed: {future.exception}")
            self.sent.clear()
        if self.done:
            self.consumer.commit({place: OffsetAndMetadata(at, "", -1) for place, at in self.done.items()})
            self.done = {}

    def close(self) -> None:
        self.consumer.close(autocommit=False)
        self.producer.close()


class BareConfluent:
    def __init__(self, hosts: str, topic: str, group: str, tally: Tally) -> None:
        self.handler, self.typed_handler = tally.take, tally.take_typed
        settings = Settings(kafka=Kafka(hosts=(hosts,)))
        options = confluent_options.consumer_options(settings, group)
        # what commit() commits is what consume() gave, without a line of Python for each
        self.consumer = confluent_kafka.Consumer(
            {**options, "auto.offset.reset": "earliest", "enable.auto.offset.store": True}
        )
        self.producer = confluent_kafka.Producer(
            confluent_options.confluent_options(settings, confluent_options.PRODUCER)
        )
        self.started = self.confirmed = 0
        self.assigned = False
        self.consumer.subscribe([topic], on_assign=self._assign)
        while not self.assigned:
            if self.consumer.poll(0) is not None:
                raise SystemExit("a message came before its partition")
            time.sleep(0.005)

    def _assign(self, consumer: Any, partitions: Any) -> None:
        consumer.assign(partitions)
        self.assigned = True

    def _report(self, error: Any, _: Any) -> None:
        if error is None:
            self.confirmed += 1

    def consume(self) -> None:
        loads, handler = orjson.loads, self.handler
        for message in self.consumer.consume(500, 0.02):
            if message.error() is not None:
                raise SystemExit(f"{message.error()}")
            handler(loads(message.value()))  # type: ignore[arg-type]

    def respond(self, out: str) -> None:
        loads, dumps, handler, produce, report = (
            orjson.loads,
            orjson.dumps,
            self.handler,
            self.producer.produce,
            self._report,
        )
        messages = self.consumer.consume(500, 0.02)
        for message in messages:
            if message.error() is not None:
                raise SystemExit(f"{message.error()}")
            data = loads(message.value())  # type: ignore[arg-type]
            handler(data)
            produce(out, dumps(data), on_delivery=report)
        self.started += len(messages)
        self.producer.poll(0)

    def typed(self) -> None:
        handler = self.typed_handler
        for message in self.consumer.consume(500, 0.02):
            if message.error() is not None:
                raise SystemExit(f"{message.error()}")
            handler(READ(message.value()), message)

    def settle(self) -> None:
        if self.started:
            self.producer.flush()
            if self.started != self.confirmed:
                raise SystemExit(f"{self.started:,} messages were sent, and {self.confirmed:,} confirmed")
        with contextlib.suppress(confluent_kafka.KafkaException):  # there is nothing new
            self.consumer.commit(asynchronous=False)

    def close(self) -> None:
        self.consumer.close()


BARE: Mapping[str, Any] = {"kafka-python": BareKafkaPython, "confluent": BareConfluent}


def bare(client: str, case: str, hosts: str, topic: str, run: str, count: int) -> float:
    tally = Tally()
    loop = BARE[client](hosts, topic, f"bare-{run}", tally)
    turn = partial(loop.respond, f"{topic}-out") if case == "respond" else getattr(loop, case)
    start = time.perf_counter()
    settled, before = time.monotonic(), tally.count
    while tally.count < count:
        turn()
        if time.monotonic() - settled > INTERVAL:
            loop.settle()
            settled = time.monotonic()
    loop.settle()
    seconds = time.perf_counter() - start
    loop.close()
    tally.check(count, f"bare {client}")
    return (count - before) / seconds


def flowkit(client: str, case: str, hosts: str, topic: str, run: str, count: int) -> float:
    tally = Tally()
    app = Flowkit("bench", kafka={"hosts": hosts}, inline=True, client=client)
    group = f"flowkit-{run}"
    if case == "consume":
        app.add_topic(topic, tally.take, group=group)
    elif case == "typed":

        @app.topic(topic, group=group)
        def typed(click: Click, message: Message) -> None:
            tally.take_typed(click, message)

    else:

        @app.topic(topic, group=group)
        @app.responds_to(f"{topic}-out")
        def respond(data: dict) -> dict:  # type: ignore[type-arg]
            tally.take(data)
            return data

    consumer = consumer_of(app)
    consumer.claim = consumer.producer.claim()
    while not consumer.tracks:
        consumer.turn()
    before = tally.count
    start = time.perf_counter()
    while tally.count < count:
        consumer.turn()
    consumer.inline.settle()
    consumer.commit()
    seconds = time.perf_counter() - start
    consumer.stop()
    consumer.run()  # ends at once: leaves the group
    tally.check(count, f"flowkit {client}")
    return (count - before) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all if none is named")
    parser.add_argument("--client", action="append", choices=[*BARE], help="both if none is named")
    parser.add_argument("--count", type=int, default=600_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kafka", help="a running broker, instead of one started for this run")
    options = parser.parse_args()
    with broker(options.kafka) as hosts, collecting_less():  # as `flowkit run` does; both sides
        topic = f"bench-{time.time_ns():x}"
        create_topics(hosts, {f"{topic}-out": PARTITIONS})
        fill(hosts, topic, range(options.count))
        for client in options.client or BARE:
            for case in options.cases or CASES:
                measure(client, case, hosts, topic, options.count, options.rounds)


def measure(client: str, case: str, hosts: str, topic: str, count: int, rounds: int) -> None:
    figures = in_turn(
        {
            "bare": lambda run: bare(client, case, hosts, topic, run, count),
            "flowkit": lambda run: flowkit(client, case, hosts, topic, run, count),
        },
        rounds,
    )
    print(f"{case}, {client}: {count:,} {about()}, {rounds} rounds")
    show(figures)
    show_ratio(figures, "flowkit", "bare", CASES[case][client])


if __name__ == "__main__":
    main()
