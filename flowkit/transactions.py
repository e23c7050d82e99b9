"""The transactional routes of one group: what their handlers send, and how far they have come, count together or not at all.

Responses wait in memory until their slice is settled. Only then a transaction is begun, filled and committed together with the
offsets, which takes milliseconds however long handlers do; so one that was left open by a killed process is rare, and short.
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .clients import CommitRefused, InDoubt, TransactionalClient
from .errors import BrokerUnavailable, DeliveryError, FlowkitError
from .message import Partition, Record, places
from .producer import FLUSH_TIMEOUT
from .responses import Response
from .settings import Kafka, Settings

if TYPE_CHECKING:
    from .consumer import Consumer, Track

logger = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A message that is handled, or the first one of a batch, and what comes of it. ``track`` is that of its partition when its
    handler began.
    """

    partition: Partition
    track: Track
    record: Record
    responses: Sequence[Response]


class Fault(Exception):
    """A transaction failed, and nothing of it was committed.

    ``at`` and ``topic``: the message that cannot be sent, and where to, if that is known.
    """

    def __init__(
        self, error: DeliveryError | BrokerUnavailable, at: int | None = None, topic: str | None = None
    ) -> None:
        super().__init__(error)
        self.error = error
        self.at = at
        self.topic = topic


class Transactions:
    """Used by one loop, on its thread."""

    def __init__(self, loop: Consumer) -> None:
        self.loop = loop
        # A static member comes back under the same name, and then ends at once what its last process has left open.
        name = loop.settings.kafka.group_instance_id or uuid.uuid4().hex
        self.id = f"{loop.group}-{name}"
        self._waiting: list[Entry] = []
        self._client: TransactionalClient | None = None

    # What a handler sends.

    def add(self, partition: Partition, track: Track, record: Record, responses: Sequence[Response]) -> None:
        """Keeps the responses of a message until ``settle``."""
        self._waiting.append(Entry(partition, track, record, responses))

    def unsettled(self) -> dict[Partition, int]:
        """Of each partition the first message that is handled, but whose transaction is not committed yet."""
        offsets: dict[Partition, int] = {}
        for entry in self._waiting:
            offsets.setdefault(entry.partition, entry.record.offset)
        return offsets

    # One slice.

    def settle(self) -> set[Partition]:
        """Commits what waits. Gives the partitions where that failed: they go on from the first message it failed for.

        Where one message cannot be sent, its transaction is tried again in halves until it is found, for it alone has failed.
        No handler is called again for that, but for the messages of a batch.
        """
        failed: set[Partition] = set()
        if not self._waiting:
            return failed
        alone = self._suspects_first()
        wrong = 0  # among so many of the first there is one that cannot be sent
        while True:
            try:
                membership = self.loop.client.membership()
                self._keep_ours()  # after the membership: with it a broker takes nothing of what leaves from now on
                if not self._waiting:
                    return failed
                size = 1 if alone > 0 else max(1, wrong // 2) if wrong else len(self._waiting)
                size = min(size, len(self._waiting))
                self._commit(self._waiting[:size], self._offsets(size), membership)
            except CommitRefused as error:
                return failed | self._give_up(error)
            except Fault as fault:
                if fault.error.passing:
                    failed |= self._fail(self._concerned(fault, size), fault.error)
                elif size > 1:
                    wrong = size if fault.at is None else fault.at + 1
                    continue
                else:
                    failed |= self._fail(self._waiting[:1], fault.error)
                wrong = 0
            else:
                self._tell(self._waiting[:size])
                del self._waiting[:size]
                wrong = max(0, wrong - size)
            alone -= 1

    def _tell(self, entries: Sequence[Entry]) -> None:
        confirmed = Counter(response.topic for entry in entries for response in entry.responses)
        for topic, count in confirmed.items():
            self.loop.monitor.notice("responded", topic=topic, count=count)

    def _suspects_first(self) -> int:
        """Moves to the front the messages that have failed before: they are tried one by one. Gives their number."""
        suspects = [entry for entry in self._waiting if entry.record.offset == entry.track.failed_at]
        if suspects:  # each is the first of its partition, so their order stays right
            self._waiting = suspects + [entry for entry in self._waiting if entry not in suspects]
        return len(suspects)

    def _keep_ours(self) -> None:
        """Forgets the messages of partitions that left while handlers ran: somebody else handles them, and sends."""
        tracks = self.loop.tracks
        self._waiting = [entry for entry in self._waiting if tracks.get(entry.partition) is entry.track]

    def _offsets(self, size: int) -> dict[Partition, int]:
        """How far the first ``size`` entries bring their partitions, with what was handled behind them and sent nothing.

        None of that has failed: before a failure is dealt with, what waits is settled.
        """
        following: dict[Partition, int] = {}
        for entry in self._waiting[size:]:
            following.setdefault(entry.partition, entry.record.offset)
        offsets = {}
        for partition, track, _, _ in self._waiting[:size]:
            offset = following.get(partition, track.done)
            assert offset is not None, "what waits was handled"
            offsets[partition] = offset
        return offsets

    def _concerned(self, fault: Fault, size: int) -> list[Entry]:
        """The messages that fail for now. If a topic is missing: all that send to it, so that it is waited for once."""
        if fault.topic is None:
            return self._waiting[:size]
        return [entry for entry in self._waiting if any(item.topic == fault.topic for item in entry.responses)]

    def _fail(self, entries: Sequence[Entry], error: FlowkitError) -> set[Partition]:
        """The first of these messages of each partition has failed; those behind it come again."""
        loop = self.loop
        first: dict[Partition, Entry] = {}
        for entry in entries:
            first.setdefault(entry.partition, entry)
        self._waiting = [
            entry
            for entry in self._waiting
            if entry.partition not in first or entry.record.offset < first[entry.partition].record.offset
        ]
        for _, track, record, _ in first.values():
            # before all else, so that nothing is committed past it whatever breaks below
            track.done = record.offset
            track.close_window()
        for partition, (_, track, record, responses) in first.items():
            if partition in loop.left:  # while a hook took long
                continue
            handling = loop.handlings[record.topic]
            if handling.is_copy(responses):
                loop.failing.not_sent(handling, track, record, responses[0], error)
                continue
            apart = not error.passing and handling.take_apart(record)
            problem = DeliveryError(str(error), passing=True) if apart else error
            if loop.failing.failed(handling, track, record, problem):
                loop.client.seek(partition, record.offset + 1)
        return set(first)

    def _give_up(self, error: CommitRefused) -> set[Partition]:
        """The group has moved on: what waits comes again, to somebody."""
        loop = self.loop
        offsets = self.unsettled()
        self._waiting = []
        for partition, offset in offsets.items():
            if (track := loop.tracks.get(partition)) is not None:
                track.done = offset
                track.close_window()
                loop.client.seek(partition, offset)
        loop.refused(offsets, error)
        try:
            # nothing new; but so the client learns now, and not from a heartbeat some time later, that it has to join again
            loop.client.commit(offsets)
        except CommitRefused:
            logger.debug("group %s: its next poll joins it again", loop.group)
        return set(offsets)

    # A message that ends otherwise than with its responses.

    def sender(self, record: Record) -> Finishing:
        """Sends dead letters and the like as ``Producer`` does, but together with the end of their message."""
        return Finishing(self, record)

    def finish(self, record: Record, items: Sequence[Response]) -> None:
        """Sends dead letters and the like in a transaction with the offset after their message.

        Nothing of its partition may wait. Raises ``DeliveryError`` or ``BrokerUnavailable`` where nothing was committed.
        """
        loop = self.loop
        partition = Partition(record.topic, record.partition)
        try:
            membership = loop.client.membership()
            if (track := loop.tracks.get(partition)) is None:
                raise CommitRefused(f"{places([partition])} has left")
            entry = Entry(partition, track, record, items)
            self._commit([entry], {partition: record.offset + 1}, membership)
        except Fault as fault:
            raise fault.error from fault
        except CommitRefused as error:
            raise DeliveryError(f"the group has moved on: {error}", passing=True) from error

    # One transaction.

    def _commit(self, entries: Sequence[Entry], offsets: Mapping[Partition, int], membership: Any) -> None:
        """Raises ``Fault`` or ``CommitRefused`` where nothing was committed; any other error where nobody can say."""
        loop = self.loop
        try:
            client = self.open()
            client.begin()
            deliveries = self._start(entries, client)
            client.flush(FLUSH_TIMEOUT)
            self._look_at(deliveries, client)
            client.commit(offsets, membership)
        except InDoubt as error:
            for partition in offsets:
                loop.tracks[partition].done = None  # so that nothing is committed over what the transaction may have
            self._renew()
            raise FlowkitError(
                f"whether a transaction of {places(list(offsets))} was committed is not known ({error}); the group's offsets"
                " tell where to go on, by a new client"
            ) from error
        except (DeliveryError, BrokerUnavailable) as error:
            self._renew()
            raise Fault(error) from error
        except (CommitRefused, Fault):
            self._renew()
            raise
        except BaseException:  # it ends here, and somebody else may have its id
            self.close(0)
            raise
        for partition, offset in offsets.items():
            loop.tracks[partition].committed = offset

    def _start(self, entries: Sequence[Entry], client: TransactionalClient) -> list[tuple[str, Any]]:
        start = self.loop.producer.start
        deliveries = []
        for at, entry in enumerate(entries):
            for response in entry.responses:
                try:
                    deliveries.append((response.topic, start(response, client)))
                except DeliveryError as error:
                    raise Fault(error, at, response.topic) from error
        return deliveries

    def _look_at(self, deliveries: Sequence[tuple[str, Any]], client: TransactionalClient) -> None:
        """Raises ``DeliveryError`` for one that is not confirmed: if there is any, for one that Kafka refuses."""
        found = None
        for topic, delivery in deliveries:
            error = client.outcome(delivery)
            if error is not None and (found is None or (found.passing and not error.passing)):
                found = DeliveryError(f"{topic}: {error}", passing=error.passing)
        if found is not None:
            raise found

    # Its client.

    def open(self) -> TransactionalClient:
        """The client; made now, if there is none. That ends what another with the same id has left open.

        Raises ``BrokerUnavailable`` and ``ConfigurationError``.
        """
        if self._client is None:
            self._client = self.loop.producer.transactional(self.id)
        return self._client

    def _renew(self) -> None:
        """Throws the client away, and opens the next one at once: readers wait where a transaction is open."""
        self.close(0)
        try:
            self.open()
        except FlowkitError as error:
            logger.warning("group %s: no new transaction for now: %s", self.loop.group, error)

    def drop(self) -> None:
        """Forgets what waits: its messages come again."""
        self._waiting = []

    def drop_from(self, partition: Partition, offset: int) -> None:
        """Forgets what waits of a partition from an offset on."""
        self._waiting = [
            entry for entry in self._waiting if entry.partition != partition or entry.record.offset < offset
        ]

    def close(self, timeout: float) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close(timeout)


class Finishing:
    """Sends as ``Producer.send_all`` does, but in one transaction with the end of a message."""

    def __init__(self, transactions: Transactions, record: Record) -> None:
        self._transactions = transactions
        self._record = record

    def send_all(self, responses: list[Response]) -> None:
        """Raises ``DeliveryError`` or ``BrokerUnavailable`` where nothing was committed."""
        self._transactions.finish(self._record, responses)


def of_committed(settings: Settings) -> Settings:
    """The settings for a group with a transactional route: it reads what was committed only, and is told of offsets by which
    open transactions could still move only when they have ended.
    """
    options = {"isolation_level": "read_committed", **settings.kafka.options}
    kafka = Kafka(**{**vars(settings.kafka), "options": options})
    return Settings(**{**vars(settings), "kafka": kafka})
