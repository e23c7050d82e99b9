"""Decorated handlers keep their exact types. Checked by mypy only; an ignore that is not needed is an error there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, assert_type

from flowkit import Flowkit, Message, Settings
from flowkit.parsers import Text

app = Flowkit("shop")


@dataclass
class Order:
    id: int


@app.topic("a")
@app.responds_to("x")
def topic_outside(order: Order, message: Message, /) -> int:
    return order.id


@app.responds_to("x")
@app.topic("b", inline=True)
def topic_inside(order: Order, message: Message, /) -> int:
    return order.id


@app.topic("c")
@app.responds_to("x")
async def async_outside(order: Order, /) -> str:
    return str(order.id)


@app.responds_to("x", required=False)
@app.topic("d")
async def async_inside(order: Order, /) -> str:
    return str(order.id)


@app.topic("e")
@app.responds_to("x", multiple_usage=True)
def named(order: Order, *, message: Message) -> None: ...


@app.before_enqueue
def for_all(order: Order, /) -> None: ...


@app.before_enqueue("a", "b")
def for_some(order: Order, message: Message, /) -> None: ...


@app.before_enqueue()
async def for_all_async(order: Order, /) -> None: ...


@app.after_failure
def failed(error: Exception, /) -> None: ...


@app.after_failure("a")
def failed_somewhere(error: Exception, message: Message, /) -> None: ...


@app.configurator
def configure(settings: Settings, /) -> None: ...


@app.on_startup
def up() -> None: ...


@app.on_shutdown
def down() -> None: ...


class Bill:
    def __call__(self, order: Order) -> int:
        return order.id


@app.responds_to("parcels")
class Announce:
    def respond(self, order: Order) -> None: ...


def check(order: Order, message: Message, error: Exception, settings: Settings) -> None:
    assert_type(topic_outside, Callable[[Order, Message], int])
    assert_type(topic_inside, Callable[[Order, Message], int])
    assert_type(async_outside, Callable[[Order], Coroutine[Any, Any, str]])
    assert_type(async_inside, Callable[[Order], Coroutine[Any, Any, str]])
    assert_type(for_all, Callable[[Order], None])
    assert_type(for_some, Callable[[Order, Message], None])
    assert_type(for_all_async, Callable[[Order], Coroutine[Any, Any, None]])
    assert_type(failed, Callable[[Exception], None])
    assert_type(failed_somewhere, Callable[[Exception, Message], None])
    assert_type(configure, Callable[[Settings], None])
    assert_type(up, Callable[[], None])
    assert_type(down, Callable[[], None])

    # The names of parameters are kept too, and what does not fit is still an error.
    named(order=order, message=message)
    named(order, message=message)
    named(order, message)  # type: ignore[call-arg]
    named("order", message=message)  # type: ignore[arg-type]
    topic_outside(order)  # type: ignore[call-arg]
    topic_inside(order, message, 1)  # type: ignore[call-arg]
    async_outside(order)  # type: ignore[unused-coroutine]
    asyncio.run(async_outside("order"))  # type: ignore[arg-type]
    for_some(message, order)  # type: ignore[arg-type]

    # A callable object stays what it is; a lambda, a method and a class work as decorated ones.
    assert_type(app.topic("f")(Bill()), Bill)
    assert_type(app.responds_to("y")(Bill().__call__), Callable[[Order], int])  # type: ignore[assert-type]

    # A responder may be a function, a class, or an object of one; a decorated class stays what it is.
    assert_type(Announce(), Announce)
    app.topic("h", responder=Announce)
    app.topic("i", responder=Announce())
    app.topic("j", responder=named)
    app.topic("k", responder=7)  # type: ignore[arg-type]
    app.respond_with(Announce, order)
    app.respond_with(Announce(), order)

    # Sending.
    assert_type(app.producer.submit("l", order, key="a"), Future[None])
    app.producer.send("l", order, parser=Text)
    app.producer.send("l", order, ky="a")  # type: ignore[call-arg]

    # The imperative twins.
    app.add_topic("g", named, retry=3)
    app.add_response(named, "z", required=False)
