"""What the clients on confluent-kafka do by themselves. What flowkit promises is in other tests, which ``make test-confluent``
runs on them.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

import pytest
from commands import read_topic
from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition
from hypothesis import given
from hypothesis import strategies as st
from kafka import KafkaAdminClient, KafkaProducer
from servers import Kafka, MakeTopic, WaitFor, why_not_apache_kafka
from support import Owner

from flowkit import BrokerUnavailable, ConfigurationError, DeliveryError, Settings
from flowkit.clients import CommitRefused, Unreadable, confluent_producer, kafka_python
from flowkit.clients.confluent import Consumer, Records
from flowkit.clients.confluent_deliveries import Deliveries, Delivery
from flowkit.clients.confluent_options import PRODUCER, confluent_options, consumer_options
from flowkit.clients.confluent_producer import Producer, TransactionalProducer
from flowkit.clients.confluent_trouble import Trouble
from flowkit.errors import MessagesGone, Stopped
from flowkit.message import Partition
from flowkit.producer import Producer as AppProducer


def load(hosts: str = "127.0.0.1:1", **kafka: Any) -> Settings:
    return Settings.load({"name": "shop", "client": "confluent", "kafka": {"hosts": hosts, **kafka}}, {})


# Options.

LOGIN = {
    "security_protocol": "SASL_PLAINTEXT",
    "sasl_mechanism": "PLAIN",
    "sasl_plain_username": "ann",
    "sasl_plain_password": "x",
}


@pytest.mark.parametrize(
    ("given_", "name", "value"),
    [
        ({"hosts": "a:1,b:2"}, "bootstrap.servers", "a:1,b:2"),
        ({"fetch_max_wait_ms": 7}, "fetch.wait.max.ms", 7),
        ({"fetch_wait_max_ms": 7}, "fetch.wait.max.ms", 7),
        ({"queued_min_messages": 7}, "queued.min.messages", 7),
        (LOGIN, "sasl.username", "ann"),
        (LOGIN, "security.protocol", "SASL_PLAINTEXT"),
        ({"session_timeout": 9}, "session.timeout.ms", 9_000),
        ({"session_timeout": 9, "max_poll_interval": 5}, "max.poll.interval.ms", 9_000),
        ({"group_instance_id": "one"}, "group.instance.id", "one"),
        ({"partition_assignment_strategy": "range,roundrobin"}, "partition.assignment.strategy", "range,roundrobin"),
        ({"fetch_max_bytes": 2_000}, "message.max.bytes", 2_000),
        ({}, "client.id", "shop"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_and_options_by_librdkafkas_names(given_: dict[str, Any], name: str, value: Any) -> None:
    assert consumer_options(load(**given_), "g")[name] == value


def test_with_the_newer_protocol_for_groups_the_brokers_decide() -> None:
    options = consumer_options(load(group_protocol="consumer"), "g")

    assert options["group.protocol"] == "consumer"
    assert not {"session.timeout.ms", "heartbeat.interval.ms", "partition.assignment.strategy"} & options.keys()


def test_a_certificate_for_another_name_may_be_allowed() -> None:
    options = confluent_options(load(ssl_check_hostname=False), PRODUCER)

    assert options["ssl.endpoint.identification.algorithm"] == "none"
    assert "ssl.check.hostname" not in options


@pytest.mark.parametrize(
    ("kafka", "said"),
    [
        ({"partition_assignment_strategy": "sticky"}, "confluent-kafka has no sticky; take cooperative-sticky"),
        ({"partition_assignment_strategy": "cooperative-sticky,range"}, "takes cooperative-sticky alone only"),
        ({"enable_auto_commit": True}, "kafka.enable_auto_commit: cannot be passed through"),
        ({"acks": 1}, "kafka.acks: must stay 'all'"),
        ({"auto_offset_reset": "smallest"}, "expected one of earliest, latest, none, got 'smallest'"),
        ({"fetch_maximum": 1}, 'No such configuration property: "fetch.maximum"'),
        ({"security_protocol": "SSL", "sasl_mechanism": "PLAIN"}, "logging in needs both"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_what_to_do(kafka: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Consumer(load(**kafka), "g")

    assert said in str(caught.value)


def test_without_its_package_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['confluent_kafka'] = None\n"
        "from flowkit import Flowkit\n"
        "app = Flowkit('shop', client='confluent', kafka={'hosts': '127.0.0.1:1'})\n"
        "app.producer.send('orders', 1)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)

    said = "client: confluent needs the package confluent-kafka: pip install 'flowkit-kafka[confluent]'"
    assert f"ConfigurationError: {said}" in done.stderr


def test_where_no_broker_answers_it_says_so() -> None:
    with pytest.raises(BrokerUnavailable, match=r"no Kafka broker answers at 127\.0\.0\.1:1; is it running"):
        Producer(load())


# Messages.


def message(topic: str, partition: int, offset: int) -> Any:
    return Message(topic=topic, partition=partition, offset=offset, value=b"%d" % offset, key=None, timestamp=(1, 5))


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2))))
def test_messages_are_parted_by_partition_in_their_order(wheres: list[tuple[str, int]]) -> None:
    consumer = Consumer.__new__(Consumer)
    consumer._topics = 2
    messages = [message(topic, partition, offset) for offset, (topic, partition) in enumerate(wheres)]
    expected: dict[Partition, list[int]] = {}
    for offset, where in enumerate(wheres):
        expected.setdefault(Partition(*where), []).append(offset)

    found = consumer._by_partition(messages)

    assert {partition: [record.offset for record in records] for partition, records in found.items()} == expected
    assert all((record.topic, record.partition) == where for where, records in found.items() for record in records)


def test_records_are_a_sequence() -> None:
    records = Records([message("orders", 2, offset) for offset in range(5)])

    assert len(records) == 5
    assert (records[1].offset, records[-1].offset, records[1].value, records[1].key) == (1, 4, b"1", None)
    assert (records[0].topic, records[0].partition, records[0].timestamp, records[0].headers) == ("orders", 2, 5, ())
    assert [record.offset for record in records[1:3]] == [1, 2]
    assert [record.value for record in records] == [b"0", b"1", b"2", b"3", b"4"]


# What librdkafka does only now and then.


class Librdkafka:
    """In the place of its consumer: gives what it is told to."""

    def __init__(self, *given_: Any, ends: tuple[int, int] = (0, 100)) -> None:
        self.given = list(given_)
        self.ends = ends
        self.assigned: list[list[tuple[int, int]]] = []
        self.committed_: list[list[Any]] = []

    def poll(self, timeout: float) -> Any:
        return self.given.pop(0) if self.given else None

    def consume(self, most: int, timeout: float) -> list[Any]:
        found, self.given = self.given, []
        return [one for one in found if not callable(one) or one()]

    def assignment(self) -> list[Any]:
        return [TopicPartition("orders", number) for number in range(2)]

    def assign(self, places: list[Any]) -> None:
        self.assigned.append(sorted((where.partition, where.offset) for where in places))

    def get_watermark_offsets(self, where: Any, timeout: float) -> tuple[int, int]:
        return self.ends

    def committed(self, wanted: list[Any], timeout: float) -> list[Any]:
        return self.committed_.pop(0)


def on(consumer: Librdkafka) -> tuple[Consumer, Owner]:
    client, owner = Consumer.__new__(Consumer), Owner()
    client._consumer, client._rebalance, client._trouble = consumer, owner, Trouble(load())
    client._topics, client._cooperative, client._reset, client._instance = 1, False, "earliest", None
    client._failed = None
    client._at, client._paused, client._broken = {Partition("orders", 0): 5, Partition("orders", 1): 7}, set(), {}
    return client, owner


def not_there(partition: int, offset: int) -> Any:
    error = KafkaError(KafkaError._AUTO_OFFSET_RESET)
    return Message(topic="orders", partition=partition, offset=offset, error=error)


def offsets(found: Any) -> dict[int, list[int]]:
    return {partition.partition: [record.offset for record in records] for partition, records in found.items()}


def test_what_is_not_there_behind_messages_of_the_same_poll_is_noticed() -> None:
    client, owner = on(Librdkafka(message("orders", 0, 5), not_there(0, 6), message("orders", 1, 7), ends=(50, 100)))

    assert offsets(client.poll(0)) == {0: [5], 1: [7]}
    assert owner.moves == [(Partition("orders", 0), 6, 50)]
    assert client._consumer.assigned == [[(0, 50), (1, 8)]]  # and the other one goes on behind what was given


def test_where_an_old_offset_is_not_there_the_partition_goes_on_from_its_own() -> None:
    client, owner = on(Librdkafka(not_there(0, 3)))

    assert client.poll(0) == {}
    assert owner.moves == []
    assert client._consumer.assigned == [[(0, 5), (1, 7)]]


def test_what_leaves_while_a_poll_gives_it_is_not_given() -> None:
    client, _ = on(Librdkafka())
    client._consumer.given = [
        message("orders", 0, 5),
        lambda: client._forget([Partition("orders", 0)]),
        message("orders", 1, 7),
    ]

    assert offsets(client.poll(0)) == {1: [7]}
    assert client.position(Partition("orders", 0)) is None


def test_behind_what_cannot_be_read_nothing_is_given() -> None:
    error = KafkaError(KafkaError._BAD_MSG)
    broken = Message(topic="orders", partition=0, offset=0, error=error)
    client, _ = on(Librdkafka(broken, message("orders", 0, 6), message("orders", 1, 7)))
    sought: list[tuple[int, int]] = []
    client._consumer.seek = lambda where: sought.append((where.partition, where.offset))

    assert offsets(client.poll(0)) == {1: [7]}
    with pytest.raises(Unreadable) as caught:
        client.poll(0)
    assert (caught.value.partition, caught.value.offset) == (Partition("orders", 0), 0)
    assert sought == [(0, 0)]


def test_an_offset_that_is_not_known_yet_is_waited_for() -> None:
    """As that of a transaction which a killed process has left open."""

    class Unknown:
        topic, partition, offset, error = "orders", 0, -1001, KafkaError(KafkaError.UNSTABLE_OFFSET_COMMIT)

    client, _ = on(Librdkafka())
    client._consumer.committed_ = [[Unknown], [TopicPartition("orders", 0, 12)]]

    assert client.committed(Partition("orders", 0)) == 12


def test_a_login_that_failed_once_does_not_explain_what_fails_later() -> None:
    trouble = Trouble(load())
    trouble._note(KafkaError(KafkaError._AUTHENTICATION))

    with pytest.raises(BrokerUnavailable), trouble.named():
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
    with pytest.raises(ConfigurationError, match="the login of None failed"):
        trouble.met(KafkaError(KafkaError._AUTHENTICATION))
    with pytest.raises(KafkaException):
        trouble.met(KafkaError(KafkaError._FATAL))


# On Apache Kafka.


@pytest.fixture
def apache(kafka: Kafka) -> Kafka:
    if not kafka.apache:
        pytest.skip(f"needs Apache Kafka: {why_not_apache_kafka()}")
    return kafka


@pytest.fixture
def consume(kafka: Kafka) -> Iterator[Callable[..., tuple[Consumer, Owner]]]:
    made = []

    def make(topic: str, **options: Any) -> tuple[Consumer, Owner]:
        client, owner = Consumer(load(kafka.hosts, **options), f"{topic}-group"), Owner()
        made.append(client)
        client.subscribe([topic], owner)
        return client, owner

    yield make
    for client in made:
        client.close(5.0)


@pytest.fixture
def producer(apache: Kafka) -> Iterator[Producer]:
    made = Producer(load(apache.hosts))
    yield made
    made.close(5.0)


def put(hosts: str, topic: str, *values: bytes, partition: int = 0) -> None:
    sender = KafkaProducer(bootstrap_servers=hosts)
    for value in values:
        sender.send(topic, value, partition=partition)
    sender.flush()
    sender.close()


def polled(client: Consumer, count: int, seconds: float = 30) -> list[tuple[int, bytes | None]]:
    """Offsets and values of so many messages; of none, where ``count`` is 0 and so many seconds are over."""
    found: list[tuple[int, bytes | None]] = []
    until = time.monotonic() + seconds
    while (len(found) < count or not count) and time.monotonic() < until:
        for records in client.poll(0.1).values():
            found += [(record.offset, record.value) for record in records]
    return found


@pytest.mark.parametrize("strategy", ["range", "cooperative-sticky"])
def test_it_reads_pauses_seeks_and_commits(
    kafka: Kafka, topic: MakeTopic, consume: Callable[..., tuple[Consumer, Owner]], strategy: str
) -> None:
    name = topic("orders", 2)
    where, other = Partition(name, 0), Partition(name, 1)
    put(kafka.hosts, name, b"a", b"b", b"c")
    client, owner = consume(name, partition_assignment_strategy=strategy)

    assert polled(client, 3) == [(0, b"a"), (1, b"b"), (2, b"c")]
    assert owner.mine == {where, other}
    assert (client.position(where), client.position(other)) == (3, 0)
    client.pause(where)
    client.seek(where, 1)
    assert polled(client, 0, seconds=1) == []
    client.resume(where)
    assert polled(client, 2) == [(1, b"b"), (2, b"c")]
    assert client.committed(where) is None
    client.commit({where: 2})
    assert client.committed(where) == 2
    assert (client.first_offset(where), client.end_offset(where)) == (0, 3)
    assert client.joined()
    assert client.in_touch()
    assert client.missing_topics([name, "nowhere"]) == ["nowhere"]


def test_a_commit_that_is_not_waited_for_is_told_in_a_later_poll(
    kafka: Kafka, topic: MakeTopic, consume: Callable[..., tuple[Consumer, Owner]], wait_for: WaitFor
) -> None:
    name = topic("orders")
    where = Partition(name, 0)
    put(kafka.hosts, name, b"a", b"b", b"c")
    client, owner = consume(name)
    polled(client, 3)

    def told() -> bool:
        assert client.poll(0.1) == {}
        return bool(owner.confirmations)

    client.begin_commit({where: 3})
    wait_for(told)
    assert owner.confirmations == [{where: 3}]
    assert client.committed(where) == 3
    client.commit({where: 2})
    client.poll(0.2)
    assert len(owner.confirmations) == 1  # that one was waited for


def test_of_a_commit_that_fails_it_is_told_whose_fault_it_is(
    kafka: Kafka, topic: MakeTopic, consume: Callable[..., tuple[Consumer, Owner]]
) -> None:
    name = topic("orders")
    where = Partition(name, 0)
    put(kafka.hosts, name, b"a")
    client, owner = consume(name)
    polled(client, 1)

    def end(offset: int, code: int) -> None:
        client._begun = {where: offset}
        client._on_commit(KafkaError(code), [TopicPartition(*where, offset)])

    end(1, KafkaError.ILLEGAL_GENERATION)
    assert [(offsets, type(error)) for offsets, error in owner.refusals] == [({where: 1}, CommitRefused)]
    assert client.poll(0) == {}
    assert owner.confirmations == [{}]
    end(1, KafkaError.FENCED_INSTANCE_ID)
    with pytest.raises(Stopped):
        client.poll(0)
    assert owner.confirmations == [{}, {}]


@pytest.mark.parametrize("strategy", ["range", "cooperative-sticky"])
def test_a_position_that_is_not_there_is_left_and_said(
    kafka: Kafka, topic: MakeTopic, consume: Callable[..., tuple[Consumer, Owner]], strategy: str
) -> None:
    name = topic("orders", 2)
    where = Partition(name, 0)
    put(kafka.hosts, name, b"a", b"b")
    put(kafka.hosts, name, b"x", b"y", partition=1)
    client, owner = consume(name, partition_assignment_strategy=strategy)
    assert len(polled(client, 4)) == 4

    client.seek(where, 1_000)

    assert polled(client, 2) == [(0, b"a"), (1, b"b")]  # and nothing of the other partition comes again
    assert owner.moves == [(where, 1_000, 0)]


def test_it_says_where_it_may_not_choose(
    kafka: Kafka, topic: MakeTopic, consume: Callable[..., tuple[Consumer, Owner]]
) -> None:
    name = topic("orders")
    put(kafka.hosts, name, b"a")
    client, _ = consume(name, auto_offset_reset="none")
    with pytest.raises(Stopped, match=r"it has no committed offset for orders.*; as auto_offset_reset is 'none'"):
        polled(client, 1)
    client.commit({Partition(name, 0): 77})
    client.close(5.0)
    again, _ = consume(name, auto_offset_reset="none")
    with pytest.raises(MessagesGone, match="@77 is not there: the first message there is has offset 0"):
        polled(again, 1)


def test_the_id_of_a_topic_is_the_one_that_the_other_client_gives(
    apache: Kafka, topic: MakeTopic, consume: Callable[..., tuple[Consumer, Owner]]
) -> None:
    name = topic("orders")
    client, _ = consume(name)
    other = kafka_python.Consumer(load(apache.hosts), f"{name}-other")
    try:
        other.missing_topics([name])
        assert client.topic_id(name) == other.topic_id(name) is not None
        assert client.topic_id("nowhere") is None
    finally:
        other.close(5.0)


def test_keys_go_to_the_partition_that_the_other_client_gives(
    apache: Kafka, topic: MakeTopic, producer: Producer
) -> None:
    name = topic("orders", 7)
    other = kafka_python.Producer(load(apache.hosts))
    keys = [b"key-%d" % number for number in range(50)]
    try:
        for key in keys:
            producer.send(name, b"", key, (), None)
        producer.flush(10)
        assert [producer.partition_for(name, key) for key in keys] == [other.partition_for(name, key) for key in keys]
        assert all(
            record.partition == other.partition_for(name, record.key) for record in read_topic(apache.hosts, name, 50)
        )
    finally:
        other.close(5.0)


def test_a_message_goes_as_it_is(apache: Kafka, topic: MakeTopic, producer: Producer) -> None:
    name = topic("orders")
    delivery = producer.send(name, None, None, [("trace", b"1"), ("trace", None)], 0)
    producer.flush(10)

    assert producer.outcome(delivery) is None
    [record] = read_topic(apache.hosts, name, 1)
    assert (record.key, record.value, list(record.headers)) == (None, None, [("trace", b"1"), ("trace", None)])


def test_a_topic_that_is_not_there_is_not_made(apache: Kafka, producer: Producer) -> None:
    with pytest.raises(DeliveryError, match="the topic 'nowhere-else' does not exist") as caught:
        producer.send("nowhere-else", b"1", None, (), None)

    assert caught.value.passing
    admin = KafkaAdminClient(bootstrap_servers=apache.hosts)
    try:
        assert "nowhere-else" not in admin.list_topics()
    finally:
        admin.close()


def test_of_a_batch_that_is_too_large_only_the_message_that_is(
    apache: Kafka, producer: Producer, small_topic: MakeTopic
) -> None:
    """A broker refuses a batch as a whole."""
    small = small_topic()
    deliveries = [producer.send(small, bytes(size), None, (), 0) for size in (10, 20, 1_000, 30)]
    producer.flush(20)
    outcomes = [producer.outcome(delivery) for delivery in deliveries]
    assert [error is None for error in outcomes] == [True, True, False, True]
    assert outcomes[2] is not None
    assert not outcomes[2].passing
    assert Counter(len(record.value) for record in read_topic(apache.hosts, small, 3)) == {10: 1, 20: 1, 30: 1}


def test_of_messages_sent_together_only_the_one_that_is_too_large_is_refused(
    apache: Kafka, producer: Producer, small_topic: MakeTopic
) -> None:
    small = small_topic()
    together = producer.send_together(small, [b"same", bytes(1_000), b"same", None, bytes(1_001), b""])
    assert not together.is_done
    producer.flush(20)
    assert producer.ended(together)
    problem = producer.outcome(together)
    assert problem is not None
    assert not problem.passing
    assert producer.confirmed([together]) == 0
    outcomes = [producer.outcome(delivery) for delivery in together.apart()]
    assert [error is None for error in outcomes] == [True, False, True, True, False, True]
    values = Counter(record.value for record in read_topic(apache.hosts, small, 4))
    assert values == {b"same": 2, b"": 1, None: 1}


def test_messages_sent_together_are_confirmed_together(apache: Kafka, topic: MakeTopic, producer: Producer) -> None:
    name = topic("orders", 3)
    first, second = [
        producer.send_together(name, [b"%d" % n for n in numbers]) for numbers in (range(50), range(50, 70))
    ]
    producer.flush(20)

    assert producer.confirmed([first, second]) == 2
    assert [producer.outcome(one) for one in (first, second, *first.apart())] == [None] * 52
    values = sorted(int(record.value or b"") for record in read_topic(apache.hosts, name, 70))
    assert values == list(range(70))


def test_messages_sent_together_are_more_than_the_client_holds(apache: Kafka, topic: MakeTopic) -> None:
    name = topic("orders")
    producer = Producer(load(apache.hosts), **{"queue.buffering.max.messages": 10})
    try:
        together = producer.send_together(name, [b"%d" % number for number in range(100)])
        producer.flush(20)
        assert (together.is_done, producer.outcome(together)) == (True, None)
        assert len(read_topic(apache.hosts, name, 100)) == 100
    finally:
        producer.close(5)


def test_messages_sent_together_end_before_one_that_the_client_refuses(apache: Kafka, topic: MakeTopic) -> None:
    name = topic("orders")
    producer = Producer(load(apache.hosts), **{"message.max.bytes": 2_000})
    try:
        together = producer.send_together(name, [b"1", b"2", bytes(3_000), b"3"])
        assert len(together) == 2
        assert together.refusal is not None
        assert "MSG_SIZE_TOO_LARGE" in str(together.refusal)
        producer.flush(20)
        assert (together.is_done, producer.outcome(together), len(together.apart())) == (True, None, 2)
        assert [record.value for record in read_topic(apache.hosts, name, 2)] == [b"1", b"2"]
    finally:
        producer.close(5)


def test_messages_sent_together_wait_once_for_a_client_that_is_full(apache: Kafka, topic: MakeTopic) -> None:
    name = topic("orders")
    producer = Producer(load(apache.hosts), **{"queue.buffering.max.messages": 3, "linger.ms": 20_000})
    producer._timeout = 0.3
    try:
        producer._count(name)
        began = time.monotonic()
        together = producer.send_together(name, [b"%d" % number for number in range(9)])
        assert 0.3 <= time.monotonic() - began < 1.2
        assert len(together) == 3
        assert together.refusal is not None
        assert together.refusal.passing
    finally:
        producer.close(5)


def test_of_messages_sent_together_each_has_an_outcome_though_values_repeat(producer: Producer) -> None:
    together = Deliveries(producer, "orders", [b"1", b"2", b"1", None])
    refused = Message(topic="orders", partition=0, offset=-1, value=b"1", key=None, timestamp=(1, 5))
    none = Message(topic="orders", partition=0, offset=-1, value=None, key=None, timestamp=(1, 5))
    error = KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED)

    for message in (refused, none, refused):
        together.end(error, message)
    assert producer.has_failed
    together.number = producer.drained + 1
    assert not together.is_done

    producer.drained += 1
    assert together.is_done
    assert [producer.outcome(delivery) is None for delivery in together.apart()] == [False, True, False, False]


def test_what_was_submitted_is_told_of_without_a_flush(apache: Kafka, topic: MakeTopic) -> None:
    sender = AppProducer(lambda: load(apache.hosts), Producer)
    try:
        assert sender.submit(topic("orders"), {"id": 1}).result(timeout=20) is None
    finally:
        sender.close()


def test_a_producer_whose_place_was_taken_says_so_of_what_it_sends(
    apache: Kafka, topic: MakeTopic, wait_for: WaitFor
) -> None:
    """confluent-kafka raises a SystemError in its own callback then."""
    name = topic("out")
    first = TransactionalProducer(load(apache.hosts), f"{name}-id")
    first.begin()
    first.send(name, b"1", None, (), 0)
    first.flush(5)
    second = TransactionalProducer(load(apache.hosts), f"{name}-id")
    try:
        told: list[bool] = []
        late = first.send(name, b"2", None, (), 0)
        first.notify(late, lambda: told.append(True))
        wait_for(lambda: told)
        first.flush(5)
        problem = first.outcome(late)
        assert problem is not None
        assert problem.passing
        assert first.ended(late)
    finally:
        first.close(0)
        second.close(0)


def test_a_call_of_librdkafka_that_does_not_come_back_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confluent_producer, "LATE", 0.05)
    stuck = threading.Event()
    arguments: list[Any] = []
    try:
        with pytest.raises(TimeoutError, match=r"librdkafka has not come back within 0\.\d s"):
            confluent_producer._call(lambda left: stuck.wait(60), deadline=time.monotonic() + 0.1)
    finally:
        stuck.set()
    confluent_producer._call(lambda *given: arguments.extend(given), "one", deadline=time.monotonic() + 5)
    assert arguments[0] == "one"
    assert 4 < arguments[1] <= 5

    def refuse(left: float) -> None:
        raise ValueError(left)

    with pytest.raises(ValueError, match=r"0\.001"):
        confluent_producer._call(refuse, deadline=0.0)


@pytest.fixture
def laconic(apache: Kafka) -> Iterator[Producer]:
    """A producer that is not told of each message that Kafka has confirmed."""
    made = Producer(load(apache.hosts), tells_each=False)
    yield made
    made.close(5)


def test_where_only_failures_are_told_the_others_are_known_to_be_confirmed_when_none_is_under_way(
    laconic: Producer, topic: MakeTopic, wait_for: WaitFor
) -> None:
    name = topic("orders")
    alone, together = laconic.send(name, b"1", None, (), None), laconic.send_together(name, [b"2", b"3"])
    assert not laconic.ended(alone)
    problem = laconic.outcome(together)
    assert problem is not None
    assert problem.passing

    wait_for(lambda: laconic.confirmed([alone, together]) == 2)
    assert laconic.ended(together)
    assert [laconic.outcome(one) for one in (alone, together, *together.apart())] == [None] * 4
    assert not laconic.has_failed


def test_where_only_failures_are_told_one_is_told_before_a_flush_and_is_found_after_it(
    laconic: Producer, small_topic: MakeTopic, wait_for: WaitFor
) -> None:
    name, values = small_topic("out"), [b"1", b"x" * 5_000, b"3"]
    alone, together = laconic.send(name, b"0", None, (), None), laconic.send_together(name, values)

    def told() -> bool:
        laconic.confirmed([alone])
        return laconic.has_failed

    wait_for(told)
    laconic.flush(20)
    assert laconic.outcome(alone) is None
    problem = laconic.outcome(together)
    assert problem is not None
    assert "MSG_SIZE_TOO_LARGE" in str(problem)
    assert [laconic.outcome(one) is None for one in together.apart()] == [True, False, True]


def test_what_was_submitted_is_told_of_where_only_failures_are(
    laconic: Producer, topic: MakeTopic, small_topic: MakeTopic
) -> None:
    ended: SimpleQueue[str] = SimpleQueue()
    for name, value in ((topic("orders"), b"1"), (small_topic("small"), b"x" * 5_000)):
        laconic.notify(laconic.send(name, value, None, (), None), partial(ended.put, name))
        assert ended.get(timeout=20) == name


def test_what_was_sent_by_a_client_that_is_replaced_is_confirmed_by_that_one_only(
    apache: Kafka, topic: MakeTopic, laconic: Producer
) -> None:
    """Their numbers are each client's own."""
    name, replaced = topic("orders"), Producer(load(apache.hosts, linger_ms=20_000), tells_each=False)
    late = [replaced.send(name, b"1", None, (), None), replaced.send_together(name, [b"2", b"3"])]
    laconic.drained = 1_000
    assert laconic.confirmed(late) == 0
    for one in late:
        assert not laconic.ended(one)
        problem = laconic.outcome(one)
        assert problem is not None
        assert problem.passing

    replaced.close(20)
    assert laconic.confirmed(late) == 2
    assert [laconic.outcome(one) for one in late] == [None, None]


@pytest.mark.parametrize("unknown", [False, True], ids=["its callback is interrupted", "it is none of them"])
def test_a_failure_that_could_not_be_noted_is_no_success(laconic: Producer, unknown: bool) -> None:
    """librdkafka takes a message for ended, whatever comes of the call that tells of it."""

    class Error:
        def code(self) -> int:
            if not unknown:
                raise KeyboardInterrupt
            return KafkaError.TOPIC_AUTHORIZATION_FAILED

    alone, together = Delivery(laconic, "orders", b"1"), Deliveries(laconic, "orders", [b"1", b"2"])
    alone.number = together.number = laconic.drained
    value = b"other" if unknown else b"1"
    told = Message(topic="orders", partition=0, offset=-1, value=value, key=None, timestamp=(1, 5))
    for one in (together,) if unknown else (alone, together):
        assert one.is_done
        with suppress(KeyboardInterrupt):
            one.end(Error(), told)
        assert not one.is_done
        problem = laconic.outcome(one)
        assert problem is not None
        assert problem.passing


@pytest.mark.parametrize("tells_each", [False, True])
def test_where_the_call_that_tells_of_a_failure_is_interrupted_at_once_it_is_no_success(
    apache: Kafka, topic: MakeTopic, tells_each: bool
) -> None:
    """As by a signal, before its first line."""
    client = Producer(load(apache.hosts), tells_each=tells_each)

    def interrupted(timeout: float) -> int:
        raise KeyboardInterrupt

    try:
        sent = client.send(topic("orders"), b"1", None, (), None)
        with pytest.raises(KeyboardInterrupt):
            client._served(interrupted, 0)
        if tells_each:
            client.drained = client._started
            assert not sent.is_done
            client.flush(20)
            assert client.outcome(sent) is None
        else:
            assert client.is_over
            client.flush(20)
            problem = client.outcome(sent)
            assert problem is not None
            assert problem.passing
    finally:
        client.close(0)


def test_what_cannot_be_sent_again_by_itself_ends_with_why(
    laconic: Producer, small_topic: MakeTopic, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = laconic.send(small_topic("out"), b"x" * 5_000, None, (), None)

    def refuse(delivery: Any) -> None:
        raise DeliveryError("Kafka is too slow", passing=True)

    monkeypatch.setattr(laconic, "_start", refuse)
    laconic.flush(20)
    assert str(laconic.outcome(refused)) == "Kafka is too slow"
