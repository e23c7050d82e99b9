"""When kafka-python is made to ask for more: that it does so in time, and that no message is lost, repeated or out of order."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from types import SimpleNamespace as Namespace
from typing import Any

import confluent_kafka
import pytest
from kafka import TopicPartition
from kafka.errors import UnknownError
from servers import Kafka, MakeTopic, WaitFor
from support import Owner
from test_client_options import load

from flowkit.clients import Unreadable, kafka_pacing
from flowkit.clients.kafka_python import Consumer
from flowkit.message import Partition

Open = Callable[..., Consumer]

CHUNK = 40_000
"""Bytes that a fetch gives of a partition here, at most: some 130 messages."""


@pytest.fixture
def opened(kafka: Kafka, wait_for: WaitFor) -> Iterator[Open]:
    """Opens a consumer of one topic, which has its partitions and has read nothing."""
    with contextlib.ExitStack() as stack:

        def opened(topic: str, group: str = "", **options: Any) -> Consumer:
            consumer = Consumer(load(kafka.hosts, **options), f"{topic}-{group}")
            stack.callback(consumer.close, 5)
            owner = Owner()
            consumer.subscribe([topic], owner)
            wait_for(lambda: consumer.poll(0.05, 1) or owner.mine)
            for partition in owner.mine:
                consumer.seek(partition, 0)
            return consumer

        yield opened


def produce(kafka: Kafka, topic: str, counts: dict[int, int]) -> None:
    """So many messages in each partition, of which each says which one it is there. The batches are small."""
    producer = confluent_kafka.Producer(
        {"bootstrap.servers": kafka.hosts, "batch.num.messages": 7, "enable.idempotence": True}
    )
    for partition, count in counts.items():
        for number in range(count):
            producer.produce(topic, b"%0300d" % number, partition=partition)
        producer.flush(30)


def test_brokers_hold_a_fetch_for_longer_where_nothing_comes(
    kafka: Kafka, opened: Open, topic: MakeTopic, monkeypatch: pytest.MonkeyPatch, wait_for: WaitFor
) -> None:
    """Unless the application says for how long, or a partition has just been paused or sought."""
    monkeypatch.setattr(kafka_pacing, "IDLE_AFTER", 0.2)
    name = topic()
    ours, theirs = opened(name, "ours"), opened(name, "theirs", fetch_max_wait_ms=70)

    def wait_of(consumer: Consumer) -> int:
        return int(consumer._consumer._fetcher.config["fetch_max_wait_ms"])

    wait_for(lambda: ours.poll(0.05) or wait_of(ours) == kafka_pacing.IDLE_WAIT)
    produce(kafka, name, {0: 1})
    wait_for(lambda: ours.poll(0.05))
    ours.poll(0)
    assert wait_of(ours) == kafka_pacing.BUSY_WAIT
    wait_for(lambda: ours.poll(0.05) or wait_of(ours) == kafka_pacing.IDLE_WAIT)
    for act in (partial(ours.seek, Partition(name, 0), 1), partial(ours.pause, Partition(name, 0))):
        act()
        wait_for(lambda: ours.poll(0.05) or wait_of(ours) == kafka_pacing.BUSY_WAIT)
        wait_for(lambda: ours.poll(0.05) or wait_of(ours) == kafka_pacing.IDLE_WAIT)

    wait_for(lambda: theirs.poll(0.05))
    assert wait_of(theirs) == 70


def test_an_idle_wait_is_longer_with_many_partitions(opened: Open, topic: MakeTopic, wait_for: WaitFor) -> None:
    consumer = opened(topic(partitions=300))
    wait_for(lambda: consumer.poll(0.05) or consumer._consumer._fetcher.config["fetch_max_wait_ms"] == 300)


def poll_within_a_fetch(consumer: Consumer, wait_for: WaitFor) -> Any:
    """Polls until some of a fetch is in hand, and gives kafka-python's fetcher."""
    fetcher = consumer._consumer._fetcher
    wait_for(lambda: consumer.poll(0.05, 10))
    assert fetcher._next_partition_records, "the rest of a fetch is in hand"
    return fetcher


def counted(fetcher: Any, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One for each time that the brokers are asked for more, from now on."""
    create, sent = fetcher._create_fetch_requests, list[None]()

    def creating() -> Any:
        sent.append(None)
        return create()

    monkeypatch.setattr(fetcher, "_create_fetch_requests", creating)
    return sent


def test_what_is_behind_the_messages_in_hand_is_fetched_shortly_before_their_end(
    kafka: Kafka, opened: Open, topic: MakeTopic, wait_for: WaitFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what comes of another partition meanwhile has its turn behind them. And nothing else is fetched before."""
    name = topic(partitions=2)
    produce(kafka, name, {0: 1_000})
    consumer = opened(name, max_partition_fetch_bytes=CHUNK)
    fetcher = poll_within_a_fetch(consumer, wait_for)
    sent = counted(fetcher, monkeypatch)
    end = fetcher._next_partition_records.batches.end().offset
    while end not in {fetch.fetched_offset for fetch in fetcher._completed_fetches}:
        time.sleep(0.02)  # for each message
        assert consumer.poll(0, 1), "it did not come in time"
    assert len(sent) == 1
    assert end - 30 <= consumer.position(Partition(name, 0)) < end


def test_the_partition_in_hand_comes_behind_the_others() -> None:
    handled: list[Any] = []
    fetcher = Namespace(
        send_fetches=None, _create_fetch_requests=None, _handle_fetch_response=lambda *given: handled.append(given)
    )
    pace = kafka_pacing.Pace(Namespace(_subscription=None, _fetcher=fetcher))
    pace._in_hand = Namespace(topic_partition=("b", 1))
    topics = [
        Namespace(topic=topic, partitions=[Namespace(partition_index=number) for number in (2, 1, 0)])
        for topic in ("b", "c", "a")
    ]
    fetcher._handle_fetch_response("node", {}, 0.0, Namespace(responses=topics))
    ((_, _, _, response),) = handled
    order = [(found.topic, one.partition_index) for found in response.responses for one in found.partitions]
    assert order == [("c", 2), ("c", 1), ("c", 0), ("a", 2), ("a", 1), ("a", 0), ("b", 2), ("b", 0), ("b", 1)]


def test_where_a_fetch_takes_long_it_is_sent_sooner() -> None:
    sent: list[Any] = []
    fetcher = Namespace(
        send_fetches=lambda: sent.append(None),
        _create_fetch_requests=None,
        _handle_fetch_response=lambda *given: None,
        config={"max_partition_fetch_bytes": 1},
    )
    kafka_pacing.Pace(Namespace(_subscription=Namespace(assignment={}), _fetcher=fetcher))

    def in_hand(seconds_left: float) -> int:
        """How many fetches are sent where so much is left of what is in hand."""
        batches = Namespace(size=1, seconds_left=lambda: seconds_left, end=lambda: None)
        fetcher._next_partition_records = Namespace(topic_partition=("a", 0), batches=batches)
        sent.clear()
        fetcher.send_fetches()
        return len(sent)

    assert [in_hand(left) for left in (1.9, 0.3, 0.1)] == [0, 0, 1]
    fetcher._handle_fetch_response("node", {}, time.monotonic() - 1, Namespace(responses=[]))
    assert [in_hand(left) for left in (2.5, 1.9)] == [0, 1]


def test_on_kafka_too_it_comes_behind_them(
    kafka: Kafka, opened: Open, topic: MakeTopic, wait_for: WaitFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_pacing, "AHEAD", -1)
    name = topic(partitions=3)
    produce(kafka, name, {1: 2_000})
    consumer = opened(name, max_partition_fetch_bytes=CHUNK)
    fetcher = consumer._consumer._fetcher

    def is_in_hand_alone() -> bool:
        """The first answer of a broker names the empty partitions too."""
        consumer.poll(0.05, 10)
        records = fetcher._next_partition_records
        asked = fetcher._nodes_with_pending_fetch_requests or fetcher._completed_fetches
        return bool(records) and not asked and 0 < records.batches.seconds_left() < inf

    wait_for(is_in_hand_alone)
    end = fetcher._next_partition_records.batches.end().offset
    produce(kafka, name, {0: 1, 2: 1})
    monkeypatch.setattr(kafka_pacing, "AHEAD", inf)
    assert consumer.poll(0.05, 1)
    wait_for(lambda: fetcher._completed_fetches)
    *others, following = [(fetch.topic_partition, fetch.fetched_offset) for fetch in fetcher._completed_fetches]
    assert following == ((name, 1), end)
    assert sorted(others) == [((name, 0), 0), ((name, 2), 0)]


def test_what_is_wrong_with_a_fetch_from_before_a_seek_is_not_told(
    kafka: Kafka, opened: Open, topic: MakeTopic
) -> None:
    name = topic()
    produce(kafka, name, {0: 100})
    consumer = opened(name)
    broken = Namespace(error_code=UnknownError.errno, high_watermark=100)
    fetch = Namespace(
        topic_partition=TopicPartition(name, 0), fetched_offset=70, partition_data=broken, metric_aggregator=None
    )
    parse = consumer._consumer._fetcher._parse_fetched_data
    consumer.seek(Partition(name, 0), 70)
    with pytest.raises(Unreadable) as told:
        parse(fetch)
    assert told.value.offset == 70
    consumer.seek(Partition(name, 0), 30)
    assert parse(fetch) is None
    fetch.topic_partition = TopicPartition(name, 9)  # which is somebody else's by now
    assert parse(fetch) is None


def test_where_a_fetch_ends_is_not_known_of_what_is_damaged(
    kafka: Kafka, opened: Open, topic: MakeTopic, wait_for: WaitFor
) -> None:
    name = topic()
    produce(kafka, name, {0: 1_000})
    consumer = opened(name, max_partition_fetch_bytes=CHUNK)
    batches = poll_within_a_fetch(consumer, wait_for)._next_partition_records.batches
    records = batches._records
    assert batches.end().offset >= 100

    size = len(records._next_slice)  # that of each batch
    good = bytes(records._buffer[: records._pos + 3 * size])
    records._buffer = good
    last = batches.end()
    damaged = bytes(8) + b"\0\0\0\x20" + b"\2" * 32
    for more, expected in ((good[-size:-1], last), (bytes(40), last), (damaged, None)):
        records._buffer = good + more
        assert batches.end() == expected


def test_fetches_for_others_are_not_sent_in_each_poll(
    kafka: Kafka, opened: Open, topic: MakeTopic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one partition's messages are in hand, and nothing is behind them. But messages of the others come in time."""
    name = topic(partitions=2)
    produce(kafka, name, {0: 2_000})
    consumer = opened(name)
    sent = counted(consumer._consumer._fetcher, monkeypatch)
    seen = polls = 0
    while seen < 1_000:
        if seen == 20:
            polls, began = 0, time.monotonic()
            sent.clear()
        seen, polls = seen + sum(map(len, consumer.poll(1, 10).values())), polls + 1
        time.sleep(0.002)
    assert polls == 98
    assert 3 <= len(sent) <= (time.monotonic() - began) / (kafka_pacing.GAP / 1000) + 1

    produce(kafka, name, {1: 1})
    others, deadline = 0, time.monotonic() + 60
    while not others:  # its turn comes when what is in hand is over
        assert time.monotonic() < deadline
        got = consumer.poll(1, 10)
        others = len(got.get(Partition(name, 1), ()))
        seen += sum(map(len, got.values()))
        assert seen <= 2_001
    assert seen >= 2_000


class Model:
    """Which message of each partition is to come next."""

    def __init__(self, consumer: Consumer, topic: str, counts: dict[int, int]) -> None:
        self.consumer = consumer
        self.counts = {Partition(topic, number): count for number, count in counts.items()}
        self.next = dict.fromkeys(self.counts, 0)
        self.paused: set[Partition] = set()

    def poll(self, most: int) -> None:
        for partition, records in self.consumer.poll(0.02, most).items():
            assert partition not in self.paused
            for record in records:
                assert (partition, int(record.value or b""), record.offset) == (
                    partition,
                    self.next[partition],
                    record.offset,
                )
                self.next[partition] = record.offset + 1

    def seek(self, partition: Partition, offset: int) -> None:
        self.consumer.seek(partition, offset)
        self.next[partition] = offset

    def pause(self, partition: Partition) -> None:
        self.consumer.pause(partition)
        self.paused.add(partition)

    def resume(self, partition: Partition) -> None:
        self.consumer.resume(partition)
        self.paused.discard(partition)

    @property
    def is_at_the_end(self) -> bool:
        return self.next == self.counts


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_sought_and_paused_no_message_is_lost_or_repeated(
    kafka: Kafka, opened: Open, topic: MakeTopic, seed: int
) -> None:
    choose = random.Random(seed)
    name, counts = topic(partitions=3), {0: 4_000, 1: 300, 2: 20}
    produce(kafka, name, counts)
    consumer = opened(name, max_partition_fetch_bytes=CHUNK)
    model = Model(consumer, name, counts)
    for _ in range(400):
        partition = choose.choice([*model.next])
        act = choose.random()
        if act < 0.03:
            model.seek(partition, choose.randint(0, model.next[partition]))
        elif act < 0.04:
            model.seek(partition, choose.randint(model.next[partition], model.counts[partition]))
        elif act < 0.09:
            model.pause(partition)
        elif act < 0.2:
            model.resume(partition)
        model.poll(choose.choice([1, 30, 500]))
    for partition in [*model.paused]:
        model.resume(partition)
    deadline = time.monotonic() + 60
    while not model.is_at_the_end:
        assert time.monotonic() < deadline, (model.next, model.counts)
        model.poll(500)


def test_what_was_aborted_is_not_seen_over_many_fetches(kafka: Kafka, opened: Open, topic: MakeTopic) -> None:
    """Of a transaction that begins in one fetch and ends in another, too."""
    name = topic()
    producer = confluent_kafka.Producer(
        {"bootstrap.servers": kafka.hosts, "transactional.id": name, "batch.num.messages": 7}
    )
    producer.init_transactions(30)
    committed: list[int] = []
    for turn in range(12):
        producer.begin_transaction()
        for number in range(300):
            producer.produce(name, b"%0300d" % (1_000 * turn + number))
        producer.flush(30)
        if turn % 3 == 1:
            producer.abort_transaction(30)
        else:
            producer.commit_transaction(30)
            committed += range(1_000 * turn, 1_000 * turn + 300)
    consumer = opened(name, isolation_level="read_committed", max_partition_fetch_bytes=CHUNK)
    seen: list[int] = []
    deadline = time.monotonic() + 60
    while len(seen) < len(committed):
        assert time.monotonic() < deadline, len(seen)
        for records in consumer.poll(0.1, 50).values():
            seen += (int(record.value or b"") for record in records)
    assert seen == committed
    assert not consumer.poll(0.5)
