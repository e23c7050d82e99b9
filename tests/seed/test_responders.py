"""Responders: functions and classes, what they declare, and where their messages go."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from commands import read_topic
from servers import Kafka, MakeTopic
from support import connect, make_app

from flowkit import ConfigurationError, Flowkit, ResponseMissing, ResponseRepeated, ResponseUnregistered
from flowkit.testing import Client


@pytest.fixture
def responders(example: Callable[[str], Any]) -> Any:
    return example("responders")


@pytest.fixture
def flowkit_app(responders: Any) -> Flowkit:
    app: Flowkit = responders.app
    return app


# In their routes.


def test_a_handler_responds_itself_as_it_declares(flowkit_client: Client) -> None:
    order = {"id": 7, "user": "ann", "total": 20}
    assert [item.topic for item in flowkit_client.send("orders", order).responses] == ["invoices"]
    call = flowkit_client.send("orders", {**order, "total": 2000})
    assert [item.topic for item in call.responses] == ["invoices", "alerts"]
    assert flowkit_client.send("visits", {"user": "ann"}).sent("greetings").raw == b"Hello ann"


def test_a_function_is_given_what_the_handler_returns(flowkit_client: Client) -> None:
    sent = flowkit_client.send("signups", {"id": 7, "login": "ann"}).sent("users.created")
    assert (sent.value, sent.key) == ({"id": 7, "login": "ann", "registered": True}, "7")


@pytest.mark.parametrize("registered", [True, False])
def test_a_class_responds_to_several_topics_with_several_arguments(flowkit_client: Client, registered: bool) -> None:
    call = flowkit_client.send("logins", {"id": 7, "login": "ann", "registered": registered})
    assert [item.topic for item in call.responses] == ["users.notified", "profiles.notified"][: 1 + registered]
    assert call.sent("users.notified").value["login"] == "ann"


def test_an_object_responds_with_what_it_knows(flowkit_client: Client) -> None:
    sent = flowkit_client.send("reminders", {"id": 7, "login": "ann"}).sent("mails")
    assert sent.value == {"from": "shop@example.org", "to": "ann"}


# Alone: the reason why the seed has them.


def test_a_responder_is_tested_without_its_handler(flowkit_client: Client, responders: Any) -> None:
    call = flowkit_client.respond_with(responders.Notify, responders.User(1, "bob", registered=False), {})
    assert call.sent("users.notified").value["id"] == 1
    assert call.all_sent("profiles.notified") == []


def test_its_check_is_tested_too(flowkit_client: Client, responders: Any) -> None:
    responders.Notify.respond = lambda self, user, profile: None
    with pytest.raises(
        ResponseMissing, match=r"Notify sent nothing to 'users\.notified', which it declares as required"
    ):
        flowkit_client.respond_with(responders.Notify, None, None)
    assert flowkit_client.direct == []


# Inheritance.


def test_a_subclass_declares_what_its_parent_does_and_more(flowkit_client: Client, responders: Any) -> None:
    call = flowkit_client.respond_with(responders.NotifyAndAudit, responders.User(1, "bob"), {})
    assert [item.topic for item in call.responses] == ["users.notified", "profiles.notified", "audit"]
    assert call.sent("audit").value == "bob was notified"


def test_what_a_subclass_declares_does_not_leak_into_its_parent(responders: Any) -> None:
    """In the seed it did: a parent that had topics already was given those of its children."""
    declared = responders.app.declarations_of
    assert set(declared(responders.Notify)) == {"users.notified", "profiles.notified"}
    assert set(declared(responders.NotifyAndAudit)) == {"users.notified", "profiles.notified", "audit"}


def test_a_subclass_may_declare_a_topic_in_its_own_way() -> None:
    app = make_app()

    @app.responds_to("a")
    @app.responds_to("b")
    class Parent:
        def respond(self) -> None: ...

    @app.responds_to("a", required=False)
    class Child(Parent): ...

    assert {topic: item.required for topic, item in app.declarations_of(Child).items()} == {"a": False, "b": True}
    assert {topic: item.required for topic, item in app.declarations_of(Parent).items()} == {"a": True, "b": True}


# The forms that a responder may have.


def forms(app: Flowkit) -> dict[str, Any]:
    """Responders that all do the same."""

    @app.responds_to("out")
    def function(value: Any) -> None:
        app.respond_to("out", value)

    @functools.wraps(function)
    def wrapped(value: Any) -> None:
        function(value)

    @app.responds_to("out")
    class Respond:
        def respond(self, value: Any) -> None:
            app.respond_to("out", value)

    @app.responds_to("out")
    class Call:
        def __call__(self, value: Any) -> None:
            app.respond_to("out", value)

    class Method:
        @app.responds_to("out")
        def respond(self, value: Any) -> None:
            app.respond_to("out", value)

    class Static:
        @staticmethod
        @app.responds_to("out")
        def respond(value: Any) -> None:
            app.respond_to("out", value)

    class Overriding(Method):
        def respond(self, value: Any) -> None:
            super().respond(value)

    @app.responds_to("out")
    @dataclass
    class Unhashable:
        times: int = 1

        def respond(self, value: Any) -> None:
            app.respond_to("out", value)

    one = Respond()
    one_declared = type("Plain", (), {"respond": lambda self, value: app.respond_to("out", value)})()
    app.add_response(one_declared, "out")
    return {
        "function": function,
        "wrapped function": wrapped,
        "class": Respond,
        "class with __call__": Call,
        "class with a decorated method": Method,
        "class with a static method": Static,
        "class that overrides a decorated method": Overriding,
        "dataclass": Unhashable,
        "object": one,
        "object with __call__": Call(),
        "object that cannot be hashed": Unhashable(2),
        "object that declares for itself": one_declared,
        "method of an object": Method().respond,
    }


FORMS = list(forms(make_app()))


@pytest.mark.parametrize("form", FORMS)
def test_a_responder_may_be_of_many_forms(form: str) -> None:
    app = make_app()
    responder = forms(app)[form]
    app.topic("returned", responder=responder)(lambda value: value)
    app.topic("by.hand", responder=responder)(lambda value: app.respond_with(responder, value))

    client = Client(app)

    assert client.send("returned", 1).sent("out").value == 1
    assert client.send("by.hand", 2).sent("out").value == 2
    assert client.respond_with(responder, 3).sent("out").value == 3


def test_a_class_is_made_anew_for_each_call() -> None:
    """As in the seed: what a responder keeps in itself is of one message."""
    app = make_app()

    @app.responds_to("out")
    class Counting:
        def __init__(self) -> None:
            self.calls = 0

        def respond(self) -> None:
            self.calls += 1
            app.respond_to("out", self.calls)

    client = Client(app)
    assert [client.respond_with(Counting).sent("out").value for _ in range(2)] == [1, 1]


def test_the_parser_of_the_route_writes_what_is_no_text() -> None:
    app = make_app()

    class Shouting:
        parse = staticmethod(bytes.decode)

        @staticmethod
        def generate(value: Any) -> str:
            return f"{value}!".upper()

    @app.responds_to("out", multiple_usage=True)
    def announce(name: str) -> None:
        app.respond_to("out", [name])
        app.respond_to("out", name)

    app.topic("names", parser=Shouting, responder=announce)(lambda name: name)
    call = Client(app).send_raw("names", b"ann")
    assert [item.raw for item in call.responses] == [b"['ANN']!", b"ann"]  # text passes as it is
    assert [item.raw for item in Client(app).respond_with(announce, "ann").responses] == [b'["ann"]', b"ann"]  # JSON


# Mistakes.


class Nothing: ...


class Needs:
    def __init__(self, sender: str) -> None: ...
    def respond(self) -> None: ...


class Coroutine:
    async def respond(self) -> None: ...


@pytest.mark.parametrize(
    ("responder", "text"),
    [
        (Nothing, "has no method `respond`; a responder is a function, or a class that has one"),
        (Needs, "cannot be made without arguments (missing a required argument: 'sender'); make one, and name that"),
        (Coroutine, "is async; a responder is a plain function, which an async handler may call"),
        (Coroutine(), "is async; a responder is a plain function, which an async handler may call"),
        (print, "declares no topic; decorate it with @app.responds_to(...)"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:20],
)
def test_what_cannot_be_a_responder_is_refused_at_start(responder: Any, text: str) -> None:
    app = make_app()
    app.topic("orders", responder=responder)(lambda: None)
    if responder is not print:
        app.add_response(responder if isinstance(responder, type) else type(responder), "out")
    with pytest.raises(ConfigurationError, match=f"the responder .* of topic 'orders' {re.escape(text)}"):
        app.start(connected=False)


def test_an_object_that_cannot_be_hashed_declares_by_its_class() -> None:
    @dataclass
    class Mail:
        def respond(self) -> None: ...

    with pytest.raises(ConfigurationError, match=r"Mail\(\) cannot declare it; let its class do so"):
        make_app().add_response(Mail(), "out")


# The check: the seed's table, where `required: false` let a topic be used twice.


@pytest.mark.parametrize(
    ("required", "multiple", "outcomes"),
    [
        (True, False, [ResponseMissing, None, ResponseRepeated]),
        (True, True, [ResponseMissing, None, None]),
        (False, False, [None, None, ResponseRepeated]),
        (False, True, [None, None, None]),
    ],
)
def test_the_check_of_a_class_is_that_of_a_handler(
    required: bool, multiple: bool, outcomes: list[type[Exception] | None]
) -> None:
    app = make_app()

    @app.responds_to("out", required=required, multiple_usage=multiple)
    class Respond:
        def respond(self, times: int) -> None:
            for _ in range(times):
                app.respond_to("out", {})

    app.topic("orders", responder=Respond)(lambda times: times)
    for times, outcome in enumerate(outcomes):
        call = Client(app).send("orders", times, raise_errors=False)
        assert type(call.error) is (outcome or type(None))
        assert len(call.responses) == (0 if outcome else times)


def test_a_topic_that_is_not_declared_is_refused_with_its_name() -> None:
    app = make_app()

    @app.responds_to("users.notified")
    class Notify:
        def respond(self) -> None:
            app.respond_to("user.notified", {})

    with pytest.raises(
        ResponseUnregistered, match=r"Notify responded to 'user\.notified', which it does not declare"
    ):
        Client(app).respond_with(Notify)


# Where messages go, and outside handlers: on a real broker.


def test_a_responder_outside_handlers_sends(responders: Any) -> None:
    broker = connect(responders.app)
    responders.nightly_report([responders.User(1, "ann"), responders.User(2, "bob")])
    assert [record.key for record in broker.records("users.created")] == [b"1", b"2"]


def test_messages_go_to_the_partitions_that_were_asked_for(kafka: Kafka, topic: MakeTopic) -> None:
    out = topic("placed", partitions=8)
    app = make_app(kafka={"hosts": kafka.hosts})

    @app.responds_to(out, multiple_usage=True)
    class Place:
        def respond(self, login: str) -> None:
            app.respond_to(out, {"how": "partition", "login": login}, partition=3)
            app.respond_to(out, {"how": "partition_key", "login": login}, partition_key=login[0].lower())
            app.respond_to(out, {"how": "key", "login": login}, key=login)

    for login in ("ann", "Anton", "bob", "bea", "ann"):
        app.respond_with(Place, login)  # and it waits: all is there when it returns
    found = [(json.loads(record.value), record) for record in read_topic(kafka.hosts, out, 15)]
    app.producer.close()

    def places(how: str, login: str) -> set[int]:
        return {record.partition for value, record in found if (value["how"], value["login"]) == (how, login)}

    logins = ("ann", "Anton", "bob", "bea")
    assert all(places("partition", login) == {3} for login in logins)
    assert places("partition_key", "ann") == places("partition_key", "Anton")
    assert places("partition_key", "bob") == places("partition_key", "bea")
    assert all(len(places("key", login)) == 1 for login in logins)
    assert {record.key for value, record in found if value["how"] != "key"} == {None}
    assert {record.key for value, record in found if value["how"] == "key"} == {login.encode() for login in logins}


def test_without_a_key_messages_fill_one_partition_after_another(kafka: Kafka, topic: MakeTopic) -> None:
    """Sticky: a batch goes to one partition, the next one to another; one at random for each would send tiny batches."""
    out = topic("sticky", partitions=8)
    app = make_app(kafka={"hosts": kafka.hosts})
    for burst in range(12):
        for number in range(20):
            app.producer.submit(out, {"n": burst * 20 + number})
        app.producer.settle()
    app.producer.close()
    records = read_topic(kafka.hosts, out, 240)
    order = sorted((json.loads(record.value)["n"], record.partition) for record in records)
    changes = sum(left[1] != right[1] for left, right in itertools.pairwise(order))
    assert len({partition for _, partition in order}) > 1
    assert changes < 120  # 210, if each were placed at random
