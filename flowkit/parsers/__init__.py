"""Parsers turn the bytes of a message into a value and back.

A parser is any object, class or module with two functions: ``parse(data: bytes) -> value``, which raises ``ParserError``
for what it does not understand, and ``generate(value) -> bytes | str``. ``Json`` is the default. One that depends on its topic
has a third, ``for_topic(topic)``, which gives the parser for that topic. ``flowkit.parsers.msgpack``, ``flowkit.parsers.xml``
and ``flowkit.parsers.registry`` have more, each with a package that it needs.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Protocol

import orjson

from ..errors import ParserError


class Parser(Protocol):
    """What flowkit needs of a parser."""

    def parse(self, data: bytes, /) -> Any: ...

    def generate(self, value: Any, /) -> bytes | str: ...


def for_topic(parser: Any, topic: str) -> Any:
    """The parser as it is for one topic: that of its ``for_topic``, where it has one."""
    bind = getattr(parser, "for_topic", None)
    return parser if bind is None else bind(topic)


def fields_of(value: Any) -> dict[str, Any] | None:
    """The fields of a dataclass, pydantic model or msgspec Struct by name; None for anything else."""
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "__struct_fields__"):
        return {name: getattr(value, name) for name in value.__struct_fields__}
    dump = getattr(value, "model_dump", None)
    return None if dump is None else dict(dump())


def plain(value: Any) -> Any:
    """A value of dicts, lists and scalars only: dataclasses, models, Structs, sets and enums become such, all the way down."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return [plain(item) for item in sorted(value)]
    fields = value if isinstance(value, dict) else fields_of(value)
    return value if fields is None else {plain(name): plain(item) for name, item in fields.items()}


class Json:
    """JSON in UTF-8, by orjson: also writes dataclasses, datetimes, UUIDs, enums and pydantic models."""

    @staticmethod
    def parse(data: bytes) -> Any:
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise ParserError(f"not JSON: {error}; it starts with {data[:60]!r}") from error

    @staticmethod
    def generate(value: Any) -> bytes:
        try:
            return orjson.dumps(value, default=_plain)
        except orjson.JSONEncodeError as error:
            raise ParserError(f"{type(value).__name__} cannot be written as JSON: {error}") from error


def _plain(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)  # pydantic models
    if dump is not None:
        return dump(mode="json")
    if hasattr(value, "__struct_fields__"):  # msgspec Structs
        return {name: getattr(value, name) for name in value.__struct_fields__}
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"no rule for {type(value).__name__}")


class Text:
    """Plain text in UTF-8."""

    @staticmethod
    def parse(data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ParserError(f"not UTF-8: {error}") from error

    @staticmethod
    def generate(value: Any) -> bytes:
        return str(value).encode()


class Raw:
    """The bytes as they are."""

    @staticmethod
    def parse(data: bytes) -> bytes:
        return data

    @staticmethod
    def generate(value: Any) -> bytes:
        if not isinstance(value, bytes | bytearray | memoryview):
            raise ParserError(f"the raw parser sends bytes, not {type(value).__name__}")
        return bytes(value)
