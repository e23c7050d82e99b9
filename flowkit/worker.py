"""RQ's worker in one process of ``flowkit worker``: without a fork for each job, and with a heart that beats in between."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from rq import Queue, SimpleWorker
from rq.job import Job
from rq.job_lifecycle import call_exception_handlers

from .jobs import Envelope, OwnJob, OwnWorker, connect, redis_errors

if TYPE_CHECKING:
    from .app import Flowkit

logger = logging.getLogger(__name__)

HEARTBEAT = 10.0
"""Seconds between the heartbeats of a running job."""

LIFE = 45
"""Seconds after its last heartbeat until a job counts as its dead worker's, and goes back to its queue."""

GRACE = 60.0
"""Seconds after a job's time-out until its worker ends, because nothing could interrupt the job. RQ's own takes as many."""

IDLE = 60
"""Seconds that RQ waits for a job until it looks whether Redis is still there; its own default is 420."""


class Worker(SimpleWorker):
    """RQ's worker without a fork for each job: handlers, connections and producers live from job to job.

    RQ's own SimpleWorker does not beat its heart during a job, so the job of a killed one comes back only after its whole
    time-out. This one does, from a thread, so it comes back within a minute.
    """

    job_class = OwnJob

    beat: Callable[[], None] = staticmethod(lambda: None)
    """Called with each heartbeat."""

    forced = False
    """Whether a second signal has broken off the job in hand, which RQ then puts back."""

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        OwnWorker.stopping = True
        super().request_stop(signum, frame)  # type: ignore[no-untyped-call]

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        try:
            super().request_force_stop(signum, frame)
        except SystemExit:
            self.forced = True
            raise

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        self.beat()  # first: this process lives, also where Redis does not answer
        super().heartbeat(timeout, pipeline)

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """RQ logs the error of a job with all its frames; that of a message has been told by then."""
        if exc_info[1] is not None and exc_info[1] is OwnWorker.told:
            call_exception_handlers(self._exc_handlers, job, *exc_info)
        else:
            super().handle_exception(job, *exc_info)

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:  # noqa: ARG002
        return LIFE

    def execute_job(self, job: Job, queue: Queue) -> None:
        execution = self.prepare_execution(job)
        with self._beating(job, execution):
            self.perform_job(job, queue, execution)
        self.set_state("idle")

    @contextlib.contextmanager
    def _beating(self, job: Job, execution: Any) -> Iterator[None]:
        ended = threading.Event()
        overdue = time.monotonic() + (job.timeout or Queue.DEFAULT_TIMEOUT) + GRACE

        def beat() -> None:
            while not ended.wait(HEARTBEAT):
                if time.monotonic() > overdue:
                    logger.error("job %s cannot be interrupted; its worker ends, and the job goes back", job.id)
                    os._exit(1)
                try:
                    self.maintain_heartbeats(job, execution)
                except Exception as error:
                    logger.warning("a heartbeat of job %s failed: %r", job.id, error)

        thread = threading.Thread(target=beat, name="flowkit-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def run_worker(app: Flowkit, queue: str, *, burst: bool = False) -> int:
    """Works on one queue in this process until SIGTERM or SIGINT (or, with ``burst``, until it is empty)."""
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
        worker.work(burst=burst, logging_level="WARNING")
    app.stop()
    # RQ's loop ends without a word when Redis goes away, as it ends on request; only the latter is clean
    ended = burst or worker._stop_requested or worker._shutdown_requested_date
    return 0 if ended and not worker.forced else 1
