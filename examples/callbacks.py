"""Hooks around handlers: what is queued, where to, and what to do about failures."""

import logging
from typing import Any

from flowkit import Flowkit, Message, Retry

app = Flowkit("sums", kafka={"hosts": "127.0.0.1:9092"}, redis="redis://127.0.0.1:6379/0")
log = logging.getLogger("sums")


# --8<-- [start:hooks]
@app.before_enqueue  # of every topic
def stamp(payload: dict[str, Any], message: Message) -> None:
    payload["received"] = message.received_at.isoformat()


@app.before_enqueue("sums")  # of this one: hooks run in the order they are written
def validate(payload: dict[str, Any]) -> None:
    if int(payload["number"]) <= 50 or payload["method"] == "sum":
        app.abort()  # this message is done: nothing is queued, no other hook runs


@app.topic("sums", queue="sums")
def add(payload: dict[str, Any]) -> None:
    log.info("%s came at %s", payload["number"], payload["received"])


# --8<-- [end:hooks]


# --8<-- [start:queue]
@app.before_enqueue("orders")
def choose_queue(order: dict[str, Any], message: Message) -> None:
    message.queue = "fast" if order["important"] else "slow"


@app.topic("orders")
def bill(order: dict[str, Any]) -> None:
    log.info("billing order %s", order["id"])


# --8<-- [end:queue]


# --8<-- [start:worker]
class Worker:
    """Stands for two systems of workers: see `perform_async` under "Frameworks and other queues"."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.given: list[tuple[str, dict[str, Any]]] = []

    def perform_async(self, topic: str, params: dict[str, Any]) -> None:
        self.given.append((topic, params))


fast, slow = Worker("fast"), Worker("slow")


@app.before_enqueue("letters")
def choose_worker(letter: dict[str, Any], message: Message) -> None:
    message.worker = fast if letter["important"] else slow


@app.topic("letters")
def deliver(letter: dict[str, Any]) -> None:
    log.info("delivering to %s", letter["to"])


# --8<-- [end:worker]


# --8<-- [start:failure]
@app.after_failure("payments")  # on every failed attempt, in the process that made it
def report(error: Exception, message: Message) -> None:
    if message.last_attempt:
        log.error("payment at offset %d is given up: %s", message.offset, error)
    else:
        log.warning("payment at offset %d failed on attempt %d: %s", message.offset, message.attempt, error)


@app.topic("payments", retry=Retry(attempts=3, first=5), dead_letter="payments.dead")
def pay(payment: dict[str, Any]) -> None:
    if payment["amount"] <= 0:
        raise ValueError(f"cannot pay {payment['amount']}")


# --8<-- [end:failure]
