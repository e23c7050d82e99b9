"""The queued half of a group's loop: hooks, one call to Redis for each batch, and what happens when a queue is full or away.

It is part of ``Consumer``, and runs on its thread only.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .dispatch import Entry, as_failure
from .durability import LONGEST, Ahead
from .errors import QueueError, RedisUnavailable
from .intake import Admitted, Intake
from .jobqueue import ShardsOccupied
from .message import Partition, Record, place
from .signature import name_of

if TYPE_CHECKING:
    from .consumer import Consumer, Track
    from .jobqueue import JobQueue

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.1
"""Seconds between looks at a queue that was too long, or for the answer that what was queued is safe."""

LINGER = 0.5
"""Seconds that messages are left to gather, at most, while no worker is free for them. A job costs far more than a message
does, so a small load must not become many small jobs; and those that waited in the queue would be as late.
"""

LONGEST_PAUSE = 0.003
"""Seconds between looks at whether a worker is free, at most: no longer than a worker takes for a small job."""

FEW = 10_000
"""Messages a second that are not few any more: they are queued as they come."""

NOTE_EVERY = 5.0
"""Seconds between attempts to note commits that Redis did not take."""


class Queueing:
    """What one group puts into queues. ``intake`` is None where there is no Redis: then custom workers take all messages."""

    def __init__(self, loop: Consumer, job_queue: JobQueue | None) -> None:
        self.loop = loop
        self.group = loop.group
        self.monitor = loop.monitor
        self.intake: Intake | None = None
        if job_queue is not None:
            self.intake = Intake(job_queue, loop.group, loop.handlings, loop.monitor)
        self.ahead: Ahead | None = None
        if job_queue is not None and loop.settings.redis_durability == "wait":
            self.ahead = Ahead(job_queue.keeper(loop.group))
        self._again: set[Partition] = set()
        self._unmarked: set[Partition] = set()
        self._full: dict[str, set[Partition]] = {}
        self._look_at = self._note_at = self._took_at = self._away_until = 0.0
        self._small: list[str] = []
        self._sought: set[Partition] = set()
        self._failures = 0
        self._ended = False
        self._recovered = ""

    # What the loop tells.

    def welcome(self, partition: Partition) -> None:
        """This partition is ours from now on."""
        if self.intake is not None and not self.loop.handlings[partition.topic].inline:
            self._unmarked.add(partition)

    def forget(self, partitions: Sequence[Partition]) -> None:
        """These partitions have gone to somebody else."""
        self._unmarked.difference_update(partitions)
        for waiting in self._full.values():
            waiting.difference_update(partitions)
        if self.ahead is not None:
            self.ahead.forget(partitions)

    def gather(self) -> None:
        """Waits, before a poll, if the last jobs were small, until a worker is free; for ``LINGER`` seconds at most."""
        queues, self._small = self._small, []
        until, pause = time.monotonic() + LINGER, 0.001
        while queues and self.intake is not None and not self.loop.stopping:
            try:
                busy = all(self.intake.job_queue.is_busy(queue) for queue in queues)
            except RedisUnavailable:
                return  # the next batch finds out, and says so
            left = until - time.monotonic()
            if not busy or left <= 0:
                return
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)

    def begin_turn(self) -> None:
        """What is due before the messages of a poll are looked at."""
        self._sought = set()
        if self._unmarked:
            self._learn_marks()
        if self.ahead is not None:
            self._again.clear()
            self._look_whether_safe()
            if self.loop.stopping:
                self.end()
        if self._full and time.monotonic() >= self._look_at:
            self._look_at_full()
        if self.intake is not None and self.intake.is_behind and time.monotonic() >= self._note_at:
            self._note_at = time.monotonic() + NOTE_EVERY
            self.intake.remember({})

    def confirmed(self, offsets: Mapping[Partition, int]) -> None:
        """Kafka has taken these offsets."""
        queued = {p: offset for p, offset in offsets.items() if not self.loop.handlings[p.topic].inline}
        if queued and self.intake is not None:
            self.intake.remember(queued)

    @property
    def patience(self) -> float:
        """Seconds the next poll may wait as far as the queues are concerned."""
        waits = self._full or (self.ahead is not None and self.ahead.queued)
        return LOOK_EVERY if waits else float("inf")

    # A batch.

    def take(self, batch: Mapping[Partition, Sequence[Record]]) -> None:
        """Runs the hooks of a batch, queues what they let through, and says how far its partitions are."""
        loop = self.loop
        admitted: dict[Partition, Admitted] = {}
        moved: dict[Partition, int] = {}
        failed: dict[Partition, tuple[Record, Exception]] = {}
        counts: dict[Partition, int] = {}
        waiting: dict[str, int] = {}
        lost: dict[Partition, int] = {}
        refused = set(self._sought)  # these were polled before, and are read from elsewhere now
        try:
            for partition, records in batch.items():
                if partition in loop.left:  # while the hooks of another one took long
                    continue
                track = loop.track(partition)
                if partition in refused:
                    continue
                if self.intake is not None and self.intake.is_another(partition, loop.client):
                    self._read_another(track, partition)
                    refused.add(partition)
                    continue
                if self.ahead is not None and track.done is None:
                    track.done = records[0].offset  # where it begins, behind which nothing waits for anything
                with self._as_queued(partition, track):
                    if not loop.may_start(partition, track, records):
                        refused.add(partition)
                        continue
                    if partition in self._again and track.done is not None:  # it went back since these were polled
                        loop.client.seek(partition, track.done)
                        refused.add(partition)
                        continue
                    if track.done is not None and records[0].offset < track.done:
                        self._start_anew(track, partition, records[0].offset)
                    if (left := self._away_until - time.monotonic()) > 0:  # it waits for Redis with the others
                        loop.put_back(partition, track, records[0].offset, left)
                        refused.add(partition)
                        continue
                passed: dict[str, list[Entry]] = {}
                with loop.loan:
                    count, error = self._admit(track, records, passed)
                if partition in loop.left:
                    continue
                admitted[partition] = passed
                counts[partition] = count
                if count:
                    moved[partition] = records[count - 1].offset + 1
                if error is not None:
                    failed[partition] = (records[count], error)
                    moved[partition] = records[count].offset
                elif count < len(records):
                    loop.client.seek(partition, records[count].offset)
            if not admitted:
                return
            for partition in admitted.keys() & loop.left.keys():
                for found in (admitted, moved, failed, counts):
                    found.pop(partition, None)
            if self.intake is not None:
                safe = {p: loop.tracks[p].done for p in moved} if self.ahead is not None else None
                waiting, lost = self.intake.put(admitted, moved, safe)
        except (RedisUnavailable, ShardsOccupied) as error:
            again = {p: rs[0].offset for p, rs in batch.items() if p not in refused and p not in loop.left}
            self._redis_is_down(error, again)
            return
        if moved and self.ahead is None:  # else its answer to whether it is safe says so
            self._redis_answers()
        if lost:  # nothing of the whole batch was queued
            for partition in admitted:
                self._go_back(partition, lost.get(partition, batch[partition][0].offset))
            return
        for partition, offset in moved.items():
            if partition in loop.left:  # while a hook of another one took long
                continue
            track = loop.tracks[partition]
            with self._as_queued(partition, track):
                track.done = offset
                loop.since_commit += counts[partition]
                if counts[partition]:
                    loop.handlings[partition.topic].dead_in_a_row = 0
                loop.count_consumed(partition, counts[partition])
                if partition in failed:
                    record, problem = failed[partition]
                    if loop.failing.failed(loop.handlings[partition.topic], track, record, problem):
                        loop.client.seek(partition, record.offset + 1)
                        self._pass(partition, record)
        before, self._took_at = self._took_at, time.monotonic()
        if sum(counts.values()) < min(loop.most, FEW * (self._took_at - before)):
            self._small = list(waiting)
        for queue, messages in waiting.items():
            if messages > loop.settings.max_backlog:
                self._hold(queue, messages, [p for p, passed in admitted.items() if queue in passed])
        if self.ahead is not None:
            self._look_whether_safe()
            if loop.stopping:
                self.end()

    def _pass(self, partition: Partition, record: Record) -> None:
        """Moves the mark past a message whose dead letter was sent, so that it is not behind the commit."""
        if self.intake is not None:
            try:
                _, lost = self.intake.put({}, {partition: record.offset + 1})
            except RedisUnavailable as error:
                logger.warning("group %s: a mark is not moved: %s", self.group, error)
            else:
                for partition, offset in lost.items():
                    self._go_back(partition, offset)

    def _start_anew(self, track: Track, partition: Partition, offset: int) -> None:
        """The topic was made anew while we read it: its offsets begin again, and what they name is new."""
        track.handed = 0
        if self.intake is not None:
            self.intake.rewind(partition, offset, self.loop.client)

    def _read_another(self, track: Track, partition: Partition) -> None:
        """The same, where the new topic is longer already than the old one was read: it is read from its first message on."""
        if self.ahead is not None:
            self.ahead.forget([partition])
        self.loop.client.seek(partition, 0)
        track.done = track.committed = None
        self._start_anew(track, partition, 0)

    def made_anew(self, partition: Partition, track: Track) -> None:
        """The topic is another one of its name by now: it is read from its first message on."""
        if partition not in self._unmarked:
            self._read_another(track, partition)

    def _go_back(self, partition: Partition, offset: int) -> None:
        track = self.loop.track(partition)
        with self._as_queued(partition, track):
            if track.resume_at is None or (track.done is not None and offset < track.done):
                track.done = offset
                self.loop.client.seek(partition, offset)

    def _admit(
        self, track: Track, records: Sequence[Record], passed: dict[str, list[Entry]]
    ) -> tuple[int, Exception | None]:
        """Runs the hooks of one partition's messages, until one fails or the time has come.

        Gives the number of finished messages, and the error of the next one if it failed.
        """
        handling = self.loop.handlings[records[0].topic]
        if not handling.before and handling.worker is None and self.intake is not None:
            try:
                passed |= handling.by_queue(records, handling.entries(records, self.loop.received))
            except Exception:
                logger.debug("%s: a message cannot be queued; looking for it", records[0].topic, exc_info=True)
            else:
                return len(records), None
        handed: Counter[str] = Counter()
        try:
            return self._admit_each(track, records, passed, handed)
        finally:
            for worker, count in handed.items():
                self.monitor.notice("queued", topic=handling.topic, worker=worker, count=count, group=self.group)

    def _admit_each(
        self, track: Track, records: Sequence[Record], passed: dict[str, list[Entry]], handed: Counter[str]
    ) -> tuple[int, Exception | None]:
        loop = self.loop
        handling = loop.handlings[records[0].topic]
        attempt = track.attempt_of(records[0])
        for done, record in enumerate(records):
            if loop.stopping or time.monotonic() > loop.poll_by:
                return done, None
            try:
                known = self.intake is not None and self.intake.has(record)
                ticket = None if known else handling.admit(record, attempt, loop.received)
                if ticket is not None:
                    message, entry = ticket
                    if message.worker is not None:
                        if record.offset >= track.handed:  # else it was, before the rest of its batch failed
                            message.worker.perform_async(handling.topic, handling.params(entry))
                            track.handed = record.offset + 1
                            handed[name_of(message.worker)] += 1
                    elif self.intake is not None:
                        passed.setdefault(message.queue or handling.queue, []).append(entry)
                    else:
                        raise QueueError(
                            f"{place(record)} has no worker, so it is for a queue, and there is none: set redis, or"
                            " leave message.worker as it is"
                        )
            except (Exception, SystemExit) as error:
                return done, as_failure(error)
            attempt = 1
        return len(records), None

    # With redis_durability="wait": what is queued is committed when it is safe.

    def _as_queued(self, partition: Partition, track: Track) -> contextlib.AbstractContextManager[None]:
        """Within it ``track.done`` is how far the partition is queued. See ``Ahead``."""
        return contextlib.nullcontext() if self.ahead is None else self.ahead.as_queued(partition, track)

    def _look_whether_safe(self, seconds: float = 0.0) -> None:
        """Looks for the answer to the last question, which lets the loop commit; asks the next one if there is something."""
        ahead, loop = self.ahead, self.loop
        assert ahead is not None
        try:
            if ahead.keeper.under_way:
                lost = ahead.keeper.answer(seconds)
                if lost is None:
                    return
                self._take_up_lost([partition for partition in lost if partition in ahead.asked])
                for partition in list(ahead.asked):
                    ahead.safe(partition, loop.tracks[partition])
                self._redis_answers()
            if ahead.queued:
                ahead.asked = dict(ahead.queued)
                ahead.keeper.ask(ahead.asked)
        except RedisUnavailable as error:
            delay = self._tell_redis_is_down(error)
            for partition in list(ahead.queued):  # they come again, and are asked for again
                ahead.forget([partition])
                track = loop.tracks[partition]
                assert track.done is not None
                loop.put_back(partition, track, track.done, delay)

    def end(self) -> None:
        """Waits for a few seconds until what was queued is safe: what is not committed at the end comes again."""
        if self.ahead is not None and not self._ended:
            self._ended = True
            until = time.monotonic() + min(LONGEST, self.loop.settings.shutdown_timeout / 2)
            while self.ahead.queued and time.monotonic() < until:
                self._look_whether_safe(LOOK_EVERY)

    def _take_up_lost(self, partitions: Sequence[Partition]) -> None:
        """Queues again what Redis had, and does not have any more; none of it was committed."""
        assert self.intake is not None
        if partitions:
            safe = {partition: self.loop.tracks[partition].done for partition in partitions}
            for partition, offset in self.intake.look_again(partitions, safe).items():
                self._go_back(partition, offset)
                self._again.add(partition)

    # A queue that is too long: what fills it waits in Kafka, which is made for that.

    def _hold(self, queue: str, messages: int, partitions: Sequence[Partition]) -> None:
        if queue not in self._full:
            self.monitor.notice("paused", group=self.group, queue=queue, messages=messages)
            self._look_at = time.monotonic() + LOOK_EVERY
        self._full.setdefault(queue, set()).update(partitions)
        for partition in partitions:
            self.loop.hold(partition)

    def _look_at_full(self) -> None:
        assert self.intake is not None
        self._look_at = time.monotonic() + LOOK_EVERY
        for queue in list(self._full):
            try:
                messages = self.intake.job_queue.waiting(queue)
            except RedisUnavailable as error:
                self._look_at = time.monotonic() + self._tell_redis_is_down(error)
                return
            if messages * 2 > self.loop.settings.max_backlog:
                continue
            free = self._full.pop(queue)
            self.monitor.notice("resumed", group=self.group, queue=queue, messages=messages)
            for partition in free.difference(*self._full.values()):
                self.loop.let_go(partition)

    # Redis that is away, or full.

    def _learn_marks(self) -> None:
        """Asks Redis up to where partitions have been queued, before their first record is touched. If it does not answer,
        they wait, and the others go on."""
        assert self.intake is not None
        loop = self.loop
        partitions = sorted(self._unmarked)
        waits = [at for at in (loop.tracks[partition].resume_at for partition in partitions) if at is not None]
        if not waits and self._away_until > time.monotonic():
            waits = [self._away_until]
        if not waits:
            try:
                if self.ahead is not None:
                    self.ahead.keeper.look()
                self._sought = self.intake.welcome(partitions, loop.client)
            except RedisUnavailable as error:
                waits = [time.monotonic() + self._tell_redis_is_down(error)]
            else:
                self._redis_answers()
                self._unmarked.clear()
                return
        for partition in partitions:  # those that came meanwhile wait with the others
            loop.wait(partition, loop.tracks[partition], min(waits))

    def _tell_redis_is_down(self, error: RedisUnavailable | ShardsOccupied) -> float:
        """Gives the seconds until the next try."""
        self._failures += 1
        self._recovered = "the shards are empty" if isinstance(error, ShardsOccupied) else "Redis answers again"
        delay = self.loop.reconnect.delay(self._failures)
        self.monitor.notice_error(
            "queue",
            error,
            message=f"group {self.group!r}: {error}; trying again in {delay:.1f} s, nothing is lost",
        )
        return delay

    def _redis_answers(self) -> None:
        if self._failures:
            self.monitor.notice("recovered", message=self._recovered, group=self.group)
        self._failures, self._away_until = 0, 0.0

    def _redis_is_down(self, error: RedisUnavailable | ShardsOccupied, firsts: Mapping[Partition, int]) -> None:
        delay = self._tell_redis_is_down(error)
        if isinstance(error, RedisUnavailable):  # who comes meanwhile and asks would take it for another failure
            self._away_until = time.monotonic() + delay
        for partition, offset in firsts.items():
            track = self.loop.track(partition)
            with self._as_queued(partition, track):
                if track.resume_at is None:
                    self.loop.put_back(partition, track, offset, delay)
