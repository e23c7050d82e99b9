"""What was sent for messages and is not confirmed yet, as far as was looked: of each partition, in order."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .message import Record
from .quick import NotTaken
from .responses import Response

if TYPE_CHECKING:
    from .clients import ProducerClient
    from .consumer import Track
    from .errors import DeliveryError
    from .producer import Producer


class Passed(NamedTuple):
    """A message of which no more is kept than its offset."""

    offset: int


Sent = tuple[Record | Passed, Response, Any]
"""A message, one of its responses, and its delivery."""


class Together(NamedTuple):
    """Messages of which each has one response, and the one delivery of all of them. The messages are not kept: thousands would
    stay until the next commit, and to hand out memory that is in no cache took a twentieth of the time.
    """

    offsets: Sequence[int]
    topic: str
    delivery: Any

    def apart(self) -> list[Sent]:
        deliveries = zip(self.offsets, self.delivery.apart(), strict=True)
        return [(Passed(offset), Response(self.topic, None), delivery) for offset, delivery in deliveries]


def offsets_of(records: Sequence[Record]) -> Sequence[int]:
    first, end = records[0].offset, records[-1].offset + 1
    # in a topic that is compacted or has transactions some are left out
    return range(first, end) if end - first == len(records) else array("q", (record.offset for record in records))


class UnderWay:
    """What was sent for messages of one partition while it was tracked by ``track``."""

    def __init__(self, track: Track, producer: Producer) -> None:
        self.track = track
        self.sent: list[Sent | Together] = []
        """In order."""
        self.sender = Sender(producer, self)

    def __bool__(self) -> bool:
        return bool(self.sent)

    def keep(self, one: Sent | Together) -> None:
        self.sent.append(one)

    @property
    def offset(self) -> int:
        """That of the first message of which something is under way."""
        first = self.sent[0]
        return first.offsets[0] if isinstance(first, Together) else first[0].offset

    @property
    def last_offset(self) -> int:
        """That of the last one."""
        last = self.sent[-1]
        return last.offsets[-1] if isinstance(last, Together) else last[0].offset

    def has_ended(self, client: ProducerClient) -> bool:
        """Whether the first of it has ended, well or badly."""
        return client.ended(self.sent[0][2])

    def let_go(self, client: ProducerClient) -> Counter[str]:
        """Removes what Kafka has confirmed by now, up to the first that it has not. Gives how many were sent to which topic."""
        return self._remove(client.confirmed(self._deliveries()))

    def look(self, client: ProducerClient | None) -> tuple[Counter[str], tuple[Sent, DeliveryError] | None]:
        """The same after a flush: gives also the first that Kafka has not confirmed, and why. No client: it was a test's."""
        sent, count = self.sent, 0
        while count < len(sent):
            one = sent[count]
            problem = None if client is None else client.outcome(one[2])
            if client is not None and problem is not None:
                if not isinstance(one, Together):
                    refused = self._worst(one, sent[count + 1 :], problem, client)
                    return self._remove(count), refused
                if not one.delivery.is_done:  # which of them are is not known
                    first = (Passed(one.offsets[0]), Response(one.topic, None), one.delivery)
                    return self._remove(count), (first, problem)
                sent[count : count + 1] = one.apart()
                continue
            count += 1
        return self._remove(count), None

    def _worst(
        self, first: Sent, later: Sequence[Sent | Together], problem: DeliveryError, client: ProducerClient
    ) -> tuple[Sent, DeliveryError]:
        """If another response to the same message is itself the fault, that one: else the message would be handled for ever."""
        for one in later if problem.passing else ():
            if isinstance(one, Together) or one[0] is not first[0]:
                break
            found = client.outcome(one[2])
            if found is not None and not found.passing:
                return one, found
        return first, problem

    def clear(self) -> None:
        self.sent.clear()

    def _deliveries(self) -> Iterator[Any]:
        return (one[2] for one in self.sent)

    def _remove(self, count: int) -> Counter[str]:
        confirmed: Counter[str] = Counter()
        for one in self.sent[:count]:
            if isinstance(one, Together):
                confirmed[one.topic] += len(one.offsets)
            else:
                confirmed[one[1].topic] += 1
        del self.sent[:count]
        return confirmed


class Sender:
    """A ``Send`` which keeps what is under way. What is looked up here is not looked up for each message."""

    def __init__(self, producer: Producer, under_way: UnderWay) -> None:
        self._producer = producer
        self._under_way = under_way
        self._generation = -1
        self._client: ProducerClient | None = None

    def _here(self) -> ProducerClient | None:
        if self._generation != self._producer.generation:  # none was looked up, or it was replaced since
            self._generation, self._client = self._producer.generation, self._producer.here
        return self._client

    def __call__(self, record: Record, responses: Sequence[Response]) -> None:
        client, start = self._here(), self._producer.start
        for response in responses:
            self._under_way.keep((record, response, start(response, client)))

    def together(self, records: Sequence[Record], topic: str, values: Sequence[bytes | None], parser: Any) -> None:
        """One response for each record. Raises ``NotTaken``."""
        taken = 0
        try:
            client = self._here()
            # one by itself keeps its record: that Kafka has refused it is not to be found out again and again
            delivery = self._producer.start_together(topic, values, client) if len(values) > 1 else None
            if delivery is not None:
                taken = len(delivery)
                if taken:
                    kept = records if taken == len(values) else records[:taken]
                    self._under_way.keep(Together(offsets_of(kept), topic, delivery))
                if delivery.refusal is not None:
                    raise delivery.refusal
                return
            for record, value in zip(records, values, strict=True):
                response = Response(topic, value, parser=parser)
                self._under_way.keep((record, response, self._producer.start(response, client)))
                taken += 1
        except (Exception, SystemExit) as error:
            raise NotTaken(taken, error) from error
