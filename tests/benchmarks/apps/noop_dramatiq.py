"""The no-op as an actor of Dramatiq, without any of its middleware: no retries, no limits."""

import os
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from ledger import noter

broker = RedisBroker(url=os.environ["FLOWKIT_REDIS"], middleware=[])
dramatiq.set_broker(broker)
note = noter()


@dramatiq.actor
def noop(data: dict[str, Any]) -> None:
    note(data["id"])


def fill(messages: list[dict[str, Any]]) -> None:
    for message in messages:
        noop.send(message)
