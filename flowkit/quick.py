"""The shortest way through a route, for a handler that asks for little: a function of Python that takes the payload, or the
payload and the message, without hooks and without a responder.

On confluent-kafka, where the client takes least, a message that is given as a dataclass and as the ``Message`` takes 2.5 us
instead of 5.6, and one that is answered 4.3 instead of 7.6 (tests/benchmarks/consume.py, 2 cores).
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from operator import attrgetter, length_hint
from typing import TYPE_CHECKING, Any, Protocol, cast

import orjson

from .coroutines import finish
from .message import Abort, Message, Record
from .parsers import Json
from .payload import Decode
from .responses import Calls, Response, current, encoded
from .signature import takes

if TYPE_CHECKING:
    from .dispatch import Handling, Send, Until

UNWATCHED, MOST_UNWATCHED = 0.001, 128
"""Seconds, about, and messages at most, between two looks at the clock where messages take next to no time."""

EVERY = 4
"""Of so many messages that are answered one after the other the clock is looked at behind one."""


class SendTogether(Protocol):
    """A ``Send`` that takes many answers at once."""

    def __call__(self, record: Record, responses: Sequence[Response]) -> None: ...

    def together(self, records: Sequence[Record], topic: str, values: Sequence[bytes | None], parser: Any) -> None:
        """One answer for each record. Raises ``NotTaken``, and nothing else, where one cannot be sent."""


class NotTaken(Exception):
    """Answers that could not be sent: that of the record at position ``at``, and those behind it."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at = at
        self.error = error


VALUE = attrgetter("value")


def parts_of(records: Sequence[Record]) -> tuple[list[Any], Callable[[Any], bytes | None]]:
    """What records are made of, and what gives the value of each of it without a line of Python."""
    parts: tuple[list[Any], Callable[[Any], bytes | None]] | None = getattr(records, "parts", None)
    return (list(records), VALUE) if parts is None else parts


def quick_way(handling: Handling) -> QuickWay | None:
    """The short way through a route, if its handler can go it."""
    route, handler = handling.route, handling.route.handler
    if handling.before or route.batch or route.responder:
        return None
    if not (inspect.isfunction(handler) or inspect.ismethod(handler)):
        return None
    taken = takes(handler)
    return QuickWay(handling, takes_message=len(taken) == 2) if taken in ([False], [False, True]) else None


class Slice:
    """Records that are being handled."""

    def __init__(self, records: Sequence[Record], send: Send, until: Until) -> None:
        self.records = records
        self.send = send
        self.sends_together = hasattr(send, "together")
        self.until = until
        parts, self.value_of = parts_of(records)
        self.rest = iter(parts)  # of which is known how many are left, also where a handler has failed
        self.each = iter(records)
        self.reception: Any = None
        self.calls: Any = None

    @property
    def begun(self) -> int:
        return len(self.records) - length_hint(self.rest)


class QuickWay:
    """``run`` is what ``Handling.run`` does, with few lines of Python for a message and no frame but the handler's.

    The clock is looked at after 1, 2, 4, ... messages, as long as those take less than ``UNWATCHED``; where each is answered,
    after every few. What is out of the ordinary goes the usual way, which says what is wrong.
    """

    def __init__(self, handling: Handling, *, takes_message: bool) -> None:
        self._handling = handling
        self._takes_message = takes_message
        self._read: Decode = getattr(handling.decode, "quick", handling.decode)
        self._answers_to = next(iter(handling.declarations)) if len(handling.declarations) == 1 else None
        self._parser = handling.declarations[self._answers_to].parser if self._answers_to else None

    def run(
        self, records: Sequence[Record], send: Send, attempt: int, received: float, until: Until
    ) -> tuple[int, BaseException | None]:
        handling, clock = self._handling, time.monotonic
        slice_ = Slice(records, send, until)
        if self._takes_message:
            slice_.reception = handling.reception(attempt, received)
        handle = self._consume
        if handling.declarations:
            handle = self._respond
            slice_.calls = Calls(handling.route.name, handling.declarations, handling.parser)
        looks_itself = handling.declarations and attempt == 1
        step = MOST_UNWATCHED if looks_itself else 1
        try:
            while length_hint(slice_.rest):
                began = clock()
                if began >= until.at:
                    break
                odd = False
                try:
                    handle(slice_, map(slice_.value_of, islice(slice_.rest, step)))
                except Abort:
                    handling.idle.take()
                except Exception as error:
                    odd = _is_odd(error)
                    if not odd:
                        raise
                if odd:  # behind the error, so that it is not the context of another one
                    at = slice_.begun - 1
                    one = [records[at]]
                    ran, failed = handling.run_each(handling.call, one, send, 1 if at else attempt, received, until)
                    if not ran:
                        return at, failed
                if attempt > 1:  # that was the one that had failed before
                    attempt = 1
                    if self._takes_message:
                        slice_.reception = handling.reception(attempt, received)
                step = min(2 * step, MOST_UNWATCHED) if clock() - began < UNWATCHED else 1
        except NotTaken as refusal:
            return refusal.at, refusal.error
        except (Exception, SystemExit) as error:
            return slice_.begun - 1, error
        return slice_.begun, None

    def _consume(self, slice_: Slice, values: Iterator[bytes | None]) -> None:
        """For a handler that declares nothing."""
        read, takes_message, idle, until = self._read, self._takes_message, self._handling.idle, slice_.until
        handler: Any = self._handling.route.handler
        each, reception = slice_.each, slice_.reception
        for value in values:
            if takes_message:
                message = Message(next(each), reception)
                message._payload = payload = read(value)
                result = handler(payload, message)
            else:
                result = handler(read(value))
            if result is not None or idle.responses:
                responses = self._handling.unasked(result)
                if responses:
                    slice_.send(slice_.records[slice_.begun - 1], responses)
            if not until.at:  # somebody else has brought it forward
                break

    def _respond(self, slice_: Slice, values: Iterator[bytes | None]) -> None:
        """For a handler that declares responses. What those return one after the other is sent together, if it is not long:
        no answer waits for more than ``UNWATCHED`` seconds, and for the ``EVERY`` messages in hand.
        """
        read, takes_message, until = self._read, self._takes_message, slice_.until
        handler: Any = self._handling.route.handler
        each, reception = slice_.each, slice_.reception
        calls, set_current, dumps = slice_.calls, current.set, orjson.dumps
        is_json, made = slice_.sends_together and self._answers_to is not None and self._parser is Json, calls.made
        answers: list[bytes | None] = []
        add = answers.append
        first = slice_.begun
        clock = time.monotonic
        end = clock() + UNWATCHED
        try:
            for number, value in enumerate(values, first):
                if takes_message:
                    message = Message(next(each), reception)  # also where the payload cannot be read
                payload = read(value)
                calls.number = number
                set_current((calls, number))
                if takes_message:
                    message._payload = payload
                    result = handler(payload, message)
                else:
                    result = handler(payload)
                kept = is_json and type(result) is dict
                if not kept:
                    result = finish(result)
                calls.number = -1
                if kept and not made:
                    try:
                        add(dumps(result))  # without a default it takes half the time
                    except Exception:
                        kept = False  # the usual way says what is wrong, if anything is
                else:
                    kept = False
                if not kept:
                    first = self._end(slice_, number, result, first, answers)
                if not until.at or (not number % EVERY and clock() > end):
                    break
        except (Exception, SystemExit, Abort):
            calls.number = -1
            made.clear()
            self._send(slice_, first, answers)
            raise
        self._send(slice_, first, answers)

    def _end(self, slice_: Slice, number: int, result: Any, first: int, answers: list[bytes | None]) -> int:
        """Ends the call for the record at position ``number``. ``first`` is that of the one that the first of the answers is
        for; given back as it is then.
        """
        calls = slice_.calls
        if self._answers_to and slice_.sends_together and result is not None and number not in calls.made:
            with suppress(Exception):  # the usual way says what is wrong, if anything is
                answers.append(encoded(result, self._parser))
                return first
        first = self._send(slice_, first, answers)
        responses = self._handling.end(calls.take(number), result)
        if responses:
            slice_.send(slice_.records[first], responses)
        return first + 1

    def _send(self, slice_: Slice, first: int, answers: list[bytes | None]) -> int:
        """Sends the answers to the records from position ``first`` on, and gives the position behind them."""
        if not answers:
            return first
        values, answers[:] = answers[:], []  # so that none is sent again, whatever comes of them
        end = first + len(values)
        send = cast(SendTogether, slice_.send)
        try:
            send.together(slice_.records[first:end], cast(str, self._answers_to), values, self._parser)
        except NotTaken as refusal:
            refusal.at += first
            raise
        return end


def _is_odd(error: Exception) -> bool:
    """Whether it was raised by what reads the payload, and that in no function of Python: then the handler was not called."""
    traceback = error.__traceback__
    inner = None if traceback is None else traceback.tb_next
    return inner is not None and inner.tb_next is None
