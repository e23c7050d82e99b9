"""Answers each message once. Where and how is said by environment variables, so that each test has its own topics."""

import os

from flowkit import Flowkit, Retry

app = Flowkit(
    "relay",
    kafka={"session_timeout": 6, "heartbeat_interval": 1},
    inline=os.environ.get("RELAY_INLINE") == "1",
    retry=Retry(attempts=5, first=1, factor=1),
    job_size=500,
)


@app.topic(os.environ["RELAY_IN"], group=os.environ["RELAY_IN"])
@app.responds_to(os.environ["RELAY_OUT"])
def relay(number: int) -> int:
    return number
