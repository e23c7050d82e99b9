"""The real servers that the tests run on: Apache Kafka, started from jars that Maven fetches, and Redis."""

from __future__ import annotations

import base64
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from flowkit.devstack import HOST, EmbeddedBroker, EmbeddedRedis, Server, create_topics, free_port
from flowkit.errors import DevStackError

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parent.parent
POM = REPOSITORY / "tests" / "kafka" / "pom.xml"
KAFKA_VERSION = re.findall(r"<kafka\.version>(.+)</kafka\.version>", POM.read_text())[0]

PROPERTIES = """
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller_port}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
log.dirs={directory}/data
auto.create.topics.enable={auto_create_topics}
num.partitions=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
# After a kill the node is let in again only when its old session is over: 9 s by default.
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=250
"""


class ApacheKafka(Server):
    """One Apache Kafka node, broker and controller in one. It keeps its port and its data between starts."""

    name = f"Apache Kafka {KAFKA_VERSION}"
    question = EmbeddedBroker.question
    answer = EmbeddedBroker.answer
    advice = "Kafka 4 needs Java 17 or newer: see `java -version`."

    def __init__(self, directory: Path, *, auto_create_topics: bool = False) -> None:
        super().__init__()
        self.directory = directory
        self.controller_port = free_port()
        self.auto_create_topics = auto_create_topics

    @property
    def hosts(self) -> str:
        return f"{HOST}:{self.port}"

    def command(self) -> list[str]:
        properties = self.directory / "server.properties"
        if not properties.exists():
            self._format(properties)
        return [*self._java(), "kafka.Kafka", str(properties)]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "CLASSPATH": f"{kafka_libs()}/*"}

    def restart(self) -> None:
        """Stop it cleanly, unless it was killed, and start it again."""
        self.stop(grace=20)
        self.start()

    def create_topic(self, name: str, partitions: int = 1) -> None:
        create_topics(self.hosts, {name: partitions})

    def _java(self) -> list[str]:
        logging = "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
        return ["java", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", logging]

    def _format(self, properties: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        draft = self.directory / "draft.properties"
        draft.write_text(
            PROPERTIES.format(
                host=HOST,
                port=self.port,
                controller_port=self.controller_port,
                directory=self.directory,
                auto_create_topics=str(self.auto_create_topics).lower(),
            )
        )
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        tool = [*self._java(), "kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(draft)]
        _run(tool, "the storage of Apache Kafka could not be formatted", self.environment())
        draft.rename(properties)  # its presence says that the storage is formatted


class RedisServer(EmbeddedRedis):
    """A Redis that keeps its port and its data between starts."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory=directory)

    def restart(self) -> None:
        """Stop it cleanly, unless it was killed, and start it again."""
        self.stop()
        self.start()


@dataclass(frozen=True, slots=True)
class Kafka:
    """The broker that the tests share, whichever it is. ``apache`` is False for the embedded one."""

    hosts: str
    apache: bool = True

    def create_topic(self, name: str, partitions: int = 1) -> None:
        create_topics(self.hosts, {name: partitions})


class MakeTopic(Protocol):
    """What the fixture ``topic`` gives."""

    def __call__(self, name_hint: str = "t", partitions: int = 1) -> str: ...


class WaitFor(Protocol):
    """What the fixture ``wait_for`` gives."""

    def __call__(self, condition: Callable[[], T], timeout: float = 30, what: str = ...) -> T: ...


def why_not_apache_kafka() -> str | None:
    """What keeps Apache Kafka from being started here, or None."""
    if shutil.which("java") is None:
        return "java was not found"
    if shutil.which("mvn") is None and not _is_complete(_libs()):
        return "mvn (Maven) was not found"
    return None


def kafka_libs() -> Path:
    """The folder of Apache Kafka's jars. The first call has Maven fetch them: 54 MB."""
    if reason := why_not_apache_kafka():
        raise DevStackError(
            f"Apache Kafka cannot be started: {reason}. Install Java 17 and Maven, "
            "or set FLOWKIT_TEST_KAFKA to the hosts of a running broker, or to `embedded`."
        )
    libs = _libs()
    if _is_complete(libs):
        return libs
    libs.parent.mkdir(exist_ok=True)
    with Path(f"{libs}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be fetching them
        if not _is_complete(libs):
            shutil.rmtree(libs, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=libs.parent, ignore_cleanup_errors=True) as download:
                goal = ["dependency:copy-dependencies", "-f", str(POM), f"-DoutputDirectory={download}"]
                _run(["mvn", "-q", "-B", *goal], "Maven could not fetch the jars of Apache Kafka")
                Path(download, ".complete").write_text(POM.read_text())
                Path(download).rename(libs)
    return libs


def _libs() -> Path:
    return REPOSITORY / ".cache" / f"kafka-libs-{KAFKA_VERSION}"


def _is_complete(libs: Path) -> bool:
    marker = libs / ".complete"  # says for which pom, as that may change
    return marker.exists() and marker.read_text() == POM.read_text()


def _run(command: list[str], problem: str, environment: dict[str, str] | None = None) -> None:
    pipe, stdout = subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(command, env=environment, stdout=pipe, stderr=stdout, text=True, timeout=600)
    if done.returncode != 0:
        raise DevStackError(f"{problem} (`{' '.join(command)}`). Its output:\n{done.stdout[-4_000:]}")
