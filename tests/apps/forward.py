"""Sends each message on past its responses, with a client that takes its time."""

import os
from typing import Any

from flowkit import Flowkit

app = Flowkit(
    "forward",
    kafka={"session_timeout": 6, "heartbeat_interval": 1, "linger_ms": 1_000},
    inline=os.environ["FORWARD_INLINE"] == "1",
)


@app.topic(
    os.environ["FORWARD_IN"],
    **({} if os.environ["FORWARD_INLINE"] == "1" else {"queue": os.environ["FORWARD_IN"]}),
)
def forward(number: Any) -> None:
    app.producer.submit(os.environ["FORWARD_OUT"], number)
