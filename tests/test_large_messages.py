"""A message that is too large for a queue fails where it is, with the others past it; nothing of it reaches Redis."""

from __future__ import annotations

from typing import Any

import pytest
from support import make_app, make_record
from test_backpressure import clock  # noqa: F401 - a fixture
from test_consumer import Clock, Loop, Redis
from test_consumer import make_app as make_queued_app

from flowkit import QueueError, Retry
from flowkit.dispatch import Handling
from flowkit.interchangers import Base64
from flowkit.testing import Client


def handling_of(most: int, **options: Any) -> Handling:
    app = make_app(inline=False, max_message_bytes=most)
    app.topic("orders", **options)(lambda order: None)
    return app.handling("orders")


@pytest.mark.parametrize(
    "record",
    [
        make_record(b"x" * 101, key=None, headers=()),
        make_record(b"", key=b"x" * 101, headers=()),
        make_record(None, key=None, headers=[("name", b"x" * 97)]),
        make_record(None, key=None, headers=[("n" * 50, b"x" * 26), ("n" * 25, None)]),
        make_record(b"x" * 50, key=b"x" * 50, headers=[("n", None)]),
    ],
    ids=range(5),
)
def test_value_key_and_headers_count_together(record: Any) -> None:
    handling = handling_of(100)

    for entries in (lambda: handling.entries([make_record(), record], 0.0), lambda: handling.admit(record, 1, 0.0)):
        with pytest.raises(QueueError, match=r"orders\[2\]@1017 has 101 bytes, and max_message_bytes lets 100 into"):
            entries()
    assert len(handling_of(101).entries([make_record(), record], 0.0)) == 2


def test_what_an_interchanger_makes_of_it_counts() -> None:
    record = make_record(b"x" * 90, key=None, headers=())

    assert handling_of(90).entries([record], 0.0)
    with pytest.raises(QueueError, match="has 120 bytes"):
        handling_of(90, interchanger=Base64).entries([record], 0.0)


def test_an_inline_route_has_no_such_limit() -> None:
    app = make_app(max_message_bytes=10)
    seen: list[str] = []
    app.topic("orders")(seen.append)

    with Client(app) as client:
        client.send("orders", "x" * 5_000)
    assert len(seen[0]) == 5_000


def test_it_goes_to_its_dead_letter_and_the_others_to_their_queue(clock: Clock) -> None:  # noqa: F811
    app = make_queued_app(inline=False, max_message_bytes=1_000)
    app.topic("a", dead_letter="a.dead", retry=Retry(attempts=1))(lambda value: None)
    redis = Redis()
    loop = Loop(app, clock, redis)
    loop.put("a", 1)
    loop.put("a", "x" * 2_000)
    loop.put("a", 3)

    loop.turn(5, after=1)

    assert sorted(redis.jobs) == [("a", 0, 0), ("a", 0, 2)]
    assert loop.committed("a") == 3
    (letter,) = loop.broker.records("a.dead")
    assert letter.value == b"x" * 2_000
    assert b"max_message_bytes lets 1,000 into a queue" in (
        dict(letter.headers)["kafka_dlt-exception-message"] or b""
    )


def test_without_a_dead_letter_it_waits_and_nothing_of_it_is_queued(clock: Clock) -> None:  # noqa: F811
    app = make_queued_app(inline=False, max_message_bytes=1_000)
    app.topic("a")(lambda value: None)
    redis = Redis()
    loop = Loop(app, clock, redis)
    loop.put("a", 1)
    loop.put("a", "x" * 2_000)

    loop.turn(5, after=1)

    assert sorted(redis.jobs) == [("a", 0, 0)]
    assert loop.committed("a") == 1
    assert any("max_message_bytes" in str(error) for _, error, _ in loop.events.errors)
