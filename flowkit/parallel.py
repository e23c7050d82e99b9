"""Handlers that run many at a time in one process: blocking ones on threads, ``async def`` ones as tasks, in the order of keys
or partitions.

What a poll gave of all partitions is handled at once, and waits, each message with its outcome, until it is its turn: then its
responses are sent and its offset is passed, one after the other, as if it had been handled only now. So nothing is committed
past a message that is not done, and what stands behind one that failed is not handled again when that one is.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from .coroutines import finish, run_async
from .dispatch import Ahead, Handling, Run, Send, Until, as_failure
from .errors import ConfigurationError
from .message import Abort, Message, Record
from .responses import Call, Declarations, Response, current
from .route import Handler, Responder, Route
from .signature import is_async

if TYPE_CHECKING:
    from .settings import Settings


class Work(NamedTuple):
    """Messages of one partition, the number of the first one's attempt, and where their outcomes go."""

    records: Sequence[Record]
    attempt: int
    ahead: Ahead


Lane = list[tuple[Record, int, Ahead]]
"""Messages that are handled one after the other, each with the number of its attempt."""


class Parallel(Handling):
    """The route of a handler that runs ``concurrency`` times at once, made ready."""

    def __init__(
        self,
        route: Route,
        settings: Settings,
        before: Iterable[Handler],
        after: Iterable[Handler],
        declarations_of: Callable[[Handler | Responder], Declarations],
    ) -> None:
        super().__init__(route, settings, before, after, declarations_of)
        where = f"topic {route.topic!r}: concurrency="
        if not self.inline:
            raise ConfigurationError(
                f"{where} is for routes with inline=True; of a queued one as many messages are handled at once as there are"
                " workers (`flowkit worker --processes N`). Add inline=True, or take concurrency= away"
            )
        if route.batch:
            raise ConfigurationError(f"{where} and batch=True do not go together; take one of them away")
        self.concurrency = route.concurrency or 1
        self.order = route.order or "key"
        self._is_async = is_async(route.handler)
        self._begun: dict[int, float] = {}
        """By lane, when the message was begun that is in hand."""

    @cached_property
    def _threads(self) -> Threads:
        return Threads(self.concurrency, f"flowkit-{self.topic}")

    def run(
        self,
        records: Sequence[Record],
        send: Send,
        *,
        attempt: int,
        received: float,
        until: Until,
        call: Run | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[int, Exception | None]:
        if ahead is None:
            return super().run(records, send, attempt=attempt, received=received, until=until, call=call)
        if any(record.offset not in ahead for record in records):
            self.work([Work(records, attempt, ahead)], received, until)
        done = 0
        try:
            for record in records:
                if (outcome := ahead.get(record.offset)) is None:
                    break  # the time has come
                if isinstance(outcome, Exception):
                    del ahead[record.offset]  # and is handled again, if it is not let go
                    return done, outcome
                if outcome:
                    send(record, outcome)
                del ahead[record.offset]
                done += 1
        except (Exception, SystemExit) as raised:  # of what sends
            return done, as_failure(raised)
        finally:
            if done:
                self.dead_in_a_row = 0
        return done, None

    def work(self, works: Iterable[Work], received: float, until: Until) -> None:
        """Handles what has no outcome yet, at once but for messages with the same key; begins none when the time has come."""
        until.began = time.monotonic()
        lanes = self._lanes(works)
        if self._is_async:
            run_async(self._go_async(lanes, received, until))
            return
        self._threads.run([partial(self._go, lane, received, until) for lane in lanes])

    def _lanes(self, works: Iterable[Work]) -> list[Lane]:
        lanes: dict[Any, Lane] = {}
        failed: set[Any] = set()
        for records, attempt, ahead in works:
            for position, record in enumerate(records):
                name = self._lane_of(record)
                outcome = ahead.get(record.offset)
                if isinstance(outcome, Exception):
                    failed.add(name)  # it is to be retried, and what is behind it waits for that
                elif outcome is None and name not in failed:
                    lanes.setdefault(name, []).append((record, attempt if position == 0 else 1, ahead))
        return list(lanes.values())

    def _lane_of(self, record: Record) -> Any:
        """What is the same for messages that are handled one after the other."""
        if self.order == "partition":
            return record.partition
        if self.order == "key" and record.key is not None:
            return record.partition, record.key
        return record.partition, record.offset, None

    def _go(self, lane: Lane, received: float, until: Until) -> None:
        for record, attempt, ahead in lane:
            if self._is_over(until):
                return
            try:
                with self._in_hand(lane), _Hooks(self) as hooks:
                    message = self.message(record, attempt, received)
                    for hook in self.before:
                        finish(hook(message))
                    ahead[record.offset] = hooks.and_(self.handle(message))
            except Abort:
                ahead[record.offset] = ()
            except (Exception, SystemExit) as raised:
                ahead[record.offset] = as_failure(raised)
                return  # those behind it wait for it

    async def _go_async(self, lanes: list[Lane], received: float, until: Until) -> None:
        left = iter(lanes)

        async def go() -> None:
            task = asyncio.current_task()
            for lane in left:  # each takes the next that nobody has yet
                # in a task of its own: what cancels it must not reach those behind it
                await asyncio.create_task(self._go_through(lane, received, until))
                if task is not None and task.cancelling():
                    return

        # all of them: none may go on while the next ones begin
        slots = [go() for _ in range(min(self.concurrency, len(lanes)))]
        for outcome in await asyncio.gather(*slots, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _go_through(self, lane: Lane, received: float, until: Until) -> None:
        for record, attempt, ahead in lane:
            if self._is_over(until):
                return
            try:
                with self._in_hand(lane), _Hooks(self) as hooks:
                    message = self.message(record, attempt, received)
                    for hook in self.before:
                        await _awaited(hook(message))
                    ahead[record.offset] = hooks.and_(await self._handle_async(message))
            except Abort:
                ahead[record.offset] = ()
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                failed = RuntimeError("the coroutine was cancelled, by itself or by what it waited for")
                failed.__cause__ = error
                ahead[record.offset] = failed
                return
            except (Exception, SystemExit) as raised:
                ahead[record.offset] = as_failure(raised)
                return

    @contextlib.contextmanager
    def _in_hand(self, lane: Lane) -> Iterator[None]:
        self._begun[id(lane)] = time.monotonic()
        try:
            yield
        finally:
            del self._begun[id(lane)]

    def _is_over(self, until: Until) -> bool:
        """Whether the time has come. While a message is in hand that was begun before, it has not: so a slow one keeps the
        others waiting no longer than until this batch is through.
        """
        return time.monotonic() >= until.at and not any(begun < until.at for begun in list(self._begun.values()))

    async def _handle_async(self, message: Message) -> Sequence[Response]:
        call, token = self.begin()
        try:
            return self.end(call, await _awaited(self._invoke(message)))
        finally:
            call.has_ended = True
            current.reset(token)


class Threads:
    """Threads that end with the process, whatever they do then: those of ``concurrent.futures`` would be waited for."""

    def __init__(self, count: int, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Callable[[], None], SimpleQueue[BaseException | None]]] = SimpleQueue()
        for number in range(count):
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Runs them all, and waits for all to end. Raises what one of them raised."""
        ended: SimpleQueue[BaseException | None] = SimpleQueue()
        for task in tasks:
            self._tasks.put((task, ended))
        errors = [error for _ in tasks if (error := ended.get()) is not None]
        if errors:
            raise errors[0]

    def _work(self) -> None:
        while True:
            task, ended = self._tasks.get()
            try:
                task()
            except BaseException as error:  # raised by ``run``
                ended.put(error)
            else:
                ended.put(None)
            del task, ended


class _Hooks:
    """While a message is in hand: what its hooks respond by ``app.respond_with``, apart from that of others."""

    def __init__(self, handling: Handling) -> None:
        self._call = Call(handling.route.name, {}, handling.parser)

    def __enter__(self) -> _Hooks:
        self._token = current.set(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        self._call.has_ended = True
        current.reset(self._token)

    def and_(self, responses: Sequence[Response]) -> Sequence[Response]:
        return [*self._call.responses, *responses] if self._call.responses else responses


async def _awaited(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


def works_of(
    batch: Mapping[Any, Sequence[Record]], tracks: Mapping[Any, Any], handlings: Mapping[str, Handling]
) -> dict[Parallel, list[Work]]:
    """What of a batch is to be handled at once, by route; ``tracks`` are those of the partitions that may start."""
    found: dict[Parallel, list[Work]] = {}
    for partition, track in tracks.items():
        handling = handlings[partition.topic]
        if isinstance(handling, Parallel):
            records = batch[partition]
            found.setdefault(handling, []).append(Work(records, track.attempt_of(records[0]), track.ahead))
    return found
