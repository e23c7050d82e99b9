"""Tells every event as a line of JSON: by a monitor of its own, and once more by subscribers."""

import json
import os
from typing import Any

from flowkit import Flowkit, Monitor, Retry


class Lines(Monitor):
    def notice(self, event: str, **details: Any) -> None:
        super().notice(event, **details)
        say(event, details)

    def notice_error(self, event: str, error: BaseException, **details: Any) -> None:
        super().notice_error(event, error, **details)
        say(event, {"error": str(error), **details})

    def consumed(self, **details: Any) -> None:
        say("method consumed", details)

    def failed(self, **details: Any) -> None:
        say("method failed", {**details, "error": str(details["error"])})


def say(event: str, details: dict[str, Any]) -> None:
    print(json.dumps({"event": event, **details}), flush=True)


OUT = os.environ["MONITORED_OUT"]

app = Flowkit(
    os.environ["MONITORED_NAME"],
    monitor=Lines,
    retry=Retry(attempts=2, first=0, jitter=0),
    dead_letter=os.environ["MONITORED_DEAD"],
)


@app.topic(os.environ["MONITORED_INLINE"], inline=True)
@app.responds_to(OUT)
def double(value: int) -> int:
    return 2 * value


@app.topic(os.environ["MONITORED_QUEUED"])
def fail(value: int) -> None:
    raise ValueError(f"no {value}")


@app.on_event("dead", "stopped")
async def subscriber(event: str, **details: Any) -> None:
    say(f"subscriber {event}", details)
