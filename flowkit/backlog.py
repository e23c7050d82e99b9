"""What is in the queues: for each of them the jobs, and the messages in those, that wait, run, are to come again or failed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import redis
from rq import Queue

from .queues import Envelope, connect, known_queues, redis_errors, route_queues
from .shards import shard_messages

if TYPE_CHECKING:
    from .app import Flowkit

MESSAGES = re.compile(rb"-\d+-\d+-(\d+)-[0-9a-f]{8}$")
"""The end of the id of one of flowkit's jobs: partition, offset, number of messages, and what makes it unique."""

PAGE = 10_000
"""Ids read from Redis at a time, which bounds how long others wait."""


class Count(NamedTuple):
    """So many jobs and the messages in them. A job that is not flowkit's counts as a job without messages."""

    jobs: int = 0
    messages: int = 0


class Backlog(NamedTuple):
    """What is in one queue."""

    queue: str
    waiting: Count
    """The messages of an ordered route's queue are all here, whatever the one job of it that RQ has at a time does."""
    running: Count
    scheduled: Count
    """To be tried again later, after a failure."""
    failed: Count
    """Given up; ``rq requeue`` puts them back."""

    @property
    def messages(self) -> int:
        """Messages that are still to be handled; of a running job all of them, although some are done."""
        return self.waiting.messages + self.running.messages + self.scheduled.messages


def backlog(app: Flowkit, connection: redis.Redis | None = None) -> list[Backlog]:
    """What is in each queue of an application: those its routes name, and those its hooks have chosen so far.

    The numbers are read one after the other, so while work goes on a job may be counted twice or not at all. Raises
    ``SettingsError`` where no Redis is set, and ``RedisUnavailable``.
    """
    settings = app.settings if app.settings.redis else app.settings_for_queues()
    assert settings.redis is not None
    own = connect(settings.redis) if connection is None else None
    client = own or connection
    assert client is not None
    try:
        names = queue_names(app, client)
        with redis_errors():
            return [_backlog(Queue(name, connection=client, serializer=Envelope), app) for name in names]
    finally:
        if own is not None:
            own.close()


def queue_names(app: Flowkit, connection: redis.Redis) -> list[str]:
    """The queues that an application's routes name, and those its hooks have chosen so far. Raises ``RedisUnavailable``."""
    return sorted({*route_queues(app), *known_queues(connection, app.settings.name)})


def _backlog(queue: Queue, app: Flowkit) -> Backlog:
    connection = queue.connection
    taken = _list(connection, queue.intermediate_queue_key)  # on its way from the queue to a worker
    waiting = _count([*_list(connection, queue.key), *taken])
    return Backlog(
        queue.name,
        waiting=waiting._replace(
            messages=waiting.messages + shard_messages(connection, app.settings.name, queue.name)
        ),
        running=_count(_sorted_set(connection, queue.started_job_registry.key)),
        scheduled=_count(_sorted_set(connection, queue.scheduled_job_registry.key)),
        failed=_count(_sorted_set(connection, queue.failed_job_registry.key)),
    )


def _list(connection: Any, key: str) -> Iterator[bytes]:
    start = 0
    while page := connection.lrange(key, start, start + PAGE - 1):
        yield from page
        start += PAGE


def _sorted_set(connection: Any, key: str) -> Iterator[bytes]:
    start = 0
    while page := connection.zrange(key, start, start + PAGE - 1):
        yield from page
        start += PAGE


def _count(ids: Iterable[bytes]) -> Count:
    jobs = messages = 0
    for item in ids:
        jobs += 1
        found = MESSAGES.search(item.partition(b":")[0])  # a running job's has the id of its execution behind it
        messages += int(found[1]) if found else 0
    return Count(jobs, messages)
