"""Coroutines of handlers and hooks: one event loop a process, on a thread of its own, so that what ``on_startup`` opens serves
every handler. A coroutine that blocks (``time.sleep``, ``app.producer.send``) holds up those of the other groups too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

LOOP_THREAD = "flowkit-asyncio"

GRACE = 5.0
"""Seconds that a cancelled coroutine may take to end: what goes on for longer is named in the log."""


def finish(result: Any) -> Any:
    """What a function returned; a coroutine, which a plain decorator around an async function gives, runs first."""
    return run_async(result) if result is not None and asyncio.iscoroutine(result) else result


def run_async(coroutine: Any) -> Any:
    """Runs a coroutine to its end on the loop of this process. What interrupts the wait (a job's time-out) cancels it.

    Raises what the coroutine raised, and ``RuntimeError`` if it was cancelled, or if this is called inside a coroutine.
    """
    loop = _loop_of_process()
    if threading.current_thread() is loop.thread:
        coroutine.close()
        raise RuntimeError(
            "this was called inside a coroutine, and would wait for another one on the same event loop for ever;"
            " await the other one, or call this in asyncio.to_thread(...)"
        )
    tasks: list[asyncio.Task[Any]] = []
    ended = threading.Event()

    def start() -> None:
        task = asyncio.create_task(coroutine)
        task.add_done_callback(lambda _: ended.set())
        tasks.append(task)

    def cancel() -> None:
        for task in tasks:
            task.cancel()

    try:
        loop.call(start)  # in this thread's context, so that the message in hand is known in there
        ended.wait()
        return tasks[0].result()
    except asyncio.CancelledError as error:  # a BaseException, which would end the consumer
        raise RuntimeError("the coroutine was cancelled, by itself or by what it waited for") from error
    except BaseException:
        if not ended.is_set():
            loop.call(cancel)
            if not ended.wait(GRACE):
                logger.error("%r goes on, %g s after it was interrupted; waiting for its end", coroutine, GRACE)
                ended.wait()  # its message must not be handled again meanwhile; a worker ends if this lasts
        raise


def call_soon(function: Callable[[], None]) -> None:
    """Calls a function on the loop of this process, in a copy of this thread's context, and does not wait for it."""
    _loop_of_process().call(function)


def close_loop() -> None:
    """Cancels what is left on the loop of this process and ends it, if it runs; the next coroutine starts a new one."""
    _loop_of_process().close()


class _Loop:
    """An event loop on a daemon thread, which starts when it is first called."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.RLock()

    def call(self, function: Callable[[], None]) -> None:
        """Calls a function on the loop, in the context of the calling thread."""
        with self._lock:  # so that what is called before the end is part of it
            if self._loop is None:
                runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
                self._loop = runner.get_loop()
                self.thread = threading.Thread(
                    target=self._run, args=(runner, self._loop), name=LOOP_THREAD, daemon=True
                )
                self.thread.start()
            self._loop.call_soon_threadsafe(function)

    def _run(self, runner: asyncio.Runner, loop: asyncio.AbstractEventLoop) -> None:
        with runner:  # its end cancels what is left
            while self._loop is loop:
                with contextlib.suppress(KeyboardInterrupt, SystemExit):  # whoever waits raises them
                    loop.run_forever()

    def close(self) -> None:
        with self._lock:
            loop, thread = self._loop, self.thread
            if loop is None or thread is None:
                return
            self._loop = None
            loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join(GRACE)
            if thread.is_alive():
                logger.error("coroutines go on, %g s after they were cancelled at the end of the application", GRACE)


_loops: dict[int, _Loop] = {}  # by process id: a forked child makes its own, and leaves its parent's alone


def _loop_of_process() -> _Loop:
    return _loops.get(os.getpid()) or _loops.setdefault(os.getpid(), _Loop())
