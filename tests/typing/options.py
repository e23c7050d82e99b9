"""A wrong option is an error of mypy, before it is one of the application. Checked by mypy only."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn, assert_type

from flowkit import Flowkit, Headers, Message, Retry, Settings

app = Flowkit("shop", kafka={"hosts": ["127.0.0.1:9092"]}, redis="redis://127.0.0.1:6379/0")


class Worker:
    def perform_async(self, topic: str, params: Mapping[str, Any]) -> None: ...


class Parser:
    @staticmethod
    def parse(data: bytes) -> Any: ...

    @staticmethod
    def generate(value: Any) -> bytes:
        return b""


class Interchanger:
    def load(self, value: bytes) -> str:
        return value.hex()

    def parse(self, data: str) -> bytes:
        return bytes.fromhex(data)


def announce(order: int) -> None: ...


# Every option, with what it takes.
app.topic("orders")
app.topic("orders", group="g", queue="q", retry=3, dead_letter="dead", job_size=1, job_timeout=0.5)
app.topic("orders", inline=True, retry=Retry(attempts=3), retry_topic="{topic}.retry")
app.topic("orders", inline=True, concurrency=100, order="key")
app.topic("orders", inline=True, batch=True, max_batch=100, batch_wait=0.5, retry_topic=False)
app.topic("orders", worker=Worker(), parser=Parser, interchanger=Interchanger(), responder=announce)

# Unknown ones.
app.topic("orders", que="q")  # type: ignore[call-arg]
app.add_topic("orders", announce, inlin=True)  # type: ignore[call-arg]
app.responds_to("invoices", requird=False)  # type: ignore[call-arg]
app.add_response(announce, "invoices", multiple=True)  # type: ignore[call-arg]
app.respond_to("invoices", {}, partion=1)  # type: ignore[call-arg]
Retry(attempt=3)  # type: ignore[call-arg]

# Wrong types.
app.topic(7)  # type: ignore[arg-type]
app.topic("orders", inline="yes")  # type: ignore[arg-type]
app.topic("orders", retry="often")  # type: ignore[arg-type]
app.topic("orders", job_size=1.5)  # type: ignore[arg-type]
app.topic("orders", queue=None)  # type: ignore[arg-type]
app.responds_to("invoices", required="no")  # type: ignore[arg-type]
app.respond_to("invoices", {}, key=7)  # type: ignore[arg-type]
app.respond_to("invoices", {}, partition="0")  # type: ignore[arg-type]
app.before_enqueue(7)  # type: ignore[call-overload]
app.after_failure("orders", announce)  # type: ignore[call-overload]

# Options go by name only.
app.responds_to("invoices", True)  # type: ignore[call-arg]
app.respond_to("invoices", {}, "key")  # type: ignore[call-arg]

# A decorator without its parentheses.
app.topic(announce)  # type: ignore[arg-type]
app.responds_to(announce)  # type: ignore[arg-type]

# Not callable.
app.topic("orders")("announce")  # type: ignore[type-var]
app.add_topic("orders", 7)  # type: ignore[arg-type]


def look(message: Message) -> None:
    assert_type(message.topic, str)
    assert_type(message.partition, int)
    assert_type(message.offset, int)
    assert_type(message.key, bytes | None)
    assert_type(message.value, bytes | None)
    assert_type(message.payload, Any)
    assert_type(message.headers, Headers)
    assert_type(message.headers["a"], bytes | None)
    assert_type(message.timestamp, datetime)
    assert_type(message.received_at, datetime)
    assert_type(message.group, str)
    assert_type(message.attempt, int)
    message.payload, message.queue, message.worker = {}, "express", Worker()
    message.topic = "other"  # type: ignore[misc]
    message.offset = 1  # type: ignore[misc]
    message.attempt = 1  # type: ignore[misc]
    message.queue = 7  # type: ignore[assignment]


def end() -> NoReturn:
    app.abort()


assert_type(app.settings, Settings)
