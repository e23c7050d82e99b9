"""Answers each message once. Where and how is said by environment variables, so that each test has its own topics."""

import os

from flowkit import BatchError, Flowkit, Message, Retry

app = Flowkit(
    "relay",
    kafka={"session_timeout": 6, "heartbeat_interval": 1},
    inline=os.environ.get("RELAY_INLINE") == "1",
    retry=Retry(attempts=5, first=1, factor=1),
    job_size=500,
)


source, to = os.environ["RELAY_IN"], os.environ["RELAY_OUT"]

if os.environ.get("RELAY_BATCH") == "1":

    @app.topic(source, group=source, batch=True)
    @app.responds_to(to, multiple_usage=True)
    def relay_many(messages: list[Message]) -> list[int]:
        for index, message in enumerate(messages):
            if message.payload % 1_000 == 999 and message.attempt == 1:
                raise BatchError(index)
        return [message.payload for message in messages]

else:

    @app.topic(source, group=source)
    @app.responds_to(to)
    def relay(number: int) -> int:
        return number
