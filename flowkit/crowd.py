"""The routes of one group that handle many messages at once, as its loop sees them: what they are given, and give back.

It is part of ``Inline``, and runs on the loop's thread, but for ``leave``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .message import Partition, Record
from .parallel import Parallel, Window

if TYPE_CHECKING:
    from .consumer import Consumer, Track

LOOK = 0.05
"""Seconds that the loop waits at most for a free thread or task, before it passes what is done."""

MOMENT = 0.001
"""Seconds that it waits for the last of the messages in hand, which may take no longer."""

PATIENCE = 1.0
"""Seconds that a route may go without a poll, because it has enough. Then the partitions are paused that have most, so that it,
and others of its group, are given something of the others. At once, if it has threads or tasks without work.
"""

WINDOWS = 4
"""Polls of messages that a partition may have here, beyond which it is paused: they are behind a slow one."""

SHORTEST_PEEK, LONGEST_PEEK = 0.005, 0.05
"""Seconds of a poll while messages are in hand, and none comes or ends: ever longer, so that what takes long costs little."""


class Crowd:
    """The parallel routes of one loop."""

    def __init__(self, loop: Consumer) -> None:
        self.loop = loop
        self.routes = [handling for handling in loop.handlings.values() if isinstance(handling, Parallel)]
        self.topics = {route.topic for route in self.routes}
        for route in self.routes:
            route.wake = self.routes[0].wake
        self.is_ending = False
        self.peek = SHORTEST_PEEK
        """Seconds of the next poll while messages are in hand."""
        self._open: dict[Partition, Track] = {}
        """Those that have a window with messages."""
        self._full_since: dict[str, float] = {}
        """Of a topic that has enough: since when it has, on the clock of ``time.monotonic()``."""
        self._held: set[Partition] = set()

    @property
    def is_busy(self) -> bool:
        """Whether messages are in hand, or wait for that, or for their turn."""
        if any(route.unbegun or route.in_hand for route in self.routes):
            return True
        return any(track.window is not None and track.window.records for track in self._open.values())

    @property
    def oldest(self) -> float | None:
        """When the message was begun that has been in hand for the longest time, on the clock of ``time.monotonic()``."""
        begun = [time for route in self.routes for time in [*route.in_hand.values()]]
        return min(begun, default=None)

    def enough(self, route: Parallel) -> int:
        """So many messages that wait for a free thread or task are none of them without work before the next poll."""
        return max(route.concurrency, self.loop.usual // 2)

    def may_poll(self) -> bool:
        """Whether there is room for more; if there was none for a while, partitions are paused until there is."""
        now, held, may = time.monotonic(), self._behind_slow_ones(), True
        for route in self.routes:
            if not self._is_full(route):
                self._full_since.pop(route.topic, None)
            elif now < self._full_since.setdefault(route.topic, now) + PATIENCE and not route.is_idle:
                may = False
            if route.topic in self._full_since or self._held:
                held |= self._with_most(route, now)
        if held or self._held:
            self._hold(held)
        return may

    def _windows(self, route: Parallel) -> dict[Partition, Window]:
        return {
            partition: track.window
            for partition, track in self._open.items()
            if partition.topic == route.topic and track.window is not None
        }

    def _is_full(self, route: Parallel) -> bool:
        """Whether it has enough, without that of partitions that are paused: it may all have one key."""
        enough = self.enough(route)
        return route.unbegun >= enough and route.unbegun - self._paused(route) >= enough

    def _paused(self, route: Parallel) -> int:
        """Messages that wait in partitions that are paused."""
        if not self._held:
            return 0
        windows = self._windows(route)
        return sum(windows[partition].unbegun for partition in self._held & windows.keys())

    def _behind_slow_ones(self) -> set[Partition]:
        most = WINDOWS * self.loop.usual
        found = set()
        for partition, track in self._open.items():
            count = len(track.window.records) if track.window is not None else 0
            if count >= most or (partition in self._held and count >= most / 2):
                found.add(partition)
        return found

    def _with_most(self, route: Parallel, now: float) -> set[Partition]:
        """The partitions to be paused because the route has enough of them."""
        enough = self.enough(route)
        if route.unbegun < enough:
            return set()
        windows = self._windows(route)
        held = {p for p in self._held & windows.keys() if windows[p].unbegun > route.concurrency}
        since = self._full_since.get(route.topic)
        if since is not None and (now >= since + PATIENCE or route.is_idle):
            free = sum(window.unbegun for partition, window in windows.items() if partition not in held)
            for partition in sorted(windows.keys() - held, key=lambda p: windows[p].unbegun, reverse=True):
                if free < enough:
                    break
                held.add(partition)
                free -= windows[partition].unbegun
        return held

    def _hold(self, wanted: set[Partition]) -> None:
        """Pauses these partitions; the others that were paused go on."""
        tracks = self.loop.tracks
        for partition in self._held - wanted:
            if partition in tracks and tracks[partition].held:
                self.loop.let_go(partition)
        for partition in wanted:
            if partition in tracks and not tracks[partition].held:
                self.loop.hold(partition)
        self._held = wanted

    def take(self, batch: Mapping[Partition, Sequence[Record]]) -> dict[Partition, Sequence[Record]]:
        """Begins what was polled of parallel routes. Gives what is to have its turn: of these the messages that have an
        outcome, of the others what was polled.
        """
        loop = self.loop
        found: dict[Partition, Sequence[Record]] = {}
        for partition, records in batch.items():
            route = loop.handlings[partition.topic]
            if not isinstance(route, Parallel):
                found[partition] = records
            elif not loop.stopping and partition not in loop.left:
                self._admit(route, partition, records)
        self._wait()
        for route in self.routes:
            if route.broken is not None:
                error, route.broken = route.broken, None
                raise error
        ready = self._ready()
        self.peek = SHORTEST_PEEK if ready or batch else min(2 * self.peek, LONGEST_PEEK)
        found.update(ready)
        return found

    def _admit(self, route: Parallel, partition: Partition, records: Sequence[Record]) -> None:
        loop, first = self.loop, records[0].offset
        track = loop.track(partition)
        if track.resume_at is not None or track.held:  # the client gave what it had fetched before its pause
            behind = track.window is not None and track.window.records
            loop.client.seek(partition, first if behind or track.done is None else min(track.done, first))
            return
        if track.begun is None:
            track.begun = first
        if track.done is None:  # so that what has no outcome yet comes again, also where nothing is committed yet
            track.done = first
        if track.window is None:
            track.window = Window(route)
        self._open[partition] = track
        route.take(track.window, records, track.attempt_of(records[0]), loop.received)

    def _wait(self) -> None:
        """Until there is room for more; or, if nothing waits for a free thread or task, for a moment."""
        wake, full = self.routes[0].wake, False
        wake.clear()
        for route in self.routes:
            route.low = self.enough(route) + self._paused(route) - 1
            full = full or (self._is_full(route) and not route.is_idle)
        if full:
            wake.wait(LOOK)
        elif self.is_busy and not any(route.unbegun for route in self.routes):
            wake.wait(MOMENT)

    def _ready(self) -> dict[Partition, list[Record]]:
        found: dict[Partition, list[Record]] = {}
        for partition, track in [*self._open.items()]:
            window = track.window
            if window is None or self.loop.tracks.get(partition) is not track:
                del self._open[partition]
            elif ready := window.ready():
                found[partition] = ready
            elif not window.records and not window.in_hand:
                del self._open[partition]
        return found

    def leave(self, partitions: Sequence[Partition], patience: float) -> dict[Partition, list[Record]]:
        """Begins nothing of these any more, and waits so many seconds for what is in hand of them. Gives what can have its turn
        before they leave.
        """
        leaving = {partition: self._open[partition] for partition in partitions if partition in self._open}
        windows = {
            partition: track.window
            for partition, track in leaving.items()
            if track.window is not None and self.loop.tracks.get(partition) is track
        }
        for window in windows.values():
            window.drop()
        until = time.monotonic() + patience
        while any(window.in_hand for window in windows.values()) and time.monotonic() < until:
            time.sleep(0.005)
        return {partition: ready for partition, window in windows.items() if (ready := window.ready())}

    def finish(self) -> dict[Partition, list[Record]]:
        """Begins nothing any more, and waits for what is in hand. Gives what can have its turn."""
        loop, self.is_ending = self.loop, True
        for track in self._open.values():
            if track.window is not None:
                track.window.drop()
        with contextlib.nullcontext() if loop.is_without_client else loop.loan:
            while any(route.in_hand for route in self.routes):
                time.sleep(0.005)
        return self._ready()
