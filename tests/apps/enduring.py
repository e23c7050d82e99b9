"""For a worker whose Redis gets into trouble: notes what it handles in a file, and waits at one message for another file."""

import os
import time
from pathlib import Path
from typing import Any

from flowkit import Flowkit, Message, Retry, worker

worker.HEARTBEAT = 0.5
worker.LIFE = 4
app = Flowkit("enduring", kafka={"hosts": "127.0.0.1:1"}, retry=Retry(attempts=3, first=1, factor=1, jitter=0))
runs, gate = Path(os.environ["ENDURING_RUNS"]), Path(os.environ["ENDURING_GATE"])


@app.topic("orders")
def work(task: dict[str, Any], message: Message) -> None:
    with runs.open("a") as file:
        file.write(f"{task['n']} {message.attempt}\n")
    while task["n"] == 3 and not gate.exists():
        time.sleep(0.01)
    if task["n"] in (5, 14) and message.attempt == 1:
        raise ValueError(f"no {task['n']}")
