"""Handlers that take many messages in one call: what of a batch is done, and which message failed in it.

For routes with ``inline=True``. The responses of a call belong to the first message of its batch: where Kafka does not confirm
one of them, the whole batch comes again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .coroutines import finish
from .dispatch import Handling, Run, Send, Until, as_failure
from .errors import BatchError, ConfigurationError, is_passing
from .message import Abort, Message, Record, place
from .responses import Call, Declarations, Response, current
from .route import Handler, Responder, Route
from .signature import bind_batch, reads_payload

if TYPE_CHECKING:
    from .settings import Settings

logger = logging.getLogger(__name__)

MAX_BATCH = 500
"""Messages in a batch, if the route does not say how many."""

Done = tuple[int, Sequence[Response], Exception | None]
"""How many records are done, their responses, and the error of the record behind them, if it failed."""


class Batching(Handling):
    """The route of a batch handler, made ready."""

    def __init__(
        self,
        route: Route,
        settings: Settings,
        before: Iterable[Handler],
        after: Iterable[Handler],
        declarations_of: Callable[[Handler | Responder], Declarations],
    ) -> None:
        where = f"topic {route.topic!r}: batch=True"
        if route.responder is not None:
            raise ConfigurationError(f"{where} and responder= do not go together; let the handler respond itself")
        super().__init__(route, settings, before, after, declarations_of)
        if not self.inline:
            raise ConfigurationError(
                f"{where} is for routes with inline=True: a queued one has many messages in a job, and is given them one by"
                " one. Add inline=True, or take batch=True away"
            )
        self.reads_payloads = reads_payload(route.handler, batch=True)
        self.max_batch = route.max_batch or MAX_BATCH
        self.batch_wait = route.batch_wait or 0.0
        self._ends: dict[int, int] = {}
        self._alone_to: dict[int, int] = {}
        """By partition: the last message of the last batch; and up to which one they are alone, because a batch has failed."""

    def _bound(self, handler: Handler) -> tuple[Callable[[Any], Any], Any]:
        return bind_batch(handler)

    def _calls(self) -> tuple[Run, Run]:
        return self._call_alone, self._call_queued

    def _call_alone(self, record: Record, attempt: int, received: float) -> Sequence[Response]:
        """One message, as a batch of its own."""
        until = Until()
        until.at = math.inf
        _, responses, error = self._handle([record], attempt, received, until)
        if error is not None:
            raise error
        return responses

    def run_each(
        self,
        call: Run,  # noqa: ARG002
        records: Sequence[Record],
        send: Send,
        attempt: int,
        received: float,
        until: Until,
    ) -> tuple[int, BaseException | None]:
        done = 0
        partition = records[0].partition
        if attempt > 1:  # it failed, and maybe for another one
            self._alone_to[partition] = self._ends.get(partition, -1)
        try:
            while done < len(records):
                until.began = now = time.monotonic()
                if now >= until.at:
                    break
                alone = attempt > 1 or records[done].offset <= self._alone_to.get(partition, -1)
                part = records[done : done + (1 if alone else self.max_batch)]
                if not alone:
                    self._ends[partition] = part[-1].offset
                count, responses, error = self._handle(part, attempt, received, until)
                if responses:
                    send(records[done], responses)
                done += count
                attempt = 1
                if error is not None:
                    return done, error
                if not count:
                    break  # it is to stop
        except (Exception, SystemExit) as raised:  # of what sends
            return done, raised
        return done, None

    def take_apart(self, record: Record) -> bool:
        end, alone_to = self._ends.get(record.partition, -1), self._alone_to.get(record.partition, -1)
        if not alone_to < record.offset < end:
            return False
        self._alone_to[record.partition] = min(end, record.offset + self.max_batch - 1)
        return True

    def _handle(self, records: Sequence[Record], attempt: int, received: float, until: Until) -> Done:
        messages: dict[int, Message] = {}
        direct: dict[int, list[Response]] = {}  # what hooks respond, by position
        error = None
        count = len(records)
        for position, record in enumerate(records):
            try:
                message = self.message(record, attempt if position == 0 else 1, received)
                for hook in self.before:
                    finish(hook(message))
                if self.reads_payloads:
                    message.payload  # noqa: B018
                messages[position] = message
            except Abort:
                self.idle.take()
            except (Exception, SystemExit) as raised:
                count, error = position, as_failure(raised)
                break
            direct[position] = self.idle.take()

        def done(end: int, responses: Sequence[Response], failure: Exception | None) -> Done:
            of_hooks = [response for at in range(end) for response in direct.get(at, ())]
            return end, [*of_hooks, *responses], failure

        if not messages:
            return done(count, (), error)
        try:
            responses, failed_at, failure = self._call_with(list(messages.values()))
        except Abort:
            return done(count, (), error)
        except (Exception, SystemExit) as raised:
            failed = as_failure(raised)
        else:
            if failure is None:
                return done(count, responses, error)
            return done(list(messages)[failed_at], responses, failure)
        if len(messages) == 1 or is_passing(failed):
            return done(next(iter(messages)), (), failed)
        logger.warning(
            "%d messages from %s on failed together in %s, and are handled one by one: %s: %s",
            len(messages),
            place(records[0]),
            self.route.name,
            type(failed).__name__,
            failed,
        )
        sent: list[Response] = []
        for position, message in messages.items():
            if until.at == 0.0:  # it is to stop
                return done(position, sent, None)
            try:
                responses, _, failure = self._call_with([message])
            except Abort:
                continue
            except (Exception, SystemExit) as raised:
                failure = as_failure(raised)
            if failure is not None:
                return done(position, sent, failure)
            sent += responses
        return done(count, sent, error)

    def _call_with(self, messages: list[Message]) -> tuple[list[Response], int, Exception | None]:
        """Calls the handler. Gives the responses that passed the check; with ``BatchError`` those of the messages before the
        one that failed, its index, and its error.
        """
        call = Call(self.route.name, self.declarations, self.parser)
        token = current.set(call)
        try:
            try:
                result = finish(self._invoke(messages))
            except BatchError as failure:
                if not 0 <= failure.index < len(messages):
                    raise ValueError(
                        f"{failure!r} names none of the messages of its batch, 0 to {len(messages) - 1}"
                    ) from failure
                cause = failure.__cause__
                error = cause if isinstance(cause, Exception) else failure
                if failure.index == 0:
                    return [], 0, error
                call.check()
                return call.take(), failure.index, error
            if result is not None:
                self._answer_each(call, result)
            call.check()
            return call.take(), 0, None
        finally:
            call.has_ended = True
            current.reset(token)

    def _answer_each(self, call: Call, result: Any) -> None:
        """What a batch handler returned: a list is a response for each of its items."""
        if isinstance(result, list) and self._answers_to is not None:
            for item in result:
                call.answer(self._answers_to, item)
        else:
            self._answer(call, result)
