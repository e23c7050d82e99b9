"""Answers each message with its number, from two routes: one runs in the consumer, one in workers. Topics and options are said
by the environment."""

import json
import os
from typing import Any

from flowkit import Flowkit, Retry

NAME = os.environ["TROUBLED"]

app = Flowkit(
    "troubled",
    kafka={
        "session_timeout": 6,
        "heartbeat_interval": 0.5,
        "offset_commit_interval": 0.2,
        "metadata_max_age_ms": 2_000,
        **json.loads(os.environ.get("TROUBLED_OPTIONS", "{}")),
    },
    retry=Retry(attempts=5, first=0.2, factor=1),
)


@app.topic(f"{NAME}-inline", group=f"{NAME}-inline", inline=True)
@app.responds_to(f"{NAME}-inline-out")
def answer(order: dict[str, Any]) -> dict[str, Any]:
    return {"n": order["n"]}


@app.topic(f"{NAME}-queued", group=f"{NAME}-queued")
@app.responds_to(f"{NAME}-queued-out")
def answer_later(order: dict[str, Any]) -> dict[str, Any]:
    return {"n": order["n"]}
