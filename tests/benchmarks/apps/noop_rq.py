"""The no-op as a job of RQ, one message each."""

import os
from typing import Any

from ledger import noter
from redis import Redis
from rq import Queue

note = noter()


def noop(data: dict[str, Any]) -> None:
    note(data["id"])


def fill(messages: list[dict[str, Any]]) -> None:
    queue = Queue("alone", connection=Redis.from_url(os.environ["FLOWKIT_REDIS"]))
    queue.enqueue_many([Queue.prepare_data(noop, (message,), description="noop") for message in messages])
