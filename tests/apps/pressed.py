"""Takes a millisecond for each message, and notes it in Redis; the first ones wait until the file PRESSED_GATE is there."""

import os
import time
from pathlib import Path
from typing import Any

from redis import Redis

from flowkit import Flowkit

app = Flowkit("pressed", kafka={"session_timeout": 6, "heartbeat_interval": 1})
redis = Redis.from_url(os.environ["FLOWKIT_REDIS"])
gate = Path(os.environ["PRESSED_GATE"])


@app.topic(os.environ["PRESSED_IN"], group=os.environ["PRESSED_IN"])
def work(task: dict[str, Any]) -> None:
    if not gate.exists():
        redis.incr("held")
        while not gate.exists():
            time.sleep(0.01)
    time.sleep(0.001)
    redis.incr("handled")
    redis.sadd("seen", task["n"])
