"""Handlers that take many messages in one call: what of a batch is done, and which message failed in it.

For routes with ``inline=True``. The responses of a call belong to the first message of its batch: where Kafka does not confirm
one of them, the whole batch comes again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .coroutines import finish
from .dispatch import Ahead, Handling, Run, Send, Until, as_failure
from .errors import BatchError, ConfigurationError, ResponseError, is_passing
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
        if self.transactional:
            raise ConfigurationError(f"{where} and transactional=True do not go together yet; take one of them away")
        self.reads_payloads = reads_payload(route.handler, batch=True)
        self.max_batch = route.max_batch or MAX_BATCH
        self.batch_wait = route.batch_wait or 0.0

    def _bound(self, handler: Handler) -> tuple[Callable[[Any], Any], Any]:
        return bind_batch(handler)

    def _calls(self) -> tuple[Run, Run]:
        return self._call_alone, self._call_queued

    def _call_alone(self, record: Record, attempt: int, received: float) -> Sequence[Response]:
        """One message, as a batch of its own."""
        _, responses, error = self._handle([record], attempt, received)
        if error is not None:
            raise error
        return responses

    def run(
        self,
        records: Sequence[Record],
        send: Send,
        *,
        attempt: int,
        received: float,
        until: Until,
        call: Run | None = None,  # noqa: ARG002
        ahead: Ahead | None = None,  # noqa: ARG002
    ) -> tuple[int, Exception | None]:
        done = 0
        token = current.set(self._idle)
        try:
            while done < len(records):
                until.began = now = time.monotonic()
                if now >= until.at:
                    break
                # one that has failed before is alone, so that the others are not handled with it again and again
                end = done + (self.max_batch if attempt == 1 else 1)
                count, responses, error = self._handle(records[done:end], attempt, received)
                if responses:
                    send(records[done], responses)
                done += count
                attempt = 1
                if error is not None:
                    return done, error
        except (Exception, SystemExit) as raised:  # of what sends
            return done, as_failure(raised)
        finally:
            if done:
                self.dead_in_a_row = 0
            current.reset(token)
            self._idle.take()
        return done, None

    def _handle(self, records: Sequence[Record], attempt: int, received: float) -> Done:
        messages: dict[int, Message] = {}
        direct: list[Response] = []  # what hooks respond
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
                self._idle.take()
            except (Exception, SystemExit) as raised:
                count, error = position, as_failure(raised)
                break
            direct += self._idle.take()
        if not messages:
            return count, direct, error
        try:
            responses, failed_at, failure = self._call_with(list(messages.values()))
        except Abort:
            return count, direct, error
        except (Exception, SystemExit) as raised:
            failed = as_failure(raised)
        else:
            if failure is None:
                return count, [*direct, *responses], error
            return list(messages)[failed_at], [*direct, *responses], failure
        if len(messages) == 1 or is_passing(failed) or isinstance(failed, ResponseError):  # no fault of one of them
            return next(iter(messages)), (), failed
        logger.warning(
            "%d messages from %s on failed together in %s, and are handled one by one: %s: %s",
            len(messages),
            place(records[0]),
            self.route.name,
            type(failed).__name__,
            failed,
        )
        return self._one_by_one(messages, direct, count, error)

    def _one_by_one(
        self, messages: dict[int, Message], responses: list[Response], count: int, error: Exception | None
    ) -> Done:
        for position, message in messages.items():
            try:
                sent, _, failure = self._call_with([message])
            except Abort:
                continue
            except (Exception, SystemExit) as raised:
                return position, responses, as_failure(raised)
            if failure is not None:
                return position, responses, failure
            responses += sent
        return count, responses, error

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
                return call.responses, failure.index, error
            if result is not None:
                self._answer_each(call, result)
            call.check()
            return call.responses, 0, None
        finally:
            current.reset(token)

    def _answer_each(self, call: Call, result: Any) -> None:
        """What a batch handler returned: a list is a response for each of its items."""
        if isinstance(result, list) and self._answers_to is not None:
            call.returned_to = self._answers_to
            for item in result:
                call.respond_to(self._answers_to, item)
        else:
            self._answer(call, result)
