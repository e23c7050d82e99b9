"""Batch handlers: what they are given, what of a batch is done, and that nothing of it is lost."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from kafka import KafkaProducer
from servers import Kafka, MakeTopic
from test_consumer import HOUR, NOWAIT, Clock, Loop, stopped_clock
from test_transactions import Running, committed

import flowkit.batches
import flowkit.clients.memory
import flowkit.inline
from flowkit import BatchError, Flowkit, Message, PayloadError, Retry
from flowkit.clients.memory import Broker
from flowkit.errors import BrokerUnavailable, ConfigurationError, DeliveryError, ResponseError
from flowkit.testing import Client


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = stopped_clock(monkeypatch)
    for module in (flowkit.batches, flowkit.inline, flowkit.clients.memory):
        monkeypatch.setattr(module, "time", clock)
    return clock


def make_app(**settings: Any) -> Flowkit:
    kafka = {"hosts": "127.0.0.1:9", **settings.pop("kafka", {})}
    return Flowkit("t", kafka=kafka, **{"inline": True, "retry": NOWAIT, **settings})


@dataclass
class Order:
    id: int


class Batches:
    """A batch handler that remembers what it was given, and does what it is told to."""

    def __init__(self, app: Flowkit, act: Callable[[list[Any]], Any] = lambda values: None, **options: Any) -> None:
        self.seen: list[list[Any]] = []
        self.act = act
        app.add_topic("a", self.handle, group="g", batch=True, **options)

    def handle(self, values: list[Any]) -> Any:
        self.seen.append(values)
        return self.act(values)


def failing_at(*bad: int, times: int = 99) -> Callable[[list[Any]], None]:
    left = dict.fromkeys(bad, times)

    def act(values: list[Any]) -> None:
        for value in values:
            if left.get(value):
                left[value] -= 1
                raise ValueError(f"not {value}")

    return act


# What the handler is given.


def test_a_handler_is_given_what_a_poll_gave_of_a_partition(clock: Clock) -> None:
    app = make_app()
    handler = Batches(app)
    loop = Loop(app, clock)
    loop.broker.create("a", 2)
    loop.put("a", 1, 2, 3)
    loop.put("a", 4, partition=1)
    loop.turn()
    assert handler.seen == [[1, 2, 3], [4]]
    assert (loop.committed("a", 0), loop.committed("a", 1)) == (3, 1)


def test_max_batch_is_the_longest(clock: Clock) -> None:
    app = make_app()
    handler = Batches(app, max_batch=3)
    loop = Loop(app, clock)
    loop.put("a", *range(8))
    loop.turn()
    assert handler.seen == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_a_poll_gives_as_many_as_the_longest_batch(clock: Clock) -> None:
    app = make_app()
    handler = Batches(app, max_batch=2_000)
    loop = Loop(app, clock)
    loop.put("a", *range(2_000))
    loop.turn()
    assert [len(batch) for batch in handler.seen] == [2_000]


def test_a_short_batch_waits_for_more(clock: Clock) -> None:
    app = make_app()
    handler = Batches(app, max_batch=4, batch_wait=2)
    loop = Loop(app, clock)
    loop.put("a", 1, 2)
    loop.turn()
    loop.turn(after=1.5)
    loop.put("a", 3)
    assert handler.seen == []
    loop.turn(2, after=0.5)
    assert handler.seen == [[1, 2, 3]]
    loop.put("a", 4, 5, 6, 7)
    loop.turn(after=0.1)
    assert handler.seen == [[1, 2, 3], [4, 5, 6, 7]]
    loop.turn(after=1)
    assert loop.committed("a") == 7


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (list[Order], [Order(1), Order(2)]),
        (Sequence[dict[str, int]], [{"id": 1}, {"id": 2}]),
        (list, [{"id": 1}, {"id": 2}]),
    ],
    ids=["typed", "sequence", "list"],
)
def test_payloads_are_as_the_item_of_the_list_is_annotated(annotation: Any, expected: list[Any]) -> None:
    app = make_app()
    seen: list[Any] = []

    def handle(orders: Any) -> None:
        seen.extend(orders)

    handle.__annotations__["orders"] = annotation
    app.add_topic("a", handle, batch=True)
    Client(app).send_batch("a", [{"id": 1}, {"id": 2}])
    assert seen == expected


def test_messages_come_beside_payloads_or_alone() -> None:
    app = make_app()
    seen: list[tuple[Any, ...]] = []

    @app.topic("a", batch=True)
    def both(values: list[int], messages: list[Message]) -> None:
        seen.extend((value, message.offset) for value, message in zip(values, messages, strict=True))

    @app.topic("b", batch=True)
    def alone(messages: Iterable[Message]) -> None:
        seen.extend((message.value, message.attempt) for message in messages)

    client = Client(app)
    client.send_batch("a", [7, 8])
    client.send_batch("b", [9])
    assert seen == [(7, 0), (8, 1), (b"9", 1)]


def test_an_async_handler_is_awaited(clock: Clock) -> None:
    app = make_app()
    seen: list[list[int]] = []

    async def handle(values: list[int]) -> None:
        seen.append(values)

    app.add_topic("a", handle, batch=True)
    loop = Loop(app, clock)
    loop.put("a", 1, 2)
    loop.turn()
    assert seen == [[1, 2]]


def test_hooks_see_each_message_and_may_take_it_out(clock: Clock) -> None:
    app = make_app()

    @app.before_enqueue
    def odd_only(value: int) -> None:
        if value % 2 == 0:
            app.abort()

    handler = Batches(app)
    loop = Loop(app, clock)
    loop.put("a", *range(6))
    loop.turn()
    assert handler.seen == [[1, 3, 5]]
    assert loop.committed("a") == 6
    loop.put("a", 6, 8)
    loop.turn(after=1)
    assert handler.seen == [[1, 3, 5]]
    assert loop.committed("a") == 8


# Failures.


def test_a_batch_that_fails_is_handled_one_by_one_until_the_message_is_found(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=3, first=10, factor=1, jitter=0), dead_letter="dead")
    handler = Batches(app, failing_at(2))
    loop = Loop(app, clock)
    loop.put("a", *range(5))
    loop.turn()
    assert handler.seen == [[0, 1, 2, 3, 4], [0], [1], [2]]
    assert loop.committed("a") == 2
    loop.turn(2, after=10)  # its second attempt is alone
    assert handler.seen[4:] == [[2]]
    loop.turn(2, after=10)
    assert handler.seen[5:] == [[2], [3], [4]]
    assert loop.values("dead") == [2]
    loop.turn(after=1)
    assert loop.committed("a") == 5


def test_a_handler_says_which_message_failed_and_those_before_it_are_done(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=2, first=10, jitter=0))
    left = [1]

    def act(values: list[int]) -> None:
        for index, value in enumerate(values):
            if value == 3 and left:
                left.pop()
                raise BatchError(index) from KeyError("three")

    handler = Batches(app, act)
    loop = Loop(app, clock)
    loop.put("a", *range(5))
    loop.turn()
    assert handler.seen == [[0, 1, 2, 3, 4]]
    assert loop.committed("a") == 3
    assert repr(loop.events.errors[0][1]) == "KeyError('three')"
    assert loop.events.errors[0][2].startswith("a[0]@3 failed in ")
    loop.turn(3, after=10)
    assert handler.seen[1:] == [[3], [4]]


@pytest.mark.parametrize("index", [-1, 3, 99])
def test_an_index_that_names_no_message_is_a_failure_of_the_batch(clock: Clock, index: int) -> None:
    app = make_app()

    def act(values: list[int]) -> None:
        if len(values) > 1:
            raise BatchError(index)

    handler = Batches(app, act)
    loop = Loop(app, clock)
    loop.put("a", 0, 1, 2)
    loop.turn()
    assert handler.seen == [[0, 1, 2], [0], [1], [2]]
    assert loop.committed("a") == 3


def test_what_cannot_be_read_fails_alone_behind_those_before_it(clock: Clock) -> None:
    app = make_app(dead_letter="dead")
    seen: list[list[Order]] = []

    def handle(orders: list[Order]) -> None:
        seen.append(orders)

    app.add_topic("a", handle, batch=True)
    loop = Loop(app, clock)
    for value in (b'{"id": 1}', b"{", b'{"id": 3}'):
        loop.broker.append("a", value)
    loop.turn()
    assert seen == [[Order(1)], [Order(3)]]
    assert [record.value for record in loop.broker.records("dead")] == [b"{"]
    assert isinstance(next(error for event, error, _ in loop.events.errors if event == "failed"), PayloadError)


def test_a_server_that_is_away_calls_nobody_one_by_one(clock: Clock) -> None:
    app = make_app()
    left = [BrokerUnavailable("nobody there")]

    def act(values: list[int]) -> None:
        if left:
            raise left.pop()

    handler = Batches(app, act)
    loop = Loop(app, clock)
    loop.put("a", 1, 2)
    loop.turn()
    loop.turn(2, after=60)
    assert handler.seen == [[1, 2], [1, 2]]


def test_an_abort_ends_the_whole_batch(clock: Clock) -> None:
    app = make_app()
    handler = Batches(app, lambda values: app.abort())
    loop = Loop(app, clock)
    loop.put("a", 1, 2)
    loop.turn()
    assert (handler.seen, loop.committed("a")) == ([[1, 2]], 2)


def test_messages_that_failed_may_wait_in_retry_topics(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=3, first=0), retry_topic="{topic}.retry")
    handler = Batches(app, failing_at(1, times=2), batch_wait=5, max_batch=3)
    loop = Loop(app, clock)
    loop.put("a", 0, 1, 2)
    loop.turn()
    assert handler.seen == [[0, 1, 2], [0], [1], [2]]
    loop.turn(2, after=1)
    assert handler.seen[4:] == [[1]]
    assert loop.values("a.retry.1") == [1]


def test_a_stop_is_heard_between_two_batches(clock: Clock) -> None:
    app = make_app(kafka={"offset_commit_interval": HOUR})
    handler = Batches(app, lambda values: loop.consumer.stop(), max_batch=2)
    loop = Loop(app, clock)
    loop.put("a", *range(6))
    loop.turn()
    assert handler.seen == [[0, 1]]


# Responses.


def answering(app: Flowkit, **declared: Any) -> list[list[int]]:
    seen: list[list[int]] = []

    def handle(values: list[int]) -> list[int]:
        seen.append(values)
        return [value * 10 for value in values]

    app.add_topic("a", handle, group="g", batch=True)
    app.add_response(handle, "out", **declared)
    return seen


def test_a_list_that_is_returned_is_a_response_for_each_item(clock: Clock) -> None:
    app = make_app()
    answering(app, multiple_usage=True)
    loop = Loop(app, clock)
    loop.put("a", 1, 2, 3)
    loop.turn()
    assert loop.values("out") == [10, 20, 30]
    assert loop.committed("a") == 3


def test_the_check_holds_for_a_call(caplog: pytest.LogCaptureFixture) -> None:
    app = make_app()
    answering(app)
    client = Client(app)
    assert client.send("a", 1).sent("out").value == 10
    (call,) = client.send_batch("a", [1, 2])
    assert [item.value for item in call.all_sent("out")] == [10, 20]  # one by one it is right
    assert "ResponseRepeated" in caplog.text
    assert "multiple_usage=True" in caplog.text


def test_a_response_that_is_not_confirmed_brings_the_whole_batch_again(clock: Clock) -> None:
    app = make_app()
    seen = answering(app, multiple_usage=True)
    loop = Loop(app, clock)
    loop.put("a", 1, 2, 3)
    loop.broker.refuse = DeliveryError("not now", passing=True)
    loop.turn()
    assert loop.committed("a") in (None, 0)
    loop.broker.refuse = None
    loop.turn(2, after=60)
    assert seen == [[1, 2, 3], [1, 2, 3]]
    assert loop.values("out") == [10, 20, 30]
    assert loop.committed("a") == 3


def test_the_responses_of_the_part_that_is_done_are_sent(clock: Clock) -> None:
    app = make_app(dead_letter="dead", retry=1)

    def handle(values: list[int]) -> None:
        for index, value in enumerate(values):
            if value == 2:
                raise BatchError(index)
            app.respond_to("out", value)

    app.add_topic("a", handle, group="g", batch=True)
    app.add_response(handle, "out", multiple_usage=True)
    loop = Loop(app, clock)
    loop.put("a", 0, 1, 2, 3)
    loop.turn()
    assert loop.values("out") == [0, 1, 3]
    assert loop.values("dead") == [2]


def test_a_response_that_kafka_refuses_is_no_fault_of_the_first_message(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=1), dead_letter="dead")
    seen = answering(app, multiple_usage=True)
    loop = Loop(app, clock, broker=Picky(b"30"))
    loop.put("a", *range(6))
    loop.turn(12, after=60)
    assert loop.values("dead") == [3]
    assert sorted(set(loop.values("out"))) == [0, 10, 20, 40, 50]
    assert seen == [[0, 1, 2, 3, 4, 5], [0], [1], [2], [3], [4], [5], [4], [5]]
    assert loop.committed("a") == 6


class Picky(Broker):
    """Refuses one value, and says so when it is asked for the outcome."""

    def __init__(self, refused: bytes) -> None:
        super().__init__()
        self.refused = refused

    def producer(self, settings: Any, transactional_id: str | None = None) -> Any:
        producer: Any = super().producer(settings, transactional_id)
        send = producer.send

        def refusing(topic: str, value: bytes | None, *rest: Any) -> Any:
            if value == self.refused:
                return DeliveryError("too large")
            return send(topic, value, *rest)

        producer.send = refusing
        return producer


def test_what_hooks_respond_is_sent_for_the_messages_that_are_done_only(clock: Clock) -> None:
    app = make_app(dead_letter="dead", retry=1)

    def announce(value: int) -> None:
        app.respond_to("news", value)

    app.add_response(announce, "news")

    @app.before_enqueue
    def tell(value: int) -> None:
        app.respond_with(announce, value)

    Batches(app, failing_at(2))
    loop = Loop(app, clock)
    loop.put("a", 0, 1, 2, 3)
    loop.turn()
    assert sorted(loop.values("news")) == [0, 1, 3]
    assert loop.values("dead") == [2]


def test_a_stop_is_heard_while_they_are_handled_one_by_one(clock: Clock) -> None:
    app = make_app()

    def act(values: list[int]) -> None:
        if len(values) > 1:
            raise ValueError("together")
        if values == [1]:
            loop.consumer.stop()

    handler = Batches(app, act)
    loop = Loop(app, clock)
    loop.put("a", *range(6))
    loop.consumer.run()
    assert handler.seen == [[0, 1, 2, 3, 4, 5], [0], [1]]
    assert loop.committed("a") == 2


def test_a_batch_that_cannot_be_longer_does_not_wait(clock: Clock) -> None:
    app = make_app(kafka={"max_poll_records": 3})
    handler = Batches(app, max_batch=500, batch_wait=5)
    loop = Loop(app, clock)
    loop.put("a", 1, 2, 3)
    loop.turn()
    assert handler.seen == [[1, 2, 3]]


def test_a_parameter_with_a_default_need_not_be_a_list() -> None:
    app = make_app()
    seen: list[Any] = []

    @app.topic("a", batch=True)
    def handle(values: list[int], limit: int = 3) -> None:
        seen.append((values, limit))

    Client(app).send_batch("a", [1, 2])
    assert seen == [([1, 2], 3)]


# Options.


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"batch": "yes"}, "batch is True or False, not 'yes'"),
        ({"max_batch": 5}, "max_batch= is for batch=True only"),
        ({"batch_wait": 1}, "batch_wait= is for batch=True only"),
        ({"batch": True, "max_batch": 0}, "max_batch is a whole number of at least 1, not 0"),
        ({"batch": True, "batch_wait": -1}, "batch_wait is a number of seconds above 0, not -1"),
        ({"batch": True, "inline": False}, "batch=True is for routes with inline=True"),
        ({"batch": True, "responder": print}, "batch=True and responder= do not go together"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], complaint: str) -> None:
    app = make_app(redis="redis://127.0.0.1:9")

    def start() -> None:
        app.add_topic("a", lambda values: None, **options)
        app.start(connected=False)

    with pytest.raises(ConfigurationError, match=re.escape(complaint)):
        start()


@pytest.mark.parametrize("annotation", [int, dict, Message, "list | None"])
def test_a_handler_that_takes_no_list_is_told_so(annotation: Any) -> None:
    app = make_app()

    def handle(order: Any) -> None: ...

    handle.__annotations__["order"] = annotation
    app.add_topic("a", handle, batch=True)
    with pytest.raises(ConfigurationError, match="is a batch handler, so its 'order' is a list"):
        app.start(connected=False)


# In tests of applications.


def test_a_batch_in_the_test_client_is_one_call_and_its_failure_is_raised_or_told() -> None:
    app = make_app()
    handler = Batches(app, failing_at(3))
    client = Client(app)
    (call,) = client.send_batch("a", [1, 2])
    assert (handler.seen, call.error) == ([[1, 2]], None)
    with pytest.raises(ValueError, match="not 3"):
        client.send_batch("a", [1, 3])
    (call,) = client.send_batch("a", [3], raise_errors=False)
    assert str(call.error) == "not 3"


def test_a_value_for_which_no_topic_is_declared_is_told(caplog: pytest.LogCaptureFixture) -> None:
    app = make_app()
    Batches(app, lambda values: [1])
    Client(app).send_batch("a", [1])
    assert "which goes nowhere" in caplog.text


def test_a_list_for_several_topics_is_refused() -> None:
    app = make_app()

    def handle(values: list[int]) -> list[int]:
        return values

    app.add_topic("a", handle, batch=True)
    for topic in ("x", "y"):
        app.add_response(handle, topic, required=False)
    with pytest.raises(ResponseError, match="say which one"):
        Client(app).send_batch("a", [1])


# On Kafka.


def test_on_kafka_all_are_handled_in_batches_and_committed(kafka: Kafka, topic: MakeTopic) -> None:
    source, dead = topic("in"), topic("dead")
    app = Flowkit(
        "t", kafka={"hosts": kafka.hosts}, inline=True, dead_letter=dead, retry=Retry(attempts=2, first=0.1)
    )
    seen: list[list[int]] = []

    @app.topic(source, group=source, batch=True, max_batch=200, batch_wait=0.5)
    def handle(numbers: list[int]) -> None:
        if 777 in numbers:
            raise ValueError("777")
        seen.append(numbers)

    with contextlib.closing(KafkaProducer(bootstrap_servers=kafka.hosts)) as producer:
        for number in range(1_050):
            producer.send(source, b"%d" % number)
        producer.flush()
    running = Running(app, source)
    running.run_until(lambda: sum(map(len, seen)) == 1_049)
    assert [number for batch in seen for number in batch] == [number for number in range(1_050) if number != 777]
    assert max(map(len, seen)) == 200
    assert len(running.told("dead")) == 1
    assert committed(kafka.hosts, source, source) == 1_050
