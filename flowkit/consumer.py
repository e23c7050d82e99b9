"""The loop of one group: poll, hand on to the inline or the queued half, commit; and what to do when one of them fails.

One thread runs it, and nobody else touches its client unless a handler or hook takes long: see ``Loan``. At the end of a turn
each message of the batch is finished, or its partition has been sought back to it. What finished messages sent may still be
under way: before a commit, and before their partition leaves, it is settled, so that no offset is ahead of a response.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .clients import CommitRefused, ConsumerClient, MakeConsumer, Unreadable
from .dispatch import Handling, Until
from .errors import (
    ConfigurationError,
    FlowkitError,
    Stopped,
)
from .failing import Failing
from .inline import Inline
from .loan import Loan
from .lookout import Lookout
from .message import Partition, Record, places
from .producer import Producer
from .retry import Retry
from .retrytopics import left_over, with_retry_topics
from .settings import Settings

if TYPE_CHECKING:
    from .jobqueue import JobQueue
    from .parallel import Window
    from .queueing import Queueing

logger = logging.getLogger(__name__)

POLL_TIMEOUT = 0.5
"""Seconds a poll waits for a message, and so the longest a stop waits for an idle loop."""

MOST_HANDLED, MOST_QUEUED = 500, 5_000
"""Messages of one poll where some are handled here, and where all go to queues: the more in a job, the less each costs. In
transactions too."""

FOR_EACH, SHORT = 5, 0.1
"""Messages of one poll for each partition, since kafka-python looks at all of them in each; where the batch before was over in
so many seconds. A batch that is not over in time would be read again, and the partitions at its end never have their turn.
"""

LOOK_EVERY = 0.05
"""Seconds between two looks, where messages come all the time, at what changes seldom: topics, brokers, the membership."""

ROUNDS = 20
"""Messages of one poll for each that may be handled at once."""

MOST_OF_ALL = 50_000
"""Messages of one poll in any case: Redis takes a million arguments in a call at most, and a job has twenty."""

WAITING_POLL = 0.02
"""The same while Kafka has not confirmed every response: where no message comes, they are waited for."""

RECONNECT = Retry(first=0.5, cap=15.0)
"""Waits between attempts to reach brokers or Redis."""

SHORTEST_SLICE = 0.05
"""Seconds that handlers run at least before what they did is looked at, however short the commit interval is."""

LATE_COMMIT = 10.0
"""Seconds after which a commit that was not waited for is made once more, and waited for."""

LONGEST_BATCH = 15.0
"""Seconds after which the loop polls again though its batch is not finished: a rebalance of the group waits for the poll."""


@dataclass(slots=True)
class Track:
    """What the loop knows of one partition that is assigned to it. Offsets are those after the last message."""

    begun: int | None = None
    done: int | None = None
    committed: int | None = None
    resume_at: float | None = None
    held: bool = False
    handed: int = 0
    failed_at: int | None = None
    attempt: int = 1
    waits: int = 0
    topic_id: str | None = None
    awaited: int | None = None
    alone_to: int | None = None
    """The last of the messages that are handled and sent one by one: see ``Inline._goes_alone``."""
    window: Window | None = None
    """What its route has of it, if that handles many messages at once."""

    def close_window(self) -> None:
        """What was handled ahead, and what is in hand, is forgotten: its messages come again."""
        if self.window is not None:
            self.window.close()
            self.window = None

    def attempt_of(self, record: Record) -> int:
        """The number of the next attempt: one message, the first that is not done, may have failed before."""
        return self.attempt if record.offset == self.failed_at else 1

    def count(self, offset: int) -> None:
        """Another failure of a message; ``attempt`` counts those that are its fault, ``waits`` all of them."""
        if offset != self.failed_at:
            self.failed_at, self.attempt, self.waits = offset, 1, 0
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
        self.handlings = with_retry_topics(handlings)
        self.settings = settings
        self.monitor = monitor
        self.producer = producer
        self.claim: str | None = None
        self.make_client = make_client
        self.stopping = False
        self.stopping_for: Stopped | None = None
        """Why it ends by itself."""
        self.clean = True
        """Whether, at the end, the offset of every finished message is committed."""
        self.tracks: dict[Partition, Track] = {}
        self._troubled: set[Partition] = set()
        """Those that wait or have failed, and maybe others: a look at all of thousands would be most of a turn."""
        self.until = Until()
        self.turned_at = time.monotonic()
        """When the turn began that is under way, on the clock of ``time.monotonic()``."""
        self.joined = False
        self._client: ConsumerClient | None = None
        self.loan = Loan(self)
        self.new: list[Partition] = []
        """Assigned, and not tracked yet."""
        self.left: dict[Partition, Track] = {}
        """What has left since the batch in hand was polled."""
        self.batch: Mapping[Partition, Sequence[Record]] = {}
        self._lost: dict[Partition, Track] = {}
        self._silent = self._silent_before = 0.0
        self._polled_at = self.turned_at
        self._begun: dict[Partition, int] = {}
        """Offsets whose commit is under way."""
        self._passed: dict[Partition, tuple[str | None, int]] = {}
        """Of partitions that left, of those handled many at once: the id of their topic, and how far they were passed."""
        self._begun_at = 0.0
        self._confirmed: dict[Partition, int] = {}
        self._refused: dict[Partition, int] = {}
        self.received = 0.0
        self.poll_by = 0.0
        self._commit_at = 0.0
        self.since_commit = 0
        self._reconnects = 0
        self._behind: dict[Partition, int] = {}
        self.lookout = Lookout(self)
        self.failing = Failing(self)
        self._gathers = not any(handling.inline for handling in handlings.values())
        self.usual = self._usual_poll()
        """Messages of one poll, if no option says otherwise."""
        self.inline = Inline(self)
        self.queueing = self._make_queueing(job_queue)
        self._was_short = False
        self._look_at = self._tell_at = 0.0
        self._consumed: dict[Partition, int] = {}
        # for what is asked in each turn
        kafka = settings.kafka
        self.threshold = kafka.offset_commit_threshold
        self.longest_batch = min(LONGEST_BATCH, kafka.max_poll_interval / 3)
        """Seconds after which the loop is to poll again."""
        self._slice = max(SHORTEST_SLICE, kafka.offset_commit_interval)
        self._more_in_poll = kafka.max_poll_records is None and not self.threshold

    def _usual_poll(self) -> int:
        handlings = self.handlings.values()
        many = self._gathers or any(handling.transactional for handling in handlings)
        wanted = [max(handling.max_batch, ROUNDS * handling.concurrency) for handling in handlings]
        return max([MOST_QUEUED if many else MOST_HANDLED, *wanted])

    @property
    def most(self) -> int:
        """Messages that a poll may give."""
        if self._was_short and self._more_in_poll:
            return max(self.usual, min(FOR_EACH * len(self.tracks), MOST_QUEUED))
        return min(self.settings.kafka.max_poll_records or self.usual, MOST_OF_ALL)

    def _make_queueing(self, job_queue: JobQueue | None) -> Queueing | None:
        if all(handling.inline for handling in self.handlings.values()):
            return None
        from .queueing import Queueing

        return Queueing(self, job_queue)

    # The loop.

    def run(self) -> None:
        """Turns until ``stop``; a broken client is replaced. Raises ``ConfigurationError`` where a new one would not help, and
        ``Stopped`` after a message at which the application is to stop, or where another process has taken this one's place.
        """
        self.claim = self.producer.claim()
        try:
            while not self.stopping:
                try:
                    self.turn()
                    self._reconnects = 0
                    self._behind.clear()  # it comes again
                except (ConfigurationError, Stopped):
                    raise
                except Exception as error:
                    self._reconnect(error)
        finally:
            self._end()
            self.inline.close()
            self.producer.release()
        if self.stopping_for is not None:
            raise self.stopping_for

    def stop(self) -> None:
        """Asks the loop to end after the message in hand. Safe to call from a signal handler."""
        self.stopping = True
        self.until.at = 0.0

    def turn(self) -> None:
        """One poll and all that follows from it."""
        self.turned_at = time.monotonic()
        self._silent_before, self._silent = self._silent, 0.0
        if (error := self.loan.error) is not None:
            raise error
        client = self.client
        if self._gathers and self.queueing is not None:
            self.queueing.gather()
        batch: Mapping[Partition, Sequence[Record]] = {}
        unreadable = None
        crowd = self.inline.crowd
        if crowd is None or crowd.may_poll():
            self.about_to_poll()
            try:
                batch = client.poll(self._poll_timeout(), self.most)
            except Unreadable as error:
                unreadable = error
        self.received = time.time()
        polled_at = self.clock_starts()
        self.poll_by = polled_at + self.longest_batch
        queueing = self.queueing
        self.batch = batch
        self.left.clear()
        looks = (
            polled_at >= self._look_at
            or not batch
            or self.new
            or queueing is not None
            or self.lookout.sees_another(client)
        )
        if self.new:
            self.welcome()
        if unreadable is not None:
            self.lookout.set_aside(unreadable)
        anew: set[Partition] = set()
        if looks:
            self._look_at = polled_at + LOOK_EVERY
            self.joined = client.joined()
            self.lookout.for_brokers(client)
            anew = self.lookout.for_other_topics(client)
        if queueing is not None:
            queueing.begin_turn()
        if crowd is not None:
            batch = crowd.take({partition: records for partition, records in batch.items() if partition not in anew})
        queued: dict[Partition, Sequence[Record]] = {}
        for partition, records in batch.items():
            if partition in self.left or partition in anew:
                continue
            if self.stopping and self.track(partition).window is None:
                continue
            if self.handlings[partition.topic].inline:
                self.inline.take(partition, records)
            else:
                queued[partition] = records
        if queueing is not None and queued:
            queueing.take(queued)
        now = time.monotonic()
        self._was_short = now - polled_at < SHORT
        due = self.commit_due(now)
        self.inline.settle_if_due(commits=due)
        if due:
            self.commit()
        elif self._confirmed:
            self._note_confirmed()
        if self._troubled:
            self._resume_due()
        if self._consumed and (now >= self._tell_at or not batch):
            self._tell_at = now + LOOK_EVERY
            self._tell_consumed()

    @property
    def stands_since(self) -> float:
        """When the turn began that is under way, or the message that is in hand for longest, of those handled many at once; on
        the clock of ``time.monotonic()``.
        """
        oldest = self.inline.crowd.oldest if self.inline.crowd is not None else None
        return self.turned_at if oldest is None else min(self.turned_at, oldest)

    def about_to_poll(self) -> None:
        """Called before each poll, whoever does it: for how long none was is why a membership is lost."""
        now = time.monotonic()
        self._silent, self._polled_at = max(self._silent, now - self._polled_at), now

    @property
    def client(self) -> ConsumerClient:
        """The Kafka client of this loop, made when first asked for."""
        if self._client is None:
            self.inline.open()
            client = self.make_client(self._client_settings, self.group)
            self._client = client
            self.handlings.update(left_over(self.handlings, client))
            client.subscribe(sorted(self.handlings), self)
            self.lookout.begin(client)
        return self._client

    @property
    def is_without_client(self) -> bool:
        """Whether there is none now, or the last one is being closed."""
        return self._client is None

    @property
    def _client_settings(self) -> Settings:
        if self.inline.transactions is None:
            return self.settings
        from .transactions import of_committed

        return of_committed(self.settings)

    def read_anew(self, partition: Partition, topic_id: str) -> None:
        """Its topic is another one now, of the same name: starts at the first message."""
        self.tracks[partition].close_window()
        track = self.tracks[partition] = Track(topic_id=topic_id, held=self.tracks[partition].held)
        self._begun.pop(partition, None)
        self.client.seek(partition, 0)
        if not track.held:
            self.client.resume(partition)
        if self.queueing is not None and not self.handlings[partition.topic].inline:
            self.queueing.made_anew(partition, track)

    def _poll_timeout(self) -> float:
        longest = min(POLL_TIMEOUT, self.queueing.patience) if self.queueing is not None else POLL_TIMEOUT
        if self.inline.waits:
            longest = min(longest, WAITING_POLL)
        if self.inline.crowd is not None and self.inline.crowd.is_busy:
            longest = min(longest, self.inline.crowd.peek)
        if not self._troubled:
            return longest
        tracks = (self.tracks[partition] for partition in self._troubled if partition in self.tracks)
        due = [track.resume_at for track in tracks if track.resume_at is not None]
        return min(longest, max(0.0, min(due) - time.monotonic())) if due else longest

    def clock_starts(self) -> float:
        """Lets handlers run until the next commit is due."""
        now = time.monotonic()
        if not self.stopping:
            self.until.at = now + self._slice
            if self.stopping:  # a signal came between the two lines above
                self.until.at = 0.0
        return now

    # What both halves need.

    def count_consumed(self, partition: Partition, count: int) -> None:
        if count:
            self._consumed[partition] = self._consumed.get(partition, 0) + count

    def _tell_consumed(self) -> None:
        """Of messages that come all the time it is told as seldom as what changes seldom is looked at."""
        consumed, self._consumed = self._consumed, {}
        for (topic, number), count in consumed.items():
            self.monitor.notice("consumed", topic=topic, partition=number, count=count, group=self.group)

    def may_start(self, partition: Partition, track: Track, records: Sequence[Record]) -> bool:
        """False if these messages must wait: they are polled again.

        Either their partition was put back in this turn (or the client gave what it had fetched before its pause), or it
        is time to poll.
        """
        if track.resume_at is None and not track.held and time.monotonic() <= self.poll_by:
            return True
        first = records[0].offset
        self.client.seek(partition, first if track.done is None else min(track.done, first))
        return False

    def track(self, partition: Partition) -> Track:
        try:
            return self.tracks[partition]
        except KeyError:  # a new client starts from the committed offset, so nothing is skipped
            raise FlowkitError(
                f"{places([partition])} gave messages, but was not assigned to this consumer"
            ) from None

    def put_back(self, partition: Partition, track: Track, offset: int, delay: float) -> None:
        track.done = offset
        if track.window is not None:
            track.window.rewind(offset)
        self.wait(partition, track, time.monotonic() + delay)
        self.client.seek(partition, offset)

    def wait(self, partition: Partition, track: Track, until: float) -> None:
        """Nothing is read of this partition until then, on the clock of ``time.monotonic()``."""
        self.client.pause(partition)
        self.tracks.get(partition, track).resume_at = until  # in the place of which there may be another since
        self._troubled.add(partition)

    def look_at(self, partition: Partition) -> None:
        """It has come with what is known of it, maybe that it has failed or waits."""
        self._troubled.add(partition)

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
        for partition in list(self._troubled):
            track = self.tracks.get(partition)
            if track is None:
                self._troubled.discard(partition)
                continue
            if track.failed_at is not None and track.done is not None and track.done > track.failed_at:
                where = f"{places([partition])}@{track.failed_at}"
                self.monitor.notice("recovered", message=where, failures=track.waits, group=self.group)
                track.failed_at = None
            if track.resume_at is not None and track.resume_at <= now:
                track.resume_at = None
                if not track.held:
                    self.client.resume(partition)
            if track.failed_at is None and track.resume_at is None:
                self._troubled.discard(partition)

    # Offsets.

    def commit_due(self, now: float) -> bool:
        return now >= self._commit_at or self.enough_to_commit()

    def enough_to_commit(self) -> bool:
        """Whether so many messages are finished that their offsets are to be committed before any other one."""
        return bool(self.threshold and self.since_commit >= self.threshold)

    def _uncommitted(self, partitions: Sequence[Partition] | None = None) -> dict[Partition, int]:
        """The offsets to commit; what is not yet settled does not count."""
        unsettled = self.inline.unsettled()
        offsets = {}
        for partition, track in self.tracks.items():
            if track.done is None or (partitions is not None and partition not in partitions):
                continue
            if self._client is not None and track.topic_id not in (None, self._client.topic_id(partition.topic)):
                continue  # it would be taken for an offset of the topic that has this name now
            done = min(track.done, unsettled.get(partition, track.done))
            if done != track.committed:
                offsets[partition] = done
        return offsets

    def commit(self, *, wait: bool = False) -> None:
        """Commits what is finished. Where the group has moved on, the messages come again, to somebody.

        Where nothing hangs on it and the client can, it is not waited for: else a message that comes meanwhile would wait too.
        """
        client, offsets, now = self.client, self._uncommitted(), time.monotonic()
        waits = wait or self.threshold or self.queueing is not None or self.inline.transactions is not None
        begin = None if waits else getattr(client, "begin_commit", None)
        if self._begun and begin is not None:
            if now < self._begun_at + LATE_COMMIT:
                self._commit_at = now + self.settings.kafka.offset_commit_interval
                return  # one after the other: else the one before might count
            begin = None
        if self.inline.waits and not offsets:
            return  # as soon as Kafka has confirmed something
        self._commit_at = now + self.settings.kafka.offset_commit_interval
        self.since_commit = 0
        if not offsets:
            return
        try:
            if begin is not None:
                begin(offsets)
                self._begun, self._begun_at = offsets, now
                return
            self._begun = {}
            client.commit(offsets)
        except CommitRefused as error:
            self.refused(offsets, error)
            return
        for partition, offset in offsets.items():
            if partition in self.tracks:
                self.tracks[partition].committed = offset
        self._confirmed.update(offsets)
        self._note_confirmed()

    def refused(self, offsets: Mapping[Partition, int], error: CommitRefused) -> None:
        """Kafka has not taken these offsets, because the group has moved on."""
        self._refused.update(offsets)
        for partition in offsets:
            self._begun.pop(partition, None)
        logger.warning("group %s: the commit came too late, its messages come again: %s", self.group, error)

    def _note_confirmed(self) -> None:
        """Notes in Redis what Kafka has confirmed, here and in rebalances."""
        confirmed, self._confirmed = self._confirmed, {}
        if confirmed and self.queueing is not None:
            self.queueing.confirmed(confirmed)

    # Rebalances. These, and ``refused``, come from within a poll or a close, maybe on the client's own thread.

    def assigned(self, partitions: Sequence[Partition]) -> None:
        self.new.extend(partition for partition in partitions if partition not in self.tracks)

    def revoked(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        self.inline.leave(partitions, finish=True)
        offsets = self._uncommitted(partitions)
        self._note_passed(partitions)
        for partition in partitions:
            self.forget_lost(partition)
        if partitions:
            self.monitor.notice("rebalanced", group=self.group, revoked=places(partitions))
        self._forget(partitions)
        return offsets

    def confirmed(self, offsets: Mapping[Partition, int]) -> None:
        self._confirmed.update(offsets)
        for partition, offset in offsets.items():
            if self._begun.get(partition) == offset:  # and not of a topic that is another one now
                del self._begun[partition]
                self.tracks[partition].committed = offset
            elif partition in self.left:
                self.left[partition].committed = offset
            for noted in (self._refused, self._behind):
                if noted.get(partition, offset) <= offset:
                    noted.pop(partition, None)

    def lost(self, partitions: Sequence[Partition]) -> None:
        kafka, silent = (
            self.settings.kafka,
            max(self._silent, self._silent_before),
        )  # a client may find out a poll later
        too_long = silent > min(kafka.session_timeout, kafka.max_poll_interval)
        why = (
            f". It had not polled for {silent:.0f} s: raise kafka.session_timeout ({kafka.session_timeout:g} s) and"
            f" kafka.max_poll_interval ({kafka.max_poll_interval:g} s), or let RQ do the work (inline=False)"
        )
        logger.warning(
            "group %s lost %s; what was not committed comes again%s",
            self.group,
            places(partitions),
            why if too_long else "",
        )
        self.monitor.notice("rebalanced", group=self.group, lost=places(partitions))
        self.joined = False
        self.inline.leave(partitions)
        self._note_passed(partitions)
        unsettled = self.inline.unsettled()
        for partition in partitions:
            track = self.tracks.get(partition)
            if track is not None and track.done is not None and self.handlings[partition.topic].inline:
                track.done = min(track.done, unsettled.get(partition, track.done))
                self._lost[partition] = track
        self._forget(partitions)

    def _note_passed(self, partitions: Sequence[Partition]) -> None:
        """The client may have read far beyond that, and kafka-python goes on there with a partition that comes back at once."""
        unsettled = self.inline.unsettled()
        for partition in partitions:
            track = self.tracks.get(partition)
            if track is not None and track.done is not None and self.inline.is_at_once(partition):
                self._passed[partition] = track.topic_id, min(track.done, unsettled.get(partition, track.done))

    def _forget(self, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            track = self.tracks.pop(partition, None)
            if track is not None:
                self.left[partition] = track
                track.close_window()
            self._begun.pop(partition, None)
        self.new = [partition for partition in self.new if partition not in partitions]
        if self.queueing is not None:
            self.queueing.forget(partitions)

    def moved(self, partition: Partition, before: int, after: int) -> None:
        track = self.tracks.get(partition)
        if track is not None and after < before:  # other messages are at those offsets now
            track.close_window()
            # so that what was sent for those that were there is no matter of theirs
            self.tracks[partition] = replace(track)
            if self.inline.is_at_once(partition):  # else the first of them would have set this by now
                self.tracks[partition] = Track(
                    done=after, topic_id=track.topic_id, held=track.held, resume_at=track.resume_at
                )
                self._begun.pop(partition, None)
        self.lookout.tell_gone(partition, before, after)

    def may_keep(self, partition: Partition) -> bool:
        """Whether one that left while a message of it was in hand, and came back, may go on with what is known of it."""
        return self.handlings[partition.topic].inline or self.queueing is None or self.queueing.ahead is None

    def welcome(self) -> None:
        """Starts to track the partitions that were assigned in this poll, before their first record is touched."""
        new = self.new
        self.monitor.notice("rebalanced", group=self.group, assigned=places(new))
        for partition in new:
            self.tracks[partition] = self._taken_up(partition) or self._gone_back(partition)
            self.look_at(partition)
            self.tracks[partition].topic_id = self.client.topic_id(partition.topic)
            if self.handlings[partition.topic].due_after is not None:
                self._leave_none_out(partition)
            self.client.resume(partition)  # the client keeps the pause of a partition that leaves and comes back
            if self.queueing is not None:
                self.queueing.welcome(partition)
        self.new = []

    def _leave_none_out(self, partition: Partition) -> None:
        """What waits in a retry topic is read from its first message on, wherever a group without offsets begins."""
        if self.settings.kafka.options.get("auto_offset_reset", "earliest") == "earliest":
            return
        if self.client.committed(partition) is None:
            self.client.seek(partition, self.client.first_offset(partition))
            if partition in self.batch:
                self.left[partition] = self.tracks[partition]

    def done_too_late(self, partition: Partition, track: Track, done: int) -> None:
        """What was in hand of a partition that left meanwhile is done now. It counts if nobody does it before it is back."""
        track.done = done
        self._lost[partition] = track

    def forget_lost(self, partition: Partition) -> None:
        """It is here, so what was known when it was lost is of an earlier stay."""
        self._lost.pop(partition, None)

    def _taken_up(self, partition: Partition) -> Track | None:
        """What was done of a partition that was lost before it could be committed, if nobody has committed anything since.

        Without this, a message that costs the membership each time would come again each time, and nothing behind it ever.
        """
        lost = self._lost.pop(partition, None)
        if lost is None or lost.done is None or lost.topic_id != self.client.topic_id(partition.topic):
            return None
        committed = self.client.committed(partition)
        if committed != lost.committed and (lost.committed is not None or committed not in (None, lost.begun)):
            return None
        self.client.seek(partition, lost.done)
        if partition in self.batch:  # polled from where the commit is
            self.left[partition] = lost
        return Track(begun=lost.begun, done=lost.done, committed=committed)

    def _gone_back(self, partition: Partition) -> Track:
        """What is known of a partition that nothing was taken up of: nothing. It starts at the committed offset."""
        track, passed = Track(), self._passed.pop(partition, None)
        if passed is not None:
            topic_id, start = passed
            if (committed := self.client.committed(partition)) is not None:
                start = committed
            elif topic_id != self.client.topic_id(partition.topic):  # a topic that was made anew has none
                start = self.client.first_offset(partition)
            self.client.seek(partition, start)
            if partition in self.batch:
                self.left[partition] = track
        return track

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
        self._behind.update(self._uncommitted())
        self._behind.update(self.inline.unsettled())
        self._drop_client(2.0)
        until = time.monotonic() + delay
        while not self.stopping and time.monotonic() < until:
            time.sleep(0.05)
            self.turned_at = time.monotonic()

    def _drop_client(self, timeout: float) -> None:
        client, self._client = self._client, None
        self.joined = False
        self.loan.error = None
        self._lost.clear()
        self._begun.clear()
        if client is not None:
            try:
                client.close(timeout)
            except Exception as error:
                logger.warning("group %s: closing its client failed: %r", self.group, error)
        self._note_confirmed()
        self._tell_consumed()
        self._forget([*self.tracks, *self.new])
        self._passed.clear()  # the next client starts at what is committed
        self.inline.drop()

    def _end(self) -> None:
        """Settles and commits what is finished, and leaves the group, so that another member may go on at once."""
        self._refused.clear()
        try:
            passed = self.inline.finish()
            if self._client is not None:
                self.inline.pass_last(passed)
                self.inline.settle()
                if self.queueing is not None:
                    self.queueing.end()
                self.commit(wait=True)
        except Exception as error:
            self.clean = False
            self.monitor.notice_error("stop", error, group=self.group)
        self._drop_client(min(5.0, self.settings.shutdown_timeout))
        self.clean = self.clean and not self._refused and not self._behind
