"""What a worker does with a job: its messages one by one through their handler, and what becomes of those that fail.

The job that RQ runs is always ``flowkit.jobs.perform``.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
import zlib
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rq import Queue, get_current_job
from rq.exceptions import NoSuchJobError, ShutDownImminentException
from rq.job import Job, JobStatus
from rq.timeouts import JobTimeoutException
from rq.utils import now

from .alarm import Alarm
from .brief import brief
from .deadletters import send as send_letter
from .dispatch import Entry, Handling, Run, Until
from .errors import FlowkitError, QueueError, RedisUnavailable, Stopped, is_passing
from .message import PlainRecord, about, place
from .producer import FLUSH_TIMEOUT
from .progress import NONE_OF_USE, NOTHING, JobTaken, Progress, Took
from .queues import BACK, FRONT, PERFORM, RUNS, Envelope, Made, Parcel, Writer, fitting, make_jobs, unpacked
from .responses import Response

if TYPE_CHECKING:
    from .app import Flowkit

logger = logging.getLogger(__name__)

SPLIT_AFTER = 2
"""Runs of a job that ended with their worker until the message in hand, which may be what kills it, gets a job of its own."""

SUSPECT = "suspect"
"""In the meta of a job whose message may be what kills its worker."""

NOTE_EVERY = 0.005
"""Seconds between the notes of how far a job has come: what was handled since the last one is handled again after a SIGKILL."""


TOGETHER, SHARE = 60.0, 3
"""Seconds after which a job takes up no other: at most, and as a share of its time-out, of which much must be left then: some
time behind it RQ takes the job for lost, and ends its process.
"""

LEAST_TOGETHER = 15.0
"""Seconds after which it does not, however short the time-out is. RQ waits for 60 s longer than that."""

LINGER = 0.05
"""Seconds that a process of RQ waits for another job when it is done with its own."""

LOOK_EVERY = 0.001
"""Seconds between looks at the queue meanwhile."""


class OwnWorker:
    """What is so in a process of ``flowkit worker``; everywhere else, in a plain ``rq worker`` too, it stays as it is here."""

    application: Flowkit | None = None
    """The one whose jobs it runs. A plain worker imports what each job names."""

    stopping = False
    """Whether it was asked to stop: then the message in hand is the last one."""

    until: Until | None = None
    """That of the job in hand."""

    halted: Stopped | None = None
    """Why the whole of `flowkit worker` is to end."""

    told: BaseException | None = None
    """What flowkit has logged last and raises for RQ, which would log it once more."""

    @classmethod
    def stop(cls) -> None:
        """Asks the job in hand to end after its message in hand. Safe to call from a signal handler."""
        cls.stopping = True
        if cls.until is not None:
            cls.until.at = 0.0

    @classmethod
    def halt(cls, reason: Stopped) -> None:
        """Stops all processes of `flowkit worker`, this one as ``stop`` does; a plain ``rq worker`` goes on."""
        if cls.application is None:
            text = "%s This worker goes on: it has a new process for each job. `flowkit worker` would end."
            logger.error(text, reason)
            return
        cls.halted = cls.halted or reason
        cls.stop()


class OwnJob(Job):
    """A job as a process of flowkit takes it from Redis: it runs ``perform``, and nothing else that is named there.

    Callbacks and webhooks are not followed, but they stay in Redis, so that a job of somebody else is unharmed.
    """

    def restore(self, raw_data: Mapping[Any, Any]) -> Any:
        """Reads what Redis has of a job. One that cannot be read, or would fill the memory, fails when it is run, and says why:
        an error here would end the worker. Raises ``NoSuchJobError`` where a job was deleted.
        """
        fields: dict[bytes, bytes] = dict(raw_data)
        try:
            for name in PACKED:
                if name in fields:
                    fields[name] = unpacked(fields[name])
            super().restore(fields)
            attempt = self.meta.get("attempt", 1)
            if type(attempt) is not int or not 0 < attempt < 2**31:
                raise QueueError(f"a job counts its attempts as {brief(attempt)}")
        except NoSuchJobError:
            raise
        except Exception as error:  # whatever RQ makes of fields that it did not write
            why = f"{type(error).__name__}: {brief(str(error))}"  # some errors have all that they were about in their repr
            logger.error("job %s cannot be read, and fails: %s", self.id, why)
            data = Envelope.dumps((f"what cannot be read ({why[:90]})",))
            super().restore({b"data": data, b"origin": fields.get(b"origin", b"").decode(errors="replace").encode()})

    @property
    def func(self) -> Callable[..., None]:
        return perform

    @property
    def success_callback(self) -> None:
        return None

    @property
    def failure_callback(self) -> None:
        return None

    @property
    def stopped_callback(self) -> None:
        return None

    def send_webhooks(self, status: str, *, exc_string: str | None = None) -> None:
        """Sends none."""


PACKED = (b"data", b"exc_info")
"""The fields of a job that RQ packs."""


def perform(*args: Any) -> None:
    """What RQ runs: the messages of one job. Raises what a message alone in its job failed with, so that RQ retries it."""
    parcel = Parcel.of(args)
    if not (parcel.entries or parcel.shard):  # it was done and emptied, and then RQ failed
        return
    app = _application(parcel.reference)
    # Who consumes has checked the client's options; in a plain worker it would cost more than all the rest of most jobs.
    app.start(check_client=False)
    handling = app.handling(parcel.topic)
    job = get_current_job()
    alarm = Alarm(Until())
    # A message alone in its job is the one in hand: a stop must not pass it over.
    OwnWorker.until = None if len(parcel.entries) == 1 else alarm.until
    with alarm.taken(handling.job_timeout):
        if parcel.shard is not None:
            from .ordered import work_on

            work_on(app, handling, parcel.shard, job, alarm)
        elif len(parcel.entries) == 1:
            _perform_one(app, handling, parcel, job, alarm)
        elif job is None:
            raise QueueError("a job of many messages can put its failed ones back only when RQ runs it")
        else:
            _perform_many(app, handling, parcel, job, alarm)
    if job is not None and parcel.entries:
        job.data = Envelope.emptied(parcel)


def _application(reference: str) -> Flowkit:
    """The application of a job. What a job names is imported by plain workers only: flowkit's have theirs, and no other."""
    from .locate import locate

    own = OwnWorker.application
    if own is None:
        return locate(reference)
    if reference != own.reference:
        raise QueueError(
            f"this job belongs to the application {reference[:120]!r}, and this worker to {own.reference!r}: start"
            " `flowkit run` and `flowkit worker` with the same reference, and give each application queues of its own"
        )
    return own


# A message alone in its job: RQ's own Retry is its retry.


def _perform_one(app: Flowkit, handling: Handling, parcel: Parcel, job: Job | None, alarm: Alarm) -> None:
    attempt, left = parcel.attempt, RUNS.max
    if job is not None:
        attempt = job.meta.get("attempt", attempt)
        left = RUNS.max if job.retries_left is None else job.retries_left
    messages = Messages(app, handling, parcel.entries, attempt, alarm)
    if left == 0 and handling.on_poison and job is not None and not job.latest_result():
        # the last run that RQ gives it; not one that somebody asks for later, when it has failed
        attempt = max(attempt, handling.retry.attempts)
        messages.give_up()
    else:
        messages.handle()
    messages.settle(wait=True)
    failures = messages.due()
    app.events.notice("performed", topic=handling.topic, count=1, failed=len(failures))
    rest = settle_failures(app, handling, failures, attempt, alarm, alone=True)
    if job is not None and attempt == 1:
        _progress(app, handling, job).note(1, took=messages.took)
    for failure in rest:
        delay = None if job is None else _tell_rq(job, handling, attempt, failure.error)
        tell_end(app, handling, failure, attempt, delay)
        OwnWorker.told = failure.error
        raise failure.error


def _tell_rq(job: Job, handling: Handling, attempt: int, error: Exception) -> int | None:
    """Sets what RQ does with the job when its error is raised: it tries again after the route's wait, or gives up.

    Gives the seconds until then; None if it gives up.
    """
    if handling.retry.ends(attempt, error):
        job.retries_left = 0
        return None
    delay = max(1, round(handling.retry.delay(attempt)))
    job.meta["attempt"] = next_attempt(attempt, error)
    job.retries_left = RUNS.max + 1  # of which RQ takes one
    job.retry_intervals = [delay]
    return delay


def next_attempt(attempt: int, error: Exception) -> int:
    return attempt if is_passing(error) else attempt + 1


# Many messages in one job: each counts alone.


def _perform_many(app: Flowkit, handling: Handling, parcel: Parcel, job: Job, alarm: Alarm) -> None:
    """Handles the messages that no earlier run of this job has finished, and then those of jobs that stand behind it: a process
    that RQ starts for a job costs more than most jobs do.
    """
    progress = _progress(app, handling, job)
    end, others = time.monotonic() + min(TOGETHER, max(LEAST_TOGETHER, (job.timeout or 0) / SHARE)), 0
    try:
        more = progress.begin()
        in_hand: Parcel | None = parcel if more is None else _read(more)
        others += 0 if in_hand is parcel or in_hand is None else len(in_hand.entries)
        while in_hand is not None:
            before = in_hand
            whole = _work_through(app, app.handling(before.topic), before, job, alarm, progress)
            in_hand = _following(app, job, progress, end, others > 0) if whole else None
            others += len(in_hand.entries) if in_hand is not None else 0
        if before is not parcel:
            progress.end(len(parcel.entries))
            job.description = f"{job.description}, and {others} of jobs behind it"
    except JobTaken as error:
        leave(job, error)


def _read(data: bytes) -> Parcel:
    return Parcel.of(Envelope.loads(unpacked(data))[2])


def _following(app: Flowkit, job: Job, progress: Progress, end: float, idle: bool) -> Parcel | None:
    """The messages of the next job of the queue, which goes up in this one; waits for it for ``LINGER`` seconds.

    None where jobs wait already, and this process was not ``idle`` before: they are many, and RQ gives them to whom it likes.
    None in a process of ``flowkit worker``, which is at the next job as soon; where that job has to be RQ's affair; when it is
    late.
    """
    if OwnWorker.application is not None or job.retries_left != RUNS.max or progress.writer.shared is None:
        return None
    until = min(time.monotonic() + LINGER, end)
    while time.monotonic() < until:
        try:
            # said only where it will be kept, else a job would always wait behind the one in hand
            found = progress.look(job.origin, round(LINGER * 1000) if idle else 0)
            if found is None:
                idle = True
                time.sleep(LOOK_EVERY)
                continue
            if not idle or found is NONE_OF_USE or found.timeout > (job.timeout or 0):
                return None
            parcel = _read(found.data)
            is_suspect = found.meta and Envelope.loads(found.meta).get(SUSPECT)
        except (QueueError, RedisUnavailable) as error:
            logger.debug("job %s takes up none behind it: %s", job.id, error)
            return None
        route = app.handlings.get(parcel.topic) if parcel.reference == app.reference else None
        if route is None or route.one_a_job or route.shards or parcel.attempt != 1 or is_suspect:
            return None
        if progress.take(job.origin, found):  # its error is one of this job, which may have it by now
            return parcel
    return None


def _work_through(
    app: Flowkit, handling: Handling, parcel: Parcel, job: Job, alarm: Alarm, progress: Progress
) -> bool:
    """Handles the messages that are not done yet, and notes on the way how far it has come. True if it came through without
    a failure.

    A failed one goes on in a job of its own. What was not begun when the job has taken long, or its worker is to stop, goes
    back to the front of the queue.
    """
    progress.topic = handling.topic
    entries, attempt, first = parcel.entries, parcel.attempt, progress.done
    messages = Messages(app, handling, entries, attempt, alarm, first)
    failed = 0

    def note(*, wait: bool, again: Sequence[Made] = (), end: bool = False) -> None:
        nonlocal failed
        messages.settle(wait=wait)
        failures = messages.due()
        failed += len(failures)
        rest = settle_failures(app, handling, failures, attempt, alarm)
        jobs = [*again]
        waits: list[float | None] = []
        for failure in rest:
            if handling.retry.ends(attempt, failure.error):
                keep(app, handling, job, failure, attempt)
                waits.append(None)
                continue
            delay = handling.retry.delay(attempt)
            waits.append(delay)
            due = str(time.time() + delay)
            jobs += _alone(app, handling, job.origin, failure.entry, next_attempt(attempt, failure.error), due)
        if end:
            if messages.at < len(entries):
                jobs += _rest(app, handling, job.origin, parcel, messages)
            progress.note(len(entries), jobs, messages.took)  # the rest is that of other jobs now
        elif jobs or messages.settled > progress.done:
            progress.note(messages.settled, jobs)
        for failure, wait_for in zip(rest, waits, strict=True):
            tell_end(app, handling, failure, attempt, wait_for)

    killed = RUNS.max - (RUNS.max if job.retries_left is None else job.retries_left)
    if killed >= SPLIT_AFTER and first < len(entries):
        messages.skip()
        (suspect,) = _alone(app, handling, job.origin, entries[first], attempt, BACK)
        suspect = suspect._replace(meta={**(suspect.meta or {}), SUSPECT: True})  # it is to go up in no other job
        note(wait=False, again=[suspect], end=True)
    else:
        end = time.monotonic() + handling.longest_job
        while messages.at < len(entries) and time.monotonic() < end and not OwnWorker.stopping:
            messages.handle(1 if killed else None, seconds=NOTE_EVERY)
            if killed or messages.at < len(entries):
                note(wait=bool(killed))
        note(wait=True, end=True)
    app.events.notice("performed", topic=handling.topic, count=messages.begun, failed=failed)
    return messages.at == len(entries) and not failed


def _progress(app: Flowkit, handling: Handling, job: Job) -> Progress:
    return Progress(Writer(job.connection, app.settings.name), job, handling.topic)


def _alone(app: Flowkit, handling: Handling, queue: str, entry: Entry, attempt: int, place: str) -> list[Made]:
    """A job for one message of another job."""
    return make_jobs(app.reference, handling, queue, [tuple(entry)], size=1, attempt=attempt, place=place)


def _rest(app: Flowkit, handling: Handling, queue: str, parcel: Parcel, messages: Messages) -> list[Made]:
    """Jobs for what was not begun, of a size that fits what the handler has just been measured to take."""
    took = messages.took
    size = fitting(took.seconds / took.messages, handling) if took.messages else handling.job_size
    unbegun = parcel.entries[messages.at :]
    jobs = make_jobs(app.reference, handling, queue, unbegun, size=size, attempt=parcel.attempt, place=FRONT)
    return jobs[::-1]  # each is put before the others


def keep(app: Flowkit, handling: Handling, job: Job, failure: Failure, attempt: int) -> None:
    """Puts a message that is given up among RQ's failed jobs, in a job of its own.

    Killed before this job has noted it, the next run of it does the same again; the id is the same then.
    """
    (made,) = make_jobs(app.reference, handling, job.origin, [tuple(failure.entry)], size=1, attempt=attempt)
    name = f"{made.id.rpartition('-')[0]}-{zlib.crc32(job.id.encode()):08x}"
    kept = Queue(job.origin, connection=job.connection, serializer=Envelope).create_job(
        PERFORM,
        args=made.args,
        job_id=name,
        description=made.description,
        timeout=made.timeout,
        result_ttl=job.result_ttl,
        retry=RUNS,
        status=JobStatus.FAILED,
    )
    kept.ended_at = now()
    with job.connection.pipeline() as pipe:
        text = "".join(traceback.format_exception(failure.error))
        kept._handle_failure(text, pipe, job.worker_name or "")
        pipe.execute()


def leave(job: Job, error: JobTaken) -> None:
    """Ends this process without a word to RQ, which would otherwise decide about a job that is somebody else's.

    A plain worker takes any exit code of its work horse but 0 for a failure of the job, and would queue it once more.
    """
    logger.error("job %s: %s; this process ends", job.id, error)
    logging.shutdown()
    os._exit(0 if OwnWorker.application is None else 1)


# Messages through their handler.


class Failure(NamedTuple):
    """One message that failed, in a worker. ``record`` is None for what cannot be read out of its ``entry``."""

    position: int
    entry: Entry
    record: PlainRecord | None
    error: Exception


class Messages:
    """The messages of a job, from ``first`` on: handled in order, their responses sent, those that failed.

    ``at`` is the position behind the last one that was handled, ``settled`` that behind the last one whose responses, and those
    of all before it, Kafka has confirmed or refused. ``took``: what handling took.
    """

    _warm = False
    """Whether this process has handled a message: the first one imports, connects and so on."""

    def __init__(
        self,
        app: Flowkit,
        handling: Handling,
        entries: Sequence[Entry],
        attempt: int,
        alarm: Alarm,
        first: int = 0,
        call: Run | None = None,
        *,
        ordered: bool = False,
    ) -> None:
        self.handling = handling
        self.ordered = ordered
        self.producer = app.producer
        self.events = app.events
        self.entries = [PlainRecord._make(entry) for entry in entries]
        self.attempt = attempt
        self.alarm = alarm
        self.first = self.at = self.settled = first
        self.took = NOTHING
        self._call = call or handling.call_queued
        self._sent: deque[tuple[PlainRecord, str, Any]] = deque()
        self._failed: dict[int, Failure] = {}

    def handle(self, count: int | None = None, *, seconds: float | None = None) -> None:
        """Handles ``count`` messages (all if not given); with ``seconds`` it begins none later, and none behind one that fails,
        so that what becomes of that one is noted before others are told of.
        """
        until = self.alarm.until
        until.at = float("inf") if seconds is None else time.monotonic() + seconds
        if OwnWorker.stopping and seconds is not None:  # a signal came just before the line above
            return
        end = len(self.entries) if count is None else self.at + count
        failures = float("inf") if seconds is None else len(self._failed)
        self.alarm.allow(self.handling.job_timeout)
        if not Messages._warm:
            took = self._handle(self.at + 1, failures)
            Messages._warm = True
            if self.at == len(self.entries):
                self.took = took._replace(cold=True)
        took = self._handle(end, failures)
        self.alarm.allow(self._flush_time)  # what follows is no part of the last message
        self.took = Took(self.took.seconds + took.seconds, self.took.messages + took.messages, self.took.cold)

    def _handle(self, end: int, failures: float) -> Took:
        """Up to ``end``, or until there are more than so many ``failures``."""
        first, opening, began = self.at, self.producer.opening, time.monotonic()
        while self.at < end and len(self._failed) <= failures:
            done, error = self.handling.run(
                self.entries[self.at : end],
                self._send,
                attempt=self.attempt,
                received=0.0,
                until=self.alarm.until,
                call=self._call,
            )
            self.at += done
            if self.ordered:
                self.attempt = 1  # the others have had none
            if error is not None:
                self._fail(self.at, error)
                self.at += 1
            elif self.at < end:
                break
        return Took(time.monotonic() - began - (self.producer.opening - opening), self.at - first)

    @property
    def begun(self) -> int:
        """How many were handled."""
        return self.at - self.first

    @property
    def failing(self) -> bool:
        """Whether there are failures that were not yet ``due``."""
        return bool(self._failed)

    def skip(self) -> None:
        """Passes over the next message, which goes on elsewhere."""
        self.at += 1
        self.first = self.at

    def give_up(self) -> None:
        """Counts the next message as failed, without handling it."""
        error = f"{RUNS.max} runs of its job had no end: its worker was killed, or could not do its work"
        self._fail(self.at, QueueError(error))
        self.at += 1

    def _send(self, entry: Any, responses: Sequence[Response]) -> None:
        for response in responses:
            self._sent.append((entry, response.topic, self.producer.start(response)))

    def _fail(self, index: int, error: Exception) -> None:
        entry = self.entries[index]
        record = None
        try:
            record = self.handling.record(entry)
        except Exception as problem:  # an interchanger of the user's
            logger.debug("%s[%d]@%d cannot be read: %r", entry.topic, entry.partition, entry.offset, problem)
        # another response of the same message may only have ended together with the one that was refused
        before = self._failed.get(index)
        if before is None or (is_passing(before.error) and not is_passing(error)):
            self._failed[index] = Failure(index, entry, record, error)

    def settle(self, *, wait: bool) -> None:
        """Looks at the responses that were confirmed or refused meanwhile, or waits for all of them."""
        if self.producer.under_way:  # messages of ``submit``: whose they are is not known
            if not wait:
                return
            self.alarm.allow(self._flush_time)
            self.producer.settle()
        if self._sent:
            self._look_at_sent(wait)
        if self._sent:
            self._settle_before(self._sent[0][0])
        else:
            self.settled = self.at

    def _look_at_sent(self, wait: bool) -> None:
        if wait:
            self.alarm.allow(self._flush_time)
            self.producer.flush()
        refused = False
        confirmed: Counter[str] = Counter()
        while self._sent and (wait or self.producer.ended(self._sent[0][2])):
            entry, topic, delivery = self._sent.popleft()
            problem = self.producer.outcome(delivery)
            if problem is None:
                confirmed[topic] += 1
                continue
            refused = True
            self._settle_before(entry)
            self._fail(self.settled, problem)
        if refused:
            self.producer.renew()  # after a fatal error this one would refuse everything, as long as the worker lives
        for topic, count in confirmed.items():
            self.events.notice("responded", topic=topic, count=count)

    def _settle_before(self, entry: PlainRecord) -> None:
        while self.entries[self.settled] is not entry:
            self.settled += 1

    @property
    def _flush_time(self) -> float:
        """Seconds for a flush, which ends by itself before: if the alarm broke it off, the whole job would be done again."""
        return max(self.handling.job_timeout, FLUSH_TIMEOUT + 10)

    def due(self) -> list[Failure]:
        """The failures of settled messages, each of them once."""
        due = [index for index in sorted(self._failed) if index < self.settled]
        return [self._failed.pop(index) for index in due]


def run_entries(
    app: Flowkit, handling: Handling, entries: Sequence[Entry], attempt: int, *, last: bool | None = None
) -> list[Failure]:
    """Handles messages one by one, sends their responses, and gives those that failed: for workers other than RQ's."""

    def call(entry: PlainRecord, attempt: int, received: float) -> Sequence[Response]:  # noqa: ARG001
        record = handling.record(entry)
        return handling.handle(handling.message(record, attempt, record.received, last))

    messages = Messages(app, handling, entries, attempt, Alarm(Until()), call=call)
    messages.handle()
    messages.settle(wait=True)
    return messages.due()


def settle_failures(
    app: Flowkit, handling: Handling, failures: Sequence[Failure], attempt: int, alarm: Alarm, *, alone: bool = False
) -> list[Failure]:
    """Tells the hooks of each failure, sends the dead letters that are due, and gives those to be tried again.

    Where a dead letter cannot be sent now, its failure is to be tried again because of that; where it never can, its failure
    stays as it is.
    """
    rest = []
    told_by_rq = alone and OwnWorker.application is None  # RQ's own workers log the error that a job raises
    for failure in failures:
        alarm.allow(handling.job_timeout)  # it has rung already where the message took too long
        last = handling.retry.ends(attempt, failure.error)
        details = about(failure.record, handling.group) if failure.record else {"topic": handling.topic}
        app.events.notice_error(
            "failed",
            failure.error,
            message=_what_failed(handling, failure, attempt, last=last),
            traceback=attempt == 1 and not isinstance(failure.error, FlowkitError) and not told_by_rq,
            **details,
            attempt=attempt,
            last=last,
        )
        if failure.record is not None:
            handling.failed(failure.record, failure.error, attempt, failure.record.received, last=last)
            _settle_submitted(app, alarm)
        if last and handling.on_poison == "skip":
            record = failure.record or PlainRecord._make(failure.entry)
            app.events.notice_error("skipped", failure.error, **handling.skipped(record, failure.error, attempt))
        elif last and handling.on_poison == "dead_letter" and failure.record is not None:
            rest += _bury(app, handling, failure, failure.record, attempt, alarm)
        else:
            rest.append(failure)
    alarm.allow(FLUSH_TIMEOUT + 10)
    return rest


def _what_failed(handling: Handling, failure: Failure, attempt: int, *, last: bool) -> str:
    where = place(failure.record) if failure.record else handling.topic
    if not last:
        then = "to be tried again"
    elif handling.on_poison == "skip":
        then = "it is skipped"
    elif handling.dead_letter:
        then = f"goes to {handling.dead_letter}"
    else:
        then = "stays in RQ's failed jobs"
    hint = "; job_timeout= gives it longer" if isinstance(failure.error, JobTimeoutException) else ""
    what = f"{where} failed, attempt {attempt} of {handling.retry.attempts}, {then}"
    return f"{what}: {type(failure.error).__name__}: {failure.error}{hint}"


def _bury(
    app: Flowkit, handling: Handling, failure: Failure, record: PlainRecord, attempt: int, alarm: Alarm
) -> list[Failure]:
    """Sends a dead letter. Gives the failure as it goes on if that does not succeed, else nothing."""
    alarm.allow(2 * FLUSH_TIMEOUT + 10)
    try:
        send_letter(app.producer, handling.dead(record, failure.error, attempt))
    except ShutDownImminentException:
        raise
    except Exception as problem:
        message = f"the dead letter of {place(record)} could not be sent: {problem}"
        app.events.notice_error("delivery", problem, message=message, topic=handling.dead_letter)
        return [failure._replace(error=problem) if is_passing(problem) else failure]
    details = about(record, handling.group)
    app.events.notice("dead", **details, attempt=attempt, dead_letter=handling.dead_letter)
    if (limit := handling.count_dead()) is not None:
        OwnWorker.halt(limit)
    return []


def _settle_submitted(app: Flowkit, alarm: Alarm) -> None:
    """Waits for what hooks sent with ``producer.submit``: a work horse ends without it."""
    if app.producer.under_way:
        alarm.allow(FLUSH_TIMEOUT + 10)
        app.producer.settle()


def tell_end(app: Flowkit, handling: Handling, failure: Failure, attempt: int, delay: float | None) -> None:
    """Tells the monitor how a failed message goes on: again after ``delay`` seconds, or not (None)."""
    if failure.record is None:
        return
    details = about(failure.record, handling.group)
    if delay is None:
        app.events.notice("dead", **details, attempt=attempt, dead_letter=None)
    else:
        app.events.notice("retried", **details, attempt=next_attempt(attempt, failure.error), delay=delay)
