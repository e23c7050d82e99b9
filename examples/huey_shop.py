"""flowkit reads the messages, Huey does the work: one custom worker. Needs huey and a Redis.

Try it: flowkit run huey_shop:app, and huey_consumer huey_shop.huey
"""

import os
from collections.abc import Mapping
from typing import Any

from huey import RedisHuey

from flowkit import Flowkit, Message

app = Flowkit("huey-shop", kafka={"hosts": "127.0.0.1:9092"})
huey = RedisHuey("huey-shop", url=os.environ.get("HUEY_REDIS", "redis://127.0.0.1:6379/0"))

ATTEMPTS = 4


# --8<-- [start:worker]
@huey.task(retries=ATTEMPTS - 1, retry_delay=1, context=True)
def perform(topic: str, params: dict[str, Any], task: Any) -> None:
    app.perform(topic, {**params, "attempt": ATTEMPTS - task.retries})  # raises what failed, and Huey tries again


class Huey:
    """A class will do as well as an object: what counts is ``perform_async``."""

    @staticmethod
    def perform_async(topic: str, params: Mapping[str, Any]) -> None:
        perform(topic, dict(params))  # only puts it on Huey's queue


@app.topic("huey-orders", worker=Huey)
@app.responds_to("huey-invoices")
def bill(order: dict[str, Any], message: Message) -> dict[str, Any]:
    if message.attempt <= order.get("fails", 0):
        raise RuntimeError(f"attempt {message.attempt} at order {order['id']} fails, as asked")
    return {"order": order["id"], "attempt": message.attempt}
    # --8<-- [end:worker]
