"""A shop: orders become invoices, big ones alerts. Bills are written by RQ workers, deliveries in the consumer.

Try it: flowkit dev shop:app
"""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime

from flowkit import Flowkit, Message, Retry

app = Flowkit("shop", kafka={"hosts": "127.0.0.1:9092"}, redis="redis://127.0.0.1:6379/0")
log = logging.getLogger("shop")

BIG = 1000


@dataclass
class Order:
    id: int
    user: str
    total: float


@app.before_enqueue("orders")
def triage(order: Order, message: Message) -> None:
    """In the consumer, before the job is queued: nothing to bill is done at once, big orders overtake."""
    if order.total == 0:
        app.abort()
    message.queue = "express" if order.total > BIG else "default"


@app.topic("orders", retry=Retry(attempts=4, first=1, factor=3), dead_letter="orders.dead")
@app.responds_to("invoices")
@app.responds_to("alerts", required=False, multiple_usage=True)
def bill(order: Order) -> None:
    if order.total < 0:
        raise ValueError(f"order {order.id} has a total of {order.total}")
    app.respond_to("invoices", {"order": order.id, "total": order.total}, key=order.user)
    if order.total > BIG:
        app.respond_to("alerts", {"order": order.id, "why": "big"}, partition_key=order.user[:1])


@app.after_failure("orders")
def report(error: Exception, message: Message) -> None:
    log.warning("order at offset %d failed on attempt %d: %s", message.offset, message.attempt, error)


@app.responds_to("parcels")
def announce(order_id: int) -> None:
    """A responder of its own: it says what is sent, the handler says when."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    app.respond_to("parcels", {"order": order_id, "at": now}, key=str(order_id))


@app.topic("invoices", inline=True, responder=announce)
def pack(invoice: dict[str, float]) -> int:
    return int(invoice["order"])
