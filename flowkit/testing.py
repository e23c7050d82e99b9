"""Handlers under test: a client that sends messages through the real path, without a broker, Redis or waiting.

``Client(app).send("orders", {...})`` runs hooks, parser, the queue's serialisation (for queued routes too, at once), handler
and responder check, all by the code that runs in production.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

import orjson

from .dispatch import Abort, Entry, Handling, params
from .errors import ParserError
from .message import Headers, PlainRecord, Record
from .responses import Response, response

if TYPE_CHECKING:
    from .app import Flowkit

T = TypeVar("T")


class Sent:
    """One message that a handler sent. ``key`` and ``partition_key`` are text where they are UTF-8, else bytes."""

    def __init__(self, item: Response, parser: Any) -> None:
        self.topic = item.topic
        self.raw = item.value
        self.key = _text(item.key)
        self.partition = item.partition
        self.partition_key = _text(item.partition_key)
        self.headers = Headers(item.headers)
        self._parser = parser

    @property
    def value(self) -> Any:
        """The value as the route's parser reads it; where it cannot, as text, or else the bytes themselves."""
        if self.raw is None:
            return None
        try:
            return self._parser.parse(self.raw)
        except ParserError:
            return _text(self.raw)

    def __repr__(self) -> str:
        return f"<Sent {self.topic} key={self.key!r} {self.raw!r}>"


class Call:
    """What became of one message: ``responses`` in order, ``aborted``, ``queue``, ``error``, ``attempts``, ``dead_letter``.

    ``followed`` are the calls that its responses caused in turn, with ``send(..., follow=True)``.
    """

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.responses: list[Sent] = []
        self.aborted = False
        self.queue: str | None = None
        self.worker: Any = None
        self.error: Exception | None = None
        self.attempts = 0
        self.dead_letter: Sent | None = None
        self.followed: list[Call] = []

    def all_sent(self, topic: str) -> list[Sent]:
        """Everything sent to ``topic``, by this call and those it caused."""
        return [item for item in self._everything() if item.topic == topic]

    def _everything(self) -> list[Sent]:
        return self.responses + [item for call in self.followed for item in call._everything()]

    def sent(self, topic: str) -> Sent:
        """The one message sent to ``topic``. Raises ``AssertionError`` that says what was sent instead."""
        found = self.all_sent(topic)
        if len(found) != 1:
            others = ", ".join(f"{item.topic} {item.raw!r}" for item in self._everything()) or "nothing"
            why = f"; the call failed: {self.error!r}" if self.error else "; it was aborted" if self.aborted else ""
            raise AssertionError(f"expected one message to {topic!r}, found {len(found)}; sent was: {others}{why}")
        return found[0]

    def __repr__(self) -> str:
        return f"<Call {self.topic}: {len(self.responses)} responses, error={self.error!r}, aborted={self.aborted}>"


class SendOptions(TypedDict, total=False):
    """How a test sends a message: ``key``, ``headers`` (a dict or pairs), ``partition`` (0), ``timestamp`` (seconds; now).

    ``raise_errors`` (True): what failed comes out of ``send``. ``follow`` (False): responses go on into the app's own topics.
    """

    key: str | bytes | None
    headers: Any
    partition: int
    timestamp: float | None
    raise_errors: bool
    follow: bool


class Client:
    """Sends messages to the handlers of ``app``. In a ``with`` block its startup and shutdown hooks run too.

    A message for a custom worker (``worker=`` of its route, or a hook's ``message.worker``) is really given to its
    ``perform_async``, as in production: name one that only keeps what it is given, if a test is to reach nobody.
    """

    def __init__(self, app: Flowkit) -> None:
        self.app = app
        self._offsets: dict[tuple[str, int], int] = {}

    def __enter__(self) -> Client:
        self.app.start(connected=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.app.stop()

    def send(self, topic: str, value: Any, **options: Unpack[SendOptions]) -> Call:
        """One message through the handler of ``topic``; ``value`` is written by the route's parser, None is a tombstone.

        Raises what the handler or the check raised. With ``raise_errors=False`` the message is tried again as often as
        the route's ``Retry`` says, without waiting, and the last error is in ``call.error``. See ``SendOptions``.
        """
        data = None if value is None else self.app.handling(topic).parser.generate(value)
        return self._send(topic, data, **options)

    def send_raw(self, topic: str, value: bytes, **options: Unpack[SendOptions]) -> Call:
        """``send`` with the bytes of the message as they are, for testing what cannot be parsed."""
        return self._send(topic, bytes(value), **options)

    def send_batch(self, topic: str, values: Iterable[Any], **options: Unpack[SendOptions]) -> list[Call]:
        """``send`` for each of several values, in order."""
        return [self.send(topic, value, **options) for value in values]

    def _send(
        self,
        topic: str,
        data: bytes | str | None,
        *,
        key: str | bytes | None = None,
        headers: Any = None,
        partition: int = 0,
        timestamp: float | None = None,
        raise_errors: bool = True,
        follow: bool = False,
    ) -> Call:
        handling = self.app.handling(topic)
        item = response(topic, data, None, key, partition, None, headers)
        offset = self._offsets[topic, partition] = self._offsets.get((topic, partition), -1) + 1
        milliseconds = int((time.time() if timestamp is None else timestamp) * 1000)
        record = PlainRecord(topic, partition, offset, milliseconds, item.key, item.value, item.headers)
        call = Call(topic)
        attempts = 1 if raise_errors else handling.retry.attempts
        if handling.inline:
            responses = self._try(handling, record, call, attempts, handling.one)
        else:
            responses = self._queue(handling, record, call, attempts)
        if call.error is not None and raise_errors:
            raise call.error
        call.responses = [Sent(item, handling.parser) for item in responses or ()]
        if follow:
            self._follow(call, raise_errors)
        return call

    def _queue(self, handling: Handling, record: Record, call: Call, attempts: int) -> Sequence[Response] | None:
        """What the consumer does, then what the worker does: each with attempts of its own, and hooks in the first only."""

        def admit(record: Record, attempt: int, received: float) -> Entry:
            ticket = handling.admit(record, attempt, received)
            if ticket is None:
                raise Abort
            message, entry = ticket
            if message.worker is not None:
                call.worker = message.worker
                message.worker.perform_async(handling.topic, params(handling.topic, entry))
            else:
                call.queue = message.queue or handling.queue
            return entry

        entry = self._try(handling, record, call, attempts, admit)
        if entry is None or call.worker is not None:
            return None
        entry = orjson.loads(orjson.dumps(entry))
        return self._try(
            handling,
            handling.record(entry),
            call,
            attempts,
            lambda record, attempt, _: handling.handle(handling.message(record, attempt, entry[3])),
        )

    def _try(
        self,
        handling: Handling,
        record: Record,
        call: Call,
        attempts: int,
        step: Callable[[Record, int, float], T],
    ) -> T | None:
        """What ``step`` gives at the first attempt that does not fail; None if every one did, or if it was aborted."""
        for attempt in range(1, attempts + 1):
            call.attempts = attempt
            received = time.time()
            try:
                result = step(record, attempt, received)
            except Abort:
                call.error, call.aborted = None, True
                return None
            except Exception as error:
                call.error = error
                handling.failed(record, error, attempt, received)
            else:
                call.error = None
                return result
        if handling.dead_letter is not None and call.error is not None:
            call.dead_letter = Sent(handling.dead(record, call.error, call.attempts), handling.parser)
        return None

    def _follow(self, call: Call, raise_errors: bool) -> None:
        for item in call.responses:
            if item.topic in self.app.handlings:
                call.followed.append(
                    self._send(
                        item.topic,
                        item.raw,
                        key=item.key,
                        headers=item.headers,
                        partition=item.partition or 0,
                        raise_errors=raise_errors,
                        follow=True,
                    )
                )


def _text(value: bytes | None) -> str | bytes | None:
    try:
        return value.decode() if value is not None else None
    except UnicodeDecodeError:
        return value
