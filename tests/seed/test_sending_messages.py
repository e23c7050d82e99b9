"""Sending messages: by responders, and past them; the latter is the second choice, as WaterDrop was in the seed."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import pytest
from commands import read_topic
from servers import Kafka, MakeTopic
from support import connect, make_app

from flowkit import DeliveryError, Flowkit
from flowkit.parsers import Text
from flowkit.testing import Client


@pytest.fixture
def sending(example: Callable[[str], Any]) -> Any:
    return example("sending")


@pytest.fixture
def flowkit_app(sending: Any) -> Flowkit:
    app: Flowkit = sending.app
    return app


# The example, without a broker.


def test_what_is_sent_outside_handlers_is_seen_by_the_test(flowkit_client: Client, sending: Any) -> None:
    sending.rename(7, "ann")
    sent = flowkit_client.sent("users.renamed")
    assert (sent.value, sent.key) == ({"id": 7, "name": "ann"}, "7")


def test_what_is_submitted_too(flowkit_client: Client, sending: Any) -> None:
    assert sending.import_all({"login": f"user{number}"} for number in range(3)) == 3
    assert [item.key for item in flowkit_client.all_sent("users.imported")] == ["user0", "user1", "user2"]
    asyncio.run(sending.visit("/prices"))
    visit = flowkit_client.sent("visits")
    assert (visit.raw, visit.value) == (b"/prices", "/prices")  # by the Text parser, not as a JSON string


def test_what_a_handler_sends_past_its_responses_belongs_to_its_call(flowkit_client: Client) -> None:
    call = flowkit_client.send("visits", "/prices")
    assert call.responses == []
    assert [item.topic for item in call.direct] == ["pages.seen"]
    assert call.sent("pages.seen").value == {"page": "/prices"}
    assert flowkit_client.sent("pages.seen") is call.direct[0]


def test_what_is_sent_directly_is_followed_too() -> None:
    app = make_app()
    app.topic("first")(lambda: app.producer.send("second", {"n": 1}))
    app.topic("second")(lambda payload: app.producer.submit("third", payload) and None)
    call = Client(app).send("first", {}, follow=True)
    assert call.sent("third").value == {"n": 1}


def test_what_a_failing_handler_sent_directly_is_gone_and_what_it_responded_is_not() -> None:
    """The reason why it is the second choice."""
    app = make_app()

    @app.topic("orders")
    @app.responds_to("invoices")
    def bill() -> None:
        app.respond_to("invoices", {})
        app.producer.send("letters", {})
        raise ValueError("too late")

    call = Client(app).send("orders", {}, raise_errors=False)
    assert [item.topic for item in call.direct] == ["letters"] * 5  # once each attempt
    assert call.all_sent("invoices") == []


def test_after_the_test_the_application_sends_again(sending: Any) -> None:
    broker = connect(sending.app)
    with Client(sending.app) as client:
        sending.rename(7, "ann")
    sending.rename(8, "bob")
    assert client.sent("users.renamed").key == "7"
    assert [record.key for record in broker.records("users.renamed")] == [b"8"]


# On a real broker.


def test_a_message_has_arrived_when_send_returns(kafka: Kafka, topic: MakeTopic) -> None:
    app, out = make_app(kafka={"hosts": kafka.hosts}), topic("direct")
    app.producer.send(out, "message")  # the seed's two examples
    app.producer.send(out, {"user_id": 1})
    app.producer.send(out, 7, parser=Text, key="k", headers={"trace": "1"})
    records = read_topic(kafka.hosts, out, 3)
    app.producer.close()
    assert [record.value for record in records] == [b"message", b'{"user_id":1}', b"7"]
    assert (records[2].key, records[2].headers) == (b"k", [("trace", b"1")])


def test_a_coroutine_waits_without_blocking_the_others(kafka: Kafka, topic: MakeTopic) -> None:
    app, out = make_app(kafka={"hosts": kafka.hosts, "linger_ms": 300}), topic("direct")
    app.producer.send(out, "first")  # so that the topic is known
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def request() -> None:
        counting = asyncio.create_task(count())
        await asyncio.wrap_future(app.producer.submit(out, "second"))
        counting.cancel()

    asyncio.run(request())
    app.producer.close()
    assert turns > 10
    assert len(read_topic(kafka.hosts, out, 2)) == 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_threads_and_forked_processes_may_send(kafka: Kafka, topic: MakeTopic) -> None:
    app, out = make_app(kafka={"hosts": kafka.hosts}, connection_pool={"size": 2}), topic("direct")

    def work(who: str) -> None:
        for number in range(5):
            app.producer.submit(out, f"{who} {number}")
        app.producer.send(out, f"{who} end")

    threads = [threading.Thread(target=work, args=(f"thread{number}",)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    child = multiprocessing.get_context("fork").Process(target=work, args=("child",))
    child.start()
    work("parent")
    child.join(30)
    assert child.exitcode == 0
    records = read_topic(kafka.hosts, out, 30)
    app.producer.close()
    assert {record.value.decode() for record in records} == {
        f"{who} {number}"
        for who in ("thread0", "thread1", "thread2", "child", "parent")
        for number in (*range(5), "end")
    }


def test_nobody_looks_at_the_future_and_the_failure_is_logged(kafka: Kafka, caplog: pytest.LogCaptureFixture) -> None:
    app = make_app(kafka={"hosts": kafka.hosts}, connection_pool={"timeout": 0.5})
    with caplog.at_level(logging.ERROR, "flowkit"):
        future = app.producer.submit("no.such.topic", {})
    app.producer.close()
    assert isinstance(future.exception(0), DeliveryError)
    [line] = [record.getMessage() for record in caplog.records if record.name == "flowkit.producer"]
    assert "the topic 'no.such.topic' does not exist on the brokers" in line


@pytest.mark.parametrize("worker", ["inline", "flowkit worker", "rq worker"])
def test_what_a_handler_submits_is_not_lost_with_its_process(
    system: Any, kafka: Kafka, topic: MakeTopic, worker: str
) -> None:
    """RQ's work horses end without any clean-up, and these messages linger for longer than a handler takes."""
    given, out = topic("given"), topic("submitted")
    env = {"FORWARD_IN": given, "FORWARD_OUT": out, "FORWARD_INLINE": str(int(worker == "inline"))}
    with system.start("flowkit", "run", "forward:app", **env) as server:
        system.put(given, *range(20))
        if worker == "inline":
            assert len(read_topic(kafka.hosts, out, 20)) == 20
        else:
            command = ("flowkit", "worker", "forward:app") if worker == "flowkit worker" else ("rq", "worker", given)
            options = ("--burst",) if worker == "flowkit worker" else ("--burst", "--url", system.url)
            system.wait_for(lambda: system.redis.llen(f"rq:queue:{given}"), 30, "a job in the queue")
            with system.start(*command, *options, **env) as process:
                assert len(read_topic(kafka.hosts, out, 20)) == 20
                assert process.wait() == 0
        assert server.stop() == 0
