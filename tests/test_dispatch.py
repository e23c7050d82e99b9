"""One message through one route: signatures, hooks, abort, coroutines, the way through the queue, dead letters."""

from __future__ import annotations

import asyncio
import functools
import json
import pickle
import struct
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Optional

import msgspec
import orjson
import pydantic
import pytest
from support import make_app, make_record, run, shown
from test_consumer import Clock

import flowkit.quick
from flowkit import ConfigurationError, Flowkit, Message, PayloadError, QueueError, Retry
from flowkit.coroutines import run_async
from flowkit.dispatch import PARAMS, Until
from flowkit.message import Abort
from flowkit.parsers import Raw, Text
from flowkit.quick import MOST_UNWATCHED
from flowkit.testing import Client

ROUTES: list[Any] = [pytest.param(True, id="inline"), pytest.param(False, id="queued")]


class Order(pydantic.BaseModel):
    id: int


class Invoice(msgspec.Struct):
    id: int


class Boom(Exception):
    """What a handler raises itself."""


class Worker:
    """A custom worker that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[str, Any]] = []

    def perform_async(self, topic: str, params: Any) -> None:
        self.given.append((topic, params))


@pytest.fixture
def app() -> Flowkit:
    return make_app()


# Signatures: what each was called with is what it returns.


def nothing() -> Any:
    return ()


def payload(order: Any) -> Any:
    return (order,)


def unannotated(order):  # type: ignore[no-untyped-def]
    return (order,)


def message(message: Message) -> Any:
    return (message,)


def both(order: Any, message: Message) -> Any:
    return (order, message)


def swapped(message: Message, order: Any) -> Any:
    return (message, order)


def keyword_payload(*, order: Any) -> Any:
    return (order,)


def keyword_message(*, message: Message) -> Any:
    return (message,)


def keywords(*, message: Message, order: Any) -> Any:
    return (order, message)


def mixed(order: Any, *, message: Message) -> Any:
    return (order, message)


def mixed_swapped(message: Message, *, order: Any) -> Any:
    return (message, order)


def positional_only(order: Any, message: Message, /) -> Any:
    return (order, message)


def with_default(order: Any = "default") -> Any:
    return (order,)


def with_a_flag(order: Any, verbose: bool = False) -> Any:
    return (order, verbose)


def flag_before_message(order: Any, verbose: bool = False, message: Message = None) -> Any:  # type: ignore[assignment]
    return (order, verbose, message)


def optional_message(order: Any, message: Message | None = None) -> Any:
    return (order, message)


def old_optional_message(order: Any, message: Optional[Message] = None) -> Any:  # noqa: UP045
    return (order, message)


def star(*args: Any) -> Any:
    return args


def star_and_keywords(*args: Any, **kwargs: Any) -> Any:
    return (*args, kwargs)


def keyword_star(order: Any, **kwargs: Any) -> Any:
    return (order, kwargs)


def configured(order: Any, message: Message, config: str) -> Any:
    return (order, message, config)


def configured_first(config: str, order: Any) -> Any:
    return (config, order)


def configured_message(message: Message, config: str) -> Any:
    return (message, config)


class Callable_:
    def __call__(self, order: Any, message: Message) -> Any:
        return (order, message)

    def method(self, message: Message, order: Any) -> Any:
        return (message, order)

    @classmethod
    def class_method(cls, order: Any) -> Any:
        return (order,)

    @staticmethod
    def static_method(message: Message) -> Any:
        return (message,)


class AsyncCallable:
    async def __call__(self, order: Any, message: Message) -> Any:
        await asyncio.sleep(0)
        return (order, message)


class Wrapper:
    """A decorator that is an object."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


async def async_payload(order: Any) -> Any:
    await asyncio.sleep(0)
    return (order,)


async def async_both(order: Any, message: Message) -> Any:
    return (order, message)


async def async_keywords(*, message: Message, order: Any) -> Any:
    return (order, message)


P, M = "payload", "message"
SIGNATURES: list[tuple[Any, list[Any]]] = [
    (nothing, []),
    (payload, [P]),
    (unannotated, [P]),
    (message, [M]),
    (both, [P, M]),
    (swapped, [M, P]),
    (keyword_payload, [P]),
    (keyword_message, [M]),
    (keywords, [P, M]),
    (mixed, [P, M]),
    (mixed_swapped, [M, P]),
    (positional_only, [P, M]),
    (with_default, [P]),
    (with_a_flag, [P, False]),
    (flag_before_message, [P, False, M]),
    (optional_message, [P, M]),
    (old_optional_message, [P, M]),
    (star, [P]),
    (star_and_keywords, [P, {}]),
    (keyword_star, [P, {}]),
    (functools.partial(configured, config="c"), [P, M, "c"]),
    (functools.partial(configured_first, "c"), ["c", P]),
    (functools.partial(configured_first, config="c"), ["c", P]),
    (functools.partial(configured_message, config="c"), [M, "c"]),
    (functools.partial(functools.partial(configured, config="a"), config="c"), [P, M, "c"]),
    (Callable_(), [P, M]),
    (Callable_().method, [M, P]),
    (Callable_.class_method, [P]),
    (Callable_.static_method, [M]),
    (functools.partial(Callable_()), [P, M]),
    (Wrapper(swapped), [M, P]),
    (Wrapper(payload), [P]),
    (decorated(swapped), [M, P]),
    (decorated(decorated(keywords)), [P, M]),
    (functools.partial(decorated(configured), config="c"), [P, M, "c"]),
    (lambda order: (order,), [P]),
    (async_payload, [P]),
    (async_both, [P, M]),
    (async_keywords, [P, M]),
    (AsyncCallable(), [P, M]),
    (functools.partial(async_both), [P, M]),
    (functools.partial(AsyncCallable()), [P, M]),
    (decorated(async_both), [P, M]),
    (decorated(async_payload), [P]),
    (Wrapper(async_payload), [P]),
]


def ids(rows: list[tuple[Any, Any]]) -> list[str]:
    return [f"{getattr(row[0], '__qualname__', type(row[0]).__name__)}-{number}" for number, row in enumerate(rows)]


def check_filled(values: Any, expected: list[Any]) -> None:
    assert len(values) == len(expected)
    for value, wanted in zip(values, expected, strict=True):
        if wanted == M:
            assert isinstance(value, Message)
        else:
            assert value == ({"id": 7} if wanted == P else wanted)


def keeping(function: Any, kept: list[Any]) -> Any:
    """``function`` with its signature, that keeps what it returned instead."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        result = function(*args, **kwargs)
        kept.append(run_async(result) if asyncio.iscoroutine(result) else result)

    return wrapper


@pytest.mark.parametrize(("handler", "expected"), SIGNATURES, ids=ids(SIGNATURES))
@pytest.mark.parametrize("inline", ROUTES)
def test_a_handler_is_given_what_it_takes(app: Flowkit, inline: bool, handler: Any, expected: list[Any]) -> None:
    kept: list[Any] = []

    class Keep:
        parse = staticmethod(orjson.loads)

        @staticmethod
        def generate(value: Any) -> bytes:
            if isinstance(value, dict):
                return orjson.dumps(value)
            kept.append(value)  # what the handler returned
            return b""

    app.add_topic("orders", handler, inline=inline, parser=Keep)
    app.add_response(handler, "result")

    Client(app).send("orders", {"id": 7})

    check_filled(kept[0], expected)


@pytest.mark.parametrize(("handler", "expected"), SIGNATURES, ids=ids(SIGNATURES))
def test_it_is_the_same_on_the_short_way_of_the_consumer(app: Flowkit, handler: Any, expected: list[Any]) -> None:
    kept: list[Any] = []
    app.add_topic("orders", keeping(handler, kept))

    assert run(app, b'{"id": 7}') == (1, None, [])

    check_filled(kept[0], expected)


@pytest.mark.parametrize(("hook", "expected"), SIGNATURES, ids=ids(SIGNATURES))
@pytest.mark.parametrize("inline", ROUTES)
def test_a_hook_before_the_queue_is_given_what_it_takes(
    app: Flowkit, inline: bool, hook: Any, expected: list[Any]
) -> None:
    kept: list[Any] = []
    app.add_topic("orders", nothing, inline=inline)
    app.before_enqueue("orders")(keeping(hook, kept))

    Client(app).send("orders", {"id": 7})

    check_filled(kept[0], expected)


@pytest.mark.parametrize(("hook", "expected"), SIGNATURES, ids=ids(SIGNATURES))
def test_a_hook_after_a_failure_is_given_the_error_and_the_message(
    app: Flowkit, hook: Any, expected: list[Any]
) -> None:
    error = Boom()
    kept: list[Any] = []

    @app.topic("orders")
    def bill() -> None:
        raise error

    app.after_failure("orders")(keeping(hook, kept))

    Client(app).send("orders", {}, raise_errors=False)

    [values] = kept[:1]
    assert len(values) == len(expected)
    for value, wanted in zip(values, expected, strict=True):
        assert isinstance(value, Message) if wanted == M else value is error if wanted == P else value == wanted


def too_many(order: Any, other: Any) -> None: ...
def too_many_with_message(order: Any, message: Message, other: Any) -> None: ...
def too_many_keywords(order: Any, *, other: Any) -> None: ...
def two_messages(a: Message, b: Message) -> None: ...
def untold_message(order: Any, message) -> None: ...  # type: ignore[no-untyped-def]


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (too_many, "'other' is one too many"),
        (too_many_with_message, "'other' is one too many"),
        (too_many_keywords, "'other' is one too many"),
        (two_messages, "'b' is one too many"),
        (untold_message, "'message' is one too many; annotate it: message: Message"),
        (functools.partial(configured), "'config' is one too many"),
    ],
)
@pytest.mark.parametrize("kind", ["handler", "before_enqueue", "after_failure"])
def test_more_parameters_than_can_be_filled_are_refused_at_the_start(
    app: Flowkit, kind: str, function: Any, text: str
) -> None:
    app.add_topic("orders", function if kind == "handler" else nothing)
    if kind != "handler":
        getattr(app, kind)(function)

    with pytest.raises(ConfigurationError, match=text) as caught:
        app.start(connected=False)
    assert "has more parameters than flowkit can fill" in str(caught.value)
    assert ("takes the error and" if kind == "after_failure" else "takes the payload and") in str(caught.value)


def unresolved(order: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def unresolved_attribute(order: json.Missing) -> None: ...  # type: ignore[name-defined]
def no_syntax(order: "1 +") -> None: ...  # type: ignore[valid-type]  # noqa: F722
def unresolved_message(order: Any, message: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize("function", [unresolved, unresolved_attribute, no_syntax, unresolved_message])
@pytest.mark.parametrize("kind", ["handler", "before_enqueue", "after_failure"])
def test_an_annotation_that_cannot_be_resolved_is_refused_with_advice(app: Flowkit, kind: str, function: Any) -> None:
    app.add_topic("orders", function if kind == "handler" else nothing)
    if kind != "handler":
        getattr(app, kind)(function)

    with pytest.raises(
        ConfigurationError, match=f"an annotation of {function.__name__} cannot be resolved"
    ) as caught:
        app.start(connected=False)
    assert "define or import the type at the module's top level" in str(caught.value)


def test_a_handler_with_a_yield_would_do_nothing_and_is_refused(app: Flowkit) -> None:
    def lazy(order: Any) -> Any:
        yield order

    app.add_topic("orders", lazy)

    with pytest.raises(ConfigurationError, match="lazy has a yield, so calling it runs nothing"):
        app.start(connected=False)


def test_an_async_handler_with_a_yield_is_refused(app: Flowkit) -> None:
    async def lazy(order: Any) -> Any:
        yield order

    app.add_topic("orders", lazy)

    with pytest.raises(ConfigurationError, match="lazy has a yield, so calling it runs nothing"):
        app.start(connected=False)


# Payloads.


@pytest.mark.parametrize("inline", ROUTES)
def test_a_typed_payload_is_validated(app: Flowkit, inline: bool) -> None:
    kept: list[Any] = []

    @app.topic("orders", inline=inline)
    def bill(order: Order) -> None:
        kept.append(order)

    client = Client(app)
    client.send("orders", {"id": 7})
    with pytest.raises(PayloadError):
        client.send("orders", {"id": "x"})
    with pytest.raises(PayloadError):
        client.send("orders", None)
    with pytest.raises(PayloadError):
        client.send_raw("orders", b"not JSON")

    assert kept == [Order(id=7)]


@pytest.mark.parametrize("inline", ROUTES)
def test_what_an_annotation_adds_to_its_type_counts(app: Flowkit, inline: bool) -> None:
    @app.topic("orders", inline=inline)
    def bill(number: Annotated[int, pydantic.Field(gt=0)]) -> None: ...

    Client(app).send("orders", 1)
    with pytest.raises(PayloadError, match="greater than 0"):
        Client(app).send("orders", 0)


@pytest.mark.parametrize("inline", ROUTES)
def test_an_untyped_handler_gets_what_cannot_be_parsed(app: Flowkit, inline: bool) -> None:
    kept: list[Any] = []
    app.add_topic("orders", lambda order: kept.append(order), inline=inline)
    client = Client(app)

    client.send_raw("orders", b"\xff{")
    client.send("orders", None)

    assert kept == [{"message": b"\xff{"}, None]


@pytest.mark.parametrize("inline", ROUTES)
def test_a_handler_of_messages_alone_parses_nothing(app: Flowkit, inline: bool) -> None:
    kept: list[Any] = []
    app.add_topic("orders", lambda: kept.append(1), inline=inline)

    @app.topic("invoices", inline=inline)
    def raw(message: Message) -> None:
        kept.append(message.value)

    client = Client(app)
    client.send_raw("orders", b"\xff{")
    client.send_raw("invoices", b"\xff{")

    assert kept == [1, b"\xff{"]


# Hooks.


@pytest.mark.parametrize("inline", ROUTES)
def test_a_hook_may_change_the_payload_in_place(app: Flowkit, inline: bool) -> None:
    kept: list[Any] = []
    app.add_topic("orders", lambda order: kept.append(order), inline=inline)

    @app.before_enqueue
    def mark(order: Any) -> None:
        order["seen"] = True

    Client(app).send("orders", {"id": 7})

    assert kept == [{"id": 7, "seen": True}]


TEXTS: list[Any] = [
    pytest.param(None, str, "new", id="json text"),
    pytest.param(None, int, 8, id="json number"),
    pytest.param(None, dict, {"id": 8}, id="json dict"),
    pytest.param(None, Order, Order(id=8), id="pydantic"),
    pytest.param(None, Invoice, Invoice(8), id="msgspec"),
    pytest.param(None, list[Invoice], [Invoice(8)], id="msgspec list"),
    pytest.param(None, Any, None, id="tombstone"),
    pytest.param(None, bool, False, id="false"),
    pytest.param(Text, str, "new", id="text parser"),
    pytest.param(Raw, bytes, b"\xff\x00", id="raw parser"),
]
OLD = {str: "old", int: 7, dict: {"id": 7}, Order: {"id": 7}, Invoice: {"id": 7}, list[Invoice]: [], bool: True}


@pytest.mark.parametrize(("parser", "kind", "new"), TEXTS)
@pytest.mark.parametrize("inline", ROUTES)
def test_a_hook_may_put_another_payload_in_its_place(
    app: Flowkit, inline: bool, parser: Any, kind: Any, new: Any
) -> None:
    kept: list[Any] = []

    def bill(order: Any) -> None:
        kept.append(order)

    bill.__annotations__["order"] = kind
    app.add_topic("orders", bill, inline=inline, **({"parser": parser} if parser else {}))

    @app.before_enqueue
    def replace(message: Message) -> None:
        message.payload = new

    Client(app).send("orders", b"old" if parser is Raw else OLD.get(kind, "old"))

    assert kept == [new]
    assert type(kept[0]) is type(new)


@pytest.mark.parametrize("inline", ROUTES)
def test_a_hook_may_repair_a_payload_that_cannot_be_parsed(app: Flowkit, inline: bool) -> None:
    kept: list[Any] = []

    @app.topic("orders", inline=inline)
    def bill(order: Order) -> None:
        kept.append(order)

    @app.before_enqueue
    def repair(message: Message) -> None:
        message.payload = Order(id=len(message.value or b""))

    Client(app).send_raw("orders", b"not JSON")

    assert kept == [Order(id=8)]


def test_a_message_that_no_hook_changed_is_queued_byte_for_byte(app: Flowkit) -> None:
    kept: list[Any] = []

    @app.topic("orders", inline=False)
    def bill(message: Message) -> None:
        kept.append(message.value)

    @app.before_enqueue
    def read(order: Any) -> None: ...

    Client(app).send_raw("orders", b'{ "id" : 7.0 }')

    assert kept == [b'{ "id" : 7.0 }']


def test_hooks_run_in_their_order_and_see_what_the_earlier_ones_did(app: Flowkit) -> None:
    kept: list[Any] = []
    app.add_topic("orders", lambda order: kept.append(order))

    @app.before_enqueue("orders")
    def first(message: Message) -> None:
        message.payload = [*message.payload, "first"]

    @app.before_enqueue
    async def second(order: list[str], message: Message) -> None:
        message.payload = [*order, "second"]

    @app.before_enqueue("orders")
    def third(order: list[str]) -> None:
        order.append("third")

    Client(app).send("orders", ["sent"])

    assert kept == [["sent", "first", "second", "third"]]


def test_a_hook_chooses_the_queue(app: Flowkit) -> None:
    app.add_topic("orders", nothing, inline=False, queue="normal")
    seen: list[Any] = []

    @app.before_enqueue
    def choose(order: Any, message: Message) -> None:
        seen.append(message.queue)
        if order:
            message.queue = order

    client = Client(app)

    assert client.send("orders", "express").queue == "express"
    assert client.send("orders", "").queue == "normal"
    assert seen == ["normal", "normal"]


def test_an_inline_message_has_no_queue(app: Flowkit) -> None:
    seen: list[Any] = []

    @app.topic("orders")
    def bill(message: Message) -> None:
        seen.append(message.queue)

    assert Client(app).send("orders", {}).queue is None
    assert seen == [None]


def test_a_hook_chooses_the_worker(app: Flowkit) -> None:
    worker, other = Worker(), Worker()
    app.add_topic("orders", nothing, inline=False, worker=worker)

    @app.before_enqueue
    def choose(order: Any, message: Message) -> None:
        assert message.worker is worker
        if order == "other":
            message.worker = other

    client = Client(app)
    first, second = client.send("orders", "other"), client.send("orders", "one")

    assert (first.worker, second.worker) == (other, worker)
    assert len(other.given) == len(worker.given) == 1
    assert first.queue is None


@pytest.mark.parametrize("inline", ROUTES)
def test_a_failing_hook_is_a_failing_message(app: Flowkit, inline: bool) -> None:
    told: list[Any] = []
    app.add_topic("orders", lambda: pytest.fail("the handler was called"), inline=inline)

    @app.before_enqueue
    def triage() -> None:
        raise Boom

    app.after_failure(lambda error: told.append(error))

    with pytest.raises(Boom):
        Client(app).send("orders", {})
    assert [type(error) for error in told] == [Boom]


# Abort.


@pytest.mark.parametrize("kind", ["plain", "async"])
@pytest.mark.parametrize("inline", ROUTES)
def test_a_hook_may_abort(app: Flowkit, inline: bool, kind: str) -> None:
    later: list[int] = []
    app.add_topic("orders", lambda: later.append(1), inline=inline)

    def triage(order: Any) -> None:
        if order == "bad":
            app.abort()

    async def async_triage(order: Any) -> None:
        triage(order)

    app.before_enqueue(triage if kind == "plain" else async_triage)
    app.before_enqueue(lambda: later.append(2))
    app.after_failure(lambda error: later.append(error))

    call = Client(app).send("orders", "bad")

    assert (call.aborted, call.error, call.responses, call.queue, later) == (True, None, [], None, [])
    assert not Client(app).send("orders", "good").aborted
    assert later == [2, 1]


@pytest.mark.parametrize("kind", ["plain", "async", "short"])
@pytest.mark.parametrize("inline", ROUTES)
def test_a_handler_may_abort(app: Flowkit, inline: bool, kind: str) -> None:
    told: list[Any] = []

    def bill(order: Any) -> None:
        try:
            app.abort()
        except Exception:  # it is none, so that a handler's own net does not catch it
            told.append("caught")

    async def async_bill(order: Any) -> None:
        bill(order)

    handler = async_bill if kind == "async" else bill
    app.add_topic("orders", handler, inline=inline)
    if kind != "short":
        app.add_response(handler, "invoices")
    app.after_failure(lambda error: told.append(error))

    call = Client(app).send("orders", {})

    assert (call.aborted, call.error, call.responses, told) == (True, None, [], [])


def test_the_consumer_goes_on_after_an_aborted_message(app: Flowkit) -> None:
    @app.topic("orders")
    @app.responds_to("invoices", required=False)
    def bill(order: Any) -> Any:
        app.respond_to("invoices", order)
        if order == 1:
            app.abort()

    done, error, sent = run(app, b"0", b"1", b"2")

    assert (done, error) == (3, None)
    assert [item.value for item in sent] == [b"0", b"2"]


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_aborting_after_a_failure_changes_nothing(app: Flowkit, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    told: list[Any] = []

    @app.topic("orders")
    def bill() -> None:
        raise Boom

    def give_up() -> None:
        app.abort()

    async def async_give_up() -> None:
        app.abort()

    app.after_failure(give_up if kind == "plain" else async_give_up)
    app.after_failure(lambda error: told.append(error))

    with pytest.raises(Boom):
        Client(app).send("orders", {})

    assert len(told) == 1
    assert "an after_failure hook failed itself, for orders[0]@0" in caplog.text


def test_a_failing_hook_after_a_failure_hides_nothing(app: Flowkit, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Any] = []

    @app.topic("orders")
    def bill() -> None:
        raise Boom

    @app.after_failure
    def first() -> None:
        raise ValueError("the mail server is down")

    app.after_failure(lambda error: told.append(error))

    with pytest.raises(Boom):
        Client(app).send("orders", {})

    assert len(told) == 1
    assert "the mail server is down" in caplog.text


# The consumer's loop over the records of one partition.


def test_the_consumer_stops_at_the_first_failure(app: Flowkit) -> None:
    kept: list[Any] = []

    @app.topic("orders")
    @app.responds_to("invoices")
    def bill(order: Any) -> Any:
        kept.append(order)
        if order == 2:
            raise Boom
        return order

    done, error, sent = run(app, b"0", b"1", b"2", b"3")

    assert (done, type(error), kept) == (2, Boom, [0, 1, 2])
    assert [item.value for item in sent] == [b"0", b"1"]


def test_a_response_that_cannot_be_sent_is_a_failure_of_its_message(app: Flowkit) -> None:
    app.add_topic("orders", lambda: "x")
    handler = app.routes["orders"].handler
    app.add_response(handler, "invoices")

    def refuse(record: Any, responses: Any) -> None:
        if record.offset == 1:
            raise Boom

    done, error, _ = run(app, b"0", b"1", b"2", send=refuse)

    assert (done, type(error)) == (1, Boom)


def test_only_the_first_record_is_a_repeated_attempt(app: Flowkit) -> None:
    attempts: list[int] = []

    @app.topic("orders")
    def bill(message: Message) -> None:
        attempts.append(message.attempt)

    until = Until()
    until.at = time.monotonic() + 60
    handling = app.handling("orders")
    handling.run([make_record()] * 3, lambda *_: None, attempt=4, received=0.0, until=until)

    assert attempts == [4, 1, 1]


def test_a_moment_that_has_passed_ends_the_loop_between_two_records(app: Flowkit) -> None:
    kept: list[Any] = []
    until = Until()
    until.at = time.monotonic() + 60

    @app.topic("orders")
    def bill() -> None:
        kept.append(1)
        if len(kept) == 2:
            until.at = 0

    handling = app.handling("orders")

    assert handling.run([make_record()] * 5, lambda *_: None, attempt=1, received=0.0, until=until) == (2, None)


def test_what_is_no_error_of_the_handler_comes_out_of_the_loop(app: Flowkit) -> None:
    @app.topic("orders")
    def bill() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(app, b"0")


# A handler of the payload alone has a loop of its own.


class Line(pydantic.BaseModel):
    n: int


def keeper(app: Flowkit, annotation: Any) -> list[Any]:
    """A handler that keeps the payloads that it is given, which it annotates so."""
    kept: list[Any] = []

    def bill(order):  # type: ignore[no-untyped-def]
        kept.append(order)

    bill.__annotations__ = {"order": annotation}
    app.add_topic("orders", bill)
    return kept


@pytest.mark.parametrize("annotation", [Any, dict, Line | None, Invoice | None], ids=shown)
def test_a_tombstone_among_others_is_one(app: Flowkit, annotation: Any) -> None:
    kept = keeper(app, annotation)
    value = b'{"n": 1, "id": 1}'
    assert run(app, value, None, value, None)[:2] == (4, None)
    assert [order is None for order in kept] == [False, True, False, True]


def test_what_is_no_json_among_others_is_given_as_it_is(app: Flowkit) -> None:
    kept = keeper(app, Any)
    assert run(app, b"1", b"{", b"2", b"")[:2] == (4, None)
    assert kept == [1, {"message": b"{"}, 2, {"message": b""}]


@pytest.mark.parametrize("annotation", [Line, Invoice], ids=shown)
def test_a_payload_among_others_that_does_not_fit_fails_alone(app: Flowkit, annotation: Any) -> None:
    kept = keeper(app, annotation)
    value = b'{"n": 1, "id": 1}'
    done, error, _ = run(app, value, value, b'{"n": "x"}', value)
    assert (done, type(error), len(kept)) == (2, PayloadError, 2)


def test_an_error_of_the_handler_that_looks_like_the_parsers_is_its_own_and_comes_once(app: Flowkit) -> None:
    kept: list[Any] = []

    @app.topic("orders")
    def bill(order: Any) -> None:
        kept.append(order)
        orjson.loads(b"{")

    done, error, _ = run(app, b"1", b"2")
    assert (done, type(error), kept) == (0, orjson.JSONDecodeError, [1])


def test_a_tombstone_may_be_aborted_and_may_fail(app: Flowkit) -> None:
    kept: list[Any] = []

    @app.topic("orders")
    def bill(order: Any) -> None:
        kept.append(order)
        if kept.count(None) == 2:
            raise Boom
        if order is None:
            app.abort()

    done, error, _ = run(app, b"1", None, b"2", None, b"3")
    assert (done, type(error), kept) == (3, Boom, [1, None, 2, None])


def test_what_a_short_way_cannot_write_is_named_as_on_the_long_one(app: Flowkit) -> None:
    @app.topic("orders")
    @app.responds_to("invoices")
    def bill(order: Any) -> Any:
        return {"order": order, "what": object()}

    done, error, sent = run(app, b"1")
    assert (done, str(error)[:44], sent) == (0, "the response to 'invoices' cannot be written", [])


def test_a_failed_check_leaves_no_response_to_the_next_message(app: Flowkit) -> None:
    @app.topic("orders")
    @app.responds_to("invoices", required=False)
    def bill(order: Any) -> Any:
        app.respond_to("invoices", order)
        if order == 2:
            return {"again": order}
        return None

    done, error, sent = run(app, b"1", b"2", b"3")
    assert (done, type(error).__name__) == (1, "ResponseRepeated")
    assert "(what it returned is one of them)" in str(error)
    assert [item.value for item in sent] == [b"1"]
    assert run(app, b"3")[2][0].value == b"3"
    assert len(run(app, b"3")[2]) == 1


def test_a_coroutine_that_a_plain_function_gives_is_run_and_answers(app: Flowkit) -> None:
    @app.topic("orders")
    @app.responds_to("invoices")
    def bill(order: Any) -> Any:
        async def later() -> Any:
            await asyncio.sleep(0)
            return {"n": order}

        return later()

    assert [item.value for item in run(app, b"1", b"2")[2]] == [b'{"n":1}', b'{"n":2}']


def test_a_stop_ends_it_behind_the_message_in_hand_however_short_those_before_were(app: Flowkit) -> None:
    kept: list[Any] = []
    until = Until()
    until.at = time.monotonic() + 60

    @app.topic("orders")
    def bill(order: Any) -> None:
        kept.append(order)
        if len(kept) == 1500:
            until.at = 0.0

    handling = app.handling("orders")
    records = [make_record()] * 3000
    assert handling.run(records, lambda *_: None, attempt=1, received=0.0, until=until) == (1500, None)


def test_messages_that_become_slow_are_few_until_it_looks_at_the_clock(
    app: Flowkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(flowkit.quick, "time", clock)
    kept: list[Any] = []
    until = Until()
    until.at = clock.now + 60

    @app.topic("orders")
    def bill(order: Any) -> None:
        kept.append(order)
        clock.now += 0.000_001 if len(kept) <= 1000 else 1

    handling = app.handling("orders")
    done, error = handling.run([make_record()] * 3000, lambda *_: None, attempt=1, received=0.0, until=until)
    assert error is None
    assert 1000 + 60 <= done <= 1000 + 60 + 2 * MOST_UNWATCHED
    # and then at each of them
    kept.clear()
    kept.extend(range(1000))
    until.at = clock.now + 60
    done, error = handling.run([make_record()] * 3000, lambda *_: None, attempt=1, received=0.0, until=until)
    assert (done, error) == (60, None)


# Coroutines.


def test_the_coroutines_of_all_messages_share_their_loop(app: Flowkit) -> None:
    loops: list[Any] = []

    @app.topic("orders")
    async def bill() -> None:
        loops.append(asyncio.get_running_loop())

    run(app, b"0", b"1")

    assert loops[0] is loops[1]


def test_a_coroutine_sees_the_call_it_belongs_to(app: Flowkit) -> None:
    @app.topic("orders")
    @app.responds_to("invoices", multiple_usage=True)
    async def bill(order: Any) -> None:
        async def part(number: int) -> None:
            await asyncio.sleep(0)
            app.respond_to("invoices", number)

        await asyncio.gather(part(1), part(2))

    assert [item.value for item in Client(app).send("orders", {}).responses] == [1, 2]


def test_the_error_of_a_coroutine_is_that_of_the_message(app: Flowkit) -> None:
    @app.topic("orders")
    async def bill() -> None:
        raise Boom

    with pytest.raises(Boom):
        Client(app).send("orders", {})


def test_a_coroutine_that_is_cancelled_is_a_failure_of_its_message(app: Flowkit) -> None:
    @app.topic("orders")
    async def bill() -> None:
        raise asyncio.CancelledError

    done, error, _ = run(app, b"0")

    assert done == 0
    assert isinstance(error, RuntimeError)


# The way through the queue.


@pytest.mark.parametrize("value", [None, b"", b'{"id": 7}', b"\xff\x00", "ä".encode()], ids=repr)
@pytest.mark.parametrize("key", [None, b"", b"ann", b"\xff"], ids=repr)
@pytest.mark.parametrize("headers", [(), (("a", b"1"), ("a", None), ("b", b"\xff"))], ids=repr)
def test_a_record_comes_back_from_its_entry(app: Flowkit, value: Any, key: Any, headers: Any) -> None:
    app.add_topic("orders", nothing)
    handling = app.handling("orders")
    record = make_record(value, key=key, headers=headers)

    entry = pickle.loads(pickle.dumps(handling.entry(record, 1.5, record.value)))

    assert handling.record(entry) == record._replace(received=1.5)
    assert handling.entries([record], 1.5) == [entry]


def test_what_a_custom_worker_is_given_has_names_and_comes_back(app: Flowkit) -> None:
    app.add_topic("orders", nothing)
    handling = app.handling("orders")
    entry = handling.entry(make_record(), 1.5, b'{"id": 7}')

    given = handling.params(entry)

    assert given == {
        "topic": "orders",
        "partition": 2,
        "offset": 1017,
        "timestamp": 1_700_000_000_123,
        "received_at": 1.5,
        "key": "ann",
        "headers": [["trace", "1"], ["trace", "2"]],
        "value": '{"id": 7}',
    }
    assert handling.entry_of(json.loads(json.dumps(given))) == entry


@pytest.mark.parametrize("missing", PARAMS)
def test_params_that_lack_something_are_refused(app: Flowkit, missing: str) -> None:
    app.add_topic("orders", nothing)
    handling = app.handling("orders")
    given = handling.params(handling.entry(make_record(), 1.5, b""))
    del given[missing]

    with pytest.raises(QueueError, match=f"params lack '{missing}'"):
        handling.entry_of(given)


@pytest.mark.parametrize(
    "entry",
    [
        [],
        [1, 2],
        None,
        7,
        "text",
        ("orders", 0, 0, 0, None, None, 7, 0.0),
        ("orders", 0, 0, 0, None, None, [["a"]], 0.0),
        ("orders", 0, 0, 0, None, 7, (), 0.0),
        ("orders", 0, 0, 0, None, "text", (), 0.0),
        ("orders", 0, 0, 0, 7, None, (), 0.0),
        ("orders", 0, 0, 0, None, None, [["a", {}]], 0.0),
        ("orders", 0, 0, 0, None, None, [[7, b""]], 0.0),
    ],
    ids=repr,
)
def test_an_entry_that_flowkit_did_not_write_is_refused(app: Flowkit, entry: Any) -> None:
    app.add_topic("orders", nothing)

    with pytest.raises(QueueError):
        app.handling("orders").record(entry)


def test_a_queued_message_knows_what_an_inline_one_knows(app: Flowkit) -> None:
    seen: list[Any] = []

    def look(message: Message) -> None:
        seen.append(
            (
                message.partition,
                message.offset,
                message.key,
                message.value,
                message.headers.pairs,
                message.timestamp,
                message.attempt,
            )
        )

    app.add_topic("inline", look)
    app.add_topic("queued", functools.partial(look), inline=False, group="shop_inline")
    client = Client(app)

    for topic in ("inline", "queued"):
        client.send(topic, {"id": 7}, key="ann", headers={"a": b"\xff"}, partition=3, timestamp=1_700_000_000.5)

    assert seen[0] == seen[1]


# Options.


@pytest.mark.parametrize(
    ("settings", "options", "attribute", "expected"),
    [
        ({}, {}, "group", "shop_orders"),
        ({}, {"group": "billing"}, "group", "billing"),
        ({"inline": True}, {}, "inline", True),
        ({"inline": False}, {}, "inline", False),
        ({"inline": True}, {"inline": False}, "inline", False),
        ({"inline": False}, {"inline": True}, "inline", True),
        ({}, {}, "queue", "default"),
        ({"inline": False}, {"queue": "q"}, "queue", "q"),
        ({}, {}, "retry", Retry()),
        ({"retry": 3}, {}, "retry", Retry(attempts=3)),
        ({"retry": 3}, {"retry": 4}, "retry", Retry(attempts=4)),
        ({"retry": 3}, {"retry": Retry(first=9)}, "retry", Retry(first=9)),
        ({}, {}, "dead_letter", None),
        ({"dead_letter": "dead"}, {}, "dead_letter", "dead"),
        ({"dead_letter": "dead"}, {"dead_letter": "other"}, "dead_letter", "other"),
        ({"job_size": 7}, {}, "job_size", 7),
        ({"job_size": 7}, {"job_size": 8}, "job_size", 8),
        ({"job_timeout": 7}, {}, "job_timeout", 7.0),
        ({"job_timeout": 7}, {"job_timeout": 8.5}, "job_timeout", 8.5),
    ],
    ids=str,
)
def test_a_route_does_as_its_option_says_or_else_as_the_settings_say(
    settings: dict[str, Any], options: dict[str, Any], attribute: str, expected: Any
) -> None:
    app = make_app(**settings)
    app.add_topic("orders", nothing, **options)

    assert getattr(app.handling("orders"), attribute) == expected


# Dead letters.


def test_a_dead_letter_is_the_message_itself_and_says_where_it_is_from(app: Flowkit) -> None:
    app.add_topic("orders", nothing, dead_letter="orders.dead", group="billing")
    record = make_record(b"\xff{", key=b"\x00")

    letter = app.handling("orders").dead(record, Boom("no such user"), 5)

    assert (letter.topic, letter.value, letter.key) == ("orders.dead", b"\xff{", b"\x00")
    assert (letter.partition, letter.partition_key) == (None, None)
    assert letter.headers[:2] == (("trace", b"1"), ("trace", b"2"))
    added = dict(letter.headers[2:])
    failed_at = datetime.fromisoformat((added.pop("flowkit-failed-at") or b"").decode())
    assert abs((datetime.now(UTC) - failed_at).total_seconds()) < 60
    assert added == {
        "kafka_dlt-original-topic": b"orders",
        "kafka_dlt-original-partition": struct.pack(">i", 2),
        "kafka_dlt-original-offset": struct.pack(">q", 1017),
        "kafka_dlt-original-timestamp": struct.pack(">q", 1_700_000_000_123),
        "kafka_dlt-original-consumer-group": b"billing",
        "kafka_dlt-exception-fqcn": f"{__name__}.Boom".encode(),
        "kafka_dlt-exception-message": b"no such user",
        "flowkit-attempts": b"5",
    }


@pytest.mark.parametrize(
    "text", ["x" * 1_000_000, "€" * 1_000_000, "\ud800", ""], ids=["long", "wide", "surrogate", "empty"]
)
def test_a_dead_letter_takes_any_error(app: Flowkit, text: str) -> None:
    app.add_topic("orders", nothing, dead_letter="orders.dead")

    letter = app.handling("orders").dead(make_record(), Boom(text), 1)

    assert len(dict(letter.headers)["kafka_dlt-exception-message"] or b"") <= 2000


def test_a_dead_letter_of_a_tombstone_is_one(app: Flowkit) -> None:
    app.add_topic("orders", nothing, dead_letter="orders.dead")

    assert app.handling("orders").dead(make_record(None), Boom(), 1).value is None


def test_abort_is_not_an_exception_that_a_handler_catches() -> None:
    assert not issubclass(Abort, Exception)


# What a user should be told of, and what need not wait.


def test_a_hook_that_cannot_read_its_payload_lets_the_message_go_on_to_its_queue() -> None:
    app = make_app(inline=False)
    seen: list[int] = []

    @app.before_enqueue("orders")
    def hook(order: int, message: Message) -> None:
        seen.append(order)

    @app.topic("orders")
    def handle(order: int) -> None: ...

    handling = app.handling("orders")
    ticket = handling.admit(make_record(b"not a number"), 1, 0.0)
    assert ticket is not None
    assert handling.record(ticket[1]).value == b"not a number"  # it fails in the worker, alone
    assert seen == []
    with pytest.raises(PayloadError):
        handling.handle(handling.message(handling.record(ticket[1]), 1, 0.0))


@pytest.mark.parametrize("with_message", [False, True])
def test_a_returned_value_that_goes_nowhere_is_said_once(
    with_message: bool, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app()
    if with_message:

        @app.topic("orders")
        def handle(order: int, message: Message) -> dict[str, int]:
            return {"lost": order}

    else:

        @app.topic("orders")
        def handle_plain(order: int) -> dict[str, int]:
            return {"lost": order}

    assert run(app, b"1", b"2")[0] == 2
    assert caplog.text.count("returns a value ({'lost': 1}), which goes nowhere: it declares no topic") == 1
