"""Handles many messages at once, on threads or as tasks, and notes each run: number, key, begin and end."""

import asyncio
import os
import time
from typing import Any

from runs import Ledger

from flowkit import Flowkit, Message, Retry

app = Flowkit("crowd", kafka={"session_timeout": 6, "heartbeat_interval": 1}, retry=Retry(first=0.1))
ledger = Ledger(os.environ["CROWD_LEDGER"])
TOPIC = os.environ["CROWD_TOPIC"]


def note(number: int, message: Message, began: int) -> None:
    ledger.write(b"%d %s %d %d\n" % (number, message.key, began, time.monotonic_ns()))


def on_a_thread(number: int, message: Message) -> None:
    began = time.monotonic_ns()
    time.sleep(0.01)
    note(number, message, began)


async def as_a_task(number: int, message: Message) -> None:
    began = time.monotonic_ns()
    await asyncio.sleep(0.01)
    note(number, message, began)


handler: Any = as_a_task if os.environ.get("CROWD_TASKS") else on_a_thread
app.add_topic(TOPIC, handler, group=TOPIC, inline=True, concurrency=50)
