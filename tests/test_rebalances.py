"""Who gets which partition: kafka-python's strategies by their names, and the cooperative one made right."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from kafka.coordinator.assignors.abstract import RebalanceProtocol
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import KafkaConfigurationError
from kafka.structs import TopicPartition
from servers import ON_CONFLUENT, Kafka, MakeTopic, WaitFor
from test_acceptance import PARTITIONS, Member, committed, load

from flowkit import Settings
from flowkit.clients.kafka_assigning import STRATEGIES, CooperativeSticky, bind
from flowkit.settings import STRATEGIES as NAMES

TOPIC = "orders"


class Cluster:
    """What an assignor asks of the metadata: a topic with two partitions."""

    def topics(self) -> set[str]:
        return {TOPIC}

    def partitions_for_topic(self, topic: str) -> set[int]:
        return {0, 1} if topic == TOPIC else set()


def consumer(*owned: int, protocol: RebalanceProtocol = RebalanceProtocol.COOPERATIVE) -> Any:
    partitions = {TopicPartition(TOPIC, number) for number in owned}
    return SimpleNamespace(
        _coordinator=SimpleNamespace(_rebalance_protocol=protocol),
        _subscription=SimpleNamespace(assigned_partitions=lambda: partitions),
    )


def claimed(assignor: Any) -> list[int]:
    return [number for owned in assignor.metadata([TOPIC]).owned_partitions for number in owned.partitions]


def given(assignor: Any, **members: Any) -> dict[str, list[int]]:
    """Who gets what: from members that had something before, by what each of their assignors says."""
    found = [SimpleNamespace(member_id=name, metadata=other.metadata([TOPIC])) for name, other in members.items()]
    assignment = assignor.assign(Cluster(), found)
    return {name: sorted(tp.partition for tp in assignment[name].partitions()) for name in members}


def test_the_names_are_those_of_the_setting() -> None:
    assert tuple(STRATEGIES) == NAMES
    assert all(kind.name == name for name, kind in STRATEGIES.items())


def test_a_member_claims_what_it_has_and_not_what_it_had() -> None:
    ours = CooperativeSticky()
    bind([ours], consumer(0, 1))
    assert sorted(claimed(ours)) == [0, 1]
    bind([ours], consumer())  # it was lost
    assert claimed(ours) == []
    bind([ours], consumer(0, 1, protocol=RebalanceProtocol.EAGER))  # all of it is revoked before it joins
    assert claimed(ours) == []


def test_no_partition_is_left_with_nobody_after_a_member_has_lost_its_own() -> None:
    def after_a_loss(kind: type[Any]) -> dict[str, list[int]]:
        lost, new = kind(), kind()
        had = SimpleNamespace(partitions=lambda: [TopicPartition(TOPIC, 0), TopicPartition(TOPIC, 1)])
        lost.on_assignment(had, 1)
        bind([lost, new], consumer())
        return given(kind(), lost=lost, new=new)

    def places(given: dict[str, list[int]]) -> list[int]:
        return sorted(number for numbers in given.values() for number in numbers)

    assert places(after_a_loss(CooperativeSticky)) == [0, 1]
    assert places(after_a_loss(CooperativeStickyAssignor)) != [0, 1]  # if this fails, ours is not needed any more


def test_kafka_python_itself_takes_no_list_by_which_a_group_could_change() -> None:
    from kafka import KafkaConsumer
    from kafka.coordinator.assignors.range import RangePartitionAssignor

    with pytest.raises(KafkaConfigurationError, match="do not support a common RebalanceProtocol"):
        KafkaConsumer(
            bootstrap_servers="127.0.0.1:1",
            api_version=(3, 0),
            group_id="g",
            partition_assignment_strategy=[CooperativeStickyAssignor, RangePartitionAssignor],
        )


@pytest.mark.skipif(ON_CONFLUENT, reason="librdkafka takes cooperative-sticky alone only, and is refused the list")
def test_a_group_changes_its_strategy_process_after_process(
    kafka: Kafka, topic: MakeTopic, wait_for: WaitFor
) -> None:
    if not kafka.apache:
        pytest.skip("the embedded broker has no rebalances to be relied on")
    name = topic("rolling", PARTITIONS)
    handled: list[int] = []

    def join(number: int, strategy: str | None) -> Member:
        return Member(kafka.hosts, name, f"m{number}", handled, partition_assignment_strategy=strategy)

    with load(kafka.hosts, name) as sent:
        members = [join(0, None), join(1, None)]
        strategies = [
            None,
            "cooperative-sticky,range",
            "cooperative-sticky,range",
            "cooperative-sticky",
            "cooperative-sticky",
        ]
        for number, strategy in enumerate(strategies[1:], start=2):
            wait_for(lambda: [member.partitions for member in members] == [2, 2])
            assert members.pop(0).stop()
            members.append(join(number, strategy))
        wait_for(lambda: [member.partitions for member in members] == [2, 2])
        at = len(sent)
        wait_for(lambda: {number % PARTITIONS for number in handled if number > at} == set(range(PARTITIONS)))
    wait_for(lambda: len(set(handled)) == len(sent))
    assert all(member.stop() for member in members)
    assert sorted(handled) == sent
    assert committed(kafka.hosts, name) == [len(sent[number::PARTITIONS]) for number in range(PARTITIONS)]
    assert not [thread for thread in threading.enumerate() if thread.name in ("m0", "m5")]


def test_the_setting_takes_names_and_nothing_else() -> None:
    kafka = {"hosts": "127.0.0.1:1", "partition_assignment_strategy": "cooperative-sticky, range"}
    settings = Settings.load({"name": "shop", "kafka": kafka}, {})
    assert settings.kafka.partition_assignment_strategy == ("cooperative-sticky", "range")
