"""From bytes to a value and back."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import uuid
from typing import Any

import msgspec
import pydantic
import pytest

from flowkit import ParserError
from flowkit.parsers import Json, Raw, Text


@dataclasses.dataclass
class Order:
    id: int
    user: str


class Model(pydantic.BaseModel):
    id: int
    at: datetime.datetime


class Struct(msgspec.Struct):
    id: int
    order: Order


class Colour(enum.Enum):
    RED = "red"


AT = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -1, 2**53, 1.5, "", "ä €", [], [1, [2]], {}, {"a": {"b": [None]}}],
    ids=repr,
)
def test_json_comes_back_as_it_was(value: Any) -> None:
    written = Json.generate(value)

    assert isinstance(written, bytes)
    assert Json.parse(written) == value == json.loads(written)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (Order(7, "ann"), {"id": 7, "user": "ann"}),
        (Model(id=7, at=AT), {"id": 7, "at": "2026-01-02T03:04:05Z"}),
        (Struct(7, Order(1, "ann")), {"id": 7, "order": {"id": 1, "user": "ann"}}),
        ([Model(id=7, at=AT)], [{"id": 7, "at": "2026-01-02T03:04:05Z"}]),
        (AT, "2026-01-02T03:04:05+00:00"),
        (AT.date(), "2026-01-02"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Colour.RED, "red"),
        ({3, 1, 2}, [1, 2, 3]),
        (frozenset("ab"), ["a", "b"]),
        ((1, 2), [1, 2]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_json_writes_what_python_programs_hold(value: Any, written: Any) -> None:
    assert json.loads(Json.generate(value)) == written


@pytest.mark.parametrize(
    "value",
    [object(), decimal.Decimal(1), b"bytes", {"a": object()}, {1: 2}, {1, "a"}, 2**70, "\ud800"],
    ids=lambda value: f"{type(value).__name__}-{id(value) % 97}",
)
def test_what_json_cannot_write_is_a_parser_error(value: Any) -> None:
    with pytest.raises(ParserError, match=f"{type(value).__name__} cannot be written as JSON"):
        Json.generate(value)


@pytest.mark.parametrize("data", [b"", b" ", b"{", b"nope", b"{'a': 1}", b'"\xff"', b"NaN", b"1 2"])
def test_what_is_not_json_is_a_parser_error_that_shows_its_start(data: bytes) -> None:
    with pytest.raises(ParserError, match="not JSON") as caught:
        Json.parse(data)
    assert repr(data[:60]) in str(caught.value)


def test_the_error_of_a_long_value_is_short() -> None:
    with pytest.raises(ParserError) as caught:
        Json.parse(b"x" * 900_000)
    assert len(str(caught.value)) < 300


def test_text_is_utf_8() -> None:
    assert Text.parse("ä €".encode()) == "ä €"
    assert Text.generate("ä €") == "ä €".encode()
    assert Text.generate(7) == b"7"
    with pytest.raises(ParserError, match="not UTF-8"):
        Text.parse(b"\xff")


def test_raw_is_the_bytes_themselves() -> None:
    every_byte = bytes(range(256))

    assert Raw.parse(every_byte) is every_byte
    assert Raw.generate(every_byte) == Raw.generate(bytearray(every_byte)) == every_byte
    assert Raw.generate(memoryview(every_byte)) == every_byte
    with pytest.raises(ParserError, match="the raw parser sends bytes, not dict"):
        Raw.generate({})
