"""An inline route whose handler keeps a processor busy, for some 0.2 ms."""

import os
from typing import Any

from ledger import noter

from flowkit import Flowkit

app = Flowkit("bench", inline=True)
note = noter()


@app.topic(os.environ["BENCH_TOPIC"], group=os.environ["BENCH_GROUP"])
def busy(data: dict[str, Any]) -> None:
    sum(range(10_000))
    note(data["id"])
