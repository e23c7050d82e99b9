"""``redis_durability="wait"``: nothing is committed before what was queued is safe. Turn by turn, and on real servers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from test_consumer import NOWAIT, A, Clock, Loop, Redis, jobs, make_app, stopped_clock

import flowkit.consumer
import flowkit.dispatch
import flowkit.queueing
from flowkit import Flowkit, Message, Retry
from flowkit.errors import FlowkitError, RedisUnavailable
from flowkit.marks import Mark
from flowkit.message import Partition


class Disk:
    """A ``Keeper``, and the disk of a ``Redis`` in memory: it holds what that had when the last answer was given."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.slow = False
        self.failures = 0
        self.unfit = ""
        self.asked: dict[Partition, int] | None = None
        self.questions = 0
        self.queued: dict[Partition, int] = {}
        self.noted: dict[Partition, int] = {}
        self.eras: dict[Partition, str] = {}
        self.jobs: list[tuple[str, int, int]] = []

    def look(self) -> None:
        if self.unfit:
            raise RedisUnavailable(self.unfit)

    def ask(self, marks: Mapping[Partition, int]) -> None:
        assert self.asked is None, "two questions at a time"
        self.look()
        self.questions += 1
        self.asked = dict(marks)

    @property
    def under_way(self) -> bool:
        return self.asked is not None

    def answer(self, seconds: float = 0.0) -> list[Partition] | None:
        assert self.asked is not None
        flowkit.queueing.time.sleep(seconds)
        if self.slow:
            return None
        asked, self.asked = self.asked, None
        if self.failures:
            self.failures -= 1
            raise RedisUnavailable("Redis did not bring what was queued to its disk within 5 s")
        self.write()
        return [partition for partition, mark in asked.items() if self.redis.queued.get(partition, -1) < mark]

    def write(self) -> None:
        self._copy(self.redis, self)

    def crash(self) -> None:
        """Redis comes back with what is on the disk."""
        self._copy(self, self.redis)

    @staticmethod
    def _copy(before: Any, after: Any) -> None:
        after.queued, after.noted, after.eras = {**before.queued}, {**before.noted}, {**before.eras}
        after.jobs = [*before.jobs]


class Durable(Redis):
    """The ``JobQueue`` of the unit tests, with a disk."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk(self)
        self.before_change: Callable[[], None] = lambda: None

    def keeper(self, group: str) -> Disk:
        return self.disk

    def change(self, group: str, partition: Partition, before: Mark, after: Mark) -> bool:
        self.before_change()
        return super().change(group, partition, before, after)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return stopped_clock(monkeypatch)


def durable_app(topic: str = "a", **options: Any) -> Flowkit:
    settings = {name: options.pop(name) for name in ("dead_letter", "kafka") if name in options}
    app = make_app(inline=False, redis_durability="wait", **settings)
    app.add_topic(topic, lambda value: None, **options)
    return app


def test_nothing_is_committed_before_redis_has_answered(clock: Clock) -> None:
    redis = Durable()
    loop = Loop(durable_app(), clock, redis)
    redis.disk.slow = True
    loop.put("a", 1, 2, 3)
    loop.turn(5, after=1)
    assert redis.jobs == jobs(0, 1, 2)
    assert loop.committed("a") in (None, 0)
    # the next ones are queued meanwhile
    loop.put("a", 4)
    loop.turn(5, after=1)
    assert redis.jobs == jobs(0, 1, 2, 3)
    assert loop.committed("a") in (None, 0)
    assert redis.disk.questions == 1
    # the answer is one for what had been asked
    redis.disk.slow = False
    loop.turn(after=1)
    assert loop.committed("a") == 3
    loop.turn(2, after=1)
    assert loop.committed("a") == 4
    assert redis.noted == {A: 4}
    assert loop.events.errors == []


def test_without_the_setting_nobody_is_asked(clock: Clock) -> None:
    redis = Durable()
    app = make_app(inline=False)
    app.add_topic("a", lambda value: None)
    loop = Loop(app, clock, redis)
    loop.put("a", 1)
    loop.turn()
    assert (loop.committed("a"), redis.disk.questions) == (1, 0)


def test_inline_routes_of_the_same_group_wait_for_nothing(clock: Clock) -> None:
    redis = Durable()
    app = durable_app()
    app.add_topic("b", lambda value: None, inline=True)
    loop = Loop(app, clock, redis)
    redis.disk.slow = True
    loop.put("a", 1)
    loop.put("b", 1)
    loop.turn(3, after=1)
    assert (loop.committed("a"), loop.committed("b")) == (0, 1)


def test_a_disk_that_takes_too_long_brings_everything_back_and_it_is_asked_again(clock: Clock) -> None:
    redis = Durable()
    loop = Loop(durable_app(), clock, redis)
    redis.disk.failures = 3
    loop.put("a", 1, 2)
    loop.turn(3, after=0.01)
    assert redis.jobs == jobs(0, 1)
    assert loop.committed("a") in (None, 0)
    assert loop.client.paused == {A}
    assert "did not bring what was queued to its disk within 5 s; trying again in" in loop.events.errors[0][2]
    loop.turn(40, after=1)
    assert redis.jobs == jobs(0, 1)  # not twice
    assert loop.committed("a") == 2
    assert len(loop.events.errors) == 3  # once a try
    assert loop.events.count("recovered") == 1
    assert redis.disk.questions == 4
    assert loop.client.paused == set()


def test_waits_grow_while_the_disk_fails(clock: Clock) -> None:
    redis = Durable()
    loop = Loop(durable_app(), clock, redis)
    redis.disk.failures = 10**9
    loop.put("a", 1)
    loop.turn(600, after=1)
    assert 30 < len(loop.events.errors) < 90  # every 15 s at the end, and not every turn
    assert loop.committed("a") in (None, 0)


def test_what_was_queued_before_a_crash_is_asked_for_before_it_is_committed(clock: Clock) -> None:
    redis = Durable()
    redis.queued[A], redis.jobs = 2, jobs(0, 1)  # by a consumer that was killed before it got its answer
    loop = Loop(durable_app(), clock, redis)
    redis.disk.slow = True
    loop.put("a", 1, 2)
    loop.turn(5, after=1)
    assert loop.committed("a") in (None, 0)
    assert redis.disk.asked == {A: 2}
    redis.disk.slow = False
    loop.turn(2, after=1)
    assert loop.committed("a") == 2
    assert redis.jobs == jobs(0, 1)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_what_redis_loses_before_it_was_safe_is_queued_again(clock: Clock, kept: int) -> None:
    redis = Durable()
    loop = Loop(durable_app(), clock, redis)
    loop.put("a", *range(kept))
    loop.turn(3, after=1)
    redis.disk.slow = True
    loop.put("a", 7, 8, 9)
    loop.turn(2, after=1)
    assert len(redis.jobs) == kept + 3
    redis.disk.crash()
    assert len(redis.jobs) == kept
    redis.disk.slow = False
    loop.turn(10, after=1)
    assert redis.jobs == jobs(*range(kept + 3))
    assert loop.committed("a") == kept + 3


def test_a_rebalance_commits_what_is_safe_and_the_rest_comes_again_and_is_not_queued_twice(clock: Clock) -> None:
    redis = Durable()
    loop = Loop(durable_app(), clock, redis)
    loop.put("a", 1)
    loop.turn(3, after=1)
    redis.disk.slow = True
    loop.put("a", 2, 3)
    loop.turn(after=0.001)
    loop.take_away("a")
    assert loop.committed("a") == 1
    assert redis.disk.under_way
    redis.disk.slow = False
    loop.turn(5, after=1)
    assert redis.jobs == jobs(0, 1, 2)
    assert loop.committed("a") == 3


def test_a_new_client_while_a_question_is_under_way(clock: Clock) -> None:
    redis = Durable()
    loop = Loop(durable_app(), clock, redis)
    redis.disk.slow = True
    loop.put("a", 1, 2)
    loop.turn()
    loop.consumer._reconnect(RuntimeError("poll failed"))
    assert loop.committed("a") in (None, 0)
    loop.turn(3, after=1)
    redis.disk.slow = False
    loop.turn(4, after=1)
    assert redis.jobs == jobs(0, 1)
    assert loop.committed("a") == 2


def test_a_redis_that_cannot_keep_anything_gets_nothing(clock: Clock) -> None:
    redis = Durable()
    redis.disk.unfit = "it has no append-only file and no replica"
    loop = Loop(durable_app(), clock, redis)
    loop.put("a", 1)
    loop.turn(20, after=1)
    assert redis.jobs == []
    assert loop.committed("a") in (None, 0)
    assert {error[0] for error in loop.events.errors} == {"queue"}
    assert "no append-only file" in loop.events.errors[0][2]
    redis.disk.unfit = ""
    loop.turn(20, after=1)
    assert redis.jobs == jobs(0)
    assert loop.committed("a") == 1


def test_a_stop_waits_until_what_is_queued_is_safe(clock: Clock) -> None:
    redis = Durable()
    app = durable_app()
    loop = Loop(app, clock, redis)
    redis.disk.slow = True
    loop.put("a", 1, 2)
    loop.turn()
    loop.consumer.stop()
    sleep = clock.sleep

    def then_it_is(seconds: float) -> None:
        sleep(seconds)
        redis.disk.slow = clock.now < began + 2

    began = clock.now
    clock.sleep = then_it_is  # type: ignore[method-assign]
    loop.turn()
    loop.consumer._end()
    assert loop.committed("a") == 2


def test_a_stop_does_not_wait_for_ever(clock: Clock) -> None:
    redis = Durable()
    loop = Loop(durable_app(), clock, redis)
    redis.disk.slow = True
    loop.put("a", 1, 2)
    loop.turn()
    loop.consumer.stop()
    began = clock.now
    loop.turn()
    loop.consumer._end()
    assert clock.now - began < 10
    assert loop.committed("a") in (None, 0)


def test_a_hook_that_fails_while_others_are_not_safe_commits_none_of_them(clock: Clock) -> None:
    redis = Durable()
    app = durable_app(retry=Retry(attempts=2, first=0, jitter=0), dead_letter="dead")

    @app.before_enqueue("a")
    def hook(value: int, message: Message) -> None:
        if value == 3:
            raise ValueError("no")

    loop = Loop(app, clock, redis)
    loop.broker.create("dead")
    redis.disk.slow = True
    loop.put("a", 1, 2, 3, 4)
    loop.turn(8, after=1)
    assert redis.jobs == jobs(0, 1, 3)
    assert loop.values("dead") == [3]
    assert loop.committed("a") in (None, 0)
    redis.disk.slow = False
    loop.turn(4, after=1)
    assert redis.jobs == jobs(0, 1, 3)
    assert loop.committed("a") == 4


def test_a_topic_made_anew_while_its_messages_are_not_safe(clock: Clock) -> None:
    redis = Durable()
    loop = Loop(durable_app(), clock, redis)
    redis.disk.slow = True
    loop.put("a", 1, 2, 3)
    loop.turn(2, after=1)
    loop.broker.topics["a"][0].clear()
    loop.client.positions[A] = 0
    loop.put("a", 7)
    loop.turn(after=1)
    redis.disk.slow = False
    loop.turn(4, after=1)
    assert redis.jobs == jobs(0, 1, 2, 0)
    assert loop.committed("a") == 1


def test_a_partition_that_is_held_while_it_is_not_safe(clock: Clock) -> None:
    redis = Durable()
    loop = Loop(durable_app(), clock, redis)
    redis.disk.slow = True
    redis.backlog = 10**6
    loop.put("a", 1, 2)
    loop.turn(2, after=1)
    loop.put("a", 3)
    loop.turn(2, after=1)
    assert redis.jobs == jobs(0, 1)
    redis.disk.failures, redis.disk.slow = 1, False
    loop.turn(20, after=1)
    assert loop.committed("a") in (None, 0)  # what is to be asked for again comes after the pause
    redis.backlog = 0
    loop.turn(20, after=1)
    assert redis.jobs == jobs(0, 1, 2)
    assert loop.committed("a") == 3


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_nothing_is_committed_that_is_not_safe(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    redis = Durable()
    app = durable_app(retry=NOWAIT)
    app.add_topic("b", lambda value: None)
    trouble = {"hook": 0.0, "change": 0.2}

    def before_change() -> None:
        if chance.random() < trouble["change"]:
            raise RedisUnavailable("Redis does not answer")

    redis.before_change = before_change

    @app.before_enqueue("b")
    def hook(value: int, message: Message) -> None:
        if chance.random() < trouble["hook"]:
            raise ValueError("no")

    loop = Loop(app, clock, redis)
    loop.broker.create("a", 2)
    loop.broker.create("b", 1)

    def check(offsets: Mapping[Partition, int]) -> None:
        for partition, offset in offsets.items():
            on_disk = {entry[2] for entry in redis.disk.jobs if entry[:2] == tuple(partition)}
            assert on_disk >= set(range(offset)), f"{partition} is committed up to {offset}"
        loop.broker.commits["g"].update(offsets)

    def make(settings: Any, group: str) -> Any:
        client = loop.broker.consumer(settings, group)
        client.commit = check  # type: ignore[method-assign]
        return client

    def turn(after: float) -> None:
        try:
            loop.turn(after=after)
        except FlowkitError as error:  # as run() does it
            loop.consumer._reconnect(error)

    loop.consumer.make_client = make
    trouble["hook"] = 0.1
    places = [Partition("a", 0), Partition("a", 1), Partition("b", 0)]
    sent: dict[Partition, int] = dict.fromkeys(places, 0)
    for _ in range(150):
        place = chance.choice(places)
        for _ in range(chance.choice([0, 0, 1, 3])):
            loop.put(place.topic, sent[place], partition=place.partition)
            sent[place] += 1
        redis.disk.slow = chance.random() < 0.5
        match chance.randrange(12):
            case 0:
                redis.disk.crash()
            case 1:
                redis.disk.failures = 1
            case 2:
                redis.down = 1
            case 3:
                redis.disk.write()
            case 4:
                redis.backlog = chance.choice([0, 10**6])
            case 5 if place in loop.consumer.tracks:
                held = loop.consumer.revoked([place])
                check(held)
                del loop.client.positions[place]
        turn(chance.choice([0.01, 0.3, 3]))
    trouble["change"] = 0.0
    trouble["hook"], redis.backlog, redis.disk.slow, redis.disk.failures, redis.down = 0.0, 0, False, 0, 0
    for _ in range(60):
        turn(2)
    wanted = sorted((p.topic, p.partition, offset) for p, count in sent.items() for offset in range(count))
    assert sorted(redis.jobs) == wanted  # each of them once
    assert {p: loop.committed(*p) or 0 for p in places} == sent
