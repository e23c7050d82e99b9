"""What a worker does with the ticket of a shard: messages one after the other, and none before the one ahead is done with."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from rq.job import Job

from .alarm import Alarm
from .dispatch import Handling
from .errors import QueueError
from .jobs import NOTE_EVERY, Failure, Messages, OwnWorker, keep, leave, next_attempt, settle_failures, tell_end
from .progress import NOTHING, JobTaken
from .queues import BACK, RUNS, Envelope, Parcel, Writer
from .shards import Begun, Shard, make_ticket, ticket_timeout

if TYPE_CHECKING:
    from .app import Flowkit

logger = logging.getLogger(__name__)


def work_on(app: Flowkit, handling: Handling, queue: str, job: Job | None, alarm: Alarm) -> None:
    """Handles messages of one shard, for ``longest_job`` seconds or until one fails. What is left gets another ticket: at
    once, or when the failed message is due again.
    """
    if job is None:
        raise QueueError(
            "the messages of an ordered route are in Redis, and only RQ runs the job that takes them there"
        )
    shard = Shard(Writer(job.connection, app.settings.name), queue)

    def go_on(place: str) -> None:
        ticket = make_ticket(app.reference, handling.topic, queue, ticket_timeout(handling), place)
        shard.replace(job.id, ticket)

    begun = shard.begin(job.id)
    if begun is None:
        logger.info("job %s: queue %s has another one by now; this one has nothing to do", job.id, queue)
    elif isinstance(begun, float):
        go_on(str(time.time() + begun))
    else:
        try:
            with shard.held():
                place = _Run(app, handling, shard, job, alarm, begun).work()
                if shard.end():
                    go_on(place)
        except JobTaken as error:
            leave(job, error)


class _Run:
    """One run of a ticket."""

    def __init__(self, app: Flowkit, handling: Handling, shard: Shard, job: Job, alarm: Alarm, begun: Begun) -> None:
        self.app = app
        self.handling = handling
        self.shard = shard
        self.job = job
        self.alarm = alarm
        self.runs, self.done, self.attempt, self.pack = begun
        self.killed = self.runs > 1
        self.handled = self.failed = 0

    def work(self) -> str:
        """Gives the place of the next ticket, if there must be one."""
        end = time.monotonic() + self.handling.longest_job
        due = None
        try:
            while self.pack and due is None and time.monotonic() < end and not OwnWorker.stopping:
                due = self._work_on_pack(end)
        finally:
            if self.handled or self.failed:
                count, failed = self.handled, self.failed
                self.app.events.notice("performed", topic=self.handling.topic, count=count, failed=failed)
        return BACK if due is None else str(due)

    def _work_on_pack(self, end: float) -> float | None:
        """Gives the Unix time at which a failed message is due, which all behind it wait for."""
        entries = Parcel.of(Envelope.loads(self.pack)[2]).entries
        messages = Messages(self.app, self.handling, entries, self.attempt, self.alarm, self.done, ordered=True)
        due = None
        while due is None:
            first, tried = messages.at, self.attempt
            if self.runs > RUNS.max:
                messages.give_up()
                tried = max(tried, self.handling.retry.attempts)
            else:
                self._handle_some(messages)
            messages.settle(wait=True)
            if messages.at > first:
                self.runs = self.attempt = 1
            self.done = messages.at
            for failure in messages.due():  # one at most
                due = self._settle(failure, tried if failure.position == first else 1)
            finished = self.done - first
            self.handled += messages.at - first
            rest = self.done < len(entries)
            if not rest or due is not None or time.monotonic() >= end or OwnWorker.stopping:
                self._note(finished, messages, pop=not rest)
                break
            self._note(finished)
        return due

    def _handle_some(self, messages: Messages) -> None:
        """Handles messages for a few milliseconds, or until one fails. One that sends waits until Kafka has confirmed it."""
        if not (self.killed or self.handling.all_declarations):
            messages.handle(seconds=NOTE_EVERY)
            return
        end = time.monotonic() + NOTE_EVERY
        while messages.at < len(messages.entries) and not messages.failing and not OwnWorker.stopping:
            messages.handle(1, seconds=NOTE_EVERY)
            messages.settle(wait=True)
            if self.killed or time.monotonic() >= end:
                break

    def _settle(self, failure: Failure, attempt: int) -> float | None:
        """What becomes of a message that failed. Gives the Unix time at which it is due again; None if it is done with."""
        self.failed += 1
        handling = self.handling
        rest = settle_failures(self.app, handling, [failure], attempt, self.alarm)
        if not rest:
            return None
        error = rest[0].error
        if handling.retry.ends(attempt, error):
            keep(self.app, handling, self.job, rest[0], attempt)
            tell_end(self.app, handling, rest[0], attempt, None)
            return None
        delay = handling.retry.delay(attempt)
        self.done = failure.position
        self.attempt = next_attempt(attempt, error)
        tell_end(self.app, handling, rest[0], attempt, delay)
        return time.time() + delay

    def _note(self, finished: int, messages: Messages | None = None, *, pop: bool = False) -> None:
        """Says how far the shard is; with ``messages`` also what they took."""
        took = NOTHING if messages is None else messages.took
        if pop:
            self.done = 0
        following = self.shard.note(self.done, self.attempt, finished, pop=pop, topic=self.handling.topic, took=took)
        if pop:
            self.pack = following
