"""Fixtures on real servers. They start when the first test asks for them, and end with the run.

FLOWKIT_TEST_KAFKA             the hosts of a running broker to use, or ``embedded``
FLOWKIT_TEST_REDIS             the URL of a running Redis to use; its database is emptied
FLOWKIT_REQUIRE_APACHE_KAFKA   1: fail at once if the embedded broker would have to stand in for Apache Kafka
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from processes import BIN
from redis import Redis
from servers import ApacheKafka, Kafka, MakeTopic, RedisServer, WaitFor, kafka_libs, why_not_apache_kafka

from flowkit.devstack import EmbeddedBroker, find_redis
from flowkit.errors import DevStackError

T = TypeVar("T")

# kafka-python 3.0.12 reads its schemas with a function that Python 3.11 and 3.12 call deprecated.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from kafka import KafkaAdminClient


def pytest_configure() -> None:
    # The same with an activated environment as without: a test finds programs by ``processes.program``.
    paths = os.environ["PATH"].split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join(path for path in paths if Path(path) != BIN)
    if (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    ):  # as in a shell's background: children would ignore Ctrl-C too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("FLOWKIT_REQUIRE_APACHE_KAFKA") == "1" and running_kafka() is None:
        try:
            if reason := why_embedded():
                raise DevStackError(f"the embedded broker would be used, because {reason}")
            kafka_libs()
        except DevStackError as error:
            pytest.exit(f"FLOWKIT_REQUIRE_APACHE_KAFKA is set, but {error}", returncode=1)


def pytest_report_header() -> list[str]:
    if hosts := running_kafka():
        broker = f"the broker at {hosts} (FLOWKIT_TEST_KAFKA)"
    elif reason := why_embedded():
        broker = f"embedded Tansu, because {reason}"
    else:
        broker = f"{ApacheKafka.name} (jars by Maven)"
    try:
        url = os.environ.get("FLOWKIT_TEST_REDIS")
        server = f"the one at {url} (FLOWKIT_TEST_REDIS)" if url else find_redis()
    except DevStackError as error:
        server = str(error)
    return [f"kafka: {broker}", f"redis: {server}"]


def running_kafka() -> str | None:
    """The hosts of a broker that runs already, if the tests are to use one."""
    hosts = os.environ.get("FLOWKIT_TEST_KAFKA", "")
    return None if hosts in ("", "embedded") else hosts


def why_embedded() -> str | None:
    """Why the embedded broker stands in for Apache Kafka, or None if it does not."""
    if os.environ.get("FLOWKIT_TEST_KAFKA") == "embedded":
        return "FLOWKIT_TEST_KAFKA asks for it"
    return why_not_apache_kafka()


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """The broker that all tests share: ``hosts``, ``create_topic`` and whether it is Apache Kafka."""
    if hosts := running_kafka():
        yield Kafka(hosts)
    elif why_embedded():
        with EmbeddedBroker() as broker:
            yield Kafka(broker.hosts, apache=False)
    else:
        with ApacheKafka(tmp_path_factory.mktemp("kafka")) as node:
            yield Kafka(node.hosts)


@pytest.fixture
def topic(kafka: Kafka) -> MakeTopic:
    """Make a topic with a name of its own: ``topic("orders", partitions=3)`` gives ``orders-1f9a03bc``."""

    def make(name_hint: str = "t", partitions: int = 1) -> str:
        name = f"{name_hint}-{uuid.uuid4().hex[:8]}"
        kafka.create_topic(name, partitions)
        return name

    return make


@pytest.fixture
def small_topic(kafka: Kafka) -> MakeTopic:
    """The same, but a message of more than some 200 bytes is too large for the topic."""
    return _topic_with(kafka, {"max.message.bytes": "300"})


@pytest.fixture
def compacted_topic(kafka: Kafka) -> MakeTopic:
    """The same, but a message without a key is not valid in the topic."""
    return _topic_with(kafka, {"cleanup.policy": "compact"})


def _topic_with(kafka: Kafka, configs: dict[str, str]) -> MakeTopic:
    if not kafka.apache:
        pytest.skip("the embedded broker refuses no message")

    def make(name_hint: str = "t", partitions: int = 1) -> str:
        name = f"{name_hint}-{uuid.uuid4().hex[:8]}"
        what = {"num_partitions": partitions, "replication_factor": 1, "configs": configs}
        with contextlib.closing(KafkaAdminClient(bootstrap_servers=kafka.hosts)) as admin:
            admin.create_topics({name: what})
        return name

    return make


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the Redis that all tests share."""
    if url := os.environ.get("FLOWKIT_TEST_REDIS"):
        yield url
    else:
        with RedisServer(tmp_path_factory.mktemp("redis")) as server:
            yield server.url


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    """A client of the shared Redis, whose database is empty when the test begins."""
    with Redis.from_url(redis_url) as client:
        client.flushdb()
        yield client


@pytest.fixture
def wait_for() -> WaitFor:
    """Wait until a condition holds, and give its value. For tests that would otherwise sleep."""

    def wait(condition: Callable[[], T], timeout: float = 60, what: str = "the condition") -> T:
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout:g} s for {what}, which last was {value!r}")
            time.sleep(0.02)
        return value

    return wait
