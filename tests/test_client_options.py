"""Options of kafka-python that pass through ``kafka={...}``, and those that flowkit sets itself."""

from __future__ import annotations

from typing import Any

import pytest
from kafka.errors import TopicAuthorizationFailedError
from servers import Kafka as KafkaServer
from servers import MakeTopic

from flowkit import ConfigurationError, DeliveryError, Settings, SettingsError
from flowkit.clients.kafka_options import OWN, option_mistakes
from flowkit.clients.kafka_python import Producer

MEGABYTE = 1024 * 1024


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
