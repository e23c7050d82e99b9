"""What flowkit needs of a Kafka client, as three small protocols. ``kafka_python``, ``confluent`` and ``memory`` have them.

A consumer client is used by one thread at a time. After any exception but ``CommitRefused`` and ``Unreadable`` it is thrown
away and a new one is made; ``ConfigurationError`` says that a new one would fare no better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
        """Kafka has taken the offsets that ``revoked`` gave, or ``begin_commit`` was given."""

    def refused(self, offsets: Offsets, error: CommitRefused) -> None:
        """Kafka has not taken offsets that ``begin_commit`` was given."""

    def lost(self, partitions: Sequence[Partition]) -> None:
        """These partitions went to somebody else some time ago; nothing can be committed for them."""

    def moved(self, partition: Partition, before: int, after: int) -> None:
        """The broker does not have the message at the offset ``before``: the next one that comes is at ``after``."""


class ConsumerClient(Protocol):
    """One may also have ``begin_commit(offsets)``: a ``commit`` that is not waited for. What becomes of it is told to its
    ``Rebalance`` within a later ``poll``. It is called when that of the last one was told, or after a ``commit``.
    """

    def subscribe(self, topics: Sequence[str], rebalance: Rebalance) -> None: ...

    def poll(self, timeout: float, most: int = 500) -> Mapping[Partition, Sequence[Record]]:
        """The next records per partition, in order, ``most`` in all; waits for the first up to ``timeout`` seconds.

        Raises ``Unreadable``, and ``Stopped`` where the options say that it may not choose where to go on.
        """

    def joined(self) -> bool:
        """Whether this is a member of its group and knows its partitions, of which there may be none."""

    def in_touch(self) -> bool:
        """Whether it knows a broker that answers for its group."""

    def commit(self, offsets: Offsets) -> None:
        """Raises ``CommitRefused`` where the group has moved on: the messages will come again, to somebody."""

    def committed(self, partition: Partition) -> int | None: ...

    def first_offset(self, partition: Partition) -> int: ...

    def end_offset(self, partition: Partition) -> int: ...

    def membership(self) -> Any:
        """Who this is in its group now: what a transaction proves its offsets with.

        Raises ``CommitRefused`` where it is no member.
        """

    def topic_id(self, topic: str) -> str | None:
        """What tells a topic from a later one of the same name; None where the brokers do not say."""

    def position(self, partition: Partition) -> int | None:
        """The offset that the next poll goes on from; None where that is not known yet. Asks nobody."""

    def pause(self, partition: Partition) -> None: ...

    def resume(self, partition: Partition) -> None: ...

    def seek(self, partition: Partition, offset: int) -> None: ...

    def missing_topics(self, topics: Sequence[str]) -> list[str]: ...

    def close(self, timeout: float) -> None:
        """Leaves the group at once; commits nothing but what ``Rebalance.revoked`` gives."""


class ProducerClient(Protocol):
    """One may also have ``send_together(topic, values)``: many messages without a key, a partition and headers. It gives one
    handle for all of them, or for those before the first that could not be sent, whose ``refusal`` says why: ``len()`` is how
    many they are, ``is_done`` says whether all have ended, and ``apart()`` gives a handle for each of them then.
    """

    tells_each: bool
    """Whether it learns of each delivery when the broker has confirmed it. Else it knows no more than that none is under way,
    and after a ``flush`` of all of them.
    """

    has_failed: bool
    """Whether it has learned of a delivery that ended badly, since its owner has set this to False. It need not if it
    ``tells_each``.
    """

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

    def confirmed(self, deliveries: Iterable[Any]) -> int:
        """How many of these deliveries, from the first on, the broker has confirmed by now."""

    def notify(self, delivery: Any, tell: Callable[[], None]) -> None:
        """Calls ``tell`` when the delivery has ended, which may be now, and maybe on a thread of the client's."""

    @property
    def is_over(self) -> bool:
        """Whether it confirms nothing any more, so that the next message is to have another one."""

    def partition_for(self, topic: str, key: bytes) -> int:
        """The partition that ``key`` belongs to. Raises ``DeliveryError`` if the topic does not exist."""

    def close(self, timeout: float) -> None: ...


class TransactionalClient(ProducerClient, Protocol):
    """What it sends between ``begin`` and ``commit`` counts together with the group's offsets, or not at all.

    After any failure it is thrown away; the next one with the same id ends the transaction that this one left open.
    """

    def begin(self) -> None:
        """Raises ``DeliveryError`` if this client is of no more use."""

    def commit(self, offsets: Offsets, membership: Any) -> None:
        """Commits what was sent, and these offsets. ``outcome`` has been asked for every delivery before.

        Raises ``DeliveryError`` or ``CommitRefused`` where nothing was committed, and ``InDoubt`` where nobody can say.
        """


LONGEST_REQUEST = 0.8
"""The part of a transaction's time that one request may take: two fit, if the first one is lost early."""


class CommitRefused(Exception):
    """The group has moved on since the messages were read."""


class Unreadable(Exception):
    """What the broker gave of a partition cannot be read: a broken checksum, an unknown compression.

    It begins at ``offset``; what comes behind it begins at ``following``, where that is known. The next poll of the partition
    tries again.
    """

    def __init__(self, partition: Partition, offset: int, following: int | None, reason: Exception) -> None:
        self.partition = partition
        self.offset = offset
        self.following = following
        self.reason = reason
        super().__init__(f"{partition.topic}[{partition.partition}]@{offset}: {reason!r}")


class InDoubt(Exception):
    """Whether a transaction was committed is not known: only the group's offsets can tell."""


MakeConsumer = Callable[[Settings, str], ConsumerClient]
MakeProducer = Callable[..., ProducerClient]
"""Called with the settings, and with ``tells_each=False`` for a client whose owner looks at what it has sent after a ``flush``
only; or with ``transactional_id=...`` for a ``TransactionalClient``.
"""
