"""Interchangers carry the bytes of a message through the queue.

An interchanger is any object, class or module with two functions: ``load(value: bytes)`` before the queue, which gives
bytes or something JSON can hold, and ``parse(data) -> bytes`` in the worker.
"""

from __future__ import annotations

import base64
import importlib
import zlib
from typing import Any, Protocol

from .brief import brief
from .errors import QueueError, missing_package


class Interchanger(Protocol):
    """What flowkit needs of an interchanger."""

    def load(self, value: bytes, /) -> Any: ...

    def parse(self, data: Any, /) -> bytes: ...


def pack(value: bytes | None) -> Any:
    """Bytes as JSON can hold them: UTF-8 text as it is, anything else as ``{"base64": ...}``."""
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


def unpack(data: Any) -> bytes | None:
    """The inverse of ``pack``."""
    if data is None:
        return None
    if isinstance(data, str):
        return data.encode()
    try:
        return base64.b64decode(data["base64"], validate=True)
    except (TypeError, KeyError, ValueError) as error:
        raise QueueError(f"this is not what flowkit put into the queue: {brief(data)}") from error


class Plain:
    """The default: the bytes as they are."""

    @staticmethod
    def load(value: bytes) -> bytes:
        return value

    @staticmethod
    def parse(data: bytes) -> bytes:
        return data


class Base64:
    """Base64 for every message, as one text."""

    @staticmethod
    def load(value: bytes) -> str:
        return base64.b64encode(value).decode()

    @staticmethod
    def parse(data: str) -> bytes:
        try:
            return base64.b64decode(data.encode(), validate=True)
        except (AttributeError, ValueError) as error:
            raise _not_written("base64 wrote", data, error) from error


class Zlib:
    """Compressed by zlib, from ``level`` 1 (fast) to 9 (small): long messages take less of Redis."""

    def __init__(self, level: int = 6) -> None:
        self.level = level

    def load(self, value: bytes) -> bytes:
        return zlib.compress(value, self.level)

    def parse(self, data: bytes) -> bytes:
        try:
            return zlib.decompress(data)
        except (zlib.error, TypeError) as error:
            raise _not_written("zlib compressed", data, error) from error


class Zstd:
    """Compressed by Zstandard, from ``level`` 1 (fast) to 19 (small): faster than zlib, and smaller. Needs the extra ``zstd``.

    Raises ``ConfigurationError`` where neither Python (3.14 and newer) nor the package ``zstandard`` has it.
    """

    def __init__(self, level: int = 3) -> None:
        self.level = level
        self._library = _zstd()

    def load(self, value: bytes) -> bytes:
        data: bytes = self._library.compress(value, self.level)
        return data

    def parse(self, data: bytes) -> bytes:
        try:
            value: bytes = self._library.decompress(data)
        except (self._library.ZstdError, TypeError) as error:
            raise _not_written("zstd compressed", data, error) from error
        return value


def _zstd() -> Any:
    for name in ("compression.zstd", "zstandard"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise missing_package("flowkit.interchangers.Zstd", "zstandard", "zstd")


def _not_written(how: str, data: Any, error: Exception) -> QueueError:
    return QueueError(
        f"what is in the queue is not what {how}: {error}; it starts with {brief(data)}. Was the route's"
        " interchanger changed while messages were queued?"
    )
