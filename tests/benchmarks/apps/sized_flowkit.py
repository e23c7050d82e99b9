"""Routes whose handlers take very different times, each on a queue of its own: 1 us, 1 ms, 1 s, and all of them on one."""

import os
import time
from typing import Any

from ledger import noter

from flowkit import Flowkit

PREFIX = os.environ["BENCH_TOPIC"]

app = Flowkit("sized", job_timeout=10)
note = noter()


def work(data: dict[str, Any]) -> None:
    note(data["id"])
    if data["seconds"] > 1e-5:
        time.sleep(data["seconds"])


for kind in ("1us", "1ms", "1s", "mixed"):
    app.add_topic(f"{PREFIX}-{kind}", work, queue=f"{PREFIX}-{kind}")
