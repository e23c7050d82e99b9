"""Avro in, JSON out: one inline route and one queued one. AVRO starts the names of the topics."""

import os
from typing import Any

from flowkit import Flowkit, Retry
from flowkit.parsers import Json
from flowkit.parsers.registry import Avro

PREFIX = os.environ["AVRO"]

app = Flowkit(
    "avro",
    kafka={"session_timeout": 6, "heartbeat_interval": 1},
    retry=Retry(attempts=2, first=0.5, factor=1, jitter=0),
    dead_letter=f"{PREFIX}dead",
)
avro = Avro({"url": os.environ["REGISTRY"], "timeout": 2, "max.retries": 0})


@app.topic(f"{PREFIX}inline", parser=avro, group=f"{PREFIX}avro", inline=True)
@app.responds_to(f"{PREFIX}out", parser=Json)
def at_once(order: dict[str, Any]) -> Any:
    return {"inline": order}


@app.topic(f"{PREFIX}queued", parser=avro, group=f"{PREFIX}avro")
@app.responds_to(f"{PREFIX}out", parser=Json)
def later(order: dict[str, Any]) -> Any:
    return {"queued": order}
