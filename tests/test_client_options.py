"""Options of kafka-python that pass through ``kafka={...}``, and those that flowkit sets itself."""

from __future__ import annotations

import contextlib
import time
import uuid
from typing import Any

import pytest
from kafka import KafkaAdminClient, OffsetAndMetadata, TopicPartition
from kafka.errors import KafkaConnectionError, MessageSizeTooLargeError, TopicAuthorizationFailedError
from kafka.future import Future
from servers import Kafka as KafkaServer
from servers import MakeTopic

from flowkit import ConfigurationError, DeliveryError, Settings, SettingsError
from flowkit.clients.kafka_options import OWN, option_mistakes
from flowkit.clients.kafka_python import Consumer, EndedWithAnother, Producer

MEGABYTE = 1024 * 1024


class Owner:
    """Who has the partitions, and takes what comes."""

    def assigned(self, partitions: Any) -> None:
        pass

    def revoked(self, partitions: Any) -> dict[Any, int]:
        return {}

    def confirmed(self, offsets: Any) -> None:
        pass

    def lost(self, partitions: Any) -> None:
        pass

    def moved(self, partition: Any, before: int, after: int) -> None:
        pass


def load(hosts: str = "127.0.0.1:1", **options: Any) -> Settings:
    return Settings.load({"name": "shop", "kafka": {"hosts": hosts, **options}}, {})


# (option, value, what is said)
REFUSED: list[tuple[str, Any, str]] = [
    ("bootstrap_servers", "a:1", "kafka.hosts"),
    ("client_id", "x", "the application's name"),
    ("group_id", "x", "@app.topic('orders', group='billing')"),
    ("session_timeout_ms", 1, "kafka.session_timeout"),
    ("heartbeat_interval_ms", 1, "kafka.heartbeat_interval"),
    ("max_poll_interval_ms", 1, "kafka.max_poll_interval"),
    ("max_block_ms", 1, "connection_pool.timeout"),
    ("enable_auto_commit", True, "kafka.offset_commit_interval"),
    ("auto_commit_interval_ms", 1, "kafka.offset_commit_interval"),
    ("default_offset_commit_callback", print, "kafka.offset_commit_interval"),
    ("consumer_timeout_ms", 1, "until it is stopped"),
    ("key_deserializer", str, "the route's parser"),
    ("value_deserializer", str, "the route's parser"),
    ("key_serializer", str, "the route's parser"),
    ("value_serializer", str, "the route's parser"),
    ("transactional_id", "x", "transactional=True"),
    ("transaction_timeout_ms", 1, "kafka.transaction_timeout"),
    ("kafka_client", print, "flowkit makes it"),
    ("acks", 0, "must stay 'all'"),
    ("acks", 1, "must stay 'all'"),
    ("acks", "0", "must stay 'all'"),
    ("enable_idempotence", False, "must stay True"),
]


def test_the_table_names_every_option_that_flowkit_sets_itself() -> None:
    assert OWN.keys() <= {name for name, _, _ in REFUSED}


@pytest.mark.parametrize(("name", "value", "advice"), REFUSED, ids=str)
def test_an_option_that_flowkit_sets_itself_is_refused_with_what_to_do_instead(
    name: str, value: Any, advice: str
) -> None:
    [mistake] = option_mistakes(load(**{name: value}))

    assert mistake.startswith(f"kafka.{name}: ")
    assert advice in mistake
    with pytest.raises(ConfigurationError, match=f"kafka.{name}: "):
        Producer(load(**{name: value}))


@pytest.mark.parametrize(
    "options",
    [
        {"acks": "all"},
        {"acks": -1},
        {"enable_idempotence": True},
        {"ssl_cafile": "a.pem", "ssl_certfile": "b.pem", "ssl_keyfile": "c.pem", "ssl_password": "x"},
        {"security_protocol": "SASL_SSL", "sasl_mechanism": "PLAIN", "sasl_plain_username": "ann"},
        {"auto_offset_reset": "latest", "group_instance_id": "one", "max_request_size": 1},
        {"max_poll_records": 5},
    ],
    ids=str,
)
def test_other_options_pass(options: dict[str, Any]) -> None:
    assert option_mistakes(load(**options)) == []


def test_the_messages_of_a_poll_are_a_setting() -> None:
    settings = load(max_poll_records=5)

    assert (settings.kafka.max_poll_records, settings.kafka.options) == (5, {})


def test_the_hint_at_an_option_that_is_refused_goes_on_with_the_setting() -> None:
    [mistake] = option_mistakes(load(bootstrap_server="a:1"))

    assert "did you mean 'bootstrap_servers'? It cannot be passed through; give the brokers as kafka.hosts" in mistake


def test_options_in_a_dict_of_their_own_are_refused_once() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load({"name": "shop", "kafka": {"hosts": "a:1", "options": {"acks": 0}}}, {}, check=option_mistakes)

    assert caught.value.mistakes == ["kafka.options: write them directly into kafka={...}, beside the settings"]


def test_a_partition_that_cannot_be_looked_up_is_a_delivery_that_failed(
    kafka: KafkaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = Producer(load(kafka.hosts))

    def refused(topic: str) -> None:
        raise TopicAuthorizationFailedError({topic})

    try:
        monkeypatch.setattr(producer._producer, "partitions_for", refused)
        with pytest.raises(DeliveryError, match="orders: its partitions cannot be looked up"):
            producer.partition_for("orders", b"key")
    finally:
        producer.close(5)


def test_the_broker_decides_what_is_too_large(kafka: KafkaServer, topic: MakeTopic) -> None:
    producer = Producer(load(kafka.hosts))
    try:
        delivery = producer.send(topic(), bytes(2 * MEGABYTE), None, (), None)  # kafka-python's own limit is 1 MiB
        producer.flush(30)
        error = producer.outcome(delivery)
    finally:
        producer.close(5)

    if kafka.apache:
        assert "MessageSizeTooLarge" in str(error)
        assert not error.passing
    else:
        assert error is None


def test_what_ends_with_a_message_that_is_too_large_is_not_to_blame(
    small_topic: MakeTopic, kafka: KafkaServer
) -> None:
    """kafka-python ends all that is under way with that error, also what stands before, and in other partitions."""
    producer = Producer(load(kafka.hosts, linger_ms=200))
    try:
        name = small_topic(partitions=2)
        sizes = [10] * 50 + [1_000] + [10] * 50
        deliveries = [producer.send(name, bytes(size), None, (), number % 2) for number, size in enumerate(sizes)]
        producer.flush(30)
        outcomes = [producer.outcome(delivery) for delivery in deliveries]
        assert producer.is_over
    finally:
        producer.close(5)

    failed = {number for number, problem in enumerate(outcomes) if problem is not None}
    assert {number for number in failed if not outcomes[number].passing} == {50}
    assert all("EndedWithAnother" in str(outcomes[number]) for number in failed - {50})
    assert failed - {50}, "the fault is gone from kafka-python: EndedWithAnother can go too"


def test_a_client_that_is_over_does_not_blame_what_comes_later(small_topic: MakeTopic, kafka: KafkaServer) -> None:
    producer = Producer(load(kafka.hosts))
    try:
        name = small_topic()
        refused = producer.send(name, bytes(1_000), None, (), None)
        producer.flush(30)
        later = producer.send(name, b"good", None, (), None)
        producer.flush(30)
    finally:
        producer.close(5)
    assert not producer.outcome(refused).passing
    assert producer.outcome(later).passing


def test_a_connection_that_breaks_is_no_end_of_a_batch(kafka: KafkaServer, topic: MakeTopic) -> None:
    """kafka-python tells of it by keyword."""
    producer = Producer(load(kafka.hosts, linger_ms=0))
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
    try:
        delivery = producer.send(topic(), b"1", None, (), None)
        producer.flush(20)
        assert broken
        assert producer.outcome(delivery) is None
    finally:
        producer.close(5)


def test_two_that_are_refused_at_once_are_the_only_ones_to_blame(kafka: KafkaServer) -> None:
    """kafka-python notes the error of the last one, and gives it to all that is under way."""
    producer = Producer(load(kafka.hosts))
    transactions = producer._transactions
    try:
        producer._dispatch_error = lambda _, exception, __: transactions.transition_to_fatal_error(exception)
        for number in range(2):
            producer._failed(None, MessageSizeTooLargeError(number), partition_response=None)
            assert type(transactions.last_error) is EndedWithAnother
    finally:
        producer.close(0)


def test_records_of_a_batch_with_one_that_is_not_valid_are_not_to_blame(kafka: KafkaServer) -> None:
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=kafka.hosts)) as admin:
        name = f"compacted-{uuid.uuid4().hex[:8]}"
        if not kafka.apache:
            pytest.skip("the embedded broker takes records without a key anywhere")
        what = {"num_partitions": 1, "replication_factor": 1, "configs": {"cleanup.policy": "compact"}}
        admin.create_topics({name: what})
    producer = Producer(load(kafka.hosts, linger_ms=200))
    try:
        keys = [b"1", b"2", None, b"4"]
        deliveries = [producer.send(name, b"value", key, (), 0) for key in keys]
        producer.flush(20)
        outcomes = [producer.outcome(delivery) for delivery in deliveries]
    finally:
        producer.close(5)
    assert [(problem.passing, problem.with_another) for problem in outcomes] == [
        (True, True),
        (True, True),
        (False, False),
        (True, True),
    ]


def test_offsets_that_were_asked_for_before_a_rebalance_are_asked_for_again(
    kafka: KafkaServer, topic: MakeTopic
) -> None:
    """As after a sleep in which others went on: the answer of before is there, and nobody has looked at it."""
    name = topic()
    producer = Producer(load(kafka.hosts))
    for number in range(5):
        producer.send(name, b"%d" % number, None, (), 0)
    producer.close(10)
    consumer = Consumer(load(kafka.hosts), name)
    try:
        consumer.subscribe([name], Owner())
        partition = TopicPartition(name, 0)
        before = Future().success({partition: OffsetAndMetadata(3, "", -1)})
        consumer._consumer._coordinator._offset_fetch_futures[frozenset([partition])] = before
        deadline = time.monotonic() + 20
        found: list[bytes | None] = []
        while len(found) < 5 and time.monotonic() < deadline:
            found += [record.value for records in consumer.poll(0.5).values() for record in records]
    finally:
        consumer.close(5)
    assert found == [b"0", b"1", b"2", b"3", b"4"]
