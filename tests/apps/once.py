"""Queues the messages of one topic. Topic and group are said by the environment, so that each test has its own.

With ONCE_HOLD=5 a hook waits at the message with offset 5 until the file ONCE_GATE is there: so a test may stop the process
where it has a batch in hand that is not queued yet.
"""

import os
import time
from pathlib import Path

from flowkit import Flowkit, Message

app = Flowkit(
    "once",
    kafka={"session_timeout": 6, "heartbeat_interval": 0.5, "max_poll_records": 20, "metadata_max_age_ms": 1_000},
    job_size=7,
)


@app.topic(os.environ["ONCE_IN"], group=os.environ.get("ONCE_GROUP", os.environ["ONCE_IN"]))
def nothing(number: int) -> None:
    """No worker runs in these tests: what counts is what is in the queue."""


if "ONCE_HOLD" in os.environ:

    @app.before_enqueue
    def hold(number: int, message: Message) -> None:
        gate = Path(os.environ["ONCE_GATE"])
        if message.offset == int(os.environ["ONCE_HOLD"]) and not gate.exists():
            print("holding", message.offset, flush=True)
            deadline = time.monotonic() + 120
            while not gate.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
