"""An application whose jobs RQ's own commands are tried on: each order is noted in Redis, in the list ``billed``.

The sets ``broken`` and ``slow`` in Redis hold the orders that fail, and those that wait for something in the list ``gate``.
"""

import os

from redis import Redis

from flowkit import Flowkit, Retry

app = Flowkit("rq_shop", retry=Retry(attempts=2, first=1, factor=1, jitter=0), job_size=5)
redis = Redis.from_url(os.environ["FLOWKIT_REDIS"], socket_timeout=None)


@app.topic("shop.orders")
def bill(order: int) -> None:
    if redis.sismember("slow", str(order)):
        redis.blpop(["gate"], 60)
    if redis.sismember("broken", str(order)):
        raise ValueError(f"order {order} is broken")
    redis.rpush("billed", order)
