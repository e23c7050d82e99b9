"""What a handler knows of its message."""

from __future__ import annotations

import datetime
from typing import Any

import orjson
import pytest
from support import make_record

from flowkit import Headers, Message, ParserError
from flowkit.message import Partition, PlainRecord, Reception, place
from flowkit.parsers import Json
from flowkit.payload import decoder


class Decode:
    """Parses JSON, and counts how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, value: bytes | None) -> Any:
        self.calls += 1
        return None if value is None else orjson.loads(value)


def make_message(value: bytes | None = b'{"id": 7}', decode: Any = None, **options: Any) -> Message:
    return Message(make_record(value), Reception(decode or Decode(), **{"group": "shop_orders", **options}))


def test_a_message_is_as_kafka_has_it() -> None:
    message = make_message(attempt=3, received=1_700_000_001.5, queue="express", worker="celery")

    assert (message.topic, message.partition, message.offset) == ("orders", 2, 1017)
    assert (message.key, message.value) == (b"ann", b'{"id": 7}')
    assert message.payload == {"id": 7}
    assert message.timestamp == datetime.datetime(2023, 11, 14, 22, 13, 20, 123000, tzinfo=datetime.UTC)
    assert message.received_at == datetime.datetime(2023, 11, 14, 22, 13, 21, 500000, tzinfo=datetime.UTC)
    assert message.timestamp.utcoffset() == message.received_at.utcoffset() == datetime.timedelta(0)
    assert (message.group, message.attempt, message.queue, message.worker) == ("shop_orders", 3, "express", "celery")
    assert repr(message) == "<Message orders[2]@1017 attempt 3>"


@pytest.mark.parametrize(
    "name",
    ["topic", "partition", "offset", "key", "value", "headers", "timestamp", "received_at", "group", "attempt"],
)
def test_where_a_message_came_from_cannot_be_changed(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(make_message(), name, None)


def test_where_a_message_goes_can_be_changed() -> None:
    message = make_message()

    message.payload, message.queue, message.worker = [1], "slow", "dramatiq"

    assert (message.payload, message.queue, message.worker) == ([1], "slow", "dramatiq")


def test_a_misspelt_name_is_an_error() -> None:
    with pytest.raises(AttributeError):
        make_message().que = "express"  # type: ignore[attr-defined]


def test_the_payload_is_parsed_when_first_asked_for_and_once() -> None:
    decode = Decode()
    message = make_message(decode=decode)
    assert decode.calls == 0

    assert message.payload is message.payload

    assert decode.calls == 1


def test_a_payload_of_none_is_parsed_once_too() -> None:
    decode = Decode()
    message = make_message(None, decode)

    assert message.payload is message.payload is None

    assert decode.calls == 1


def test_an_assigned_payload_saves_the_parsing() -> None:
    decode = Decode()
    message = make_message(b"not JSON", decode)

    message.payload = 1

    assert message.payload == 1
    assert decode.calls == 0


def test_a_payload_nobody_looked_at_has_not_changed() -> None:
    decode = Decode()

    assert not make_message(b"not JSON", decode).payload_changed
    assert decode.calls == 0


def test_a_payload_that_was_only_read_has_not_changed() -> None:
    message = make_message()

    assert message.payload == {"id": 7}

    assert not message.payload_changed


def test_a_payload_changed_in_place_is_noticed() -> None:
    message = make_message()

    message.payload["id"] = 8

    assert message.payload_changed
    assert message.payload == {"id": 8}


def test_an_assigned_payload_is_noticed() -> None:
    message = make_message()

    message.payload = {"id": 8}

    assert message.payload_changed


def test_an_equal_payload_is_no_change() -> None:
    message = make_message()

    message.payload = {"id": 7}

    assert not message.payload_changed


def test_a_payload_put_in_the_place_of_one_that_cannot_be_parsed_is_a_change() -> None:
    message = make_message(b"not JSON", decoder(Json, list[int]))
    with pytest.raises(ParserError):
        _ = message.payload

    message.payload = [1]

    assert message.payload_changed


def test_headers_read_as_a_mapping_in_which_the_last_of_a_name_counts() -> None:
    headers = Headers([("a", b"1"), ("b", None), ("a", b"2")])

    assert headers["a"] == b"2"
    assert headers.get("b", b"x") is None
    assert headers.get("c") is None
    assert dict(headers) == {"a": b"2", "b": None}
    assert len(headers) == 2
    assert "a" in headers
    assert "c" not in headers
    with pytest.raises(KeyError):
        _ = headers["c"]


def test_headers_keep_every_pair_in_order() -> None:
    headers = Headers([("a", b"1"), ("b", None), ("a", b"2")])

    assert headers.pairs == (("a", b"1"), ("b", None), ("a", b"2"))
    assert repr(headers) == "Headers([('a', b'1'), ('b', None), ('a', b'2')])"


def test_headers_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        make_message().headers["trace"] = b"3"  # type: ignore[index]


def test_a_message_without_headers_has_empty_ones() -> None:
    message = Message(PlainRecord("t", 0, 0, 0, None, None), Reception(Decode(), "g"))

    assert dict(message.headers) == {}
    assert message.headers.pairs == ()


def test_a_place_reads_the_same_everywhere() -> None:
    assert place(make_record()) == "orders[2]@1017"


def test_a_partition_equals_the_tuple_that_clients_use() -> None:
    assert Partition("orders", 2) == ("orders", 2)
    assert {Partition("orders", 2): 1}[("orders", 2)] == 1  # type: ignore[index]
