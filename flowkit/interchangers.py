"""Interchangers carry the bytes of a message through the queue, whose jobs are JSON.

An interchanger is any object, class or module with two functions: ``load(value: bytes)`` before the queue, which gives
something JSON can hold (or bytes), and ``parse(data) -> bytes`` in the worker.
"""

from __future__ import annotations

import base64
from typing import Any, Protocol

from .errors import QueueError


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
        raise QueueError(f"this is not what flowkit put into the queue: {str(data)[:80]}") from error


class Plain:
    """The default: every message survives the queue byte for byte, and text stays readable in Redis."""

    load = staticmethod(pack)
    parse = staticmethod(unpack)


class Base64:
    """Base64 for every message, as one text."""

    @staticmethod
    def load(value: bytes) -> str:
        return base64.b64encode(value).decode()

    @staticmethod
    def parse(data: str) -> bytes:
        return base64.b64decode(data)
