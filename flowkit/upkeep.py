"""What RQ needs besides workers, done by ``flowkit run``: due retries go back to their queues, and so do the jobs of killed
workers. A plain ``rq worker`` does neither by itself, or only every ten minutes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from rq import Queue, Worker
from rq.scheduler import RQScheduler

from .errors import RedisUnavailable
from .jobs import Envelope, connect, known_queues, redis_errors

logger = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds between looks at the due retries; RQ's own scheduler looks as often."""

CLEAN_EVERY = 15.0
"""Seconds between looks for jobs of killed workers, and for new queues."""


class Upkeep(threading.Thread):
    """One thread that looks after flowkit's queues. Where several processes run one, RQ's lock per queue picks who works."""

    def __init__(self, redis_settings: str | Mapping[str, Any], application: str) -> None:
        super().__init__(name="flowkit-upkeep", daemon=True)
        self.redis = connect(redis_settings)
        self.application = application
        self._ended = threading.Event()
        self._scheduler: RQScheduler | None = None
        self._queues: list[Queue] = []
        self._clean_at = 0.0

    def run(self) -> None:
        while not self._ended.wait(EVERY):
            try:
                with redis_errors():
                    self.turn()
            except RedisUnavailable as error:
                logger.warning("retries wait: %s", error)
                self._ended.wait(CLEAN_EVERY)
            except Exception:
                logger.exception("looking after the queues failed; trying again")
                self._ended.wait(CLEAN_EVERY)
        if self._scheduler is not None:
            try:
                self._scheduler.release_locks()
            except Exception as error:
                logger.warning("the scheduler's locks are left to run out: %r", error)

    def stop(self) -> None:
        self._ended.set()

    def turn(self) -> None:
        """Puts due retries back; every ``CLEAN_EVERY`` seconds also what killed workers left."""
        if time.monotonic() >= self._clean_at:
            self._clean_at = time.monotonic() + CLEAN_EVERY
            self._look_for_queues()
            for queue in self._queues:
                if self._scheduler is not None and queue.name in self._scheduler.acquired_locks:
                    self._clean(queue)
        if self._scheduler is not None and self._scheduler.acquired_locks:
            self._scheduler.enqueue_scheduled_jobs()

    def _look_for_queues(self) -> None:
        names = sorted(known_queues(self.redis, self.application))
        if names != [queue.name for queue in self._queues]:
            self._queues = [Queue(name, connection=self.redis, serializer=Envelope) for name in names]
            if self._scheduler is not None:
                self._scheduler.release_locks()
            self._scheduler = (
                RQScheduler(names, connection=self.redis, serializer=Envelope, logging_level=logging.WARNING)
                if names
                else None
            )
        if self._scheduler is not None:
            self._scheduler.acquire_locks()

    def _clean(self, queue: Queue) -> None:
        queue.started_job_registry.cleanup()
        janitor = Worker([queue], connection=self.redis, serializer=Envelope, prepare_for_work=False)
        queue.intermediate_queue.cleanup(janitor, queue)
