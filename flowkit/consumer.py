"""The loop of one group: poll, hand on to the inline or the queued half, commit; and what to do when one of them fails.

One thread runs it and nobody else touches its client. A turn ends with everything settled: each message of the batch is
finished, or its partition has been sought back to it. So a commit may happen at any moment between two turns.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .clients import CommitRefused, ConsumerClient, MakeConsumer
from .dispatch import Handling, Until
from .errors import (
    BrokerUnavailable,
    ConfigurationError,
    DeliveryError,
    FlowkitError,
    is_passing,
)
from .inline import Inline
from .message import Partition, Record, about, place, places
from .producer import Producer
from .retry import Retry
from .settings import Settings

if TYPE_CHECKING:
    from .jobqueue import JobQueue
    from .queueing import Queueing

logger = logging.getLogger(__name__)

POLL_TIMEOUT = 0.5
"""Seconds a poll waits for a message, and so the longest a stop waits for an idle loop."""

MOST_HANDLED, MOST_QUEUED = 500, 5_000
"""Messages of one poll where some are handled here, and where all go to queues: the more in a job, the less each costs."""

MOST_OF_ALL = 50_000
"""Messages of one poll in any case: Redis takes a million arguments in a call at most, and a job has twenty."""

RECONNECT = Retry(first=0.5, cap=15.0)
"""Waits between attempts to reach brokers or Redis."""

SHORTEST_SLICE = 0.05
"""Seconds that handlers run at least before what they did is looked at, however short the commit interval is."""

LONGEST_BATCH = 15.0
"""Seconds after which the loop polls again though its batch is not finished: a rebalance of the group waits for the poll."""


@dataclass(slots=True)
class Track:
    """What the loop knows of one partition that is assigned to it. Offsets are those after the last message."""

    done: int | None = None
    committed: int | None = None
    resume_at: float | None = None
    held: bool = False
    handed: int = 0
    failed_at: int | None = None
    attempt: int = 1
    waits: int = 0

    def attempt_of(self, record: Record) -> int:
        """The number of the next attempt: one message, the first that is not done, may have failed before."""
        return self.attempt if record.offset == self.failed_at else 1

    def count(self, record: Record) -> None:
        """Another failure of a message; ``attempt`` counts those that are its fault, ``waits`` all of them."""
        if record.offset != self.failed_at:
            self.failed_at, self.attempt, self.waits = record.offset, 1, 0
        self.waits += 1


class Consumer:
    """One group's topics, from Kafka to their handlers or queues."""

    reconnect = RECONNECT

    def __init__(
        self,
        group: str,
        handlings: Mapping[str, Handling],
        settings: Settings,
        monitor: Any,
        producer: Producer,
        make_client: MakeConsumer,
        job_queue: JobQueue | None = None,
    ) -> None:
        self.group = group
        self.handlings = handlings
        self.settings = settings
        self.monitor = monitor
        self.producer = producer
        self.make_client = make_client
        self.stopping = False
        self.clean = True
        """Whether, at the end, the offset of every finished message is committed."""
        self.tracks: dict[Partition, Track] = {}
        self.until = Until()
        self.turned_at = time.monotonic()
        self.joined = False
        self._client: ConsumerClient | None = None
        self._new: list[Partition] = []
        self._confirmed: dict[Partition, int] = {}
        self._refused: dict[Partition, int] = {}
        self.received = 0.0
        self.poll_by = 0.0
        self._commit_at = 0.0
        self.since_commit = 0
        self._reconnects = 0
        self.inline = Inline(self)
        self.queueing = self._make_queueing(job_queue)
        self._gathers = not any(handling.inline for handling in handlings.values())
        most = settings.kafka.max_poll_records or (MOST_QUEUED if self._gathers else MOST_HANDLED)
        self.most = min(most, MOST_OF_ALL)

    def _make_queueing(self, job_queue: JobQueue | None) -> Queueing | None:
        if all(handling.inline for handling in self.handlings.values()):
            return None
        from .queueing import Queueing

        return Queueing(self, job_queue)

    # The loop.

    def run(self) -> None:
        """Turns until ``stop``; a broken client is replaced. Raises ``ConfigurationError`` where a new one would not help."""
        self.producer.claim()
        try:
            while not self.stopping:
                try:
                    self.turn()
                    self._reconnects = 0
                except ConfigurationError:
                    raise
                except Exception as error:
                    self._reconnect(error)
        finally:
            self._end()
            self.producer.release()

    def stop(self) -> None:
        """Asks the loop to end after the message in hand. Safe to call from a signal handler."""
        self.stopping = True
        self.until.at = 0.0

    def turn(self) -> None:
        """One poll and all that follows from it."""
        self.turned_at = time.monotonic()
        client = self.client
        if self._gathers and self.queueing is not None:
            self.queueing.gather()
        batch = client.poll(self._poll_timeout(), self.most)
        self.received = time.time()
        self.poll_by = self.clock_starts() + min(LONGEST_BATCH, self.settings.kafka.max_poll_interval / 3)
        self.joined = client.joined()
        if self._new:
            self._welcome()
        queueing = self.queueing
        if queueing is not None:
            queueing.begin_turn()
        queued: dict[Partition, Sequence[Record]] = {}
        for partition, records in batch.items():
            if self.stopping:
                break
            if self.handlings[partition.topic].inline:
                self.inline.take(partition, records)
            else:
                queued[partition] = records
        if queueing is not None and queued:
            queueing.take(queued)
        self.inline.settle()
        if self.commit_due():
            self.commit()
        elif self._confirmed:
            self._note_confirmed()
        self._resume_due()

    @property
    def client(self) -> ConsumerClient:
        """The Kafka client of this loop, made when first asked for."""
        if self._client is None:
            client = self.make_client(self.settings, self.group)
            self._client = client
            client.subscribe(sorted(self.handlings), self)
            self._look_for_topics(client)
        return self._client

    def _look_for_topics(self, client: ConsumerClient) -> None:
        """Says which topics are missing, before the first message finds out."""
        answers = {topic for handling in self.handlings.values() for topic in handling.sends_to}
        missing = client.missing_topics(sorted(answers | set(self.handlings)))
        create = "create it (`flowkit topics --create`)"
        for topic in missing:
            if topic in self.handlings:
                what = f"group {self.group!r} waits for it: {create}, and it is consumed within half a minute"
            else:
                what = f"handlers send to it: {create}, or their messages fail and wait"
            self.monitor.notice_error(
                "topics",
                ConfigurationError("missing topic"),
                message=f"there is no topic {topic!r} on the brokers; {what}",
                topic=topic,
                group=self.group,
            )

    def _poll_timeout(self) -> float:
        due = [track.resume_at for track in self.tracks.values() if track.resume_at is not None]
        longest = min(POLL_TIMEOUT, self.queueing.patience) if self.queueing is not None else POLL_TIMEOUT
        return min(longest, max(0.0, min(due) - time.monotonic())) if due else longest

    def clock_starts(self) -> float:
        """Lets handlers run until the next commit is due."""
        now = time.monotonic()
        if not self.stopping:
            self.until.at = now + max(SHORTEST_SLICE, self.settings.kafka.offset_commit_interval)
            if self.stopping:  # a signal came between the two lines above
                self.until.at = 0.0
        return now

    # What both halves need.

    def tell_consumed(self, partition: Partition, count: int) -> None:
        if count:
            topic, number = partition
            self.monitor.notice("consumed", topic=topic, partition=number, count=count, group=self.group)

    def may_start(self, partition: Partition, track: Track, first: Record) -> bool:
        """False if these messages must wait: they are polled again.

        Either their partition was put back in this turn (or the client gave what it had fetched before its pause), or it
        is time to poll.
        """
        if track.resume_at is None and not track.held and time.monotonic() <= self.poll_by:
            return True
        self.client.seek(partition, first.offset if track.done is None else min(track.done, first.offset))
        return False

    def track(self, partition: Partition) -> Track:
        try:
            return self.tracks[partition]
        except KeyError:  # a new client starts from the committed offset, so nothing is skipped
            raise FlowkitError(
                f"{places([partition])} gave messages, but was not assigned to this consumer"
            ) from None

    # Failure: this partition alone waits, and the message is tried again, for ever or until its dead letter is sent.

    def failed(self, handling: Handling, track: Track, record: Record, error: Exception) -> bool:
        """True if the message is done with: its dead letter was sent. Else its partition waits, and starts with it."""
        track.count(record)
        attempt, retry = track.attempt, handling.retry
        passing = is_passing(error)
        last = attempt >= retry.attempts and handling.dead_letter is not None and not passing
        delay = retry.delay(track.waits)
        if last:
            then = f"goes to {handling.dead_letter}"
        else:
            then = f"again in {delay:.1f} s; partition {record.partition} of {record.topic} waits, nothing is skipped"
            if attempt >= retry.attempts and handling.dead_letter is None and not passing:
                then += "; to let such messages go, name a topic for them: dead_letter=..."
        what = "failed in" if handling.inline else "could not be queued for"
        self.monitor.notice_error(
            "failed",
            error,
            message=f"{place(record)} {what} {handling.route.name}, attempt {attempt}, {then}:"
            f" {type(error).__name__}: {error}",
            traceback=attempt == 1 and not isinstance(error, FlowkitError),
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            group=self.group,
            attempt=attempt,
            last=last,
        )
        handling.failed(record, error, attempt, self.received, last=last)
        if last and self._bury(handling, record, error, attempt):
            track.done = record.offset + 1
            track.failed_at = None
            return True
        self.put_back(Partition(record.topic, record.partition), track, record.offset, delay)
        track.attempt = attempt if passing else attempt + 1  # Kafka's absence is no fault of the message
        self.monitor.notice("retried", **about(record, self.group), attempt=track.attempt, delay=delay)
        return False

    def _bury(self, handling: Handling, record: Record, error: Exception, attempt: int) -> bool:
        letter = handling.dead(record, error, attempt)
        try:
            self.producer.send_all([letter])
        except (DeliveryError, BrokerUnavailable) as problem:
            self.monitor.notice_error("delivery", problem, topic=letter.topic)
            return False
        self.monitor.notice("dead", **about(record, self.group), attempt=attempt, dead_letter=letter.topic)
        return True

    def put_back(self, partition: Partition, track: Track, offset: int, delay: float) -> None:
        track.done = offset
        self.client.pause(partition)
        self.client.seek(partition, offset)
        track.resume_at = time.monotonic() + delay

    def hold(self, partition: Partition) -> None:
        """This partition waits until ``let_go``; what the client has of it is polled again."""
        self.track(partition).held = True
        self.client.pause(partition)

    def let_go(self, partition: Partition) -> None:
        """The inverse of ``hold``."""
        track = self.track(partition)
        track.held = False
        if track.resume_at is None:
            self.client.resume(partition)

    def _resume_due(self) -> None:
        """Lets partitions go on whose wait is over; says of those that went on that they did."""
        now = time.monotonic()
        for partition, track in self.tracks.items():
            if track.failed_at is not None and track.done is not None and track.done > track.failed_at:
                where = f"{places([partition])}@{track.failed_at}"
                self.monitor.notice("recovered", message=where, failures=track.waits, group=self.group)
                track.failed_at = None
            if track.resume_at is not None and track.resume_at <= now:
                track.resume_at = None
                if not track.held:
                    self.client.resume(partition)

    # Offsets.

    def commit_due(self) -> bool:
        kafka = self.settings.kafka
        threshold = kafka.offset_commit_threshold
        return time.monotonic() >= self._commit_at or bool(threshold and self.since_commit >= threshold)

    def _uncommitted(self, partitions: Sequence[Partition] | None = None) -> dict[Partition, int]:
        """The offsets to commit; what is not yet settled does not count."""
        unsettled = self.inline.unsettled()
        offsets = {}
        for partition, track in self.tracks.items():
            if track.done is None or (partitions is not None and partition not in partitions):
                continue
            done = min(track.done, unsettled.get(partition, track.done))
            if done != track.committed:
                offsets[partition] = done
        return offsets

    def commit(self) -> None:
        """Commits what is finished. Where the group has moved on, the messages come again, to somebody."""
        self._commit_at = time.monotonic() + self.settings.kafka.offset_commit_interval
        self.since_commit = 0
        offsets = self._uncommitted()
        if not offsets:
            return
        try:
            self.client.commit(offsets)
        except CommitRefused as error:
            self._refused.update(offsets)
            logger.warning("group %s: the commit came too late, its messages come again: %s", self.group, error)
            return
        for partition, offset in offsets.items():
            if partition in self.tracks:
                self.tracks[partition].committed = offset
        self._confirmed.update(offsets)
        self._note_confirmed()

    def _note_confirmed(self) -> None:
        """Notes in Redis what Kafka has confirmed, here and in rebalances."""
        confirmed, self._confirmed = self._confirmed, {}
        if confirmed and self.queueing is not None:
            self.queueing.confirmed(confirmed)

    # Rebalances. These four come from within a poll or a close, maybe on the client's own thread.

    def assigned(self, partitions: Sequence[Partition]) -> None:
        self._new.extend(partition for partition in partitions if partition not in self.tracks)

    def revoked(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        offsets = self._uncommitted(partitions)
        if partitions:
            self.monitor.notice("rebalanced", group=self.group, revoked=places(partitions))
        self._forget(partitions)
        return offsets

    def confirmed(self, offsets: Mapping[Partition, int]) -> None:
        self._confirmed.update(offsets)
        for partition in offsets:
            self._refused.pop(partition, None)

    def lost(self, partitions: Sequence[Partition]) -> None:
        logger.warning("group %s lost %s; what was not committed comes again", self.group, places(partitions))
        self.monitor.notice("rebalanced", group=self.group, lost=places(partitions))
        self.joined = False
        self._forget(partitions)

    def _forget(self, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            self.tracks.pop(partition, None)
        self._new = [partition for partition in self._new if partition not in partitions]
        if self.queueing is not None:
            self.queueing.forget(partitions)

    def _welcome(self) -> None:
        """Starts to track the partitions that were assigned in this poll, before their first record is touched."""
        new = self._new
        self.monitor.notice("rebalanced", group=self.group, assigned=places(new))
        for partition in new:
            self.tracks[partition] = Track()
            self.client.resume(partition)  # the client keeps the pause of a partition that leaves and comes back
            if self.queueing is not None:
                self.queueing.welcome(partition)
        self._new = []

    # Trouble and the end.

    def _reconnect(self, error: Exception) -> None:
        """Throws the client away: after an error, kafka-python's poll() may spin for ever on its next call."""
        self._reconnects += 1
        delay = self.reconnect.delay(self._reconnects)
        self.monitor.notice_error(
            "broker",
            error,
            message=f"group {self.group!r}: {error if isinstance(error, FlowkitError) else repr(error)};"
            f" trying again in {delay:.1f} s, nothing is lost",
            traceback=not isinstance(error, FlowkitError),
            group=self.group,
        )
        self._drop_client(2.0)
        until = time.monotonic() + delay
        while not self.stopping and time.monotonic() < until:
            time.sleep(0.05)
            self.turned_at = time.monotonic()

    def _drop_client(self, timeout: float) -> None:
        client, self._client = self._client, None
        self.joined = False
        if client is not None:
            try:
                client.close(timeout)
            except Exception as error:
                logger.warning("group %s: closing its client failed: %r", self.group, error)
        self._note_confirmed()
        self._forget([*self.tracks, *self._new])
        self.inline.drop()

    def _end(self) -> None:
        """Settles and commits what is finished, and leaves the group, so that another member may go on at once."""
        self._refused.clear()
        if self._client is not None:
            try:
                self.inline.settle()
                if self.queueing is not None:
                    self.queueing.end()
                self.commit()
            except Exception as error:
                self.clean = False
                self.monitor.notice_error("stop", error, group=self.group)
        self._drop_client(min(5.0, self.settings.shutdown_timeout))
        self.clean = self.clean and not self._refused
