"""Does what each message asks for, one after the other by their keys, and sends nothing.

The list ``begun`` in Redis holds [key, n, attempt, process id] of every call, ``done`` the same of every one that ended well.
A worker's death is noticed within seconds here, not a minute.
"""

import json
import os
import signal
import time
from typing import Any

from redis import Redis

from flowkit import Flowkit, Message, Retry, shards, upkeep, worker

worker.HEARTBEAT = 0.5
worker.LIFE = 5
upkeep.CLEAN_EVERY = 1.0
upkeep.TAKEN = 3.0
shards.LEASE = 4.0
shards.PROLONG_EVERY = 0.5

app = Flowkit(
    "turns",
    kafka={"session_timeout": 6, "heartbeat_interval": 1, "offset_commit_interval": 0.2},
    retry=Retry(attempts=4, first=0.3, factor=1, jitter=0),
    job_timeout=30,
    job_size=50,
)
redis = Redis.from_url(os.environ["FLOWKIT_REDIS"], socket_timeout=90)


@app.topic(
    os.environ["TURNS_IN"],
    group=os.environ["TURNS_IN"],
    ordered=True,
    shards=int(os.environ.get("TURNS_SHARDS", "3")),
)
def turn(task: dict[str, Any], message: Message) -> None:
    call = json.dumps([(message.key or b"").decode(), task["n"], message.attempt, os.getpid()])
    redis.rpush("begun", call)
    match task.get("do"):
        case "fail" if message.attempt <= task["times"]:
            raise ValueError(f"no {task['n']}")
        case "wait":
            redis.blpop(["gate"], 60)
        case "die" if redis.incr(f"died:{task['n']}") <= task["times"]:
            os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(task.get("seconds", 0))
    redis.rpush("done", call)
