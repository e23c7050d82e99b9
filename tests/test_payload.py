"""From the bytes of a message to what a handler's annotation asks for."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import sys
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Generic, Literal, Optional, TypeVar

import msgspec
import pydantic
import pytest
import typing_extensions

from flowkit import ConfigurationError, ParserError, PayloadError
from flowkit.parsers import Json, Raw, Text
from flowkit.payload import decoder

T = TypeVar("T")


@dataclasses.dataclass
class Order:
    id: int
    user: str
    total: float = 0.0


@dataclasses.dataclass
class Basket:
    orders: list[Order]
    at: datetime.datetime


# pydantic refuses typing.TypedDict before Python 3.12
class Dict(typing_extensions.TypedDict):
    id: int
    user: str


class TypingDict(typing.TypedDict):
    id: int
    user: str


class Model(pydantic.BaseModel):
    id: int
    user: str = pydantic.Field(min_length=1)


class Struct(msgspec.Struct):
    id: int
    user: str


class Kind(enum.Enum):
    BIG = "big"


@dataclasses.dataclass
class Box(Generic[T]):
    content: T


class Opaque:
    """A class that nothing knows how to read."""


@dataclasses.dataclass
class Unfinished:
    part: Missing  # type: ignore[name-defined]  # noqa: F821


class UnfinishedStruct(msgspec.Struct):
    part: Missing  # type: ignore[name-defined]  # noqa: F821


class Pairs:
    """A parser of ``id=7;user=ann``."""

    @staticmethod
    def parse(data: bytes) -> dict[str, str]:
        try:
            return dict(part.split("=") for part in data.decode().split(";"))
        except ValueError as error:
            raise ParserError(f"no pairs: {data!r}") from error

    @staticmethod
    def generate(value: Mapping[str, Any]) -> str:
        return ";".join(f"{name}={item}" for name, item in value.items())


class Broken:
    """A parser with a bug."""

    @staticmethod
    def parse(data: bytes) -> Any:
        raise KeyError("bug")

    generate = parse


UNTYPED = [Any, object, dict, dict[str, Any]]
ONE = b'{"id": 7, "user": "ann"}'
TYPED: list[tuple[Any, bytes, Any]] = [
    (Order, ONE, Order(7, "ann")),
    (Dict, ONE, {"id": 7, "user": "ann"}),
    (Model, ONE, Model(id=7, user="ann")),
    (Struct, ONE, Struct(7, "ann")),
    (list[Order], b"[" + ONE + b"]", [Order(7, "ann")]),
    (list[Dict], b"[" + ONE + b"]", [{"id": 7, "user": "ann"}]),
    (list[Model], b"[]", []),
    (list[Struct], b"[" + ONE + b"]", [Struct(7, "ann")]),
    (dict[str, Struct], b'{"a": ' + ONE + b"}", {"a": Struct(7, "ann")}),
    (Optional[Order], ONE, Order(7, "ann")),  # noqa: UP045
    (Struct | None, ONE, Struct(7, "ann")),
    (Order | int, b"7", 7),
    (Basket, b'{"orders": [' + ONE + b'], "at": "2026-01-02T03:04:05Z"}', Basket(
        [Order(7, "ann")], datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    )),
    (Box[int], b'{"content": 7}', Box(7)),
    (Annotated[int, pydantic.Field(gt=0)], b"7", 7),
    (Literal["a", "b"], b'"b"', "b"),
    (Kind, b'"big"', Kind.BIG),
    (datetime.date, b'"2026-01-02"', datetime.date(2026, 1, 2)),
    (str, b'"text"', "text"),
    (int, b"7", 7),
    (float, b"7", 7.0),
    (tuple[int, str], b'[7, "ann"]', (7, "ann")),
    (set[int], b"[1, 2, 1]", {1, 2}),
    (dict[str, float], b'{"a": 1}', {"a": 1.0}),
    (list, b"[1]", [1]),
    (None, b"null", None),
]  # fmt: skip
WRONG: list[tuple[Any, bytes, str]] = [
    (Order, b'{"id": "x"}', "does not fit Order: id: .*integer.*; user: Field required"),
    (Dict, b'{"id": 7}', "does not fit Dict: user: Field required"),
    (Model, b'{"id": 7, "user": ""}', "does not fit Model: user: .*at least 1 character"),
    (Struct, b'{"id": "x", "user": ""}', r"does not fit Struct: Expected `int`, got `str` - at `\$\.id`"),
    (list[Order], b"[1]", "does not fit list.*: 0: "),
    (list[Struct], ONE, "does not fit list"),
    (Basket, b'{"orders": [{"id": 1}], "at": "now"}', "orders.0.user: Field required; at: "),
    (Annotated[int, pydantic.Field(gt=0)], b"0", "payload: .*greater than 0"),
    (int, b'"many"', "does not fit int: payload: .*integer"),
]


def ids(rows: list[Any]) -> list[str]:
    return [getattr(row[0], "__name__", str(row[0])) + f"-{number}" for number, row in enumerate(rows)]


@pytest.mark.parametrize("annotation", UNTYPED, ids=str)
@pytest.mark.parametrize("value", [b'{"a": 1}', b"[1]", b"1", b"null", b'"text"'])
def test_an_untyped_payload_is_what_the_parser_gave(annotation: Any, value: bytes) -> None:
    assert decoder(Json, annotation)(value) == json.loads(value)


@pytest.mark.parametrize("annotation", UNTYPED, ids=str)
@pytest.mark.parametrize("value", [b"", b"not JSON", b"\xff\x00", b"{"])
def test_an_untyped_payload_that_cannot_be_parsed_goes_on_as_the_seed_has_it(annotation: Any, value: bytes) -> None:
    assert decoder(Json, annotation)(value) == {"message": value}


@pytest.mark.parametrize("annotation", UNTYPED, ids=str)
def test_an_untyped_tombstone_is_none(annotation: Any) -> None:
    assert decoder(Json, annotation)(None) is None
    assert decoder(Broken, annotation)(None) is None


@pytest.mark.parametrize(("annotation", "value", "expected"), TYPED, ids=ids(TYPED))
def test_a_typed_payload_is_what_was_asked_for(annotation: Any, value: bytes, expected: Any) -> None:
    payload = decoder(Json, annotation)(value)

    assert payload == expected
    assert type(payload) is type(expected)


@pytest.mark.parametrize(("annotation", "value", "expected"), TYPED, ids=ids(TYPED))
def test_it_is_the_same_by_way_of_a_parser_of_ones_own(annotation: Any, value: bytes, expected: Any) -> None:
    payload = decoder(Json(), annotation)(value)

    assert payload == expected
    assert type(payload) is type(expected)


@pytest.mark.parametrize("parser", [Json, Json()], ids=["Json", "one's own"])
@pytest.mark.parametrize(("annotation", "value", "text"), WRONG, ids=ids(WRONG))
def test_a_payload_that_does_not_fit_is_an_error_in_one_line(
    parser: Any, annotation: Any, value: bytes, text: str
) -> None:
    with pytest.raises(PayloadError, match=text) as caught:
        decoder(parser, annotation)(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("parser", [Json, Json()], ids=["Json", "one's own"])
@pytest.mark.parametrize("annotation", [Order, Dict, Model, Struct, list[Order], Order | None, str, int], ids=str)
@pytest.mark.parametrize("value", [b"", b"not JSON", b"\xff", b'{"id": 7', b'"\xff"'])
def test_bad_json_for_a_typed_handler_is_a_parser_error(parser: Any, annotation: Any, value: bytes) -> None:
    with pytest.raises(ParserError):
        decoder(parser, annotation)(value)


@pytest.mark.parametrize("parser", [Json, Json()], ids=["Json", "one's own"])
@pytest.mark.parametrize("annotation", [Order, Dict, Model, Struct, list[Order], list[Struct], str, int], ids=str)
def test_a_tombstone_does_not_fit_a_type_without_none(parser: Any, annotation: Any) -> None:
    with pytest.raises(PayloadError, match="does not fit"):
        decoder(parser, annotation)(None)


@pytest.mark.parametrize("parser", [Json, Json()], ids=["Json", "one's own"])
@pytest.mark.parametrize(
    "annotation",
    [Order | None, Dict | None, Model | None, Struct | None, Optional[list[Order]], list[Struct] | None, None],  # noqa: UP045
    ids=str,
)
def test_a_tombstone_fits_a_type_with_none(parser: Any, annotation: Any) -> None:
    assert decoder(parser, annotation)(None) is None


def test_many_mistakes_are_cut_short() -> None:
    with pytest.raises(PayloadError) as caught:
        decoder(Json, list[int])(json.dumps(["x"] * 1000).encode())
    assert len(str(caught.value)) < 1000


def test_an_error_does_not_show_the_values_of_a_message() -> None:
    with pytest.raises(PayloadError) as caught:
        decoder(Json, Order)(b'{"id": "hunter2", "user": ["hunter2"]}')
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [(Order, Order(7, "ann")), (Dict, {"id": 7, "user": "ann"}), (Model, Model(id=7, user="ann"))],
    ids=["dataclass", "TypedDict", "pydantic"],
)
def test_a_type_is_read_from_what_another_parser_gives(annotation: Any, expected: Any) -> None:
    assert decoder(Pairs, annotation)(b"id=7;user=ann") == expected


def test_a_struct_is_read_from_what_another_parser_gives() -> None:
    class Both(Pairs):
        @staticmethod
        def parse(data: bytes) -> Any:
            pairs = Pairs.parse(data)
            return {**pairs, "id": int(pairs["id"])}

    assert decoder(Both, Struct)(b"id=7;user=ann") == Struct(7, "ann")


@pytest.mark.parametrize("annotation", [Order, Struct, int], ids=str)
def test_the_error_of_another_parser_passes_for_a_typed_handler(annotation: Any) -> None:
    with pytest.raises(ParserError, match="no pairs: b'x'"):
        decoder(Pairs, annotation)(b"x")


def test_the_error_of_another_parser_is_the_seeds_rule_for_an_untyped_one() -> None:
    assert decoder(Pairs, Any)(b"x") == {"message": b"x"}


@pytest.mark.parametrize("annotation", [Any, Order, Struct], ids=str)
def test_a_bug_in_a_parser_is_not_taken_for_a_bad_message(annotation: Any) -> None:
    with pytest.raises(KeyError, match="bug"):
        decoder(Broken, annotation)(b"{}")


def test_raw_and_text_parsers_go_with_their_types() -> None:
    assert decoder(Raw, bytes)(b"\xff\x00") == b"\xff\x00"
    assert decoder(Raw, Any)(b"\xff\x00") == b"\xff\x00"
    assert decoder(Text, str)("ä".encode()) == "ä"
    assert decoder(Text, int)(b"7") == 7


@pytest.mark.parametrize("annotation", [Opaque, list[Opaque], Opaque | None, Unfinished, UnfinishedStruct], ids=str)
def test_what_nothing_can_be_validated_against_is_refused_with_advice(annotation: Any) -> None:
    with pytest.raises(ConfigurationError, match="no payload can be validated against") as caught:
        decoder(Json, annotation)
    assert "use a dataclass, TypedDict, pydantic model or msgspec Struct, or Any" in str(caught.value)


def test_the_typed_dict_of_typing_works_or_says_what_does() -> None:
    if sys.version_info >= (3, 12):
        assert decoder(Json, TypingDict)(ONE) == {"id": 7, "user": "ann"}
    else:
        with pytest.raises(ConfigurationError, match=r"use `typing_extensions.TypedDict` instead"):
            decoder(Json, TypingDict)
