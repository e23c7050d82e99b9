"""What flowkit needs of a Kafka client, as two small protocols. ``kafka_python`` and ``memory`` have them.

A consumer client is used by one thread. After any exception but ``CommitRefused`` it is thrown away and a new one is made;
``ConfigurationError`` says that a new one would fare no better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ..errors import DeliveryError
from ..message import HeaderPairs, Partition, Record
from ..settings import Settings

Offsets = Mapping[Partition, int]
"""Per partition the offset after the last finished message: what Kafka calls the committed offset."""


class Rebalance(Protocol):
    """What a consumer client tells its owner, from within ``poll`` or ``close`` and maybe from another thread."""

    def assigned(self, partitions: Sequence[Partition]) -> None:
        """These partitions are ours from now on; some may have been ours before."""

    def revoked(self, partitions: Sequence[Partition]) -> Offsets:
        """These partitions go to somebody else: gives the offsets to commit before they do."""

    def confirmed(self, offsets: Offsets) -> None:
        """Kafka has taken the offsets that ``revoked`` gave."""

    def lost(self, partitions: Sequence[Partition]) -> None:
        """These partitions went to somebody else some time ago; nothing can be committed for them."""


class ConsumerClient(Protocol):
    def subscribe(self, topics: Sequence[str], rebalance: Rebalance) -> None: ...

    def poll(self, timeout: float, most: int = 500) -> Mapping[Partition, Sequence[Record]]:
        """The next records per partition, in order, ``most`` in all; waits for the first up to ``timeout`` seconds."""

    def joined(self) -> bool:
        """Whether this is a member of its group and knows its partitions, of which there may be none."""

    def commit(self, offsets: Offsets) -> None:
        """Raises ``CommitRefused`` where the group has moved on: the messages will come again, to somebody."""

    def committed(self, partition: Partition) -> int | None: ...

    def end_offset(self, partition: Partition) -> int: ...

    def topic_id(self, topic: str) -> str | None:
        """What tells a topic from a later one of the same name; None where the brokers do not say."""

    def pause(self, partition: Partition) -> None: ...

    def resume(self, partition: Partition) -> None: ...

    def seek(self, partition: Partition, offset: int) -> None: ...

    def missing_topics(self, topics: Sequence[str]) -> list[str]: ...

    def close(self, timeout: float) -> None:
        """Leaves the group at once; commits nothing but what ``Rebalance.revoked`` gives."""


class ProducerClient(Protocol):
    def send(
        self, topic: str, value: bytes | None, key: bytes | None, headers: HeaderPairs, partition: int | None
    ) -> Any:
        """Starts a delivery and gives its handle; does not wait for the broker. Raises ``DeliveryError``."""

    def flush(self, timeout: float) -> None:
        """Waits until every started delivery has ended, well or badly, or ``timeout`` seconds have passed."""

    def ended(self, delivery: Any) -> bool:
        """Whether a delivery has ended by now, well or badly."""

    def outcome(self, delivery: Any) -> DeliveryError | None:
        """None where the broker has confirmed; else why not."""

    def notify(self, delivery: Any, tell: Callable[[], None]) -> None:
        """Calls ``tell`` when the delivery has ended, which may be now, and maybe on a thread of the client's."""

    def partition_for(self, topic: str, key: bytes) -> int:
        """The partition that ``key`` belongs to. Raises ``DeliveryError`` if the topic does not exist."""

    def close(self, timeout: float) -> None: ...


class CommitRefused(Exception):
    """The group has moved on since the messages were read."""


MakeConsumer = Callable[[Settings, str], ConsumerClient]
MakeProducer = Callable[[Settings], ProducerClient]
