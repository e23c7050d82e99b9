"""Jobs as RQ and Redis hold them: how one is made and written, which queues there are, and a connection to Redis.

The job that RQ runs is always ``flowkit.jobs.perform``. What it is given is made of texts, bytes and numbers: data, never code.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import pickle
import resource
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import redis
from rq import Queue, Retry
from rq.job import Job, JobStatus
from rq.registry import ScheduledJobRegistry
from rq.utils import utcformat

from .brief import brief
from .dispatch import Entry, Handling
from .errors import QueueError, RedisUnavailable

if TYPE_CHECKING:
    from .app import Flowkit

logger = logging.getLogger(__name__)

PERFORM = "flowkit.jobs.perform"
RUNS = Retry(max=10, interval=[1, 2, 4, 8, 15, 30, 60, 60, 60, 60])
"""RQ's retries of each job, for what is no failed attempt of a message: its worker was killed, or its application could not be
imported. Attempts are counted apart from them, in the job's ``meta``, and begin these retries anew.
"""

RESULT_TTL = 60
"""Seconds that RQ keeps a finished job."""

MOST_BYTES = 1024 * 1024
"""Bytes of one job above which its messages are divided, as long as it has more than one."""

MOST_UNPACKED = 128 * 1024 * 1024
"""Bytes of a job that RQ has packed; a few of them could become so many that they fill the memory."""

ROOM = 256 * 1024 * 1024
"""Bytes of memory that reading a job may take, besides a multiple of its size: its pickle may ask for any number."""

BACK, FRONT = "", "front"
"""The ends of a queue where a job may be put."""


# Redis.


def connect(settings: str | Mapping[str, Any]) -> redis.Redis:
    """A Redis client whose every wait is bounded; nothing is sent until it is used."""
    options: dict[str, Any] = {"socket_connect_timeout": 5, "socket_timeout": 15}
    # after a failover the connections still lead to the old master, which is a replica now: its answer ends them
    options["retry_on_error"] = [redis.ReadOnlyError]
    if isinstance(settings, str):
        return redis.Redis.from_url(settings, **options)
    options |= settings
    url = options.pop("url", None)
    return redis.Redis.from_url(url, **options) if url else redis.Redis(**options)


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


def queues_key(application: str) -> str:
    """The Redis set of the queues that an application has put jobs into, so that they are worked on and looked after."""
    return f"flowkit:queues:{application}"


def paces_key(application: str) -> str:
    """The Redis hash of what handlers were measured to take: topic to ``seconds messages``, both sums that fade."""
    return f"flowkit:paces:{application}"


def open_key(application: str, queue: str) -> str:
    """The Redis key that is there while a process of RQ has nothing to do, and would go on with a job of this queue."""
    return f"flowkit:open:{application}:{queue}"


def route_queues(app: Flowkit) -> list[str]:
    """The queues of the routes; of an ordered one those of its shards."""
    return sorted({name for h in app.handlings.values() for name in h.queues})


def known_queues(connection: redis.Redis, application: str) -> set[str]:
    """The names of the queues that an application has put jobs into."""
    with redis_errors():
        keys: Any = connection.smembers(queues_key(application))
    return {key.decode().removeprefix(Queue.redis_queue_namespace_prefix) for key in keys}


# What a job holds.


class Envelope:
    """RQ's job data as a plain ``rq worker`` reads it, which is pickle, but made of texts, bytes and numbers only.

    Reading it here refuses everything else, so a worker of flowkit never runs what somebody wrote into Redis. Whatever is
    there: ``loads`` gives data or raises ``QueueError``, and imports and calls nothing.
    """

    class _DataOnly(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            raise QueueError(f"a job asks for {module}.{name}; flowkit's jobs hold data only")

    @staticmethod
    def dumps(value: Any) -> bytes:
        return pickle.dumps(value, protocol=4)

    @staticmethod
    def emptied(parcel: Parcel) -> bytes:
        """A job that is done, without its messages: RQ keeps it for a minute, and packs and sends its data anew. As text."""
        return pickle.dumps((PERFORM, None, ("", parcel.topic, parcel.attempt, []), {}), protocol=0)

    @classmethod
    def loads(cls, data: bytes) -> Any:
        try:
            with _bounded(ROOM + 16 * len(data)):
                value = cls._DataOnly(io.BytesIO(data)).load()
        except UNREADABLE as error:
            why = str(error)[:120] or type(error).__name__
            raise QueueError(f"a job is not written as flowkit's and RQ's are: {why}") from error
        if value is None or isinstance(value, dict) or _is_call(value):  # a result, a job's meta, or its data
            return value
        asked = value[0] if isinstance(value, tuple) and value else type(value)
        asked = asked if isinstance(asked, str) and len(asked) <= 120 else brief(asked)
        raise QueueError(f"a job asks for {asked}; flowkit's jobs call {PERFORM} and nothing else")


UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    RecursionError,
)
"""What ``pickle`` raises for data that is no pickle, or an impossible one."""

_bounding = threading.Lock()


@contextlib.contextmanager
def _bounded(room: int) -> Iterator[None]:
    """Within it the process cannot grow by more than ``room`` bytes: an allocation beyond raises ``MemoryError``. On Linux;
    elsewhere it does nothing.
    """
    try:
        with open("/proc/self/statm", "rb") as statm:
            size = int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:
        yield
        return
    with _bounding:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        least = min(limit for limit in (size + room, soft) if limit != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, (least, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def unpacked(data: bytes) -> bytes:
    """A field of a job as it was before RQ packed it, or as it is if it is not packed. Raises ``QueueError`` where it would be
    more than ``MOST_UNPACKED`` bytes.
    """
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data, MOST_UNPACKED + 1)
    except zlib.error:
        return data  # the consumer leaves it as it is
    if len(found) > MOST_UNPACKED:
        raise QueueError(f"a job of {len(data):,} bytes would have more than {MOST_UNPACKED:,} bytes when unpacked")
    return found if stream.eof else data


def _is_call(value: object) -> bool:
    if not (isinstance(value, tuple) and len(value) == 4 and isinstance(value[2], tuple)):
        return False
    function, instance, args, kwargs = value
    return (function, instance, kwargs) == (PERFORM, None, {}) and [type(arg) for arg in args] == [
        str,
        str,
        int,
        list,
    ]


class Parcel(NamedTuple):
    """What one job holds: messages of one topic, their application's reference, and the number of their next attempt.

    The job of a shard holds no messages, but the name of the shard's queue: see ``flowkit.shards``.
    """

    reference: str
    topic: str
    attempt: int
    entries: list[Entry]
    shard: str | None = None

    @classmethod
    def of(cls, args: Sequence[Any]) -> Parcel:
        """The arguments of ``perform``. Raises ``QueueError`` for those of a job that flowkit did not write."""
        try:
            reference, topic, attempt, entries = args
            if attempt == 0 and [type(part) for part in (reference, topic, *entries)] == [str, str, str]:
                return cls(reference, topic, 0, [], entries[0])
            sound = isinstance(reference, str) and isinstance(attempt, int) and isinstance(entries, list)
            for entry in entries if sound else ():
                named, partition, offset, timestamp, _, _, _, received = entry
                typed = type(partition) is type(offset) is type(timestamp) is int and type(received) is float
                if named != topic or not typed or not 0 <= partition < 2**31 or not 0 <= offset < 2**63:
                    sound = False
        except (TypeError, ValueError):
            sound = False
        if not sound:
            raise QueueError(f"this job is not one of flowkit's: {brief(args)}")
        return cls(reference, topic, attempt, entries)


class Made(NamedTuple):
    """A job that is not yet stored. ``place``: ``BACK``, ``FRONT``, or the Unix time from which on it is due, as text."""

    id: str
    queue: str
    place: str
    description: str
    timeout: int
    args: tuple[str, str, int, list[Any]]
    data: bytes
    meta: dict[str, Any] | None = None

    @property
    def messages(self) -> int:
        return len(self.args[3])


def make_jobs(
    reference: str,
    handling: Handling,
    queue: str,
    entries: list[Entry],
    *,
    size: int,
    attempt: int = 1,
    place: str = BACK,
) -> list[Made]:
    """Jobs of ``size`` messages at most, and of ``MOST_BYTES`` unless one message alone is larger, in order."""
    jobs: list[Made] = []
    waiting = [entries[start : start + size] for start in range(0, len(entries), size)]
    waiting.reverse()
    while waiting:
        part = waiting.pop()
        args = (reference, handling.topic, attempt, part)
        data = Envelope.dumps((PERFORM, None, args, {}))
        if len(data) > MOST_BYTES and len(part) > 1:
            fewer = max(1, len(part) * MOST_BYTES // len(data))
            waiting += [part[start : start + fewer] for start in range(0, len(part), fewer)][::-1]
            continue
        name, description = _named(handling.topic, part)
        timeout = handling.job_timeout if len(part) == 1 else handling.job_timeout + handling.longest_job
        meta = {"topic": handling.topic, "offsets": _offsets(part)}
        jobs.append(Made(name, queue, place, description, max(1, round(timeout)), args, data, meta))
    return jobs


def fitting(seconds: float, handling: Handling) -> int:
    """Messages in a job, where one takes so many seconds."""
    return max(1, min(handling.job_size, int(handling.job_seconds / max(seconds, 1e-9))))


def _named(topic: str, entries: list[Entry]) -> tuple[str, str]:
    """The id and the description of a job, which say what is in it."""
    first, last = entries[0], entries[-1]
    what = f"{topic}[{first[1]}]@{first[2]}"
    if len(entries) > 1:
        what += f" to [{last[1]}]@{last[2]}, {len(entries)} messages"
    return job_id(f"{topic}-{first[1]}-{first[2]}-{len(entries)}"), what


def _offsets(entries: list[Entry]) -> dict[int, tuple[int, int]]:
    """The first and the last offset of each partition."""
    first = {entry[1]: entry[2] for entry in reversed(entries)}
    return {
        partition: (first[partition], last) for partition, last in {entry[1]: entry[2] for entry in entries}.items()
    }


def job_id(name: str) -> str:
    """An id that begins with ``name``, as RQ takes it, and is that of no other job."""
    return f"{name.replace('_', '__').replace('.', '_d')}-{os.urandom(4).hex()}"  # RQ refuses the dot


# How a job is written. Many go to Redis in one call of a script, together with what must move with them.

STORE = """
-- The block of fields in ARGV at that jobs have alike, and where it ends.
local function alike(at)
  local count = tonumber(ARGV[at])
  return {unpack(ARGV, at + 1, at + count)}, at + count + 1
end
-- The job in ARGV at: eleven arguments. Gives where they end. KEYS[1], KEYS[2]: sets of queues.
local function write(at, common)
  local key, list, id, place = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  redis.call('HSET', key, 'origin', ARGV[at + 4], 'status', ARGV[at + 5], 'timeout', ARGV[at + 6],
    'description', ARGV[at + 7], 'data', ARGV[at + 8], unpack(common))
  if ARGV[at + 10] ~= '' then redis.call('HSET', key, 'meta', ARGV[at + 10]) end
  if place == '' then redis.call('RPUSH', list, id)
  elseif place == 'front' then redis.call('LPUSH', list, id)
  else redis.call('ZADD', list, place, id) end
  local queue = ARGV[at + 9]
  redis.call('SADD', KEYS[1], queue)
  redis.call('SADD', KEYS[2], queue)
  return at + 11
end
-- The jobs in ARGV from at up to the end, behind what they have alike, if that was not read yet.
local function store(at, common)
  if not common then common, at = alike(at) end
  while at <= #ARGV do
    at = write(at, common)
  end
end
"""
"""Lua that writes jobs, for scripts that move something else with them."""

OWN_FIELDS = frozenset({"origin", "status", "timeout", "description", "data", "created_at", "enqueued_at"})
"""The fields of a job's hash that differ from job to job; the others are as RQ writes them, whatever they are."""


class Writer:
    """Writes the jobs of one application into Redis as RQ itself would."""

    def __init__(self, connection: redis.Redis, application: str) -> None:
        self.connection = connection
        self.application = application

    @property
    def keys(self) -> list[str]:
        """The keys that ``STORE`` is given first."""
        return [Queue.redis_queues_keys, queues_key(self.application)]

    @functools.cached_property
    def shared(self) -> list[Any] | None:
        """The fields that all jobs have alike, as RQ writes them; None where it writes jobs in a way unknown to flowkit."""
        with redis_errors():
            try:
                return _shared_fields(self.connection)
            except (AttributeError, TypeError, ValueError, KeyError) as error:
                warn_of(repr(error))
                return None

    def arguments(self, jobs: Iterable[Made]) -> list[Any]:
        """The jobs as ``STORE`` takes them."""
        arguments = self.alike()
        for job in jobs:
            arguments += self.fields(job)
        return arguments

    def alike(self) -> list[Any]:
        """What all jobs that are written now have alike."""
        assert self.shared is not None
        now = utcformat(datetime.now(UTC))
        return [len(self.shared) + 4, "created_at", now, "enqueued_at", now, *self.shared]

    def fields(self, job: Made) -> tuple[Any, ...]:
        """What only this job has."""
        queue = Queue(job.queue, connection=self.connection)
        later = job.place not in (BACK, FRONT)
        return (
            Job.key_for(job.id),
            ScheduledJobRegistry(job.queue, connection=self.connection).key if later else queue.key,
            job.id,
            job.place,
            job.queue,
            (JobStatus.SCHEDULED if later else JobStatus.QUEUED).value,
            job.timeout,
            job.description,
            job.data,
            queue.key,
            Envelope.dumps(job.meta) if job.meta else "",
        )

    def by_rq(self, pipe: Any, jobs: Iterable[Made]) -> None:
        """The same through RQ's own functions, as commands of a transaction."""
        many: dict[str, list[Any]] = {}
        for job in jobs:
            queue = Queue(job.queue, connection=self.connection, serializer=Envelope)
            options: dict[str, Any] = {
                "args": job.args,
                "job_id": job.id,
                "description": job.description,
                "timeout": job.timeout,
                "result_ttl": RESULT_TTL,
                "retry": RUNS,
                "meta": job.meta,
            }
            if job.place in (BACK, FRONT):
                many.setdefault(job.queue, []).append(
                    Queue.prepare_data(PERFORM, at_front=job.place == FRONT, **options)
                )
            else:
                due = datetime.fromtimestamp(float(job.place), UTC)
                queue.schedule_job(queue.create_job(PERFORM, **options), due, pipeline=pipe)
            pipe.sadd(queues_key(self.application), queue.key)
        for name, data in many.items():
            Queue(name, connection=self.connection, serializer=Envelope).enqueue_many(data, pipeline=pipe)


@functools.cache
def warn_of(problem: str) -> None:
    """Says once in a process, and not once a job, why jobs go another way."""
    logger.warning(
        "this version of RQ stores jobs in another way than flowkit knows (%s): they are queued through RQ's own functions,"
        " which is slower. Nothing else changes; a newer flowkit may know it.",
        problem,
    )


def _shared_fields(connection: redis.Redis) -> list[Any]:
    """Makes a job with RQ, and sees that RQ reads the same out of the fields that flowkit would write."""
    queue = Queue("probe", connection=connection, serializer=Envelope)
    args: tuple[Any, ...] = ("app", "topic", 1, [])
    job = queue.create_job(
        PERFORM, args=args, job_id="probe", description="what", timeout=7, result_ttl=RESULT_TTL, retry=RUNS
    )
    queue._prepare_for_queue(job)
    fields = {name: getattr(value, "value", value) for name, value in job.to_dict().items()}
    fields["data"] = job.data  # RQ reads it uncompressed too, and packing would cost more than the rest
    read = Job("probe", connection=connection, serializer=Envelope)
    read.restore({name.encode(): _as_redis_gives(value) for name, value in fields.items()})
    for name in ("func_name", "args", "origin", "description", "timeout", "result_ttl", "retries_left"):
        if getattr(read, name) != getattr(job, name):
            raise ValueError(f"{name} comes back as {getattr(read, name)!r}")
    if read.retry_intervals != RUNS.intervals or read.get_status(refresh=False) != JobStatus.QUEUED:
        raise ValueError(
            f"retries come back as {read.retry_intervals}, the status as {read.get_status(refresh=False)}"
        )
    if missing := OWN_FIELDS - fields.keys():
        raise KeyError(f"no {', '.join(sorted(missing))}")
    return [part for name, value in fields.items() if name not in OWN_FIELDS for part in (name, value)]


def _as_redis_gives(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
