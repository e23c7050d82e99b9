"""The time-out of one message inside a job of many: RQ sets its alarm once for a job, here it runs anew for each message."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from rq.timeouts import JobTimeoutException

from .dispatch import Until


class Alarm:
    """Raises ``JobTimeoutException`` in the message that takes longer than ``seconds``; nothing where RQ has set no alarm.

    It rings at times, sees when the message in hand was begun (``until.began``), and sets itself again if there is time
    left: so a message costs no system call.
    """

    def __init__(self, until: Until) -> None:
        self.until = until
        self.seconds = 0.0
        self._armed = False

    @contextlib.contextmanager
    def taken(self, seconds: float) -> Iterator[None]:
        """Takes RQ's alarm over. RQ ends it, when the job has ended."""
        before = signal.getsignal(signal.SIGALRM)
        on_main = threading.current_thread() is threading.main_thread()
        self._armed = on_main and getattr(before, "__name__", "") == "handle_death_penalty"
        if self._armed:
            signal.signal(signal.SIGALRM, self._ring)
        self.allow(seconds)
        try:
            yield
        finally:
            if self._armed:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
                self._armed = False

    def allow(self, seconds: float) -> None:
        """From now on, what is done next may take so many seconds, and each message after it as many."""
        self.until.began = time.monotonic()
        self.seconds = seconds
        if self._armed:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def _ring(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        left = self.until.began + self.seconds - time.monotonic()
        if left > 0:
            signal.setitimer(signal.ITIMER_REAL, left)
            return
        raise JobTimeoutException(f"it took longer than {self.seconds:g} seconds")
