"""Fails on odd numbers, under one of the monitors of examples/monitors.py, whose service keeps to this machine."""

import json
import os
from pathlib import Path
from typing import Any

from monitors import NewRelicMonitor, SentryMonitor, with_new_relic, with_sentry

from flowkit import Flowkit, Retry

kept = Path(os.environ["KEPT"])

if os.environ["SERVICE"] == "sentry":
    import sentry_sdk
    from sentry_sdk.envelope import Envelope
    from sentry_sdk.transport import Transport

    class Keeping(Transport):
        """Writes what would go to Sentry into a file; not at once, as the real one sends from a thread, but when flushed."""

        def __init__(self, options: Any = None) -> None:
            super().__init__(options)
            self.waiting: list[Any] = []

        def capture_envelope(self, envelope: Envelope) -> None:
            self.waiting += [event for item in envelope.items if (event := item.get_event()) is not None]

        def flush(self, timeout: float, callback: Any = None) -> None:
            with kept.open("a") as file:
                while self.waiting:
                    file.write(json.dumps(self.waiting.pop(0), default=str) + "\n")

    sentry_sdk.init("http://key@127.0.0.1:1/1", transport=Keeping)
else:
    import newrelic.agent

    newrelic.agent.initialize()  # developer mode, by its environment: a collector that is none

MONITORS = {"sentry": SentryMonitor, "newrelic": NewRelicMonitor}

app = Flowkit(
    "watched",
    monitor=MONITORS[os.environ["SERVICE"]],
    retry=Retry(attempts=2, first=0.1, jitter=0),
    kafka={"session_timeout": 6, "heartbeat_interval": 1},
)

{"sentry": with_sentry, "newrelic": with_new_relic}[os.environ["SERVICE"]](app)


@app.topic(os.environ["IN"], dead_letter=os.environ["DEAD"], inline=True)
def inline(number: int) -> None:
    if number % 2:
        raise ValueError(f"{number} is odd")


@app.topic(os.environ["QUEUED"], dead_letter=os.environ["DEAD"], queue=os.environ["QUEUED"])
def queued(number: int) -> None:
    inline(number)
