"""RQ as the background: the jobs that carry messages, and what a worker does with them.

The job that RQ runs is always ``flowkit.jobs.perform``, its one argument is a JSON text: data, never code.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import pickle
import secrets
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
import redis
from rq import Queue, Retry, get_current_job
from rq.exceptions import ShutDownImminentException
from rq.job import Job
from rq.timeouts import JobTimeoutException

from .dispatch import Entry, Handling, as_failure, is_forced_stop
from .errors import FlowkitError, QueueError, RedisUnavailable, is_passing
from .message import Abort, Record, about, place
from .producer import FLUSH_TIMEOUT, Producer

if TYPE_CHECKING:
    from .app import Flowkit

PERFORM = "flowkit.jobs.perform"
RUNS = Retry(max=10, interval=[1, 2, 4, 8, 15, 30, 60, 60, 60, 60])
"""RQ's retries of each job, for what is no failed attempt of a message: its worker was killed, or its application could not be
imported. Attempts are counted apart from them, in the job's ``meta``, and begin these retries anew.
"""


class OwnWorker:
    """What is so in a process of ``flowkit worker``; everywhere else, in a plain ``rq worker`` too, it stays as it is here."""

    application: Flowkit | None = None
    """The one whose jobs it runs. A plain worker imports what each job names."""

    stopping = False
    """Whether it was asked to stop: then the message in hand is the last one."""

    told: BaseException | None = None
    """What flowkit has logged last and raises for RQ, which would log it once more."""


SPLIT_AFTER = 2
"""Runs of a job that ended so until each of its messages gets a job of its own: one of them may be what kills the worker."""


class Envelope:
    """RQ's job data as a plain ``rq worker`` reads it, which is pickle, but made of one text only.

    Reading it here refuses everything else, so a worker of flowkit never runs what somebody wrote into Redis.
    """

    class _TextOnly(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            raise QueueError(f"a job asks for {module}.{name}; flowkit's jobs hold text only")

    @staticmethod
    def dumps(value: Any) -> bytes:
        return pickle.dumps(value, protocol=4)

    @classmethod
    def loads(cls, data: bytes) -> Any:
        value = cls._TextOnly(io.BytesIO(data)).load()
        if value is None or isinstance(value, dict) or _is_call(value):  # a result, a job's meta, or its data
            return value
        asked = value[0] if isinstance(value, tuple) and value else type(value)
        raise QueueError(f"a job asks for {str(asked)[:120]}; flowkit's jobs call {PERFORM} with one text only")


def _is_call(value: object) -> bool:
    if not (isinstance(value, tuple) and len(value) == 4):
        return False
    function, instance, args, kwargs = value
    only_text = isinstance(args, tuple) and [type(arg) for arg in args] == [str]
    return only_text and (function, instance, kwargs) == (PERFORM, None, {})


class OwnJob(Job):
    """A job as a process of flowkit takes it from Redis: it runs ``perform``, and nothing else that is named there.

    Callbacks and webhooks are not followed, but they stay in Redis, so that a job of somebody else is unharmed.
    """

    @property
    def func(self) -> Callable[[str], None]:
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


def connect(settings: str | Mapping[str, Any]) -> redis.Redis:
    """A Redis client whose every wait is bounded; nothing is sent until it is used."""
    options: dict[str, Any] = {"socket_connect_timeout": 5, "socket_timeout": 15}
    if isinstance(settings, str):
        return redis.Redis.from_url(settings, **options)
    options |= settings
    url = options.pop("url", None)
    return redis.Redis.from_url(url, **options) if url else redis.Redis(**options)


def queues_key(application: str) -> str:
    """The Redis set of the queues that an application has put jobs into, so that they are worked on and looked after."""
    return f"flowkit:queues:{application}"


def route_queues(app: Flowkit) -> list[str]:
    """The queues that the routes name."""
    return sorted({h.queue for h in app.handlings.values() if not h.inline and h.worker is None})


def known_queues(connection: redis.Redis, application: str) -> set[str]:
    """The names of the queues that an application has put jobs into."""
    with redis_errors():
        keys: Any = connection.smembers(queues_key(application))
    return {key.decode().removeprefix(Queue.redis_queue_namespace_prefix) for key in keys}


def job_size(handling: Handling) -> int:
    """Messages in one job; one alone where a failed message gets no second attempt that could be a job of its own."""
    return handling.job_size if handling.retry.attempts > 1 else 1


def make_job(queue: Queue, reference: str, handling: Handling, entries: list[Entry], attempt: int = 1) -> Job:
    """An RQ job, not yet stored. Its description and id say which messages are in it."""
    data = {"app": reference, "topic": handling.topic, "attempt": attempt, "messages": entries}
    first, last = entries[0], entries[-1]
    what = f"{handling.topic}[{first[0]}]@{first[1]}"
    if len(entries) > 1:
        what += f" to [{last[0]}]@{last[1]}, {len(entries)} messages"
    name = f"{handling.topic}-{first[0]}-{first[1]}".replace("_", "__").replace(".", "_d")  # RQ refuses the dot
    return queue.create_job(
        PERFORM,
        args=(orjson.dumps(data).decode(),),
        job_id=f"{name}-{len(entries)}-{secrets.token_hex(4)}",
        description=what,
        timeout=max(1, round(handling.job_timeout * len(entries))),
        result_ttl=60,
        retry=RUNS,
    )


def job_arguments(queue: Queue, job: Job) -> list[Any]:
    """One job for the script. Which fields it has is taken from RQ itself."""
    queue._prepare_for_queue(job)
    fields = job.to_dict()
    fields["data"] = job.data  # RQ reads it uncompressed too, and packing would cost more than the rest
    flat = [part for name, value in fields.items() for part in (name, getattr(value, "value", value))]
    return [job.key, queue.key, job.id, len(flat), *flat]


@contextlib.contextmanager
def redis_errors() -> Iterator[None]:
    """Turns redis-py's errors into ``RedisUnavailable``, with the next step."""
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise RedisUnavailable(
            f"Redis does not answer: {str(error).rstrip('.')}; is it running, and is the redis setting right?"
            " (`flowkit dev` starts one for development)"
        ) from error
    except redis.RedisError as error:
        raise RedisUnavailable(f"Redis refuses: {error}") from error


# The worker's side.


def perform(data: str) -> None:
    """What RQ runs: the messages of one job. Raises what a message alone in its job failed with, so that RQ retries it."""
    try:
        job = orjson.loads(data)
        reference, topic, attempt, entries = job["app"], job["topic"], job["attempt"], job["messages"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise QueueError(f"this job is not one of flowkit's: {data[:120]}") from error
    app = _application(reference)
    app.start()
    handling = app.handling(topic)
    current = get_current_job()
    alone = len(entries) == 1
    if alone and current is not None:
        attempt = current.meta.get("attempt", attempt)
    left = RUNS.max if current is None or current.retries_left is None else current.retries_left
    if current is not None and not alone and left <= RUNS.max - SPLIT_AFTER:
        _put_back(app, handling, current, [(entry, 0.0, attempt) for entry in entries], [], attempt)
        return
    unbegun: list[Entry] = []
    if alone and left == 0 and handling.dead_letter and current is not None and not current.latest_result():
        # the last run that RQ gives it; not one that somebody asks for later, when it has failed
        attempt = max(attempt, handling.retry.attempts)
        failures = [_given_up(handling, entries[0])]
    else:
        waiting = iter(entries)
        failures = run_entries(app, handling, _until_stop(waiting), attempt)
        unbegun = list(waiting)
    app.events.notice("performed", topic=topic, count=len(entries) - len(unbegun), failed=len(failures))
    rest = settle_failures(app, handling, failures, attempt, alone)
    if not (rest or unbegun):
        return
    if alone:
        delay = None if current is None else _tell_rq(current, handling, attempt, rest[0].error)
        _tell_end(app, handling, rest[0], attempt, delay)
        OwnWorker.told = rest[0].error
        raise rest[0].error
    if current is None:
        raise QueueError("a job of many messages can put its failed ones back only when RQ runs it")
    wait = handling.retry.delay
    again = [(failure.entry, wait(attempt), _next_attempt(attempt, failure.error)) for failure in rest]
    _put_back(app, handling, current, again, unbegun, attempt)
    for failure, (_, seconds, _) in zip(rest, again, strict=True):
        _tell_end(app, handling, failure, attempt, seconds)


def _application(reference: str) -> Flowkit:
    """The application of a job. What a job names is imported by plain workers only: flowkit's have theirs, and no other."""
    from .locate import locate

    own = OwnWorker.application
    if own is None:
        return locate(reference)
    if reference != own.reference:
        raise QueueError(
            f"this job belongs to the application {str(reference)[:120]!r}, and this worker to {own.reference!r}: start"
            " `flowkit run` and `flowkit worker` with the same reference, and give each application queues of its own"
        )
    return own


def _until_stop(entries: Iterator[Entry]) -> Iterator[Entry]:
    """The entries up to the one in hand when the worker is asked to stop; the others stay in ``entries``."""
    for entry in entries:
        yield entry
        if OwnWorker.stopping:
            return


def _next_attempt(attempt: int, error: Exception) -> int:
    return attempt if is_passing(error) else attempt + 1


def _tell_rq(job: Job, handling: Handling, attempt: int, error: Exception) -> int | None:
    """Sets what RQ does with the job when its error is raised: it tries again after the route's wait, or gives up.

    Gives the seconds until then; None if it gives up.
    """
    if attempt >= handling.retry.attempts and not is_passing(error):
        job.retries_left = 0
        return None
    delay = max(1, round(handling.retry.delay(attempt)))
    job.meta["attempt"] = _next_attempt(attempt, error)
    job.retries_left = RUNS.max + 1  # of which RQ takes one
    job.retry_intervals = [delay]
    return delay


def _tell_end(app: Flowkit, handling: Handling, failure: Failure, attempt: int, delay: float | None) -> None:
    """Tells the monitor how a failed message goes on: again after ``delay`` seconds, or not (None)."""
    if failure.record is None:
        return
    details = about(failure.record, handling.group)
    if delay is None:
        app.events.notice("dead", **details, attempt=attempt, dead_letter=None)
    else:
        app.events.notice("retried", **details, attempt=_next_attempt(attempt, failure.error), delay=delay)


class Failure(NamedTuple):
    """One message that failed, in a worker."""

    entry: Entry
    record: Record | None
    error: Exception


def _given_up(handling: Handling, entry: Entry) -> Failure:
    error = QueueError(f"{RUNS.max} runs of its job had no end: its worker was killed, or could not do its work")
    return Failure(entry, handling.record(entry), error)


def _settle_submitted(producer: Producer, handling: Handling) -> None:
    """Waits for what handlers and hooks sent with ``producer.submit``: a work horse ends without it."""
    if producer.under_way:
        _restart_alarm(_flush_time(handling))
        producer.settle()


def run_entries(
    app: Flowkit, handling: Handling, entries: Iterable[Entry], attempt: int, *, last: bool | None = None
) -> list[Failure]:
    """Handles the messages of a job one by one, sends their responses, and gives those that failed."""
    producer = app.producer
    failures: list[Failure] = []
    sent: list[tuple[Entry, Record, str, Any]] = []
    for entry in entries:
        _restart_alarm(handling.job_timeout)
        record: Record | None = None
        try:
            record = handling.record(entry)
            for response in handling.handle(handling.message(record, attempt, entry[3], last)):
                sent.append((entry, record, response.topic, producer.start(response)))
        except Abort:
            continue
        except ShutDownImminentException:
            raise
        except (Exception, SystemExit) as error:
            if is_forced_stop(error):
                raise
            failures.append(Failure(entry, record, as_failure(error)))
    _settle_submitted(producer, handling)
    if sent:
        _restart_alarm(_flush_time(handling))
        producer.flush()
        failed = {id(failure.entry) for failure in failures}
        refused = False
        confirmed: Counter[str] = Counter()
        for entry, record, topic, delivery in sent:
            problem = producer.outcome(delivery)
            if problem is None:
                confirmed[topic] += 1
                continue
            refused = True
            if id(entry) not in failed:
                failures.append(Failure(entry, record, problem))
                failed.add(id(entry))
        if refused:
            producer.renew()  # after a fatal error this one would refuse everything, as long as the worker lives
        for topic, count in confirmed.items():
            app.events.notice("responded", topic=topic, count=count)
    return failures


def settle_failures(
    app: Flowkit, handling: Handling, failures: Sequence[Failure], attempt: int, alone: bool
) -> list[Failure]:
    """Tells the hooks of each failure, sends the dead letters that are due, and gives those to be tried again.

    Where a dead letter cannot be sent now, its failure is to be tried again because of that; where it never can, its failure
    stays as it is.
    """
    rest = []
    told_by_rq = alone and OwnWorker.application is None  # RQ's own workers log the error that a job raises
    for failure in failures:
        _restart_alarm(handling.job_timeout)  # it has rung already where the message took too long
        last = attempt >= handling.retry.attempts and not is_passing(failure.error)
        where = place(failure.record) if failure.record else handling.topic
        details = about(failure.record, handling.group) if failure.record else {"topic": handling.topic}
        if not last:
            then = "to be tried again"
        else:
            then = f"goes to {handling.dead_letter}" if handling.dead_letter else "stays in RQ's failed jobs"
        hint = "; job_timeout= gives it longer" if isinstance(failure.error, JobTimeoutException) else ""
        app.events.notice_error(
            "failed",
            failure.error,
            message=f"{where} failed, attempt {attempt} of {handling.retry.attempts}, {then}: "
            f"{type(failure.error).__name__}: {failure.error}{hint}",
            traceback=attempt == 1 and not isinstance(failure.error, FlowkitError) and not told_by_rq,
            **details,
            attempt=attempt,
            last=last,
        )
        if failure.record is not None:
            handling.failed(failure.record, failure.error, attempt, failure.entry[3], last=last)
            _settle_submitted(app.producer, handling)
        if not (last and handling.dead_letter and failure.record is not None):
            rest.append(failure)
            continue
        _restart_alarm(_flush_time(handling))
        try:
            app.producer.send_all([handling.dead(failure.record, failure.error, attempt)])
        except ShutDownImminentException:
            raise
        except Exception as problem:
            message = f"the dead letter of {where} could not be sent: {problem}"
            app.events.notice_error("delivery", problem, message=message, topic=handling.dead_letter)
            rest.append(failure._replace(error=problem) if is_passing(problem) else failure)
        else:
            app.events.notice("dead", **details, attempt=attempt, dead_letter=handling.dead_letter)
    return rest


def _put_back(
    app: Flowkit,
    handling: Handling,
    job: Job,
    alone: Iterable[tuple[Entry, float, int]],
    unbegun: list[Entry],
    attempt: int,
) -> None:
    """Puts messages of a job back: those ``alone`` in a job each, with the seconds until then and their attempt number; the
    ``unbegun`` ones as one job at the front of the queue.
    """
    now = datetime.datetime.now(datetime.UTC)
    with redis_errors(), job.connection.pipeline() as pipe:
        queue = Queue(job.origin, connection=job.connection, serializer=Envelope)
        for entry, wait, number in alone:
            made = make_job(queue, app.reference, handling, [entry], number)
            queue.schedule_job(made, now + datetime.timedelta(seconds=wait), pipeline=pipe)
        if unbegun:
            made = make_job(queue, app.reference, handling, unbegun, attempt)
            queue._enqueue_job(made, pipeline=pipe, at_front=True)  # enqueue_job would need the pipeline for itself
        pipe.execute()


def _flush_time(handling: Handling) -> float:
    """Seconds for a flush, which ends by itself before: if the alarm broke it off, the whole job would be done again."""
    return max(handling.job_timeout, FLUSH_TIMEOUT + 10)


def _restart_alarm(seconds: float) -> None:
    """Gives the next message its full time: RQ's alarm is set once for a job, here it runs anew for each message."""
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGALRM)
        if getattr(handler, "__name__", "") == "handle_death_penalty":
            signal.setitimer(signal.ITIMER_REAL, seconds)
