"""The responses of one handler call, and the check that they are the declared ones.

Responses are held back until the call has ended and the check has passed: a failed call sends nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from .errors import (
    ConfigurationError,
    ParserError,
    ResponseError,
    ResponseMissing,
    ResponseRepeated,
    ResponseUnregistered,
)
from .message import HeaderPairs, Headers
from .parsers import for_topic
from .route import Declaration, Responder

Declarations = Mapping[str, Declaration]


class Response(NamedTuple):
    """One message to be sent. ``parser`` is the one that wrote its value."""

    topic: str
    value: bytes | None
    key: bytes | None = None
    partition: int | None = None
    partition_key: bytes | None = None
    headers: HeaderPairs = ()
    parser: Any = None


class Call:
    """One call of a handler (or of a responder): who it is, what it declared, what it has responded so far.

    ``declarations`` are those that ``with_parsers`` gave; ``parser`` is the route's, for responders that the call makes use of.
    """

    __slots__ = (
        "declarations",
        "has_ended",
        "name",
        "parser",
        "responder",
        "responder_calls",
        "responses",
        "returned_to",
    )

    def __init__(
        self, name: str, declarations: Declarations, parser: Any, responder: Responder | None = None
    ) -> None:
        self.name = name
        self.declarations = declarations
        self.parser = parser
        self.responder = responder
        self.responses: list[Response] = []
        self.responder_calls = 0
        self.returned_to: str | None = None
        self.has_ended = False

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
        declared = self.declarations.get(topic)
        if declared is None:
            raise ResponseUnregistered(
                f"{self.name} responded to {topic!r}, which it does not declare: "
                + (f"it declares {', '.join(sorted(self.declarations))}; " if self.declarations else "")
                + f"add @app.responds_to({topic!r})"
            )
        try:
            made = response(topic, data, declared.parser, key, partition, partition_key, headers)
        except ParserError as error:
            raise _unwritten(topic, error) from error
        if self.has_ended:  # meanwhile
            raise _too_late(self.name)
        self.responses.append(made)

    def answer(self, topic: str, data: Any) -> None:
        """``respond_to`` with what the handler returned, to a topic that it declares: nothing else is to be looked at."""
        self.returned_to = topic
        parser = self.declarations[topic].parser
        try:
            value = encoded(data, parser)
        except ParserError as error:
            raise _unwritten(topic, error) from error
        self.responses.append(Response(topic, value, parser=parser))

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
                    f"{self.name} sent {count} messages to {topic!r}, which it declares for one"
                    + (" (what it returned is one of them)" if topic == self.returned_to else "")
                    + "; send one, or declare it with multiple_usage=True"
                )


class Calls:
    """The calls of a handler, one after the other. A ``Call`` is made only for one that asks for it: to make one for each
    message takes a tenth of the time in which a message is read and answered.
    """

    __slots__ = ("declarations", "made", "name", "number", "parser")

    def __init__(self, name: str, declarations: Declarations, parser: Any) -> None:
        self.name = name
        self.declarations = declarations
        self.parser = parser
        self.number = -1
        """That of the one that lasts; -1 if none does."""
        self.made: dict[int, Call] = {}

    def at(self, number: int) -> Call:
        """Raises ``ResponseError`` if it does not last any more."""
        call = self.made.setdefault(number, self._make())
        if number != self.number:  # asked behind it: the loop goes on meanwhile
            self.made.pop(number, None)
            raise _too_late(self.name)
        return call

    def take(self, number: int) -> Call:
        """Which is forgotten here."""
        return self.made.pop(number, None) or self._make()

    def _make(self) -> Call:
        return Call(self.name, self.declarations, self.parser)


def _too_late(name: str) -> ResponseError:
    return ResponseError(
        f"{name} has ended, and its responses are on their way: what it has left running cannot add any. Wait for it in"
        " the handler, or let it send by app.producer.send(topic, value)"
    )


def _unwritten(topic: str, error: ParserError) -> ParserError:
    return ParserError(f"the response to {topic!r} cannot be written: {error}")


def with_parsers(declarations: Declarations, parser: Any) -> Declarations:
    """The declarations with the parser that writes each response, so that none is looked for in a call.

    ``parser`` is for those that declare none.
    """
    return {
        topic: Declaration(
            topic,
            required=declared.required,
            multiple_usage=declared.multiple_usage,
            parser=for_topic(declared.parser or parser, topic),
        )
        for topic, declared in declarations.items()
    }


def response(
    topic: str, data: Any, parser: Any, key: Any, partition: Any, partition_key: Any, headers: Any
) -> Response:
    """A response from what the user gave: text and bytes pass as they are, everything else through the parser."""
    if partition is not None and partition_key is not None:
        raise ResponseError(f"{topic}: give partition or partition_key, not both")
    if partition is not None and (isinstance(partition, bool) or not isinstance(partition, int) or partition < 0):
        raise ResponseError(f"{topic}: partition is a number of at least 0, not {partition!r}")
    return Response(
        topic,
        encoded(data, parser),
        _bytes(topic, "key", key),
        partition,
        _bytes(topic, "partition_key", partition_key),
        _pairs(topic, headers),
        parser,
    )


def encoded(data: Any, parser: Any) -> bytes | None:
    """The value of a message: None is a tombstone, text and bytes are taken as they are."""
    if data is None or isinstance(data, bytes):
        return data
    if not isinstance(data, str):
        data = parser.generate(data)
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


RESPOND = ("respond", "__call__")
"""The methods that make a class a responder, in the order they are looked for."""


def responder_name(responder: Any) -> str:
    """The name of a function or a class; of an object, that of its class."""
    named = responder if inspect.isroutine(responder) or isinstance(responder, type) else type(responder)
    return str(getattr(responder, "__qualname__", named.__qualname__))


def _method_of(responder: Any) -> Any:
    """What a function, a class or an object of one is called by, or None."""
    if not isinstance(responder, type):
        return getattr(responder, "respond", responder if callable(responder) else None)
    methods = [getattr(responder, name) for name in RESPOND if any(name in vars(kind) for kind in responder.__mro__)]
    return methods[0] if methods else None


def check_responder(responder: Any, declarations: Declarations, name: str) -> None:
    """Raises ``ConfigurationError`` for what cannot be a responder. ``name`` is how to call it in errors."""
    if not declarations:
        raise ConfigurationError(f"{name} declares no topic; decorate it with @app.responds_to(...)")
    method = _method_of(responder)
    if method is None:
        raise ConfigurationError(
            f"{name} has no method `respond`; a responder is a function, or a class that has one"
        )
    if inspect.iscoroutinefunction(method) or inspect.iscoroutinefunction(type(method).__call__):
        raise ConfigurationError(f"{name} is async; a responder is a plain function, which an async handler may call")
    if isinstance(responder, type):
        try:
            inspect.signature(responder).bind()
        except TypeError as error:
            raise ConfigurationError(
                f"{name} cannot be made without arguments ({error}); make one, and name that as the responder"
            ) from error


def declaring(handler: Any) -> Iterator[Any]:
    """All that may carry declarations for a handler or responder, the nearest first: it and what it wraps; for a class
    or an object of one also its classes and their methods, so that a subclass has those of its parents, and never gives
    them any.
    """
    yield handler
    if inspect.isroutine(handler):
        yield from _wrapped(getattr(handler, "__func__", handler))
        return
    yield from _wrapped(getattr(handler, "__wrapped__", None))
    for kind in handler.__mro__ if isinstance(handler, type) else type(handler).__mro__:
        yield kind
        for name in RESPOND:
            yield from _wrapped(vars(kind).get(name))


def _wrapped(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


current: ContextVar[Call | tuple[Calls, int] | None] = ContextVar("flowkit_call", default=None)
"""What lasts here: a call, or which one of many."""


def current_call() -> Call | None:
    """Raises ``ResponseError`` where it has ended."""
    found = current.get()
    if isinstance(found, tuple):
        calls, number = found
        return calls.at(number)
    if found is not None and found.has_ended:
        raise _too_late(found.name)
    return found


def respond_with(call: Call | None, responder: Responder, declarations: Declarations, parser: Any, args: Any) -> Any:
    """Calls ``responder``, which ``check_responder`` has seen, checks its own declarations, and gives its responses to
    ``call`` where there is one.
    """
    respond = _method_of(responder() if isinstance(responder, type) else responder)
    inner = Call(responder_name(responder), declarations, parser)
    token = current.set(inner)
    try:
        respond(*args)
    finally:
        current.reset(token)
        inner.has_ended = True
    inner.check()
    if call is not None:
        if call.has_ended:  # meanwhile
            raise _too_late(call.name)
        call.responses.extend(inner.responses)
        call.responder_calls += responder == call.responder
    return inner.responses
