"""The workers that serve an application's queues, as they have signed up in Redis themselves."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import redis
from rq import Worker
from rq.executions import WORKER_EXECUTIONS_KEY_TEMPLATE, Execution

from ..jobs import OwnJob
from ..queues import redis_errors


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One process of ``flowkit worker``, or one ``rq worker``. ``job`` is what it has in hand."""

    name: str
    host: str
    pid: str
    queues: tuple[str, ...]
    job: str | None
    done: int
    failed: int
    since: datetime | None
    heard: datetime | None


def workers(connection: redis.Redis, queues: Collection[str]) -> list[WorkerState]:
    """Those that work on at least one of these queues. Raises ``RedisUnavailable``."""
    client: Any = connection
    with redis_errors():
        keys = sorted(client.smembers(Worker.redis_workers_keys))
        with client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hgetall(key)
            answers = pipe.execute()
        states = []
        for key, raw in zip(keys, answers, strict=True):
            fields = {name.decode(): value.decode(errors="replace") for name, value in raw.items()}
            served = tuple(name for name in fields.get("queues", "").split(",") if name in queues)
            if not served or "death" in fields:  # killed ones stay in the set, without fields
                continue
            states.append(_state(client, key.decode(errors="replace"), fields, served))
    return sorted(states, key=lambda state: (state.queues, state.name))


def _state(client: Any, key: str, fields: dict[str, str], queues: tuple[str, ...]) -> WorkerState:
    name = key.removeprefix(Worker.redis_worker_namespace_prefix)
    return WorkerState(
        name=name,
        host=fields.get("hostname", ""),
        pid=fields.get("pid", ""),
        queues=queues,
        job=_in_hand(client, name),
        done=_number(fields.get("successful_job_count")),
        failed=_number(fields.get("failed_job_count")),
        since=_moment(fields.get("birth")),
        heard=_moment(fields.get("last_heartbeat")),
    )


def _in_hand(client: Any, worker: str) -> str | None:
    """What the job in hand says of itself: which messages are in it."""
    for member in client.smembers(WORKER_EXECUTIONS_KEY_TEMPLATE.format(worker)):
        job_id, _, execution_id = member.decode(errors="replace").partition(":")
        if client.exists(Execution(execution_id, job_id, connection=client).key):  # others were broken off
            description = client.hget(OwnJob.redis_job_namespace_prefix + job_id, "description")
            return str(description.decode(errors="replace")) if description else str(job_id)
    return None


def _number(text: str | None) -> int:
    try:
        return int(text or 0)
    except ValueError:  # anybody may write into Redis
        return 0


def _moment(text: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone(UTC) if text else None
    except (ValueError, OverflowError):
        return None
