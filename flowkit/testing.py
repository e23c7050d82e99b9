"""Handlers under test: a client that sends messages through the real path, without a broker, Redis or waiting.

``Client(app).send("orders", {...})`` runs hooks, parser, the queue's serialisation (for queued routes too, at once), handler
and responder check, all by the code that runs in production.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

from .dispatch import Entry, Handling, Until, as_failure
from .errors import ParserError, is_passing
from .message import Abort, Headers, PlainRecord, Record
from .responses import Response, responder_name, response
from .route import Responder

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
        """The value as the parser that wrote it reads it; where it cannot, as text, or else the bytes themselves."""
        if self.raw is None:
            return None
        try:
            return self._parser.parse(self.raw)
        except ParserError:
            return _text(self.raw)

    def __repr__(self) -> str:
        return f"<Sent {self.topic} key={self.key!r} {self.raw!r}>"


class _Outbox:
    """What was sent, and how a test finds one message in it."""

    def _everything(self) -> list[Sent]:
        raise NotImplementedError

    def _why(self) -> str:
        return ""

    def all_sent(self, topic: str) -> list[Sent]:
        """Everything sent to ``topic``: of a call, by it and those it caused; of a client, outside handlers' responses."""
        return [item for item in self._everything() if item.topic == topic]

    def sent(self, topic: str) -> Sent:
        """The one message sent to ``topic``. Raises ``AssertionError`` that says what was sent instead."""
        found = self.all_sent(topic)
        if len(found) != 1:
            others = ", ".join(f"{item.topic} {item.raw!r}" for item in self._everything()) or "nothing"
            raise AssertionError(
                f"expected one message to {topic!r}, found {len(found)}; sent was: {others}{self._why()}"
            )
        return found[0]


class Call(_Outbox):
    """What became of one message: ``responses`` in order, ``aborted``, ``queue``, ``error``, ``attempts``, ``dead_letter``.

    ``direct`` is what was sent meanwhile past the responses, by ``app.producer`` or by ``app.respond_with`` in a hook.
    ``followed`` are the calls that its messages caused in turn, with ``send(..., follow=True)``.
    """

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.responses: list[Sent] = []
        self.direct: list[Sent] = []
        self.aborted = False
        self.queue: str | None = None
        self.worker: Any = None
        self.error: Exception | None = None
        self.attempts = 0
        self.dead_letter: Sent | None = None
        self.skipped = False
        self.followed: list[Call] = []

    def _everything(self) -> list[Sent]:
        return [*self.direct, *self.responses, *(item for call in self.followed for item in call._everything())]

    def _why(self) -> str:
        return f"; the call failed: {self.error!r}" if self.error else "; it was aborted" if self.aborted else ""

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


class Client(_Outbox):
    """Sends messages to the handlers of ``app``. In a ``with`` block its startup and shutdown hooks run too.

    Within that block nothing of the application reaches a broker: what it sends outside handlers' responses (from a web
    request, say) is in ``direct``, and ``client.sent(topic)`` finds it.

    A message for a custom worker (``worker=`` of its route, or a hook's ``message.worker``) is really given to its
    ``perform_async``, as in production: name one that only keeps what it is given, if a test is to reach nobody.
    """

    def __init__(self, app: Flowkit) -> None:
        self.app = app
        self.direct: list[Sent] = []
        self._offsets: dict[tuple[str, int], int] = {}
        self._kept = ExitStack()

    def _everything(self) -> list[Sent]:
        return self.direct

    def __enter__(self) -> Client:
        with ExitStack() as stack:
            stack.enter_context(self._keeping())
            self.app.start(connected=False)
            self._kept = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._kept:
            self.app.stop()

    def _keeping(self) -> AbstractContextManager[None]:
        return self.app.producer.kept(lambda item: self.direct.append(Sent(item, item.parser)))

    def respond_with(self, responder: Responder, *args: Any) -> Call:
        """Calls a responder alone, as ``app.respond_with(responder, *args)`` does outside handlers, and gives what it sent.

        Raises what the responder or the check raised.
        """
        call = Call(responder_name(responder))
        before = len(self.direct)
        with self._keeping():
            self.app.respond_with(responder, *args)
        call.responses, self.direct[before:] = self.direct[before:], []
        return call

    def send(self, topic: str, value: Any, **options: Unpack[SendOptions]) -> Call:
        """One message through the handler of ``topic``; ``value`` is written by the route's parser, None is a tombstone.

        Raises what the handler or the check raised. With ``raise_errors=False`` the message is tried again as often as
        the route's ``Retry`` says, without waiting, and the last error is in ``call.error``; ``call.dead_letter`` is its dead
        letter, and ``call.skipped`` says whether it would be passed over. See ``SendOptions``.
        """
        data = None if value is None else self.app.handling(topic).parser.generate(value)
        return self._send(topic, data, **options)

    def send_raw(self, topic: str, value: bytes, **options: Unpack[SendOptions]) -> Call:
        """``send`` with the bytes of the message as they are, for testing what cannot be parsed."""
        return self._send(topic, bytes(value), **options)

    def send_batch(self, topic: str, values: Iterable[Any], **options: Unpack[SendOptions]) -> list[Call]:
        """``send`` for each of several values, in order. A batch handler is given them together, in one call, or in as many as
        its ``max_batch`` asks for: then there is one ``Call``. What of it failed is not tried again.
        """
        handling = self.app.handling(topic)
        if handling.max_batch == 1:
            return [self.send(topic, value, **options) for value in values]
        written = [None if value is None else handling.parser.generate(value) for value in values]
        given: dict[str, Any] = dict(options)
        raise_errors, follow = given.pop("raise_errors", True), given.pop("follow", False)
        records = [self._record(topic, data, **given) for data in written]
        return [self._send_together(handling, records, raise_errors, follow)]

    def _send(
        self,
        topic: str,
        data: bytes | str | None,
        *,
        raise_errors: bool = True,
        follow: bool = False,
        **options: Any,
    ) -> Call:
        handling = self.app.handling(topic)
        record = self._record(topic, data, **options)
        call = Call(topic)
        attempts = 1 if raise_errors else handling.retry.attempts
        before = len(self.direct)
        with self._keeping():
            if handling.inline:
                responses = self._try(handling, record, call, attempts, handling.one)
            else:
                responses = self._queue(handling, record, call, attempts)
        call.direct = self.direct[before:]
        if call.error is not None and raise_errors:
            raise call.error
        call.responses = [Sent(item, item.parser) for item in responses or ()]
        if follow:
            self._follow(call, raise_errors)
        return call

    def _send_together(
        self, handling: Handling, records: list[PlainRecord], raise_errors: bool, follow: bool
    ) -> Call:
        call = Call(handling.topic)
        call.attempts = 1
        sent: list[Response] = []
        until = Until()
        until.at = math.inf
        before = len(self.direct)
        with self._keeping():
            _, call.error = handling.run(
                records, lambda _, responses: sent.extend(responses), attempt=1, received=time.time(), until=until
            )
        call.direct = self.direct[before:]
        if call.error is not None and raise_errors:
            raise call.error
        call.responses = [Sent(item, item.parser) for item in sent]
        if follow:
            self._follow(call, raise_errors)
        return call

    def _record(
        self,
        topic: str,
        data: bytes | str | None,
        *,
        key: str | bytes | None = None,
        headers: Any = None,
        partition: int = 0,
        timestamp: float | None = None,
    ) -> PlainRecord:
        """The next message of its partition."""
        item = response(topic, data, None, key, partition, None, headers)
        offset = self._offsets[topic, partition] = self._offsets.get((topic, partition), -1) + 1
        milliseconds = int((time.time() if timestamp is None else timestamp) * 1000)
        return PlainRecord(topic, partition, offset, milliseconds, item.key, item.value, item.headers)

    def _queue(self, handling: Handling, record: Record, call: Call, attempts: int) -> Sequence[Response] | None:
        """What the consumer does, then what the worker does: each with attempts of its own, and hooks in the first only."""

        def admit(record: Record, attempt: int, received: float) -> Entry:
            ticket = handling.admit(record, attempt, received)
            if ticket is None:
                raise Abort
            message, entry = ticket
            if message.worker is not None:
                call.worker = message.worker
                message.worker.perform_async(handling.topic, handling.params(entry))
            else:
                call.queue = message.queue or handling.queue
            return entry

        # In the consumer, where a message without an end is tried for ever.
        entry = self._try(handling, record, call, attempts, admit, ends=handling.on_poison is not None)
        if entry is None or call.worker is not None:
            return None
        entry = _through_redis(handling, entry)
        return self._try(
            handling,
            handling.record(entry),
            call,
            attempts,
            lambda record, attempt, _: handling.handle(handling.message(record, attempt, entry[-1])),
        )

    def _try(
        self,
        handling: Handling,
        record: Record,
        call: Call,
        attempts: int,
        step: Callable[[Record, int, float], T],
        *,
        ends: bool = True,
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
            except (Exception, SystemExit) as raised:
                error = as_failure(raised)
                call.error = error
                ended = handling.retry.ends(attempt, error)
                handling.failed(record, error, attempt, received, last=ended and ends and handling.has_end)
                if is_passing(error):
                    return None  # in production it would wait: no attempt, and no dead letter
                if ended:
                    break
            else:
                call.error = None
                return result
        call.skipped = handling.on_poison == "skip"
        if handling.dead_letter is not None and call.error is not None:
            call.dead_letter = Sent(handling.dead(record, call.error, call.attempts), handling.parser)
        return None

    def _follow(self, call: Call, raise_errors: bool) -> None:
        for item in [*call.direct, *call.responses]:
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


def _through_redis(handling: Handling, entry: Entry) -> Entry:
    """An entry as it comes back from the job that it is written into."""
    from .queues import PERFORM, Envelope, Parcel

    data = Envelope.dumps((PERFORM, None, ("", handling.topic, 1, [entry]), {}))
    (read,) = Parcel.of(Envelope.loads(data)[2]).entries
    return read


def _text(value: bytes | None) -> str | bytes | None:
    try:
        return value.decode() if value is not None else None
    except UnicodeDecodeError:
        return value
