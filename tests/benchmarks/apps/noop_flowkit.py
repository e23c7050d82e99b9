"""The no-op as a queued route of flowkit. Broker and Redis come from FLOWKIT_KAFKA_HOSTS and FLOWKIT_REDIS."""

import os
from typing import Any

from ledger import noter

from flowkit import Flowkit

app = Flowkit("bench")
note = noter()


@app.topic(os.environ["BENCH_TOPIC"], group=os.environ["BENCH_GROUP"])
def noop(data: dict[str, Any]) -> None:
    note(data["id"])
