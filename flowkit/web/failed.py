"""The failed jobs of an application: looking at them, putting them back, deleting them.

What is in Redis is read as data only: nothing of it is imported or called, as RQ's own fetching of a job would do.
"""

from __future__ import annotations

import base64
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import redis
from rq import Queue
from rq.exceptions import NoSuchJobError
from rq.registry import FailedJobRegistry
from rq.results import Result

from ..jobs import OwnJob
from ..progress import MORE
from ..queues import Envelope, Parcel, redis_errors, unpacked

LONGEST = 20_000
"""Characters of an error that are shown: its end, where a traceback has the error itself."""


@dataclass(frozen=True, slots=True)
class FailedJob:
    """A job of flowkit's that RQ has given up. ``place`` says which messages are in it, as log lines do."""

    id: str
    queue: str
    app: str
    topic: str
    place: str
    messages: int
    attempt: int
    error: str
    traceback: str
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class FailedJobs:
    """One page of the failed jobs, the latest first. ``foreign`` of those on it are not flowkit's, and left alone."""

    jobs: list[FailedJob]
    foreign: int
    total: int


class Gone(Exception):
    """The job has not failed (any more), or is not one of flowkit's: somebody else was faster."""


def failed_jobs(connection: redis.Redis, queues: Collection[str], start: int, count: int) -> FailedJobs:
    """``count`` failed jobs of these queues from the ``start``-th on. Raises ``RedisUnavailable``."""
    client: Any = connection
    found: list[tuple[float, str, str]] = []
    total = 0
    with redis_errors():
        for queue in queues:
            key = _registry(connection, queue).key
            total += client.zcard(key)
            # a job's score is when RQ will forget it, so the last one to fail has the highest
            latest = client.zrange(key, 0, start + count - 1, desc=True, withscores=True)
            found += [(score, queue, item.decode(errors="replace")) for item, score in latest]
        found.sort(reverse=True)
        wanted = [(queue, job_id) for _, queue, job_id in found[start : start + count]]
        with client.pipeline(transaction=False) as pipe:
            for _, job_id in wanted:
                pipe.hgetall(OwnJob.redis_job_namespace_prefix + job_id)
                pipe.xrevrange(Result.get_key(job_id), count=1)
            answers = pipe.execute()
    read = [
        _read(queue, job_id, fields, results)
        for (queue, job_id), fields, results in zip(wanted, answers[::2], answers[1::2], strict=True)
    ]
    jobs = [job for job in read if job is not None]
    return FailedJobs(jobs, len(read) - len(jobs), total)


def failed_job(connection: redis.Redis, queue: str, job_id: str) -> FailedJob:
    """One failed job. Raises ``Gone`` and ``RedisUnavailable``."""
    client: Any = connection
    with redis_errors():
        score = client.zscore(_registry(connection, queue).key, job_id)
        fields = client.hgetall(OwnJob.redis_job_namespace_prefix + job_id)
        results = client.xrevrange(Result.get_key(job_id), count=1)
    job = None if score is None else _read(queue, job_id, fields, results)
    if job is None:
        raise Gone(job_id)
    return job


def retry(connection: redis.Redis, job: FailedJob) -> None:
    """Puts a failed job back into its queue. Raises ``Gone`` and ``RedisUnavailable``.

    In one step, unlike RQ's own ``requeue``, which loses the job where Redis goes away between its two.
    """
    client: Any = connection
    key = _registry(connection, job.queue).key

    def put_back(pipe: Any) -> None:
        if pipe.zscore(key, job.id) is None:
            raise Gone(job.id)
        found = OwnJob.fetch(job.id, connection=connection, serializer=Envelope)
        found.started_at = found.ended_at = None
        pipe.multi()
        pipe.zrem(key, job.id)
        Queue(job.queue, connection=connection, job_class=OwnJob, serializer=Envelope)._enqueue_job(
            found, pipeline=pipe
        )

    with redis_errors():
        try:
            client.transaction(put_back, key)
        except NoSuchJobError as error:
            raise Gone(job.id) from error


def delete(connection: redis.Redis, job: FailedJob) -> None:
    """Deletes a failed job, its messages with it. Raises ``Gone`` and ``RedisUnavailable``."""
    client: Any = connection
    with redis_errors():
        if not client.zrem(_registry(connection, job.queue).key, job.id):
            raise Gone(job.id)  # it may be back in its queue, and must stay there
        try:
            OwnJob.fetch(job.id, connection=connection, serializer=Envelope).delete()
        except NoSuchJobError as error:
            raise Gone(job.id) from error


def _registry(connection: redis.Redis, queue: str) -> FailedJobRegistry:
    return FailedJobRegistry(queue, connection=connection, serializer=Envelope, job_class=OwnJob)


def _read(queue: str, job_id: str, fields: dict[bytes, bytes], results: list[Any]) -> FailedJob | None:
    """None for what is no job of flowkit's, whatever else it may be."""
    try:
        called: Any = Envelope.loads(unpacked(fields.get(MORE.encode()) or fields[b"data"]))
        app, topic, attempt, entries, shard = Parcel.of(called[2])
        meta = Envelope.loads(fields[b"meta"]) if fields.get(b"meta") else {}
        attempt = int(meta.get("attempt", attempt))
        places = [f"[{entry[1]}]@{entry[2]}" for entry in (*entries[:1], *entries[1:][-1:])]
        ended = fields.get(b"ended_at", b"").decode()
        ended_at = datetime.fromisoformat(ended).astimezone(UTC) if ended else None
        trace = _trace(results)
    except Exception:  # anybody may write into Redis, and pickle raises what it likes
        return None
    return FailedJob(
        id=job_id,
        queue=queue,
        app=app,
        topic=topic,
        place=topic + " to ".join(places) if shard is None else f"queue {shard}",
        messages=len(entries),
        attempt=attempt,
        error=error_of(trace),
        traceback=trace,
        ended_at=ended_at,
    )


def _trace(results: list[Any]) -> str:
    """What the last run raised, as RQ keeps it."""
    if not results:
        return ""
    _, payload = results[0]
    packed = base64.b64decode(payload.get(b"exc_string", b""))
    return unpacked(packed).decode(errors="replace")[-LONGEST:].strip()


def error_of(trace: str) -> str:
    """The first line of the error at the end of a traceback."""
    lines = trace.splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    rest = lines[frames[-1] + 1 :] if frames else lines
    told = [line.strip() for line in rest if line.strip() and not line.startswith("    ")]
    return told[0] if told else "RQ kept no error of this job"
