"""Handlers that run many at a time in one process: blocking ones on threads, ``async def`` ones as tasks, in the order of keys
or partitions.

Messages that are to be handled one after the other, of one key say, are in one lane. A lane with messages waits for a free
thread or task, and for nothing else: neither for the next poll nor for a slow message of another lane. What a partition has
here is its window. The loop passes its messages in their order, each as soon as it and those before it have an outcome: then
its responses are sent and its offset counts, as if it had been handled only now. So nothing is committed past a message that
is not done, and what stands behind one that failed is not handled again when that one is.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextvars import copy_context
from itertools import takewhile
from queue import Empty, SimpleQueue
from types import CoroutineType
from typing import Any, NamedTuple

from .coroutines import call_soon, finish
from .dispatch import Handling, Run, Send, Until, as_failure
from .errors import ConfigurationError
from .message import Abort, Message, Record
from .responses import Call, Declarations, Response, current
from .route import Handler, Responder, Route
from .settings import Settings
from .signature import is_async

Outcome = Sequence[Response] | Exception


class Entry(NamedTuple):
    """A message that is not begun."""

    record: Record
    attempt: int
    received: float
    window: Window


class Lane:
    """Messages that are handled one after the other. It is there while it has any, or one of them has failed."""

    __slots__ = ("entries", "failed", "is_out", "name")

    def __init__(self, name: Any) -> None:
        self.name = name
        self.entries: deque[Entry] = deque()
        self.is_out = False
        """Whether one of its messages is in hand, or it waits for a free thread or task."""
        self.failed: tuple[Window, int] | None = None
        """The window and the offset of the message that has failed: what is behind it waits until it is retried or let go."""


class Window:
    """What one route has of a partition: its messages from the first that is not passed to the last that was polled."""

    __slots__ = ("in_hand", "is_closed", "outcomes", "records", "route", "unbegun")

    def __init__(self, route: Parallel) -> None:
        self.route = route
        self.records: deque[Record] = deque()
        self.outcomes: dict[int, Outcome] = {}
        """By offset, what came of those that have been handled."""
        self.in_hand: set[int] = set()
        self.unbegun = 0
        self.is_closed = False

    def ready(self) -> list[Record]:
        """The messages whose turn it is: the first ones, as far as they have an outcome."""
        return list(takewhile(lambda record: record.offset in self.outcomes, self.records))

    def pass_to(self, offset: int) -> None:
        """The messages before this offset are done with."""
        records = self.records
        while records and records[0].offset < offset:
            records.popleft()

    def pass_over(self, record: Record) -> None:
        """One that has failed, or whose responses cannot be sent, is done with: what waits for it goes on."""
        self.route.go_on_behind(record, self)
        self.pass_to(record.offset + 1)

    def rewind(self, offset: int) -> None:
        """Messages from this offset on come again. Those that have been handled, or are in hand, are not begun once more."""
        self.route.drop(self, forget=True)
        for gone in [known for known in self.outcomes if known < offset]:  # as far as they are there still
            del self.outcomes[gone]

    def drop(self) -> None:
        """Begins none of its messages any more."""
        self.route.drop(self)

    def close(self) -> None:
        """Its messages are somebody else's, or come again: nothing counts that came of them, or will come."""
        self.is_closed = True
        self.route.drop(self, forget=True)
        self.outcomes.clear()


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
        self.unbegun = 0
        """Messages in lanes."""
        self.low = 0
        """So many of them: when there are fewer, ``wake`` is set."""
        self.in_hand: dict[Lane, float] = {}
        """When the message was begun that is in hand, on the clock of ``time.monotonic()``."""
        self.wake = threading.Event()
        """Set when few are left in lanes, and when nothing is."""
        self.broken: BaseException | None = None
        """What a handler raised that is no failure of its message but the end of the loop, like ``KeyboardInterrupt``."""
        self._lanes: dict[Any, Lane] = {}
        self._ready: SimpleQueue[Lane] = SimpleQueue()
        self._lock = threading.Lock()
        self._is_async = is_async(route.handler)
        self._context = copy_context()
        """For each task a copy: what one handler sets in a ``ContextVar`` is not there for the next."""
        self._tasks: dict[Any, tuple[Lane, Entry]] = {}
        self._threads = 0

    # What the loop asks for.

    @property
    def is_idle(self) -> bool:
        """Whether a thread or task is free, and has nothing to do."""
        return len(self.in_hand) < self.concurrency and self._ready.empty()

    def take(self, window: Window, records: Sequence[Record], attempt: int, received: float) -> None:
        """Takes messages of one partition; ``attempt`` is that of the first. Those that the window has are left out."""
        with self._lock:
            last = window.records[-1].offset if window.records else -1
            for record in records:
                if record.offset <= last:  # polled once more
                    attempt = 1
                    continue
                window.records.append(record)
                outcome = window.outcomes.get(record.offset)
                if outcome is None and record.offset not in window.in_hand:
                    lane = self._lane(record)
                    lane.entries.append(Entry(record, attempt, received, window))
                    self.unbegun += 1
                    window.unbegun += 1
                    self._offer(lane)
                elif isinstance(outcome, Exception):
                    self._lane(record).failed = window, record.offset
                attempt = 1
        self._start()

    def go_on_behind(self, record: Record, window: Window) -> None:
        with self._lock:
            window.outcomes.pop(record.offset, None)
            lane = self._lanes.get(self._lane_of(record))
            if lane is not None and lane.failed == (window, record.offset):
                lane.failed = None
                self._offer(lane)
        self._start()

    def drop(self, window: Window, *, forget: bool = False) -> None:
        with self._lock:
            if forget:
                window.records.clear()
            for lane in [*self._lanes.values()]:
                kept = [entry for entry in lane.entries if entry.window is not window]
                self.unbegun -= len(lane.entries) - len(kept)
                lane.entries = deque(kept)
                if lane.failed is not None and lane.failed[0] is window:
                    lane.failed = None
                self._offer(lane)
            window.unbegun = 0
        self._start()

    def run(
        self,
        records: Sequence[Record],
        send: Send,
        *,
        attempt: int,
        received: float,
        until: Until,
        call: Run | None = None,
        ahead: Window | None = None,
    ) -> tuple[int, Exception | None]:
        if ahead is None:
            return super().run(records, send, attempt=attempt, received=received, until=until, call=call)
        done = 0
        try:
            for record in records:
                if (outcome := ahead.outcomes.get(record.offset)) is None:
                    break  # its partition has left
                if isinstance(outcome, Exception):
                    del ahead.outcomes[record.offset]  # and is handled again, if it is not let go
                    return done, outcome
                if outcome:
                    send(record, outcome)
                ahead.outcomes.pop(record.offset, None)
                done += 1
        except (Exception, SystemExit) as raised:  # of what sends
            return done, as_failure(raised)
        finally:
            if done:
                self.dead_in_a_row = 0
        return done, None

    # Lanes. All of it with the lock.

    def _lane_of(self, record: Record) -> Any:
        """What is the same for messages that are handled one after the other."""
        if self.order == "partition":
            return record.partition
        if self.order == "key" and record.key is not None:
            return record.partition, record.key
        return record.partition, record.offset, None

    def _lane(self, record: Record) -> Lane:
        name = self._lane_of(record)
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = Lane(name)
        return lane

    def _offer(self, lane: Lane) -> None:
        """Lets a lane wait for a free thread or task, or go, if it is time for that."""
        if lane.is_out or lane.failed is not None:
            return
        if lane.entries:
            lane.is_out = True
            self._ready.put(lane)
        else:
            self._lanes.pop(lane.name, None)

    # Threads and tasks.

    def _begin(self, lane: Lane) -> Entry | None:
        """The next message of a lane, which is in hand from now on."""
        with self._lock:
            if not lane.entries:  # they were dropped
                lane.is_out = False
                self._offer(lane)
                return None
            entry = lane.entries.popleft()
            self.unbegun -= 1
            entry.window.unbegun -= 1
            self.in_hand[lane] = time.monotonic()
            entry.window.in_hand.add(entry.record.offset)
            if self.unbegun == self.low:
                self.wake.set()
            return entry

    def _end(self, lane: Lane, entry: Entry, outcome: Outcome | None) -> None:
        window, offset = entry.window, entry.record.offset
        with self._lock:
            del self.in_hand[lane]
            window.in_hand.discard(offset)
            if not window.is_closed:
                if outcome is not None:
                    window.outcomes[offset] = outcome
                failed = outcome is None or isinstance(outcome, Exception)
                # if it is to come again, it may also be gone from the log by then, and not be waited for
                if failed and any(record.offset == offset for record in window.records):
                    lane.failed = window, offset
            lane.is_out = False
            self._offer(lane)
            if not self.in_hand and not self.unbegun:
                self.wake.set()

    def _start(self) -> None:
        """Sees to it that somebody takes what is ready."""
        if self._is_async:
            if not self._ready.empty():
                call_soon(self._begin_tasks)
            return
        while self._threads < self.concurrency:
            # one that ends with the process, whatever it does then: those of ``concurrent.futures`` would be waited for
            threading.Thread(target=self._work, name=f"flowkit-{self.topic}-{self._threads}", daemon=True).start()
            self._threads += 1

    def _work(self) -> None:
        while True:
            lane = self._ready.get()
            if (entry := self._begin(lane)) is not None:
                self._end(lane, entry, self._handled(entry))
                del entry

    def _handled(self, entry: Entry) -> Outcome | None:
        try:
            message = self.message(entry.record, entry.attempt, entry.received)
            if not self.before:
                return self.handle(message)
            with _Hooks(self) as hooks:
                for hook in self.before:
                    finish(hook(message))
                return hooks.and_(self.handle(message))
        except Abort:
            return ()
        except (Exception, SystemExit) as raised:
            return as_failure(raised)
        except BaseException as raised:
            self._break(raised)
            return None

    def _break(self, error: BaseException) -> None:
        """It is no outcome: its message comes again."""
        self.broken = error
        self.wake.set()

    def _begin_tasks(self) -> None:
        """On the event loop."""
        while len(self._tasks) < self.concurrency:
            try:
                lane = self._ready.get_nowait()
            except Empty:
                return
            if (entry := self._begin(lane)) is not None:
                # one for each message: what cancels it must not reach those behind it
                task = asyncio.create_task(self._go(lane, entry), context=self._context.copy())
                self._tasks[task] = lane, entry
                task.add_done_callback(self._end_cancelled)

    async def _go(self, lane: Lane, entry: Entry) -> None:
        outcome: Outcome | None
        try:
            message = self.message(entry.record, entry.attempt, entry.received)
            outcome = await (self._handle_hooked(message) if self.before else self._handle_async(message))
        except Abort:
            outcome = ()
        except asyncio.CancelledError:
            return  # seen by ``_end_cancelled``
        except (Exception, SystemExit) as raised:
            outcome = as_failure(raised)
        except BaseException as raised:
            self._break(raised)
            outcome = None
        del self._tasks[asyncio.current_task()]
        self._end(lane, entry, outcome)
        self._begin_tasks()  # at once, and not when this task has ended: that would be a turn of the event loop later

    def _end_cancelled(self, task: asyncio.Task[None]) -> None:
        if (found := self._tasks.pop(task, None)) is not None:
            self._end(*found, RuntimeError("the coroutine was cancelled, by itself or by what it waited for"))
            self._begin_tasks()

    async def _handle_hooked(self, message: Message) -> Sequence[Response]:
        with _Hooks(self) as hooks:
            for hook in self.before:
                await _awaited(hook(message))
            return hooks.and_(await self._handle_async(message))

    async def _handle_async(self, message: Message) -> Sequence[Response]:
        call, token = self.begin()
        try:
            result = self._invoke(message)
            return self.end(call, await result if type(result) is CoroutineType else await _awaited(result))
        finally:
            call.has_ended = True
            current.reset(token)


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
