"""MessagePack: the values of JSON, bytes and moments in time, in fewer bytes. Needs the extra ``msgpack``."""

from __future__ import annotations

import datetime
import decimal
import enum
import uuid
from typing import Any

from ..errors import ParserError, missing_package
from . import fields_of

try:
    import msgpack
except ImportError as error:
    raise missing_package("flowkit.parsers.msgpack", "msgpack", "msgpack") from error


class MessagePack:
    """MessagePack of one value a message: also writes dataclasses, pydantic models, msgspec Structs, sets, enums and UUIDs.

    An aware datetime is a timestamp of the format and is read back as one, in UTC; what the format has no kind for (a date,
    a naive datetime, a UUID, a Decimal) is written as text.
    """

    @staticmethod
    def parse(data: bytes) -> Any:
        try:
            return msgpack.unpackb(data, timestamp=3, strict_map_key=False)
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
            reason = str(error) or type(error).__name__
            raise ParserError(f"not MessagePack: {reason}; it starts with {data[:60]!r}") from error

    @staticmethod
    def generate(value: Any) -> bytes:
        try:
            packed: bytes = msgpack.packb(value, default=_packable, datetime=True)
        except (ValueError, TypeError, OverflowError) as error:
            raise ParserError(f"{type(value).__name__} cannot be written as MessagePack: {error}") from error
        return packed


def _packable(value: Any) -> Any:
    fields = fields_of(value)
    if fields is not None:
        return fields
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, uuid.UUID | decimal.Decimal):
        return str(value)
    raise TypeError(f"no rule for {type(value).__name__}")
