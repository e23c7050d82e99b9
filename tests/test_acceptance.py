"""The checks by which flowkit is to be better than its peers: the one that no other test makes, and where the others are.

A handler fails in the middle of a batch, and the broker has its offset: test_consumer_kafka.
Too many attempts, one dead letter with its origin, then progress: test_consumer_kafka, test_consumer. Too many dead letters:
test_dead.
A handler that is longer than ``max_poll_interval``: test_consumer_kafka.
SIGTERM in the middle of a batch, and a second signal: test_consumer_kafka.
Two consumers join and leave twenty times under load: here.
Each kind of declaration, sent never, once or twice, by a handler that returns or raises: test_responses.
SIGKILL of a work horse, and the responses of one that ends: test_kill, test_worker.
A message that comes again is one job: test_once. Topics ``a.b`` and ``a_b`` share no id: test_jobs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from commands import read_topic
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from servers import Kafka, MakeTopic, WaitFor

from flowkit import Flowkit
from flowkit.clients.opening import consumer_client, producer_client
from flowkit.consumer import Consumer
from flowkit.producer import Producer

PARTITIONS = 4
CHANGES = 20
BATCH = 100


class Member:
    """A consumer of a group, in a thread of its own, and the numbers it has handled by partition; ``out`` is for answers."""

    def __init__(
        self,
        hosts: str,
        topic: str,
        name: str,
        handled: list[int],
        out: str | None = None,
        client: str | None = None,
        **kafka: Any,
    ) -> None:
        self.mine: Counter[int] = Counter()
        app = Flowkit(
            name,
            **({} if client is None else {"client": client}),
            kafka={
                "hosts": hosts,
                "session_timeout": 6,
                "heartbeat_interval": 0.2,
                "offset_commit_interval": 0.1,
                "max_poll_records": BATCH,
                **kafka,
            },
            inline=True,
        )

        def handle(number: int) -> int | None:
            handled.append(number)
            self.mine[number % PARTITIONS] += 1
            return None if out is None else number

        app.add_topic(topic, handle, group=topic)
        if out is not None:
            app.add_response(handle, out)
        self._producer = Producer(lambda: app.settings, producer_client)
        self.consumer = Consumer(topic, app.handlings, app.settings, app.events, self._producer, consumer_client)
        self._thread = threading.Thread(target=self.consumer.run, name=name)
        self._thread.start()

    @property
    def partitions(self) -> int:
        return len(self.consumer.tracks)

    def stop(self) -> bool:
        self.consumer.stop()
        self._thread.join(30)
        self._producer.close()
        return self.consumer.clean and not self._thread.is_alive()


@contextlib.contextmanager
def load(hosts: str, topic: str) -> Iterator[list[int]]:
    """Numbers into a topic, one after the other, to the end of the block: 2,000 a second at most."""
    sent: list[int] = []
    ended = threading.Event()

    def send() -> None:
        with contextlib.closing(KafkaProducer(bootstrap_servers=hosts, linger_ms=5)) as producer:
            while not ended.wait(0.005):
                for _ in range(10):
                    number = len(sent)
                    producer.send(topic, str(number).encode(), partition=number % PARTITIONS)
                    sent.append(number)
            producer.flush()

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield sent
    finally:
        ended.set()
        thread.join(60)


def committed(hosts: str, topic: str) -> list[int | None]:
    with contextlib.closing(
        KafkaConsumer(bootstrap_servers=hosts, group_id=topic, enable_auto_commit=False)
    ) as found:
        return [found.committed(TopicPartition(topic, number)) for number in range(PARTITIONS)]


@pytest.mark.parametrize("strategy", ["range", "cooperative-sticky"])
def test_two_consumers_join_and_leave_twenty_times_under_load(
    kafka: Kafka, topic: MakeTopic, wait_for: WaitFor, strategy: str
) -> None:
    _join_and_leave(kafka, topic, wait_for, CHANGES, partition_assignment_strategy=strategy)


def test_in_a_group_whose_partitions_the_broker_gives_out_they_join_and_leave_too(
    kafka: Kafka, topic: MakeTopic, wait_for: WaitFor
) -> None:
    """KIP-848, which only librdkafka has. Members hear of a change with their next heartbeat, 5 s apart as brokers have it."""
    _join_and_leave(kafka, topic, wait_for, 6, client="confluent", group_protocol="consumer")


def _join_and_leave(kafka: Kafka, topic: MakeTopic, wait_for: WaitFor, changes: int, **options: Any) -> None:
    if not kafka.apache:
        pytest.skip("the embedded broker has no rebalances to be relied on")
    name, out = topic("churn", PARTITIONS), topic("answers")
    handled: list[int] = []
    longest = 0.0

    def join(number: int) -> Member:
        return Member(kafka.hosts, name, f"member-{number}", handled, out, **options)

    def every_partition_moves() -> None:
        nonlocal longest
        began, at = time.monotonic(), len(sent)
        wait_for(lambda: {number % PARTITIONS for number in handled[-5000:] if number > at} == set(range(PARTITIONS)))
        longest = max(longest, time.monotonic() - began)

    def join_and_leave(first: Member, number: int) -> Member:
        """Another one joins, and one of the two leaves: by turns the older one and the younger one."""
        second = join(number + 1)
        wait_for(lambda: first.partitions == second.partitions == PARTITIONS // 2)
        every_partition_moves()
        leaving, staying = (first, second) if number % 2 else (second, first)
        assert leaving.stop()
        wait_for(lambda: staying.partitions == PARTITIONS)
        every_partition_moves()
        return staying

    with load(kafka.hosts, name) as sent:
        staying = join(0)
        wait_for(lambda: staying.partitions == PARTITIONS)
        for number in range(changes // 2):
            staying = join_and_leave(staying, number)
    wait_for(lambda: len(set(handled)) == len(sent))
    assert staying.stop()

    counts = Counter(handled)
    assert sorted(counts) == sent
    repeated = sum(counts.values()) - len(sent)
    print(f"{options}: {len(sent)} sent, {repeated} repeated in {changes} changes, longest pause {longest:.1f} s")
    assert repeated <= changes * BATCH
    answers = Counter(int(record.value) for record in read_topic(kafka.hosts, out, len(sent)))
    assert sorted(answers) == sent
    assert answers.total() <= len(handled)
    assert committed(kafka.hosts, name) == [len(sent[number::PARTITIONS]) for number in range(PARTITIONS)]
