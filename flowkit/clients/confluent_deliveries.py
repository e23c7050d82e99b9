"""What becomes of messages that were given to confluent-kafka, one by one or many together.

It calls back for one that Kafka has refused. That the others are confirmed it says too, or else their producer knows it when
none is under way: see ``Producer.drained``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DeliveryError
from ..message import HeaderPairs
from .confluent_trouble import confluent_kafka

if TYPE_CHECKING:
    from .confluent_producer import Producer

KafkaError = confluent_kafka.KafkaError

OF_A_BATCH = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_RECORD, KafkaError._INVALID_DIFFERENT_RECORD}
"""With these a broker refuses a batch as a whole, for one message in it."""

UNKNOWN = float("inf")
"""The number of what librdkafka does not have."""


class Delivery:
    """What becomes of one message. ``error`` is None while it is under way, and where Kafka has confirmed."""

    __slots__ = (
        "alone",
        "client",
        "ended",
        "error",
        "headers",
        "key",
        "number",
        "partition",
        "topic",
        "value",
        "waits",
    )

    def __init__(
        self,
        client: Producer,
        topic: str,
        value: Any,
        key: Any = None,
        partition: int = -1,
        headers: HeaderPairs = (),
    ) -> None:
        self.client = client
        self.topic = topic
        self.value = value
        self.key = key
        self.partition = partition
        self.headers = headers
        self.number = UNKNOWN
        self.alone = self.waits = self.ended = False
        self.error: Any = None

    def end(self, error: Any, _: Any) -> None:
        """Called back by confluent-kafka 2; with an exception set, if its client is of no more use. A lock that is taken here
        then would never be free again; and librdkafka takes the message for ended, whatever is raised here.
        """
        if error is None:
            self.ended = True
            return
        self.waits = True  # first of all: it is not confirmed
        self.client.has_failed = True
        if not self.alone and self.client.apart is not None and error.code() in OF_A_BATCH:
            self.client.apart.append(self)
            return
        self.error = error
        self.ended = True

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or badly, as far as its client knows."""
        if self.ended or self.client.tells_each:
            return self.ended
        return not self.waits and self.number <= self.client.drained


class Deliveries:
    """What becomes of messages that were sent together. A ``Delivery`` for each would take as long as sending it.

    Their values are not kept either: of the memory that thousands under way have, none is in the processor's caches when the
    next ones are made, which is a tenth of all their time. A hash tells which message it was that Kafka has refused, or one
    with the same value.
    """

    __slots__ = ("_alone", "_hashes", "_topic", "client", "number", "refusal", "unclear")

    def __init__(self, client: Producer, topic: str, values: Sequence[bytes | None]) -> None:
        self.client = client
        self._topic = topic
        self._hashes = list(map(hash, values))
        self._alone: dict[int, Delivery] = {}
        """By position those that went another way."""
        self.number = UNKNOWN
        self.unclear = 0
        """How many have failed of which it is not known which."""
        self.refusal: DeliveryError | None = None
        """Why the message behind these could not be sent, nor those behind that one."""

    def __len__(self) -> int:
        return len(self._hashes)

    def end(self, error: Any, message: Any) -> None:
        """As ``Delivery.end`` is called."""
        if error is None:
            return
        self.unclear += 1
        self.client.has_failed = True
        value = message.value()
        delivery = Delivery(self.client, self._topic, value)
        wanted = hash(value)
        for at, one in enumerate(self._hashes):
            if one == wanted and self._alone.setdefault(at, delivery) is delivery:
                delivery.end(error, message)
                self.unclear -= 1
                return

    def alone(self, at: int, value: bytes | None) -> Delivery:
        """The message at this position gets a delivery of its own."""
        found = self._alone[at] = Delivery(self.client, self._topic, value)
        return found

    def end_before(self, at: int, refusal: DeliveryError) -> None:
        """There are no more than these."""
        self.refusal = refusal
        self._alone.pop(at, None)
        del self._hashes[at:]

    @property
    def is_done(self) -> bool:
        """As ``Delivery.is_done``: whether all have."""
        if self.unclear or self.number > self.client.drained:
            return False
        return not self._alone or all(one.is_done for one in list(self._alone.values()))

    @property
    def error(self) -> Any:
        """The first."""
        if not self._alone:
            return None
        errors = (delivery.error for _, delivery in sorted(self._alone.items()))
        return next((error for error in errors if error is not None), None)

    def apart(self) -> list[Delivery]:
        """One for each message, when all have ended."""
        found = []
        for at in range(len(self)):
            delivery = self._alone.get(at)
            if delivery is None:
                delivery = Delivery(self.client, self._topic, None)
                delivery.ended = True
            found.append(delivery)
        return found
