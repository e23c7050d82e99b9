"""Handlers that run many at a time: in the order of keys, with offsets, failures and responses as if one by one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer
from processes import Process
from servers import Kafka, MakeTopic, WaitFor
from test_transactions import Loop, Running, committed

import flowkit.consumer
import flowkit.crowd
import flowkit.inline
from flowkit import Flowkit, Message, Retry
from flowkit.clients import Unreadable
from flowkit.errors import BrokerUnavailable, ConfigurationError, DeadLetterLimit, DeliveryError
from flowkit.message import Partition
from flowkit.testing import Client


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowkit.consumer, "POLL_TIMEOUT", 0.0)


def make_app(**settings: Any) -> Flowkit:
    kafka = {"hosts": "127.0.0.1:9", "offset_commit_interval": 60, **settings.pop("kafka", {})}
    return Flowkit("t", kafka=kafka, **{"inline": True, "retry": Retry(attempts=3, first=0), **settings})


class Handler:
    """Notes when each message began and ended, and how many were in hand; ``act`` is what it does with one."""

    def __init__(
        self, app: Flowkit, act: Callable[[int], Any], *, asynchronous: bool, topic: str = "a", **options: Any
    ) -> None:
        self.spans: dict[int, tuple[float, float]] = {}
        self.runs: Counter[int] = Counter()
        self.most = 0
        self._in_hand = 0
        self._lock = threading.Lock()
        self.act = act
        self.held: set[int] = set()
        """Values that it does not end with before they are taken out of here."""
        self.bad: set[int] = set()
        """Values that it fails for then."""
        handle: Any = self.coroutine if asynchronous else self.function
        app.add_topic(topic, handle, group="g", **{"concurrency": 10, **options})

    @contextlib.contextmanager
    def _noting(self, value: int) -> Any:
        began = time.monotonic()
        with self._lock:
            self.runs[value] += 1
            self._in_hand += 1
            self.most = max(self.most, self._in_hand)
        try:
            yield
        finally:
            with self._lock:
                self._in_hand -= 1
            self.spans[value] = began, time.monotonic()

    def function(self, value: int) -> Any:
        with self._noting(value):
            time.sleep(self.act(value) or 0)
            while value in self.held:
                time.sleep(0.001)
            self._fail(value)

    async def coroutine(self, value: int) -> Any:
        with self._noting(value):
            await asyncio.sleep(self.act(value) or 0)
            while value in self.held:
                await asyncio.sleep(0.001)
            self._fail(value)

    def _fail(self, value: int) -> None:
        if value in self.bad:
            raise ValueError(value)


def put(
    loop: Loop, *values: int, keys: Callable[[int], bytes | None] = lambda value: None, partition: int = 0
) -> None:
    for value in values:
        loop.broker.append("a", str(value).encode(), keys(value), partition=partition)


def turn(loop: Loop, done: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        loop.turn()
        if done():
            return
        time.sleep(0.0005)
    raise AssertionError("it does not come to its end")


def turn_to_end(loop: Loop, offset: int) -> None:
    """Until so many messages are committed."""
    turn(loop, lambda: (loop.consumer.commit(), loop.committed() == offset)[1])


def refuse_answer(loop: Loop, value: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer with this value cannot be sent."""
    start = loop.producer.start

    def refusing(item: Any, *rest: Any) -> Any:
        if item.topic == "out" and item.value == value:
            raise DeliveryError("too large")
        return start(item, *rest)

    monkeypatch.setattr(loop.producer, "start", refusing)


def fail_in(values: list[int], seconds: float = 0.02) -> Callable[[int], None]:
    """Fails for these values, when those begun with it have been begun."""

    def act(value: int) -> None:
        if value in values:
            time.sleep(seconds)
            raise ValueError(value)

    return act


both = pytest.mark.parametrize("asynchronous", [False, True], ids=["threads", "tasks"])


# How many, and in which order.


@both
def test_so_many_are_handled_at_once_and_no_more(asynchronous: bool) -> None:
    app = make_app()
    handler = Handler(app, lambda value: 0.02, asynchronous=asynchronous, concurrency=7)
    loop = Loop(app)
    put(loop, *range(40))
    turn(loop, lambda: len(handler.runs) == 40)
    assert handler.most == 7
    assert set(handler.runs.values()) == {1}


@both
def test_the_partitions_of_a_poll_are_handled_together(asynchronous: bool) -> None:
    app = make_app()
    handler = Handler(app, lambda value: 0.05, asynchronous=asynchronous, concurrency=12)
    loop = Loop(app)
    loop.broker.create("a", 4)
    for partition in range(4):
        put(loop, *range(3 * partition, 3 * partition + 3), partition=partition)
    turn(loop, lambda: len(handler.spans) == 12)
    assert handler.most == 12


@both
def test_messages_with_the_same_key_are_handled_in_order_and_never_at_once(asynchronous: bool) -> None:
    app = make_app()
    handler = Handler(app, lambda value: 0.002 * (value % 3), asynchronous=asynchronous)
    loop = Loop(app)
    put(loop, *range(60), keys=lambda value: b"%d" % (value % 6))
    turn(loop, lambda: len(handler.spans) == 60)
    assert handler.most > 3
    for key in range(6):
        spans = [handler.spans[value] for value in range(key, 60, 6)]
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


@both
def test_partitions_are_handled_at_once_and_each_in_order(asynchronous: bool) -> None:
    app = make_app()
    handler = Handler(app, lambda value: 0.002 + 0.002 * (value % 3), asynchronous=asynchronous, order="partition")
    loop = Loop(app)
    loop.broker.create("a", 3)
    for partition in range(3):
        put(loop, *range(partition, 60, 3), keys=lambda value: b"%d" % value, partition=partition)
    turn(loop, lambda: len(handler.spans) == 60)
    assert handler.most == 3
    for partition in range(3):
        spans = [handler.spans[value] for value in range(partition, 60, 3)]
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


@both
def test_in_a_partition_that_is_in_order_what_is_behind_a_failure_waits_for_it(asynchronous: bool) -> None:
    app = make_app()
    order: list[int] = []

    def act(value: int) -> None:
        order.append(value)
        if value == 2 and order.count(2) < 3:
            raise ValueError(value)

    handler = Handler(app, act, asynchronous=asynchronous, order="partition")
    loop = Loop(app)
    loop.broker.create("a", 2)
    put(loop, *range(6))
    put(loop, *range(10, 16), partition=1)
    turn(loop, lambda: len(handler.runs) == 12)
    assert [value for value in order if value < 10] == [0, 1, 2, 2, 2, 3, 4, 5]
    assert [value for value in order if value >= 10] == list(range(10, 16))


@both
def test_without_order_they_are_handled_at_once_too(asynchronous: bool) -> None:
    app = make_app()
    handler = Handler(app, lambda value: 0.2, asynchronous=asynchronous, order="none")
    loop = Loop(app)
    put(loop, *range(10), keys=lambda value: b"same")
    turn(loop, lambda: len(handler.spans) == 10)
    assert handler.most == 10


@both
def test_a_slow_message_holds_up_neither_its_batch_nor_what_comes_later(asynchronous: bool) -> None:
    app = make_app()
    handler = Handler(app, lambda value: 0.8 if value == 0 else 0.001, asynchronous=asynchronous, concurrency=4)
    loop = Loop(app)
    put(loop, *range(200), keys=lambda value: b"slow" if value in (0, 100) else b"%d" % value)
    turn(loop, lambda: len(handler.spans) == 198)
    put(loop, *range(200, 300))
    turn(loop, lambda: len(handler.spans) == 298)
    assert 0 not in handler.spans
    assert 100 not in handler.runs  # it has the same key
    loop.consumer.commit()
    assert loop.committed() in (None, 0)
    turn_to_end(loop, 300)
    assert handler.spans[0][1] <= handler.spans[100][0]
    assert set(handler.runs.values()) == {1}


@both
def test_behind_a_slow_message_there_are_not_more_and_more(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its partition is paused, and another one goes on. What is polled once more after the pause is not handled once more."""
    monkeypatch.setattr(flowkit.consumer, "MOST_HANDLED", 10)
    monkeypatch.setattr(flowkit.consumer, "ROUNDS", 1)
    app = make_app()
    handler = Handler(app, lambda value: None, asynchronous=asynchronous, concurrency=5)
    handler.held = {0}
    loop = Loop(app)
    loop.broker.create("a", 2)
    put(loop, *range(200))
    track = loop.consumer.tracks
    turn(loop, lambda: track.get(Partition("a", 0)) and track[Partition("a", 0)].held)
    put(loop, *range(1_000, 1_100), partition=1)
    turn(loop, lambda: all(value in handler.spans for value in range(1_000, 1_100)))
    assert len(handler.runs) < 200
    handler.held.clear()
    loop.consumer.commit()
    assert loop.committed() in (None, 0)
    turn_to_end(loop, 200)
    assert set(handler.runs.values()) == {1}
    assert not track[Partition("a", 0)].held


@both
def test_a_route_that_takes_no_more_does_not_hold_up_the_others_of_its_group(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowkit.consumer, "MOST_HANDLED", 10)
    monkeypatch.setattr(flowkit.consumer, "ROUNDS", 1)
    monkeypatch.setattr(flowkit.crowd, "PATIENCE", 0.05)
    app = make_app()
    handler = Handler(app, lambda value: None, asynchronous=asynchronous, concurrency=2)
    handler.held = set(range(30))
    plain: list[int] = []
    app.add_topic("b", plain.append, group="g")
    loop = Loop(app)
    put(loop, *range(30))
    turn(loop, lambda: len(handler.runs) == 2)
    for value in range(40):
        loop.broker.append("b", b"%d" % value)
    turn(loop, lambda: len(plain) == 40)
    assert loop.consumer.tracks[Partition("a", 0)].held
    assert len(handler.runs) == 2
    assert loop.consumer.stands_since < loop.consumer.turned_at  # for systemd and probes
    handler.held.clear()
    turn_to_end(loop, 30)
    assert set(handler.runs.values()) == {1}
    assert not loop.consumer.tracks[Partition("a", 0)].held
    assert loop.consumer.stands_since == loop.consumer.turned_at


@both
def test_one_key_with_many_messages_does_not_hold_up_the_polls(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are threads or tasks without work, so nothing is waited for before more is polled."""
    monkeypatch.setattr(flowkit.crowd, "PATIENCE", 60)
    monkeypatch.setattr(flowkit.consumer, "MOST_HANDLED", 10)
    monkeypatch.setattr(flowkit.consumer, "ROUNDS", 1)
    app = make_app()
    handler = Handler(app, lambda value: 0.005, asynchronous=asynchronous, concurrency=5)
    plain: list[int] = []
    app.add_topic("b", plain.append, group="g")
    loop = Loop(app)
    put(loop, *range(100), keys=lambda value: b"same")
    turn(loop, lambda: len(handler.spans) == 10)
    loop.broker.append("b", b"1")
    turn(loop, lambda: plain)
    assert len(handler.spans) < 100
    turn_to_end(loop, 100)
    assert list(handler.spans) == list(range(100))


@both
def test_what_has_an_outcome_is_not_waited_for(asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that ended when it had just been looked at: the next poll is short."""
    app = make_app()
    handler = Handler(app, lambda value: None, asynchronous=asynchronous)
    handler.held = {0}
    loop = Loop(app)
    put(loop, 0)
    turn(loop, lambda: handler.runs)
    handler.held.clear()
    window = loop.consumer.tracks[Partition("a", 0)].window
    assert window is not None
    deadline = time.monotonic() + 10
    while not window.outcomes and time.monotonic() < deadline:
        time.sleep(0.001)
    monkeypatch.setattr(flowkit.consumer, "POLL_TIMEOUT", 60)
    assert loop.consumer._poll_timeout() <= flowkit.crowd.LONGEST_PEEK


# Partitions that leave.

PLACE = Partition("a", 0)


def take_away(loop: Loop, *, lost: bool = False, stays: bool = False) -> dict[Partition, int]:
    """The partition leaves, and is there again with the next poll; with ``stays`` with the position that it had, as in
    kafka-python where nobody else was given it.
    """
    offsets: dict[Partition, int] = {}
    if lost:
        loop.consumer.lost([PLACE])
    else:
        offsets = loop.consumer.revoked([PLACE])
        loop.broker.commits["g"].update(offsets)
        loop.consumer.confirmed(offsets)
    if stays:
        loop.consumer.assigned([PLACE])
    else:
        del loop.consumer.client.positions[PLACE]  # type: ignore[attr-defined]
    return offsets


@both
def test_before_a_partition_leaves_what_is_in_hand_is_finished_and_nothing_is_begun(asynchronous: bool) -> None:
    app = make_app()
    handler = Handler(app, lambda value: 0.05, asynchronous=asynchronous, concurrency=3)
    answers: Any = handler.coroutine if asynchronous else handler.function
    app.add_response(answers, "out", required=False)
    loop = Loop(app)
    put(loop, *range(10))
    turn(loop, lambda: len(handler.runs) == 3)
    assert take_away(loop) == {PLACE: 3}
    assert len(handler.spans) == 3
    turn_to_end(loop, 10)
    assert set(handler.runs.values()) == {1}


@both
@pytest.mark.parametrize("stays", [False, True], ids=["its position is new", "its position stays"])
@pytest.mark.parametrize("lost", [False, True], ids=["revoked", "lost"])
def test_what_takes_longer_than_a_rebalance_waits_comes_again_behind_itself(
    asynchronous: bool, lost: bool, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it is this consumer again that has the partition: of one key there are never two in hand."""
    monkeypatch.setattr(flowkit.inline, "LAST_CHANCE", 0.05)
    app = make_app()
    handler = Handler(app, lambda value: None, asynchronous=asynchronous, concurrency=3)
    handler.held = {1}
    loop = Loop(app)
    put(loop, *range(6), keys=lambda value: b"%d" % (value % 2))
    turn(loop, lambda: {0, 2, 4} <= handler.spans.keys() and 1 in handler.runs)
    take_away(loop, lost=lost, stays=stays)
    assert lost or loop.committed() == 1
    put(loop, 6, keys=lambda value: b"even")  # polled from where the client was, it is polled once more
    turn(loop, lambda: handler.runs[2] == 2)
    assert handler.runs[1] == 1
    handler.held.clear()
    turn_to_end(loop, 7)
    assert {value: handler.runs[value] for value in range(1, 7)} == {1: 2, 2: 2, 3: 1, 4: 2, 5: 1, 6: 1}


@both
@pytest.mark.parametrize("way", ["revoked", "reconnect"])
def test_a_topic_that_was_made_anew_meanwhile_is_read_from_its_first_message(
    asynchronous: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app()
    handler = Handler(app, lambda value: None, asynchronous=asynchronous)
    loop = Loop(app)
    put(loop, *range(5))
    turn_to_end(loop, 5)
    make = loop.consumer.make_client

    def make_anew(*given: Any) -> Any:
        del loop.broker.topics["a"], loop.broker.ids["a"]
        loop.broker.commits["g"].clear()
        put(loop, *range(100, 110))
        return make(*given) if given else None

    if way == "revoked":
        take_away(loop)
        make_anew()
    else:
        loop.consumer.reconnect = Retry(first=0)
        monkeypatch.setattr(loop.consumer, "make_client", make_anew)
        loop.consumer._reconnect(BrokerUnavailable("gone"))
    turn(loop, lambda: (loop.consumer.commit(), loop.committed() == 10)[1])
    assert handler.runs == Counter([*range(5), *range(100, 110)])


@both
def test_where_the_log_begins_anew_nothing_is_committed_before_it_is_done(asynchronous: bool) -> None:
    app = make_app()
    handler = Handler(app, lambda value: None, asynchronous=asynchronous)
    handler.held = {100}
    loop = Loop(app)
    put(loop, *range(50))
    turn_to_end(loop, 50)
    loop.broker.topics["a"][0].clear()
    put(loop, 100)
    loop.consumer.client.positions[PLACE] = 0  # type: ignore[attr-defined]
    loop.consumer.moved(PLACE, 50, 0)
    turn(loop, lambda: 100 in handler.runs)
    loop.consumer.commit()
    assert loop.committed() == 0
    handler.held.clear()
    turn_to_end(loop, 1)


@both
def test_a_message_that_is_in_hand_when_its_client_is_given_up_comes_again_behind_itself(asynchronous: bool) -> None:
    app = make_app()
    handler = Handler(app, lambda value: None, asynchronous=asynchronous, concurrency=3)
    handler.held = {1}
    loop = Loop(app)
    loop.consumer.reconnect = Retry(first=0)
    put(loop, 0, 1, 2)
    turn(loop, lambda: handler.spans.keys() == {0, 2})
    loop.consumer._reconnect(BrokerUnavailable("gone"))
    turn(loop, lambda: handler.runs[2] == 2)
    assert handler.runs[1] == 1
    handler.held.clear()
    turn_to_end(loop, 3)
    assert handler.runs[1] == 2


@both
def test_a_stop_waits_for_what_is_in_hand_also_without_a_client(asynchronous: bool) -> None:
    app = make_app()
    handler = Handler(app, lambda value: None, asynchronous=asynchronous, concurrency=3)
    handler.held = {1}
    loop = Loop(app)
    put(loop, 0, 1, 2)
    turn(loop, lambda: handler.spans.keys() == {0, 2})
    loop.consumer._drop_client(0.1)
    loop.consumer.stop()
    ending = threading.Thread(target=loop.consumer.run, daemon=True)
    ending.start()
    ending.join(0.2)
    assert ending.is_alive()
    handler.held.clear()
    ending.join(20)
    assert not ending.is_alive()
    assert handler.runs == Counter([0, 1, 2])


@both
def test_what_is_gone_from_the_log_is_handled_if_it_was_read_before(asynchronous: bool) -> None:
    app = make_app()
    handler = Handler(app, lambda value: None, asynchronous=asynchronous, concurrency=2)
    handler.held = {0, 1}
    loop = Loop(app)
    put(loop, *range(6))
    turn(loop, lambda: len(handler.runs) == 2)
    put(loop, *range(6, 12))
    loop.consumer.client.positions[PLACE] = 10  # type: ignore[attr-defined]
    loop.consumer.moved(PLACE, 6, 10)
    handler.held.clear()
    turn_to_end(loop, 12)
    assert handler.runs == Counter([*range(6), 10, 11])


@both
def test_a_record_that_cannot_be_read_does_not_hold_up_what_is_before_it(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(retry=Retry(first=0.01), dead_letter="dead")
    handler = Handler(app, lambda value: None, asynchronous=asynchronous)
    handler.held, handler.bad = {1}, {1}
    loop = Loop(app)
    loop.consumer.reconnect = Retry(first=0.01, cap=0.02)
    put(loop, 0, 1, 2)
    turn(loop, lambda: handler.spans.keys() == {0, 2})
    client: Any = loop.consumer.client
    poll = client.poll

    def poll_badly(timeout: float, most: int) -> Any:
        batch = poll(timeout, most)
        if not batch and PLACE not in client.paused:
            raise Unreadable(PLACE, 3, None, ValueError("bad"))
        return batch

    monkeypatch.setattr(client, "poll", poll_badly)
    turn(loop, lambda: loop.told("unreadable"))
    handler.held.clear()
    turn_to_end(loop, 3)
    assert loop.values("dead") == [1]
    assert [event["attempt"] for event in loop.told("failed")] == list(range(1, handler.runs[1] + 1))


# Offsets and failures.


@both
def test_nothing_is_committed_past_a_message_that_is_not_done(asynchronous: bool) -> None:
    app = make_app(retry=Retry(first=3600))
    handler = Handler(app, fail_in([3]), asynchronous=asynchronous)
    loop = Loop(app)
    put(loop, *range(10))
    turn(loop, lambda: loop.told("failed") and len(handler.runs) == 10)
    loop.consumer.commit()
    assert loop.committed() == 3
    assert set(handler.runs.values()) == {1}


@both
def test_what_stands_behind_a_failed_message_is_not_handled_again(asynchronous: bool) -> None:
    app = make_app()
    left = [3, 3, 7]

    def act(value: int) -> None:
        if value in left:
            left.remove(value)
            raise ValueError(value)

    handler = Handler(app, act, asynchronous=asynchronous)
    loop = Loop(app)
    put(loop, *range(10))
    turn_to_end(loop, 10)
    assert handler.runs == Counter({**dict.fromkeys(range(10), 1), 3: 3, 7: 2})


@both
def test_what_has_the_key_of_a_failed_message_waits_for_it(asynchronous: bool) -> None:
    app = make_app()
    order: list[int] = []
    left = [1, 1]

    def act(value: int) -> None:
        order.append(value)
        if value in left:
            left.remove(value)
            raise ValueError(value)

    Handler(app, act, asynchronous=asynchronous)
    loop = Loop(app)
    put(loop, *range(8), keys=lambda value: b"odd" if value % 2 else b"%d" % value)
    turn_to_end(loop, 8)
    assert [value for value in order if value % 2] == [1, 1, 1, 3, 5, 7]
    assert sorted(value for value in order if value % 2 == 0) == [0, 2, 4, 6]


@both
def test_a_message_that_stays_bad_becomes_a_dead_letter_alone(asynchronous: bool) -> None:
    app = make_app(dead_letter="dead")
    attempts: list[tuple[int, bool]] = []

    @app.after_failure
    def note(error: Exception, message: Message) -> None:
        attempts.append((message.attempt, message.last_attempt))

    def act(value: int) -> None:
        if value == 4:
            raise ValueError("four")

    handler = Handler(app, act, asynchronous=asynchronous)
    loop = Loop(app)
    put(loop, *range(10))
    turn_to_end(loop, 10)
    assert loop.values("dead") == [4]
    assert attempts == [(1, False), (2, False), (3, True)]
    assert handler.runs == Counter({**dict.fromkeys(range(10), 1), 4: 3})


@both
def test_a_server_that_is_away_is_no_attempt(asynchronous: bool) -> None:
    app = make_app(dead_letter="dead")
    left = [BrokerUnavailable("nobody there")] * 5

    def act(value: int) -> None:
        if value == 1 and left:
            raise left.pop()

    handler = Handler(app, act, asynchronous=asynchronous)
    loop = Loop(app)
    put(loop, 0, 1, 2)
    turn_to_end(loop, 3)
    assert (handler.runs[1], loop.values("dead")) == (6, [])


@both
def test_failed_messages_may_wait_in_retry_topics(asynchronous: bool) -> None:
    app = make_app(retry_topic="{topic}.retry")
    left = [2]

    def act(value: int) -> None:
        if value in left:
            left.remove(value)
            raise ValueError(value)

    handler = Handler(app, act, asynchronous=asynchronous)
    loop = Loop(app)
    put(loop, 1, 2, 3)
    turn(loop, lambda: handler.runs[2] == 2)
    loop.consumer.commit()
    assert loop.committed() == 3
    assert loop.values("a.retry.1") == [2]


@both
def test_a_stop_waits_for_what_is_in_hand_and_begins_no_other(asynchronous: bool) -> None:
    app = make_app()

    def act(value: int) -> float:
        if value == 2:
            loop.consumer.stop()
        return 0.05

    handler = Handler(app, act, asynchronous=asynchronous, concurrency=3)
    loop = Loop(app)
    put(loop, *range(30))
    loop.consumer.run()
    assert len(handler.runs) <= 9
    assert len(handler.spans) == len(handler.runs)
    assert loop.committed() == len(handler.runs)


@both
def test_a_partition_that_leaves_takes_what_was_ahead_with_it(asynchronous: bool) -> None:
    """Else it would be passed over when the partition comes back, whatever is at those offsets then."""
    app = make_app(retry=Retry(first=3600))
    bad = [0]
    handler = Handler(app, fail_in(bad), asynchronous=asynchronous)
    loop = Loop(app)
    put(loop, 0, 1, 2)
    turn(loop, lambda: loop.told("failed"))
    assert handler.runs == Counter([0, 1, 2])
    take_away(loop)
    bad.clear()
    turn_to_end(loop, 3)
    assert handler.runs == Counter({0: 2, 1: 2, 2: 2})


@both
def test_when_a_message_is_let_go_by_itself_those_behind_it_have_their_turn(asynchronous: bool) -> None:
    app = make_app(dead_letter="dead", retry=1)
    handler = Handler(app, fail_in([0]), asynchronous=asynchronous)
    loop = Loop(app)
    put(loop, 0)
    turn_to_end(loop, 1)
    put(loop, 1, 2)
    turn_to_end(loop, 3)
    assert loop.values("dead") == [0]
    assert handler.runs == Counter([0, 1, 2])


@both
def test_what_is_behind_a_failed_message_waits_for_it_and_not_for_one_before_it(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one key 5 is handled and 7 fails, while 1 is slow; then the response to 5 is refused, and it is let go."""
    app = make_app(dead_letter="dead", retry=Retry(attempts=2, first=0.02))
    order: list[int] = []
    gate = threading.Event()

    def answer(value: int) -> int:
        order.append(value)
        if value == 7 and order.count(7) == 1:
            raise ValueError(value)
        return value

    async def answer_async(value: int) -> int:
        while value == 1 and not gate.is_set():
            await asyncio.sleep(0.001)
        return answer(value)

    def answer_blocking(value: int) -> int:
        assert value != 1 or gate.wait(20)
        return answer(value)

    @app.after_failure
    def take_long(error: Exception) -> None:
        time.sleep(0.02)

    handler: Any = answer_async if asynchronous else answer_blocking
    app.add_topic("a", handler, group="g", concurrency=4)
    app.add_response(handler, "out")
    loop = Loop(app)
    refuse_answer(loop, b"5", monkeypatch)
    put(loop, 1, 5, 7, 9, 11, keys=lambda value: b"B" if value == 1 else b"A")
    turn(loop, lambda: 7 in order)
    gate.set()
    turn_to_end(loop, 5)
    assert [value for value in order if value != 1] == [5, 7, 7, 9, 11]
    assert loop.values("dead") == [5]


@both
def test_too_many_dead_letters_in_a_row_end_the_loop_in_time(asynchronous: bool) -> None:
    app = make_app(dead_letter="dead", retry=1, dead_letter_limit=3)
    Handler(app, fail_in(list(range(50)), 0), asynchronous=asynchronous)
    loop = Loop(app)
    put(loop, *range(50))
    with pytest.raises(DeadLetterLimit):
        loop.consumer.run()
    assert (loop.values("dead"), loop.committed()) == ([0, 1, 2], 3)


def test_what_a_coroutine_sets_in_a_context_variable_is_not_there_for_the_next_one() -> None:
    variable: ContextVar[int | None] = ContextVar("variable", default=None)
    found: list[int | None] = []

    async def note(value: int) -> None:
        found.append(variable.get())
        variable.set(value)
        await asyncio.sleep(0.001)

    app = make_app()
    app.add_topic("a", note, group="g", concurrency=2)
    loop = Loop(app)
    put(loop, *range(6))
    turn_to_end(loop, 6)
    assert found == [None] * 6


@both
def test_a_failed_message_that_is_gone_when_it_should_come_again_is_not_waited_for(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 fails, and 1, which is in hand then, too; when they come again, compaction has left only what has the key of 1."""
    app = make_app(retry=Retry(first=0.1, attempts=5))
    handler = Handler(app, lambda value: None, asynchronous=asynchronous, concurrency=3)
    handler.held, handler.bad = {1}, {0, 1}
    loop = Loop(app)
    put(loop, 0, 1, 2, keys=lambda value: b"k" if value else b"n")
    turn(loop, lambda: loop.told("failed") and 1 in handler.runs)
    client: Any = loop.consumer.client
    poll = client.poll

    def poll_compacted(*given: Any) -> Any:
        batch = {
            place: [record for record in records if record.offset != 1] for place, records in poll(*given).items()
        }
        return {place: records for place, records in batch.items() if records}

    monkeypatch.setattr(client, "poll", poll_compacted)
    handler.held.clear()
    handler.bad = {1}
    turn_to_end(loop, 3)
    assert handler.runs == Counter({0: 2, 1: 1, 2: 1})


def test_a_coroutine_that_is_cancelled_is_a_failed_attempt_of_its_message() -> None:
    app = make_app(dead_letter="dead")

    def act(value: int) -> None:
        if value == 2:
            raise asyncio.CancelledError

    handler = Handler(app, act, asynchronous=True)
    loop = Loop(app)
    put(loop, *range(5))
    turn_to_end(loop, 5)
    assert loop.values("dead") == [2]
    assert handler.runs == Counter({**dict.fromkeys(range(5), 1), 2: 3})


@both
def test_what_takes_longer_than_a_batch_may_take_has_its_turn_all_the_same(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowkit.consumer, "LONGEST_BATCH", 0.05)
    app = make_app()
    Handler(app, lambda value: 0.2, asynchronous=asynchronous)
    loop = Loop(app)
    put(loop, *range(10))
    turn_to_end(loop, 10)


@both
def test_other_messages_at_the_same_offsets_are_handled(asynchronous: bool) -> None:
    """The brokers have lost the end of the log, and have others there now."""
    app = make_app(retry=Retry(first=3600))
    bad = [0]
    handler = Handler(app, fail_in(bad), asynchronous=asynchronous)
    loop = Loop(app)
    put(loop, 0, 1, 2)
    turn(loop, lambda: loop.told("failed"))
    bad.clear()
    loop.broker.topics["a"][0].clear()
    loop.consumer.moved(Partition("a", 0), 3, 0)
    put(loop, 5, 6, 7)
    loop.consumer.tracks[Partition("a", 0)].resume_at = 0.0
    turn_to_end(loop, 3)
    assert handler.runs == Counter([0, 1, 2, 5, 6, 7])


@both
def test_after_a_lost_response_keys_keep_their_order(asynchronous: bool) -> None:
    """What is behind the message that comes again comes again too."""
    app = make_app(kafka={"offset_commit_interval": 0.01})
    order: list[int] = []
    bad = [1]

    def answer(value: int) -> int:
        order.append(value)
        if value in bad:
            raise ValueError(value)
        return value

    async def answer_async(value: int) -> int:
        return answer(value)

    handler: Any = answer_async if asynchronous else answer
    app.add_topic("a", handler, group="g", concurrency=4)
    app.add_response(handler, "out")
    loop = Loop(app)
    put(loop, 0, 1, 2, keys=lambda value: b"B" if value == 1 else b"A")
    loop.broker.refuse = DeliveryError("not now", passing=True)
    turn(loop, lambda: loop.told("failed"))
    loop.broker.refuse = None
    bad.clear()
    turn_to_end(loop, 3)
    assert [value for value in order if value != 1] in ([0, 2, 0, 2], [0, 0, 2])


def test_an_outcome_that_cannot_be_sent_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(dead_letter="dead", retry=1)

    def answer(value: int) -> int:
        return value

    app.add_topic("a", answer, group="g", concurrency=4)
    app.add_response(answer, "out")
    loop = Loop(app)
    refuse_answer(loop, b"1", monkeypatch)
    put(loop, 0, 1, 2)
    turn_to_end(loop, 3)
    assert (loop.values(), loop.values("dead")) == ([0, 2], [1])
    window = loop.consumer.tracks[Partition("a", 0)].window
    assert window is not None
    assert (window.outcomes, list(window.records)) == ({}, [])


def test_threads_that_hang_do_not_hold_up_the_end_of_the_process() -> None:
    app = make_app()
    Handler(app, lambda value: None, asynchronous=False, topic="hanging", concurrency=3)
    loop = Loop(app)
    loop.broker.append("hanging", b"1")
    turn(loop, lambda: loop.consumer.tracks[Partition("hanging", 0)].done == 1)
    found = [thread for thread in threading.enumerate() if thread.name.startswith("flowkit-hanging-")]
    assert len(found) == 3
    assert all(thread.daemon for thread in found)


@both
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_is_no_failure_of_a_message_ends_the_loop_and_the_message_comes_again(asynchronous: bool) -> None:
    class End(BaseException):
        pass

    def act(value: int) -> None:
        if value == 2:
            raise End

    app = make_app(on_poison="skip", retry=1)
    Handler(app, act, asynchronous=asynchronous)
    loop = Loop(app)
    put(loop, *range(4))
    with pytest.raises(End):
        loop.consumer.run()
    assert loop.committed() == 2
    assert loop.told("skipped") == []


# Responses and hooks.


@both
def test_responses_are_sent_in_the_order_of_their_messages(asynchronous: bool) -> None:
    app = make_app()

    def answer(value: int) -> int:
        time.sleep(0.01 * (value % 3))
        return value

    async def answer_async(value: int) -> int:
        await asyncio.sleep(0.01 * (value % 3))
        return value

    handler: Any = answer_async if asynchronous else answer
    app.add_topic("a", handler, group="g", concurrency=5)
    app.add_response(handler, "out")
    loop = Loop(app)
    put(loop, *range(12))
    turn(loop, lambda: len(loop.values()) == 12)
    assert loop.values() == list(range(12))


@both
def test_calls_at_the_same_time_keep_their_responses_apart(asynchronous: bool) -> None:
    app = make_app()

    def announce(value: int) -> None:
        app.respond_to("news", value)

    app.add_response(announce, "news")

    @app.before_enqueue
    def tell(value: int) -> None:
        app.respond_with(announce, value + 100)

    def respond(value: int) -> None:
        time.sleep(0.01)
        app.respond_to("out", value)

    async def respond_async(value: int) -> None:
        await asyncio.sleep(0.01)
        app.respond_to("out", value)

    handler: Any = respond_async if asynchronous else respond
    app.add_topic("a", handler, group="g", concurrency=8)
    app.add_response(handler, "out")  # exactly one: the check would find another one's
    loop = Loop(app)
    put(loop, *range(16))
    turn(loop, lambda: len(loop.values()) == 16)
    assert loop.values("news") == [value + 100 for value in range(16)]


@both
def test_a_response_that_is_not_confirmed_brings_its_message_again(asynchronous: bool) -> None:
    app = make_app()
    runs: Counter[int] = Counter()

    def answer(value: int) -> int:
        runs[value] += 1
        return value

    async def answer_async(value: int) -> int:
        return answer(value)

    handler: Any = answer_async if asynchronous else answer
    app.add_topic("a", handler, group="g", concurrency=4)
    app.add_response(handler, "out")
    loop = Loop(app)
    put(loop, 0, 1, 2)
    loop.broker.refuse = DeliveryError("not now", passing=True)
    turn(loop, lambda: (loop.consumer.commit(), loop.told("failed"))[1])
    assert loop.committed() in (None, 0)
    loop.broker.refuse = None
    turn_to_end(loop, 3)
    assert sorted(set(loop.values())) == [0, 1, 2]


@both
def test_an_abort_in_a_handler_or_a_hook_ends_its_message_only(asynchronous: bool) -> None:
    app = make_app()

    @app.before_enqueue
    def odd_only(value: int) -> None:
        if value % 2 == 0:
            app.abort()

    def act(value: int) -> None:
        if value == 3:
            app.abort()

    handler = Handler(app, act, asynchronous=asynchronous)
    loop = Loop(app)
    put(loop, *range(6))
    turn_to_end(loop, 6)
    assert sorted(handler.runs) == [1, 3, 5]


@both
def test_in_a_transactional_route_responses_and_offset_count_together(asynchronous: bool) -> None:
    app = make_app(transactional=True)

    def answer(value: int) -> int:
        return value

    async def answer_async(value: int) -> int:
        return value

    handler: Any = answer_async if asynchronous else answer
    app.add_topic("a", handler, group="g", concurrency=4)
    app.add_response(handler, "out")
    loop = Loop(app)
    put(loop, *range(9))
    turn(loop, lambda: len(loop.values()) == 9)
    assert loop.values() == list(range(9))
    assert loop.committed() == 9


# Options.


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"concurrency": 0}, "concurrency is a whole number of at least 1, not 0"),
        ({"concurrency": 2, "inline": False}, "concurrency= is for routes with inline=True"),
        ({"concurrency": 2, "batch": True}, "concurrency= and batch=True do not go together"),
        ({"concurrency": 2, "order": "any"}, "order is 'key', 'partition' or 'none', not 'any'"),
        ({"order": "none"}, "order= is for concurrency= of more than 1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], complaint: str) -> None:
    app = make_app(redis="redis://127.0.0.1:9")

    def start() -> None:
        app.add_topic("a", lambda value: None, **options)
        app.start(connected=False)

    with pytest.raises(ConfigurationError, match=re.escape(complaint)):
        start()


@both
def test_the_test_client_handles_them_one_by_one(asynchronous: bool) -> None:
    app = make_app()
    handler = Handler(app, lambda value: None, asynchronous=asynchronous)
    Client(app).send_batch("a", [1, 2])
    assert (handler.runs, handler.most) == (Counter([1, 2]), 1)


# On Kafka.


@both
def test_on_kafka_all_are_handled_in_order_of_their_keys(kafka: Kafka, topic: MakeTopic, asynchronous: bool) -> None:
    source = topic("in", 3)
    app = Flowkit("t", kafka={"hosts": kafka.hosts}, inline=True, retry=Retry(first=0.1))
    seen: dict[str, list[int]] = defaultdict(list)
    failed: set[int] = set()

    def note(number: int, key: str) -> None:
        if number % 50 == 0 and number not in failed:
            failed.add(number)
            raise ValueError(number)
        seen[key].append(number)

    def handle(number: int, message: Message) -> None:
        time.sleep(0.002)
        note(number, (message.key or b"").decode())

    async def handle_async(number: int, message: Message) -> None:
        await asyncio.sleep(0.002)
        note(number, (message.key or b"").decode())

    handler: Any = handle_async if asynchronous else handle
    app.add_topic(source, handler, group=source, concurrency=20)
    with contextlib.closing(KafkaProducer(bootstrap_servers=kafka.hosts)) as producer:
        for number in range(1_000):
            producer.send(source, b"%d" % number, key=b"%d" % (number % 17))
        producer.flush()
    Running(app, source).run_until(lambda: sum(map(len, seen.values())) >= 1_000)
    assert seen == {str(key): list(range(key, 1_000, 17)) for key in range(17)}


class Runs:
    """What the processes of ``apps/crowd.py`` have handled of so many messages in a topic."""

    def __init__(self, kafka: Kafka, source: str, count: int, directory: Path, *, asynchronous: bool) -> None:
        self.count = 0
        self.log = directory / "log"
        self._hosts, self._source = kafka.hosts, source
        self._ledger = directory / "ledger"
        self._ledger.mkdir()
        self.env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts, "CROWD_TOPIC": source, "CROWD_LEDGER": str(self._ledger)}
        self.env |= {"CROWD_TASKS": "1"} if asynchronous else {}
        self.send(count)

    def send(self, count: int) -> None:
        """So many more."""
        with contextlib.closing(KafkaProducer(bootstrap_servers=self._hosts)) as producer:
            for number in range(self.count, self.count + count):
                producer.send(self._source, b"%d" % number, key=b"%d" % (number % 101))
            producer.flush()
        self.count += count

    def start(self) -> Process:
        return Process("flowkit", "run", "crowd:app", env=self.env, log=self.log)

    def read(self) -> list[tuple[int, ...]]:
        """Of each run the number, the key, the begin and the end."""
        return [
            tuple(map(int, line.split()))
            for path in self._ledger.iterdir()
            for line in path.read_text().rpartition("\n")[0].splitlines()
        ]

    def members(self) -> int:
        """How many processes have handled something."""
        # by their ids: two threads of one may each begin a file
        return len({path.name.partition("-")[0] for path in self._ledger.iterdir() if path.stat().st_size})

    def have_members(self, wanted: int) -> bool:
        """There is enough to do meanwhile."""
        if self.count - len(self.read()) < 10_000:
            self.send(10_000)
        return self.members() == wanted

    def are_complete(self) -> bool:
        return len({number for number, *_ in self.read()}) == self.count

    def check(self, repeated: int) -> None:
        """Each message was handled, no more than so many again, and those of each key in order and never two at once."""
        found = self.read()
        assert {number for number, *_ in found} == set(range(self.count))
        assert len(found) - self.count <= repeated
        spans: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for number, key, began, ended in found:
            spans[key].append((began, ended, number))
        for of_key in spans.values():
            of_key.sort()
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(of_key)), "two of a key at once"
            first = list(dict.fromkeys(number for _, _, number in of_key))
            assert first == sorted(first)


@both
def test_a_sigkill_loses_nothing_and_repeats_what_was_in_hand(
    kafka: Kafka, topic: MakeTopic, tmp_path: Path, wait_for: WaitFor, asynchronous: bool
) -> None:
    if not kafka.apache:
        pytest.skip("the embedded broker does not hand a killed member's partitions on")
    source = topic("crowd", 4)
    runs = Runs(kafka, source, 12_000, tmp_path, asynchronous=asynchronous)
    for at in (2_000, 5_000):
        with runs.start() as process:
            wait_for(lambda at=at: len(runs.read()) >= at)
            process.kill()
    with runs.start() as process:
        wait_for(runs.are_complete)
        assert process.stop() == 0
    runs.check(repeated=2 * 2_000)  # what 0.2 s between two commits handle, and a batch
    assert committed(kafka.hosts, source, source) is not None


@both
def test_members_that_join_and_leave_lose_nothing_and_keep_the_order_of_keys(
    kafka: Kafka, topic: MakeTopic, tmp_path: Path, wait_for: WaitFor, asynchronous: bool
) -> None:
    """Some partitions go and come back, others stay with a client that has read far beyond what is passed."""
    if not kafka.apache:
        pytest.skip("the embedded broker has one member a group")
    runs = Runs(kafka, topic("crowd", 4), 20_000, tmp_path, asynchronous=asynchronous)
    with runs.start() as first:
        for members, at in ((2, 3_000), (3, 10_000)):
            wait_for(lambda at=at: len(runs.read()) >= at)
            with runs.start() as second:
                wait_for(lambda members=members: runs.have_members(members))
                assert second.stop() == 0
        wait_for(runs.are_complete)
        assert first.stop() == 0
    runs.check(repeated=4 * 500)


def test_what_cancels_a_task_late_does_not_reach_other_messages() -> None:
    """A timer of a handler that has ended, as those have that forget their timers."""
    app = make_app()
    tasks: list[Any] = []

    async def act(number: int) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0.001)
        tasks.append(asyncio.current_task())

    app.add_topic("a", act, group="g", concurrency=2, order="none")
    loop = Loop(app)
    put(loop, *range(20))
    turn_to_end(loop, 20)
    assert loop.told("failed") == []
