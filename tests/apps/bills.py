"""An application for its web page: each order fails while Redis has the key ``broken``, with the text that is in there.

Its topics begin with BILLS_PREFIX, so that each test has its own; every order handled is in the list ``billed``.
"""

import os
from typing import Any

from redis import Redis

from flowkit import Flowkit, Message, Retry

PREFIX = os.environ.get("BILLS_PREFIX", "")
ORDERS, INVOICES, ALERTS, REFUNDS = (f"{PREFIX}{name}" for name in ("orders", "invoices", "alerts", "refunds"))

app = Flowkit("shop", kafka={"session_timeout": 6, "heartbeat_interval": 1}, retry=Retry(attempts=2, first=1))
redis = Redis.from_url(os.environ["FLOWKIT_REDIS"], socket_timeout=None)


@app.topic(ORDERS)
@app.responds_to(INVOICES)
@app.responds_to(ALERTS, required=False, multiple_usage=True)
def bill(order: dict[str, Any], message: Message) -> None:
    broken: Any = redis.get("broken")
    if broken is not None:
        raise ValueError(broken.decode())
    redis.rpush("billed", f"{order['id']} attempt {message.attempt}")
    app.respond_to(INVOICES, {"order": order["id"]}, key=order.get("user"))


@app.topic(INVOICES, inline=True)
def keep(invoice: dict[str, Any]) -> None:
    redis.rpush("kept", invoice["order"])


@app.topic(REFUNDS, queue="slow", dead_letter=f"{PREFIX}refunds.dead")
@app.responds_to(ALERTS, required=False)
def refund(refund: dict[str, Any]) -> None:
    redis.blpop(["gate"], 60)
