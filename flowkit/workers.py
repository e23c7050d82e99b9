"""``flowkit worker``: the processes of an application, one queue each."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import redis

from .errors import RedisUnavailable
from .processes import Processes, Seat
from .queues import connect, known_queues, redis_errors, route_queues
from .worker import Worker, run_worker

if TYPE_CHECKING:
    from .app import Flowkit

logger = logging.getLogger(__name__)

MAX_HOOK_QUEUES = 32
"""Processes for queues that hooks have made up; where they take the names from messages, there may be any number of them."""

STUCK = 300.0
"""Seconds without a sign of life after which a worker process counts as stuck. It gives one every 45 seconds at least."""


class Workers(Processes):
    """So many processes a queue.

    Each has one queue only, so that no job can be lost. Without ``queues``: those of the routes, and every other one as soon
    as a hook has sent a message there. With ``max_jobs``, a process that has done so many makes room for a new one.
    """

    def __init__(
        self,
        app: Flowkit,
        queues: list[str] | None,
        *,
        burst: bool = False,
        processes: int = 1,
        max_jobs: int | None = None,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(app, on_ready)
        self.fixed = queues
        self.ends_empty = self.burst = burst
        self.processes = processes
        self.max_jobs = max_jobs
        self.share = f"its {max_jobs} jobs"
        self.stuck_after = STUCK
        self._shards = {name for handling in app.handlings.values() for name in handling.shards}
        self._redis: redis.Redis | None = None
        self._redis_away = False
        self._told_full = False

    def prepare(self) -> None:
        settings = self.app.settings_for_queues()
        self.patience = settings.shutdown_timeout
        assert settings.redis is not None
        self._redis = connect(settings.redis)
        with redis_errors():
            self._redis.ping()
        for queue in self.fixed or route_queues(self.app):
            self._seat_queue(queue)

    def work(self, seat: Seat) -> int:
        Worker.beat = staticmethod(lambda: self.give_sign("works"))
        return run_worker(self.app, seat.queue, burst=self.burst, max_jobs=self.max_jobs)

    def title(self, seat: Seat, pid: int | None = None) -> str:
        return f"the worker of queue {seat.queue}" if pid is None else f"the worker {pid} of queue {seat.queue}"

    def look(self) -> None:
        if self.fixed is None and self._redis is not None:
            self._look_for_queues(self._redis)

    def tell_late(self, seats: list[Seat]) -> None:
        queues = ", ".join(sorted({seat.queue for seat in seats}))
        logger.error("a job of %s did not end within shutdown_timeout (%g s); it comes again", queues, self.patience)

    def _look_for_queues(self, connection: redis.Redis) -> None:
        try:
            found = known_queues(connection, self.app.settings.name)
        except RedisUnavailable as error:
            if not self._redis_away:
                logger.warning("%s", error)
            self._redis_away = True
            return
        if self._redis_away:
            logger.info("Redis answers again")
        self._redis_away = False
        known = {seat.queue for seat in (*self._pids.values(), *self._start_at, *self._ended)}
        new = sorted(found - known)
        most = max(1, MAX_HOOK_QUEUES // self.processes)
        room = max(0, most - len(known - set(route_queues(self.app))))
        for queue in new[:room]:
            logger.info("working on queue %s too", queue)
            self._seat_queue(queue)
        if new[room:] and not self._told_full:
            self._told_full = True
            logger.error(
                "hooks have sent messages to more than %d queues that no route names; the others, %s for example, are not"
                " worked on here: give their names to a worker of their own with --queues. Said once.",
                most,
                new[room],
            )

    def _seat_queue(self, queue: str) -> None:
        """Seats for a queue: one for a shard, where another process would have nothing to do."""
        for number in range(1 if queue in self._shards else self.processes):
            self.seat(Seat(queue, number))
