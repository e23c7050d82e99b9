"""The no-op as a task of Celery, without results, events and rate limits."""

import os
from typing import Any

from celery import Celery
from ledger import noter

app = Celery("bench", broker=os.environ["FLOWKIT_REDIS"])
app.conf.update(
    task_ignore_result=True,
    worker_disable_rate_limits=True,
    worker_prefetch_multiplier=100,
    broker_connection_retry_on_startup=True,
)
note = noter()


@app.task
def noop(data: dict[str, Any]) -> None:
    note(data["id"])


def fill(messages: list[dict[str, Any]]) -> None:
    with app.producer_pool.acquire(block=True) as producer:
        for message in messages:
            noop.apply_async((message,), producer=producer)
