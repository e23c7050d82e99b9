"""The routes of one group that handle many messages at once, as its loop sees them: what they are given, and give back.

It is part of ``Inline``, and runs on the loop's thread, but for ``leave``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .message import Partition, Record
from .parallel import Parallel, Window

if TYPE_CHECKING:
    from collections.abc import Collection

    from .consumer import Consumer, Track

LOOK = 0.05
"""Seconds that the loop waits at most for a free thread or task, before it passes what is done."""

MOMENT = 0.001
"""Seconds that it waits for the last of the messages in hand, which may take no longer."""

PATIENCE = 1.0
"""Seconds without a poll, beyond which the partitions are paused of a route that takes no more: others of its group go on."""

WINDOWS = 4
"""Polls of messages that a partition may have here, beyond which it is paused: they are behind a slow one."""


class Crowd:
    """The parallel routes of one loop."""

    def __init__(self, loop: Consumer) -> None:
        self.loop = loop
        self.routes = [handling for handling in loop.handlings.values() if isinstance(handling, Parallel)]
        self.topics = {route.topic for route in self.routes}
        for route in self.routes:
            route.enough = max(route.concurrency, loop.usual // 2)
            route.wake = self.routes[0].wake
        self._open: dict[Partition, Track] = {}
        """Those that have a window with messages."""
        self._held: set[Partition] = set()
        self._full_since: float | None = None
        self._is_late = False

    @property
    def is_busy(self) -> bool:
        """Whether messages are in hand, or wait for a free thread or task."""
        return any(route.unbegun or route.in_hand for route in self.routes)

    @property
    def oldest(self) -> float | None:
        """When the message was begun that has been in hand for the longest time, on the clock of ``time.monotonic()``."""
        begun = [time for route in self.routes for time in [*route.in_hand.values()]]
        return min(begun, default=None)

    def may_poll(self) -> bool:
        """Whether there is room for more. If there has been none for a while, the partitions without room are paused."""
        now = time.monotonic()
        full = [route for route in self.routes if route.is_full]
        if not full:
            self._full_since = None
        elif self._full_since is None:
            self._full_since = now
        self._is_late = self._full_since is not None and now >= self._full_since + PATIENCE
        self._hold({route.topic for route in full} if self._is_late else ())
        return not full or self._is_late

    def _hold(self, topics: Collection[str]) -> None:
        """Pauses the partitions of these topics, and those with too much behind a slow message; the others go on."""
        tracks, most = self.loop.tracks, WINDOWS * self.loop.usual
        wanted = {partition for partition in tracks if partition.topic in topics} if topics else set()
        for partition, track in self._open.items():
            count = len(track.window.records) if track.window is not None else 0
            if count >= most or (partition in self._held and count >= most / 2):
                wanted.add(partition)
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
                raise route.broken
        found.update(self._ready())
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
        wake = self.routes[0].wake
        wake.clear()
        if any(route.is_full for route in self.routes):
            if not self._is_late:  # else the next poll waits
                wake.wait(LOOK)
        elif self.is_busy and not any(route.unbegun for route in self.routes):
            wake.wait(MOMENT)

    def _ready(self) -> dict[Partition, Sequence[Record]]:
        found: dict[Partition, Sequence[Record]] = {}
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

    def finish(self) -> dict[Partition, Sequence[Record]]:
        """Begins nothing any more, and waits for what is in hand. Gives what is to have its turn."""
        for track in self._open.values():
            if track.window is not None:
                track.window.drop()
        with self.loop.loan:
            while any(route.in_hand for route in self.routes):
                time.sleep(0.005)
        return self._ready()
