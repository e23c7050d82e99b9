"""An inline consumer that notes in a file what it does, and whose messages say what is to happen to them."""

import ctypes
import json
import os
import time
from pathlib import Path

from flowkit import Flowkit, Retry

NOTES = Path(os.environ["GUARDED_NOTES"])
OUT = os.environ.get("GUARDED_OUT", "guarded-out")

app = Flowkit(
    "guarded",
    kafka={
        "session_timeout": 6,
        "heartbeat_interval": 0.5,
        "offset_commit_interval": 0.2,
        "metadata_max_age_ms": 1_000,
        **json.loads(os.environ.get("GUARDED_OPTIONS", "{}")),
    },
    retry=Retry(attempts=2, first=0.2, factor=1) if "GUARDED_DEAD" in os.environ else Retry(first=0.2, factor=1),
    dead_letter=os.environ.get("GUARDED_DEAD"),
    inline=True,
)


def note(what: str, number: int) -> None:
    with NOTES.open("a") as notes:
        notes.write(f"{os.getpid()} {what} {number}\n")


@app.topic(os.environ["GUARDED_IN"], group=os.environ["GUARDED_IN"])
@app.responds_to(OUT, required=False)
def handle(order: dict) -> None:
    """``gate`` and ``repair`` are files: until they exist, a message waits, or fails. ``hold``: seconds with Python's lock."""
    number = order["n"]
    note("begin", number)
    deadline = time.monotonic() + 60
    while "gate" in order and not os.path.exists(order["gate"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    if "hold" in order:
        ctypes.PyDLL(None).sleep(order["hold"])  # PyDLL, unlike CDLL, keeps the lock: no other thread runs
    if "repair" in order and not os.path.exists(order["repair"]):
        note("fail", number)
        raise ValueError(f"{number} is broken")
    if order.get("respond"):
        app.respond_to(OUT, {"n": number, "padding": "x" * order.get("size", 0)})
    note("end", number)
