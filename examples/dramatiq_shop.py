"""flowkit reads the messages, Dramatiq does the work: another custom worker. Needs dramatiq[redis] and a Redis.

Try it: flowkit run dramatiq_shop:app, and dramatiq dramatiq_shop
"""

import os
from collections.abc import Mapping
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import CurrentMessage

from flowkit import Flowkit, Message

app = Flowkit("dramatiq-shop", kafka={"hosts": "127.0.0.1:9092"})
broker = RedisBroker(url=os.environ.get("DRAMATIQ_REDIS", "redis://127.0.0.1:6379/0"))
broker.add_middleware(CurrentMessage())
dramatiq.set_broker(broker)


# --8<-- [start:worker]
@dramatiq.actor(queue_name="bills", max_retries=3, min_backoff=500)
def perform(topic: str, params: dict[str, Any]) -> None:
    this = CurrentMessage.get_current_message()
    retries = this.options.get("retries", 0) if this else 0
    app.perform(topic, {**params, "attempt": retries + 1})  # raises what failed, and Dramatiq tries again


class Dramatiq:
    """A worker may be an object as well as a class: this one knows its actor, and so its queue."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def perform_async(self, topic: str, params: Mapping[str, Any]) -> None:
        self.actor.send(topic, dict(params))  # only puts it on Dramatiq's queue


@app.topic("dramatiq-orders", worker=Dramatiq(perform))
@app.responds_to("dramatiq-invoices")
def bill(order: dict[str, Any], message: Message) -> dict[str, Any]:
    if message.attempt <= order.get("fails", 0):
        raise RuntimeError(f"attempt {message.attempt} at order {order['id']} fails, as asked")
    return {"order": order["id"], "attempt": message.attempt}
    # --8<-- [end:worker]
