"""The client that users test their handlers with."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from support import make_app

from flowkit import (
    Flowkit,
    Message,
    ParserError,
    PayloadError,
    QueueError,
    ResponseError,
    ResponseMissing,
    ResponseUnregistered,
    Retry,
    RouteNotFound,
)
from flowkit.parsers import Raw
from flowkit.testing import Client

ROUTES: list[Any] = [pytest.param(True, id="inline"), pytest.param(False, id="queued")]


@dataclass
class Order:
    id: int
    user: str
    total: float


class Boom(Exception):
    """What a handler raises itself."""


@pytest.fixture
def app() -> Flowkit:
    """The application of the design's first page; its orders are queued, invoices and alerts are its own."""
    app = Flowkit("shop")

    @app.topic("orders", retry=Retry(attempts=3, first=3600), dead_letter="orders.dead")
    @app.responds_to("invoices")
    @app.responds_to("alerts", required=False, multiple_usage=True)
    def bill(order: Order, message: Message) -> None:
        if order.total < 0:
            raise Boom("a negative total")
        app.respond_to("invoices", {"order": order.id}, key=order.user, headers={"by": "bill"})
        if order.total > 1000:
            app.respond_to("alerts", order, partition_key=order.user[0])

    @app.before_enqueue("orders")
    def triage(order: Order, message: Message) -> None:
        if order.total == 0:
            app.abort()
        message.queue = "express" if order.total > 1000 else "default"

    return app


@pytest.fixture
def flowkit_app(app: Flowkit) -> Flowkit:
    return app


def order(total: float) -> dict[str, Any]:
    return {"id": 7, "user": "ann", "total": total}


# The design's own example.


def test_a_big_order_raises_an_alert(flowkit_client: Client) -> None:
    call = flowkit_client.send("orders", {"id": 7, "user": "ann", "total": 2000.0}, key="ann")

    assert call.sent("invoices").value == {"order": 7}
    assert call.sent("alerts").partition_key == "a"


def test_a_call_tells_what_became_of_the_message(app: Flowkit) -> None:
    call = Client(app).send("orders", order(2000))

    assert [item.topic for item in call.responses] == ["invoices", "alerts"]
    assert (call.topic, call.queue, call.attempts) == ("orders", "express", 1)
    assert (call.aborted, call.error, call.dead_letter, call.worker) == (False, None, None, None)
    assert call.followed == []
    assert repr(call) == "<Call orders: 2 responses, error=None, aborted=False>"


def test_what_was_sent_reads_as_text_where_it_is_text(app: Flowkit) -> None:
    sent = Client(app).send("orders", order(1)).sent("invoices")

    assert (sent.topic, sent.key, sent.partition, sent.partition_key) == ("invoices", "ann", None, None)
    assert (sent.raw, sent.value) == (b'{"order":7}', {"order": 7})
    assert dict(sent.headers) == {"by": b"bill"}
    assert repr(sent) == "<Sent invoices key='ann' b'{\"order\":7}'>"


def test_what_is_not_text_stays_bytes() -> None:
    app = make_app()

    @app.topic("orders")
    @app.responds_to("invoices")
    def bill() -> None:
        app.respond_to("invoices", b"\xff", key=b"\xfe", partition_key=b"\xfd")

    sent = Client(app).send("orders", {}).sent("invoices")

    assert (sent.value, sent.raw, sent.key, sent.partition_key) == (b"\xff", b"\xff", b"\xfe", b"\xfd")


def test_a_tombstone_was_sent_as_none() -> None:
    app = make_app()

    @app.topic("orders")
    @app.responds_to("invoices")
    def bill() -> None:
        app.respond_to("invoices", None, key="ann")

    sent = Client(app).send("orders", {}).sent("invoices")

    assert (sent.value, sent.raw, sent.key) == (None, None, "ann")


def test_an_aborted_message_sent_nothing(app: Flowkit) -> None:
    call = Client(app).send("orders", order(0))

    assert (call.aborted, call.responses, call.queue, call.error) == (True, [], None, None)


# sent()


@pytest.mark.parametrize(
    ("total", "topic", "text"),
    [
        (1, "alerts", "expected one message to 'alerts', found 0; sent was: invoices b'{\"order\":7}'"),
        (0, "invoices", "expected one message to 'invoices', found 0; sent was: nothing; it was aborted"),
        (-1, "invoices", "found 0; sent was: nothing; the call failed: Boom('a negative total')"),
    ],
)
def test_sent_fails_with_what_was_sent_instead(app: Flowkit, total: float, topic: str, text: str) -> None:
    call = Client(app).send("orders", order(total), raise_errors=False)

    with pytest.raises(AssertionError, match=re.escape(text)):
        call.sent(topic)


def test_sent_is_exactly_one() -> None:
    app = make_app()

    @app.topic("orders")
    @app.responds_to("invoices", multiple_usage=True)
    def bill() -> None:
        app.respond_to("invoices", 1)
        app.respond_to("invoices", 2)

    call = Client(app).send("orders", {})

    with pytest.raises(
        AssertionError, match="expected one message to 'invoices', found 2; sent was: invoices b'1', in"
    ):
        call.sent("invoices")
    assert [item.value for item in call.all_sent("invoices")] == [1, 2]


# Values in.


@pytest.mark.parametrize("inline", ROUTES)
@pytest.mark.parametrize("value", [{"a": [1]}, [1], 7, 0, "text", "", '{"a": 1}', True, None, 1.5], ids=repr)
def test_a_value_arrives_as_it_was_sent(inline: bool, value: Any) -> None:
    app, kept = make_app(inline=inline), []
    app.add_topic("orders", lambda order: kept.append(order))

    Client(app).send("orders", value)

    assert kept == [value]


def test_a_dataclass_arrives_as_its_json(app: Flowkit) -> None:
    assert Client(app).send("orders", Order(7, "ann", 1.0)).sent("invoices").key == "ann"


@pytest.mark.parametrize("inline", ROUTES)
def test_a_value_is_written_by_the_routes_parser(inline: bool) -> None:
    class Pairs:
        @staticmethod
        def parse(data: bytes) -> dict[str, str]:
            return dict(part.split("=") for part in data.decode().split(";"))

        @staticmethod
        def generate(value: Mapping[str, Any]) -> str:
            return ";".join(f"{name}={item}" for name, item in value.items())

    app, kept = make_app(inline=inline), []

    @app.topic("orders", parser=Pairs)
    @app.responds_to("invoices")
    def bill(order: Any, message: Message) -> dict[str, int]:
        kept.append((order, message.value))
        return {"total": 7}

    call = Client(app).send("orders", {"a": 1, "b": 2})

    assert kept == [({"a": "1", "b": "2"}, b"a=1;b=2")]
    assert (call.sent("invoices").raw, call.sent("invoices").value) == (b"total=7", {"total": "7"})


def test_a_value_that_the_parser_cannot_write_is_an_error_of_the_test() -> None:
    app = make_app()
    app.add_topic("orders", print)

    with pytest.raises(ParserError, match="object cannot be written as JSON"):
        Client(app).send("orders", object())


@pytest.mark.parametrize("inline", ROUTES)
@pytest.mark.parametrize("value", [b"", b"\xff\x00", b"not JSON", bytes(range(256))], ids=lambda v: repr(v)[:20])
def test_raw_bytes_arrive_as_they_are(inline: bool, value: bytes) -> None:
    app, kept = make_app(inline=inline), []

    @app.topic("orders")
    def bill(message: Message) -> None:
        kept.append((message.value, message.key))

    Client(app).send_raw("orders", value, key="ann")

    assert kept == [(value, b"ann")]


@pytest.mark.parametrize("inline", ROUTES)
def test_raw_bytes_that_no_typed_handler_can_take(app: Flowkit, inline: bool) -> None:
    with pytest.raises(PayloadError):
        Client(app).send_raw("orders", b"not JSON")

    call = Client(app).send_raw("orders", b"not JSON", raise_errors=False)

    assert isinstance(call.error, PayloadError)
    assert call.dead_letter is not None
    assert call.dead_letter.raw == b"not JSON"


def test_a_batch_is_sent_in_order(app: Flowkit) -> None:
    calls = Client(app).send_batch("orders", [order(1), order(0), order(2000)], key="ann")

    assert [len(call.responses) for call in calls] == [1, 0, 2]
    assert [call.aborted for call in calls] == [False, True, False]


@pytest.mark.parametrize("inline", ROUTES)
def test_key_headers_partition_and_timestamp_arrive(inline: bool) -> None:
    app, kept = make_app(inline=inline), []

    @app.topic("orders")
    def bill(message: Message) -> None:
        kept.append((message.key, message.headers.pairs, message.partition, message.timestamp, message.group))

    Client(app).send(
        "orders", {}, key=b"\xff", headers=[("a", "1"), ("a", None)], partition=3, timestamp=1_700_000_000.123
    )

    at = datetime.datetime(2023, 11, 14, 22, 13, 20, 123000, tzinfo=datetime.UTC)
    assert kept == [(b"\xff", (("a", b"1"), ("a", None)), 3, at, "shop_orders")]


@pytest.mark.parametrize("inline", ROUTES)
def test_a_message_is_of_now_if_not_said_otherwise(inline: bool) -> None:
    app, kept = make_app(inline=inline), []

    @app.topic("orders")
    def bill(message: Message) -> None:
        kept.extend([message.timestamp.timestamp(), message.received_at.timestamp()])

    before = time.time()
    Client(app).send("orders", {})

    assert all(before - 0.01 <= moment <= time.time() for moment in kept)


def test_offsets_count_up_in_each_partition() -> None:
    app, kept = make_app(), []

    @app.topic("orders")
    @app.topic("invoices")
    def look(message: Message) -> None:
        kept.append((message.topic, message.partition, message.offset))

    client = Client(app)
    client.send("orders", {})
    client.send("orders", {})
    client.send("orders", {}, partition=1)
    client.send("invoices", {})

    assert kept == [("orders", 0, 0), ("orders", 0, 1), ("orders", 1, 0), ("invoices", 0, 0)]


@pytest.mark.parametrize("options", [{"key": 7}, {"headers": 7}, {"partition": -1}], ids=str)
def test_what_a_message_cannot_have_is_refused(app: Flowkit, options: Any) -> None:
    with pytest.raises(ResponseError):
        Client(app).send("orders", order(1), **options)


def test_a_topic_that_nobody_handles_is_an_error_of_the_test(app: Flowkit) -> None:
    with pytest.raises(RouteNotFound, match="no handler is registered for topic 'ordres'; known are: orders"):
        Client(app).send("ordres", {})


# Errors.


@pytest.mark.parametrize("inline", ROUTES)
def test_what_a_handler_raises_comes_out(inline: bool) -> None:
    app = make_app(inline=inline)
    error = Boom()
    calls: list[int] = []

    @app.topic("orders", retry=3)
    def bill() -> None:
        calls.append(1)
        raise error

    with pytest.raises(Boom) as caught:
        Client(app).send("orders", {})
    assert caught.value is error
    assert calls == [1]
    assert any(entry.name == "bill" for entry in caught.traceback)


@pytest.mark.parametrize(("respond", "error"), [(None, ResponseMissing), ("alerts", ResponseUnregistered)])
@pytest.mark.parametrize("inline", ROUTES)
def test_what_the_check_raises_comes_out(inline: bool, respond: str | None, error: type[Exception]) -> None:
    app = make_app(inline=inline)

    @app.topic("orders")
    @app.responds_to("invoices")
    def bill() -> None:
        if respond:
            app.respond_to(respond, {})

    with pytest.raises(error):
        Client(app).send("orders", {})


@pytest.mark.parametrize("inline", ROUTES)
def test_without_raising_a_message_is_tried_again_as_in_production_but_without_waiting(inline: bool) -> None:
    app = make_app(inline=inline)
    attempts: list[int] = []
    told: list[tuple[str, int]] = []

    @app.topic("orders", retry=Retry(attempts=4, first=3600), dead_letter="dead")
    @app.responds_to("invoices")
    def bill(message: Message) -> None:
        attempts.append(message.attempt)
        app.respond_to("invoices", {})
        raise Boom(f"attempt {message.attempt}")

    @app.after_failure
    def report(error: Exception, message: Message) -> None:
        told.append((str(error), message.attempt))

    call = Client(app).send("orders", {"id": 7}, key="ann", headers={"h": "1"}, raise_errors=False)

    assert attempts == [1, 2, 3, 4]
    assert told == [(f"attempt {number}", number) for number in (1, 2, 3, 4)]
    assert (call.attempts, repr(call.error), call.responses) == (4, "Boom('attempt 4')", [])
    assert call.dead_letter is not None
    assert (call.dead_letter.topic, call.dead_letter.value, call.dead_letter.key) == ("dead", {"id": 7}, "ann")
    assert call.dead_letter.headers["h"] == b"1"
    assert call.dead_letter.headers["kafka_dlt-original-topic"] == b"orders"
    assert call.dead_letter.headers["kafka_dlt-exception-message"] == b"attempt 4"
    assert call.dead_letter.headers["flowkit-attempts"] == b"4"


@pytest.mark.parametrize("inline", ROUTES)
def test_a_message_that_comes_through_in_the_end_has_no_error(inline: bool) -> None:
    app = make_app(inline=inline)

    @app.topic("orders", retry=5, dead_letter="dead")
    @app.responds_to("invoices")
    def bill(message: Message) -> int:
        if message.attempt < 3:
            raise Boom
        return message.attempt

    call = Client(app).send("orders", {}, raise_errors=False)

    assert (call.attempts, call.error, call.dead_letter) == (3, None, None)
    assert call.sent("invoices").value == 3


@pytest.mark.parametrize("inline", ROUTES)
def test_without_a_dead_letter_topic_there_is_only_the_error(inline: bool) -> None:
    app = make_app(inline=inline)

    @app.topic("orders", retry=2)
    def bill() -> None:
        raise Boom

    call = Client(app).send("orders", {}, raise_errors=False)

    assert (type(call.error), call.attempts, call.dead_letter) == (Boom, 2, None)


@pytest.mark.parametrize("inline", ROUTES)
def test_a_message_may_be_aborted_at_a_later_attempt(inline: bool) -> None:
    app = make_app(inline=inline)

    @app.topic("orders", retry=5, dead_letter="dead")
    def bill(message: Message) -> None:
        if message.attempt == 2:
            app.abort()
        raise Boom

    call = Client(app).send("orders", {}, raise_errors=False)

    assert (call.aborted, call.attempts, call.error, call.dead_letter) == (True, 2, None, None)


@pytest.mark.parametrize(("inline", "expected"), [(True, [1, 2, 3]), (False, [1])])
def test_hooks_before_the_queue_run_again_only_where_there_is_no_queue(inline: bool, expected: list[int]) -> None:
    app = make_app(inline=inline)
    seen: list[int] = []

    @app.topic("orders", retry=3)
    def bill() -> None:
        raise Boom

    @app.before_enqueue
    def triage(message: Message) -> None:
        seen.append(message.attempt)

    Client(app).send("orders", {}, raise_errors=False)

    assert seen == expected


def test_a_hook_that_fails_first_does_not_cost_the_worker_an_attempt() -> None:
    app = make_app(inline=False)
    attempts: list[int] = []

    @app.topic("orders", retry=3)
    def bill(message: Message) -> None:
        attempts.append(message.attempt)
        raise Boom

    @app.before_enqueue
    def triage(message: Message) -> None:
        if message.attempt < 3:
            raise Boom

    Client(app).send("orders", {}, raise_errors=False)

    assert attempts == [1, 2, 3]


def test_a_dead_letter_from_a_worker_is_what_was_queued() -> None:
    app = make_app(inline=False)

    @app.topic("orders", retry=2, dead_letter="dead")
    def bill(order: Any) -> None:
        raise Boom

    @app.before_enqueue
    def mark(order: Any) -> None:
        order["seen"] = True

    call = Client(app).send("orders", {"id": 7}, raise_errors=False)

    assert call.dead_letter is not None
    assert call.dead_letter.value == {"id": 7, "seen": True}


# The way through the queue.


def test_a_queued_message_goes_through_its_interchanger_and_json() -> None:
    class Interchanger:
        loaded: list[bytes] = []  # noqa: RUF012
        parsed: list[Any] = []  # noqa: RUF012

        def load(self, value: bytes) -> Any:
            self.loaded.append(value)
            return (value.hex(), 1)

        def parse(self, data: Any) -> bytes:
            self.parsed.append(data)
            return bytes.fromhex(data[0])

    app, kept = make_app(inline=False), []
    app.add_topic("orders", lambda order: kept.append(order), interchanger=Interchanger())

    Client(app).send("orders", {"id": 7})

    assert kept == [{"id": 7}]
    assert Interchanger.loaded == [b'{"id":7}']
    assert Interchanger.parsed == [[b'{"id":7}'.hex(), 1]]  # a list: it was JSON on its way


def test_an_inline_message_does_not_touch_its_interchanger() -> None:
    class Interchanger:
        def load(self, value: bytes) -> Any:
            raise AssertionError

        parse = load

    app = make_app()
    app.add_topic("orders", lambda: None, interchanger=Interchanger())

    assert Client(app).send("orders", {}).error is None


def test_what_an_interchanger_cannot_put_into_json_comes_out() -> None:
    class Interchanger:
        def load(self, value: bytes) -> Any:
            return object()

        def parse(self, data: Any) -> bytes:
            raise AssertionError

    app = make_app(inline=False)
    app.add_topic("orders", print, interchanger=Interchanger())

    with pytest.raises(QueueError, match="is not JSON"):
        Client(app).send("orders", {})


def test_a_hook_and_a_handler_do_not_share_objects_across_the_queue() -> None:
    app, kept = make_app(inline=False), []
    app.add_topic("orders", lambda order: kept.append(order))
    app.before_enqueue(lambda order: kept.append(order))

    Client(app).send("orders", {"id": 7})

    assert kept[0] == kept[1]
    assert kept[0] is not kept[1]


# follow


def chain(**options: Any) -> Flowkit:
    app = make_app(**options)

    @app.topic("a")
    @app.responds_to("b", multiple_usage=True)
    def first(payload: Any) -> None:
        app.respond_to("b", {"n": 1}, key="k", headers=[("h", "1"), ("h", "2")], partition=3)
        app.respond_to("b", {"n": 2})

    @app.topic("b")
    @app.responds_to("c")
    def second(payload: dict[str, Any], message: Message) -> Any:
        if payload["n"] == 1:
            assert (message.key, message.partition) == (b"k", 3)
            assert message.headers.pairs == (("h", b"1"), ("h", b"2"))
        return payload["n"] * 10

    @app.topic("c")
    @app.responds_to("elsewhere", required=False)
    def third(payload: int) -> Any:
        return payload + 1

    return app


@pytest.mark.parametrize("inline", ROUTES)
def test_follow_carries_responses_on_into_the_applications_own_topics(inline: bool) -> None:
    call = Client(chain(inline=inline)).send("a", {}, follow=True)

    assert [item.topic for item in call.responses] == ["b", "b"]
    assert [item.topic for item in call.followed] == ["b", "b"]
    assert [item.value for item in call.all_sent("elsewhere")] == [11, 21]
    assert call.followed[0].sent("elsewhere").value == 11


def test_without_follow_responses_go_nowhere() -> None:
    call = Client(chain()).send("a", {})

    assert (call.followed, call.all_sent("c")) == ([], [])


def test_sent_looks_into_what_was_followed_and_says_so() -> None:
    call = Client(chain()).send("a", {}, follow=True)

    with pytest.raises(
        AssertionError, match=r"expected one message to 'elsewhere', found 2; sent was: .*elsewhere b'21'"
    ):
        call.sent("elsewhere")


def test_an_error_in_what_was_followed_comes_out() -> None:
    app = chain()

    @app.before_enqueue("c")
    def check() -> None:
        raise Boom

    with pytest.raises(Boom):
        Client(app).send("a", {}, follow=True)

    call = Client(app).send("a", {}, follow=True, raise_errors=False)
    assert call.error is None
    assert [type(inner.followed[0].error) for inner in call.followed] == [Boom, Boom]


def test_raw_bytes_can_be_followed_too() -> None:
    assert len(Client(chain()).send_raw("a", b"{}", follow=True).all_sent("elsewhere")) == 2


def test_a_tombstone_is_followed_as_one() -> None:
    app, kept = make_app(), []

    @app.topic("a")
    @app.responds_to("b")
    def first() -> None:
        app.respond_to("b", None)

    app.add_topic("b", lambda payload: kept.append(payload))

    Client(app).send("a", {}, follow=True)

    assert kept == [None]


def test_a_raw_parser_is_followed_byte_for_byte() -> None:
    app, kept = make_app(), []

    @app.topic("a", parser=Raw)
    @app.responds_to("b")
    def first(payload: bytes) -> bytes:
        return payload + b"\xff"

    app.add_topic("b", lambda payload: kept.append(payload), parser=Raw)

    Client(app).send_raw("a", b"\x00", follow=True)

    assert kept == [b"\x00\xff"]


# The life of the application.


def test_in_a_with_block_the_application_starts_and_stops() -> None:
    app = make_app()
    seen: list[str] = []
    app.on_startup(lambda: seen.append("startup"))
    app.on_shutdown(lambda: seen.append("shutdown"))
    app.add_topic("orders", lambda: seen.append("handler"))

    with Client(app) as client:
        client.send("orders", {})

    assert seen == ["startup", "handler", "shutdown"]


def test_without_one_it_does_not() -> None:
    app = make_app()
    app.on_startup(lambda: pytest.fail("started"))
    app.add_topic("orders", lambda: None)

    Client(app).send("orders", {})


def test_one_application_serves_many_clients(app: Flowkit) -> None:
    for _ in range(3):
        with Client(app) as client:
            assert client.send("orders", order(1)).error is None


def test_the_fixture_starts_the_application(flowkit_app: Flowkit, flowkit_client: Client) -> None:
    assert flowkit_client.app is flowkit_app
    assert flowkit_app._started_in


def test_neither_kafka_nor_redis_is_asked_for() -> None:
    with Client(Flowkit("shop")) as client:
        assert client.app.settings.kafka.hosts == ()


@pytest.mark.parametrize("chosen_by", ["route", "hook"])
def test_a_custom_worker_is_really_given_the_message(chosen_by: str) -> None:
    given: list[tuple[str, Any]] = []

    class Worker:
        def perform_async(self, topic: str, params: Any) -> None:
            given.append((topic, params["value"]))

    worker = Worker()
    app = make_app(inline=False)
    app.add_topic("orders", print, worker=worker if chosen_by == "route" else None)

    @app.before_enqueue("orders")
    def choose(message: Message) -> None:
        message.worker = worker

    call = Client(app).send("orders", {"id": 7})

    assert given == [("orders", '{"id":7}')]
    assert (call.worker, call.queue, call.responses) == (worker, None, [])
