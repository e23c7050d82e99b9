"""What the scenarios of tests/chaos run: an inline and a queued route, or one of them, that answer each message.

Each run of a handler is noted in a file of its process, which a SIGKILL leaves whole: stream, number, partition, offset, job
and time. A message may say what its handler does: ``{"id": 7, "do": "fail"}`` is one of ``ACTS``.
"""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from rq import get_current_job
from runs import Ledger

from flowkit import Flowkit, Message, Retry

SLEEPS = 25
"""A handler sleeps once in so many messages, and so much longer: a shorter sleep would be mostly overhead."""

LEDGER = os.environ["CHAOS_LEDGER"]
WORK = float(os.environ.get("CHAOS_WORK", "0"))
"""Seconds that a message takes on average."""
BLOCK = float(os.environ.get("CHAOS_BLOCK", "0"))
"""Seconds that one that blocks takes."""
TIMES = int(os.environ.get("CHAOS_TIMES", "1"))
"""How often a message blocks, or ends its process, before it is handled like any other."""
LEAK = 20 * 1024**2
"""Bytes that a message leaks."""
MEMORY = 200 * 1024**2
"""Bytes that have leaked when the process is killed."""

app = Flowkit(
    "chaotic",
    kafka={"session_timeout": 6, "heartbeat_interval": 1},
    retry=Retry(attempts=3, first=0.2, factor=2, cap=2),
)


ledger = Ledger(LEDGER)


def fail(data: Any) -> None:
    raise ValueError(f"message {data['id']} is poison")


def note_act(name: str) -> int:
    """Notes when one was done, where the scenario reads it. Gives how often this one was, in whatever process."""
    with open(f"{LEDGER}.{name}", "ab") as file:
        file.write(b"%020d\n" % time.monotonic_ns())
        return file.tell() // 21


def fail_at_first(data: Any) -> None:
    if note_act(f"flaky-{data['id']}") <= TIMES:
        raise ConnectionError(f"message {data['id']} finds nobody")


def block(data: Any) -> None:
    if note_act(f"block-{data['id']}") <= TIMES:
        time.sleep(BLOCK)


def end(data: Any) -> None:
    if note_act(f"exit-{data['id']}") <= TIMES:
        os._exit(9)


leaked: list[bytes] = []


def leak(data: Any) -> None:
    """Ends as the kernel does it to a process that takes more memory than its machine, or its container, has."""
    leaked.append(b"x" * LEAK)
    if len(leaked) * LEAK >= MEMORY:
        note_act(f"leak-{os.getpid()}")
        os.kill(os.getpid(), signal.SIGKILL)


ACTS: dict[str, Callable[[Any], None]] = {
    "fail": fail,
    "flaky": fail_at_first,
    "block": block,
    "exit": end,
    "leak": leak,
}
"""By the word in a message: what its handler does before it is noted as handled, or instead."""


def handle(stream: str, data: Any, message: Message) -> int:
    number: int = data["id"]
    if WORK and number % SLEEPS == 0:
        time.sleep(WORK * SLEEPS)
    if "do" in data:
        ACTS[data["do"]](data)
    job = get_current_job()
    name = "-" if job is None else job.id
    line = f"{stream} {number} {message.partition} {message.offset} {name} {time.monotonic_ns()}\n"
    ledger.write(line.encode())
    return number


def add(stream: str, handler: Callable[..., int], **options: Any) -> None:
    """A route, if the scenario has such messages. The group has the name of the topic."""
    topic = os.environ.get(f"CHAOS_{stream.upper()}")
    if topic:
        if os.environ.get("CHAOS_DEAD_LETTERS"):
            options["dead_letter"] = f"{topic}.dead"
        app.topic(topic, group=topic, **options)(app.responds_to(f"{topic}.answers")(handler))


def inline(data: Any, message: Message) -> int:
    return handle("inline", data, message)


def queued(data: Any, message: Message) -> int:
    return handle("queued", data, message)


add(
    "inline",
    inline,
    inline=True,
    transactional=bool(os.environ.get("CHAOS_TRANSACTIONAL")),
    retry_topic="{topic}.retry" if os.environ.get("CHAOS_RETRY_TOPICS") else False,
)
add("queued", queued)
