"""Sending outside handlers: with and without waiting, from threads, coroutines and after a fork."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from commands import python, read_topic
from servers import Kafka, MakeTopic
from support import connect, make_app, shown

from flowkit import DeliveryError, Flowkit, ParserError, ResponseError, SettingsError
from flowkit import producer as producer_module
from flowkit.clients.memory import Broker
from flowkit.clients.memory import Producer as MemoryProducer
from flowkit.parsers import Raw, Text
from flowkit.producer import Producer
from flowkit.responses import Response
from flowkit.server import Server

Send = Callable[..., None]


def send(app: Flowkit, *args: Any, **options: Any) -> None:
    app.producer.send(*args, **options)


def submit(app: Flowkit, *args: Any, **options: Any) -> None:
    app.producer.submit(*args, **options).result(10)


BOTH = pytest.mark.parametrize("way", [send, submit])


class SlowProducer(MemoryProducer):
    """Its deliveries end when ``release`` is called, or not at all."""

    def __init__(self, broker: Broker) -> None:
        super().__init__(broker)
        self.waiting: list[Callable[[], None]] = []
        self.closed_after: list[float] = []

    def notify(self, delivery: Any, tell: Callable[[], None]) -> None:
        self.waiting.append(tell)

    def release(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()

    def close(self, timeout: float) -> None:
        self.closed_after.append(timeout)


@pytest.fixture
def app() -> Flowkit:
    return make_app()


@pytest.fixture
def slow(app: Flowkit) -> SlowProducer:
    client = SlowProducer(Broker())
    app._producer = Producer(lambda: app.settings, lambda _, **__: client)
    return client


# What is sent.


@BOTH
@pytest.mark.parametrize(
    ("value", "options", "written"),
    [
        ({"a": 1}, {}, b'{"a":1}'),
        ("text", {}, b"text"),
        (b"\xff", {}, b"\xff"),
        (None, {}, None),
        (7, {"parser": Text}, b"7"),
        (bytearray(b"raw"), {"parser": Raw}, b"raw"),
        ("text", {"parser": Raw}, b"text"),
    ],
    ids=shown,
)
def test_values_are_written_by_the_rules_of_responses(
    app: Flowkit, way: Send, value: Any, options: Any, written: bytes | None
) -> None:
    broker = connect(app)

    way(app, "orders", value, key="ann", headers={"trace": "1"}, **options)

    [record] = broker.records("orders")
    assert (record.value, record.key, record.headers) == (written, b"ann", (("trace", b"1"),))


@BOTH
def test_a_message_goes_to_its_partition(app: Flowkit, way: Send) -> None:
    broker = connect(app)
    broker.create("orders", partitions=8)

    way(app, "orders", 1, partition=5)
    way(app, "orders", 2, partition_key="a")
    way(app, "orders", 3, partition_key="a", key="b")

    placed = broker.partition_for("orders", b"a")
    assert [(record.partition, record.key) for record in broker.records("orders")] == sorted(
        [(5, None), (placed, None), (placed, b"b")], key=lambda item: item[0]
    )


@BOTH
@pytest.mark.parametrize(
    ("value", "options", "error", "text"),
    [
        ({}, {"key": 7}, ResponseError, "orders: key is text or bytes, not int"),
        (
            {},
            {"partition": 0, "partition_key": "a"},
            ResponseError,
            "orders: give partition or partition_key, not both",
        ),
        (object(), {}, ParserError, "object cannot be written as JSON"),
        ({}, {"parser": Raw}, ParserError, "the raw parser sends bytes, not dict"),
    ],
    ids=shown,
)
def test_what_is_wrong_with_the_call_is_raised_by_it(
    app: Flowkit, value: Any, options: Any, error: type[Exception], text: str, way: Send
) -> None:
    connect(app)
    with pytest.raises(error, match=re.escape(text)):
        way(app, "orders", value, **options)
    if way is submit:
        with pytest.raises(error, match=re.escape(text)):
            app.producer.submit("orders", value, **options)  # at once, not in its future
    assert not app.producer.under_way


def test_without_brokers_in_the_settings_submit_raises_at_once(app: Flowkit) -> None:
    with pytest.raises(SettingsError, match=r"kafka\.hosts"):
        app.producer.submit("orders", {})
    assert not app.producer.under_way


# Failure.


@BOTH
def test_a_refused_delivery_is_an_error_that_names_the_topic(app: Flowkit, way: Send) -> None:
    connect(app).refuse = OSError("disk full")
    with pytest.raises(DeliveryError, match=r"orders: Kafka did not take the message: OSError\('disk full'\)"):
        way(app, "orders", {})


def test_a_failed_submit_is_logged_though_nobody_looks_at_its_future(
    app: Flowkit, caplog: pytest.LogCaptureFixture
) -> None:
    connect(app).refuse = DeliveryError("no", passing=True)

    future = app.producer.submit("orders", {})

    [line] = caplog.messages
    assert line == "a message for orders that was submitted is not delivered: orders: no"
    error = future.exception(0)
    assert isinstance(error, DeliveryError)
    assert error.passing


def test_a_message_that_cannot_be_started_fails_in_its_future(app: Flowkit, caplog: pytest.LogCaptureFixture) -> None:
    app._producer = Producer(lambda: app.settings, Broker(strict=True).producer)

    future = app.producer.submit("orders", {})

    with pytest.raises(DeliveryError, match="the topic 'orders' does not exist on the brokers; create it"):
        future.result(0)
    assert len(caplog.messages) == 1
    assert not app.producer.under_way


# Futures.


def test_submit_does_not_wait(app: Flowkit, slow: SlowProducer) -> None:
    told: list[Future[None]] = []

    future = app.producer.submit("orders", {})
    future.add_done_callback(told.append)

    assert not future.done()
    assert not future.cancel()
    assert app.producer.under_way
    slow.release()
    assert future.result(0) is None
    assert told == [future]
    assert not app.producer.under_way


def test_a_coroutine_may_wait_for_it(app: Flowkit, slow: SlowProducer) -> None:
    async def request() -> str:
        first, second = (asyncio.wrap_future(app.producer.submit("orders", number)) for number in (1, 2))
        asyncio.get_running_loop().call_soon(slow.release)
        await asyncio.gather(first, second)
        return "accepted"

    assert asyncio.run(request()) == "accepted"


def test_a_coroutine_that_gives_up_does_not_take_the_message_back(app: Flowkit, slow: SlowProducer) -> None:
    async def request() -> None:
        await asyncio.wait_for(asyncio.wrap_future(app.producer.submit("orders", 1)), 0.01)

    with pytest.raises(TimeoutError):
        asyncio.run(request())
    assert app.producer.under_way
    slow.release()
    assert not app.producer.under_way


def test_settle_waits_for_what_is_under_way(app: Flowkit, slow: SlowProducer) -> None:
    futures = [app.producer.submit("orders", number) for number in range(3)]
    with ThreadPoolExecutor(1) as pool:
        settling = pool.submit(app.producer.settle, 10)
        slow.release()
        settling.result(10)
    assert all(future.done() for future in futures)


def test_settle_is_bounded(app: Flowkit, slow: SlowProducer) -> None:
    future = app.producer.submit("orders", {})
    app.producer.settle(0.01)
    assert not future.done()


def test_close_gives_up_what_is_not_confirmed_in_time_and_says_so(
    app: Flowkit, slow: SlowProducer, caplog: pytest.LogCaptureFixture
) -> None:
    future = app.producer.submit("orders", {})

    app.producer.close(0.01)

    with pytest.raises(DeliveryError, match="orders: the producer was closed before Kafka had confirmed it"):
        future.result(0)
    assert slow.closed_after == [0.1]
    assert len(caplog.messages) == 1
    slow.release()  # an answer that comes too late changes nothing
    assert future.exception(0) is not None


def test_more_than_a_limit_under_way_makes_submit_wait(
    app: Flowkit, slow: SlowProducer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(producer_module, "MOST_OPEN", 2)
    monkeypatch.setattr(producer_module, "FLUSH_TIMEOUT", 0.01)
    app.producer._no_open()
    first = [app.producer.submit("orders", number) for number in (1, 2)]

    third = app.producer.submit("orders", 3)
    with pytest.raises(DeliveryError, match="orders: Kafka does not take what is under way already"):
        third.result(0)
    assert [*caplog.messages] == [
        "a message for orders that was submitted is not delivered: orders: Kafka does not take what is under way already"
    ]

    slow.release()
    fourth = app.producer.submit("orders", 4)
    slow.release()
    assert [future.exception(0) for future in (*first, fourth)] == [None] * 3


def test_many_threads_may_submit(app: Flowkit) -> None:
    broker = connect(app)

    def work(start: int) -> list[Future[None]]:
        return [app.producer.submit("orders", start + number) for number in range(100)]

    with ThreadPoolExecutor(8) as pool:
        futures = [future for found in pool.map(work, range(0, 800, 100)) for future in found]
    assert [future.exception(5) for future in futures] == [None] * 800
    assert sorted(int(record.value or b"") for record in broker.records("orders")) == list(range(800))


# In handlers.


def test_a_message_in_hand_is_done_only_when_what_it_submitted_is(app: Flowkit, slow: SlowProducer) -> None:
    """The consumer settles before it commits; jobs before they end."""
    from flowkit.jobs import run_entries

    app.add_topic("orders", lambda: app.producer.submit("audit", {}) and None, inline=False)
    handling = app.handling("orders")
    entry = handling.entry(_record(), 0.0, b"{}")
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(run_entries, app, handling, [entry], 1)
        while not slow.waiting:
            assert not job.done()
        assert app.producer.under_way
        assert not job.done()
        slow.release()
        assert job.result(10) == []


class LateProducer(MemoryProducer):
    """Refuses what goes to ``broken``; confirms everything else when it is closed, which ``may_close`` allows."""

    def __init__(self, broker: Broker) -> None:
        super().__init__(broker)
        self.may_close = threading.Event()
        self.confirmed = False

    def send(self, topic: str, *message: Any) -> Any:
        return DeliveryError("too large") if topic == "broken" else self

    def outcome(self, delivery: Any) -> DeliveryError | None:
        late = DeliveryError("Kafka did not confirm the message in time", passing=True)
        return delivery if delivery is not self else None if self.confirmed else late

    def close(self, timeout: float) -> None:
        self.confirmed = self.may_close.wait(timeout)


def test_responses_are_waited_for_though_a_failure_has_replaced_their_client(app: Flowkit) -> None:
    """Else they would count as not confirmed, and their messages would be handled again."""
    late = LateProducer(Broker())
    clients = iter([late, MemoryProducer(late.broker)])
    app._producer = Producer(lambda: app.settings, lambda _, **__: next(clients))
    delivery = app.producer.start(Response("orders", b""))
    assert isinstance(app.producer.submit("broken", "").exception(5), DeliveryError)

    with ThreadPoolExecutor(1) as pool:
        flushing = pool.submit(app.producer.flush)
        with pytest.raises(TimeoutError):
            flushing.result(0.05)
        late.may_close.set()
        flushing.result(10)
    assert late.outcome(delivery) is None


def test_a_flush_is_bounded_however_many_clients_have_been_replaced(app: Flowkit) -> None:
    """A worker's alarm for it is only a little longer, and would have the whole job done again."""
    late = [LateProducer(Broker()) for _ in range(4)]
    clients = iter([*late, MemoryProducer(late[0].broker)])
    app._producer = Producer(lambda: app.settings, lambda _, **__: next(clients))
    for _ in late:
        assert isinstance(app.producer.submit("broken", "").exception(5), DeliveryError)
    began = time.monotonic()
    app.producer.flush(0.3)
    assert time.monotonic() - began < 0.9
    for client in late:
        client.may_close.set()


def _record() -> Any:
    from support import make_record

    return make_record()


def test_an_end_that_is_not_clean_does_not_wait_for_what_is_under_way(
    slow: SlowProducer, app: Flowkit, caplog: pytest.LogCaptureFixture
) -> None:
    """It waited for ``shutdown_timeout`` already; what is under way would hold up the interpreter's end."""
    app._given |= {"kafka": {"hosts": "127.0.0.1:9"}, "shutdown_timeout": 0.1}
    go_on = threading.Event()

    @app.topic("orders")
    def handler(order: Any) -> None:
        app.producer.submit("audit", order)
        server.stop()
        go_on.wait(10)

    slow.broker.append("orders", b"1")
    server = Server(app, slow.broker.consumer)
    with ThreadPoolExecutor(1) as pool:  # whose thread installs no signal handlers
        assert pool.submit(server.run).result(30) == 1
    assert not app.producer.under_way
    assert "closed before Kafka had confirmed it" in caplog.text
    go_on.set()


# On a real broker.


def test_both_ways_arrive_at_a_real_broker(kafka: Kafka, topic: MakeTopic) -> None:
    name = topic("direct", partitions=4)
    app = make_app(kafka={"hosts": kafka.hosts})
    try:
        app.producer.send(name, {"n": 0}, partition_key="a")
        futures = [app.producer.submit(name, {"n": number}, partition_key="a") for number in range(1, 50)]
        assert [future.exception(20) for future in futures] == [None] * 49
        records = read_topic(kafka.hosts, name, 50)
    finally:
        app.producer.close()
    assert [json.loads(record.value)["n"] for record in records] == list(range(50))  # and in order, in one partition


def test_a_topic_that_is_not_there_fails_both_ways(kafka: Kafka, caplog: pytest.LogCaptureFixture) -> None:
    app = make_app(kafka={"hosts": kafka.hosts}, connection_pool={"timeout": 0.5})
    with pytest.raises(DeliveryError, match="the topic 'nowhere' does not exist on the brokers"):
        app.producer.send("nowhere", {})
    future = app.producer.submit("nowhere", {})
    with pytest.raises(DeliveryError, match="the topic 'nowhere' does not exist on the brokers"):
        future.result(0)
    app.producer.close()


@BOTH
def test_a_message_that_is_too_large_does_not_spoil_the_next_ones(
    kafka: Kafka, topic: MakeTopic, way: Send, caplog: pytest.LogCaptureFixture
) -> None:
    """kafka-python's producer refuses everything after that, so it is replaced."""
    if not kafka.apache:
        pytest.skip("the embedded broker takes messages of any size")
    name = topic("direct")
    app = make_app(kafka={"hosts": kafka.hosts})
    way(app, name, "before")
    with pytest.raises(DeliveryError, match=f"{name}: Kafka did not take the message: MessageSizeTooLarge"):
        way(app, name, "x" * 2_000_000)
    way(app, name, "after")
    app.producer.close()
    assert [record.value for record in read_topic(kafka.hosts, name, 2)] == [b"before", b"after"]


class OverProducer(MemoryProducer):
    """Refuses everything, and says that it always will."""

    is_over = True

    def send(self, *message: Any) -> Any:
        raise DeliveryError("this client is over")


def test_a_client_that_is_over_as_it_says_when_something_is_sent_is_replaced(app: Flowkit) -> None:
    broker = connect(app)
    make = app.producer._make
    app.producer._make = lambda _: OverProducer(broker)  # type: ignore[assignment]
    with pytest.raises(DeliveryError, match="this client is over"):
        app.producer.start(Response("orders", b"1"))
    app.producer._make = make
    app.producer.start(Response("orders", b"2"))
    assert [record.value for record in broker.records("orders")] == [b"2"]


SCRIPT = """
import logging, os, sys
from flowkit import Flowkit

logging.basicConfig()
app = Flowkit("script", kafka={"hosts": sys.argv[1], "linger_ms": 1500})
how = sys.argv[3]
app.producer.submit(sys.argv[2], how)
if how == "fork":
    app.producer.settle()
    child = os.fork()
    if child == 0:
        app.producer.submit(sys.argv[2], "child")
        sys.exit()
    app.producer.submit(sys.argv[2], "parent")
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize(("how", "sent"), [("end", {"end"}), ("fork", {"fork", "parent", "child"})])
def test_a_process_does_not_end_before_its_messages_have_arrived(
    kafka: Kafka, topic: MakeTopic, how: str, sent: set[str], tmp_path: Path
) -> None:
    """kafka-python itself gives them one second, and they linger longer than that here."""
    name = topic("direct")
    done = python("-W", "ignore", "-c", SCRIPT, kafka.hosts, name, how, cwd=tmp_path)
    assert (done.code, done.out, done.err) == (0, "", "")
    assert {record.value.decode() for record in read_topic(kafka.hosts, name, len(sent))} == sent
