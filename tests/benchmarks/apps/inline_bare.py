"""The same as a bare loop of a Kafka client, at least once, as in ``consume.py``: python inline_bare.py CLIENT."""

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import orjson
from consume import BARE, INTERVAL
from witness import witness

client, case = sys.argv[1], os.environ["BENCH_CASE"]
seen = witness()
seen.take_typed = None
loop = BARE[client](os.environ["BENCH_HOSTS"], os.environ["BENCH_TOPIC"], os.environ["BENCH_GROUP"], seen)
print("ready", flush=True)


def one_by_one() -> None:
    """confluent-kafka's ``consume`` waits until it has 500, or its time is over."""
    message = loop.consumer.poll(0.5)
    if message is not None:
        seen.take(orjson.loads(message.value()))


turn: Any = partial(loop.respond, os.environ["BENCH_OUT"]) if case == "respond" else loop.consume
if case == "latency" and client == "confluent":
    turn = one_by_one
settled = time.monotonic()
while True:
    turn()
    if time.monotonic() - settled > INTERVAL:
        loop.settle()
        settled = time.monotonic()
