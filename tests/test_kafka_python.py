"""What flowkit's clients on kafka-python do about its faults. Each test of one says which."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kafka import OffsetAndMetadata, TopicPartition
from kafka.errors import KafkaConnectionError, MessageSizeTooLargeError
from kafka.future import Future
from servers import Kafka, MakeTopic
from support import Owner
from test_client_options import load

from flowkit import DeliveryError
from flowkit.clients.kafka_python import Consumer, EndedWithAnother, Producer

MakeProducer = Callable[..., Producer]


@pytest.fixture
def make(kafka: Kafka) -> Iterator[MakeProducer]:
    """Makes a producer with these options."""
    with contextlib.ExitStack() as stack:

        def producer(**options: Any) -> Producer:
            found = Producer(load(kafka.hosts, **options))
            stack.callback(found.close, 5)
            return found

        yield producer


def test_what_ends_with_a_message_that_is_too_large_is_not_to_blame(
    make: MakeProducer, small_topic: MakeTopic
) -> None:
    """kafka-python ends all that is under way with that error, also what stands before, and in other partitions."""
    producer, name = make(linger_ms=200), small_topic(partitions=2)
    sizes = [10] * 50 + [1_000] + [10] * 50
    deliveries = [producer.send(name, bytes(size), None, (), number % 2) for number, size in enumerate(sizes)]
    producer.flush(30)
    outcomes = [producer.outcome(delivery) for delivery in deliveries]

    assert producer.is_over
    failed = {number: problem for number, problem in enumerate(outcomes) if problem is not None}
    assert {number for number, problem in failed.items() if not problem.passing} == {50}
    del failed[50]
    assert all("EndedWithAnother" in str(problem) for problem in failed.values())
    assert failed, "the fault is gone from kafka-python: EndedWithAnother can go too"


def test_a_client_that_is_over_does_not_blame_what_comes_later(make: MakeProducer, small_topic: MakeTopic) -> None:
    producer, name = make(), small_topic()
    refused = producer.send(name, bytes(1_000), None, (), None)
    producer.flush(30)
    later = producer.send(name, b"good", None, (), None)
    producer.flush(30)
    outcomes = [producer.outcome(delivery) for delivery in (refused, later)]
    assert [problem and problem.passing for problem in outcomes] == [False, True]


def test_a_connection_that_breaks_is_no_end_of_a_batch(make: MakeProducer, topic: MakeTopic) -> None:
    """kafka-python tells of it by keyword."""
    producer = make(linger_ms=0)
    sender = producer._producer._sender
    broken: list[Any] = []
    complete = sender._complete_batch

    def break_first(batch: Any, *args: Any) -> None:
        if broken:
            complete(batch, *args)
        else:
            broken.append(batch)
            sender._complete_batch_with_exception(batch, KafkaConnectionError("broken"))

    sender._complete_batch = break_first
    delivery = producer.send(topic(), b"1", None, (), None)
    producer.flush(20)
    assert broken
    assert producer.outcome(delivery) is None


def test_two_that_are_refused_at_once_are_the_only_ones_to_blame(make: MakeProducer) -> None:
    """kafka-python notes the error of the last one, and gives it to all that is under way."""
    producer = make()
    transactions = producer._transactions
    producer._dispatch_error = lambda _, exception, __: transactions.transition_to_fatal_error(exception)
    for number in range(2):
        producer._failed(None, MessageSizeTooLargeError(number), partition_response=None)
        assert type(transactions.last_error) is EndedWithAnother


def test_records_of_a_batch_with_one_that_is_not_valid_are_not_to_blame(
    make: MakeProducer, compacted_topic: MakeTopic
) -> None:
    producer, name = make(linger_ms=200), compacted_topic()
    deliveries = [producer.send(name, b"value", key, (), 0) for key in (b"1", b"2", None, b"4")]
    producer.flush(20)
    outcomes = [producer.outcome(delivery) for delivery in deliveries]
    assert [problem and problem.with_another for problem in outcomes] == [True, True, False, True]
    assert [problem and problem.passing for problem in outcomes] == [True, True, False, True]


def test_a_producer_that_somebody_else_has_closed_does_not_blame_the_message(
    make: MakeProducer, topic: MakeTopic
) -> None:
    producer = make()
    producer.close(5)
    with pytest.raises(DeliveryError, match="this producer is closed") as caught:
        producer.send(topic(), b"1", None, (), None)
    assert caught.value.passing


def test_offsets_that_were_asked_for_before_a_rebalance_are_asked_for_again(
    make: MakeProducer, kafka: Kafka, topic: MakeTopic
) -> None:
    """As after a sleep in which others went on: the answer of before is there, and nobody has looked at it."""
    producer, name = make(), topic()
    for number in range(5):
        producer.send(name, b"%d" % number, None, (), 0)
    producer.flush(10)
    consumer = Consumer(load(kafka.hosts), name)
    with contextlib.closing(consumer._consumer):
        consumer.subscribe([name], Owner())
        partition = TopicPartition(name, 0)
        before = Future().success({partition: OffsetAndMetadata(3, "", -1)})
        consumer._consumer._coordinator._offset_fetch_futures[frozenset([partition])] = before
        deadline = time.monotonic() + 20
        found: list[bytes | None] = []
        while len(found) < 5 and time.monotonic() < deadline:
            found += [record.value for records in consumer.poll(0.5).values() for record in records]
    assert found == [b"0", b"1", b"2", b"3", b"4"]
