"""Greetings in, shouts out; letters are queued. The names of the topics start with HELLO, so that each test has its own."""

import os
from typing import Any

from flowkit import Flowkit

PREFIX = os.environ.get("HELLO", "")

app = Flowkit("hello", kafka={"bootstrap_timeout_ms": 2_000})


@app.topic(f"{PREFIX}greetings", inline=True)
@app.responds_to(f"{PREFIX}shouts")
def shout(greeting: str) -> str:
    return greeting.upper() + "!"


@app.topic(f"{PREFIX}letters", queue=f"{PREFIX}post", retry=3, dead_letter=f"{PREFIX}dead")
@app.responds_to(f"{PREFIX}replies")
@app.responds_to(f"{PREFIX}copies", required=False, multiple_usage=True)
def reply(letter: dict[str, Any]) -> None:
    app.respond_to(f"{PREFIX}replies", {"to": letter["from"]})


if __name__ == "__main__":
    app.run()
