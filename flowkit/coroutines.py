"""Coroutines of handlers and hooks. Each thread that runs them keeps one event loop, so that clients opened in one call
serve the next.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

_threads = threading.local()


def finish(result: Any) -> Any:
    """What a function returned; a coroutine, which a plain decorator around an async function gives, runs first."""
    return run_async(result) if result is not None and asyncio.iscoroutine(result) else result


def run_async(coroutine: Any) -> Any:
    """Runs a coroutine to its end on this thread's loop. What interrupts it (a job's time-out) cancels it."""
    loop = getattr(_threads, "loop", None)
    if loop is None:
        loop = _threads.loop = asyncio.new_event_loop()
    task = loop.create_task(coroutine)
    try:
        return loop.run_until_complete(task)
    except asyncio.CancelledError as error:  # a BaseException, which would end the consumer
        raise RuntimeError("the coroutine was cancelled, by itself or by what it waited for") from error
    except BaseException:
        if not task.done():
            task.cancel()
            loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        raise


def close_loop() -> None:
    """Closes this thread's loop, if it has one; called when a thread of handlers ends."""
    loop = getattr(_threads, "loop", None)
    if loop is not None:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        _threads.loop = None
