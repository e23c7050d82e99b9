"""Parsers turn the bytes of a message into a value and back.

A parser is any object, class or module with two functions: ``parse(data: bytes) -> value``, which raises ``ParserError``
for what it does not understand, and ``generate(value) -> bytes | str``. ``Json`` is the default.
"""

from __future__ import annotations

from typing import Any, Protocol

import orjson

from .errors import ParserError


class Parser(Protocol):
    """What flowkit needs of a parser."""

    def parse(self, data: bytes, /) -> Any: ...

    def generate(self, value: Any, /) -> bytes | str: ...


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
