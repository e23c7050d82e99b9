"""Whatever the bytes of a message are: a value, or a ``ParserError``; of a typed payload a ``PayloadError``."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import uuid
from typing import Annotated, Any, Literal

import msgspec
import pydantic
import pytest
import typing_extensions
from hypothesis import given
from hypothesis import strategies as st

from flowkit import ParserError, PayloadError, ResponseError
from flowkit.message import Headers
from flowkit.parsers import Json, Raw, Text
from flowkit.parsers.msgpack import MessagePack
from flowkit.parsers.xml import Xml
from flowkit.payload import decoder
from flowkit.responses import encoded, response

from .values import anything, headers, json_values

PARSERS = [Json, Text, Raw, MessagePack, Xml]


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Order:
    id: int
    user: str
    at: datetime.datetime
    total: decimal.Decimal = decimal.Decimal(0)
    more: Any = None


class Dict(typing_extensions.TypedDict):
    id: int
    tags: dict[str, list[int]]


class Model(pydantic.BaseModel):
    id: int
    name: Annotated[str, pydantic.Field(min_length=1)]
    inner: Model | None = None
    key: uuid.UUID | None = None


class Struct(msgspec.Struct):
    id: int
    at: datetime.datetime | None = None
    more: Any = None
    colour: Colour | None = None


TYPES = [Order, Dict, Model, Struct, list[Struct], list[Order], int, float, str, bytes, Literal["a", 1]]
TYPES += [datetime.datetime, datetime.timedelta, decimal.Decimal, uuid.UUID, dict[str, Model], Order | None]

objects: Any = st.recursive(
    json_values
    | st.binary(max_size=9)
    | st.text(st.characters(), max_size=5)
    | st.datetimes()
    | st.uuids()
    | st.decimals()
    | st.sets(st.integers() | st.text(max_size=2), max_size=3)
    | st.builds(object)
    | st.just(Colour.RED)
    | st.builds(Struct, st.integers()),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
"""What a handler might respond with, half a surrogate and a set of things that have no order among it."""


def error_of(read: Any, data: bytes | None) -> ParserError | None:
    """The error of reading, if it is the only one that may come."""
    try:
        read(data)
    except ParserError as error:
        return error
    return None


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.__name__)
@given(data=anything)
def test_a_parser_gives_a_value_or_a_parser_error(parser: Any, data: bytes) -> None:
    error = error_of(parser.parse, data)
    assert len(str(error)) < 1_000


@pytest.mark.parametrize("parser", [Json, Text, Raw, MessagePack], ids=lambda parser: parser.__name__)
@given(value=objects)
def test_a_response_is_written_or_is_a_parser_error(parser: Any, value: Any) -> None:
    try:
        written = encoded(value, parser)
    except (ParserError, ResponseError):
        return
    assert written is None or isinstance(written, bytes)


@given(value=json_values)
def test_msgpack_reads_what_it_writes(value: Any) -> None:
    try:
        written = MessagePack.generate(value)
    except ParserError:
        return  # a number of more than 64 bits
    assert json.dumps(MessagePack.parse(written)) == json.dumps(value)  # NaN is not itself


DECODERS = [(parser, decoder(parser, kind)) for parser in (Json, MessagePack, Text, Raw) for kind in TYPES]


def decode_all(data: bytes | None) -> int:
    """Decodes a value as every type; gives how many it fits."""
    fits = 0
    for parser, decode in DECODERS:
        error = error_of(decode, data)
        assert error is None or isinstance(error, PayloadError) or parser is not Json
        assert len(str(error)) < 5_000
        fits += error is None
    return fits


@given(data=st.none() | anything)
def test_a_typed_payload_is_valid_or_a_parser_error(data: bytes | None) -> None:
    decode_all(data)


@given(value=json_values)
def test_a_typed_payload_of_any_json_is_valid_or_a_payload_error(value: Any) -> None:
    fields = {"id": 1, "user": "a", "name": "b", "tags": {}, "more": value, "inner": value}
    for shape in (value, {"id": value}, [{"id": 1, "at": value}], {**fields, "at": value}):
        decode_all(json.dumps(shape).encode())
    assert decode_all(json.dumps({**fields, "at": "2026-01-01T00:00:00Z", "inner": None}).encode()) >= 3


@pytest.mark.parametrize("depth", [10, 100, 250, 1_000, 3_000, 200_000])
def test_a_typed_payload_that_is_nested_is_valid_or_a_parser_error(depth: int) -> None:
    for left, right in ((b"[", b"]"), (b'{"a":', b"}"), (b'{"id":1,"name":"b","inner":', b"}"), (b"\x91", b"")):
        inner = left * depth + b"1" + right * depth
        for data in (inner, b'{"id":1,"user":"a","at":"2026-01-01","more":' + inner + b"}"):
            decode_all(data)
        decode_all(b"\x82\xa2id\x01\xa4more" + inner)


@given(data=st.none() | anything)
def test_an_untyped_payload_is_never_an_error(data: bytes | None) -> None:
    payload = decoder(Json, Any)(data)

    try:
        expected = None if data is None else Json.parse(data)
    except ParserError:
        expected = {"message": data}
    assert repr(payload) == repr(expected)


names = st.text(st.characters(), max_size=5)
parts = (
    st.none() | st.binary(max_size=9) | names | st.integers() | st.booleans() | st.lists(st.integers(), max_size=2)
)


@given(
    key=parts,
    partition=parts,
    partition_key=parts,
    pairs=parts | st.dictionaries(names, parts, max_size=3) | st.lists(st.tuples(names, parts), max_size=3),
)
def test_a_key_a_partition_and_headers_are_taken_or_a_response_error(
    key: Any, partition: Any, partition_key: Any, pairs: Any
) -> None:
    try:
        made = response("orders", b"", Json, key, partition, partition_key, pairs)
    except ResponseError:
        return
    assert all(part is None or isinstance(part, bytes) for part in (made.key, made.partition_key))
    for name, value in made.headers:
        assert name.encode() is not None
        assert value is None or isinstance(value, bytes)


@given(pairs=headers)
def test_headers_are_kept_in_order_and_the_last_of_a_name_counts(pairs: Any) -> None:
    found = Headers(pairs)

    assert found.pairs == pairs
    assert dict(found) == dict(pairs)
    assert response("orders", b"", Json, None, None, None, found).headers == pairs
