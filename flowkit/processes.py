"""Processes that are forked from one which has imported the application: watched, stopped, and started again."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from .errors import FlowkitError
from .health import Doors, Health, Part
from .retry import Retry

if TYPE_CHECKING:
    from .app import Flowkit

logger = logging.getLogger(__name__)

LOOK_EVERY = 1.0
"""Seconds between calls of ``Processes.look``."""

RESTART = Retry(first=0.5, cap=15.0)
"""Waits before a process that died is started again."""

HEALTHY = 60.0
"""Seconds of life after which the deaths of a process before it count no more."""

PRESS_EVERY = 1.5
"""Seconds between the signals to a process that is to end now: RQ takes two within a second for one."""

PRESS_FOR = 6.0
"""Seconds after ``Processes.patience`` until a process that heeds no signal is killed."""

REFUSED, RETIRED, HALTED = 112, 113, 114
"""Exit codes of a process, which no handler's own ``os._exit`` is likely to give: what it was asked for cannot be done, by the
others neither; it has done its share, and another takes its place; the others are to end as well.
"""

STARTING = 600.0
"""Seconds until the first sign of life after which a process counts as stuck, or ``stuck_after``, whichever is more."""

FAILED_STARTS = 3
"""Deaths of each process, of which none has ever come to its work, after which there are no more."""

STOP = (signal.SIGTERM, signal.SIGINT)


class Seat(NamedTuple):
    """What one process is for, and which of the processes for that it is. ``queue`` is empty for a consumer."""

    queue: str
    number: int = 0


class Processes:
    """Processes forked from this one, each in a seat of its own. One that dies is started again, after ``RESTART``.

    A subclass says what they do: ``prepare`` gives the seats, ``work`` is what a process does and gives its exit code.
    """

    stuck_after: float
    """Seconds without a sign of life after which a process counts as stuck."""

    patience: float
    """Seconds that processes may take to end."""

    share = "its share"
    """What a process has done that ends with ``RETIRED``."""

    at_once = signal.SIGTERM
    """What a process gets that was told to end before, and is to end now."""

    ends_empty = False
    """Whether a process that has ended is not started again."""

    def __init__(self, app: Flowkit, on_ready: Callable[[], None] | None = None) -> None:
        self.app = app
        self._on_ready = on_ready
        self._pids: dict[int, Seat] = {}
        self._deaths: dict[Seat, int] = {}
        self._start_at: dict[Seat, float] = {}
        self._ended: set[Seat] = set()
        self._stopping = False
        self._signalled = False
        self._begun = False
        self._code = 0
        self._end_by = 0.0
        self._press_at = 0.0
        self._alive: tuple[int, int]
        self._signs: tuple[socket.socket, socket.socket]
        self._forked_at: dict[int, float] = {}
        self._seen: dict[int, tuple[float, Part]] = {}
        self._doors: Doors | None = None
        self._reopen_log: Any = None

    # What a subclass says.

    def prepare(self) -> None:
        """Checks what can be checked before there is a process, and lets the first ones start, with ``seat``."""
        raise NotImplementedError

    def work(self, seat: Seat) -> int:
        """Does the work of one seat, in its process. Gives the exit code."""
        raise NotImplementedError

    def title(self, seat: Seat, pid: int | None = None) -> str:
        """How logs and probes call the process of a seat."""
        raise NotImplementedError

    def look(self) -> None:
        """Is called every second until the end begins."""

    def tell_late(self, seats: list[Seat]) -> None:
        """Logs that these did not end in time."""
        raise NotImplementedError

    def tell_stopping(self, number: int, *, again: bool) -> None:
        """Is called by the handler of a signal."""

    # What holds for all.

    def run(self) -> int:
        """Works until SIGTERM or SIGINT, which goes on to every process. Gives the exit code: 0 if all ended clean."""
        for number in STOP:
            signal.signal(number, self._on_signal)
        self._reopen_log = signal.getsignal(signal.SIGHUP)
        if callable(self._reopen_log):  # that of a daemon, whose log is that of its processes too
            signal.signal(signal.SIGHUP, self._on_hangup)
        self.prepare()
        if others := [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]:
            logger.warning(
                "importing the application has started threads (%s), which its processes do not have: start them in a function"
                " decorated with @app.on_startup",
                ", ".join(others),
            )
        settings = self.app.settings
        self._alive = os.pipe()
        self._signs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with self._signs[0] as ours, self._signs[1] as theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            gc.freeze()  # what is imported stays in memory that the processes share
            with Doors(self.health, settings.health, self._on_ready, settings.health_file) as doors:
                self._doors = doors
                self._look_after(doors)
        for end in self._alive:
            os.close(end)
        return self._code

    def _look_after(self, doors: Doors) -> None:
        look_at = 0.0
        while self._pids or self._start_at:
            now = time.monotonic()
            if not self._stopping and now >= look_at:
                look_at = now + LOOK_EVERY
                self.look()
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
        """Ends what is in hand after ``patience`` seconds, as a second signal does: it comes again."""
        if not self._end_by:
            self._end_by = self._press_at = now + self.patience
        if now < self._press_at:
            return
        if self._pids and self._press_at == self._end_by:
            self._code = self._code or 1
            self.tell_late(sorted(self._pids.values()))
        for pid in self._pids:
            os.kill(pid, self.at_once if now < self._end_by + PRESS_FOR else signal.SIGKILL)
        self._press_at = now + PRESS_EVERY

    def health(self) -> Health:
        """How each process is, for systemd and probes.

        One that ended is started again here, which another start of the whole would not do better: that is alive.
        """
        now = time.monotonic()
        parts = []
        for pid, seat in self._pids.items():
            seen_at, part = self._seen.get(pid, (self._forked_at[pid], Part("", "has not begun yet")))
            silent = now - seen_at
            if silent >= (self.stuck_after if pid in self._seen else max(STARTING, self.stuck_after)):
                part = Part("", f"has given no sign of life for {silent:.0f} s", alive=False)
            parts.append(replace(part, name=self.title(seat, pid)))
        for seat in self._start_at:
            ended = f"has ended {self._deaths[seat]} times, and starts again" if seat in self._deaths else "starts"
            parts.append(Part(self.title(seat), ended))
        return Health(tuple(parts), stopping=self._stopping)

    def _see_signs(self) -> None:
        with contextlib.suppress(BlockingIOError):  # there are no more
            while True:
                pid, state, ready, alive = json.loads(self._signs[0].recv(4096))
                self._begun = True
                if pid in self._pids:
                    self._seen[pid] = time.monotonic(), Part("", state, ready, alive)

    def give_sign(self, state: str, *, ready: bool = True, alive: bool = True) -> None:
        """Tells the first process how this one is."""
        with contextlib.suppress(OSError):  # nobody has read the others yet
            self._signs[1].send(json.dumps([os.getpid(), state, ready, alive]).encode())

    def seat(self, seat: Seat) -> None:
        """Lets a process start at the next turn."""
        self._start_at[seat] = 0.0

    def _reap(self) -> None:
        for pid in list(self._pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            seat = self._pids.pop(pid)
            lived = time.monotonic() - self._forked_at.pop(pid)
            self._seen.pop(pid, None)
            code = os.waitstatus_to_exitcode(status)
            if code in (REFUSED, HALTED) and not self._stopping:
                logger.error("%s has ended for good, so the others are told to stop", self.title(seat))
                self._stopping = True
                self._pass_on(signal.SIGTERM)
            if self._stopping or self.ends_empty:
                self._code = self._code or (0 if code in (0, RETIRED) else 2 if code == REFUSED else 1)
                self._ended.add(seat)
                continue
            if code == RETIRED:
                logger.info("%s has done %s; a new one starts", self.title(seat), self.share)
                self._deaths.pop(seat, None)
                self.seat(seat)
                continue
            if lived > HEALTHY:
                self._deaths.pop(seat, None)
            self._start_later(seat, f"ended with {code}; a new one starts")
            if not (self._begun or self._pids) and min(self._deaths.values()) >= FAILED_STARTS:
                logger.error("none of them has come to its work, so there is no other start")
                self._stopping, self._code = True, 1

    def _start_later(self, seat: Seat, why: str) -> None:
        self._deaths[seat] = self._deaths.get(seat, 0) + 1
        delay = RESTART.delay(self._deaths[seat])
        logger.error("%s %s in %.1f s", self.title(seat), why, delay)
        self._start_at[seat] = time.monotonic() + delay

    def _fork(self, seat: Seat) -> None:
        for stream in (sys.stdout, sys.stderr):  # else what is not written yet is written by each process
            _flush(stream)
        with _signals_wait():  # one in the midst of this would miss the new process
            if self._stopping:
                return
            try:
                pid = os.fork()
            except OSError as error:  # the system has no room for another process now
                self._start_later(seat, f"cannot be started: {error}; trying again")
                return
            if pid:
                self._pids[pid] = seat
                self._forked_at[pid] = time.monotonic()
                return
            self._pids.clear()
            for number in STOP:
                signal.signal(number, lambda *_: os._exit(0))  # until the work has its own: nothing is in hand
        code = 1
        try:
            os.close(self._alive[1])
            if self._doors is not None:
                self._doors.leave()
            pipe = self._alive[0]
            threading.Thread(target=_end_with_parent, args=(pipe,), name="flowkit-parent", daemon=True).start()
            code = self.work(seat)
        except Exception as error:
            traceback = not isinstance(error, FlowkitError)
            logger.error("%s failed: %s", self.title(seat), error, exc_info=traceback)
        finally:  # whatever it is: this process must not go on as if it were the first one
            for stream in (sys.stdout, sys.stderr):
                _flush(stream)
            os._exit(code)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        again, self._signalled = self._signalled, True
        if again or not self._stopping:  # else they were told when one of them had halted
            self._pass_on(self.at_once if again else signal.SIGTERM)
        self._stopping = True
        self.tell_stopping(number, again=again)

    def _on_hangup(self, number: int, frame: FrameType | None) -> None:
        self._reopen_log(number, frame)
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        for pid in list(self._pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _flush(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or the disk is full
        stream.flush()


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
    logger.warning("the process that started this one is gone; it ends after what is in hand")
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
