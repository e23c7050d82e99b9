"""The responses of one handler call, and the check that they are the declared ones.

Responses are held back until the call has ended and the check has passed: a failed call sends nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from .errors import ConfigurationError, ResponseError, ResponseMissing, ResponseRepeated, ResponseUnregistered
from .message import HeaderPairs, Headers
from .route import Declaration, Handler

Declarations = Mapping[str, Declaration]


class Response(NamedTuple):
    """One message to be sent."""

    topic: str
    value: bytes | None
    key: bytes | None = None
    partition: int | None = None
    partition_key: bytes | None = None
    headers: HeaderPairs = ()


class Call:
    """One call of a handler (or of a responder): who it is, what it declared, what it has responded so far."""

    __slots__ = ("declarations", "generate", "name", "responder", "responder_calls", "responses")

    def __init__(
        self, name: str, declarations: Declarations, generate: Any, responder: Handler | None = None
    ) -> None:
        self.name = name
        self.declarations = declarations
        self.generate = generate
        self.responder = responder
        self.responses: list[Response] = []
        self.responder_calls = 0

    def respond_to(
        self,
        topic: str,
        data: Any,
        *,
        key: str | bytes | None = None,
        partition: int | None = None,
        partition_key: str | bytes | None = None,
        headers: Any = None,
    ) -> None:
        """Holds one response until the check; raises ``ResponseUnregistered`` for a topic that was not declared."""
        if topic not in self.declarations:
            raise ResponseUnregistered(
                f"{self.name} responded to {topic!r}, which it does not declare: "
                + (f"it declares {', '.join(sorted(self.declarations))}; " if self.declarations else "")
                + f"add @app.responds_to({topic!r})"
            )
        self.responses.append(response(topic, data, self.generate, key, partition, partition_key, headers))

    def take(self) -> list[Response]:
        """The responses so far, which are forgotten here."""
        taken, self.responses = self.responses, []
        return taken

    def check(self) -> None:
        """Raises ``ResponseMissing`` or ``ResponseRepeated`` where the responses are not the declared ones."""
        responses = self.responses
        for topic, declared in self.declarations.items():
            count = 0
            for sent in responses:
                if sent.topic == topic:
                    count += 1
            if count == 0 and declared.required:
                raise ResponseMissing(
                    f"{self.name} sent nothing to {topic!r}, which it declares as required; respond to it on every"
                    f" path, or declare it with required=False"
                )
            if count > 1 and not declared.multiple_usage:
                raise ResponseRepeated(
                    f"{self.name} sent {count} messages to {topic!r}, which it declares for one; send one,"
                    f" or declare it with multiple_usage=True"
                )


def response(
    topic: str, data: Any, generate: Any, key: Any, partition: Any, partition_key: Any, headers: Any
) -> Response:
    """A response from what the user gave: text and bytes pass as they are, everything else through the parser."""
    if partition is not None and partition_key is not None:
        raise ResponseError(f"{topic}: give partition or partition_key, not both")
    if partition is not None and (isinstance(partition, bool) or not isinstance(partition, int) or partition < 0):
        raise ResponseError(f"{topic}: partition is a number of at least 0, not {partition!r}")
    return Response(
        topic,
        encoded(data, generate),
        _bytes(topic, "key", key),
        partition,
        _bytes(topic, "partition_key", partition_key),
        _pairs(topic, headers),
    )


def encoded(data: Any, generate: Any) -> bytes | None:
    """The value of a message: None is a tombstone, text and bytes are taken as they are."""
    if data is None or isinstance(data, bytes):
        return data
    if not isinstance(data, str):
        data = generate(data)
    return data.encode() if isinstance(data, str) else bytes(data)


def _bytes(topic: str, what: str, value: Any) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    raise ResponseError(f"{topic}: {what} is text or bytes, not {type(value).__name__}; try {what}=str(...)")


def _pairs(topic: str, headers: Any) -> HeaderPairs:
    if not headers:
        return ()
    items: Any = headers.items() if isinstance(headers, Mapping) else headers
    if isinstance(headers, Headers):
        items = headers.pairs  # those of a message, passed on: a name may repeat
    pairs = []
    for item in items if isinstance(items, Iterable) else (None,):
        if not isinstance(item, tuple | list) or len(item) != 2 or not isinstance(item[0], str):
            raise ResponseError(f"{topic}: headers are a dict or a list of (name, value), not {headers!r}")
        pairs.append((item[0], _bytes(topic, f"header {item[0]!r}", item[1])))
    return tuple(pairs)


current: ContextVar[Call | None] = ContextVar("flowkit_call", default=None)


def respond_with(call: Call | None, responder: Handler, declarations: Declarations, generate: Any, args: Any) -> Any:
    """Calls ``responder``, checks its own declarations, and gives its responses to ``call`` where there is one."""
    name = getattr(responder, "__qualname__", repr(responder))
    if not declarations:
        raise ConfigurationError(f"{name} declares no topic; decorate it with @app.responds_to(...)")
    if inspect.iscoroutinefunction(responder):
        raise ConfigurationError(f"{name} is async; a responder is a plain function, which an async handler may call")
    inner = Call(name, declarations, generate)
    token = current.set(inner)
    try:
        responder(*args)
    finally:
        current.reset(token)
    inner.check()
    if call is not None:
        call.responses.extend(inner.responses)
        call.responder_calls += responder == call.responder
    return inner.responses
