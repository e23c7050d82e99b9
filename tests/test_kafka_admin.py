"""Topics and groups as a real cluster has them."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition
from servers import Kafka, MakeTopic

from flowkit import ConfigurationError, Settings
from flowkit.clients.kafka_admin import Cluster, Lag, TopicState, lag
from flowkit.topics import TopicDeclaration


def settings_of(hosts: str, **options: Any) -> Settings:
    return Settings.load({"name": "shop", "kafka": {"hosts": hosts, **options}}, {})


@pytest.fixture
def kafka(kafka: Kafka) -> Kafka:
    if not kafka.apache:
        pytest.skip("the embedded broker knows no settings of topics and refuses nothing, and its offsets come late")
    return kafka


@pytest.fixture
def settings(kafka: Kafka) -> Settings:
    return settings_of(kafka.hosts)


@pytest.fixture
def cluster(settings: Settings) -> Iterator[Cluster]:
    with Cluster(settings) as cluster:
        yield cluster


@pytest.fixture
def group() -> str:
    return f"group-{uuid.uuid4().hex[:8]}"


def send(hosts: str, topic: str, partition: int, count: int) -> None:
    with contextlib.closing(KafkaProducer(bootstrap_servers=hosts)) as producer:
        for number in range(count):
            producer.send(topic, str(number).encode(), partition=partition)
        producer.flush()


def commit(hosts: str, group: str, topic: str, partition: int, offset: int) -> None:
    with contextlib.closing(
        KafkaConsumer(bootstrap_servers=hosts, group_id=group, enable_auto_commit=False)
    ) as consumer:
        where = TopicPartition(topic, partition)
        consumer.assign([where])
        consumer.commit({where: OffsetAndMetadata(offset, "", -1)})


# Lag.


def test_the_lag_of_a_group_is_counted_per_partition(
    kafka: Kafka, topic: MakeTopic, settings: Settings, group: str
) -> None:
    # Given a topic of two partitions with 5 and 3 messages, of which the group has committed 2 of the first
    orders = topic("orders", partitions=2)
    send(kafka.hosts, orders, 0, 5)
    send(kafka.hosts, orders, 1, 3)
    commit(kafka.hosts, group, orders, 0, 2)
    # Then the second partition, of which it committed nothing, counts from its beginning
    assert lag(settings, {group: [orders]}) == [
        Lag(group, orders, 0, committed=2, end=5, lag=3),
        Lag(group, orders, 1, committed=None, end=3, lag=3),
    ]


def test_a_group_that_never_committed_is_behind_by_what_is_left_to_read(
    kafka: Kafka, topic: MakeTopic, settings: Settings, group: str
) -> None:
    orders = topic("orders")
    send(kafka.hosts, orders, 0, 5)
    assert lag(settings, {group: [orders]}) == [Lag(group, orders, 0, None, 5, 5)]
    # When retention has deleted the first two
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=kafka.hosts)) as admin:
        admin.delete_records({TopicPartition(orders, 0): 2})
    assert lag(settings, {group: [orders]}) == [Lag(group, orders, 0, None, 5, 3)]


def test_a_group_that_begins_at_the_latest_message_is_not_behind_before_it_begins(
    kafka: Kafka, topic: MakeTopic, group: str
) -> None:
    orders = topic("orders")
    send(kafka.hosts, orders, 0, 5)
    settings = settings_of(kafka.hosts, auto_offset_reset="latest")
    assert lag(settings, {group: [orders]}) == [Lag(group, orders, 0, None, 5, 0)]


def test_what_retention_deleted_before_it_was_read_is_no_lag(
    kafka: Kafka, topic: MakeTopic, settings: Settings, group: str
) -> None:
    orders = topic("orders")
    send(kafka.hosts, orders, 0, 5)
    commit(kafka.hosts, group, orders, 0, 1)
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=kafka.hosts)) as admin:
        admin.delete_records({TopicPartition(orders, 0): 4})
    assert lag(settings, {group: [orders]}) == [Lag(group, orders, 0, 1, 5, 1)]


def test_several_groups_are_looked_up_at_once_and_a_missing_topic_is_told(
    kafka: Kafka, topic: MakeTopic, settings: Settings, group: str
) -> None:
    orders, users = topic("orders"), topic("users")
    send(kafka.hosts, users, 0, 2)
    other = f"{group}-2"
    commit(kafka.hosts, other, users, 0, 2)
    assert lag(settings, {group: [orders, "no-such-topic"], other: [users]}) == [
        Lag(group, orders, 0, None, 0, 0),
        Lag(group, "no-such-topic", None, None, None, None),
        Lag(other, users, 0, 2, 2, 0),
    ]


def test_looking_at_a_missing_topic_does_not_make_it(cluster: Cluster, group: str) -> None:
    name = f"missing-{group}"
    assert cluster.topics([name]) == {}
    assert cluster.lag({group: [name]}) == [Lag(group, name, None, None, None, None)]
    assert cluster.topics([name]) == {}


def test_without_groups_there_is_no_lag(settings: Settings) -> None:
    assert lag(settings, {}) == []


# Topics.


def test_a_topic_is_made_as_declared(cluster: Cluster) -> None:
    name = f"declared-{uuid.uuid4().hex[:8]}"
    made = cluster.create([TopicDeclaration(name, 3, 1, {"retention.ms": "86400000", "cleanup.policy": "compact"})])
    assert made == [name]
    asked = {name: ["retention.ms", "cleanup.policy", "no.such.config"]}
    assert cluster.topics([name], asked) == {
        name: TopicState(name, 3, 1, {"retention.ms": "86400000", "cleanup.policy": "compact"})
    }


def test_where_nothing_is_declared_the_brokers_defaults_hold(cluster: Cluster) -> None:
    name = f"plain-{uuid.uuid4().hex[:8]}"
    assert cluster.create([TopicDeclaration(name)]) == [name]
    assert cluster.topics([name]) == {name: TopicState(name, 1, 1)}


def test_a_topic_that_exists_stays_as_it_is(cluster: Cluster, topic: MakeTopic) -> None:
    orders = topic("orders", partitions=2)
    assert cluster.create([TopicDeclaration(orders, 5)]) == []
    assert cluster.topics([orders])[orders].partitions == 2


def test_a_topic_that_the_brokers_refuse_is_named_when_the_others_are_made(cluster: Cluster) -> None:
    good, bad = (f"{kind}-{uuid.uuid4().hex[:8]}" for kind in ("good", "bad"))
    with pytest.raises(ConfigurationError, match=rf"topic '{bad}': .*no\.such\.config"):
        cluster.create([TopicDeclaration(bad, config={"no.such.config": "1"}), TopicDeclaration(good)])
    assert list(cluster.topics([good, bad])) == [good]


def test_more_copies_than_brokers_are_refused_in_kafkas_words(cluster: Cluster) -> None:
    name = f"copies-{uuid.uuid4().hex[:8]}"
    with pytest.raises(ConfigurationError, match=r"(?i)replica"):
        cluster.create([TopicDeclaration(name, replication_factor=3)])


def test_the_brokers_are_named(cluster: Cluster, kafka: Kafka) -> None:
    assert kafka.hosts in cluster.brokers()
