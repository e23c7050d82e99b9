"""Notes each run of its handler in a file of its process, which a SIGKILL leaves whole. Answers each tenth message.

Where, and how long a handler takes, is said by environment variables.
"""

import os
import time
from typing import Any

from rq import get_current_job
from runs import Ledger

from flowkit import Flowkit, Message, Retry

ANSWERED = 10
"""Each so many messages one is answered."""

SLEEPS = 25
"""A handler sleeps once in so many messages, and so much longer: a shorter sleep would be mostly overhead."""

LEDGER = os.environ["LEDGER"]
WORK = float(os.environ.get("LEDGER_WORK", "0"))
"""Seconds that a message takes on average."""

app = Flowkit(
    "ledger",
    kafka={"session_timeout": 6, "heartbeat_interval": 1},
    retry=Retry(attempts=5, first=1, factor=1),
)


ledger = Ledger(LEDGER)


@app.topic(os.environ["LEDGER_IN"], group=os.environ["LEDGER_IN"])
@app.responds_to(os.environ["LEDGER_OUT"], required=False)
def note(data: Any, message: Message) -> None:
    number: int = data["id"]
    if WORK and number % SLEEPS == 0:
        time.sleep(WORK * SLEEPS)
    if number % ANSWERED == 0:
        app.respond_to(os.environ["LEDGER_OUT"], number)
    job = get_current_job()
    name = b"-" if job is None else job.id.encode()
    ledger.write(b"%d %d %d %s %d\n" % (number, message.partition, message.offset, name, time.monotonic_ns()))
