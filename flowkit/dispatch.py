"""One message through one route: hooks, parse, call, check.

The consumer, the RQ job and the tests all come through here. ``Handling`` is a route made ready at start, so that what a
message costs is a parse and a call.
"""

from __future__ import annotations

import logging
import math
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import Token
from typing import TYPE_CHECKING, Any

import orjson

from .brief import brief
from .coroutines import finish
from .deadletters import letter
from .errors import (
    ConfigurationError,
    DeadLetterLimit,
    HandlerExit,
    ParserError,
    QueueError,
    ResponseError,
    ResponseMissing,
    is_passing,
)
from .interchangers import Plain, pack, unpack
from .message import Abort, HeaderPairs, Message, PlainRecord, Reception, Record, about, place
from .parsers import Json, for_topic
from .payload import Decode, decoder
from .quick import quick_way
from .responses import (
    Call,
    Declarations,
    Response,
    check_responder,
    current,
    encoded,
    respond_with,
    responder_name,
    with_parsers,
)
from .retry import Retry
from .route import Handler, Responder, Route
from .route_options import RetryTopic, check_transactional, end_of, retry_stem, retry_topics, shards
from .settings import Settings
from .signature import bind, bind_failure, takes_payload_only

if TYPE_CHECKING:
    from .parallel import Window

logger = logging.getLogger(__name__)

Send = Callable[[Record, Sequence[Response]], None]
Run = Callable[[Any, int, float], Sequence[Response]]
"""One message, its attempt number, when it was received: gives the responses. ``Abort`` and every error come out."""

Entry = tuple[Any, ...]
"""One queued message: the fields of a ``PlainRecord``, but the value as the interchanger loaded it."""

PARAMS = ("partition", "offset", "timestamp", "received_at", "key", "headers", "value")
"""What a custom worker is given of a message besides its topic, all of it as JSON can hold it."""

LOADED_BYTES = "flowkit:bytes"
"""Marks in those params the bytes that an interchanger gave, so that it gets them back as bytes."""


LONGEST_JOB = 1.0
"""Seconds that a job of many messages may take in any case; ten times ``job_seconds``, if that is more."""


def as_failure(error: BaseException) -> Exception:
    """What a handler raised, as a failed attempt: ``sys.exit()`` in a handler must not end a process of many groups.

    Raises it again if it is a worker's own end.
    """
    if is_forced_stop(error):
        raise error
    if isinstance(error, Exception):
        return error
    return HandlerExit(f"it called sys.exit({getattr(error, 'code', '')!r}), which ends nothing here")


def is_forced_stop(error: BaseException) -> bool:
    """Whether it is RQ's answer to a signal that ends a worker at once, and not a handler's own error or ``sys.exit()``."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_code.co_name.startswith("request_force_stop")


class Until:
    """A moment, on the clock of ``time.monotonic()``, that a signal handler may bring forward to now.

    ``began`` is when the message in hand was begun, on the same clock.
    """

    __slots__ = ("at", "began")

    def __init__(self) -> None:
        self.at = self.began = 0.0


class Handling:
    """A route made ready: every option final, the signature read, the payload's decoder made."""

    concurrency = 1
    """How many of its messages are handled at once."""

    max_batch, batch_wait = 1, 0.0
    """Messages that a batch handler is given at most, and seconds that fewer wait for more."""

    due_after: float | None = None
    """Seconds that its messages wait from when they were written until they are handled: those of a retry topic do."""

    def __init__(
        self,
        route: Route,
        settings: Settings,
        before: Iterable[Handler],
        after: Iterable[Handler],
        declarations_of: Callable[[Handler | Responder], Declarations],
    ) -> None:
        self.route = route
        self.topic = route.topic
        self.group = route.group or f"{settings.name}_{route.topic}"
        self.inline = settings.inline if route.inline is None else route.inline
        self.transactional = settings.transactional if route.transactional is None else route.transactional
        if self.transactional:
            check_transactional(route, settings, inline=self.inline)
        self.queue = route.queue or settings.queue
        self.worker = route.worker
        self.shards = shards(route, self.queue) if route.ordered and not self.inline else ()
        self.retry = route.retry if isinstance(route.retry, Retry) else settings.retry
        self.retry_stem = retry_stem(route, settings, self.group, inline=self.inline)
        self.retry_topics = retry_topics(route, self.retry_stem, self.retry)
        self.on_poison, self.dead_letter = end_of(route, settings, self.group, inline=self.inline)
        self.dead_letter_limit = route.dead_letter_limit or settings.dead_letter_limit
        self.dead_in_a_row = 0
        """Dead letters since the last message that was handled, in this process."""
        # Inline, a message without an end is tried for ever; a custom worker has rules of its own.
        self.has_end = bool(self.on_poison or not (self.inline or self.worker))
        self._last_attempt = self.retry.attempts if self.has_end else math.inf
        self.job_size = route.job_size or settings.job_size
        self.job_seconds = route.job_seconds or settings.job_seconds
        self.job_timeout = route.job_timeout or settings.job_timeout
        self.max_message_bytes = settings.max_message_bytes
        self.parser = for_topic(route.parser or Json, route.topic)
        self.interchanger = route.interchanger or Plain
        self.declarations = with_parsers(route.declarations, self.parser)
        self.responder_declarations = with_parsers(
            declarations_of(route.responder) if route.responder else {}, self.parser
        )
        if route.responder:
            what = f"the responder {responder_name(route.responder)} of topic {route.topic!r}"
            check_responder(route.responder, self.responder_declarations, what)
        self.before = [bind(hook)[0] for hook in before]
        self.after = [bind_failure(hook) for hook in after]
        try:
            self._invoke, annotation = self._bound(route.handler)
            self.decode: Decode = decoder(self.parser, annotation, route.topic)
        except ConfigurationError as error:
            raise ConfigurationError(f"topic {route.topic!r}, handler {route.where}: {error}") from error
        self._answers_to = next(iter(self.declarations)) if len(self.declarations) == 1 else None
        self._told_unused = False
        self.idle = Call(route.name, {}, self.parser)
        queue = None if self.inline else self.queue
        self._reception = Reception(self.decode, self.group, queue=queue, worker=self.worker)
        self._quick = quick_way(self)
        self.call, self.call_queued = self._calls()

    @property
    def queues(self) -> tuple[str, ...]:
        """The RQ queues that its messages go to, if no hook says otherwise."""
        if self.inline or self.worker is not None:
            return ()
        return self.shards or (self.queue,)

    def queue_of(self, record: Record) -> str:
        """The queue of one message: in an ordered route that of its key's shard; without a key, of its partition's."""
        if not self.shards:
            return self.queue
        number = record.partition if record.key is None else zlib.crc32(record.key)
        return self.shards[number % len(self.shards)]

    def by_queue(self, records: Sequence[Record], entries: list[Entry]) -> dict[str, list[Entry]]:
        """The entries of records, in their order, by the queues they go to."""
        if not self.shards:
            return {self.queue: entries}
        found: dict[str, list[Entry]] = {}
        for record, entry in zip(records, entries, strict=True):
            found.setdefault(self.queue_of(record), []).append(entry)
        return found

    @property
    def one_a_job(self) -> bool:
        """Whether each message has a job of its own: also where a failed one gets no second attempt, which would be one."""
        no_other = self.retry.attempts == 1 and self.dead_letter is None and not self.shards
        return self.job_size == 1 or no_other

    @property
    def longest_job(self) -> float:
        """Seconds after which a worker puts what it has not begun of a job back, so that others may take it."""
        return max(LONGEST_JOB, 10 * self.job_seconds)

    @property
    def all_declarations(self) -> Declarations:
        """What the handler and its responder may send, for people to read."""
        return {**self.responder_declarations, **self.declarations}

    @property
    def sends_to(self) -> set[str]:
        """Every topic that a message of this route may lead to, its dead letter's too."""
        others = [self.dead_letter] if self.dead_letter else []
        return {*self.all_declarations, *others, *(topic for topic, _ in self.retry_topics)}

    def _bound(self, handler: Handler) -> tuple[Callable[[Any], Any], Any]:
        """The handler as a function of its message, and the annotation of its payload."""
        return bind(handler)

    def _calls(self) -> tuple[Run, Run]:
        """The shortest ways through this route, with hooks (in the consumer) and without (in a worker): hooks, ``Message`` and
        the check cost nothing where they are not used.
        """
        if self.declarations or self.route.responder or not takes_payload_only(self.route.handler):
            return self._call_with_hooks, self._call_queued
        decode, handler, idle = self.decode, self.route.handler, self.idle

        def call(record: Record, attempt: int, received: float) -> Sequence[Response]:  # noqa: ARG001
            value = record.value
            if value is not None and type(value) is not bytes:  # what somebody else wrote into Redis
                raise self._not_queued(value)
            result = handler(decode(value))
            return () if result is None and not idle.responses else self.unasked(result)

        plain = self.interchanger is Plain
        return self._call_with_hooks if self.before else call, call if plain else self._call_queued

    def _call_with_hooks(self, record: Record, attempt: int, received: float) -> Sequence[Response]:
        message = self.message(record, attempt, received)
        for hook in self.before:
            finish(hook(message))
        responses = self.handle(message)
        return [*self.idle.take(), *responses] if self.idle.responses else responses

    def _call_queued(self, entry: PlainRecord, attempt: int, received: float) -> Sequence[Response]:  # noqa: ARG002
        record = self.record(entry)
        return self.handle(self.message(record, attempt, record.received))

    def one(self, record: Record, attempt: int, received: float) -> Sequence[Response]:
        """One record as ``run`` handles it; ``Abort`` and every error come out."""
        token = current.set(self.idle)
        try:
            return self.call(record, attempt, received)
        finally:
            current.reset(token)
            self.idle.take()

    def message(self, record: Record, attempt: int, received: float, last: bool | None = None) -> Message:
        """The record as handlers and hooks are given it; ``last`` where others than flowkit decide on attempts."""
        message = Message(record, self.reception(attempt, received, last))
        if self.shards:
            message.queue = self.queue_of(record)
        return message

    def reception(self, attempt: int, received: float, last: bool | None = None) -> Reception:
        """What messages that came together have in common; that of the last ones, if it is the same."""
        last = attempt >= self._last_attempt if last is None else last
        found = self._reception
        if (found.attempt, found.last, found.received) != (attempt, last, received):
            found = self._reception = Reception(
                found.decode, found.group, attempt, last, received, found.queue, found.worker
            )
        return found

    def run(
        self,
        records: Sequence[Record],
        send: Send,
        *,
        attempt: int,
        received: float,
        until: Until,
        call: Run | None = None,
        ahead: Window | None = None,  # noqa: ARG002
    ) -> tuple[int, Exception | None]:
        """Records of one partition or one job, in order, until one fails or the time has come.

        ``attempt`` is that of the first record; ``call`` what is done with each, ``self.call`` if not given; ``ahead`` has what
        was handled before its turn, by ``Parallel``. Gives the number of finished records, and the error of the next one if it
        failed.
        """
        token = current.set(self.idle)
        try:
            if call is None and self._quick is not None and len(records) > 1:  # for one it takes longer to set out
                done, error = self._quick.run(records, send, attempt, received, until)
            else:
                done, error = self.run_each(call or self.call, records, send, attempt, received, until)
        finally:
            current.reset(token)
            self.idle.take()
        if done:
            self.dead_in_a_row = 0
        return done, None if error is None else as_failure(error)

    def run_each(
        self, call: Run, records: Sequence[Record], send: Send, attempt: int, received: float, until: Until
    ) -> tuple[int, BaseException | None]:
        clock = time.monotonic
        done = 0
        try:
            for record in records:
                until.began = now = clock()
                if now >= until.at:
                    break
                try:
                    responses = call(record, attempt, received)
                except Abort:
                    self.idle.take()
                    responses = ()
                if responses:
                    send(record, responses)
                done += 1
                attempt = 1
        except (Exception, SystemExit) as error:
            return done, error
        return done, None

    def unasked(self, result: Any) -> Sequence[Response]:
        """What comes of a handler that declares nothing: of a value that it returned nothing."""
        self._tell_unused_value(finish(result))
        return self.idle.take()

    def handle(self, message: Message) -> Sequence[Response]:
        """Calls the handler and gives the responses that passed the check. Hooks have run before; ``Abort`` may come out."""
        call, token = self.begin()
        try:
            return self.end(call, finish(self._invoke(message)))
        finally:
            call.has_ended = True
            current.reset(token)

    def begin(self) -> tuple[Call, Token[Any]]:
        """The call that a handler is about to be called in, which is the current one until the token is reset."""
        call = Call(self.route.name, self.declarations, self.parser, self.route.responder)
        return call, current.set(call)

    def end(self, call: Call, result: Any) -> Sequence[Response]:
        """What follows when the handler has given its result: gives the responses that passed the check."""
        if result is not None:
            self._answer(call, result)
        responses = call.responses
        if len(responses) != 1 or responses[0].topic != self._answers_to:  # else it is all that is declared
            call.check()
        if call.responder is not None and not call.responder_calls:
            self._check_unused_responder()
        call.has_ended = True
        return call.take()

    def _answer(self, call: Call, result: Any) -> None:
        if call.responder is not None:
            respond_with(call, call.responder, self.responder_declarations, call.parser, (result,))
        elif self._answers_to is not None:
            call.answer(self._answers_to, result)
        elif self.declarations:
            raise ResponseError(
                f"{call.name} returned a value, but declares {len(self.declarations)} topics"
                f" ({', '.join(self.declarations)}); say which one: app.respond_to(topic, value)"
            )
        else:
            self._tell_unused_value(result)

    def _tell_unused_value(self, result: Any) -> None:
        if result is not None and not self._told_unused:
            self._told_unused = True
            logger.warning(
                "%s returns a value (%.60r), which goes nowhere: it declares no topic. Add @app.responds_to(...), or"
                " return nothing. Said once.",
                self.route.name,
                result,
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
        except ParserError:
            # The worker cannot read it either: there it fails, alone, and the messages behind it need not wait.
            logger.debug("%s goes to its queue past a hook that could not read it", place(record), exc_info=True)
            return message, self.entry(record, received, record.value)
        if self.shards and (message.worker is not None or message.queue != self.queue_of(record)):
            raise ConfigurationError(
                f"{place(record)}: a before_enqueue hook has set its queue or worker, but its route is ordered=True, which"
                " holds only within the queue of its key; leave them as they are, or take ordered=True away"
            )
        value = record.value
        if message.payload_changed:
            value = self._rewritten(message, value)
        return message, self.entry(record, received, value)

    def _rewritten(self, message: Message, value: bytes | None) -> bytes | None:
        """What the worker is to read; the value itself where the payload differs only as an object that knows no equal."""
        written = self._written(message.payload)
        try:
            return value if written == self._written(self.decode(value)) else written
        except ParserError:
            return written

    def _written(self, payload: Any) -> bytes | None:
        """A payload as the worker will read it: by the parser, a text too, which as a response would pass as it is."""
        return None if payload is None else encoded(self.parser.generate(payload), self.parser)

    def entry(self, record: Record, received: float, value: bytes | None) -> Entry:
        """A message as its job carries it. Raises ``QueueError`` for one of more than ``max_message_bytes``."""
        data: Any = value
        if value is not None and self.interchanger is not Plain:
            data = self.interchanger.load(value)
            if not isinstance(data, bytes):
                data = _as_json(self.interchanger, data)
        size = _size(record.key, data, record.headers)
        if size > self.max_message_bytes:
            raise QueueError(
                f"{place(record)} has {size:,} bytes, and max_message_bytes lets {self.max_message_bytes:,} into a queue: raise"
                " it, let the route run with inline=True, or send large things by reference"
            )
        return (
            self.topic,
            record.partition,
            record.offset,
            record.timestamp,
            record.key,
            data,
            record.headers,
            received,
        )

    def entries(self, records: Sequence[Record], received: float) -> list[Entry]:
        """``entry`` for the untouched values of many records."""
        most = self.max_message_bytes
        large = (
            r
            for r in records
            if (r.key or r.headers or len(r.value or b"") > most) and _size(r.key, r.value, r.headers) > most
        )
        if self.interchanger is not Plain or any(large):
            return [self.entry(record, received, record.value) for record in records]
        topic = self.topic
        return [(topic, r.partition, r.offset, r.timestamp, r.key, r.value, r.headers, received) for r in records]

    def record(self, entry: Entry) -> PlainRecord:
        """The inverse of ``entry``. Raises ``QueueError`` for an entry that flowkit did not write."""
        try:
            record = PlainRecord._make(entry)
            if record.value is not None and self.interchanger is not Plain:
                record = record._replace(value=self.interchanger.parse(record.value))
            texts = all(isinstance(name, str) for name, _ in record.headers)
            parts = (record.key, record.value, *(item for _, item in record.headers))
            sound = texts and all(part is None or isinstance(part, bytes) for part in parts)
            struct.pack(">iqq", record.partition, record.offset, record.timestamp)
            sound = sound and 0 <= record.received < 2**40
        except (TypeError, ValueError, struct.error) as error:
            raise self._not_queued(entry) from error
        if not sound:
            raise self._not_queued(entry)
        return record

    def _not_queued(self, entry: object) -> QueueError:
        return QueueError(
            f"a job for {self.topic!r} holds what flowkit did not queue: {brief(entry)}; was the route's"
            " interchanger changed while messages were queued?"
        )

    def params(self, entry: Entry) -> dict[str, Any]:
        """An entry as JSON can hold it, by names: what a custom worker's ``perform_async(topic, params)`` is given."""
        topic, partition, offset, timestamp, key, data, headers, received = entry
        if isinstance(data, bytes):
            data = pack(data) if self.interchanger is Plain else {LOADED_BYTES: pack(data)}
        pairs = [[name, pack(item)] for name, item in headers]
        values = (partition, offset, timestamp, received, pack(key), pairs, data)
        return {"topic": topic, **dict(zip(PARAMS, values, strict=True))}

    def entry_of(self, params: Mapping[str, Any]) -> Entry:
        """The inverse of ``params``."""
        try:
            partition, offset, timestamp, received, key, headers, data = [params[name] for name in PARAMS]
            if self.interchanger is Plain:
                data = unpack(data)
            elif isinstance(data, dict) and data.keys() == {LOADED_BYTES}:
                data = unpack(data[LOADED_BYTES])
            pairs = tuple((name, unpack(item)) for name, item in headers)
            return (self.topic, partition, offset, timestamp, unpack(key), data, pairs, received)
        except KeyError as error:
            raise QueueError(f"params lack {error}; pass on what perform_async was given, unchanged") from error
        except (TypeError, ValueError) as error:
            raise self._not_queued(params) from error

    def take_apart(self, record: Record) -> bool:  # noqa: ARG002
        """Whether this message, whose responses Kafka refuses, was handled together with others: they are handled one by one
        next, to find out whose they were.
        """
        return False

    def original(self, record: Record) -> tuple[Record, int]:
        """The message that a record is, and how often it had failed before it was written there."""
        return record, 0

    def is_copy(self, responses: Sequence[Response]) -> bool:
        """Whether this is what goes to a retry topic in the place of a failed message, and no response."""
        return any(own.topic == responses[0].topic for own in self.retry_topics) if responses else False

    def retry_topic(self, attempt: int) -> RetryTopic:
        """Where a message waits after the failure of attempt number ``attempt``."""
        return self.retry_topics[min(attempt, len(self.retry_topics)) - 1]

    def dead(self, record: Record, error: Exception, attempts: int) -> Response:
        """The dead letter for a record."""
        assert self.dead_letter is not None
        return letter(self.dead_letter, record, self.group, error, attempts)

    def count_dead(self) -> DeadLetterLimit | None:
        """Counts a dead letter that was sent. Gives the error that is to stop the process, if that is one too many."""
        self.dead_in_a_row += 1
        limit = self.dead_letter_limit
        if limit is None or self.dead_in_a_row < limit:
            return None
        many = "a message" if limit == 1 else f"{limit} messages one after the other"
        return DeadLetterLimit(
            f"{many} of {self.topic!r} went to {self.dead_letter!r}, without one that could be handled in between"
            f" (dead_letter_limit={limit}): that is rather a fault of the handler, or of what it needs, than of the messages."
            f" Mend it, start again, and send them once more with: flowkit dead replay --topic {self.topic}"
        )

    def skipped(self, record: Record, error: Exception, attempt: int) -> dict[str, Any]:
        """The details of the event of a message that is passed over: all that is needed to find it again."""
        text = (
            f"{place(record)} is skipped (on_poison='skip'), attempt {attempt}: topic {record.topic}, partition"
            f" {record.partition}, offset {record.offset}, key {record.key!r}: {type(error).__name__}: {error}"
        )
        return {"message": text, **about(record, self.group), "attempt": attempt, "key": record.key}

    def failed(
        self, record: Record, error: Exception, attempt: int, received: float, *, last: bool | None = None
    ) -> None:
        """Tells the ``after_failure`` hooks. What they raise is logged: it must not hide the error they are told of."""
        if is_passing(error) and last is None:
            last = False  # it waits, and is tried again
        message = self.message(record, attempt, received, last)
        for hook in self.after:
            try:
                finish(hook(error, message))
            except (Exception, SystemExit, Abort) as problem:
                if is_forced_stop(problem):
                    raise
                logger.exception("an after_failure hook failed itself, for %s", place(record))


def _size(key: bytes | None, data: Any, headers: HeaderPairs) -> int:
    """Bytes of a message in a job, about."""
    size = len(key) if key else 0
    if data is not None:
        size += len(data) if isinstance(data, bytes | str) else len(orjson.dumps(data))
    return size + sum([len(name) + len(value or b"") for name, value in headers]) if headers else size


def _as_json(interchanger: Any, data: Any) -> Any:
    """What JSON makes of it. Raises ``QueueError`` for what a job could not hold: here it is known which message it is."""
    try:
        return orjson.loads(orjson.dumps(data))
    except TypeError as error:
        raise QueueError(f"what {interchanger!r} made of the value is neither bytes nor JSON: {error}") from error
