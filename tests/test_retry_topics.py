"""Retry topics: a message that failed waits elsewhere, its partition goes on, and it comes back as the message that it was."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import pytest
from kafka import KafkaProducer
from servers import Kafka, MakeTopic
from test_consumer import Clock, Loop, stopped_clock
from test_transactions import Running

import flowkit.clients.memory
import flowkit.inline
from flowkit import Flowkit, Message, Retry
from flowkit.clients.memory import Broker
from flowkit.deadletters import letter, origin
from flowkit.errors import BrokerUnavailable, ConfigurationError, DeadLetterLimit, DeliveryError
from flowkit.flowmap import text
from flowkit.message import PlainRecord
from flowkit.topics import groups, uses

PATIENT = Retry(attempts=4, first=10, factor=3, jitter=0.5)
"""Waits of 10, 30 and 60 seconds."""

RETRY_TOPICS = ["a.retry.1", "a.retry.2", "a.retry.3"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Stops the clock of the brokers too."""
    clock = stopped_clock(monkeypatch)
    monkeypatch.setattr(clock, "time", lambda: 1_700_000_000 + clock.now)
    for module in (flowkit.inline, flowkit.clients.memory):
        monkeypatch.setattr(module, "time", clock)
    return clock


def make_app(**settings: Any) -> Flowkit:
    kafka = {"hosts": "127.0.0.1:9", **settings.pop("kafka", {})}
    given = {
        "inline": True,
        "retry": PATIENT,
        "retry_topic": "{topic}.retry",
        "dead_letter": "{topic}.dead",
        **settings,
    }
    return Flowkit("t", kafka=kafka, **given)


class Handler:
    """Fails for some values as often as it is told, and remembers what it was given."""

    def __init__(self, app: Flowkit, failures: dict[int, int], topic: str = "a") -> None:
        self.failures = failures
        self.seen: list[int] = []
        self.messages: list[Message] = []
        app.add_topic(topic, self.handle, group="g")

    def handle(self, value: int, message: Message) -> None:
        self.seen.append(value)
        self.messages.append(message)
        if self.failures.get(value, 0) > 0:
            self.failures[value] -= 1
            raise ValueError(f"not {value}")


# From topic to topic, and back as it was.


def test_a_failed_message_waits_elsewhere_and_its_partition_goes_on(clock: Clock) -> None:
    app = make_app()
    handler = Handler(app, {2: 1})
    loop = Loop(app, clock)
    loop.put("a", 1, 2, 3)
    loop.turn()
    assert handler.seen == [1, 2, 3]
    assert loop.committed("a") == 3
    assert loop.values("a.retry.1") == [2]
    loop.turn(9, after=1)
    assert handler.seen == [1, 2, 3]
    loop.turn(3, after=1)
    assert handler.seen == [1, 2, 3, 2]
    assert loop.committed("a.retry.1") == 1
    assert loop.values("a.retry.2") == loop.values("a.dead") == []


def test_it_comes_back_as_the_message_that_it_was(clock: Clock) -> None:
    app = make_app()
    handler = Handler(app, {7: 1})
    loop = Loop(app, clock)
    loop.broker.create("a", 3)
    loop.put("a", 1, 1, partition=2)
    loop.broker.append("a", b"7", b"key", [("trace", b"1"), ("trace", b"2")], 2)
    loop.turn(3, after=10)
    first, again = handler.messages[2:]
    assert (first.attempt, again.attempt) == (1, 2)
    assert not again.last_attempt
    for name in ("topic", "partition", "offset", "timestamp", "key", "value", "group"):
        assert getattr(first, name) == getattr(again, name)
    assert first.headers.pairs == again.headers.pairs


def test_each_wait_has_its_topic_and_after_the_last_one_there_is_a_dead_letter(clock: Clock) -> None:
    app = make_app()
    ends: list[tuple[int, bool]] = []

    @app.after_failure
    def note(error: Exception, message: Message) -> None:
        ends.append((message.attempt, message.last_attempt))

    handler = Handler(app, {5: 9})
    loop = Loop(app, clock)
    loop.put("a", 4, 5)
    times = []
    for second in range(150):
        before = len(handler.seen)
        loop.turn(after=1)
        times += [second] * (len(handler.seen) - before)
    assert times == [0, 0, pytest.approx(10, abs=2), pytest.approx(40, abs=4), pytest.approx(100, abs=6)]
    assert ends == [(1, False), (2, False), (3, False), (4, True)]
    assert [loop.values(topic) for topic in RETRY_TOPICS] == [[5], [5], [5]]
    (dead,) = loop.broker.records("a.dead")
    found = origin(dead.headers)
    assert found is not None
    assert (found.topic, found.partition, found.offset, found.attempts) == ("a", 0, 1, 4)
    assert [name for name, _ in dead.headers].count("kafka_dlt-original-topic") == 1
    told = [
        (event, about["topic"], about["offset"], about["attempt"])
        for event, about in loop.events.notices
        if "attempt" in about
    ]
    assert told == [("retried", "a", 1, 2), ("retried", "a", 1, 3), ("retried", "a", 1, 4), ("dead", "a", 1, 4)]


def test_what_never_helps_is_a_dead_letter_at_once(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=4, never=ValueError))
    Handler(app, {1: 9})
    loop = Loop(app, clock)
    loop.put("a", 1)
    loop.turn()
    assert loop.values("a.dead") == [1]
    assert loop.values("a.retry.1") == []


def test_without_an_end_it_comes_back_for_ever_and_holds_up_nothing(clock: Clock) -> None:
    app = make_app(dead_letter=None)
    handler = Handler(app, {1: 7})
    loop = Loop(app, clock)
    loop.put("a", 1, 2)
    loop.turn()
    assert "to let such messages go" not in loop.events.errors[0][2]
    loop.turn(500, after=1)
    assert handler.seen == [1, 2, *[1] * 7]
    assert [len(loop.values(topic)) for topic in RETRY_TOPICS] == [1, 1, 5]
    assert handler.messages[-1].attempt == 8
    assert "to let such messages go, name a topic for them" in loop.events.errors[-1][2]


def test_messages_that_are_due_do_not_wait_for_those_behind_them(clock: Clock) -> None:
    app = make_app()
    handler = Handler(app, dict.fromkeys(range(6), 1))
    loop = Loop(app, clock)
    for value in range(6):
        loop.put("a", value)
        loop.turn(after=1)
    clock.now += 7.5  # three of them are due
    loop.turn(2)
    assert handler.seen[6:] == [0, 1, 2]
    loop.turn(after=0.3)
    assert loop.committed("a.retry.1") == 3
    loop.turn(5, after=1)
    assert handler.seen[6:] == [0, 1, 2, 3, 4, 5]


def test_a_clock_that_is_set_back_makes_nothing_wait_longer_than_once(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app()
    handler = Handler(app, dict.fromkeys(range(5), 1))
    loop = Loop(app, clock)
    for value in range(5):
        loop.put("a", value)
        loop.turn(after=1)
    monkeypatch.setattr(clock, "time", lambda: 1_700_000_000 + clock.now - 3600)
    loop.turn(17, after=1)
    assert handler.seen[5:] == [0, 1, 2, 3, 4]


def test_dead_letters_are_counted_between_successes_of_the_whole_route(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=2, first=10, jitter=0), dead_letter_limit=2)
    handler = Handler(app, {1: 2, 2: 2, 3: 2})
    loop = Loop(app, clock)
    loop.put("a", 1)
    loop.turn(3, after=10)
    loop.put("a", 0, 2)  # a success between two of them
    loop.turn(3, after=10)
    assert loop.values("a.dead") == [1, 2]
    assert not loop.consumer.stopping
    loop.put("a", 3)
    loop.turn(3, after=10)
    assert loop.values("a.dead") == [1, 2, 3]
    assert isinstance(loop.consumer.stopping_for, DeadLetterLimit)
    assert handler.failures == {1: 0, 2: 0, 3: 0}


# What goes wrong.


def test_a_server_that_is_away_is_waited_for_in_place(clock: Clock) -> None:
    app = make_app()
    left = [BrokerUnavailable("nobody there")]
    seen: list[int] = []

    def handle(value: int) -> None:
        if value == 2 and left:
            raise left.pop()
        seen.append(value)

    app.add_topic("a", handle, group="g")
    loop = Loop(app, clock)
    loop.put("a", 1, 2, 3)
    loop.turn()
    assert seen == [1]
    loop.turn(2, after=60)
    assert seen == [1, 2, 3]
    assert loop.values("a.retry.1") == []


def test_where_there_is_no_retry_topic_the_partition_waits_and_its_attempts_count_on(clock: Clock) -> None:
    app = make_app()
    handler = Handler(app, {1: 2})
    loop = Loop(app, clock, broker=Broker(strict=True))
    for topic in ("a", "a.retry.2", "a.retry.3", "a.dead"):
        loop.broker.create(topic)
    loop.put("a", 1, 2)
    loop.turn()
    assert handler.seen == [1]
    assert [event for event, _, _ in loop.events.errors] == ["topics", "failed", "delivery"]
    loop.turn(2, after=60)  # its second failure: that topic is there
    assert handler.seen == [1, 1, 2]
    loop.turn(2, after=60)
    assert handler.seen == [1, 1, 2, 1]
    assert [message.attempt for message in handler.messages] == [1, 2, 1, 3]


def test_a_copy_that_is_not_confirmed_brings_its_message_again(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app()
    handler = Handler(app, {2: 1})
    loop = Loop(app, clock)
    loop.put("a", 1, 2, 3)
    loop.turn(0)
    loop.broker.refuse = DeliveryError("not now", passing=True)
    loop.turn()
    assert loop.committed("a") == 1
    assert handler.seen == [1, 2, 3]
    loop.broker.refuse = None
    loop.turn(2, after=60)
    assert handler.seen == [1, 2, 3, 2, 3]
    assert loop.committed("a") == 3


def test_what_another_group_sent_there_is_passed_over_and_what_anybody_sent_is_handled(clock: Clock) -> None:
    app = make_app()
    handler = Handler(app, {})
    loop = Loop(app, clock)
    record = PlainRecord("a", 0, 9, 1, None, b"9", ())
    for group in ("other", "g"):
        copy = letter("a.retry.1", record, group, ValueError("no"), 1)
        loop.broker.append(copy.topic, copy.value, copy.key, copy.headers)
    loop.put("a.retry.1", 7)
    loop.turn(3, after=30)
    assert handler.seen == [9, 7]
    assert [(message.topic, message.attempt) for message in handler.messages] == [("a", 2), ("a.retry.1", 1)]
    assert loop.committed("a.retry.1") == 3


@pytest.mark.parametrize("attempts", [b"", b"-1", b"many", b"1" * 400])
def test_headers_that_say_nothing_of_use_lose_nothing(clock: Clock, attempts: bytes) -> None:
    app = make_app()
    handler = Handler(app, {})
    loop = Loop(app, clock)
    copy = letter("a.retry.1", PlainRecord("a", 0, 9, 1, None, b"9", ()), "g", ValueError("no"), 1)
    headers = [(name, attempts if "flowkit" in name or "offset" in name else value) for name, value in copy.headers]
    loop.broker.append(copy.topic, copy.value, copy.key, headers)
    loop.turn(3, after=30)
    assert handler.seen == [9]
    assert handler.messages[0].attempt == 1


def test_what_is_left_in_topics_of_earlier_waits_is_handled(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=2, first=10))
    handler = Handler(app, {9: 1})
    loop = Loop(app, clock)
    copy = letter("a.retry.3", PlainRecord("a", 0, 9, 1, None, b"9", ()), "g", ValueError("no"), 3)
    loop.broker.append(copy.topic, copy.value, copy.key, copy.headers)
    loop.turn(3, after=10)
    assert handler.seen == [9]
    assert handler.messages[0].last_attempt
    assert loop.values("a.dead") == [9]


def test_in_a_transactional_route_the_copy_and_the_offset_count_together(clock: Clock) -> None:
    app = make_app(transactional=True)
    handler = Handler(app, {2: 1})
    loop = Loop(app, clock)
    app._producer = loop.producer
    loop.put("a", 1, 2, 3)
    loop.broker.refuse_offsets = DeliveryError("not now", passing=True)
    loop.turn()
    assert loop.values("a.retry.1") == []
    assert loop.committed("a") in (None, 1)
    loop.broker.refuse_offsets = None
    handler.failures[2] = 1
    loop.turn(2, after=60)
    assert loop.values("a.retry.1") == []
    assert loop.values("a.retry.2") == [2]  # its second failure
    assert loop.committed("a") == 3
    loop.turn(2, after=60)
    assert handler.seen[-1] == 2
    assert handler.messages[-1].attempt == 3


@pytest.mark.parametrize("transactional", [False, True])
def test_a_copy_that_kafka_refuses_for_good_does_not_make_its_message_come_again_for_ever(
    clock: Clock, transactional: bool
) -> None:
    """It waits in its partition, its attempts count on, and after the last one it is a dead letter."""
    app = make_app(transactional=transactional)
    handler = Handler(app, {2: 9})
    loop = Loop(app, clock, broker=Refusing("a.retry.1", "a.retry.2", "a.retry.3"))
    app._producer = loop.producer
    loop.put("a", 1, 2, 3)
    loop.turn(12, after=60)
    assert loop.values("a.dead") == [2]
    assert [message.attempt for message in handler.messages if message.payload == 2] == [1, 2, 3, 4]
    assert handler.seen[-1] == 3
    assert loop.committed("a") == 3


class Refusing(Broker):
    """Does not take what is sent to some topics, and says so when it is asked for the outcome."""

    def __init__(self, *topics: str) -> None:
        super().__init__()
        self.refused = topics

    def producer(self, settings: Any, transactional_id: str | None = None) -> Any:
        producer: Any = super().producer(settings, transactional_id)
        send = producer.send

        def refusing(topic: str, *rest: Any) -> Any:
            return DeliveryError("too large") if topic in self.refused else send(topic, *rest)

        producer.send = refusing
        return producer


@pytest.mark.parametrize("retry", [1, Retry(attempts=2, first=10)])
def test_what_is_left_over_is_handled_whatever_the_retries_are_now(clock: Clock, retry: Any) -> None:
    app = make_app(retry=Retry(attempts=1) if retry == 1 else retry)
    handler = Handler(app, {})
    loop = Loop(app, clock)
    copy = letter("a.retry.2", PlainRecord("a", 0, 9, 1, None, b"9", ()), "g", ValueError("no"), 2)
    loop.broker.append(copy.topic, copy.value, copy.key, copy.headers)
    loop.turn(3, after=10)
    assert handler.seen == [9]


def test_a_topic_with_a_handler_or_dead_letters_is_taken_for_none_that_is_left_over(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=2, first=10), dead_letter="a.retry.7")
    handler = Handler(app, {})
    other: list[int] = []
    app.add_topic("a.retry.5", other.append, group="g", retry_topic=False)
    loop = Loop(app, clock)
    loop.put("a.retry.5", 5)
    loop.put("a.retry.7", 7)
    loop.turn(3, after=10)
    assert (handler.seen, other) == ([], [5])


# Options.


def test_equal_waits_share_a_topic() -> None:
    app = make_app(retry=Retry(attempts=100, first=1, factor=2, cap=8))
    app.add_topic("a", print)
    assert app.handling("a").retry_topics == (("a.retry.1", 1), ("a.retry.2", 2), ("a.retry.3", 4), ("a.retry.4", 8))
    assert [app.handling("a").retry_topic(attempt).wait for attempt in (1, 2, 3, 4, 5, 99)] == [1, 2, 4, 8, 8, 8]


def test_the_setting_is_for_inline_routes_that_try_again_and_a_route_may_have_none() -> None:
    app = make_app(redis="redis://127.0.0.1:9")
    app.add_topic("a", print, inline=False)
    app.add_topic("b", print, retry=1)
    app.add_topic("c", print, retry_topic=False)
    app.add_topic("d", print, retry_topic="{group}.again", group="g")
    assert [app.handling(topic).retry_topics for topic in "abc"] == [(), (), ()]
    assert app.handling("d").retry_topics[0] == ("g.again.1", 10)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {"retry_topic": "{name}.retry"},
            "in the name of a retry topic {topic} and {group} may stand, and no other braces",
        ),
        ({"retry_topic": "a b"}, "'a b' cannot be the name of a topic"),
        ({"retry_topic": True}, "the name of a topic is a text, not bool"),
        ({"retry_topic": "r", "inline": False}, "retry_topic= is for routes with inline=True"),
        ({"retry_topic": "r", "retry": 1}, "retry= has one attempt only"),
        ({"retry_topic": "r", "retry": Retry(attempts=99, factor=1.01)}, "more than 20 different ones"),
        ({"retry_topic": "r" * 249}, "cannot be the name of a topic"),
        ({"retry_topic": "other"}, "'other.1' cannot be a retry topic of it, because it has a handler of its own"),
        ({"retry_topic": "gone"}, "'gone.2' cannot be a retry topic of it, because dead letters go there"),
        (
            {"retry_topic": "b"},
            "'b.1' cannot be a retry topic of it, because topic 'b' has it already: write {topic} in",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], complaint: str) -> None:
    app = make_app(redis="redis://127.0.0.1:9", retry_topic=None)
    app.add_topic("other.1", print)
    app.add_topic("b", print, retry_topic="b", dead_letter="gone.2")

    def start() -> None:
        app.add_topic("a", print, **options)
        app.start(connected=False)

    with pytest.raises(ConfigurationError, match=re.escape(complaint)):
        start()


def test_where_topics_are_shown_they_are_among_them() -> None:
    app = make_app()
    app.add_topic("a", print, group="g")
    assert uses(app) == {"a": ["route"], "a.dead": ["dead letter"], **{topic: ["retry"] for topic in RETRY_TOPICS}}
    assert groups(app) == {"g": ["a", *RETRY_TOPICS]}
    assert "  - a.retry.2: (failed ones, for 30 s)" in list(text(app))


# On Kafka.


def test_on_kafka_every_message_is_handled_though_some_fail_and_nothing_stands_still(
    kafka: Kafka, topic: MakeTopic
) -> None:
    source = topic("orders", 2)
    for number in (1, 2):
        kafka.create_topic(f"{source}.retry.{number}", 2)
    dead = f"{source}.dead"
    kafka.create_topic(dead, 1)
    app = Flowkit("t", kafka={"hosts": kafka.hosts}, inline=True, dead_letter=dead)
    handled: list[tuple[int, int, int]] = []
    places: set[tuple[str, int, int]] = set()

    @app.topic(source, group=source, retry=Retry(attempts=3, first=0.5, factor=2), retry_topic="{topic}.retry")
    def handle(order: dict[str, int], message: Message) -> None:
        number = order["id"]
        places.add((message.topic, message.partition, message.offset))
        if number % 10 == 0 and message.attempt <= number % 30 // 10 + 1:
            raise ValueError(f"{number} is not ready")
        handled.append((number, message.attempt, message.offset))

    count = 300
    with contextlib.closing(KafkaProducer(bootstrap_servers=kafka.hosts)) as producer:
        for number in range(count):
            producer.send(source, json.dumps({"id": number}).encode(), key=b"k%d" % number)
        producer.flush()
    running = Running(app, source)
    failing_for_good = count // 30
    running.run_until(
        lambda: len(handled) == count - failing_for_good and len(running.told("dead")) == failing_for_good
    )
    assert sorted(number for number, _, _ in handled) == [n for n in range(count) if n % 30 != 20]
    assert {attempt for number, attempt, _ in handled if number % 30 == 10} == {3}
    assert len(places) == count
    assert {each for each, _, _ in places} == {source}


def test_on_kafka_a_group_that_begins_at_the_end_leaves_out_nothing_that_waits(
    kafka: Kafka, topic: MakeTopic
) -> None:
    source = topic("orders")
    kafka.create_topic(f"{source}.retry.1", 1)
    copy = letter(f"{source}.retry.1", PlainRecord(source, 0, 9, 1, None, b"9", ()), source, ValueError("no"), 1)
    with contextlib.closing(KafkaProducer(bootstrap_servers=kafka.hosts)) as producer:
        producer.send(copy.topic, copy.value, headers=list(copy.headers))
        producer.send(source, b"1")
        producer.flush()
    app = Flowkit("t", kafka={"hosts": kafka.hosts, "auto_offset_reset": "latest"}, inline=True)
    seen: list[int] = []
    app.add_topic(source, seen.append, group=source, retry=Retry(attempts=2, first=0.1), retry_topic="{topic}.retry")
    Running(app, source).run_until(lambda: seen)
    assert seen == [9]
