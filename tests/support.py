"""What the unit tests share: applications that need no broker, and records as a client delivers them."""

from __future__ import annotations

import contextlib
import re
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from redis import Redis
from rq.serializers import DefaultSerializer

from flowkit import Flowkit
from flowkit.clients.memory import Broker
from flowkit.dispatch import Until
from flowkit.message import Partition, PlainRecord, Record
from flowkit.producer import Producer
from flowkit.queues import BACK, Writer, make_jobs
from flowkit.responses import Response


def shown(value: Any) -> str:
    """The name of a parameter for the id of its test: the same in every process, so without addresses."""
    ordered = sorted(value, key=str) if isinstance(value, set | frozenset) else value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(ordered))


def make_app(**settings: Any) -> Flowkit:
    """An application that runs its handlers in the consumer, if not told otherwise."""
    return Flowkit("shop", **{"inline": True, **settings})


def connect(app: Flowkit) -> Broker:
    """Gives the application a broker in memory to send to."""
    broker = Broker()
    app._producer = Producer(lambda: app.settings, broker.producer)
    return broker


def make_record(value: bytes | None = b"{}", **fields: Any) -> PlainRecord:
    return PlainRecord(
        **{
            "topic": "orders",
            "partition": 2,
            "offset": 1017,
            "timestamp": 1_700_000_000_123,
            "key": b"ann",
            "value": value,
            "headers": (("trace", b"1"), ("trace", b"2")),
            **fields,
        }
    )


def run(
    app: Flowkit, *values: bytes | None, topic: str = "orders", send: Callable[..., None] | None = None
) -> tuple[int, Exception | None, list[Response]]:
    """Values through an inline route as the consumer does it: how many were finished, the error, what was sent."""
    sent: list[Response] = []

    def keep(record: Record, responses: Sequence[Response]) -> None:
        sent.extend(responses)

    until = Until()
    until.at = time.monotonic() + 60
    records = [make_record(value, topic=topic, offset=offset) for offset, value in enumerate(values)]
    done, error = app.handling(topic).run(records, send or keep, attempt=1, received=time.time(), until=until)
    return done, error, sent


def content_of(data: bytes) -> tuple[Any, list[Any]]:
    """What is in the job that has this ``data`` in Redis: its head, which is the same for all of its messages, and those."""
    with contextlib.suppress(zlib.error):  # RQ packs what it stores by itself
        data = zlib.decompress(data)
    _, _, (app, topic, attempt, entries), _ = DefaultSerializer.loads(data)
    return {"app": app, "topic": topic, "attempt": attempt}, entries


def messages_of(data: bytes) -> list[tuple[int, int]]:
    """The partition and offset of each message in the job that has this ``data`` in Redis."""
    return [(entry[1], entry[2]) for entry in content_of(data)[1]]


def put_jobs(
    redis: Redis, app: Flowkit, topic: str, entries: list[Any], size: int = 1000, place: str = BACK
) -> list[str]:
    """Queues messages as the consumer does, but by RQ's own functions; gives the ids of the jobs."""
    handling = app.handling(topic)
    jobs = make_jobs(app.reference, handling, handling.queue, entries, size=size, place=place)
    with redis.pipeline() as pipe:
        Writer(redis, app.settings.name).by_rq(pipe, jobs)
        pipe.execute()
    return [job.id for job in jobs]


def an_entry(topic: str, offset: int, partition: int = 0, value: bytes | None = b"{}") -> tuple[Any, ...]:
    """A message as jobs hold it."""
    return (topic, partition, offset, 1_700_000_000_000, None, value, (), 0.0)


class Owner:
    """Who a consumer client tells of its partitions."""

    def __init__(self) -> None:
        self.moves: list[tuple[Partition, int, int]] = []
        self.mine: set[Partition] = set()
        self.confirmations: list[Any] = []
        self.refusals: list[tuple[Any, Exception]] = []

    def assigned(self, partitions: Any) -> None:
        self.mine.update(partitions)

    def revoked(self, partitions: Any) -> dict[Partition, int]:
        self.mine.difference_update(partitions)
        return {}

    def confirmed(self, offsets: Any) -> None:
        self.confirmations.append(offsets)

    def refused(self, offsets: Any, error: Exception) -> None:
        self.refusals.append((offsets, error))

    def lost(self, partitions: Any) -> None: ...
    def moved(self, partition: Partition, before: int, after: int) -> None:
        self.moves.append((partition, before, after))
