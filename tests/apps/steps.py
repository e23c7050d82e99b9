"""For tests of `flowkit worker` that need no Kafka: does what each message asks for, and sends nothing.

The list ``runs`` in Redis holds [n, attempt, process id] of every call.
"""

import json
import os
from typing import Any

from redis import Redis

from flowkit import Flowkit, Message, Retry, worker

worker.HEARTBEAT = 0.5
app = Flowkit("steps", retry=Retry(attempts=3, first=1, factor=1, jitter=0), job_timeout=30)
redis = Redis.from_url(os.environ["FLOWKIT_REDIS"], socket_timeout=90)


@app.topic("steps")
def work(task: dict[str, Any], message: Message) -> None:
    redis.rpush("runs", json.dumps([task["n"], message.attempt, os.getpid()]))
    if task.get("do") in ("wait", "wait and fail"):
        redis.blpop(["gate"], 60)
    if task.get("do") in ("fail", "wait and fail"):
        raise ValueError(f"no {task['n']}")
