"""``flowkit worker``: the processes of an application, one queue each; they are watched, stopped, and started again."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import redis

from .errors import FlowkitError, RedisUnavailable
from .health import Doors, Health, Part
from .queues import connect, known_queues, redis_errors, route_queues
from .retry import Retry
from .worker import HALTED, RETIRED, Worker, run_worker

if TYPE_CHECKING:
    from .app import Flowkit

logger = logging.getLogger(__name__)

LOOK_EVERY = 1.0
"""Seconds between looks for queues that hooks have sent messages to."""

RESTART = Retry(first=0.5, cap=15.0)
"""Waits before a worker that died is started again."""

HEALTHY = 60.0
"""Seconds of life after which the deaths of a worker before it count no more."""

PRESS_EVERY = 1.5
"""Seconds between the signals to a process that is to end now: RQ takes two within a second for one."""

PRESS_FOR = 6.0
"""Seconds after ``shutdown_timeout`` until a process that heeds no signal is killed."""

MAX_HOOK_QUEUES = 32
"""Processes for queues that hooks have made up; where they take the names from messages, there may be any number of them."""

STUCK = 300.0
"""Seconds without a sign of life after which a worker process counts as stuck. It gives one every 45 seconds at least."""

SIGN = struct.Struct("i")
"""A sign of life: the id of the process that gives it."""

STOP = (signal.SIGTERM, signal.SIGINT)


class Seat(NamedTuple):
    """What one worker process is for: its queue, and which of the processes of that queue it is."""

    queue: str
    number: int = 0


class Workers:
    """Processes forked from this one, in which the application is imported already: so many a queue; restarted if they die.

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
        self.app = app
        self._on_ready = on_ready
        self.fixed = queues
        self.burst = burst
        self.processes = processes
        self._shards = {name for handling in app.handlings.values() for name in handling.shards}
        self.max_jobs = max_jobs
        self._pids: dict[int, Seat] = {}
        self._deaths: dict[Seat, int] = {}
        self._start_at: dict[Seat, float] = {}
        self._ended: set[Seat] = set()
        self._redis_away = False
        self._told_full = False
        self._stopping = False
        self._code = 0
        self._end_by = 0.0
        self._press_at = 0.0
        self._alive = os.pipe()
        self._signs = os.pipe()
        self._forked_at: dict[int, float] = {}
        self._seen_at: dict[int, float] = {}
        self._doors: Doors | None = None
        self._reopen_log: Any = None

    def run(self) -> int:
        """Works until SIGTERM or SIGINT, which goes on to every process. Gives the exit code: 0 if all ended clean."""
        for number in STOP:
            signal.signal(number, self._on_signal)
        self._reopen_log = signal.getsignal(signal.SIGHUP)
        if callable(self._reopen_log):  # that of a daemon, whose log is that of its processes too
            signal.signal(signal.SIGHUP, self._on_hangup)
        settings = self.app.settings_for_queues()
        assert settings.redis is not None
        connection = connect(settings.redis)
        with redis_errors():
            connection.ping()
        for queue in self.fixed or route_queues(self.app):
            self._seat(queue)
        for end in self._signs:
            os.set_blocking(end, False)
        with Doors(self.health, settings.health, self._on_ready, settings.health_file) as doors:
            self._doors = doors
            self._look_after(connection, doors)
        return self._code

    def _look_after(self, connection: redis.Redis, doors: Doors) -> None:
        look_at = 0.0
        while self._pids or self._start_at:
            now = time.monotonic()
            if self.fixed is None and not self._stopping and now >= look_at:
                look_at = now + LOOK_EVERY
                self._look_for_queues(connection)
            for seat in [seat for seat, due in self._start_at.items() if due <= now]:
                del self._start_at[seat]
                self._fork(seat)
            self._reap()
            self._see_signs()
            if self._stopping:
                self._start_at.clear()
                self._press(now)
            doors.look()
            time.sleep(0.05)

    def _press(self, now: float) -> None:
        """Breaks off the jobs that are in hand after ``shutdown_timeout``, as a second signal does: they go back."""
        if not self._end_by:
            self._end_by = self._press_at = now + self.app.settings.shutdown_timeout
        if now < self._press_at:
            return
        if self._pids and self._press_at == self._end_by:
            self._code = 1
            queues = ", ".join(sorted({seat.queue for seat in self._pids.values()}))
            timeout = self.app.settings.shutdown_timeout
            logger.error("a job of %s did not end within shutdown_timeout (%g s); it comes again", queues, timeout)
        for pid in self._pids:
            os.kill(pid, signal.SIGTERM if now < self._end_by + PRESS_FOR else signal.SIGKILL)
        self._press_at = now + PRESS_EVERY

    def health(self) -> Health:
        """How each process is, for systemd and probes: ready when it waits for jobs, alive while its heart beats.

        One that ended is started again here, which another start of the whole would not do better: that is alive.
        """
        now = time.monotonic()
        parts = []
        for pid, seat in self._pids.items():
            name = f"the worker {pid} of queue {seat.queue}"
            silent = now - self._seen_at.get(pid, self._forked_at[pid])
            if silent >= STUCK:
                parts.append(Part(name, f"has given no sign of life for {silent:.0f} s", alive=False))
            elif pid in self._seen_at:
                parts.append(Part(name, "works", ready=True))
            else:
                parts.append(Part(name, "has not begun yet"))
        for seat in self._start_at:
            ended = f"has ended {self._deaths[seat]} times, and starts again" if seat in self._deaths else "starts"
            parts.append(Part(f"the worker of queue {seat.queue}", ended))
        return Health(tuple(parts), stopping=self._stopping)

    def _see_signs(self) -> None:
        with contextlib.suppress(BlockingIOError):  # there are no more
            while signs := os.read(self._signs[0], 4096 * SIGN.size):
                for (pid,) in SIGN.iter_unpack(signs):
                    if pid in self._pids:
                        self._seen_at[pid] = time.monotonic()

    def _give_sign(self) -> None:
        with contextlib.suppress(BlockingIOError):  # nobody has read the others yet
            os.write(self._signs[1], SIGN.pack(os.getpid()))

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
            self._seat(queue)
        if new[room:] and not self._told_full:
            self._told_full = True
            logger.error(
                "hooks have sent messages to more than %d queues that no route names; the others, %s for example, are not"
                " worked on here: give their names to a worker of their own with --queues. Said once.",
                most,
                new[room],
            )

    def _seat(self, queue: str) -> None:
        """Lets the processes of a queue start at the next turn: one for a shard, where another would have nothing to do."""
        processes = 1 if queue in self._shards else self.processes
        self._start_at.update({Seat(queue, number): 0.0 for number in range(processes)})

    def _reap(self) -> None:
        for pid in list(self._pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            seat = self._pids.pop(pid)
            lived = time.monotonic() - self._forked_at.pop(pid)
            self._seen_at.pop(pid, None)
            code = os.waitstatus_to_exitcode(status)
            if code == HALTED and not self._stopping:
                self._stopping = True
                self._pass_on(signal.SIGTERM)
            if self._stopping or self.burst:
                self._code = self._code or int(code not in (0, RETIRED))
                self._ended.add(seat)
                continue
            if code == RETIRED:
                logger.info("a worker of queue %s has done its %d jobs; a new one starts", seat.queue, self.max_jobs)
                self._deaths.pop(seat, None)
                self._start_at[seat] = 0.0
                continue
            self._deaths[seat] = 1 if lived > HEALTHY else self._deaths.get(seat, 0) + 1
            delay = RESTART.delay(self._deaths[seat])
            logger.error("the worker of queue %s ended with %d; a new one starts in %.1f s", seat.queue, code, delay)
            self._start_at[seat] = time.monotonic() + delay

    def _fork(self, seat: Seat) -> None:
        with _signals_wait():  # one in the midst of this would miss the new process
            if self._stopping:
                return
            pid = os.fork()
            if pid:
                self._pids[pid] = seat
                self._forked_at[pid] = time.monotonic()
                return
            self._pids.clear()
            for number in STOP:
                signal.signal(number, lambda *_: os._exit(0))  # until RQ's loop has its own: no job is in hand
        os.close(self._alive[1])
        if self._doors is not None:
            self._doors.leave()
        Worker.beat = self._give_sign
        threading.Thread(target=_end_with_parent, args=(self._alive[0],), name="flowkit-parent", daemon=True).start()
        code = 1
        try:
            code = run_worker(self.app, seat.queue, burst=self.burst, max_jobs=self.max_jobs)
        except Exception as error:
            traceback = not isinstance(error, FlowkitError)
            logger.error("the worker of queue %s failed: %s", seat.queue, error, exc_info=traceback)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._stopping = True
        self._pass_on(number)

    def _on_hangup(self, number: int, frame: FrameType | None) -> None:
        self._reopen_log(number, frame)
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        for pid in list(self._pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Holds back the signals that are passed on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(pipe: int) -> None:
    """Asks this process to stop when its parent is gone: nobody would restart it, stop it or give it new code any more."""
    os.read(pipe, 1)  # ends when the other end is closed, which only the parent has
    logger.warning("the process that started this worker is gone; it ends after the job in hand")
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
