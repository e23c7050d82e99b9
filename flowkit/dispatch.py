"""One message through one route: hooks, parse, call, check.

The consumer, the RQ job and the tests all come through here. ``Handling`` is a route made ready at start, so that what a
message costs is a parse and a call.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import struct
import threading
import time
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .errors import ConfigurationError, QueueError, ResponseError, ResponseMissing
from .interchangers import Plain, pack, unpack
from .message import HeaderPairs, Message, PlainRecord, Record, place
from .parsers import Json
from .payload import Decode, decoder
from .responses import Call, Declarations, Response, current, encoded, respond_with
from .retry import Retry
from .route import Handler, Route
from .settings import Settings

logger = logging.getLogger(__name__)

Send = Callable[[Record, Sequence[Response]], None]
Entry = list[Any]  # one queued message as JSON can hold it; the fields are those of ENTRY
ENTRY = ("partition", "offset", "timestamp", "received_at", "key", "headers", "value")
LOADED_BYTES = "flowkit:bytes"
"""Marks the bytes that an interchanger gave, so that it gets them back as bytes."""


class Abort(BaseException):
    """Raised by ``app.abort()``: this message is done. A BaseException, so that ``except Exception`` lets it through."""


class Until:
    """A moment, on the clock of ``time.monotonic()``, that a signal handler may bring forward to now."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = 0.0


class Handling:
    """A route made ready: every option final, the signature read, the payload's decoder made."""

    def __init__(
        self,
        route: Route,
        settings: Settings,
        before: Iterable[Handler],
        after: Iterable[Handler],
        declarations_of: Callable[[Handler], Declarations],
    ) -> None:
        self.route = route
        self.topic = route.topic
        self.group = route.group or f"{settings.name}_{route.topic}"
        self.inline = settings.inline if route.inline is None else route.inline
        self.queue = route.queue or "default"
        self.worker = route.worker
        self.retry = route.retry if isinstance(route.retry, Retry) else settings.retry
        self.dead_letter = route.dead_letter or settings.dead_letter
        self.job_size = route.job_size or settings.job_size
        self.job_timeout = route.job_timeout or settings.job_timeout
        self.parser = route.parser or Json
        self.interchanger = route.interchanger or Plain
        self.declarations = route.declarations
        self.responder_declarations = declarations_of(route.responder) if route.responder else {}
        if route.responder and not self.responder_declarations:
            raise ConfigurationError(
                f"the responder {_name(route.responder)} of topic {route.topic!r} declares no topic;"
                " decorate it with @app.responds_to(...)"
            )
        if route.responder and is_async(route.responder):
            raise ConfigurationError(
                f"the responder {_name(route.responder)} of topic {route.topic!r} is async; a responder is a plain"
                " function, which an async handler may call"
            )
        self.before = [_bind(hook)[0] for hook in before]
        self.after = [_bind_failure(hook) for hook in after]
        self._invoke, annotation = _bind(route.handler)
        self.decode: Decode = decoder(self.parser, annotation)
        self._answers_to = next(iter(self.declarations)) if len(self.declarations) == 1 else None
        self._idle = Call(route.name, {}, self.parser.generate)
        self.call = self._make_call()

    @property
    def all_declarations(self) -> Declarations:
        """What the handler and its responder may send, for people to read."""
        return {**self.responder_declarations, **self.declarations}

    def _make_call(self) -> Callable[[Record, int, float], Sequence[Response]]:
        """The shortest way through this route: hooks, ``Message`` and the check cost nothing where they are not used."""
        if not (self.before or self.declarations or self.route.responder) and _takes_payload_only(self.route.handler):
            decode, handler, idle = self.decode, self.route.handler, self._idle

            def call(record: Record, attempt: int, received: float) -> Sequence[Response]:  # noqa: ARG001
                result = handler(decode(record.value))
                if result is not None:
                    finish(result)
                return idle.take() if idle.responses else ()

            return call
        return self._call_with_hooks

    def _call_with_hooks(self, record: Record, attempt: int, received: float) -> Sequence[Response]:
        message = self.message(record, attempt, received)
        for hook in self.before:
            finish(hook(message))
        responses = self.handle(message)
        return [*self._idle.take(), *responses] if self._idle.responses else responses

    def one(self, record: Record, attempt: int, received: float) -> Sequence[Response]:
        """One record as ``run`` handles it; ``Abort`` and every error come out."""
        token = current.set(self._idle)
        try:
            return self.call(record, attempt, received)
        finally:
            current.reset(token)
            self._idle.take()

    def message(self, record: Record, attempt: int, received: float) -> Message:
        return Message(
            record,
            self.decode,
            group=self.group,
            attempt=attempt,
            received=received,
            queue=None if self.inline else self.queue,
            worker=self.worker,
        )

    def run(
        self, records: Sequence[Record], send: Send, *, attempt: int, received: float, until: Until
    ) -> tuple[int, Exception | None]:
        """Records of one partition, in order, until one fails or the time has come.

        ``attempt`` is that of the first record. Gives the number of finished records, and the error of the next one if
        it failed.
        """
        call, clock = self.call, time.monotonic
        done = 0
        token = current.set(self._idle)
        try:
            for record in records:
                if clock() >= until.at:
                    break
                try:
                    responses = call(record, attempt, received)
                except Abort:
                    self._idle.take()
                    responses = ()
                if responses:
                    send(record, responses)
                done += 1
                attempt = 1
        except Exception as error:
            return done, error
        finally:
            current.reset(token)
            self._idle.take()
        return done, None

    def handle(self, message: Message) -> Sequence[Response]:
        """Calls the handler and gives the responses that passed the check. Hooks have run before; ``Abort`` may come out."""
        call = Call(self.route.name, self.declarations, self.parser.generate, self.route.responder)
        token = current.set(call)
        try:
            result = finish(self._invoke(message))
            if result is not None:
                self._answer(call, result)
            call.check()
            if call.responder is not None and not call.responder_calls:
                self._check_unused_responder()
        finally:
            current.reset(token)
        return call.responses

    def _answer(self, call: Call, result: Any) -> None:
        if call.responder is not None:
            respond_with(call, call.responder, self.responder_declarations, call.generate, (result,))
        elif self._answers_to is not None:
            call.respond_to(self._answers_to, result)
        elif self.declarations:
            raise ResponseError(
                f"{call.name} returned a value, but declares {len(self.declarations)} topics"
                f" ({', '.join(self.declarations)}); say which one: app.respond_to(topic, value)"
            )

    def _check_unused_responder(self) -> None:
        for topic, declared in self.responder_declarations.items():
            if declared.required:
                raise ResponseMissing(
                    f"{self.route.name} returned nothing, so its responder was not called, which declares {topic!r}"
                    " as required; return a value, call app.respond_with(...), or declare required=False"
                )

    def admit(self, record: Record, attempt: int, received: float) -> tuple[Message, Entry] | None:
        """What the consumer does with a message of a queued route: hooks, and the entry for its job. None if aborted."""
        message = self.message(record, attempt, received)
        try:
            for hook in self.before:
                finish(hook(message))
        except Abort:
            return None
        value = record.value
        if message.payload_changed:
            value = self._written(message.payload)
        return message, self.entry(record, received, value)

    def _written(self, payload: Any) -> bytes | None:
        """A payload as the worker will read it: by the parser, a text too, which as a response would pass as it is."""
        return None if payload is None else encoded(self.parser.generate(payload), self.parser.generate)

    def entry(self, record: Record, received: float, value: bytes | None) -> Entry:
        """A message as its job carries it."""
        data = None
        if value is not None:
            data = self.interchanger.load(value)
            if isinstance(data, bytes):
                data = {LOADED_BYTES: pack(data)}
        headers = [[name, pack(item)] for name, item in record.headers]
        return [record.partition, record.offset, record.timestamp, received, pack(record.key), headers, data]

    def record(self, entry: Entry) -> PlainRecord:
        """The inverse of ``entry``. Raises ``QueueError`` for an entry that flowkit did not write."""
        try:
            partition, offset, timestamp, _, key, headers, data = entry
            if isinstance(data, dict) and data.keys() == {LOADED_BYTES}:
                data = unpack(data[LOADED_BYTES])
            value = None if data is None else self.interchanger.parse(data)
            pairs = tuple((name, unpack(item)) for name, item in headers)
        except (TypeError, ValueError) as error:
            raise QueueError(
                f"a job for {self.topic!r} holds what flowkit did not queue: {str(entry)[:120]}"
            ) from error
        return PlainRecord(self.topic, partition, offset, timestamp, unpack(key), value, pairs)

    def dead(self, record: Record, error: Exception, attempts: int) -> Response:
        """The dead letter for a record: key, value and headers untouched, and where it comes from in more headers.

        Their names and formats are those of Spring Kafka's DeadLetterPublishingRecoverer, so that its tools read them.
        """
        origin: HeaderPairs = (
            ("kafka_dlt-original-topic", record.topic.encode()),
            ("kafka_dlt-original-partition", struct.pack(">i", record.partition)),
            ("kafka_dlt-original-offset", struct.pack(">q", record.offset)),
            ("kafka_dlt-original-timestamp", struct.pack(">q", record.timestamp)),
            ("kafka_dlt-original-consumer-group", self.group.encode()),
            ("kafka_dlt-exception-fqcn", f"{type(error).__module__}.{type(error).__qualname__}".encode()),
            ("kafka_dlt-exception-message", str(error).encode(errors="backslashreplace")[:2000]),
            ("flowkit-attempts", str(attempts).encode()),
        )
        assert self.dead_letter is not None
        return Response(self.dead_letter, record.value, record.key, headers=(*record.headers, *origin))

    def failed(self, record: Record, error: Exception, attempt: int, received: float) -> None:
        """Tells the ``after_failure`` hooks. What they raise is logged: it must not hide the error they are told of."""
        message = self.message(record, attempt, received)
        for hook in self.after:
            try:
                finish(hook(error, message))
            except (Exception, Abort):
                logger.exception("an after_failure hook failed itself, for %s", place(record))


def params(topic: str, entry: Entry) -> dict[str, Any]:
    """An entry by its names: what a custom worker's ``perform_async(topic, params)`` is given."""
    return {"topic": topic, **dict(zip(ENTRY, entry, strict=True))}


def entry_of(params: Mapping[str, Any]) -> Entry:
    """The inverse of ``params``."""
    try:
        return [params[name] for name in ENTRY]
    except KeyError as error:
        raise QueueError(f"params lack {error}; pass on what perform_async was given, unchanged") from error


# Signatures. A handler's parameter annotated Message is the message, the other one is the payload.


class Role(NamedTuple):
    """What a parameter is filled with (the payload, or in after_failure the error; or the message), and how."""

    parameter: inspect.Parameter
    is_message: bool
    by_name: bool


def _parameters(function: Handler) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """The parameters a caller must or may fill, and the resolved annotations."""
    try:
        hints = typing.get_type_hints(_target(function, wrapped=True), include_extras=True)
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        raise ConfigurationError(
            f"an annotation of {_name(function)} cannot be resolved: {error};"
            " define or import the type at the module's top level"
        ) from error
    try:
        return list(inspect.signature(function).parameters.values()), hints
    except ValueError as error:
        raise ConfigurationError(f"{_name(function)} does not say what it takes; call it from a function") from error


def _target(function: Any, *, wrapped: bool = False) -> Any:
    """The function that runs when ``function`` is called: inside a partial, behind an object's ``__call__``.

    ``wrapped``: the one whose signature counts, inside decorators too.
    """
    while isinstance(function, functools.partial) or (wrapped and hasattr(function, "__wrapped__")):
        function = function.func if isinstance(function, functools.partial) else function.__wrapped__
    return function if inspect.isroutine(function) else type(function).__call__


def _name(function: Handler) -> str:
    return getattr(function, "__qualname__", repr(function))


def _is_message(hint: Any) -> bool:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return hint is Message or (union and Message in typing.get_args(hint))


def _roles(function: Handler, first: str = "payload") -> tuple[list[Role], Any]:
    """Which parameter is filled with what, and the annotation of the payload. ``first`` is for errors."""
    target = _target(function)
    if inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        raise ConfigurationError(
            f"{_name(function)} has a yield, so calling it runs nothing; use app.respond_to(...)"
        )
    parameters, hints = _parameters(function)
    single = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    messages = [p for p in single if _is_message(hints.get(p.name))]
    others = [p for p in single if p not in messages]
    needed = [p for p in others if p.default is p.empty]
    for parameter in [*needed[1:], *messages[1:]]:
        raise ConfigurationError(
            f"{_name(function)} has more parameters than flowkit can fill: it takes the {first} and, annotated as"
            f" Message, the message; {parameter.name!r} is one too many"
            + ("; annotate it: message: Message" if parameter.name == "message" and not messages else "")
        )
    # What has a default gets the payload only if nothing else does, and never what a partial has filled in.
    rest = [p for p in parameters if p.kind is p.VAR_POSITIONAL]
    chosen = (needed or [p for p in others if p.kind is not p.KEYWORD_ONLY] or rest)[:1]
    roles: list[Role] = []
    skipped = False
    for parameter in parameters:
        if parameter in messages or parameter in chosen:
            roles.append(Role(parameter, parameter in messages, skipped or parameter.kind is parameter.KEYWORD_ONLY))
        else:
            skipped = True
    return roles, hints.get(chosen[0].name, Any) if chosen else Any


def _takes_payload_only(function: Handler) -> bool:
    roles, _ = _roles(function)
    return len(roles) == 1 and not roles[0].is_message and not roles[0].by_name and not is_async(function)


def _bind(function: Handler) -> tuple[Callable[[Message], Any], Any]:
    """A handler or a before_enqueue hook as a function of its message, and the annotation of its payload."""
    roles, annotation = _roles(function)
    call: Callable[[Message], Any]
    match [role.is_message for role in roles]:
        case _ if any(role.by_name for role in roles):
            fill = _filler(function, roles)
            read = not all(role.is_message for role in roles)  # else the payload need not be parsed
            call = lambda message: fill(message.payload if read else None, message)  # noqa: E731
        case [False]:
            call = lambda message: function(message.payload)  # noqa: E731
        case [True]:
            call = function
        case [False, True]:
            call = lambda message: function(message.payload, message)  # noqa: E731
        case [True, False]:
            call = lambda message: function(message, message.payload)  # noqa: E731
        case _:
            call = lambda message: function()  # noqa: ARG005, E731
    if is_async(function):
        return (lambda message: run_async(call(message))), annotation
    return call, annotation


def _filler(function: Handler, roles: Sequence[Role]) -> Callable[[Any, Message], Any]:
    """``function`` as one of the payload (or the error) and the message, whichever way it takes them."""
    positional = tuple(role.is_message for role in roles if not role.by_name)
    by_name = {role.parameter.name: role.is_message for role in roles if role.by_name}
    return lambda first, message: function(
        *(message if is_message else first for is_message in positional),
        **{name: message if is_message else first for name, is_message in by_name.items()},
    )


def _bind_failure(function: Handler) -> Callable[[Exception, Message], Any]:
    """An after_failure hook: the error first, and the message where it is annotated so."""
    call = _filler(function, _roles(function, "error")[0])
    if is_async(function):
        return lambda error, message: run_async(call(error, message))
    return call


# Coroutines. Each thread that runs handlers keeps one event loop, so that clients opened in one call serve the next.

_threads = threading.local()


def is_async(function: Handler) -> bool:
    target = _target(function)
    return inspect.iscoroutinefunction(target)


def finish(result: Any) -> Any:
    """What a function returned; a coroutine, which a plain decorator around an async function gives, runs first."""
    return run_async(result) if result is not None and asyncio.iscoroutine(result) else result


def run_async(coroutine: Any) -> Any:
    """Runs a coroutine to its end on this thread's loop. What interrupts it (a job's time-out) cancels it."""
    loop = getattr(_threads, "loop", None)
    if loop is None:
        loop = _threads.loop = asyncio.new_event_loop()
    task = loop.create_task(coroutine)
    try:
        return loop.run_until_complete(task)
    except asyncio.CancelledError as error:  # a BaseException, which would end the consumer
        raise RuntimeError("the coroutine was cancelled, by itself or by what it waited for") from error
    except BaseException:
        if not task.done():
            task.cancel()
            loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        raise


def close_loop() -> None:
    """Closes this thread's loop, if it has one; called when a thread of handlers ends."""
    loop = getattr(_threads, "loop", None)
    if loop is not None:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        _threads.loop = None
