"""Does what each message asks for, and answers it. Topics are named by the environment, so that each test has its own.

A message is ``{"n": 1, "do": "fail", "times": 2}``; the list ``runs`` in Redis holds [n, attempt, process id] of every call.
"""

import json
import os
import signal
import threading
from typing import Any

from redis import Redis

from flowkit import Flowkit, Message, Retry

app = Flowkit(
    "tasks",
    kafka={"session_timeout": 6, "heartbeat_interval": 1, "offset_commit_interval": 0.2},
    retry=Retry(attempts=4, first=1, factor=1, jitter=0),
    job_timeout=30,
)
redis = Redis.from_url(os.environ["FLOWKIT_REDIS"])


@app.before_enqueue
def choose(task: dict[str, Any], message: Message) -> None:
    message.queue = task.get("queue", "default")


@app.topic(os.environ["TASKS_IN"], group=os.environ["TASKS_IN"])
@app.responds_to(os.environ["TASKS_OUT"])
def work(task: dict[str, Any], message: Message) -> dict[str, Any]:
    redis.rpush("runs", json.dumps([task["n"], message.attempt, os.getpid()]))
    match task.get("do"):
        case "fail" if message.attempt <= task["times"]:
            raise ValueError(f"no {task['n']}")
        case "wait":
            redis.blpop(["gate"], 60)
        case "die" if redis.set("died", 1, nx=True):
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang" if redis.set("hung", 1, nx=True):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # as code in C does that never returns
            threading.Event().wait(120)
    return {"n": task["n"], "attempt": message.attempt}
