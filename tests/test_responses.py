"""What a handler may send, and the check of it on every call."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from support import connect, make_app, run

from flowkit import (
    ConfigurationError,
    DeliveryError,
    Flowkit,
    Message,
    ParserError,
    ResponseError,
    ResponseMissing,
    ResponseRepeated,
    ResponseUnregistered,
)
from flowkit.parsers import Json, Raw
from flowkit.responses import Response
from flowkit.testing import Client

OK = None
# required, multiple_usage, and what becomes of a call that sends 0, 1, 2 and 3 times: the table of the design
MATRIX: list[tuple[bool, bool, list[type[Exception] | None]]] = [
    (True, False, [ResponseMissing, OK, ResponseRepeated, ResponseRepeated]),
    (True, True, [ResponseMissing, OK, OK, OK]),
    (False, False, [OK, OK, ResponseRepeated, ResponseRepeated]),
    (False, True, [OK, OK, OK, OK]),
]
CASES = [
    pytest.param(required, multiple, count, outcome, id=f"{required=}, {multiple=}, sends {count}")
    for required, multiple, outcomes in MATRIX
    for count, outcome in enumerate(outcomes)
]
ROUTES: list[Any] = [pytest.param(True, id="inline"), pytest.param(False, id="queued")]


class Boom(Exception):
    """What a handler raises itself."""


@pytest.fixture
def app() -> Flowkit:
    return make_app()


def send_times(app: Flowkit, count: int) -> None:
    for number in range(count):
        app.respond_to("invoices", {"number": number})


@pytest.mark.parametrize("inline", ROUTES)
@pytest.mark.parametrize(("required", "multiple", "count", "outcome"), CASES)
def test_a_handler_that_returns_is_checked(
    app: Flowkit, inline: bool, required: bool, multiple: bool, count: int, outcome: type[Exception] | None
) -> None:
    @app.topic("orders", inline=inline)
    @app.responds_to("invoices", required=required, multiple_usage=multiple)
    def bill() -> None:
        send_times(app, count)

    call = Client(app).send("orders", {}, raise_errors=False)

    assert type(call.error) is (outcome or type(None))
    assert len(call.responses) == (0 if outcome else count)


@pytest.mark.parametrize("inline", ROUTES)
@pytest.mark.parametrize(("required", "multiple", "count", "outcome"), CASES)
def test_a_handler_that_raises_is_not_checked_and_sends_nothing(
    app: Flowkit, inline: bool, required: bool, multiple: bool, count: int, outcome: type[Exception] | None
) -> None:
    @app.topic("orders", inline=inline)
    @app.responds_to("invoices", required=required, multiple_usage=multiple)
    def bill() -> None:
        send_times(app, count)
        raise Boom

    call = Client(app).send("orders", {}, raise_errors=False)

    assert type(call.error) is Boom
    assert call.responses == []


@pytest.mark.parametrize("inline", ROUTES)
@pytest.mark.parametrize(("required", "multiple", "count", "outcome"), CASES)
def test_a_handler_that_aborts_is_not_checked_and_sends_nothing(
    app: Flowkit, inline: bool, required: bool, multiple: bool, count: int, outcome: type[Exception] | None
) -> None:
    @app.topic("orders", inline=inline)
    @app.responds_to("invoices", required=required, multiple_usage=multiple)
    def bill() -> None:
        send_times(app, count)
        app.abort()

    call = Client(app).send("orders", {})

    assert call.aborted
    assert call.responses == []


@pytest.mark.parametrize(("required", "multiple", "count", "outcome"), CASES)
def test_an_async_handler_is_checked_alike(
    app: Flowkit, required: bool, multiple: bool, count: int, outcome: type[Exception] | None
) -> None:
    @app.topic("orders")
    @app.responds_to("invoices", required=required, multiple_usage=multiple)
    async def bill() -> None:
        send_times(app, count)

    call = Client(app).send("orders", {}, raise_errors=False)

    assert type(call.error) is (outcome or type(None))


@pytest.mark.parametrize(("required", "multiple", "count", "outcome"), CASES)
def test_a_responder_is_checked_alike(
    app: Flowkit, required: bool, multiple: bool, count: int, outcome: type[Exception] | None
) -> None:
    @app.responds_to("invoices", required=required, multiple_usage=multiple)
    def announce(_: int) -> None:
        send_times(app, count)

    @app.topic("orders", responder=announce)
    def bill() -> int:
        return 1

    call = Client(app).send("orders", {}, raise_errors=False)

    assert type(call.error) is (outcome or type(None))
    assert len(call.responses) == (0 if outcome else count)


@pytest.mark.parametrize(("required", "multiple", "count", "outcome"), CASES)
def test_the_check_is_the_same_in_the_consumer(
    app: Flowkit, required: bool, multiple: bool, count: int, outcome: type[Exception] | None
) -> None:
    @app.topic("orders")
    @app.responds_to("invoices", required=required, multiple_usage=multiple)
    def bill() -> None:
        send_times(app, count)

    done, error, sent = run(app, b"{}")

    assert (done, type(error)) == (0 if outcome else 1, outcome or type(None))
    assert len(sent) == (0 if outcome else count)


def test_each_topic_is_checked_for_itself(app: Flowkit) -> None:
    @app.topic("orders")
    @app.responds_to("invoices", multiple_usage=True)
    @app.responds_to("alerts")
    def bill() -> None:
        send_times(app, 2)

    with pytest.raises(ResponseMissing, match="bill sent nothing to 'alerts', which it declares as required"):
        Client(app).send("orders", {})


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "bill sent nothing to 'invoices', which it declares as required; respond to it on every path, or declare"
            " it with required=False"),
        (2, "bill sent 2 messages to 'invoices', which it declares for one; send one, or declare it with"
            " multiple_usage=True"),
    ],
)  # fmt: skip
def test_a_failed_check_says_what_to_do(app: Flowkit, count: int, text: str) -> None:
    def bill() -> None:
        send_times(app, count)

    bill.__qualname__ = "bill"
    app.add_topic("orders", bill)
    app.add_response(bill, "invoices")

    with pytest.raises(ResponseError, match=re.escape(text)):
        Client(app).send("orders", {})


def test_a_check_starts_anew_with_each_message(app: Flowkit) -> None:
    @app.topic("orders")
    @app.responds_to("invoices")
    def bill(order: Any) -> None:
        if order != "twice":
            send_times(app, 1)
        else:
            send_times(app, 2)

    client = Client(app)

    for _ in range(3):
        assert len(client.send("orders", "once").responses) == 1
        with pytest.raises(ResponseRepeated):
            client.send("orders", "twice")


@pytest.mark.parametrize("inline", ROUTES)
@pytest.mark.parametrize("declared", [[], ["alerts"], ["alerts", "parcels"]], ids=str)
def test_a_topic_that_was_not_declared_is_refused_at_the_call(
    app: Flowkit, inline: bool, declared: list[str]
) -> None:
    reached: list[str] = []

    @app.topic("orders", inline=inline)
    def bill() -> None:
        for topic in declared:
            app.respond_to(topic, {})
        reached.append("before")
        app.respond_to("invoices", {})
        reached.append("after")

    for topic in declared:
        app.add_response(bill, topic)

    call = Client(app).send("orders", {}, raise_errors=False)

    assert set(reached) == {"before"}
    assert type(call.error) is ResponseUnregistered
    assert call.responses == []
    assert "bill responded to 'invoices', which it does not declare" in str(call.error)
    assert "add @app.responds_to('invoices')" in str(call.error)
    assert all(topic in str(call.error) for topic in declared)


def test_a_handler_without_declarations_is_refused_in_the_consumer_too(app: Flowkit) -> None:
    @app.topic("orders")
    def bill(order: Any) -> None:
        app.respond_to("invoices", order)

    done, error, sent = run(app, b"{}")

    assert (done, type(error), sent) == (0, ResponseUnregistered, [])


def test_a_handler_may_go_on_after_an_unregistered_response(app: Flowkit) -> None:
    @app.topic("orders")
    @app.responds_to("invoices")
    def bill() -> None:
        with pytest.raises(ResponseUnregistered):
            app.respond_to("alerts", {})
        app.respond_to("invoices", {})

    assert [item.topic for item in Client(app).send("orders", {}).responses] == ["invoices"]


def test_responses_keep_their_order(app: Flowkit) -> None:
    @app.topic("orders")
    @app.responds_to("a", multiple_usage=True)
    @app.responds_to("b")
    def bill() -> None:
        app.respond_to("a", 1)
        app.respond_to("b", 2)
        app.respond_to("a", 3)

    call = Client(app).send("orders", {})

    assert [(item.topic, item.value) for item in call.responses] == [("a", 1), ("b", 2), ("a", 3)]


def test_a_response_is_written_when_it_is_made(app: Flowkit) -> None:
    """What is done to an object afterwards is not sent."""

    @app.topic("orders")
    @app.responds_to("invoices")
    def bill() -> None:
        invoice = {"total": 1}
        app.respond_to("invoices", invoice)
        invoice["total"] = 2

    assert Client(app).send("orders", {}).sent("invoices").value == {"total": 1}


def test_outside_a_call_respond_to_says_what_to_use(app: Flowkit) -> None:
    with pytest.raises(ResponseError, match=re.escape("there is none here")) as caught:
        app.respond_to("invoices", {})
    assert "app.respond_with(responder, ...)" in str(caught.value)
    assert "app.producer.send(topic, value)" in str(caught.value)


def test_after_a_call_there_is_none_any_more(app: Flowkit) -> None:
    @app.topic("orders")
    @app.responds_to("invoices")
    def bill(order: Any) -> None:
        app.respond_to("invoices", order)
        if order == "bad":
            raise Boom

    run(app, b'"good"', b'"bad"')

    with pytest.raises(ResponseError, match="there is none here"):
        app.respond_to("invoices", {})


# One response.


def respond(app: Flowkit, data: Any = "x", **options: Any) -> Response:
    """The response as the producer gets it."""

    @app.topic("orders")
    @app.responds_to("invoices")
    def bill() -> None:
        app.respond_to("invoices", data, **options)

    _, error, sent = run(app, b"{}")
    if error is not None:
        raise error
    return sent[0]


@pytest.mark.parametrize(
    ("data", "value"),
    [
        ({"a": 1}, b'{"a":1}'),
        ([1], b"[1]"),
        (7, b"7"),
        (True, b"true"),
        ("text as it is", b"text as it is"),
        ("ä", "ä".encode()),
        ("", b""),
        (b"\xff\x00", b"\xff\x00"),
        (None, None),
    ],
    ids=repr,
)
def test_data_goes_through_the_parser_but_text_and_bytes_do_not(app: Flowkit, data: Any, value: bytes | None) -> None:
    assert respond(app, data).value == value


@pytest.mark.parametrize("written", ["text", b"bytes", bytearray(b"array")], ids=repr)
def test_a_parser_may_write_text_or_bytes(app: Flowkit, written: Any) -> None:
    class Parser:
        parse = staticmethod(bytes)

        @staticmethod
        def generate(value: Any) -> Any:
            return written

    @app.topic("orders", parser=Parser)
    @app.responds_to("invoices")
    def bill() -> None:
        app.respond_to("invoices", {})

    assert run(app, b"{}")[2][0].value == (written.encode() if isinstance(written, str) else bytes(written))


def test_data_that_the_parser_cannot_write_fails_at_the_call(app: Flowkit) -> None:
    with pytest.raises(ParserError, match="object cannot be written as JSON"):
        respond(app, object())


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({}, {}),
        ({"key": "ann"}, {"key": b"ann"}),
        ({"key": b"\xff"}, {"key": b"\xff"}),
        ({"key": ""}, {"key": b""}),
        ({"partition": 0}, {"partition": 0}),
        ({"partition": 7, "key": "ann"}, {"partition": 7, "key": b"ann"}),
        ({"partition_key": "ä"}, {"partition_key": "ä".encode()}),
        ({"partition_key": b"a", "key": "b"}, {"partition_key": b"a", "key": b"b"}),
        ({"headers": {"a": "1", "b": b"2", "c": None}}, {"headers": (("a", b"1"), ("b", b"2"), ("c", None))}),
        ({"headers": [("a", "1"), ("a", "2")]}, {"headers": (("a", b"1"), ("a", b"2"))}),
        ({"headers": [["a", "1"]]}, {"headers": (("a", b"1"),)}),
        ({"headers": {}}, {}),
        ({"headers": []}, {}),
        ({"headers": None}, {}),
    ],
    ids=str,
)
def test_a_response_goes_where_it_was_sent(app: Flowkit, options: dict[str, Any], fields: dict[str, Any]) -> None:
    assert respond(app, **options) == Response("invoices", b"x", parser=Json, **fields)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"key": 7}, "invoices: key is text or bytes, not int; try key=str(...)"),
        ({"key": {}}, "invoices: key is text or bytes, not dict; try key=str(...)"),
        ({"partition_key": 7}, "invoices: partition_key is text or bytes, not int; try partition_key=str(...)"),
        ({"partition": -1}, "invoices: partition is a number of at least 0, not -1"),
        ({"partition": "0"}, "invoices: partition is a number of at least 0, not '0'"),
        ({"partition": True}, "invoices: partition is a number of at least 0, not True"),
        ({"partition": 1.0}, "invoices: partition is a number of at least 0, not 1.0"),
        ({"partition": 0, "partition_key": "a"}, "invoices: give partition or partition_key, not both"),
        ({"headers": "text"}, "invoices: headers are a dict or a list of (name, value), not 'text'"),
        ({"headers": b"bytes"}, "invoices: headers are a dict or a list of (name, value), not b'bytes'"),
        ({"headers": ["ab"]}, "invoices: headers are a dict or a list of (name, value), not ['ab']"),
        ({"headers": [("a",)]}, "invoices: headers are a dict or a list of (name, value), not [('a',)]"),
        ({"headers": {1: "a"}}, "invoices: headers are a dict or a list of (name, value), not {1: 'a'}"),
        ({"headers": 7}, "invoices: headers are a dict or a list of (name, value), not 7"),
        ({"headers": {"a": 1}}, "invoices: header 'a' is text or bytes, not int"),
    ],
    ids=str,
)
def test_what_a_response_cannot_have_is_refused_at_the_call(app: Flowkit, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ResponseError, match=re.escape(text)):
        respond(app, **options)


def test_the_headers_of_a_message_can_be_passed_on(app: Flowkit) -> None:
    @app.topic("orders")
    @app.responds_to("invoices")
    def bill(message: Message) -> None:
        app.respond_to("invoices", {}, headers=message.headers)

    assert run(app, b"{}")[2][0].headers == (("trace", b"1"), ("trace", b"2"))


# The returned value.


@pytest.mark.parametrize("inline", ROUTES)
@pytest.mark.parametrize(
    ("value", "written"),
    [
        ({"a": 1}, b'{"a":1}'),
        ("text", b"text"),
        (b"\xff", b"\xff"),
        (0, b"0"),
        (False, b"false"),
        ([], b"[]"),
        ("", b""),
    ],
    ids=repr,
)
def test_the_returned_value_is_the_response_of_a_handler_with_one_topic(
    app: Flowkit, inline: bool, value: Any, written: bytes
) -> None:
    @app.topic("orders", inline=inline)
    @app.responds_to("invoices")
    def bill() -> Any:
        return value

    assert Client(app).send("orders", {}).sent("invoices").raw == written


def test_a_returned_none_is_no_response(app: Flowkit) -> None:
    @app.topic("orders")
    @app.responds_to("invoices")
    def bill() -> None:
        return None

    with pytest.raises(ResponseMissing):
        Client(app).send("orders", {})


def test_a_returned_value_counts_in_the_check(app: Flowkit) -> None:
    @app.topic("orders")
    @app.responds_to("invoices")
    def bill() -> dict[str, int]:
        app.respond_to("invoices", {})
        return {}

    with pytest.raises(ResponseRepeated):
        Client(app).send("orders", {})


def test_a_returned_value_comes_after_what_was_sent_before(app: Flowkit) -> None:
    @app.topic("orders")
    @app.responds_to("invoices", multiple_usage=True)
    def bill() -> int:
        app.respond_to("invoices", 1)
        return 2

    assert [item.value for item in Client(app).send("orders", {}).responses] == [1, 2]


def test_a_returned_value_of_a_handler_with_two_topics_has_nowhere_to_go(app: Flowkit) -> None:
    @app.topic("orders")
    @app.responds_to("alerts", required=False)
    @app.responds_to("invoices", required=False)
    def bill() -> int:
        return 1

    with pytest.raises(
        ResponseError, match=r"bill returned a value, but declares 2 topics \(invoices, alerts\)"
    ) as e:
        Client(app).send("orders", {})
    assert "app.respond_to(topic, value)" in str(e.value)


def test_a_returned_value_of_a_handler_that_declares_nothing_is_nobodys_business(app: Flowkit) -> None:
    @app.topic("orders")
    def bill() -> int:
        return 1

    assert Client(app).send("orders", {}).responses == []
    assert run(app, b"{}") == (1, None, [])


# Responders kept apart.


def announcer(app: Flowkit, **declared: bool) -> Callable[[Any], None]:
    @app.responds_to("parcels", **declared)
    def announce(order: Any) -> None:
        app.respond_to("parcels", {"order": order}, key=str(order))

    return announce


@pytest.mark.parametrize("inline", ROUTES)
def test_a_responder_is_called_with_the_returned_value(app: Flowkit, inline: bool) -> None:
    @app.topic("orders", responder=announcer(app), inline=inline)
    def pack() -> int:
        return 7

    sent = Client(app).send("orders", {}).sent("parcels")

    assert (sent.value, sent.key) == ({"order": 7}, "7")


@pytest.mark.parametrize("inline", ROUTES)
def test_a_responder_is_called_by_respond_with(app: Flowkit, inline: bool) -> None:
    announce = announcer(app)

    @app.topic("orders", responder=announce, inline=inline)
    def pack() -> None:
        app.respond_with(announce, 7)

    assert Client(app).send("orders", {}).sent("parcels").value == {"order": 7}


@pytest.mark.parametrize("value", [0, "", [], False], ids=repr)
def test_any_value_but_none_calls_the_responder(app: Flowkit, value: Any) -> None:
    @app.topic("orders", responder=announcer(app))
    def pack() -> Any:
        return value

    assert Client(app).send("orders", {}).sent("parcels").value == {"order": value}


def test_a_responder_that_was_not_used_though_required_is_missing(app: Flowkit) -> None:
    @app.topic("orders", responder=announcer(app))
    def pack() -> None: ...

    with pytest.raises(ResponseMissing, match="pack returned nothing, so its responder was not called") as caught:
        Client(app).send("orders", {})
    assert "declares 'parcels' as required" in str(caught.value)
    assert "return a value, call app.respond_with(...), or declare required=False" in str(caught.value)


def test_another_responder_does_not_stand_in_for_the_one_of_the_route(app: Flowkit) -> None:
    @app.responds_to("news")
    def tell() -> None:
        app.respond_to("news", {})

    @app.topic("orders", responder=announcer(app))
    def pack() -> None:
        app.respond_with(tell)

    with pytest.raises(ResponseMissing, match="declares 'parcels' as required"):
        Client(app).send("orders", {})


def test_an_optional_responder_may_stay_unused(app: Flowkit) -> None:
    @app.topic("orders", responder=announcer(app, required=False))
    def pack() -> None: ...

    assert Client(app).send("orders", {}).responses == []


def test_a_failing_handler_is_not_told_of_its_unused_responder(app: Flowkit) -> None:
    @app.topic("orders", responder=announcer(app))
    def pack() -> None:
        raise Boom

    with pytest.raises(Boom):
        Client(app).send("orders", {})


def test_each_call_of_a_responder_is_checked_for_itself(app: Flowkit) -> None:
    announce = announcer(app)

    @app.topic("orders", responder=announce)
    def pack() -> int:
        app.respond_with(announce, 1)
        return 2

    assert [item.value for item in Client(app).send("orders", {}).responses] == [{"order": 1}, {"order": 2}]


def test_a_responder_has_its_own_declarations_only(app: Flowkit) -> None:
    @app.responds_to("parcels", required=False)
    def announce(_: Any) -> None:
        app.respond_to("invoices", {})

    @app.topic("orders", responder=announce)
    @app.responds_to("invoices", required=False)
    def pack() -> int:
        return 1

    with pytest.raises(ResponseUnregistered, match="announce responded to 'invoices'"):
        Client(app).send("orders", {})


def test_a_handler_may_respond_itself_and_by_a_responder(app: Flowkit) -> None:
    announce = announcer(app)

    @app.topic("orders")
    @app.responds_to("invoices")
    def pack() -> None:
        app.respond_to("invoices", {})
        app.respond_with(announce, 1)

    assert [item.topic for item in Client(app).send("orders", {}).responses] == ["invoices", "parcels"]


def test_a_handler_that_declares_nothing_may_use_a_responder(app: Flowkit) -> None:
    announce = announcer(app)

    @app.topic("orders")
    def pack(order: Any) -> None:
        app.respond_with(announce, order)
        if order == "bad":
            raise Boom
        if order == "abort":
            app.abort()

    assert Client(app).send("orders", 7).sent("parcels").value == {"order": 7}

    done, error, sent = run(app, b"1", b'"abort"', b"2", b'"bad"')
    assert (done, type(error)) == (3, Boom)
    assert [json.loads(item.value or b"") for item in sent] == [{"order": 1}, {"order": 2}]
    assert run(app, b"3")[2] == [Response("parcels", b'{"order":3}', b"3", parser=Json)]


def test_what_a_failing_handler_sent_by_a_responder_is_not_sent(app: Flowkit) -> None:
    announce = announcer(app)

    @app.topic("orders")
    @app.responds_to("invoices")
    def pack() -> None:
        app.respond_with(announce, 1)

    call = Client(app).send("orders", {}, raise_errors=False)

    assert type(call.error) is ResponseMissing
    assert call.responses == []


def test_a_responder_that_raises_sends_nothing_and_leaves_the_call_as_it_was(app: Flowkit) -> None:
    @app.responds_to("parcels")
    def announce() -> None:
        app.respond_to("parcels", {})
        raise Boom

    @app.topic("orders")
    @app.responds_to("invoices")
    def pack() -> None:
        with pytest.raises(Boom):
            app.respond_with(announce)
        app.respond_to("invoices", {})

    assert [item.topic for item in Client(app).send("orders", {}).responses] == ["invoices"]


def test_a_responder_takes_whatever_it_is_given(app: Flowkit) -> None:
    @app.responds_to("parcels")
    def announce(a: int, b: int = 2, *rest: int) -> None:
        app.respond_to("parcels", [a, b, *rest])

    @app.topic("orders")
    def pack() -> None:
        app.respond_with(announce, 1)
        app.respond_with(announce, 1, 3, 4)

    assert [item.value for item in Client(app).send("orders", {}).responses] == [[1, 2], [1, 3, 4]]


def test_a_responder_may_be_a_method(app: Flowkit) -> None:
    class Desk:
        def announce(self, order: Any) -> None:
            app.respond_to("parcels", {"order": order})

    desk = Desk()
    app.add_response(desk.announce, "parcels")

    @app.topic("orders", responder=desk.announce)
    def pack() -> None:
        app.respond_with(desk.announce, 7)

    assert Client(app).send("orders", {}).sent("parcels").value == {"order": 7}


def test_the_parser_of_the_route_writes_for_its_responder(app: Flowkit) -> None:
    announce = announcer(app)

    @app.topic("orders", responder=announce, parser=Raw)
    def pack() -> int:
        return 7

    with pytest.raises(ParserError, match="the raw parser sends bytes, not dict"):
        Client(app).send_raw("orders", b"")


def test_a_responder_that_declares_nothing_is_refused_when_the_application_starts(app: Flowkit) -> None:
    def announce() -> None: ...

    app.add_topic("orders", print, responder=announce)

    with pytest.raises(ConfigurationError, match="announce of topic 'orders' declares no topic; decorate it with"):
        app.start(connected=False)


def test_a_responder_without_a_name_is_refused_alike(app: Flowkit) -> None:
    app.add_topic("orders", print, responder=functools.partial(print))

    with pytest.raises(ConfigurationError, match="declares no topic; decorate it with"):
        app.start(connected=False)


def test_respond_with_refuses_a_function_that_declares_nothing(app: Flowkit) -> None:
    with pytest.raises(ConfigurationError, match=r"print declares no topic; decorate it with @app\.responds_to"):
        app.respond_with(print)


def test_a_coroutine_function_cannot_be_a_responder(app: Flowkit) -> None:
    @app.responds_to("parcels", required=False)
    async def announce() -> None:
        app.respond_to("parcels", {})

    with pytest.raises(ConfigurationError, match="announce is async; a responder is a plain function"):
        app.respond_with(announce)


# Outside a handler a responder sends, and waits.


def test_outside_a_handler_a_responder_sends(app: Flowkit) -> None:
    broker = connect(app)

    app.respond_with(announcer(app), 7)

    [record] = broker.records("parcels")
    assert (record.key, record.value) == (b"7", b'{"order":7}')


def test_outside_a_handler_a_responder_is_checked_before_anything_is_sent(app: Flowkit) -> None:
    broker = connect(app)

    @app.responds_to("parcels")
    def announce() -> None:
        app.respond_to("parcels", 1)
        app.respond_to("parcels", 2)

    with pytest.raises(ResponseRepeated):
        app.respond_with(announce)
    assert broker.records("parcels") == []


def test_outside_a_handler_a_refused_delivery_is_an_error(app: Flowkit) -> None:
    broker = connect(app)
    broker.refuse = OSError("disk full")

    with pytest.raises(DeliveryError, match="parcels: Kafka did not take the message: OSError"):
        app.respond_with(announcer(app), 7)


def test_a_responder_may_use_another(app: Flowkit) -> None:
    broker = connect(app)
    announce = announcer(app)

    @app.responds_to("invoices")
    def both(order: int) -> None:
        app.respond_to("invoices", order)
        app.respond_with(announce, order)

    app.respond_with(both, 7)

    assert len(broker.records("invoices")) == len(broker.records("parcels")) == 1


@pytest.mark.parametrize("inline", ROUTES)
def test_a_hook_may_use_a_responder(app: Flowkit, inline: bool) -> None:
    """Queued, it sends at once; inline, with what the handler sends."""
    announce = announcer(app)
    app.add_topic("orders", print, inline=inline)

    @app.before_enqueue
    def triage(order: Any) -> None:
        app.respond_with(announce, order)

    if inline:
        assert run(app, b"7") == (1, None, [Response("parcels", b'{"order":7}', b"7", parser=Json)])
    call = Client(app).send("orders", 7)
    assert call.sent("parcels").value == {"order": 7}
    assert (len(call.responses), len(call.direct)) == ((1, 0) if inline else (0, 1))


@pytest.mark.parametrize("inline", ROUTES)
def test_a_hook_cannot_answer_for_the_handler(app: Flowkit, inline: bool) -> None:
    @app.topic("orders", inline=inline)
    @app.responds_to("invoices")
    def bill() -> int:
        return 1

    @app.before_enqueue
    def triage() -> None:
        app.respond_to("invoices", {})

    with pytest.raises(ResponseError):
        Client(app).send("orders", {})
