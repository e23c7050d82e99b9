"""A broker in memory with the clients for it: for tests of handlers and of the consumer's loop."""

from __future__ import annotations

import secrets
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from ..errors import DeliveryError
from ..message import HeaderPairs, Partition, PlainRecord, Record
from ..settings import Settings
from . import Offsets, Rebalance


class Broker:
    """Topics with one partition unless made with more; a topic exists from its first use, or from ``create``."""

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.topics: dict[str, list[list[PlainRecord]]] = {}
        self.ids: dict[str, str] = {}
        self.commits: dict[str, dict[Partition, int]] = defaultdict(dict)
        self.refuse: Exception | None = None
        self.refuse_offsets: Exception | None = None
        self._changed = threading.Condition()

    def create(self, topic: str, partitions: int = 1) -> None:
        if topic not in self.topics:
            self.topics[topic] = [[] for _ in range(partitions)]
            self.ids[topic] = secrets.token_hex(16)

    def append(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None = None,
        headers: HeaderPairs = (),
        partition: int | None = None,
    ) -> PlainRecord:
        with self._changed:
            if not self.strict:
                self.create(topic)
            if topic not in self.topics:
                raise DeliveryError(f"the topic {topic!r} does not exist on the brokers; create it")
            if partition is None:
                partition = self.partition_for(topic, key) if key is not None else 0
            if partition >= len(self.topics[topic]):
                raise DeliveryError(f"the topic {topic!r} has no partition {partition}")
            log = self.topics[topic][partition]
            now = int(time.time() * 1000)
            record = PlainRecord(topic, partition, len(log), now, key, value, tuple(headers))
            log.append(record)
            self._changed.notify_all()
            return record

    def partition_for(self, topic: str, key: bytes) -> int:
        return zlib.crc32(key) % len(self.topics[topic])

    def records(self, topic: str) -> list[PlainRecord]:
        """All messages of a topic, partition after partition."""
        return [record for log in self.topics.get(topic, []) for record in log]

    def wait(self, timeout: float) -> None:
        with self._changed:
            self._changed.wait(timeout)

    def consumer(self, settings: Settings, group: str) -> Consumer:  # noqa: ARG002
        return Consumer(self, group)

    def producer(self, settings: Settings, transactional_id: str | None = None, **_: Any) -> Producer:  # noqa: ARG002
        return Producer(self) if transactional_id is None else TransactionalProducer(self)


class Consumer:
    """A ``ConsumerClient`` that owns every partition of its topics: one member a group."""

    def __init__(self, broker: Broker, group: str) -> None:
        self.broker = broker
        self.group = group
        self.positions: dict[Partition, int] = {}
        self.paused: set[Partition] = set()
        self.closed = False
        self._topics: Sequence[str] = ()
        self._rebalance: Rebalance | None = None

    def subscribe(self, topics: Sequence[str], rebalance: Rebalance) -> None:
        self._topics, self._rebalance = topics, rebalance

    def poll(self, timeout: float, most: int = 500) -> Mapping[Partition, Sequence[Record]]:
        self._assign()
        batch = self._fetch(most)
        if not batch and timeout > 0:
            self.broker.wait(timeout)
            self._assign()
            batch = self._fetch(most)
        return batch

    def joined(self) -> bool:
        return self._rebalance is not None

    def in_touch(self) -> bool:
        return True

    def _assign(self) -> None:
        assert self._rebalance is not None
        committed = self.broker.commits[self.group]
        new = [
            Partition(topic, number)
            for topic in self._topics
            for number in range(len(self.broker.topics.get(topic, ())))
            if (topic, number) not in self.positions
        ]
        if new:
            self.positions.update({partition: committed.get(partition, 0) for partition in new})
            self._rebalance.assigned(new)

    def _fetch(self, left: int) -> dict[Partition, Sequence[Record]]:
        batch: dict[Partition, Sequence[Record]] = {}
        for partition, position in self.positions.items():
            log = self.broker.topics[partition.topic][partition.partition]
            if partition not in self.paused and position < len(log) and left:
                records = log[position : position + left]
                batch[partition] = records
                left -= len(records)
                self.positions[partition] = records[-1].offset + 1
        return batch

    def commit(self, offsets: Offsets) -> None:
        self.broker.commits[self.group].update(offsets)

    def committed(self, partition: Partition) -> int | None:
        return self.broker.commits[self.group].get(partition)

    def membership(self) -> Any:
        return self.group

    def topic_id(self, topic: str) -> str | None:
        return self.broker.ids.get(topic)

    def first_offset(self, partition: Partition) -> int:  # noqa: ARG002
        return 0

    def end_offset(self, partition: Partition) -> int:
        return len(self.broker.topics[partition.topic][partition.partition])

    def position(self, partition: Partition) -> int | None:
        return self.positions.get(partition)

    def pause(self, partition: Partition) -> None:
        self.paused.add(partition)

    def resume(self, partition: Partition) -> None:
        self.paused.discard(partition)

    def seek(self, partition: Partition, offset: int) -> None:
        self.positions[partition] = offset

    def missing_topics(self, topics: Sequence[str]) -> list[str]:
        return sorted(topic for topic in topics if topic not in self.broker.topics)

    def close(self, timeout: float) -> None:  # noqa: ARG002
        if self._rebalance is not None and self.positions:
            offsets = self._rebalance.revoked(list(self.positions))
            self.commit(offsets)
            self._rebalance.confirmed(offsets)
        self.positions.clear()
        self.closed = True


class Producer:
    """A ``ProducerClient``; ``broker.refuse`` is the error that the next deliveries end with."""

    is_over = has_failed = False
    tells_each = True

    def __init__(self, broker: Broker) -> None:
        self.broker = broker

    def send(
        self, topic: str, value: bytes | None, key: bytes | None, headers: HeaderPairs, partition: int | None
    ) -> Any:
        if self.broker.refuse is not None:
            return self.broker.refuse
        self.broker.append(topic, value, key, headers, partition)
        return None

    def flush(self, timeout: float) -> None:
        pass

    def ended(self, delivery: Any) -> bool:  # noqa: ARG002
        return True

    def outcome(self, delivery: Any) -> DeliveryError | None:
        if delivery is None or isinstance(delivery, DeliveryError):
            return delivery
        return DeliveryError(f"Kafka did not take the message: {delivery!r}")

    def confirmed(self, deliveries: Iterable[Any]) -> int:
        return sum(1 for _ in takewhile(lambda delivery: self.outcome(delivery) is None, deliveries))

    def notify(self, delivery: Any, tell: Callable[[], None]) -> None:  # noqa: ARG002
        tell()

    def partition_for(self, topic: str, key: bytes) -> int:
        if not self.broker.strict:
            self.broker.create(topic)
        return self.broker.partition_for(topic, key)

    def close(self, timeout: float) -> None:
        pass


class TransactionalProducer(Producer):
    """A ``TransactionalClient``; ``broker.refuse_offsets`` is what the next commits raise."""

    def __init__(self, broker: Broker) -> None:
        super().__init__(broker)
        self._sent: list[tuple[Any, ...]] | None = None

    def begin(self) -> None:
        assert self._sent is None, "the transaction before this one has not ended"
        self._sent = []

    def send(
        self, topic: str, value: bytes | None, key: bytes | None, headers: HeaderPairs, partition: int | None
    ) -> Any:
        assert self._sent is not None, "no transaction has begun"
        if self.broker.refuse is not None:
            return self.broker.refuse
        if self.broker.strict and topic not in self.broker.topics:
            raise DeliveryError(f"the topic {topic!r} does not exist on the brokers; create it", passing=True)
        self._sent.append((topic, value, key, headers, partition))
        return None

    def commit(self, offsets: Offsets, membership: Any) -> None:
        assert self._sent is not None, "no transaction has begun"
        if self.broker.refuse_offsets is not None:
            raise self.broker.refuse_offsets
        for message in self._sent:
            self.broker.append(*message)
        self.broker.commits[membership].update(offsets)
        self._sent = None
