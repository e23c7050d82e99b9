"""The registry: decorators, their twins, hooks, the setup lock, and what an application does when it starts."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
from support import connect, make_app, run, shown

from flowkit import (
    AlreadyStarted,
    ConfigurationError,
    DeliveryError,
    Flowkit,
    Message,
    ResponseMissing,
    Retry,
    RouteNotFound,
    Settings,
    SettingsError,
)
from flowkit.parsers import Json
from flowkit.responses import Response
from flowkit.route import OPTIONS, Declaration
from flowkit.testing import Client

HOSTS = {"hosts": "127.0.0.1:9092"}


class Boom(Exception):
    """What a handler raises itself."""


class Worker:
    """A custom worker that keeps what it is given, as JSON like a real one."""

    def __init__(self) -> None:
        self.given: list[tuple[str, Any]] = []

    def perform_async(self, topic: str, params: Any) -> None:
        self.given.append((topic, json.loads(json.dumps(params))))


@pytest.fixture
def app() -> Flowkit:
    return make_app()


def bill(order: Any) -> None: ...


# Decorators.


def test_every_decorator_gives_the_function_back(app: Flowkit) -> None:
    def function() -> None: ...

    decorators: list[Callable[..., Any]] = [
        app.topic("orders"),
        app.topic("orders.v2", inline=True),
        app.responds_to("invoices"),
        app.responds_to("alerts", required=False, multiple_usage=True),
        app.before_enqueue,
        app.before_enqueue(),
        app.before_enqueue("orders"),
        app.before_enqueue("orders", "orders.v2"),
        app.after_failure,
        app.after_failure(),
        app.after_failure("orders"),
        app.configurator,
        app.on_startup,
        app.on_shutdown,
    ]

    for decorate in decorators:
        assert decorate(function) is function


def test_a_topic_and_its_responses_can_be_declared_in_any_order(app: Flowkit) -> None:
    @app.topic("first")
    @app.responds_to("a")
    @app.responds_to("b")
    def first() -> None: ...

    @app.responds_to("a")
    @app.topic("second")
    @app.responds_to("b")
    def second() -> None: ...

    @app.responds_to("a")
    @app.responds_to("b")
    @app.topic("third")
    def third() -> None: ...

    for handling in app.handlings.values():
        assert set(handling.declarations) == {"a", "b"}


def test_hooks_can_be_declared_before_the_topics_they_are_for(app: Flowkit) -> None:
    seen: list[str] = []
    app.before_enqueue("orders")(lambda: seen.append("hook"))
    app.add_topic("orders", lambda: seen.append("handler"))

    Client(app).send("orders", {})

    assert seen == ["hook", "handler"]


def test_the_twins_do_what_the_decorators_do() -> None:
    decorated, added = make_app(), make_app()
    retry = Retry(attempts=3)
    decorated.topic("orders", retry=retry, dead_letter="dead")(bill)
    decorated.responds_to("invoices", required=False, multiple_usage=True)(bill)
    added.add_topic("orders", bill, retry=retry, dead_letter="dead")
    added.add_response(bill, "invoices", required=False, multiple_usage=True)

    assert decorated.handlings.keys() == added.handlings.keys()
    assert [vars(route) for route in decorated.routes.values()] == [vars(route) for route in added.routes.values()]
    assert added.handling("orders").declarations == {
        "invoices": Declaration("invoices", required=False, multiple_usage=True, parser=Json)
    }


def test_a_response_is_required_and_single_if_not_said_otherwise(app: Flowkit) -> None:
    app.add_response(bill, "invoices")

    assert app.declarations_of(bill) == {"invoices": Declaration("invoices", required=True, multiple_usage=False)}


def test_one_function_may_handle_several_topics(app: Flowkit) -> None:
    seen: list[str] = []

    @app.topic("orders")
    @app.topic("orders.v2")
    def handle(message: Message) -> None:
        seen.append(message.topic)

    client = Client(app)
    client.send("orders", {})
    client.send("orders.v2", {})

    assert seen == ["orders", "orders.v2"]


def test_the_routes_are_in_the_order_they_were_registered(app: Flowkit) -> None:
    for name in ("b", "a", "c"):
        app.add_topic(name, bill)

    assert list(app.routes) == ["b", "a", "c"]
    assert app.routes["a"].handler is bill


@pytest.mark.parametrize("topic_outside", [True, False])
def test_declarations_are_found_behind_other_decorators(app: Flowkit, topic_outside: bool) -> None:
    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    @app.responds_to("outside")
    @logged
    @app.responds_to("between")
    @logged
    @app.responds_to("inside")
    def handle() -> None:
        for topic in ("inside", "between", "outside"):
            app.respond_to(topic, {})

    app.add_topic("orders", handle if topic_outside else logged(handle))

    assert len(Client(app).send("orders", {}).responses) == 3


def test_the_outer_declaration_of_a_topic_counts(app: Flowkit) -> None:
    @app.responds_to("invoices")
    def inner() -> None: ...

    @app.responds_to("invoices", required=False)
    @functools.wraps(inner)
    def outer() -> None: ...

    assert app.declarations_of(outer)["invoices"].required is False
    assert app.declarations_of(inner)["invoices"].required is True


def test_a_callable_object_may_handle_and_respond(app: Flowkit) -> None:
    class Bill:
        def __init__(self, rate: float) -> None:
            self.rate = rate

        def __call__(self, total: float) -> float:
            return total * self.rate

    app.topic("orders")(app.responds_to("invoices")(Bill(2)))

    assert Client(app).send("orders", 7).sent("invoices").value == 14


def test_a_method_may_handle_and_respond(app: Flowkit) -> None:
    class Desk:
        def bill(self, total: float) -> float:
            return total * 2

    desk = Desk()
    app.add_topic("orders", desk.bill)
    app.add_response(desk.bill, "invoices")

    assert Client(app).send("orders", 7).sent("invoices").value == 14


def test_applications_share_nothing() -> None:
    first, second = make_app(), make_app()
    first.add_topic("orders", bill)
    first.add_response(bill, "invoices")

    assert dict(second.routes) == {}
    assert second.declarations_of(bill) == {}


# Mistakes.

NAMES: list[Any] = ["", "a b", ".", "..", "ä", "x" * 250, None, 7, bill]


@pytest.mark.parametrize("name", NAMES, ids=shown)
@pytest.mark.parametrize("method", ["topic", "responds_to", "before_enqueue", "after_failure"])
def test_a_wrong_name_is_refused_where_it_is_written(app: Flowkit, method: str, name: Any) -> None:
    if method in ("before_enqueue", "after_failure") and callable(name):
        return  # the decorator without parentheses

    with pytest.raises(ConfigurationError, match="the name of a topic"):
        getattr(app, method)(name)


@pytest.mark.parametrize("name", NAMES, ids=shown)
def test_a_wrong_name_is_refused_by_the_twins(app: Flowkit, name: Any) -> None:
    with pytest.raises(ConfigurationError, match="the name of a topic"):
        app.add_topic(name, bill)
    with pytest.raises(ConfigurationError, match="the name of a topic"):
        app.add_response(bill, name)


@pytest.mark.parametrize("method", ["topic", "responds_to"])
def test_a_decorator_without_its_parentheses_says_so(app: Flowkit, method: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"write @app\.{method}\(\.\.\.\) with the name of the topic"):
        getattr(app, method)(bill)


@pytest.mark.parametrize("first", [bill, None], ids=shown)
def test_a_hook_is_for_names_only(app: Flowkit, first: Any) -> None:
    with pytest.raises(ConfigurationError, match="the name of a topic is a text"):
        app.before_enqueue("orders", first)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("que", "did you mean 'queue'?"),
        ("interchange", "did you mean 'interchanger'?"),
        ("dead_leter", "did you mean 'dead_letter'?"),
        ("retries", "did you mean 'retry'?"),
        ("Inline", "did you mean 'inline'?"),
        ("zzz", f"known are: {', '.join(sorted(OPTIONS))}"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_known_one(app: Flowkit, option: str, hint: str) -> None:
    text = re.escape(f"topic 'orders': {option}: there is no such option; {hint}")

    with pytest.raises(ConfigurationError, match=text):
        app.topic("orders", **{option: 1})
    with pytest.raises(ConfigurationError, match=text):
        app.add_topic("orders", bill, **{option: 1})
    assert dict(app.routes) == {}


def test_a_wrong_option_is_refused_where_it_is_written(app: Flowkit) -> None:
    with pytest.raises(ConfigurationError, match="topic 'orders': retry is a Retry"):
        app.topic("orders", retry=0)
    assert dict(app.routes) == {}


@pytest.mark.parametrize("handler", [None, "bill", 7, b"bill"], ids=shown)
def test_a_handler_is_a_function(app: Flowkit, handler: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=re.escape(f"topic 'orders': a handler is a function, not {handler!r}")
    ):
        app.add_topic("orders", handler)
    with pytest.raises(ConfigurationError, match=re.escape(f"a handler is a function, not {handler!r}")):
        app.add_response(handler, "invoices")


def test_a_topic_has_one_handler(app: Flowkit) -> None:
    app.add_topic("orders", bill)

    with pytest.raises(ConfigurationError, match="topic 'orders' has a handler already, bill") as caught:
        app.add_topic("orders", print)
    assert f"{__file__}:{bill.__code__.co_firstlineno}" in str(caught.value)
    assert "call print from it" in str(caught.value)
    assert app.routes["orders"].handler is bill


def test_a_response_is_declared_once(app: Flowkit) -> None:
    app.add_response(bill, "invoices")

    with pytest.raises(ConfigurationError, match="bill declares 'invoices' twice; declare it once, with") as caught:
        app.add_response(bill, "invoices", required=False)
    assert "multiple_usage=True" in str(caught.value)


@pytest.mark.parametrize("method", ["before_enqueue", "after_failure"])
def test_a_hook_for_a_topic_that_nobody_handles_is_refused_at_the_start(app: Flowkit, method: str) -> None:
    app.add_topic("orders", bill)

    @getattr(app, method)("ordres")  # type: ignore[untyped-decorator]
    def triage() -> None: ...

    with pytest.raises(ConfigurationError, match=r"triage: ordres: there is no such topic; did you mean 'orders'\?"):
        app.start(connected=False)


def test_a_message_of_a_topic_that_nobody_handles(app: Flowkit) -> None:
    app.add_topic("b", bill)
    app.add_topic("a", bill)

    with pytest.raises(RouteNotFound, match="no handler is registered for topic 'c'; known are: a, b"):
        app.handling("c")


def test_an_unknown_setting_is_told_when_the_application_starts() -> None:
    app = Flowkit("shop", reddis="redis://r")

    with pytest.raises(SettingsError, match=r"reddis: there is no such setting; did you mean 'redis'\?"):
        app.start(connected=False)


# The setup lock.

REGISTER: dict[str, Callable[[Flowkit], Any]] = {
    "topic": lambda app: app.topic("late")(bill),
    "add_topic": lambda app: app.add_topic("late", bill),
    "responds_to": lambda app: app.responds_to("late")(bill),
    "add_response": lambda app: app.add_response(bill, "late"),
    "before_enqueue": lambda app: app.before_enqueue(bill),
    "before_enqueue(topic)": lambda app: app.before_enqueue("orders")(bill),
    "after_failure": lambda app: app.after_failure(bill),
    "after_failure(topic)": lambda app: app.after_failure("orders")(bill),
    "configurator": lambda app: app.configurator(bill),
    "on_startup": lambda app: app.on_startup(bill),
    "on_shutdown": lambda app: app.on_shutdown(bill),
}


@pytest.mark.parametrize("register", REGISTER.values(), ids=REGISTER)
@pytest.mark.parametrize(
    "where", ["after the start", "in on_startup", "in a configurator", "in a handler", "late decorator"]
)
def test_nothing_is_registered_after_the_start(app: Flowkit, register: Callable[[Flowkit], Any], where: str) -> None:
    app.add_topic("orders", lambda: register(app) if where == "in a handler" else None)
    if where == "in on_startup":
        app.on_startup(lambda: register(app))
    if where == "in a configurator":
        app.configurator(lambda: register(app))

    def start_and_register() -> None:
        app.start(connected=False)
        if where == "in a handler":
            Client(app).send("orders", {})
        register(app)

    with pytest.raises(AlreadyStarted, match="was registered after the application had started") as caught:
        start_and_register()
    assert "register at the top level of the module" in str(caught.value)
    assert list(app.routes) == ["orders"]


@pytest.mark.parametrize("make", [
    lambda app: app.topic("late"),
    lambda app: app.responds_to("late"),
    lambda app: app.before_enqueue("orders"),
    lambda app: app.after_failure(),
], ids=["topic", "responds_to", "before_enqueue", "after_failure"])  # fmt: skip
def test_a_decorator_made_before_the_start_and_used_after_it_is_late_too(
    app: Flowkit, make: Callable[[Flowkit], Callable[[Any], Any]]
) -> None:
    app.add_topic("orders", bill)
    decorate = make(app)
    app.start(connected=False)

    with pytest.raises(AlreadyStarted):
        decorate(bill)


def test_looking_at_an_application_does_not_start_it(app: Flowkit) -> None:
    assert (dict(app.routes), app.settings.name, app.reference) == ({}, "shop", "")
    repr(app)
    app.monitor  # noqa: B018
    app.declarations_of(bill)

    app.add_topic("orders", bill)


# Hooks.


def test_hooks_are_for_the_topics_they_name_or_for_all(app: Flowkit) -> None:
    seen: list[str] = []

    def make(name: str) -> Any:
        def hook(message: Message) -> None:
            seen.append(f"{name} {message.topic}")

        return hook

    app.before_enqueue(make("1 all"))
    app.before_enqueue("a")(make("2 a"))
    app.before_enqueue()(make("3 all"))
    app.before_enqueue("b", "a")(make("4 a b"))
    app.before_enqueue("b")(make("5 b"))
    for topic in ("a", "b", "c"):
        app.add_topic(topic, bill)

    client = Client(app)
    for topic in ("a", "b", "c"):
        client.send(topic, {})

    assert seen == [
        *("1 all a", "2 a a", "3 all a", "4 a b a"),
        *("1 all b", "3 all b", "4 a b b", "5 b b"),
        *("1 all c", "3 all c"),
    ]


def test_failure_hooks_are_for_the_topics_they_name_or_for_all(app: Flowkit) -> None:
    seen: list[str] = []

    def fail() -> None:
        raise Boom

    def make(name: str) -> Any:
        def hook(error: Exception, message: Message) -> None:
            seen.append(f"{name} {message.topic} {type(error).__name__}")

        return hook

    app.after_failure("a", "b")(make("1 a b"))
    app.after_failure(make("2 all"))
    app.after_failure("b")(make("3 b"))
    for topic in ("a", "b", "c"):
        app.add_topic(topic, fail)

    client = Client(app)
    for topic in ("a", "b", "c"):
        with pytest.raises(Boom):
            client.send(topic, {})

    assert seen == ["1 a b a Boom", "2 all a Boom", "1 a b b Boom", "2 all b Boom", "3 b b Boom", "2 all c Boom"]


# Starting and stopping.


def test_what_happens_at_the_start_and_the_end_and_in_which_order(app: Flowkit) -> None:
    seen: list[Any] = []
    app.on_startup(lambda: seen.append("startup 1"))
    app.on_shutdown(lambda: seen.append("shutdown 1"))
    app.configurator(lambda: seen.append("configurator 1"))
    app.configurator(lambda settings: seen.append(settings))
    app.on_startup(lambda: seen.append("startup 2"))
    app.on_shutdown(lambda: seen.append("shutdown 2"))

    app.start(connected=False)
    assert seen == ["configurator 1", app.settings, "startup 1", "startup 2"]

    app.stop()
    assert seen[4:] == ["shutdown 1", "shutdown 2"]


def test_an_application_starts_and_stops_once(app: Flowkit) -> None:
    seen: list[str] = []
    app.configurator(lambda: seen.append("configurator"))
    app.on_startup(lambda: seen.append("startup"))
    app.on_shutdown(lambda: seen.append("shutdown"))

    app.stop()
    app.start(connected=False)
    app.start(connected=False)
    app.stop()
    app.stop()

    assert seen == ["configurator", "startup", "shutdown"]


def test_async_functions_run_at_the_start_and_the_end_too(app: Flowkit) -> None:
    seen: list[Any] = []

    @app.configurator
    async def configure(settings: Settings) -> None:
        seen.append(settings.name)

    @app.on_startup
    async def up() -> None:
        seen.append("startup")

    @app.on_shutdown
    async def down() -> None:
        seen.append("shutdown")

    app.start(connected=False)
    app.stop()

    assert seen == ["shop", "startup", "shutdown"]


def test_an_application_that_could_not_start_has_not_started(app: Flowkit) -> None:
    seen: list[str] = []

    @app.on_startup
    def up() -> None:
        seen.append("startup")
        if len(seen) == 1:
            raise Boom

    app.on_shutdown(lambda: seen.append("shutdown"))

    with pytest.raises(Boom):
        app.start(connected=False)
    app.stop()
    assert seen == ["startup"]

    app.start(connected=False)
    assert seen == ["startup", "startup"]


def test_a_failing_shutdown_hook_keeps_no_other_from_running(app: Flowkit) -> None:
    seen: list[str] = []

    @app.on_shutdown
    def first() -> None:
        raise Boom

    app.on_shutdown(lambda: seen.append("second"))
    app.start(connected=False)

    with pytest.raises(Boom):
        app.stop()
    assert seen == ["second"]


@pytest.mark.parametrize(
    ("settings", "options", "missing"),
    [
        ({}, {"inline": True}, ["kafka.hosts"]),
        ({}, {}, ["kafka.hosts", "redis"]),
        ({"kafka": HOSTS}, {"inline": True}, []),
        ({"kafka": HOSTS}, {}, ["redis"]),
        ({"kafka": HOSTS}, {"worker": Worker()}, []),
        ({"kafka": HOSTS, "inline": True}, {}, []),
        ({"kafka": HOSTS, "inline": True}, {"inline": False}, ["redis"]),
        ({"kafka": HOSTS, "redis": "redis://r"}, {}, []),
    ],
    ids=shown,
)
def test_redis_is_needed_only_when_some_route_is_queued(
    settings: dict[str, Any], options: dict[str, Any], missing: list[str]
) -> None:
    app = Flowkit("shop", **settings)
    app.add_topic("orders", bill, **options)

    if missing:
        with pytest.raises(SettingsError) as caught:
            app.start()
        assert [mistake.split(":")[0] for mistake in caught.value.mistakes] == missing
    else:
        app.start()


def test_the_environment_is_read_when_the_application_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    app = Flowkit(kafka={"hosts": "other:1"})
    monkeypatch.setenv("FLOWKIT_NAME", "store")
    monkeypatch.setenv("FLOWKIT_KAFKA_HOSTS", "a:1,b:2")
    app.add_topic("orders", bill, inline=True)

    app.start()

    assert (app.settings.name, app.settings.kafka.hosts) == ("store", ("a:1", "b:2"))
    assert app.handling("orders").group == "store_orders"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_starts_anew_and_does_not_stop_its_parent() -> None:
    seen: list[str] = []
    app = make_app()
    app.on_startup(lambda: seen.append("startup"))
    app.on_shutdown(lambda: seen.append("shutdown"))
    app.start(connected=False)

    child = os.fork()
    if child == 0:
        app.stop()  # the parent's start is not ours to undo
        app.start(connected=False)
        os._exit(0 if seen == ["startup", "startup"] else 1)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert seen == ["startup"]


def test_an_application_reads_as_what_it_is(app: Flowkit) -> None:
    app.add_topic("orders", bill)

    assert repr(app) == "<Flowkit 'shop', 1 topics>"


# Inside handlers, and outside. What is sent and how it is checked is in test_responses.py.


def test_abort_never_returns(app: Flowkit) -> None:
    reached: list[int] = []

    @app.topic("orders")
    def handle() -> None:
        app.abort()
        reached.append(1)

    assert Client(app).send("orders", {}).aborted
    assert reached == []


def test_the_producer_sends_outside_handlers(app: Flowkit) -> None:
    broker = connect(app)

    app.producer.send("news", {"a": 1}, key="k", headers={"h": "1"})
    app.producer.send("news", "text")
    app.producer.send("news", None, partition=0)

    assert [(record.value, record.key) for record in broker.records("news")] == [
        (b'{"a":1}', b"k"),
        (b"text", None),
        (None, None),
    ]
    assert broker.records("news")[0].headers == (("h", b"1"),)


def test_a_producer_without_brokers_says_what_is_missing(app: Flowkit) -> None:
    with pytest.raises(SettingsError, match=r"kafka\.hosts: is required"):
        app.producer.send("news", {})


def test_stopping_closes_the_producer(app: Flowkit) -> None:
    connect(app)
    app.start(connected=False)
    app.producer.send("news", {})
    assert app.producer._clients

    app.stop()

    assert not app.producer._clients


# Custom workers.


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def queued(worker: Worker) -> Flowkit:
    """An application whose orders go to a custom worker, and whose invoices go to a broker in memory."""
    app = Flowkit("shop", kafka=HOSTS)

    @app.topic("orders", worker=worker, retry=3)
    @app.responds_to("invoices")
    def bill(order: Any, message: Message) -> None:
        if order == "abort":
            app.abort()
        if order == "bad":
            raise Boom
        if order != "silent":
            app.respond_to("invoices", {"order": order, "attempt": message.attempt}, key=message.key)

    return app


def give(app: Flowkit, worker: Worker, value: Any) -> dict[str, Any]:
    """What the worker is given for a message."""
    assert Client(app).send("orders", value, key="ann", headers={"h": b"\xff"}).worker is worker
    topic, given = worker.given[-1]
    assert topic == "orders"
    return dict(given)


def test_a_custom_worker_performs_what_it_was_given(queued: Flowkit, worker: Worker) -> None:
    broker = connect(queued)

    queued.perform("orders", give(queued, worker, 7))

    [record] = broker.records("invoices")
    assert (record.key, json.loads(record.value or b"")) == (b"ann", {"order": 7, "attempt": 1})


def test_a_custom_worker_may_count_its_attempts(queued: Flowkit, worker: Worker) -> None:
    broker = connect(queued)

    queued.perform("orders", {**give(queued, worker, 7), "attempt": 3})

    assert json.loads(broker.records("invoices")[0].value or b"")["attempt"] == 3


@pytest.mark.parametrize(("order", "error"), [("bad", Boom), ("silent", ResponseMissing)])
def test_a_custom_worker_is_told_of_a_failure_and_so_are_the_hooks(
    queued: Flowkit, worker: Worker, order: str, error: type[Exception]
) -> None:
    broker = connect(queued)
    told: list[Any] = []

    @queued.after_failure("orders")
    def report(error: Exception, message: Message) -> None:
        told.append((type(error), message.attempt, message.key))

    given = give(queued, worker, order)

    with pytest.raises(error):
        queued.perform("orders", {**given, "attempt": 2})
    assert told == [(error, 2, b"ann")]
    assert broker.records("invoices") == []


def test_an_aborted_message_of_a_custom_worker_is_done(queued: Flowkit, worker: Worker) -> None:
    broker = connect(queued)

    queued.perform("orders", give(queued, worker, "abort"))

    assert broker.records("invoices") == []


def test_a_custom_worker_is_told_when_kafka_takes_nothing(queued: Flowkit, worker: Worker) -> None:
    broker = connect(queued)
    broker.refuse = DeliveryError("disk full")

    with pytest.raises(DeliveryError, match="disk full"):
        queued.perform("orders", give(queued, worker, 7))


def test_a_custom_worker_starts_the_application_in_its_process(queued: Flowkit, worker: Worker) -> None:
    connect(queued)
    seen: list[str] = []
    queued.on_startup(lambda: seen.append("startup"))
    given = give(queued, worker, 7)

    queued.perform("orders", given)
    queued.perform("orders", given)

    assert seen == ["startup"]


def test_hooks_before_the_queue_do_not_run_again_in_the_worker(queued: Flowkit, worker: Worker) -> None:
    connect(queued)
    seen: list[str] = []
    queued.before_enqueue(lambda: seen.append("hook"))

    queued.perform("orders", give(queued, worker, 7))

    assert seen == ["hook"]


def test_a_worker_that_performs_at_once_needs_no_queue() -> None:
    class AtOnce:
        def perform_async(self, topic: str, params: Any) -> None:
            app.perform(topic, params)

    app = Flowkit("shop", kafka=HOSTS)
    app.add_topic("orders", lambda order: order, worker=AtOnce())
    app.add_response(app.routes["orders"].handler, "invoices")

    assert Client(app).send("orders", {"id": 7}).sent("invoices").value == {"id": 7}


def test_perform_refuses_a_topic_that_nobody_handles(queued: Flowkit) -> None:
    with pytest.raises(RouteNotFound):
        queued.perform("nothing", {})


# app.run


def test_run_finds_its_application_in_the_script_that_was_started(
    app: Flowkit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server has its own tests; this one asks by which name a job would find the application."""
    script = types.ModuleType("__main__")
    script.__file__ = "/srv/shop.py"
    script.application = app  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.setattr(logging.getLogger("kafka"), "level", logging.ERROR)  # so that run() leaves it alone

    with pytest.raises(SystemExit) as exit_:
        app.run()
    assert exit_.value.code == 2
    assert "kafka.hosts: is required" in capsys.readouterr().err
    assert app.reference == "shop:application"


def test_an_inline_application_responds_in_the_consumer(app: Flowkit) -> None:
    app.add_topic("orders", lambda order: order)
    app.add_response(app.routes["orders"].handler, "invoices")

    assert run(app, b"1") == (1, None, [Response("invoices", b"1", parser=Json)])


# What a newcomer tries first.


def test_a_class_is_no_handler() -> None:
    class Handler:
        def perform(self, payload: Any) -> None: ...

    with pytest.raises(ConfigurationError) as caught:
        make_app().topic("orders")(Handler)

    assert "a handler is a function, and " in str(caught.value)
    assert "Handler().method)" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requird": False}, "response to 'x': requird: there is no such option; did you mean 'required'?"),
        ({"required": "no"}, "response to 'x': required is True or False, not 'no'"),
        ({"multiple_usage": 2}, "response to 'x': multiple_usage is True or False, not 2"),
    ],
)
def test_options_of_a_response_are_checked(options: dict[str, Any], message: str) -> None:
    app = make_app()
    with pytest.raises(ConfigurationError) as decorated:
        app.responds_to("x", **options)
    with pytest.raises(ConfigurationError) as added:
        app.add_response(print, "x", **options)

    assert (str(decorated.value), str(added.value)) == (message, message)


def test_a_handler_that_cannot_be_called_is_named_with_its_topic_and_place() -> None:
    app = make_app()

    @app.topic("orders")
    def bill(order: object(), message: Message) -> None: ...  # type: ignore[valid-type]

    with pytest.raises(ConfigurationError, match=r"topic 'orders', handler .*bill \(.*test_app.py:\d+\): "):
        app.handling("orders")


def test_a_payload_that_is_called_message_is_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    app = make_app()
    app.add_topic("orders", lambda message: None)
    app.handling("orders")
    assert "is given the payload as `message`; annotate it, message: Message" in caplog.text


def test_what_no_parser_reads_is_spoken_of_once(caplog: pytest.LogCaptureFixture) -> None:
    app = make_app()
    seen: list[Any] = []
    app.add_topic("orders", lambda payload: seen.append(payload))
    run(app, b"{", b"[")
    assert seen == [{"message": b"{"}, {"message": b"["}]
    assert caplog.text.count("orders has messages that its parser does not read (not JSON") == 1


def test_the_error_of_a_response_names_its_topic() -> None:
    app = make_app()

    @app.topic("orders")
    @app.responds_to("bills")
    def bill(payload: Any) -> Any:
        return object()

    _, error, _ = run(app, b"1")
    assert "the response to 'bills' cannot be written: object cannot be written as JSON" in str(error)


def test_a_response_that_is_returned_as_well_is_named() -> None:
    app = make_app()

    @app.topic("orders")
    @app.responds_to("bills")
    def bill(payload: Any) -> Any:
        app.respond_to("bills", payload)
        return payload

    _, error, _ = run(app, b"1")
    assert "sent 2 messages to 'bills', which it declares for one (what it returned is one of them); send" in str(
        error
    )


@pytest.mark.parametrize("where", ["handler", "before_enqueue", "async"])
def test_sys_exit_is_a_failed_attempt(where: str) -> None:
    app = make_app()

    def leave(payload: Any) -> None:
        sys.exit(3)

    async def leave_later(payload: Any) -> None:
        sys.exit(3)

    app.add_topic("orders", {"handler": leave, "async": leave_later}.get(where, lambda payload: None))
    if where == "before_enqueue":
        app.before_enqueue(leave)
    done, error, _ = run(app, b"1", b"2")
    assert (done, str(error)) == (0, "it called sys.exit(3), which ends nothing here")


def test_the_queue_of_an_application_is_a_setting() -> None:
    app = Flowkit("shop", queue="shop")
    app.add_topic("orders", lambda payload: None)
    app.add_topic("express", lambda payload: None, queue="express")
    assert (app.handling("orders").queue, app.handling("express").queue) == ("shop", "express")


def test_a_responder_that_is_called_by_hand_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app()
    looked: list[Any] = []
    declarations_of = app.declarations_of
    monkeypatch.setattr(app, "declarations_of", lambda handler: (looked.append(handler), declarations_of(handler))[1])

    @app.responds_to("bills")
    def announce(value: Any) -> None:
        app.respond_to("bills", value)

    @app.topic("orders")
    def bill(payload: Any) -> None:
        app.respond_with(announce, payload)

    done, _, sent = run(app, b"1", b"2", b"3")
    assert (done, [response.value for response in sent]) == (3, [b"1", b"2", b"3"])
    assert looked.count(announce) == 1


def test_a_parser_of_its_own_stays_with_each_route_that_calls_a_responder() -> None:
    app = make_app()

    @app.responds_to("bills")
    def announce(value: Any) -> None:
        app.respond_to("bills", {"value": value})

    class Loud:
        @staticmethod
        def parse(data: bytes) -> Any:
            return data.decode()

        @staticmethod
        def generate(value: Any) -> str:
            return f"LOUD {value['value']}"

    app.add_topic("a", lambda value: app.respond_with(announce, value))
    app.add_topic("b", lambda value: app.respond_with(announce, value), parser=Loud)
    values = [run(app, b"1", topic=topic)[2][0].value for topic in ("a", "b", "a")]
    assert values == [b'{"value":1}', b"LOUD 1", b'{"value":1}']
