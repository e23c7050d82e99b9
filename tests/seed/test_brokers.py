"""Broker discovery and failover: one host is enough, and a node of the cluster may die while messages flow."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from processes import Process
from servers import ApacheCluster, ClusterNode, WaitFor, why_not_apache_kafka

from flowkit import Settings
from flowkit.clients.kafka_admin import Cluster
from flowkit.clients.kafka_python import Consumer, Producer
from flowkit.errors import BrokerUnavailable

PARTITIONS = 3
QUICK = {"reconnect_backoff_max_ms": 1_000, "metadata_max_age_ms": 5_000}
"""For the test's own clients: kafka-python looks for half a minute whether a node is back, flowkit's a second."""

# kafka-python 3.0 leaves a socket to the garbage collector when a connection is refused.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(autouse=True)
def _sockets() -> Iterator[None]:
    yield
    gc.collect()  # while their warnings are ignored


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApacheCluster]:
    if reason := why_not_apache_kafka():
        pytest.skip(f"nodes to kill are needed, and {reason}")
    with ApacheCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


class Stream:
    """An application between two topics, numbers that go in, and how often each has come out."""

    def __init__(self, cluster: ApacheCluster, name: str, pause: float) -> None:
        self.hosts = cluster.hosts
        self.group = self.into = f"{name}-in"
        self.out = f"{name}-out"
        self.confirmed: set[int] = set()
        self.answers: Counter[int] = Counter()
        for topic in (self.into, self.out):
            cluster.create_topic(topic, PARTITIONS)
        self.sent = -1
        self._pause = pause
        self._ended = threading.Event()
        self._feeder = threading.Thread(target=self._feed)
        self._consumer = KafkaConsumer(bootstrap_servers=self.hosts, auto_offset_reset="earliest", **QUICK)
        self._consumer.assign([TopicPartition(self.out, number) for number in range(PARTITIONS)])

    def _feed(self) -> None:
        """One message every ``pause`` seconds, until the end; those that Kafka took are in ``confirmed``."""
        with contextlib.closing(
            KafkaProducer(bootstrap_servers=self.hosts, acks="all", linger_ms=10, **QUICK)
        ) as producer:
            for number in itertools.count():
                if self._ended.wait(self._pause):
                    break
                delivery = producer.send(self.into, b"%d" % number, partition=number % PARTITIONS)
                self.sent = number
                delivery.add_callback(lambda _, number=number: self.confirmed.add(number))
            producer.flush(timeout=60)

    def __enter__(self) -> Stream:
        self._feeder.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._consumer.close(autocommit=False)

    def end(self) -> None:
        self._ended.set()
        self._feeder.join()

    def answered(self) -> int:
        """How many different numbers have come out by now."""
        for records in self._consumer.poll(timeout_ms=20).values():
            self.answers.update(int(record.value) for record in records)
        return len(self.answers)

    @property
    def repeated(self) -> int:
        return sum(self.answers.values()) - len(self.answers)


def goes_on(streams: list[Stream], wait_for: WaitFor, what: str) -> None:
    """Numbers that are sent from now on are answered on every partition of every stream."""
    newest = {stream.group: stream.sent for stream in streams}

    def all_answered() -> bool:
        for stream in streams:
            stream.answered()
        return all(
            {answer % PARTITIONS for answer in stream.answers if answer > newest[stream.group]}
            == set(range(PARTITIONS))
            for stream in streams
        )

    wait_for(all_answered, timeout=60, what=f"answers after {what}")


def test_nothing_is_lost_when_the_only_known_host_and_then_the_coordinator_of_the_group_are_killed(
    cluster: ApacheCluster, redis: Any, redis_url: str, tmp_path: Path, wait_for: WaitFor
) -> None:
    # Given an inline and a queued application that know one broker only, and messages that flow through both
    only = cluster.nodes[1]
    with (
        Stream(cluster, "inline", pause=0.005) as inline,
        Stream(cluster, "queued", pause=0.25) as queued,
        start("run", inline, only, tmp_path, RELAY_INLINE="1") as first,
        start("run", queued, only, tmp_path, FLOWKIT_REDIS=redis_url) as second,
        start("worker", queued, only, tmp_path, FLOWKIT_REDIS=redis_url) as third,
    ):
        streams = [inline, queued]
        goes_on(streams, wait_for, "the start")
        # When a node is killed, then all goes on without it, and goes on when it is back
        victims: dict[str, Callable[[], ClusterNode]] = {
            "the only host in kafka.hosts, which leads a partition of each topic": lambda: only,
            "the coordinator of the inline application's group": lambda: cluster.coordinator(inline.group),
        }
        for what, victim in victims.items():
            node = victim()
            node.kill()
            goes_on(streams, wait_for, f"the death of {what}")
            node.start(timeout=60)
            wait_for(lambda: cluster.in_sync(inline.into, inline.out), timeout=60, what="copies on every node")
            goes_on(streams, wait_for, f"the return of {what}")
        # Then every message that Kafka took is answered
        for stream in streams:
            stream.end()
            wait_for(
                lambda stream=stream: stream.answered() >= len(stream.confirmed),
                what=f"the last answers of {stream.group}",
            )
            assert stream.confirmed <= stream.answers.keys()
        for process in (first, second, third):
            assert process.stop() == 0, process.output[-4000:]
            assert "Traceback" not in process.output
    for stream in streams:
        print(f"\n{stream.group}: lost 0, repeated {stream.repeated} of {len(stream.confirmed)}")
        assert stream.repeated < len(stream.confirmed) / 2


def start(command: str, stream: Stream, host: ClusterNode, tmp_path: Path, **env: str) -> Process:
    topics = {"RELAY_IN": stream.into, "RELAY_OUT": stream.out}
    log = tmp_path / f"{stream.group}-{command}.log"
    return Process("flowkit", command, "relay:app", env={"FLOWKIT_KAFKA_HOSTS": host.hosts, **topics, **env}, log=log)


class Quiet:
    """A ``Rebalance`` that takes what comes."""

    def assigned(self, partitions: object) -> None: ...

    def confirmed(self, offsets: object) -> None: ...

    def lost(self, partitions: object) -> None: ...

    def revoked(self, partitions: object) -> dict[object, int]:
        return {}


def test_a_client_made_when_the_only_known_host_is_dead_finds_the_others(
    cluster: ApacheCluster, wait_for: WaitFor
) -> None:
    # Given a process that has been in touch with the cluster by one host
    only = cluster.nodes[2]
    settings = Settings.load({"name": "shop", "kafka": {"hosts": only.hosts}}, {})
    with Cluster(settings) as admin:
        assert set(admin.brokers()) == set(cluster.hosts.split(","))
    # When that host is dead, then a new consumer and a new producer reach the cluster all the same
    only.kill()
    consumer = Consumer(settings, "group")
    Producer(settings).close(5)
    # When nobody is left, then the consumer says so
    consumer.subscribe(["quiet"], Quiet())
    for node in cluster.nodes.values():
        node.kill()
    with pytest.raises(BrokerUnavailable, match=f"no Kafka broker answers at {only.hosts}"):
        wait_for(lambda: consumer.poll(1.0), what="an error")
    consumer.close(1)
