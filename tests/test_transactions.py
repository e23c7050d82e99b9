"""Transactional routes: what a message leads to, and its offset, count together or not at all."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from commands import flowkit as flowkit_command
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from processes import Process
from servers import CLIENT, ON_CONFLUENT, REPOSITORY, ApacheKafka, Kafka, MakeTopic, WaitFor, why_not_apache_kafka

import flowkit.consumer
from flowkit import Flowkit, Message, Retry, Settings
from flowkit.clients import CommitRefused, InDoubt, TransactionalClient, memory
from flowkit.clients.confluent_producer import TransactionalProducer as OnConfluent
from flowkit.clients.kafka_transactions import TransactionalProducer as OnKafkaPython
from flowkit.clients.memory import Broker
from flowkit.clients.opening import consumer_client, producer_client
from flowkit.consumer import Consumer
from flowkit.errors import BrokerUnavailable, ConfigurationError, DeliveryError, FlowkitError, SettingsError
from flowkit.message import Partition
from flowkit.producer import Producer
from flowkit.testing import Client

PASSING = DeliveryError("Kafka is away", passing=True)
TOO_LARGE = DeliveryError("too large")


class Picky(Broker):
    """Refuses the values in ``refused``, as a broker refuses a message that is too large."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: set[bytes] = set()
        self.transactions = 0

    def producer(self, settings: Settings, transactional_id: str | None = None, **_: Any) -> memory.Producer:
        return super().producer(settings) if transactional_id is None else PickyProducer(self)


TRANSACTIONAL: Any = OnConfluent if ON_CONFLUENT else OnKafkaPython


class PickyProducer(memory.TransactionalProducer):
    broker: Picky

    def begin(self) -> None:
        super().begin()
        self.broker.transactions += 1
        self.wrong: DeliveryError | None = None

    def send(self, topic: str, value: bytes | None, *rest: Any) -> Any:
        if value in self.broker.refused:
            self.wrong = TOO_LARGE
        return super().send(topic, value, *rest)

    def outcome(self, delivery: Any) -> DeliveryError | None:
        return self.wrong or super().outcome(delivery)  # every delivery of a transaction fails with one of them


class Loop:
    """A consumer of all topics of ``app`` on a broker in memory."""

    def __init__(self, app: Flowkit, broker: Broker | None = None) -> None:
        self.broker = broker or Picky()
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.producer = Producer(lambda: app.settings, self.broker.producer)
        self.settings: list[Settings] = []
        self.commits: list[Mapping[Partition, int]] = []
        app._producer = self.producer
        self.consumer = Consumer("g", app.handlings, app.settings, self, self.producer, self._make)

    def _make(self, settings: Settings, group: str) -> Any:
        self.settings.append(settings)
        client: Any = self.broker.consumer(settings, group)
        commit = client.commit

        def remember(offsets: Mapping[Partition, int]) -> None:
            self.commits.append(dict(offsets))
            commit(offsets)

        client.commit = remember
        return client

    def notice(self, event: str, **details: Any) -> None:
        self.events.append((event, details))

    def notice_error(self, event: str, error: BaseException, **details: Any) -> None:
        self.events.append((event, details))

    def told(self, event: str) -> list[dict[str, Any]]:
        return [details for name, details in self.events if name == event]

    def put(self, *values: Any, topic: str = "a", partition: int = 0) -> None:
        for value in values:
            self.broker.append(topic, str(value).encode(), partition=partition)

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.consumer.turn()

    def committed(self, topic: str = "a", partition: int = 0) -> int | None:
        return self.broker.commits["g"].get(Partition(topic, partition))

    def values(self, topic: str = "out") -> list[int]:
        return [int(record.value or b"-1") for record in self.broker.records(topic)]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowkit.consumer, "POLL_TIMEOUT", 0.0)


def make_app(**settings: Any) -> Flowkit:
    kafka = {"hosts": "127.0.0.1:9", **settings.pop("kafka", {})}
    given = {"inline": True, "transactional": True, "retry": Retry(attempts=3, first=0), **settings}
    return Flowkit("t", kafka=kafka, **given)


def relay(app: Flowkit, topic: str = "a", to: str = "out", **options: Any) -> list[int]:
    """A handler that sends on what it is given, but for negative numbers; gives those that it was called with."""
    seen: list[int] = []

    def handle(number: int) -> None:
        seen.append(number)
        if number >= 0:
            app.respond_to(to, number)

    app.add_topic(topic, handle, **options)
    app.add_response(handle, to, required=False)
    return seen


# What counts together.


def test_responses_and_offset_are_committed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app()
    relay(app)
    loop = Loop(app)
    at_commit = []
    commit = memory.TransactionalProducer.commit

    def look(self: Any, offsets: Any, membership: Any) -> None:
        at_commit.append((loop.values(), loop.committed(), loop.told("responded")))
        commit(self, offsets, membership)

    monkeypatch.setattr(memory.TransactionalProducer, "commit", look)
    loop.put(1, 2, 3)
    loop.turn()
    # Nothing was there before the commit, all of it afterwards; the ordinary commit has nothing to add
    assert at_commit == [([], None, [])]
    assert (loop.values(), loop.committed()) == ([1, 2, 3], 3)
    assert loop.told("responded") == [{"topic": "out", "count": 3}]
    assert loop.commits == []


def test_what_sends_nothing_goes_with_the_transaction_or_with_the_ordinary_commit() -> None:
    app = make_app(kafka={"offset_commit_interval": 1e-6})
    relay(app)
    loop = Loop(app)
    loop.put(-1, 1, -2)
    loop.turn()
    assert (loop.committed(), loop.commits) == (3, [])
    loop.put(-3)
    loop.turn()
    assert (loop.committed(), loop.commits) == (4, [{Partition("a", 0): 4}])
    assert isinstance(loop.broker, Picky)
    assert loop.broker.transactions == 1


def test_a_failed_check_sends_nothing_of_its_message_and_those_before_it_are_committed() -> None:
    app = make_app(retry=Retry(first=60))
    seen = []

    @app.topic("a")
    @app.responds_to("out")
    def handle(number: int) -> None:
        seen.append(number)
        app.respond_to("out", number)
        if number == 3:
            app.respond_to("out", number)

    loop = Loop(app)
    loop.put(1, 2, 3, 4)
    loop.turn(3)
    assert seen == [1, 2, 3]
    assert (loop.values(), loop.committed()) == ([1, 2], 2)
    assert [event["offset"] for event in loop.told("failed")] == [2]


def test_in_one_group_routes_with_and_without_transactions_are_together() -> None:
    app = make_app(transactional=False, kafka={"offset_commit_interval": 1e-6})
    relay(app, "a", "out", transactional=True)
    relay(app, "b", "plain")
    loop = Loop(app)
    loop.put(1, 2)
    loop.put(7, 8, 9, topic="b")
    loop.broker.refuse_offsets = CommitRefused("moved on")
    loop.turn()
    # Then one's messages are where they were, the other's are not concerned
    assert (loop.values("out"), loop.committed("a")) == ([], 0)
    assert (loop.values("plain"), loop.committed("b")) == ([7, 8, 9], 3)
    loop.broker.refuse_offsets = None
    loop.turn()
    assert (loop.values("out"), loop.committed("a")) == ([1, 2], 2)
    assert loop.values("plain") == [7, 8, 9]


def test_what_a_handler_sends_by_the_producer_is_outside_of_the_transaction() -> None:
    app = make_app()

    @app.topic("a")
    def handle(number: int) -> None:
        app.producer.send("log", number)
        app.producer.submit("log", number)

    loop = Loop(app)
    loop.put(1)
    loop.turn()
    assert loop.values("log") == [1, 1]


# Where a transaction fails, its messages come again.


def test_a_refused_commit_brings_every_message_again() -> None:
    app = make_app()
    seen = relay(app)
    loop = Loop(app)
    loop.put(-1, 1, 2)
    loop.broker.refuse_offsets = CommitRefused("moved on")
    loop.turn()
    assert (loop.values(), loop.committed(), loop.told("responded")) == ([], 1, [])  # -1 had sent nothing
    loop.broker.refuse_offsets = None
    loop.turn()
    assert seen == [-1, 1, 2, 1, 2]
    assert (loop.values(), loop.committed()) == ([1, 2], 3)
    assert loop.told("failed") == []  # for that is no fault of a message


def test_kafkas_absence_is_no_attempt() -> None:
    app = make_app(dead_letter="dead")
    attempts = []

    @app.topic("a")
    @app.responds_to("out")
    def handle(number: int, message: Message) -> int:
        attempts.append((number, message.attempt))
        return number

    loop = Loop(app)
    loop.put(1, 2)
    loop.broker.refuse = PASSING
    loop.turn(6)
    assert loop.values("dead") == []
    assert attempts[-1] == (2, 1)
    loop.broker.refuse = None
    loop.turn()
    assert (loop.values(), loop.committed()) == ([1, 2], 2)
    assert attempts[-2:] == [(1, 1), (2, 1)]


def test_brokers_that_open_no_transaction_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app()
    relay(app)
    loop = Loop(app)
    loop.turn()
    loop.put(1)
    transactions = loop.consumer.inline.transactions
    assert transactions is not None
    transactions.close(0)

    def away(*_: Any, **__: Any) -> Any:
        raise BrokerUnavailable("nobody there")

    with monkeypatch.context() as patch:
        patch.setattr(loop.producer, "_make", away)
        loop.turn(2)
        assert (loop.values(), loop.committed()) == ([], None)
    loop.turn()
    assert (loop.values(), loop.committed()) == ([1], 1)


def test_one_message_that_cannot_be_sent_is_found_without_calling_handlers_again() -> None:
    app = make_app(dead_letter="dead")
    seen = relay(app)
    broker = Picky()
    broker.create("a", 3)
    loop = Loop(app, broker)
    for partition in range(3):
        loop.put(*range(100 * partition, 100 * partition + 20), partition=partition)
    broker.refused = {b"107"}
    loop.turn()
    # Then all are committed but it and those behind it in its partition; each was handled once
    assert Counter(seen) == Counter([*range(20), *range(100, 120), *range(200, 220)])
    assert loop.committed("a", 0) == 20
    assert loop.committed("a", 1) == 7
    assert loop.committed("a", 2) == 20
    assert broker.transactions <= 15
    assert [(event["offset"], event["attempt"]) for event in loop.told("failed")] == [(7, 1)]
    # and when it has failed every attempt, alone, its dead letter goes with its offset, and the others after it
    before = broker.transactions
    loop.turn(3)
    assert [record.value for record in broker.records("dead")] == []  # it is too large for there too
    broker.refused.clear()
    loop.turn()
    assert broker.transactions - before < 12
    assert loop.committed("a", 1) == 20
    assert sorted(loop.values()) == [*range(20), *range(100, 120), *range(200, 220)]


def relay_batches(app: Flowkit, **options: Any) -> list[list[int]]:
    """A handler that answers each message of its batches; gives those that it was called with."""
    seen: list[list[int]] = []

    @app.topic("a", batch=True, **options)
    @app.responds_to("out", multiple_usage=True)
    def handle(numbers: list[int]) -> list[int]:
        seen.append(numbers)
        return numbers

    return seen


def test_the_responses_of_a_batch_and_the_offset_behind_it_are_committed_together() -> None:
    app = make_app()
    seen = relay_batches(app, max_batch=3)
    loop = Loop(app)
    loop.put(*range(8))
    refused = itertools.chain([CommitRefused("moved on")], itertools.repeat(None))
    commit = memory.TransactionalProducer.commit
    taken: list[tuple[int, Mapping[Partition, int]]] = []
    with pytest.MonkeyPatch.context() as patch:

        def sometimes(self: Any, offsets: Any, membership: Any) -> None:
            if error := next(refused):
                raise error
            commit(self, offsets, membership)
            taken.append((len(loop.values()), dict(offsets)))

        patch.setattr(memory.TransactionalProducer, "commit", sometimes)
        loop.turn()
        assert (loop.values(), loop.committed()) == ([], 0)
        loop.turn()
    assert (loop.values(), loop.committed()) == ([*range(8)], 8)
    assert taken == [(8, {Partition("a", 0): 8})]
    assert seen == [[0, 1, 2], [3, 4, 5], [6, 7]] * 2
    assert loop.told("responded") == [{"topic": "out", "count": 8}]


def test_a_part_of_the_batches_is_committed_with_the_offset_behind_it() -> None:
    """Where one of them has what cannot be sent. Its messages are handled one by one, to find out whose it is."""
    app = make_app(dead_letter="dead", retry=Retry(attempts=1, first=0))
    seen = relay_batches(app, max_batch=3)
    broker = Picky()
    loop = Loop(app, broker)
    loop.put(*range(10))
    broker.refused = {b"4"}
    loop.turn()
    assert (loop.values(), loop.committed()) == ([0, 1, 2], 3)
    assert loop.told("dead") == []
    letter = memory.TransactionalProducer.send

    def only_as_response(self: Any, topic: str, value: bytes | None, *rest: Any) -> Any:
        if topic == "out" and value == b"4":
            self.wrong = TOO_LARGE
        return letter(self, topic, value, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PickyProducer, "send", only_as_response)
        loop.turn(4)
    assert (sorted(loop.values()), loop.values("dead"), loop.committed()) == ([0, 1, 2, 3, *range(5, 10)], [4], 10)
    assert len(loop.values()) == 9
    together = [[6, 7, 8], [9]]
    assert seen == [[0, 1, 2], [3, 4, 5], *together, [3], [4], [5], *together, [5], *together]


@pytest.mark.parametrize("options", [{}, {"batch": True, "max_batch": 1}], ids=["one", "batch"])
def test_nothing_is_committed_of_a_slice_that_was_left_in_its_middle(options: dict[str, Any]) -> None:
    """By an error that no handler is to raise: the loop ends with it."""
    app = make_app()

    @app.topic("a", **options)
    @app.responds_to("out", multiple_usage=True)
    def handle(numbers: Any) -> Any:
        if numbers in (5, [5]):
            raise KeyboardInterrupt
        return numbers

    loop = Loop(app)
    loop.put(0, 1)
    loop.turn()
    loop.put(*range(2, 8))
    with pytest.raises(KeyboardInterrupt):
        loop.consumer.run()
    assert (loop.values(), loop.committed()) == ([0, 1], 2)


def test_the_dead_letter_is_in_one_transaction_with_the_offset() -> None:
    app = make_app(dead_letter="dead", retry=Retry(attempts=1, first=0))

    @app.topic("a")
    @app.responds_to("out")
    def handle(number: int) -> int:
        if number == 2:
            raise ValueError("no")
        return number

    loop = Loop(app)
    loop.put(1, 2, 3)
    refused = itertools.chain([None, CommitRefused("moved on")], itertools.repeat(None))
    commit = memory.TransactionalProducer.commit
    with pytest.MonkeyPatch.context() as patch:

        def sometimes(self: Any, offsets: Any, membership: Any) -> None:
            if error := next(refused):
                raise error
            commit(self, offsets, membership)

        patch.setattr(memory.TransactionalProducer, "commit", sometimes)
        loop.turn()
        # refused: neither is there
        assert (loop.values(), loop.values("dead"), loop.committed(), loop.told("dead")) == ([1], [], 1, [])
        loop.turn()
    assert (loop.values(), loop.values("dead"), loop.committed()) == ([1, 3], [2], 3)
    assert len(loop.told("dead")) == 1
    assert loop.told("responded") == [{"topic": "out", "count": 1}] * 2
    assert loop.commits == []


def test_a_message_that_fails_while_those_before_it_cannot_be_sent_is_not_let_go() -> None:
    app = make_app(dead_letter="dead", retry=Retry(attempts=1, first=0))

    @app.topic("a")
    @app.responds_to("out")
    def handle(number: int) -> int:
        if number == 2:
            raise ValueError("no")
        return number

    loop = Loop(app)
    loop.put(1, 2)
    loop.broker.refuse = PASSING
    loop.turn()
    assert (loop.values("dead"), loop.committed()) == ([], 0)
    loop.broker.refuse = None
    loop.turn()
    assert (loop.values(), loop.values("dead"), loop.committed()) == ([1], [2], 2)


def test_a_skipped_message_needs_no_transaction() -> None:
    app = make_app(on_poison="skip", retry=Retry(attempts=1, first=0), kafka={"offset_commit_interval": 1e-6})

    @app.topic("a")
    @app.responds_to("out")
    def handle(number: int) -> int:
        if number % 2:
            raise ValueError("odd")
        return number

    loop = Loop(app)
    loop.put(1, 2, 3)
    loop.turn()
    assert (loop.values(), loop.committed()) == ([2], 3)


# What happens to the group meanwhile.


def test_a_partition_that_leaves_while_its_handler_runs_is_left_out() -> None:
    app = make_app()
    loop: Loop

    @app.topic("a")
    @app.responds_to("out")
    def handle(number: int) -> int:
        if number == 10:  # in the second partition: the first one goes, and comes back as a new one
            loop.consumer.revoked([Partition("a", 0)])
            loop.consumer.assigned([Partition("a", 0)])
            loop.consumer.welcome()
        return number

    loop = Loop(app)
    loop.broker.create("a", 2)
    loop.put(1, 2)
    loop.put(10, 11, partition=1)
    loop.turn()
    assert loop.values() == [10, 11]
    assert (loop.committed("a", 0), loop.committed("a", 1)) == (None, 2)


def test_a_consumer_that_is_no_member_any_more_asks_nobody() -> None:
    app = make_app()
    relay(app)
    loop = Loop(app)
    loop.turn()
    loop.put(1)
    client: Any = loop.consumer.client
    membership = client.membership

    def none() -> Any:
        raise CommitRefused("no member")

    client.membership = none
    loop.turn()
    assert isinstance(loop.broker, Picky)
    assert (loop.values(), loop.broker.transactions) == ([], 0)
    client.membership = membership
    loop.turn()
    assert (loop.values(), loop.committed()) == ([1], 1)


def test_after_a_commit_in_doubt_the_groups_offsets_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a transaction that was committed, but nobody said so
    app = make_app()
    seen = relay(app)
    loop = Loop(app)
    commit = memory.TransactionalProducer.commit

    def doubtful(self: Any, offsets: Any, membership: Any) -> None:
        commit(self, offsets, membership)
        raise InDoubt("no answer")

    loop.put(1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(memory.TransactionalProducer, "commit", doubtful)
        with pytest.raises(FlowkitError, match=r"whether a transaction of a\[0\] was committed is not known"):
            loop.turn()
    # When the loop goes on with another client, as it does after an error
    loop.consumer._drop_client(1.0)
    assert loop.commits in ([], [{}])
    loop.put(3)
    loop.turn()
    # Then it goes on where the transaction had brought it
    assert seen == [1, 2, 3]
    assert (loop.values(), loop.committed()) == ([1, 2, 3], 3)


def test_a_stop_ends_with_a_transaction() -> None:
    app = make_app()
    seen = []

    @app.topic("a")
    @app.responds_to("out")
    def handle(number: int) -> int:
        seen.append(number)
        if number == 2:
            loop.consumer.stop()
        return number

    loop = Loop(app)
    loop.put(1, 2, 3)
    loop.consumer.run()
    assert (seen, loop.values(), loop.committed(), loop.consumer.clean) == ([1, 2], [1, 2], 2, True)


# How it is said, and what is refused.


def test_a_group_with_a_transactional_route_reads_what_is_committed_only() -> None:
    app = make_app(transactional=False)
    relay(app, transactional=True)
    loop = Loop(app)
    loop.turn()
    assert [settings.kafka.options for settings in loop.settings] == [{"isolation_level": "read_committed"}]
    assert loop.consumer.settings.kafka.options == {}

    app = make_app(transactional=False)
    relay(app)
    loop = Loop(app)
    loop.turn()
    assert [settings.kafka.options for settings in loop.settings] == [{}]


@pytest.mark.parametrize("options", [{"transactional": True}, {"transactional": True, "inline": False}])
def test_a_queued_route_is_refused(options: dict[str, Any]) -> None:
    app = Flowkit("t", kafka={"hosts": "127.0.0.1:9"})
    relay(app, **options)
    with pytest.raises(
        ConfigurationError, match=r"topic 'a': transactional=True is for routes with inline=True; .*queue"
    ):
        _ = app.handlings


def test_a_custom_worker_is_refused() -> None:
    class Elsewhere:
        def perform_async(self, topic: str, params: Any) -> None: ...

    app = Flowkit("t", kafka={"hosts": "127.0.0.1:9"})
    relay(app, transactional=True, worker=Elsewhere())
    with pytest.raises(ConfigurationError, match="transactional=True is for routes with inline=True"):
        _ = app.handlings


def test_the_setting_is_for_every_route_that_does_not_say_otherwise() -> None:
    app = make_app(inline=False)
    relay(app, inline=True)
    relay(app, "b", transactional=False)
    assert {topic: handling.transactional for topic, handling in app.handlings.items()} == {"a": True, "b": False}
    app = make_app(inline=False)
    relay(app)
    with pytest.raises(ConfigurationError, match="transactional=False for topic 'a'"):
        _ = app.handlings


def test_uncommitted_reads_are_refused() -> None:
    app = make_app(kafka={"isolation_level": "read_uncommitted"})
    relay(app)
    with pytest.raises(ConfigurationError, match=r"needs kafka\.isolation_level to be read_committed"):
        _ = app.handlings


def test_the_option_is_true_or_false() -> None:
    with pytest.raises(ConfigurationError, match="topic 'a': transactional is True or False, not 'yes'"):
        make_app().add_topic("a", print, transactional="yes")  # type: ignore[typeddict-item]


def test_a_time_that_is_too_short_is_refused() -> None:
    app = make_app(kafka={"transaction_timeout": 0.5})
    with pytest.raises(SettingsError, match=r"kafka\.transaction_timeout: 0\.5 s is too short"):
        _ = app.settings


def test_the_clients_own_options_are_named_in_flowkits_words() -> None:
    app = make_app(kafka={"transaction_timeout_ms": 5, "transactional_id": "x"})
    with pytest.raises(SettingsError, match=r"give it in seconds, as kafka\.transaction_timeout") as caught:
        app.settings_for_kafka()
    assert "kafka.transactional_id: cannot be passed through; flowkit makes one" in str(caught.value)


def test_handlers_are_tested_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    app = importlib.import_module("exactly").app
    with Client(app) as client:
        call = client.send("payments", {"from": "ann", "to": "bob"})
    assert [(sent.key, sent.value["side"]) for sent in call.all_sent("bookings")] == [
        ("ann", "debit"),
        ("bob", "credit"),
    ]


def test_where_routes_are_shown_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "from flowkit import Flowkit\napp = Flowkit('x', inline=True)\n"
        "@app.topic('a', transactional=True)\ndef f(n): ...\n@app.topic('b')\ndef g(n): ...\n"
    )
    assert flowkit_command("routes", "app", cwd=tmp_path).out.splitlines() == [
        "TOPIC  HANDLER  RUNS                   GROUP  ATTEMPTS",
        "a      f        inline, transactional  x_a    5",
        "b      g        inline                 x_b    5",
    ]


def test_a_queued_route_is_refused_at_start_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "from flowkit import Flowkit\napp = Flowkit('x', redis='redis://127.0.0.1:1/0', kafka={'hosts': '127.0.0.1:1'})\n"
        "@app.topic('a', transactional=True)\ndef f(n): ...\n"
    )
    done = flowkit_command("run", "app", cwd=tmp_path)
    assert done.code == 2
    assert "topic 'a': transactional=True is for routes with inline=True" in done.err
    assert "Traceback" not in done.err


# On Apache Kafka.

PARTITIONS = 4


@pytest.fixture
def apache(kafka: Kafka) -> Kafka:
    if not kafka.apache:
        pytest.skip("the embedded broker has no transactions to rely on")
    return kafka


class Reader:
    """Reads numbers from a topic, only those whose transactions were committed, and counts them."""

    def __init__(self, hosts: str, topic: str, isolation: str = "read_committed") -> None:
        self.counts: Counter[int] = Counter()
        self.consumer = KafkaConsumer(
            bootstrap_servers=hosts,
            auto_offset_reset="earliest",
            isolation_level=isolation,
            max_poll_records=5_000,
            reconnect_backoff_max_ms=500,
        )
        self.consumer.assign([TopicPartition(topic, number) for number in range(PARTITIONS)])

    def read(self) -> int:
        """Reads on; gives how many different numbers were there."""
        for records in self.consumer.poll(timeout_ms=20).values():
            self.counts.update(int(record.value) for record in records)
        return len(self.counts)

    def wait_for(self, wanted: int, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while (got := self.read()) < wanted:
            assert time.monotonic() < deadline, f"{got} of {wanted} messages answered after {timeout:g} s"

    @property
    def repeated(self) -> int:
        return sum(self.counts.values()) - len(self.counts)


@pytest.fixture
def reader() -> Iterator[Callable[..., Reader]]:
    with contextlib.ExitStack() as stack:

        def make(*args: str) -> Reader:
            found = Reader(*args)
            stack.callback(found.consumer.close, autocommit=False)
            return found

        yield make


def fill(hosts: str, topic: str, numbers: range) -> None:
    with contextlib.closing(KafkaProducer(bootstrap_servers=hosts, linger_ms=20, batch_size=262_144)) as producer:
        for number in numbers:
            producer.send(topic, b"%d" % number, partition=number % PARTITIONS)
        producer.flush()


def relay_env(hosts: str, topics: tuple[str, str], **more: str) -> dict[str, str]:
    return {
        "FLOWKIT_KAFKA_HOSTS": hosts,
        "FLOWKIT_TRANSACTIONAL": "1",
        "FLOWKIT_KAFKA_TRANSACTION_TIMEOUT": "5",
        "RELAY_IN": topics[0],
        "RELAY_OUT": topics[1],
        "RELAY_INLINE": "1",
        **more,
    }


def assert_once(reader: Reader, count: int) -> None:
    """Each response is there once. Reads on until nothing more comes, or one that is there twice would be overlooked."""
    reader.wait_for(count)
    ends = reader.consumer.end_offsets(reader.consumer.assignment())
    deadline = time.monotonic() + 60
    while any(reader.consumer.position(partition) < end for partition, end in ends.items()):
        reader.read()
        assert time.monotonic() < deadline, ends
    twice = [number for number, times in reader.counts.items() if times > 1]
    assert (sorted(reader.counts), len(twice), twice[:10]) == (list(range(count)), 0, [])


def test_each_response_is_there_once_though_members_are_killed_and_one_sleeps(
    apache: Kafka, topic: MakeTopic, reader: Callable[..., Reader], tmp_path: Path, wait_for: WaitFor
) -> None:
    # Given two members that relay numbers, of which more come all the time
    count, step = 30_000, 5_000
    topics = topic("in", PARTITIONS), topic("out", PARTITIONS)
    committed = reader(apache.hosts, topics[1])
    env = relay_env(apache.hosts, topics)
    logs = tmp_path / "one.log", tmp_path / "two.log"

    def start(number: int) -> Process:
        return Process("flowkit", "run", "relay:app", env=env, log=logs[number])

    with contextlib.ExitStack() as stack:
        members = [stack.enter_context(start(0)), stack.enter_context(start(1))]
        fill(apache.hosts, topics[0], range(step))
        committed.wait_for(step // 2)
        killed = []
        for turn in range(1, count // step):
            fill(apache.hosts, topics[0], range(turn * step, (turn + 1) * step))
            committed.wait_for(turn * step - step // 2)
            if turn == 4:
                # When one sleeps until the group has gone on without it, and wakes up in the middle of its work
                members[0].signal(signal.SIGSTOP)
                committed.wait_for((turn + 1) * step)
                members[0].signal(signal.SIGCONT)
            else:
                # and when they are killed in turns, while the other one goes on
                victim = turn % 2
                members[victim].kill()
                killed.append(committed.read())
                members[victim] = stack.enter_context(start(victim))
        # Then each response is there, and none is there twice for those who read what is committed
        assert_once(committed, count)
        assert len(killed) == 4
        for member in members:  # the other one may have been quicker than the last start
            member.wait_for("started application")
        assert [member.stop() for member in members] == [0, 0]


COUNT = 12_000


def log_of_killed(
    app: str, hosts: str, topics: tuple[str, str], committed: Reader, env: Mapping[str, str], directory: Path
) -> str:
    """What two members write that answer so many numbers, and are killed in turns. Each answer is there once."""
    step = COUNT // 4
    logs = directory / "one.log", directory / "two.log"

    def start(number: int) -> Process:
        return Process("flowkit", "run", app, env=env, log=logs[number])

    with contextlib.ExitStack() as stack:
        members = [stack.enter_context(start(0)), stack.enter_context(start(1))]
        for turn in range(COUNT // step):
            fill(hosts, topics[0], range(turn * step, (turn + 1) * step))
            committed.wait_for(turn * step + step // 2)
            victim = turn % 2
            members[victim].kill()
            members[victim] = stack.enter_context(start(victim))
        assert_once(committed, COUNT)
        for member in members:
            member.wait_for("started application")
        assert [member.stop() for member in members] == [0, 0]
    return "".join(log.read_text() for log in logs)


def test_each_response_is_there_once_though_batches_fail_in_their_middle_and_members_are_killed(
    apache: Kafka, topic: MakeTopic, reader: Callable[..., Reader], tmp_path: Path
) -> None:
    topics = topic("in", PARTITIONS), topic("out", PARTITIONS)
    env = relay_env(apache.hosts, topics, RELAY_BATCH="1")
    told = log_of_killed("relay:app", apache.hosts, topics, reader(apache.hosts, topics[1]), env, tmp_path)
    assert told.count("failed in relay_many") >= COUNT // 1_000


def test_each_response_is_there_once_though_some_wait_in_retry_topics_and_members_are_killed(
    apache: Kafka, topic: MakeTopic, reader: Callable[..., Reader], tmp_path: Path
) -> None:
    topics = topic("in", PARTITIONS), topic("out", PARTITIONS)
    for number in (1, 2):
        apache.create_topic(f"{topics[0]}.retry.{number}", PARTITIONS)
    env = {"FLOWKIT_KAFKA_HOSTS": apache.hosts, "STUMBLING_IN": topics[0], "STUMBLING_OUT": topics[1]}
    told = log_of_killed("stumbling:app", apache.hosts, topics, reader(apache.hosts, topics[1]), env, tmp_path)
    assert told.count("is not ready") >= COUNT // 25  # each of them failed at least once


class Running:
    """A loop of an application in this process, on real brokers, with what it is to send in transactions."""

    def __init__(self, app: Flowkit, group: str) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.consumer = Consumer(group, app.handlings, app.settings, self, app.producer, consumer_client)
        self.consumer.reconnect = Retry(first=0.1, cap=0.1)

    def notice(self, event: str, **details: Any) -> None:
        self.events.append((event, details))

    def notice_error(self, event: str, error: BaseException, **details: Any) -> None:
        self.events.append((event, {**details, "error": error}))

    def told(self, event: str) -> list[dict[str, Any]]:
        return [details for name, details in self.events if name == event]

    @property
    def transactions(self) -> Any:
        return self.consumer.inline.transactions

    def run_until(self, condition: Callable[[], Any], timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout

        def turn() -> None:
            original()
            # an error here would be taken for one of the brokers
            if condition() or time.monotonic() > deadline:
                self.consumer.stop()

        original = self.consumer.turn
        self.consumer.turn = turn  # type: ignore[method-assign]
        try:
            self.consumer.run()
        finally:
            self.consumer.turn = original  # type: ignore[method-assign]
        assert time.monotonic() <= deadline, self.events[-8:]


def kafka_app(hosts: str, **settings: Any) -> Flowkit:
    kafka = {"hosts": hosts, "session_timeout": 6, "heartbeat_interval": 1, "transaction_timeout": 2}
    return Flowkit("t", kafka=kafka, inline=True, transactional=True, **settings)


def put(hosts: str, topic: str, *values: bytes) -> None:
    with contextlib.closing(KafkaProducer(bootstrap_servers=hosts)) as producer:
        for value in values:
            producer.send(topic, value, partition=0)
        producer.flush()


def committed(hosts: str, group: str, topic: str) -> int | None:
    with contextlib.closing(
        KafkaConsumer(
            bootstrap_servers=hosts, group_id=group, enable_auto_commit=False, isolation_level="read_committed"
        )
    ) as consumer:
        offset: int | None = consumer.committed(TopicPartition(topic, 0))
        return offset


@pytest.fixture
def client(apache: Kafka, topic: MakeTopic) -> Iterator[Callable[..., TransactionalClient]]:
    """Makes clients for transactions; all have the same id."""
    settings = kafka_app(apache.hosts).settings
    name = f"id-{uuid.uuid4().hex[:8]}"
    with contextlib.ExitStack() as stack:

        def make(**kafka: Any) -> TransactionalClient:
            given = kafka_app(apache.hosts).settings if not kafka else _with(settings, kafka)
            found: Any = producer_client(given, name)
            stack.callback(found.close, 0)
            return found

        yield make


def _with(settings: Settings, kafka: dict[str, Any]) -> Settings:
    return Settings.load({"name": settings.name, "kafka": {"hosts": ",".join(settings.kafka.hosts), **kafka}}, CLIENT)


def test_offsets_of_an_earlier_generation_are_refused_and_nothing_is_seen(
    apache: Kafka, topic: MakeTopic, client: Callable[..., TransactionalClient], reader: Callable[..., Reader]
) -> None:
    # Given a member whose generation has passed, because another one joined
    source, out = topic("in"), topic("out", PARTITIONS)
    settings = kafka_app(apache.hosts).settings

    class Quiet:
        def assigned(self, partitions: Any) -> None: ...
        def revoked(self, partitions: Any) -> dict[Partition, int]:
            return {}

        def confirmed(self, offsets: Any) -> None: ...
        def lost(self, partitions: Any) -> None: ...

    with contextlib.ExitStack() as stack:
        members = [consumer_client(settings, source), consumer_client(settings, source)]
        for member in members:
            stack.callback(member.close, 2.0)
        members[0].subscribe([source], Quiet())
        while not members[0].joined():
            members[0].poll(0.1)
        before = members[0].membership()
        members[1].subscribe([source], Quiet())
        while not members[1].joined() or members[0].membership() == before:
            members[0].poll(0.1)
            members[1].poll(0.1)
        # When it commits with what it was then
        first = client()
        first.begin()
        delivery = first.send(out, b"1", None, (), 0)
        first.flush(5)
        assert first.outcome(delivery) is None
        with pytest.raises(CommitRefused, match=r"metadata mismatch|generation"):
            first.commit({Partition(source, 0): 1}, before)
        first.close(0)
        # and with what it is now, by a new client
        second = client()
        second.begin()
        delivery = second.send(out, b"2", None, (), 0)
        second.flush(5)
        assert second.outcome(delivery) is None
        second.commit({Partition(source, 0): 2}, members[0].membership())
    # Then only that counts
    found = reader(apache.hosts, out)
    found.wait_for(1)
    assert found.counts == {2: 1}
    assert committed(apache.hosts, source, source) == 2


def test_one_that_is_no_member_has_no_membership(apache: Kafka, topic: MakeTopic) -> None:
    member = consumer_client(kafka_app(apache.hosts).settings, topic("in"))
    try:
        with pytest.raises(CommitRefused, match="no longer a member"):
            member.membership()
    finally:
        member.close(2.0)


def test_a_new_client_ends_at_once_what_the_last_one_left_open(
    apache: Kafka, topic: MakeTopic, client: Callable[..., TransactionalClient], reader: Callable[..., Reader]
) -> None:
    out = topic("out", PARTITIONS)
    first = client(transaction_timeout=600)
    first.begin()
    delivery = first.send(out, b"1", None, (), 0)
    first.flush(5)
    assert first.outcome(delivery) is None
    put(apache.hosts, out, b"2")
    found = reader(apache.hosts, out)
    assert found.read() == 0  # what is behind an open transaction is not to be read
    client(transaction_timeout=600)
    found.wait_for(1, timeout=10)
    assert found.counts == {2: 1}
    # and the last one can send no more
    late = first.send(out, b"3", None, (), 0)
    first.flush(5)
    problem = first.outcome(late)
    assert problem is not None
    assert problem.passing


def test_a_time_that_the_brokers_do_not_allow_is_said(client: Callable[..., TransactionalClient]) -> None:
    with pytest.raises(
        ConfigurationError, match=r"kafka\.transaction_timeout: 5000 s is more than the brokers allow"
    ):
        client(transaction_timeout=5000)


@pytest.mark.parametrize("batch", [False, True], ids=["one by one", "batches"])
def test_a_response_that_kafka_refuses_becomes_a_dead_letter_and_the_others_are_answered(
    apache: Kafka, topic: MakeTopic, reader: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch, batch: bool
) -> None:
    monkeypatch.setattr(flowkit.consumer, "POLL_TIMEOUT", 0.1)
    # Given a topic that takes small messages only, and one response that is too large
    source, out, dead = topic("in"), topic("out", PARTITIONS), topic("dead")
    from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient

    with contextlib.closing(KafkaAdminClient(bootstrap_servers=apache.hosts)) as admin:
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, out, configs={"max.message.bytes": "500"})])
    app = kafka_app(apache.hosts, dead_letter=dead, retry=Retry(attempts=2, first=0.1, factor=1))
    seen: Counter[int] = Counter()

    def handle(number: int) -> bytes:
        seen[number] += 1
        return b"%d" % number if number != 7 else b"0" * 2_000

    def handle_many(numbers: list[int]) -> list[bytes]:
        return [handle(number) for number in numbers]

    if batch:
        app.topic(source, group=source, batch=True, max_batch=5)(
            app.responds_to(out, multiple_usage=True)(handle_many)
        )
    else:
        app.topic(source, group=source)(app.responds_to(out)(handle))

    put(apache.hosts, source, *(b"%d" % number for number in range(20)))
    loop = Running(app, source)
    try:
        loop.run_until(lambda: loop.told("dead"))
        found = reader(apache.hosts, out)
        loop.consumer.stopping = False
        loop.run_until(lambda: found.read() >= 19)
    finally:
        app.stop()
    assert sorted(found.counts) == [number for number in range(20) if number != 7]
    assert found.repeated == 0
    letters = reader(apache.hosts, dead)
    letters.consumer.assign([TopicPartition(dead, 0)])
    letters.wait_for(1)
    assert letters.counts == {7: 1}
    assert committed(apache.hosts, source, source) == 20
    # first the batch from 5 on, which is taken apart, and that is no attempt
    failed = [(event["offset"], event["attempt"]) for event in loop.told("failed")]
    assert failed == ([(5, 1)] if batch else []) + [(7, 1), (7, 2)]
    assert max(seen[number] for number in range(5 if batch else 7)) == 1  # nothing before it was handled again


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ApacheKafka]:
    if reason := why_not_apache_kafka():
        pytest.skip(f"Apache Kafka is to be stopped and started, and is not there: {reason}")
    with ApacheKafka(tmp_path / "node") as node:
        yield node


def test_each_response_is_there_once_though_the_broker_freezes_in_a_commit_and_is_killed(
    node: ApacheKafka, reader: Callable[..., Reader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = "in", "out"
    for name in (source, out):
        node.create_topic(name, PARTITIONS)
    # Given a broker that freezes when the request to commit is on its way, for longer than it is waited for
    app = kafka_app(node.hosts)

    @app.topic(source, group=source)
    @app.responds_to(out)
    def handle(number: int) -> int:
        return number

    loop = Running(app, source)
    fill(node.hosts, source, range(1_000))
    assert node.process is not None
    group = node.process.pid  # of processes
    send_offsets, init = TRANSACTIONAL._send_offsets, TRANSACTIONAL.__init__
    frozen: list[bool] = []

    def freeze(self: Any, *args: Any) -> None:
        send_offsets(self, *args)
        if not frozen:
            frozen.append(True)
            os.killpg(group, signal.SIGSTOP)

    def thaw(self: Any, *args: Any) -> None:
        os.killpg(group, signal.SIGCONT)
        init(self, *args)

    monkeypatch.setattr(TRANSACTIONAL, "_send_offsets", freeze)
    monkeypatch.setattr(TRANSACTIONAL, "__init__", thaw)
    found = reader(node.hosts, out)
    try:
        loop.run_until(lambda: found.read() >= 1_000)
    finally:
        app.stop()
    # Then that was noticed, and the group's offsets told where to go on
    assert frozen
    assert any("is not known" in str(event["error"]) for event in loop.told("broker"))
    assert_once(found, 1_000)

    # And when the broker is killed while an application runs, and comes back
    with Process(
        "flowkit", "run", "relay:app", env=relay_env(node.hosts, (source, out)), log=tmp_path / "log"
    ) as run:
        fill(node.hosts, source, range(1_000, 6_000))
        found.wait_for(2_000)
        node.kill()
        node.restart()
        fill(node.hosts, source, range(6_000, 8_000))
        assert_once(found, 8_000)
        assert run.stop() == 0
