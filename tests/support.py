"""What the unit tests share: applications that need no broker, and records as a client delivers them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from flowkit import Flowkit
from flowkit.clients.memory import Broker
from flowkit.dispatch import Until
from flowkit.message import PlainRecord, Record
from flowkit.producer import Producer
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
