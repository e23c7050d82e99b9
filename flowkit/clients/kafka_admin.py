"""What a cluster knows of topics and groups, and making topics: Kafka's admin interface, by kafka-python.

Nothing here changes or deletes a topic that exists.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

with warnings.catch_warnings():  # kafka-python 3.0 warns at its own import, which must not fail under -W error
    warnings.simplefilter("ignore", DeprecationWarning)
    from kafka import KafkaAdminClient, TopicPartition

from kafka import errors as kafka_errors
from kafka.admin import ConfigResource
from kafka.protocol.consumer import OffsetSpec

from ..errors import BrokerUnavailable, ConfigurationError
from ..settings import Settings
from ..topics import TopicDeclaration
from .kafka_opening import open_client
from .kafka_options import client_options
from .kafka_refusals import FORBIDDEN

REQUEST_TIMEOUT = 10.0
"""Seconds that one request to the cluster may take."""

NO_COORDINATOR_YET = (
    kafka_errors.CoordinatorNotAvailableError,
    kafka_errors.CoordinatorLoadInProgressError,
    kafka_errors.NotCoordinatorError,
)

NO_OFFSET = -1
"""What a broker gives as the committed offset where a group has committed none."""


class Lag(NamedTuple):
    """How far one group is behind in one partition, in messages.

    ``committed`` is None where the group has not committed yet: then ``lag`` counts from where it will begin. ``partition``,
    ``end`` and ``lag`` are None for a topic that does not exist; ``end`` and ``lag`` also where a partition has no leader now.
    """

    group: str
    topic: str
    partition: int | None
    committed: int | None
    end: int | None
    lag: int | None


@dataclass(frozen=True, slots=True)
class TopicState:
    """A topic as the cluster has it. ``config`` holds those of its settings that were asked for."""

    name: str
    partitions: int
    replication_factor: int
    config: Mapping[str, str] = field(default_factory=dict)


class Cluster:
    """One connection to a cluster's admin interface. Used as ``with Cluster(settings) as cluster``.

    Every method raises ``BrokerUnavailable`` where no broker answers in time, and ``ConfigurationError`` where one refuses.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        defaults = {"bootstrap_timeout_ms": 5_000, "request_timeout_ms": int(REQUEST_TIMEOUT * 1000)}
        self._admin = open_client(KafkaAdminClient, settings, client_options(settings, KafkaAdminClient, defaults))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._admin.close()

    def brokers(self) -> list[str]:
        """The brokers of the cluster, as host:port."""
        with self._errors():
            return [f"{broker['host']}:{broker['port']}" for broker in self._admin.describe_cluster()["brokers"]]

    def topics(
        self, names: Iterable[str], configs: Mapping[str, Collection[str]] | None = None
    ) -> dict[str, TopicState]:
        """The state of those topics that exist. ``configs`` names, by topic, the settings to look up."""
        with self._errors():
            found = self._existing(names)
            asked = {name: keys for name, keys in (configs or {}).items() if name in found and keys}
            values = self._configs(asked) if asked else {}
        return {
            name: TopicState(name, len(partitions), len(partitions[0]["replica_nodes"]), values.get(name, {}))
            for name, partitions in found.items()
        }

    def _existing(self, names: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """The partitions of those topics that exist."""
        wanted = list(names)
        if not wanted:
            return {}  # an empty list would be all topics to older brokers
        found = {}
        for topic in self._admin.describe_topics(wanted):
            error = kafka_errors.for_code(topic["error_code"])
            if error is kafka_errors.UnknownTopicOrPartitionError:
                continue
            if issubclass(error, FORBIDDEN):
                raise ConfigurationError(
                    f"Kafka does not let this application look at {topic['name']!r}; it needs the right to DESCRIBE it"
                )
            if topic["partitions"]:
                found[topic["name"]] = sorted(topic["partitions"], key=lambda partition: partition["partition_index"])
        return found

    def _configs(self, asked: Mapping[str, Collection[str]]) -> dict[str, dict[str, str]]:
        resources = [ConfigResource("TOPIC", name, dict.fromkeys(keys)) for name, keys in asked.items()]
        try:
            described = self._admin.describe_configs(resources, config_filter="all").get("topic", {})
        except kafka_errors.KafkaConnectionError as error:
            raise BrokerUnavailable(
                "the broker closed the connection when it was asked for the settings of topics; the embedded one of `flowkit"
                " dev` does so: it has none, and what app.declare_topic(..., config=...) says cannot be compared with it"
            ) from error
        return {
            name: {key: item["value"] for key, item in values.items() if item["value"] is not None}
            for name, values in described.items()
        }

    def create(self, topics: Iterable[TopicDeclaration]) -> list[str]:
        """Makes topics and waits until they can be used; gives the names of those it made.

        Where a declaration says nothing, the brokers' ``num.partitions`` and ``default.replication.factor`` hold (KIP-464).
        Those which exist already stay as they are. Raises ``ConfigurationError`` that lists each one that was refused, when
        the others have been made.
        """
        wanted = {
            topic.name: {
                "num_partitions": topic.partitions or -1,
                "replication_factor": topic.replication_factor or -1,
                "configs": dict(topic.config),
            }
            for topic in topics
        }
        if not wanted:
            return []
        made, refused = [], []
        with self._errors():
            for topic in self._admin.create_topics(wanted, raise_errors=False)["topics"]:
                error = kafka_errors.for_code(topic["error_code"])
                if error is kafka_errors.NoError:
                    made.append(topic["name"])
                elif error is not kafka_errors.TopicAlreadyExistsError:  # somebody else was faster
                    refused.append(f"topic {topic['name']!r}: {topic.get('error_message') or error.__name__}")
            if made:
                self._admin.wait_for_topics(made)
        if refused:
            raise ConfigurationError("Kafka refused to make\n" + "\n".join(f"  - {line}" for line in refused))
        return sorted(made)

    def lag(self, groups: Mapping[str, Collection[str]]) -> list[Lag]:
        """How far each group is behind in each partition of its topics (``{group: topics}``), in the order given."""
        with self._errors():
            existing = self._existing(sorted({topic for topics in groups.values() for topic in topics}))
            led = {
                TopicPartition(topic, partition["partition_index"])
                for topic, partitions in existing.items()
                for partition in partitions
                if partition["leader_id"] >= 0
            }
            ends = self._offsets(led, OffsetSpec.LATEST)
            committed = self._committed(groups, existing)
            starts = self._offsets(led, OffsetSpec.EARLIEST)
        skips_old = self.settings.kafka.options.get("auto_offset_reset") == "latest"
        rows: list[Lag] = []
        for group, topics in groups.items():
            for topic in topics:
                if topic not in existing:
                    rows.append(Lag(group, topic, None, None, None, None))
                for partition in existing.get(topic, ()):
                    where = TopicPartition(topic, partition["partition_index"])
                    offset = committed[group].get(where, NO_OFFSET)
                    end = ends.get(where)
                    start = end if skips_old else starts.get(where)
                    # what retention has deleted cannot be read any more
                    begins = start if offset == NO_OFFSET else max(offset, starts.get(where, 0))
                    lag = None if end is None or begins is None else max(0, end - begins)
                    known = None if offset == NO_OFFSET else offset
                    rows.append(Lag(group, topic, where.partition, known, end, lag))
        return rows

    def _offsets(self, partitions: Collection[Any], spec: OffsetSpec) -> dict[Any, int]:
        if not partitions:
            return {}
        found = self._admin.list_partition_offsets(dict.fromkeys(partitions, spec))
        return {where: int(item.offset) for where, item in found.items()}

    def _committed(
        self, groups: Mapping[str, Collection[str]], existing: Mapping[str, list[dict[str, Any]]]
    ) -> dict[str, dict[Any, int]]:
        asked = {
            group: [
                TopicPartition(topic, partition["partition_index"])
                for topic in topics
                for partition in existing.get(topic, ())
            ]
            for group, topics in groups.items()
        }
        found: dict[str, dict[Any, int]] = {group: {} for group in groups}
        if any(asked.values()):
            specs = {group: partitions for group, partitions in asked.items() if partitions}
            for group, offsets in self._from_coordinators(specs).items():
                found[group] = {where: int(item.offset) for where, item in offsets.items()}
        return found

    def _from_coordinators(self, specs: Mapping[str, list[Any]]) -> Mapping[str, Mapping[Any, Any]]:
        """Asks again where a group has no coordinator yet: a new cluster makes one when it is first asked for."""
        deadline = time.monotonic() + REQUEST_TIMEOUT
        while True:
            try:
                found: Mapping[str, Mapping[Any, Any]] = self._admin.list_group_offsets(specs)
                return found
            except NO_COORDINATOR_YET:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.1)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns kafka-python's errors into flowkit's, with the next step."""
        where = ", ".join(self.settings.kafka.hosts)
        try:
            yield
        except FORBIDDEN as error:
            raise ConfigurationError(f"Kafka at {where} refuses this application: {error}") from error
        except kafka_errors.KafkaError as error:
            raise BrokerUnavailable(
                f"Kafka at {where} does not answer as it should: {error or type(error).__name__}; are its brokers running?"
            ) from error


def lag(settings: Settings, groups: Mapping[str, Collection[str]]) -> list[Lag]:
    """How far each group is behind in each partition of its topics (``{group: topics}``; see ``flowkit.topics.groups``).

    Opens a connection of its own; where it is asked for again and again, keep a ``Cluster``. Raises ``BrokerUnavailable`` or
    ``ConfigurationError``.
    """
    with Cluster(settings) as cluster:
        return cluster.lag(groups)
