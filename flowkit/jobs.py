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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
import redis
from rq import Queue, Retry, get_current_job
from rq.exceptions import ShutDownImminentException
from rq.job import Job

from .dispatch import Abort, Entry, Handling
from .errors import FlowkitError, QueueError, RedisUnavailable, is_passing
from .message import Record, place
from .producer import Producer

if TYPE_CHECKING:
    from .app import Flowkit

PERFORM = "flowkit.jobs.perform"
RUNS = Retry(max=10, interval=[1, 2, 4, 8, 15, 30, 60, 60, 60, 60])
"""RQ's retries of each job, for what is no failed attempt of a message: its worker was killed, or its application could not be
imported. Attempts are counted apart from them, in the job's ``meta``, and begin these retries anew.
"""


class Telling:
    """Who logs the traceback of a message alone in its job: RQ's own workers do; in flowkit's, flowkit does."""

    by_rq = True
    told: BaseException | None = None
    """What flowkit has logged last, and raises for RQ."""


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
        if isinstance(value, tuple) and value[:1] != (PERFORM,):  # the function that RQ is to call
            raise QueueError(f"a job asks for {value[:1]}; flowkit's jobs call {PERFORM} only")
        return value


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
    from .locate import locate

    try:
        job = orjson.loads(data)
        reference, topic, attempt, entries = job["app"], job["topic"], job["attempt"], job["messages"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise QueueError(f"this job is not one of flowkit's: {data[:120]}") from error
    app = locate(reference)
    app.start()
    handling = app.handling(topic)
    current = get_current_job()
    alone = len(entries) == 1
    if alone and current is not None:
        attempt = current.meta.get("attempt", attempt)
    left = RUNS.max if current is None or current.retries_left is None else current.retries_left
    if current is not None and not alone and left <= RUNS.max - SPLIT_AFTER:
        _queue_alone(app, handling, current, [(entry, 0.0) for entry in entries], attempt)
        return
    if alone and left == 0 and handling.dead_letter and current is not None and not current.latest_result():
        # the last run that RQ gives it; not one that somebody asks for later, when it has failed
        attempt = max(attempt, handling.retry.attempts)
        failures = [_given_up(handling, entries[0])]
    else:
        failures = run_entries(handling, app.producer, entries, attempt)
    app.monitor.notice("performed", topic=topic, count=len(entries), failed=len(failures))
    rest = settle_failures(app, handling, failures, attempt, alone)
    if not rest:
        return
    if alone:
        if current is not None:
            _tell_rq(current, handling, attempt, passing=is_passing(rest[0].error))
        Telling.told = rest[0].error
        raise rest[0].error
    if current is None:
        raise QueueError("a job of many messages can put its failed ones back only when RQ runs it")
    waits = [(failure.entry, handling.retry.delay(attempt)) for failure in rest]
    _queue_alone(app, handling, current, waits, attempt + 1)


def _tell_rq(job: Job, handling: Handling, attempt: int, *, passing: bool) -> None:
    """Sets what RQ does with the job when its error is raised: it tries again after the route's wait, or gives up."""
    if attempt >= handling.retry.attempts and not passing:
        job.retries_left = 0
        return
    job.meta["attempt"] = attempt if passing else attempt + 1
    job.retries_left = RUNS.max + 1  # of which RQ takes one
    job.retry_intervals = [max(1, round(handling.retry.delay(attempt)))]


class Failure(NamedTuple):
    """One message that failed, in a worker."""

    entry: Entry
    record: Record | None
    error: Exception


def _given_up(handling: Handling, entry: Entry) -> Failure:
    error = QueueError(f"{RUNS.max} runs of its job had no end: its worker was killed, or could not do its work")
    return Failure(entry, handling.record(entry), error)


def run_entries(handling: Handling, producer: Producer, entries: Iterable[Entry], attempt: int) -> list[Failure]:
    """Handles the messages of a job one by one, sends their responses, and gives those that failed."""
    failures: list[Failure] = []
    sent: list[tuple[Entry, Record, Any]] = []
    for entry in entries:
        _restart_alarm(handling.job_timeout)
        record: Record | None = None
        try:
            record = handling.record(entry)
            for response in handling.handle(handling.message(record, attempt, entry[3])):
                sent.append((entry, record, producer.start(response)))
        except Abort:
            continue
        except ShutDownImminentException:
            raise
        except Exception as error:
            failures.append(Failure(entry, record, error))
    if sent:
        _restart_alarm(handling.job_timeout)
        producer.flush()
        failed = {id(failure.entry) for failure in failures}
        refused = False
        for entry, record, delivery in sent:
            problem = producer.outcome(delivery)
            refused = refused or problem is not None
            if problem is not None and id(entry) not in failed:
                failures.append(Failure(entry, record, problem))
                failed.add(id(entry))
        if refused:
            producer.renew()  # after a fatal error this one would refuse everything, as long as the worker lives
    return failures


def settle_failures(
    app: Flowkit, handling: Handling, failures: Sequence[Failure], attempt: int, alone: bool
) -> list[Failure]:
    """Tells the hooks of each failure, sends the dead letters that are due, and gives those to be tried again."""
    rest = []
    for failure in failures:
        _restart_alarm(handling.job_timeout)  # it has rung already where the message took too long
        last = attempt >= handling.retry.attempts and not is_passing(failure.error)
        where = place(failure.record) if failure.record else handling.topic
        app.monitor.notice_error(
            "handler",
            failure.error,
            message=f"{where} failed, attempt {attempt} of {handling.retry.attempts}: "
            f"{type(failure.error).__name__}: {failure.error}",
            traceback=attempt == 1 and not isinstance(failure.error, FlowkitError) and not (alone and Telling.by_rq),
            topic=handling.topic,
        )
        if failure.record is not None:
            handling.failed(failure.record, failure.error, attempt, failure.entry[3])
        if last and handling.dead_letter and failure.record is not None:
            app.producer.send_all([handling.dead(failure.record, failure.error, attempt)])
            app.monitor.notice("dead_letter", topic=handling.dead_letter, message=where)
        else:
            rest.append(failure)
    return rest


def _queue_alone(
    app: Flowkit, handling: Handling, job: Job, waits: Iterable[tuple[Entry, float]], attempt: int
) -> None:
    """Gives messages of a job a job each, due after so many seconds, for their attempt number ``attempt``."""
    now = datetime.datetime.now(datetime.UTC)
    with redis_errors(), job.connection.pipeline() as pipe:
        queue = Queue(job.origin, connection=job.connection, serializer=Envelope)
        for entry, wait in waits:
            alone = make_job(queue, app.reference, handling, [entry], attempt)
            queue.schedule_job(alone, now + datetime.timedelta(seconds=wait), pipeline=pipe)
        pipe.execute()


def _restart_alarm(seconds: float) -> None:
    """Gives the next message its full time: RQ's alarm is set once for a job, here it runs anew for each message."""
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGALRM)
        if getattr(handler, "__name__", "") == "handle_death_penalty":
            signal.setitimer(signal.ITIMER_REAL, seconds)
