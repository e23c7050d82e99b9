"""Answers each number, some only at the second or third attempt: until then they wait in retry topics."""

import os

from flowkit import Flowkit, Message, Retry

app = Flowkit(
    "stumbling",
    kafka={"session_timeout": 6, "heartbeat_interval": 1, "transaction_timeout": 5},
    inline=True,
    transactional=True,
    retry=Retry(attempts=3, first=0.5, factor=2),
    retry_topic="{topic}.retry",
)


@app.topic(os.environ["STUMBLING_IN"], group=os.environ["STUMBLING_IN"])
@app.responds_to(os.environ["STUMBLING_OUT"])
def answer(number: int, message: Message) -> int:
    if number % 25 == 0 and message.attempt <= number // 25 % 2 + 1:
        raise ValueError(f"{number} is not ready")
    return number
