"""Handlers under test: a client that sends messages through the real path, without a broker, Redis or waiting.

``Client(app).send("orders", {...})`` runs hooks, parser, the queue's serialisation (for queued routes too, at once), handler
and responder check, all by the code that runs in production.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import orjson

from .dispatch import Abort, Handling, params
from .errors import ParserError
from .message import Headers, PlainRecord, Record
from .responses import Response, encoded, response

if TYPE_CHECKING:
    from .app import Flowkit


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
        """The value as the route's parser reads it; the bytes themselves where it cannot."""
        if self.raw is None:
            return None
        try:
            return self._parser.parse(self.raw)
        except ParserError:
            return self.raw

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
        own = [item for item in self.responses if item.topic == topic]
        return own + [item for call in self.followed for item in call.all_sent(topic)]

    def sent(self, topic: str) -> Sent:
        """The one message sent to ``topic``. Raises ``AssertionError`` that says what was sent instead."""
        found = self.all_sent(topic)
        if len(found) != 1:
            others = ", ".join(f"{item.topic} {item.raw!r}" for item in self.responses) or "nothing"
            why = f"; the call failed: {self.error!r}" if self.error else "; it was aborted" if self.aborted else ""
            raise AssertionError(f"expected one message to {topic!r}, found {len(found)}; sent was: {others}{why}")
        return found[0]

    def __repr__(self) -> str:
        return f"<Call {self.topic}: {len(self.responses)} responses, error={self.error!r}, aborted={self.aborted}>"


class Client:
    """Sends messages to the handlers of ``app``. In a ``with`` block its startup and shutdown hooks run too."""

    def __init__(self, app: Flowkit) -> None:
        self.app = app
        self._offsets: dict[str, int] = {}

    def __enter__(self) -> Client:
        self.app.start(connected=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.app.stop()

    def send(
        self,
        topic: str,
        value: Any,
        *,
        key: str | bytes | None = None,
        headers: Any = None,
        partition: int = 0,
        timestamp: float | None = None,
        raise_errors: bool = True,
        follow: bool = False,
    ) -> Call:
        """One message through the handler of ``topic``; ``value`` is written by the route's parser, None is a tombstone.

        Raises what the handler or the check raised. With ``raise_errors=False`` the message is tried again as often as
        the route's ``Retry`` says, without waiting, and the last error is in ``call.error``. ``timestamp`` is in seconds.
        """
        handling = self.app.handling(topic)
        item = response(topic, encoded(value, handling.parser.generate), None, key, None, None, headers)
        offset = self._offsets[topic] = self._offsets.get(topic, -1) + 1
        milliseconds = int((time.time() if timestamp is None else timestamp) * 1000)
        record = PlainRecord(topic, partition, offset, milliseconds, item.key, item.value, item.headers)
        call = Call(topic)
        self._attempt(handling, record, call, raise_errors)
        if follow:
            self._follow(call, raise_errors)
        return call

    def send_raw(self, topic: str, value: bytes, **options: Any) -> Call:
        """``send`` with the bytes of the message as they are, for testing what cannot be parsed."""
        return self.send(topic, bytes(value), **options)

    def send_batch(self, topic: str, values: Iterable[Any], **options: Any) -> list[Call]:
        """``send`` for each of several values, in order."""
        return [self.send(topic, value, **options) for value in values]

    def _attempt(self, handling: Handling, record: Record, call: Call, raise_errors: bool) -> None:
        attempts = 1 if raise_errors else handling.retry.attempts
        for attempt in range(1, attempts + 1):
            call.attempts = attempt
            try:
                responses = self._run(handling, record, attempt, call)
            except Abort:
                call.error, call.aborted = None, True
                return
            except Exception as error:
                handling.failed(record, error, attempt, time.time())
                if raise_errors:
                    raise
                call.error = error
            else:
                call.error = None
                call.responses = [Sent(item, handling.parser) for item in responses]
                return
        if handling.dead_letter is not None and call.error is not None:
            call.dead_letter = Sent(handling.dead(record, call.error, call.attempts), handling.parser)

    def _run(self, handling: Handling, record: Record, attempt: int, call: Call) -> Sequence[Response]:
        received = time.time()
        if handling.inline:
            return handling.call(record, attempt, received)
        ticket = handling.admit(record, attempt, received)
        if ticket is None:
            raise Abort
        admitted, entry = ticket
        if admitted.worker is not None:
            call.worker = admitted.worker
            admitted.worker.perform_async(handling.topic, params(handling.topic, entry))
            return ()
        call.queue = admitted.queue or handling.queue
        entry = orjson.loads(orjson.dumps(entry))
        return handling.handle(handling.message(handling.record(entry), attempt, entry[3]))

    def _follow(self, call: Call, raise_errors: bool) -> None:
        for item in call.responses:
            if item.topic in self.app.handlings:
                call.followed.append(
                    self.send(
                        item.topic,
                        item.raw,
                        key=item.key,
                        headers=list(item.headers.pairs),
                        raise_errors=raise_errors,
                        follow=True,
                    )
                )


def _text(value: bytes | None) -> str | bytes | None:
    try:
        return value.decode() if value is not None else None
    except UnicodeDecodeError:
        return value
