"""What RQ needs besides workers, done by ``flowkit run``: due retries go back to their queues, and so do the jobs of killed
workers. A plain ``rq worker`` does neither by itself, or only every ten minutes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import redis
from redis import Redis
from redis.exceptions import ResponseError
from rq import Queue
from rq.command import PUBSUB_CHANNEL_TEMPLATE
from rq.executions import Execution
from rq.job import Job
from rq.scheduler import RQScheduler

from .brief import brief
from .errors import RedisUnavailable
from .jobs import OwnJob
from .queues import Envelope, Writer, connect, known_queues, redis_errors
from .shards import restore_ticket

logger = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds between looks at the due retries, and for new queues; RQ's own scheduler looks as often."""

CLEAN_EVERY = 10.0
"""Seconds between looks for jobs of killed workers."""

CLEAN_LOCK = 20
"""Seconds after which others may look for them if whoever does it is killed meanwhile. RQ's own workers take 899."""

LOCK = 30
"""Seconds after which another may look at the due retries, if whoever did it was killed. RQ's own scheduler takes 61."""

BEAT = 30.0
"""Seconds between the heartbeats of a job under a plain `rq worker`, if its --job-monitoring-interval says no more."""

LATE = 10.0
"""Seconds that a heartbeat may be late."""

TAKEN = 20.0
"""Seconds after which a job that was taken from its queue and not begun goes back: its worker was killed in between."""

# What is no job that waits to be begun, or is in the queue already, was put back by RQ: a worker that is killed before it has
# begun a job leaves an entry that nobody removes when the job is done by another.
PUT_BACK = """
local taken = redis.call('hget', KEYS[3], 'status') == 'queued' and not redis.call('lpos', KEYS[2], ARGV[1])
if taken and ARGV[2] == '0' then return 0 end
if redis.call('lrem', KEYS[1], 1, ARGV[1]) == 0 or not taken then return 0 end
redis.call('lpush', KEYS[2], ARGV[1])
return 1
"""


class Upkeep(threading.Thread):
    """One thread that looks after flowkit's queues. Where several processes run one, RQ's locks per queue pick who works."""

    def __init__(
        self, redis_settings: str | Mapping[str, Any], application: str, *, check_redis: bool = False
    ) -> None:
        super().__init__(name="flowkit-upkeep", daemon=True)
        self.redis = connect(redis_settings)
        self.application = application
        self._writer = Writer(self.redis, application)
        self._ended = threading.Event()
        self._check_redis = check_redis
        self._scheduler: RQScheduler | None = None
        self._queues: list[Queue] = []
        self._clean_at = 0.0
        self._deaf: dict[str, set[str]] = {}
        self._taken: dict[str, dict[str, float]] = {}
        self._put_back = self.redis.register_script(PUT_BACK)

    def run(self) -> None:
        while not self._ended.wait(EVERY):
            try:
                with redis_errors():
                    self.turn()
            except RedisUnavailable as error:
                logger.warning("retries wait: %s", error)
                self._deaf.clear()  # who does not listen may only have to connect again, as we do
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
        self._look_for_queues()
        if self._scheduler is not None and self._scheduler.acquired_locks:
            self._enqueue_due(self._scheduler)
        if cleaning:  # last: if it fails, the due retries are back
            for queue in self._queues:
                self._clean(queue)

    def _look_for_queues(self) -> None:
        """Takes RQ's scheduler lock of each queue, or sees that it still has it."""
        names = sorted(known_queues(self.redis, self.application))
        if names != [queue.name for queue in self._queues]:
            self._queues = [
                Queue(name, connection=self.redis, serializer=Envelope, job_class=OwnJob) for name in names
            ]
            if self._scheduler is not None:
                self._scheduler.release_locks()
            self._scheduler = None
        if names and self._scheduler is None:
            self._scheduler = RQScheduler(
                names,
                connection=self.redis,
                serializer=Envelope,
                logging_level=logging.WARNING,
                interval=LOCK - 60,  # RQ lets a lock live for a minute more
            )
        if self._scheduler is not None:
            self._scheduler.acquire_locks()

    def _enqueue_due(self, scheduler: RQScheduler) -> None:
        """RQ reads all due jobs at once, and puts none back while one of them cannot be read: that one is taken out."""
        try:
            scheduler.enqueue_scheduled_jobs()
        except (redis.ConnectionError, redis.TimeoutError):
            raise
        except Exception:
            if not self._take_out_unreadable():
                raise
            scheduler.enqueue_scheduled_jobs()

    def _take_out_unreadable(self) -> int:
        """Takes what RQ cannot read out of the jobs that are due; what there is of it stays. Gives how many there were."""
        found = 0
        for queue in self._queues:
            registry = queue.scheduled_job_registry
            for id_ in registry.get_jobs_to_schedule():
                key = Job.key_for(id_)
                is_hash = self.redis.type(key) in (b"hash", b"none")
                fields: Any = self.redis.hgetall(key) if is_hash else {b"no": b"hash"}
                try:
                    if fields:  # else it is gone, which RQ sees by itself
                        Job(id_, connection=self.redis, serializer=Envelope).restore(fields)
                except (redis.RedisError, MemoryError):
                    raise
                except Exception as error:  # whatever RQ makes of what it did not write
                    if not self.redis.zrem(registry.key, id_):
                        continue
                    found += 1
                    logger.error(
                        "job %s of queue %s cannot be read, and is tried no more: %s: %s; what there is of it stays in %s",
                        id_,
                        queue.name,
                        type(error).__name__,
                        brief(str(error)),
                        key,
                    )
        return found

    def _clean(self, queue: Queue) -> None:
        """Under the lock of RQ's own workers, which do the same every ten minutes, so that no job is put back twice."""
        lock = queue.registry_cleaning_key
        if not self.redis.set(lock, 1, nx=True, ex=CLEAN_LOCK):
            left: Any = self.redis.ttl(lock)
            if left > CLEAN_LOCK:  # of a worker of RQ, which does this when it starts, and may have been killed then
                self.redis.expire(lock, CLEAN_LOCK)
            return
        try:
            self._expire_gone(queue)
            queue.started_job_registry.cleanup()
            self._put_back_taken(queue)
            restore_ticket(self._writer, queue)
        finally:
            queue.release_maintenance_lock()

    def _expire_gone(self, queue: Queue) -> None:
        """Ends the time of jobs whose worker is gone: RQ would give those of a plain `rq worker` 90 seconds.

        Gone is a worker that has missed a heartbeat, and that listened to RQ's commands neither now nor at the last look. The
        socket on which it listens is open in its horse too, so the job of a horse that goes on without its worker is not taken.
        """
        key = queue.started_job_registry.key
        entries: Any = self.redis.zrange(key, 0, -1, withscores=True)
        executions = [(Execution.from_composite_key(entry.decode(), self.redis), until) for entry, until in entries]
        with self.redis.pipeline(transaction=False) as pipe:
            for execution, _ in executions:
                pipe.hmget(execution.key, "worker_name", "last_heartbeat")
            found: list[Any] = pipe.execute()
        now = time.time()
        channels: dict[str, str] = {}
        late: set[str] = set()
        for (execution, until), (worker, beat) in zip(executions, found, strict=True):
            if worker and beat:
                channels[execution.composite_key] = PUBSUB_CHANNEL_TEMPLATE % worker.decode()
                if now - float(beat) > max(BEAT, until - float(beat) - 60) + LATE:
                    late.add(execution.composite_key)
        heard = {channel.decode() for channel, count in self._listeners(channels.values()) if count}
        deaf = {entry for entry, channel in channels.items() if channel not in heard}
        if gone := deaf & late & self._deaf.get(queue.name, set()):
            logger.warning("%d jobs of killed workers go back to queue %s", len(gone), queue.name)
            self.redis.zadd(key, dict.fromkeys(gone, 1), xx=True)
        self._deaf[queue.name] = deaf

    def _listeners(self, channels: Iterable[str]) -> list[tuple[bytes, int]]:
        found: Any = self.redis.pubsub_numsub(*channels) if channels else []
        return list(found)

    def _put_back_taken(self, queue: Queue) -> None:
        """Jobs that nobody has begun: RQ would count that as a failure of theirs, and take up to twenty minutes."""
        now = time.monotonic()
        before = self._taken.get(queue.name, {})
        ids = set(queue.intermediate_queue.get_job_ids()).difference(
            queue.started_job_registry.get_job_ids(cleanup=False)
        )
        taken = {id_: before.get(id_, now) for id_ in ids}
        self._taken[queue.name] = taken
        for id_, since in taken.items():
            keys = [queue.intermediate_queue_key, queue.key, OwnJob.key_for(id_)]
            if self._put_back(keys, [id_, int(now - since >= TAKEN)]):
                logger.warning(
                    "job %s was taken by a worker that was killed; it goes back to queue %s", id_, queue.name
                )


def weaknesses(connection: Redis) -> list[str]:
    """In which ways this Redis may lose messages, as it is configured; none where it does not tell."""
    try:
        config: Any = connection.config_get("maxmemory-policy", "appendonly")
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
