"""One route for each shape of handler, half of them inline, with hooks that note in Redis (in ``notes``) what they do.

A message is ``{"n": 1}``, with more to say what becomes of it: ``abort``, ``queue``, ``fail`` (so many attempts),
``wait``, ``deaf``.
"""

import json
import os
import signal
from dataclasses import dataclass
from typing import Any

from redis import Redis

from flowkit import Flowkit, Message, Retry

NAME = os.environ["SEED"]
OUT = f"{NAME}.out"
redis = Redis.from_url(os.environ["FLOWKIT_REDIS"], socket_timeout=90)
app = Flowkit(
    "shapes",
    kafka={
        "session_timeout": 6,
        "heartbeat_interval": 0.5,
        "offset_commit_interval": 0.2,
        "metadata_max_age_ms": 1_000,
    },
    inline=True,  # but for the routes that say otherwise
    retry=Retry(attempts=3, first=0.3, factor=1, jitter=0),
    dead_letter=f"{NAME}.dead",
)


@dataclass
class Order:
    n: int
    fail: int = 0
    wait: str = ""
    abort: bool = False
    queue: str = ""
    changed: bool = False


def note(what: str, n: int, **more: Any) -> None:
    redis.rpush("notes", json.dumps({"what": what, "n": n, "pid": os.getpid(), **more}))


@app.before_enqueue
def first(order: Any, message: Message) -> None:
    note("first", n_of(order))
    if not isinstance(order, Order) and order.get("abort"):
        app.abort()
    if not isinstance(order, Order) and "queue" in order:
        message.queue = order["queue"]


@app.before_enqueue(f"{NAME}.payload", f"{NAME}.message")
def second(order: Any) -> None:
    note("second", n_of(order))
    order["changed"] = True


@app.after_failure
def failed(error: Exception, message: Message) -> None:
    note("failed", n_of(message.payload), error=str(error), attempt=message.attempt, last=message.last_attempt)


def n_of(order: Any) -> int:
    return order.n if isinstance(order, Order) else order["n"]


def work(shape: str, order: dict[str, Any], attempt: int) -> None:
    if order.get("deaf"):  # as code in C is that never returns
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    note(shape, order["n"])
    if order.get("wait"):
        redis.blpop([order["wait"]], 60)
    if order.get("fail", 0) >= attempt:
        raise ValueError(f"no {order['n']}")
    app.respond_to(OUT, {"n": order["n"], "by": shape, "changed": order.get("changed", False), "pid": os.getpid()})


@app.topic(f"{NAME}.payload", group=f"{NAME}.shared")
@app.responds_to(OUT)
def payload(order, message: Message):
    work("payload", order, message.attempt)


@app.topic(f"{NAME}.coroutine", group=f"{NAME}.shared")
@app.responds_to(OUT)
async def coroutine(order: dict[str, Any], message: Message) -> None:
    work("coroutine", order, message.attempt)


@app.topic(f"{NAME}.message", inline=False, queue=NAME)
@app.responds_to(OUT)
def message_only(message: Message) -> None:
    work("message", message.payload, message.attempt)


@app.topic(f"{NAME}.typed", inline=False, queue=NAME)
@app.responds_to(OUT)
def typed(order: Order, message: Message) -> None:
    assert isinstance(order, Order)
    work("typed", vars(order), message.attempt)
