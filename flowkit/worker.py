"""RQ's worker in one process of ``flowkit worker``: without a fork for each job, in three round trips to Redis a job, and with
a heart that beats during it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import orjson
import redis
from redis.client import Pipeline
from rq import Queue, SimpleWorker
from rq.exceptions import NoSuchJobError, StopRequested
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.job_lifecycle import call_exception_handlers
from rq.registry import BaseRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.results import Result
from rq.suspension import WORKERS_SUSPENDED
from rq.utils import now, utcformat
from rq.worker.base import WorkerStatus

from .jobs import OwnJob, OwnWorker
from .processes import HALTED, RETIRED
from .queues import Envelope, connect, redis_errors

if TYPE_CHECKING:
    from .app import Flowkit

logger = logging.getLogger(__name__)

HEARTBEAT = 10.0
"""Seconds between the heartbeats of a running job."""

LIFE = 40
"""Seconds after its last heartbeat until a job counts as its dead worker's, and goes back to its queue."""

GRACE = 60.0
"""Seconds after a job's time-out until its worker ends, because nothing could interrupt the job. RQ's own takes as many."""

IDLE = 60
"""Seconds that RQ waits for a job until it looks whether Redis is still there; its own default is 420."""

EASE = 5.0
"""Seconds between the heartbeats of a worker that goes from job to job; RQ sends five a job."""

TAKE = """
if redis.call('exists', KEYS[3]) == 1 then return 'suspended' end
local id = redis.call('lmove', KEYS[1], KEYS[2], 'LEFT', 'RIGHT')
return id and {id, redis.call('hgetall', ARGV[1] .. id)}
"""
"""What RQ does in two steps, and before them a third: is the worker suspended; the next job, noted as taken; its hash."""

WRITE = """
if redis.call('exists', KEYS[1]) == 1 then return 0 end
if KEYS[2] and redis.call('lrem', KEYS[2], 1, ARGV[2]) == 0 then return 0 end
for _, command in ipairs(cjson.decode(ARGV[1])) do redis.call(unpack(command)) end
return 1
"""
"""All commands of a transaction, as JSON. None if there is KEYS[1], which RQ would WATCH, or if ARGV[2] cannot be taken off the
list KEYS[2], because it was put back."""


@functools.lru_cache(maxsize=64)
def _registry(kind: type[BaseRegistry], queue: str, connection: redis.Redis) -> Any:
    return kind(queue, connection=connection, job_class=TakenJob, serializer=Envelope)


class TakenJob(OwnJob):
    """A job in hand. Its registries are made once: RQ makes them at every step, and looks at the serializer each time."""

    @property
    def started_job_registry(self) -> Any:
        return _registry(StartedJobRegistry, self.origin, self.connection)

    @property
    def finished_job_registry(self) -> Any:
        return _registry(FinishedJobRegistry, self.origin, self.connection)


class Worker(SimpleWorker):
    """RQ's worker without a fork for each job: handlers, connections and producers live from job to job.

    RQ's own SimpleWorker does not beat its heart during a job, so the job of a killed one comes back only after its whole
    time-out. This one does, from a thread, so it comes back within a minute.

    What it writes is what RQ writes, made by RQ's own functions where there is one; but a job that goes well costs three calls
    of a script instead of twenty round trips. What goes another way (a failure, dependents, an empty queue) is left to RQ.
    """

    job_class = TakenJob

    beat: Callable[[], None] = staticmethod(lambda: None)
    """Called with each heartbeat."""

    forced = False
    """Whether a second signal has broken off the job in hand, which RQ then puts back."""

    executed = 0
    """Jobs so far, whether they went well or not."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._take_script = self.connection.register_script(TAKE)
        self._write_script = self.connection.register_script(WRITE)
        self._in_hand: tuple[Job, Execution, float] | None = None
        self._ended = threading.Event()
        self._eased_until = 0.0

    # The end of it.

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        OwnWorker.stop()
        super().request_stop(signum, frame)  # type: ignore[no-untyped-call]

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        try:
            super().request_force_stop(signum, frame)
        except SystemExit:
            self.forced = True
            raise

    # The heart.

    def bootstrap(self, *arguments: Any, **options: Any) -> None:
        super().bootstrap(*arguments, **options)
        threading.Thread(target=self._beat_on, name="flowkit-heartbeat", daemon=True).start()

    def teardown(self) -> None:
        self._ended.set()
        super().teardown()  # type: ignore[no-untyped-call]

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        self.beat()  # first: this process lives, also where Redis does not answer
        if pipeline is None and time.monotonic() < self._eased_until:
            return  # RQ asks for one at every step
        super().heartbeat(timeout, pipeline)
        self._eased_until = time.monotonic() + EASE

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:  # noqa: ARG002
        return LIFE

    def _beat_on(self) -> None:
        """Beats for the job in hand, whichever it is; ends the process where that job is long overdue."""
        while not self._ended.wait(HEARTBEAT):
            in_hand = self._in_hand
            if in_hand is None:
                continue
            job, execution, overdue = in_hand
            if time.monotonic() > overdue:
                logger.error("job %s cannot be interrupted; its worker ends, and the job goes back", job.id)
                os._exit(1)
            try:
                self.maintain_heartbeats(job, execution)
            except Exception as error:
                logger.warning("a heartbeat of job %s failed: %r", job.id, error)

    # One job after the other.

    def check_for_suspension(self, burst: bool) -> None:
        """Does not ask: the script that takes the next job does."""

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue] | None:
        """Takes a job that waits; where there is none, RQ says so in Redis and blocks, or ends a burst."""
        return self._take(burst=timeout is None) or super().dequeue_job_and_maintain_ttl(timeout, max_idle_time)

    def _take(self, *, burst: bool) -> tuple[Job, Queue] | None:
        (queue,) = self.queues
        keys = [queue.key, queue.intermediate_queue_key, WORKERS_SUSPENDED]
        self._state = WorkerStatus.BUSY  # a signal must not come between a job and its beginning
        while not self._stop_requested:
            taken = self._take_script(keys, [self.job_class.redis_job_namespace_prefix])
            if not taken:
                break
            if taken == b"suspended":
                self._state = WorkerStatus.IDLE
                super().check_for_suspension(burst)
                self._state = WorkerStatus.BUSY
                continue
            job_id, fields = taken
            job = self.job_class(job_id.decode(), connection=self.connection, serializer=self.serializer)
            with contextlib.suppress(NoSuchJobError):  # it was deleted meanwhile; RQ passes over such ones too
                job.restore(dict(zip(fields[::2], fields[1::2], strict=True)))
                return job, queue
        self._state = WorkerStatus.IDLE
        if self._stop_requested:
            raise StopRequested
        return None

    def execute_job(self, job: Job, queue: Queue) -> None:
        execution = self.prepare_execution(job)
        if execution.id in self.executions:
            timeout = job.timeout or Queue.DEFAULT_TIMEOUT
            overdue = math.inf if timeout < 0 else time.monotonic() + timeout + GRACE
            self._in_hand = (job, execution, overdue)
            try:
                self.perform_job(job, queue, execution)
            finally:
                self._in_hand = None
        if OwnWorker.halted is not None:
            self._stop_requested = True
        self.executed += 1
        self._state = WorkerStatus.IDLE  # in Redis too, once there is no next job

    def prepare_execution(self, job: Job) -> Execution:
        """Notes that the job has begun and is no longer only taken: at once, where RQ has two steps.

        If it has been put back meanwhile, because this process stood still for so long, it is not begun.
        """
        (queue,) = self.queues
        pipe = self.connection.pipeline()
        execution = Execution.create(job, LIFE, pipeline=pipe, worker_name=self.name)
        self.set_state(WorkerStatus.BUSY, pipe)
        if time.monotonic() >= self._eased_until:
            self.heartbeat(pipeline=pipe)
        job.prepare_for_execution(self.name, pipeline=pipe)
        pipe.persist(job.key)
        if self._write(pipe, taken=(queue.intermediate_queue_key, job.id)):
            self.executions[execution.id] = execution
        return execution

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:  # noqa: ARG002
        self.procline(f"Processing {job.func_name} from {job.origin} since {time.time()}")  # type: ignore[no-untyped-call]

    def handle_execution_ended(self, job: Job, queue: Queue, heartbeat_ttl: int) -> None:  # noqa: ARG002
        job.ended_at = job.last_heartbeat = now()  # written with the job's end

    def handle_job_success(self, job: Job, queue: Queue, started_job_registry: Any, execution: Execution) -> None:
        """Notes the end of a job that nothing else hangs on, which those of flowkit are; any other is left to RQ."""
        ttl = job.get_result_ttl(self.default_result_ttl)
        linked = job.repeats_left or job._dependency_ids or job.has_rate_limit
        if linked or ttl <= 0 or not self._write(self._success(job, execution, ttl), unless=job.dependents_key):
            super().handle_job_success(job, queue, started_job_registry, execution)

    def _success(self, job: Job, execution: Execution, ttl: int) -> Pipeline:
        """What RQ writes, but of the job's hash what has changed only."""
        assert job.started_at is not None
        assert job.ended_at is not None
        pipe = self.connection.pipeline()
        self.increment_successful_job_count(pipe)
        self.increment_total_working_time(job.ended_at - job.started_at, pipe)
        ended = utcformat(job.ended_at)
        pipe.hset(job.key, mapping={"status": JobStatus.FINISHED, "ended_at": ended, "last_heartbeat": ended})
        if job.data.isascii():  # it was emptied
            pipe.hset(job.key, "data", job.data)
        pipe.expire(job.key, ttl)
        result = Result(
            job.id,
            Result.Type.SUCCESSFUL,
            self.connection,
            worker_name=self.name,
            execution_id=execution.id,
            execution_started_at=execution.created_at,
            execution_ended_at=job.ended_at,
        )
        result.save(ttl, pipe)
        job.finished_job_registry.add(job, ttl, pipe)
        self.cleanup_execution(job, pipe, execution)
        return pipe

    def _write(self, pipe: Pipeline, *, unless: str = "", taken: tuple[str, str] | None = None) -> bool:
        """Does what is in a pipeline, in one call and at once. Gives False and does nothing if there is a key ``unless``, or
        if the job ``taken`` is not in that list any more.
        """
        words = orjson.dumps([command for command, _ in pipe.command_stack], default=bytes.decode)
        keys: list[str] = [unless]
        arguments: list[Any] = [words]
        if taken:
            keys.append(taken[0])
            arguments.append(taken[1])
        return bool(self._write_script(keys, arguments))

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """RQ logs the error of a job with all its frames; that of a message has been told by then."""
        if exc_info[1] is not None and exc_info[1] is OwnWorker.told:
            call_exception_handlers(self._exc_handlers, job, *exc_info)
        else:
            super().handle_exception(job, *exc_info)


def run_worker(app: Flowkit, queue: str, *, burst: bool = False, max_jobs: int | None = None) -> int:
    """Works on one queue in this process until SIGTERM or SIGINT, with ``burst`` until it is empty, with ``max_jobs`` until it
    has done so many. Gives the exit code: ``RETIRED`` for the last, ``HALTED`` where all processes are to end.
    """
    app.start()
    OwnWorker.application = app
    assert app.settings.redis is not None
    connection = connect(app.settings.redis)
    with redis_errors():
        connection.ping()
        worker = Worker(
            [queue],
            connection=connection,
            serializer=Envelope,
            log_job_description=False,
            worker_ttl=IDLE,
        )
        worker.work(burst=burst, max_jobs=max_jobs, logging_level="WARNING")
    app.stop()
    if OwnWorker.halted is not None:
        logger.error("the worker of queue %s stops, and the others with it: %s", queue, OwnWorker.halted)
        return HALTED
    if worker.forced:
        return 1
    if burst or worker._stop_requested or worker._shutdown_requested_date:
        return 0
    if max_jobs is not None and worker.executed >= max_jobs:
        return RETIRED
    return 1  # RQ's loop ends without a word when Redis goes away
