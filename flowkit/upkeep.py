"""What RQ needs besides workers, done by ``flowkit run``: due retries go back to their queues, and so do the jobs of killed
workers. A plain ``rq worker`` does neither by itself, or only every ten minutes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError
from rq import Queue, Worker
from rq.scheduler import RQScheduler

from .errors import RedisUnavailable
from .jobs import OwnJob
from .queues import Envelope, connect, known_queues, redis_errors

logger = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds between looks at the due retries, and for new queues; RQ's own scheduler looks as often."""

CLEAN_EVERY = 15.0
"""Seconds between looks for jobs of killed workers."""

CLEAN_LOCK = 60
"""Seconds after which others may look for them if whoever does it is killed meanwhile."""


class Upkeep(threading.Thread):
    """One thread that looks after flowkit's queues. Where several processes run one, RQ's locks per queue pick who works."""

    def __init__(
        self, redis_settings: str | Mapping[str, Any], application: str, *, check_redis: bool = False
    ) -> None:
        super().__init__(name="flowkit-upkeep", daemon=True)
        self.redis = connect(redis_settings)
        self.application = application
        self._ended = threading.Event()
        self._check_redis = check_redis
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
        self.close()

    def stop(self) -> None:
        self._ended.set()

    def close(self) -> None:
        """Lets the next one look after the queues at once."""
        try:
            if self._scheduler is not None:
                self._scheduler.release_locks()
        except Exception as error:
            logger.warning("the scheduler's locks are left to run out: %r", error)
        self.redis.close()

    def turn(self) -> None:
        """Puts due retries back; every ``CLEAN_EVERY`` seconds also what killed workers left."""
        if self._check_redis:
            for sentence in weaknesses(self.redis):
                logger.warning("%s", sentence)
            self._check_redis = False
        cleaning = time.monotonic() >= self._clean_at
        if cleaning:
            self._clean_at = time.monotonic() + CLEAN_EVERY
        self._look_for_queues(refresh=cleaning)
        if self._scheduler is not None and self._scheduler.acquired_locks:
            self._scheduler.enqueue_scheduled_jobs()
        if cleaning:  # last: if it fails, the due retries are back
            for queue in self._queues:
                self._clean(queue)

    def _look_for_queues(self, *, refresh: bool) -> None:
        """Takes RQ's scheduler lock of each queue, and holds on to it."""
        names = sorted(known_queues(self.redis, self.application))
        if names != [queue.name for queue in self._queues]:
            self._queues = [
                Queue(name, connection=self.redis, serializer=Envelope, job_class=OwnJob) for name in names
            ]
            if self._scheduler is not None:
                self._scheduler.release_locks()
            self._scheduler = (
                RQScheduler(names, connection=self.redis, serializer=Envelope, logging_level=logging.WARNING)
                if names
                else None
            )
            refresh = True
        if refresh and self._scheduler is not None:
            self._scheduler.acquire_locks()

    def _clean(self, queue: Queue) -> None:
        """Under the lock of RQ's own workers, which do the same every ten minutes, so that no job is put back twice."""
        if not self.redis.set(queue.registry_cleaning_key, 1, nx=True, ex=CLEAN_LOCK):
            return
        try:
            queue.started_job_registry.cleanup()
            # One name, because RQ keeps a count of failures by it; a small ttl, because a larger one would raise the
            # time-out of our connection.
            janitor = Worker(
                [queue],
                name="flowkit-upkeep",
                connection=self.redis,
                serializer=Envelope,
                job_class=OwnJob,
                prepare_for_work=False,
                worker_ttl=15,
            )
            queue.intermediate_queue.cleanup(janitor, queue)
        finally:
            queue.release_maintenance_lock()


def weaknesses(redis: Redis) -> list[str]:
    """In which ways this Redis may lose messages, as it is configured; none where it does not tell."""
    try:
        config: Any = redis.config_get("maxmemory-policy", "appendonly")
    except ResponseError as error:  # where somebody else runs it, CONFIG is often not allowed
        logger.info("Redis does not say how it is configured, so this was not checked: %s", error)
        return []
    found = []
    policy = config.get("maxmemory-policy", "noeviction")
    if policy != "noeviction":
        found.append(f"Redis may throw queued messages away: its maxmemory-policy is {policy}; set noeviction")
    if config.get("appendonly", "yes") != "yes":
        found.append("Redis loses queued messages when it is killed: set appendonly yes")
    return found
