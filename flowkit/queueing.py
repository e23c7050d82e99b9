"""The queued half of a group's loop: hooks, one call to Redis for each batch, and what happens when a queue is full or away.

It is part of ``Consumer``, and runs on its thread only.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .dispatch import Entry, as_failure
from .errors import QueueError, RedisUnavailable
from .intake import Admitted, Intake
from .message import Partition, Record, place
from .signature import name_of

if TYPE_CHECKING:
    from .consumer import Consumer, Track
    from .jobqueue import JobQueue

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.1
"""Seconds between looks at a queue that was too long."""


class Queueing:
    """What one group puts into queues. ``intake`` is None where there is no Redis: then custom workers take all messages."""

    def __init__(self, loop: Consumer, job_queue: JobQueue | None) -> None:
        self.loop = loop
        self.group = loop.group
        self.monitor = loop.monitor
        self.intake: Intake | None = None
        if job_queue is not None:
            self.intake = Intake(job_queue, loop.group, loop.handlings, loop.monitor)
        self._unmarked: set[Partition] = set()
        self._full: dict[str, set[Partition]] = {}
        self._look_at = 0.0
        self._failures = 0

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
        if self.intake is not None:
            self.intake.forget(partitions)

    def begin_turn(self) -> None:
        """What is due before the messages of a poll are looked at."""
        if self._unmarked:
            self._learn_marks()
        if self._full and time.monotonic() >= self._look_at:
            self._look_at_full()

    def confirmed(self, offsets: Mapping[Partition, int]) -> None:
        """Kafka has taken these offsets."""
        queued = {p: offset for p, offset in offsets.items() if not self.loop.handlings[p.topic].inline}
        if queued and self.intake is not None:
            self.intake.remember(queued)

    @property
    def patience(self) -> float:
        """Seconds the next poll may wait as far as the queues are concerned."""
        return LOOK_EVERY if self._full else float("inf")

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
        try:
            for partition, records in batch.items():
                track = loop.track(partition)
                if not loop.may_start(partition, track, records[0]):
                    continue
                if track.done is not None and records[0].offset < track.done:
                    self._start_anew(track, partition, records[0].offset)
                passed: dict[str, list[Entry]] = {}
                count, error = self._admit(track, records, passed)
                admitted[partition] = passed
                counts[partition] = count
                if count:
                    moved[partition] = records[count - 1].offset + 1
                if error is not None:
                    failed[partition] = (records[count], error)
                    moved[partition] = records[count].offset
                elif count < len(records):
                    loop.client.seek(partition, records[count].offset)
            if self.intake is not None:
                waiting, lost = self.intake.put(admitted, moved)
        except RedisUnavailable as error:
            self._redis_is_down(error, {partition: records[0].offset for partition, records in batch.items()})
            return
        if moved:
            self._redis_answers()
        if lost:  # nothing of the whole batch was queued
            for partition, records in batch.items():
                self._go_back(partition, lost.get(partition, records[0].offset))
            return
        for partition, offset in moved.items():
            track = loop.tracks[partition]
            track.done = offset
            loop.since_commit += counts[partition]
            loop.tell_consumed(partition, counts[partition])
            if partition in failed:
                record, problem = failed[partition]
                if loop.failed(loop.handlings[partition.topic], track, record, problem):
                    loop.client.seek(partition, record.offset + 1)
                    self._pass(partition, record)
        for queue, messages in waiting.items():
            if messages > loop.settings.max_backlog:
                self._hold(queue, messages, [p for p, passed in admitted.items() if queue in passed])

    def _pass(self, partition: Partition, record: Record) -> None:
        """Moves the mark past a message whose dead letter was sent, so that it is not behind the commit."""
        if self.intake is not None:
            try:
                self.intake.put({}, {partition: record.offset + 1})
            except RedisUnavailable as error:
                logger.warning("group %s: a mark is not moved: %s", self.group, error)

    def _start_anew(self, track: Track, partition: Partition, offset: int) -> None:
        """The topic was made anew while we read it: its offsets begin again, and what they name is new."""
        track.handed = 0
        if self.intake is not None:
            self.intake.rewind(partition, offset)

    def _go_back(self, partition: Partition, offset: int) -> None:
        track = self.loop.track(partition)
        if track.resume_at is None:
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
                passed[handling.queue] = handling.entries(records, self.loop.received)
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
        if not waits:
            try:
                self.intake.welcome(partitions, loop.client)
            except RedisUnavailable as error:
                waits = [time.monotonic() + self._tell_redis_is_down(error)]
            else:
                self._redis_answers()
                self._unmarked.clear()
                return
        for partition in partitions:  # those that came meanwhile wait with the others
            loop.client.pause(partition)
            loop.tracks[partition].resume_at = min(waits)

    def _tell_redis_is_down(self, error: RedisUnavailable) -> float:
        """Gives the seconds until the next try."""
        self._failures += 1
        delay = self.loop.reconnect.delay(self._failures)
        self.monitor.notice_error(
            "queue",
            error,
            message=f"group {self.group!r}: {error}; trying again in {delay:.1f} s, nothing is lost",
        )
        return delay

    def _redis_answers(self) -> None:
        if self._failures:
            self.monitor.notice("recovered", message="Redis answers again", group=self.group)
        self._failures = 0

    def _redis_is_down(self, error: RedisUnavailable, firsts: Mapping[Partition, int]) -> None:
        delay = self._tell_redis_is_down(error)
        for partition, offset in firsts.items():
            track = self.loop.track(partition)
            if track.resume_at is None:
                self.loop.put_back(partition, track, offset, delay)
