"""How a group keeps its partitions while one handler takes long: somebody else polls meanwhile, with everything paused.

Kafka counts a member out that does not poll for ``kafka.max_poll_interval``, and a rebalance waits for the poll of each member.
The loop cannot poll while a handler has its thread, so it lends its client for that time. If it does not come back soon, a
thread takes the client and polls with it, until the loop wants it back. kafka-python's poll may be called by any thread, if
by one at a time.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from .message import Partition, places

if TYPE_CHECKING:
    from .consumer import Consumer

logger = logging.getLogger(__name__)

POLL = 0.1
"""Seconds of each poll meanwhile, and so what a handler that took long may wait at its end."""


class Loan:
    """The client of one loop while a handler runs: ``with loan: ...``, on the loop's thread.

    Partitions may go to others meanwhile. Those are in ``Consumer.left`` afterwards, and what is in hand of them is not theirs
    to finish. One that left and came back, with nobody ahead of us there, goes on as if it had not left.
    """

    def __init__(self, loop: Consumer) -> None:
        self.loop = loop
        self.error: Exception | None = None
        """What made a poll fail meanwhile: the client is not to be polled again."""
        self._lock = threading.Lock()
        self._lock.acquire()  # by the loop, which has the client but for the moments when it lends it
        self._wanted = False
        self._taken = False
        self._before: dict[Partition, int | None] = {}

    def __enter__(self) -> None:
        self._lock.release()

    def __exit__(self, *_: object) -> None:
        if not self._lock.acquire(blocking=False):
            self._wanted = True
            self._lock.acquire()
            self._wanted = False
        if self._taken:
            self._taken = False
            self._look()

    @property
    def is_kept(self) -> bool:
        """Whether somebody polls for the loop now."""
        return self._taken and self.error is None

    def keep(self) -> bool:
        """Takes the client if the loop lends it now; gives whether somebody polls with it. From any thread but the loop's."""
        if self._lock.acquire(blocking=False):
            if self.error is not None:
                self._lock.release()
                return False
            self._taken = True
            self.loop.until.at = 0.0  # what is in hand is the last of this batch
            thread = threading.Thread(target=self._poll, name=f"flowkit-keeps-{self.loop.group}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system gives no more threads
                self._taken = False
                self._lock.release()
                logger.warning("group %s: its membership cannot be kept: %s", self.loop.group, error)
                return False
            return True
        return self.is_kept

    def _poll(self) -> None:
        loop = self.loop
        try:
            client = loop.client
            self._before = {partition: client.position(partition) for partition in loop.tracks}
            while not self._wanted:
                for partition in (*loop.tracks, *loop.new):
                    client.pause(partition)
                loop.about_to_poll()
                batch = client.poll(POLL, 1)
                for partition, records in batch.items():  # new ones, which are paused from now on
                    client.seek(partition, records[0].offset)
                loop.joined = client.joined()
        except Exception as error:
            self.error = error
        finally:
            self._lock.release()

    def _look(self) -> None:
        """Back on the loop's thread: finds out what is still ours."""
        loop, client = self.loop, self.loop.client
        came_back = [
            partition
            for partition in loop.new
            if partition in loop.left and (partition in loop.batch or loop.inline.is_at_once(partition))
        ]
        unsettled = loop.inline.unsettled()
        kept = []
        for partition in came_back:
            track = loop.left[partition]
            if track.done is None and partition not in loop.batch:
                continue  # nothing was read of it
            done = loop.batch[partition][0].offset if track.done is None else track.done
            done = min(done, unsettled.get(partition, done))
            committed = client.committed(partition)
            may_keep = loop.may_keep(partition) and not loop.inline.is_at_once(partition)
            if track.held or not may_keep or (committed or 0) > done:
                client.seek(partition, max(committed or 0, done))
                continue
            track.committed = committed
            position = self._before.get(partition)
            if position is not None:
                client.seek(partition, position)
            kept.append(partition)
        for partition in kept:
            loop.tracks[partition] = loop.left.pop(partition)
            loop.look_at(partition)
            loop.new.remove(partition)
            loop.forget_lost(partition)
        if kept:
            loop.monitor.notice("rebalanced", group=loop.group, assigned=places(kept))
        for partition, track in loop.tracks.items():
            if track.resume_at is None and not track.held:
                client.resume(partition)
