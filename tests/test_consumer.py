"""The consumer's loop, turn by turn, on the broker in memory: what is handled, repeated, committed, and what never is."""

from __future__ import annotations

import asyncio
import logging
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest

import flowkit.batches
import flowkit.clients.memory
import flowkit.consumer
import flowkit.dispatch
import flowkit.inline
import flowkit.lookout
import flowkit.queueing
import flowkit.quick
from flowkit import Flowkit, Message, Retry
from flowkit.clients import CommitRefused
from flowkit.clients.memory import Broker
from flowkit.clients.memory import Consumer as MemoryConsumer
from flowkit.consumer import LONGEST_BATCH, MOST_QUEUED, Consumer
from flowkit.coroutines import close_loop
from flowkit.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DeadLetterLimit,
    DeliveryError,
    PoisonMessage,
    RedisUnavailable,
)
from flowkit.jobqueue import MarksMoved, Pack, Queued
from flowkit.marks import Mark
from flowkit.message import Partition
from flowkit.producer import Producer
from flowkit.queueing import LINGER

NOWAIT = Retry(first=0)
HOUR = 3600.0


class Clock:
    """Time that only moves when a test says so. It stands for the module ``time`` of the loop and of dispatch."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Events:
    """A monitor that remembers."""

    def __init__(self) -> None:
        self.notices: list[tuple[str, dict[str, Any]]] = []
        self.errors: list[tuple[str, BaseException, str]] = []

    def notice(self, event: str, **details: Any) -> None:
        self.notices.append((event, details))

    def notice_error(self, event: str, error: BaseException, message: str = "", **_: Any) -> None:
        self.errors.append((event, error, message))

    def count(self, event: str) -> int:
        return sum(name == event for name, _ in self.notices)


class Redis:
    """A ``JobQueue`` in memory: jobs and marks move together, and only from the marks that the caller expects."""

    def __init__(self) -> None:
        self.queued: dict[Partition, int] = {}
        self.noted: dict[Partition, int] = {}
        self.eras: dict[Partition, str] = {}
        self.jobs: list[tuple[str, int, int]] = []
        self.queues: list[str] = []
        self.down = 0
        self.before_enqueue: Callable[[], None] = lambda: None
        self.enqueued = 0
        self.backlog = 0
        self.busy = False
        self.asked: list[str] = []

    def _ask(self) -> None:
        if self.down:
            self.down -= 1
            raise RedisUnavailable("Redis does not answer")

    @property
    def marks(self) -> Redis:
        return self

    def read(self, group: str, partitions: Sequence[Partition]) -> dict[Partition, Mark]:
        self._ask()
        return {p: Mark(self.queued.get(p), self.noted.get(p), self.eras.get(p)) for p in partitions}

    def change(self, group: str, partition: Partition, before: Mark, after: Mark) -> bool:
        self._ask()
        if (self.queued.get(partition), self.eras.get(partition)) != (before.queued, before.era):
            return False
        for marks, value in ((self.queued, after.queued), (self.noted, after.committed), (self.eras, after.era)):
            marks.pop(partition, None)
            if value is not None:
                marks[partition] = value
        return True

    def note(self, group: str, offsets: Mapping[Partition, tuple[int, str]]) -> None:
        self._ask()
        for partition, (offset, era) in offsets.items():
            if self.eras.get(partition) == era:
                self.noted[partition] = max(offset, self.noted.get(partition, -1))

    def enqueue(
        self, group: str, packs: Sequence[Pack], expected: Mapping[Partition, Mark], moved: Mapping[Partition, int]
    ) -> Queued:
        self.before_enqueue()
        self._ask()
        self.enqueued += 1
        for p in moved:
            if (self.queued.get(p), self.eras.get(p)) != (expected[p].queued, expected[p].era):
                raise MarksMoved
        self.queued.update(moved)
        for pack in packs:
            self.jobs += [(pack.handling.topic, entry[1], entry[2]) for entry in pack.entries]
            self.queues += [pack.queue] * len(pack.entries)
        return Queued([1] * len(packs), {pack.queue: self.backlog for pack in packs})

    def waiting(self, queue: str) -> int:
        self._ask()
        return self.backlog

    def is_busy(self, queue: str) -> bool:
        self.asked.append(queue)
        return self.busy

    def put(self, partition: Partition, offsets: Iterable[int]) -> None:
        """What another consumer of the group does."""
        for offset in offsets:
            self.jobs.append((partition.topic, partition.partition, offset))
            self.queued[partition] = offset + 1


class Loop:
    """A consumer of all topics of ``app``, and the broker it consumes from."""

    def __init__(self, app: Flowkit, clock: Clock, redis: Redis | None = None, broker: Broker | None = None) -> None:
        self.clock = clock
        self.broker = broker or Broker()
        self.events = Events()
        self.commits: list[dict[Partition, int]] = []
        self.producer = Producer(lambda: app.settings, self.broker.producer)
        self.consumer = Consumer(
            "g",
            app.handlings,
            app.settings,
            self.events,
            self.producer,
            self._client,
            redis,  # type: ignore[arg-type]
        )

    def _client(self, settings: Any, group: str) -> MemoryConsumer:
        client = self.broker.consumer(settings, group)
        commit = client.commit

        def remember(offsets: Mapping[Partition, int]) -> None:
            if offsets:
                self.commits.append(dict(offsets))
            commit(offsets)

        client.commit = remember  # type: ignore[method-assign]
        return client

    @property
    def client(self) -> Any:
        return self.consumer.client

    def put(self, topic: str, *values: int, partition: int = 0) -> None:
        for value in values:
            self.broker.append(topic, str(value).encode(), partition=partition)

    def turn(self, times: int = 1, *, after: float = 0.0) -> None:
        """Turns, each ``after`` so many seconds."""
        for _ in range(times):
            self.clock.now += after
            self.consumer.turn()

    def committed(self, topic: str, partition: int = 0) -> int | None:
        return self.broker.commits["g"].get(Partition(topic, partition))

    def take_away(self, topic: str, partition: int = 0, *, lost: bool = False) -> None:
        """The group gives a partition to somebody else; the next poll brings it back."""
        place = Partition(topic, partition)
        if lost:
            self.consumer.lost([place])
        else:
            self.broker.commits["g"].update(self.consumer.revoked([place]))
        del self.client.positions[place]

    def values(self, topic: str) -> list[int]:
        return [int(record.value or b"-1") for record in self.broker.records(topic)]


def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of every loop from now on: it moves when a test says so, and polls do not wait."""
    clock = Clock()
    for module in (
        flowkit.batches,
        flowkit.consumer,
        flowkit.dispatch,
        flowkit.lookout,
        flowkit.queueing,
        flowkit.quick,
    ):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(flowkit.consumer, "POLL_TIMEOUT", 0.0)
    return clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return stopped_clock(monkeypatch)


def make_app(**settings: Any) -> Flowkit:
    kafka = {"hosts": "127.0.0.1:9", **settings.pop("kafka", {})}
    return Flowkit("t", kafka=kafka, **{"inline": True, "retry": NOWAIT, **settings})


def recorder(app: Flowkit, topic: str = "a", **options: Any) -> list[int]:
    """A handler that remembers the values it was given."""
    seen: list[int] = []
    app.add_topic(topic, lambda value: seen.append(value), **options)
    return seen


# Offsets: last handled + 1, when they are due.


def test_the_committed_offset_is_the_last_handled_one_plus_one(clock: Clock) -> None:
    app = make_app()
    seen = recorder(app)
    loop = Loop(app, clock)
    loop.broker.create("a", 2)
    loop.put("a", 1, 2, 3)
    loop.put("a", 4, partition=1)
    loop.turn()
    assert seen == [1, 2, 3, 4]
    assert (loop.committed("a", 0), loop.committed("a", 1)) == (3, 1)


def test_nothing_is_committed_for_a_partition_without_messages(clock: Clock) -> None:
    app = make_app()
    recorder(app)
    loop = Loop(app, clock)
    loop.broker.create("a", 2)
    loop.put("a", 1)
    loop.turn()
    assert loop.commits == [{Partition("a", 0): 1}]


def test_commits_wait_for_the_interval_and_are_not_repeated(clock: Clock) -> None:
    app = make_app(kafka={"offset_commit_interval": 5})
    recorder(app)
    loop = Loop(app, clock)
    for value in range(11):
        loop.put("a", value)
        loop.turn(after=1)
    assert [commit[Partition("a", 0)] for commit in loop.commits] == [1, 6, 11]
    loop.turn(20, after=1)
    assert len(loop.commits) == 3


def test_the_threshold_commits_in_the_middle_of_a_batch(clock: Clock) -> None:
    app = make_app(kafka={"offset_commit_interval": HOUR, "offset_commit_threshold": 4})
    recorder(app)
    loop = Loop(app, clock)
    loop.turn()  # the first commit is due at once
    loop.put("a", *range(10))
    loop.turn()
    assert [commit[Partition("a", 0)] for commit in loop.commits] == [4, 8]
    loop.put("a", 10, 11)
    loop.turn()
    assert loop.committed("a") == 12


def test_the_threshold_counts_over_partitions_and_turns(clock: Clock) -> None:
    app = make_app(kafka={"offset_commit_interval": HOUR, "offset_commit_threshold": 4})
    recorder(app)
    loop = Loop(app, clock)
    loop.turn()
    loop.broker.create("a", 2)
    loop.put("a", *range(3))
    loop.turn()
    assert loop.commits == []
    loop.put("a", *range(3), partition=1)
    loop.turn()
    assert loop.commits[0] == {Partition("a", 0): 3, Partition("a", 1): 1}


def test_the_threshold_counts_queued_messages_too(clock: Clock) -> None:
    app = make_app(inline=False, kafka={"offset_commit_interval": HOUR, "offset_commit_threshold": 4})
    recorder(app)
    loop = Loop(app, clock, Redis())
    loop.turn()
    for value in range(8):
        loop.put("a", value)
        loop.turn()
    assert [commit[Partition("a", 0)] for commit in loop.commits] == [4, 8]


def test_a_tiny_commit_interval_still_makes_progress(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(kafka={"offset_commit_interval": 1e-9})
    seen = recorder(app)
    loop = Loop(app, clock)

    def ticking() -> float:
        clock.now += 1e-6
        return clock.now

    monkeypatch.setattr(clock, "monotonic", ticking)
    loop.put("a", *range(50))
    loop.turn(3)
    assert seen == list(range(50))
    assert loop.committed("a") == 50


def test_a_refused_commit_is_a_warning_and_the_messages_come_again(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app()
    seen = recorder(app)
    loop = Loop(app, clock)
    loop.put("a", 1, 2)
    commit = loop.client.commit

    def refuse(offsets: Any) -> None:
        raise CommitRefused("the member is not known")

    loop.client.commit = refuse
    loop.turn()
    assert loop.committed("a") is None
    assert "the commit came too late" in caplog.text
    assert "the member is not known" in caplog.text
    loop.client.commit = commit
    loop.take_away("a", lost=True)
    loop.broker.commits["g"][Partition("a", 0)] = 1  # by who had it meanwhile
    loop.turn(2, after=1)
    assert seen == [1, 2, 2]
    assert loop.committed("a") == 2


class BegunCommits:
    """Gives the client of a loop commits that are not waited for; they end when the test says so."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.begun: list[dict[Partition, int]] = []
        loop.client.begin_commit = lambda offsets: self.begun.append(dict(offsets))

    def take(self) -> None:
        """Kafka takes the first of them."""
        offsets = self.begun.pop(0)
        self.loop.broker.commits["g"].update(offsets)
        self.loop.consumer.confirmed(offsets)

    def refuse(self) -> None:
        self.loop.consumer.refused(self.begun.pop(0), CommitRefused("the member is not known"))


def beginning(clock: Clock, **settings: Any) -> tuple[Loop, BegunCommits, list[int]]:
    app = make_app(**settings)
    seen = recorder(app)
    loop = Loop(app, clock, Redis())
    return loop, BegunCommits(loop), seen


def test_a_commit_that_is_under_way_is_not_begun_again_and_ends_when_kafka_says_so(clock: Clock) -> None:
    loop, commits, _ = beginning(clock)
    loop.put("a", 1, 2)
    loop.turn(3, after=1)
    assert commits.begun == [{Partition("a", 0): 2}]

    loop.put("a", 3)
    loop.turn(2, after=1)
    assert commits.begun == [{Partition("a", 0): 2}]
    commits.take()
    loop.turn(2, after=1)
    assert commits.begun == [{Partition("a", 0): 3}]
    commits.take()
    loop.turn(2, after=1)
    assert commits.begun == []
    assert loop.commits == []
    assert loop.committed("a") == 3


def test_a_commit_of_which_nothing_is_heard_is_made_once_more_and_waited_for(clock: Clock) -> None:
    loop, commits, _ = beginning(clock)
    loop.put("a", 1, 2)
    loop.turn()
    loop.turn(9, after=1)
    assert loop.commits == []
    loop.turn(2, after=1)
    assert loop.commits == [{Partition("a", 0): 2}]
    commits.take()  # late
    loop.put("a", 3)
    loop.turn(2, after=1)
    assert commits.begun == [{Partition("a", 0): 3}]


def test_a_commit_under_way_that_is_refused_is_begun_again(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    loop, commits, _ = beginning(clock)
    loop.put("a", 1, 2)
    loop.turn()
    commits.refuse()
    assert "the commit came too late, its messages come again: the member is not known" in caplog.text
    loop.turn(after=1)
    assert commits.begun == [{Partition("a", 0): 2}]


@pytest.mark.parametrize("lost", [False, True], ids=["revoked", "lost"])
def test_a_partition_that_leaves_while_its_commit_is_under_way_is_committed_or_comes_again(
    clock: Clock, lost: bool
) -> None:
    loop, commits, seen = beginning(clock)
    loop.put("a", 1, 2)
    loop.turn()
    assert commits.begun == [{Partition("a", 0): 2}]
    loop.take_away("a", lost=lost)
    assert loop.committed("a") == (None if lost else 2)
    if lost:
        loop.broker.commits["g"][Partition("a", 0)] = 1  # by who had it meanwhile
    loop.turn(2, after=1)
    assert seen == [1, 2, *([2] if lost else [])]
    # though it is of the same offset as the one that was under way when the partition left
    assert commits.begun[1:] == ([{Partition("a", 0): 2}] if lost else [])


def test_the_last_commit_is_waited_for(clock: Clock) -> None:
    loop, commits, _ = beginning(clock)
    loop.put("a", 1, 2)
    loop.turn()
    assert len(commits.begun) == 1
    loop.consumer.stop()
    loop.consumer.run()
    assert loop.commits == [{Partition("a", 0): 2}]
    assert loop.consumer.clean


@pytest.mark.parametrize(
    "options", [{"kafka": {"offset_commit_threshold": 1}}, {"inline": False}], ids=["threshold", "queue"]
)
def test_commits_are_waited_for_where_something_hangs_on_them(clock: Clock, options: dict[str, Any]) -> None:
    """So many messages at most are to come again; or Redis is to know what Kafka has confirmed."""
    loop, commits, _ = beginning(clock, **options)
    loop.put("a", 1)
    loop.turn(2, after=1)
    assert commits.begun == []
    assert loop.committed("a") == 1


# A failing message: its partition waits, the others go on, nothing is skipped.


def failing_at(app: Flowkit, poison: int, topic: str = "a", until: int = 10**9, **options: Any) -> list[int]:
    """A handler that fails for one value, ``until`` so many times."""
    seen: list[int] = []
    failures = 0

    def handler(value: int) -> None:
        nonlocal failures
        seen.append(value)
        if value == poison and failures < until:
            failures += 1
            raise ValueError(f"cannot do {value}")

    app.add_topic(topic, handler, **options)
    return seen


def test_a_failure_commits_up_to_it_and_holds_its_partition_only(clock: Clock) -> None:
    app = make_app(retry=Retry(first=10, jitter=0))
    seen = failing_at(app, 3, until=1)
    loop = Loop(app, clock)
    loop.broker.create("a", 2)
    loop.put("a", 1, 2, 3, 4, 5)
    loop.put("a", 101, partition=1)
    loop.turn()
    assert seen == [1, 2, 3, 101]
    assert (loop.committed("a", 0), loop.committed("a", 1)) == (2, 1)
    assert loop.client.paused == {Partition("a", 0)}
    assert loop.client.positions[Partition("a", 0)] == 2
    assert "a[0]@2 failed" in loop.events.errors[0][2]
    assert "again in 10.0 s; partition 0 of a waits, nothing is skipped" in loop.events.errors[0][2]

    loop.put("a", 102, partition=1)
    loop.turn(after=9.9)
    assert seen[4:] == [102]
    assert (loop.committed("a", 0), loop.committed("a", 1)) == (2, 2)

    loop.turn(2, after=0.1)
    assert seen[5:] == [3, 4, 5]
    assert loop.client.paused == set()
    loop.turn(after=1)
    assert loop.committed("a", 0) == 5


def test_waits_grow_with_the_attempts(clock: Clock) -> None:
    app = make_app(retry=Retry(first=1, factor=3, cap=5, jitter=0))
    failing_at(app, 1, until=4)
    loop = Loop(app, clock)
    loop.put("a", 1)
    waits = []
    for _ in range(4):
        before = clock.now
        loop.turn()
        waits.append(loop.consumer.tracks[Partition("a", 0)].resume_at - before)  # type: ignore[operator]
        loop.turn(after=waits[-1])
    assert waits == [1, 3, 5, 5]


def test_attempts_count_from_one_and_every_failure_is_reported(clock: Clock) -> None:
    app = make_app()
    attempts: list[tuple[int, int]] = []
    reported: list[tuple[str, int, int]] = []

    @app.topic("a")
    def handler(value: int, message: Message) -> None:
        attempts.append((value, message.attempt))
        if value == 2 and message.attempt < 4:
            raise ValueError("not yet")

    @app.after_failure("a")
    def report(error: Exception, message: Message) -> None:
        reported.append((str(error), message.offset, message.attempt))

    loop = Loop(app, clock)
    loop.put("a", 1, 2, 3)
    loop.turn(4)
    assert attempts == [(1, 1), (2, 1), (2, 2), (2, 3), (2, 4), (3, 1)]
    assert reported == [("not yet", 1, 1), ("not yet", 1, 2), ("not yet", 1, 3)]


def test_without_a_dead_letter_a_message_is_never_skipped(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=2, first=0))
    seen = failing_at(app, 2)
    loop = Loop(app, clock)
    loop.put("a", 1, 2, 3)
    loop.turn(50, after=1)
    assert seen == [1] + [2] * 50
    assert loop.committed("a") == 1


def test_a_cancelled_coroutine_holds_its_partition_only(clock: Clock) -> None:
    app = make_app()
    seen = recorder(app, "b")

    @app.topic("a")
    async def handler(value: int) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    loop = Loop(app, clock)
    loop.put("a", 1)
    loop.put("b", 2)
    loop.turn(3)
    close_loop()
    assert seen == [2]
    assert loop.committed("a") == 0


@pytest.mark.parametrize("what", ["raises", "aborts"])
def test_an_after_failure_hook_that_fails_changes_nothing(
    clock: Clock, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    app = make_app()
    seen = failing_at(app, 1, until=1)

    @app.after_failure
    def report(error: Exception) -> None:
        if what == "aborts":
            app.abort()
        raise RuntimeError("no")

    loop = Loop(app, clock)
    loop.put("a", 1, 2)
    loop.turn(2, after=1)
    assert seen == [1, 1, 2]
    assert loop.committed("a") == 2
    assert "an after_failure hook failed itself, for a[0]@0" in caplog.text


# Dead letters.


def test_a_dead_letter_after_every_attempt_and_then_progress(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=3, first=0), dead_letter="dead")
    seen = failing_at(app, 2)
    loop = Loop(app, clock)
    loop.broker.append("a", b"1")
    loop.broker.append("a", b"2", b"key", (("trace", b"x"), ("trace", b"y"), ("none", None)))
    loop.broker.append("a", b"3")
    loop.turn(4, after=1)
    assert seen == [1, 2, 2, 2, 3]
    assert loop.committed("a") == 3
    (letter,) = loop.broker.records("dead")
    assert (letter.key, letter.value) == (b"key", b"2")
    assert letter.headers[:3] == (("trace", b"x"), ("trace", b"y"), ("none", None))
    headers = dict(letter.headers)
    assert headers["kafka_dlt-original-topic"] == b"a"
    assert headers["kafka_dlt-original-partition"] == struct.pack(">i", 0)
    assert headers["kafka_dlt-original-offset"] == struct.pack(">q", 1)
    assert headers["kafka_dlt-original-consumer-group"] == app.handlings["a"].group.encode()
    assert headers["kafka_dlt-exception-fqcn"] == b"builtins.ValueError"
    assert headers["kafka_dlt-exception-message"] == b"cannot do 2"
    assert headers["flowkit-attempts"] == b"3"
    assert loop.events.count("dead") == 1


def test_a_dead_letter_takes_any_error_text(clock: Clock) -> None:
    app = make_app(retry=1, dead_letter="dead")

    @app.topic("a")
    def handler(value: int) -> None:
        raise ValueError("a lone surrogate \ud800")

    loop = Loop(app, clock)
    loop.put("a", 1)
    loop.turn()
    assert len(loop.broker.records("dead")) == 1
    assert loop.committed("a") == 1


def test_what_is_never_tried_again_goes_to_the_dead_letters_at_once(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=5, first=0, never=KeyError), dead_letter="{topic}.dead")
    seen: list[int] = []

    @app.topic("a")
    def handler(value: int) -> None:
        seen.append(value)
        if value == 2:
            raise KeyError(value)

    loop = Loop(app, clock)
    loop.put("a", 1, 2, 3)
    loop.broker.append("a", b"no number")
    loop.turn()
    assert seen == [1, 2, 3]
    assert [record.value for record in loop.broker.records("a.dead")] == [b"2", b"no number"]
    assert loop.committed("a") == 4


def test_without_an_end_what_is_never_tried_again_waits_all_the_same(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=5, first=0, never=ValueError))
    seen = failing_at(app, 1)
    loop = Loop(app, clock)
    loop.put("a", 1, 2)
    loop.turn(5)
    assert seen == [1] * 5
    assert loop.committed("a") == 0
    assert "to let such messages go, name a topic for them: dead_letter=..." in loop.events.errors[0][2]


def test_dead_letters_in_a_row_stop_the_loop_after_the_last_of_them_was_sent(clock: Clock) -> None:
    app = make_app(retry=1, dead_letter="dead", dead_letter_limit=2)
    seen: list[int] = []

    @app.topic("a")
    def handler(value: int) -> None:
        seen.append(value)
        if value != 2:
            raise ValueError(value)

    loop = Loop(app, clock)
    loop.put("a", 1, 2, 3, 4, 5)
    loop.turn()
    assert seen == [1, 2, 3, 4]
    assert loop.values("dead") == [1, 3, 4]
    assert isinstance(loop.consumer.stopping_for, DeadLetterLimit)
    with pytest.raises(DeadLetterLimit, match="2 messages one after the other"):
        loop.consumer.run()
    assert loop.committed("a") == 4


def test_a_success_on_another_partition_begins_the_count_anew(clock: Clock) -> None:
    app = make_app(retry=1, dead_letter="dead", dead_letter_limit=2)
    failing_at(app, 1)
    loop = Loop(app, clock)
    loop.broker.create("a", 2)
    for value, partition in ((1, 0), (2, 1), (1, 0), (2, 1), (1, 0)):
        loop.broker.append("a", b"%d" % value, partition=partition)
        loop.turn()
    assert loop.values("dead") == [1, 1, 1]
    assert loop.consumer.stopping_for is None


@pytest.mark.parametrize("others", [[], [2, 3]])
def test_stop_ends_the_loop_with_the_offset_of_the_message(clock: Clock, others: list[int]) -> None:
    app = make_app(retry=Retry(attempts=2, first=0), on_poison="stop")
    seen = failing_at(app, 1)
    loop = Loop(app, clock)
    loop.put("a", 7, 1, *others)
    loop.turn(2)
    assert seen == [7, 1, 1]
    with pytest.raises(PoisonMessage, match=r"a\[0\]@1 failed in .*, attempt 2, and on_poison='stop'"):
        loop.consumer.run()
    assert loop.committed("a") == 1


def test_skip_passes_over_the_message_and_says_where_it_was(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=2, first=0), on_poison="skip")
    seen = failing_at(app, 1)
    loop = Loop(app, clock)
    loop.broker.append("a", b"1", b"ann")
    loop.put("a", 2)
    loop.turn(2, after=1)
    assert seen == [1, 1, 2]
    assert loop.committed("a") == 2
    ((_, error, text),) = [it for it in loop.events.errors if it[0] == "skipped"]
    assert isinstance(error, ValueError)
    assert "topic a, partition 0, offset 0, key b'ann'" in text


def test_the_message_after_a_dead_letter_starts_with_attempt_one(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=2, first=0), dead_letter="dead")
    attempts: list[tuple[int, int]] = []

    @app.topic("a")
    def handler(value: int, message: Message) -> None:
        attempts.append((value, message.attempt))
        raise ValueError

    loop = Loop(app, clock)
    loop.put("a", 1, 2)
    loop.turn(3)
    assert attempts == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert loop.values("dead") == [1, 2]


@pytest.mark.parametrize("problem", ["refused", "no topic", "no broker"])
def test_a_dead_letter_that_cannot_be_delivered_keeps_the_message(
    clock: Clock, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(retry=Retry(attempts=2, first=0), dead_letter="dead")
    seen = failing_at(app, 2)
    loop = Loop(app, clock, broker=Broker(strict=True))
    loop.broker.create("a")
    if problem == "refused":
        loop.broker.create("dead")
        loop.broker.refuse = RuntimeError("disk full")
    elif problem == "no broker":
        loop.broker.create("dead")

        def unavailable(settings: Any) -> Any:
            raise BrokerUnavailable("no Kafka broker answers")

        monkeypatch.setattr(loop.producer, "_make", unavailable)
    loop.put("a", 1, 2, 3)
    loop.turn(10, after=1)
    assert seen == [1] + [2] * 10
    assert loop.committed("a") == 1
    assert [event for event, _, _ in loop.events.errors].count("delivery") == 9

    loop.broker.create("dead")
    loop.broker.refuse = None
    monkeypatch.setattr(loop.producer, "_make", loop.broker.producer)
    loop.turn(after=1)
    assert seen[11:] == [2, 3]
    assert loop.values("dead") == [2]
    assert loop.committed("a") == 3


# Responses: nothing is committed that Kafka did not confirm.


def relay(app: Flowkit, topic: str = "a", to: str = "out", **options: Any) -> list[int]:
    seen: list[int] = []

    @app.topic(topic, **options)
    @app.responds_to(to)
    def handler(value: int) -> None:
        seen.append(value)
        app.respond_to(to, value)

    return seen


def refuse_values(loop: Loop, *values: int, times: int = 10**9) -> None:
    """The broker refuses messages of these values, ``times`` in all."""
    send, left = loop.broker.producer, times

    def producer(settings: Any) -> Any:
        client = send(settings)
        accept = client.send

        def refuse(topic: str, value: bytes | None, *rest: Any) -> Any:
            nonlocal left
            if topic == "out" and value is not None and int(value) in values and left > 0:
                left -= 1
                return RuntimeError(f"refused {value!r}")
            return accept(topic, value, *rest)

        client.send = refuse  # type: ignore[method-assign]
        return client

    loop.producer._make = producer


def test_a_response_that_kafka_did_not_take_brings_its_message_back(clock: Clock) -> None:
    app = make_app()
    seen = relay(app)
    loop = Loop(app, clock)
    refuse_values(loop, 2, times=1)
    loop.put("a", 1, 2, 3)
    loop.turn()
    assert loop.committed("a") == 1
    errors = [str(error) for _, error, _ in loop.events.errors if isinstance(error, DeliveryError)]
    assert errors == ["out: Kafka did not take the message: RuntimeError(\"refused b'2'\")"]
    loop.turn(2, after=1)
    assert seen == [1, 2, 3, 2, 3]
    assert loop.values("out") == [1, 3, 2, 3]
    assert loop.committed("a") == 3


def test_kafkas_absence_is_no_attempt_of_a_message(clock: Clock) -> None:
    # Given a route whose messages become dead letters after two attempts, and a broker that is away for longer
    app = make_app(retry=Retry(attempts=2, first=1, factor=2, cap=8, jitter=0), dead_letter="dead")
    attempts: list[int] = []

    @app.topic("a", group="g")
    @app.responds_to("out")
    def relay(value: int, message: Message) -> int:
        attempts.append(message.attempt)
        return value

    loop = Loop(app, clock)
    loop.broker.refuse = DeliveryError("no answer", passing=True)
    loop.put("a", 1)
    loop.turn()
    for wait in (1, 2, 4, 8, 8):
        assert loop.consumer.tracks[A].resume_at == clock.now + wait
        clock.now += wait
        loop.turn(2)  # the first lets the partition go on, the second polls it
    # When it is back, then the message is answered, and was never a dead letter
    loop.broker.refuse = None
    clock.now += 8
    loop.turn(2)
    assert attempts == [1] * 7
    assert (loop.values("out"), loop.values("dead")) == ([1], [])
    assert loop.events.count("recovered") == 1


def test_a_broker_that_takes_nothing_keeps_every_message(clock: Clock) -> None:
    app = make_app()
    seen = relay(app)
    loop = Loop(app, clock)
    loop.broker.refuse = RuntimeError("disk full")
    loop.put("a", 1, 2, 3)
    loop.turn(5, after=1)
    assert loop.committed("a") == 0
    loop.broker.refuse = None
    loop.turn(2, after=1)
    assert loop.values("out") == [1, 2, 3]
    assert loop.committed("a") == 3
    assert seen == [1, 2, 3] * 6


def test_responses_are_looked_at_before_each_commit_within_a_batch(clock: Clock) -> None:
    app = make_app(kafka={"offset_commit_threshold": 2})
    seen = relay(app)
    loop = Loop(app, clock)
    refuse_values(loop, 4, times=1)
    loop.put("a", 1, 2, 3, 4, 5, 6)
    loop.turn()
    assert seen == [1, 2, 3, 4]
    assert loop.committed("a") == 3
    loop.turn(2, after=1)
    assert seen == [1, 2, 3, 4, 4, 5, 6]
    assert loop.values("out") == [1, 2, 3, 4, 5, 6]


def test_undelivered_responses_lead_to_a_dead_letter_and_the_rest_is_repeated(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=3, first=0), dead_letter="dead")
    relay(app)
    loop = Loop(app, clock)
    refuse_values(loop, 2)
    loop.put("a", 1, 2, 3)
    loop.turn(6, after=1)
    assert loop.values("dead") == [2]
    assert set(loop.values("out")) == {1, 3}
    assert loop.committed("a") == 3


def test_after_a_dead_letter_in_the_middle_of_a_batch_nothing_undelivered_is_committed(clock: Clock) -> None:
    app = make_app(retry=1, dead_letter="dead", kafka={"offset_commit_threshold": 3})
    relay(app)
    loop = Loop(app, clock)
    refuse_values(loop, 1, 2)  # both in the first slice; the first one gets its letter
    loop.put("a", 1, 2, 3, 4, 5, 6, 7)
    for _ in range(10):
        loop.turn(after=1)
        done = {*loop.values("out"), *loop.values("dead")}
        assert set(range(1, (loop.committed("a") or 0) + 1)) <= done, "committed past a message that is not done"
    assert loop.values("dead") == [1, 2]
    assert set(loop.values("out")) == {3, 4, 5, 6, 7}
    assert loop.committed("a") == 7


def test_failed_deliveries_of_different_messages_are_different_attempts(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=2, first=0), dead_letter="dead")
    relay(app)
    loop = Loop(app, clock)
    loop.put("a", 1, 2, 3)
    for value in (1, 2, 3):
        refuse_values(loop, value, times=1)
        loop.producer.renew()
        loop.turn(after=1)
    loop.turn(2, after=1)
    assert loop.values("dead") == []
    assert set(loop.values("out")) == {1, 2, 3}


@pytest.mark.parametrize("what", ["flush", "confirmed", "outcome"])
def test_a_producer_that_breaks_while_it_is_asked_commits_nothing(
    clock: Clock, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app()
    relay(app)
    loop = Loop(app, clock)
    loop.put("a", 1, 2)

    def broken(*_: Any) -> Any:
        loop.consumer.stop()  # ends run() after the first turn
        raise BrokerUnavailable("gone")

    client = flowkit.clients.memory.Producer
    if what != "confirmed":
        monkeypatch.setattr(client, "confirmed", lambda *_: 0)
    monkeypatch.setattr(client, what, broken)
    loop.consumer.run()
    assert loop.committed("a") in (None, 0)


def test_a_client_that_breaks_while_a_message_is_put_back_commits_nothing(clock: Clock) -> None:
    app = make_app()
    relay(app)
    loop = Loop(app, clock)
    loop.broker.refuse = RuntimeError("disk full")
    loop.put("a", 1, 2)

    def broken(partition: Partition) -> None:
        loop.consumer.stop()
        raise RuntimeError("not assigned")

    loop.client.pause = broken
    loop.consumer.run()
    assert loop.committed("a") in (None, 0)


def test_a_failed_check_sends_nothing(clock: Clock) -> None:
    app = make_app()

    @app.topic("a")
    @app.responds_to("out")
    @app.responds_to("other", required=False, multiple_usage=True)
    def handler(value: int, message: Message) -> None:
        app.respond_to("other", value)
        app.respond_to("other", value)
        if message.attempt == 2:
            app.respond_to("out", value)

    loop = Loop(app, clock)
    loop.put("a", 1)
    loop.turn()
    assert loop.broker.records("other") == []
    assert loop.committed("a") == 0
    loop.turn(after=1)
    assert loop.values("out") == [1]
    assert loop.values("other") == [1, 1]
    assert loop.committed("a") == 1


# Stopping.


def test_a_stop_finishes_the_message_in_hand_and_leaves_the_rest(clock: Clock) -> None:
    app = make_app()
    seen: list[int] = []

    @app.topic("a")
    @app.responds_to("out")
    def handler(value: int) -> int:
        seen.append(value)
        if value == 2:
            first.consumer.stop()
        return value

    first = Loop(app, clock)
    first.broker.create("a", 2)
    first.put("a", 1, 2, 3, 4)
    first.put("a", 11, partition=1)
    first.consumer.run()
    assert seen == [1, 2]
    assert first.values("out") == [1, 2]
    assert (first.committed("a", 0), first.committed("a", 1)) == (2, None)

    second = Loop(app, clock, broker=first.broker)
    second.turn()
    assert seen == [1, 2, 3, 4, 11]


def test_a_stop_while_a_message_fails_leaves_it_to_the_next_owner(clock: Clock) -> None:
    app = make_app()

    @app.topic("a")
    def handler(value: int) -> None:
        if value == 2:
            loop.consumer.stop()
            raise ValueError

    loop = Loop(app, clock)
    loop.put("a", 1, 2, 3)
    loop.consumer.run()
    assert loop.committed("a") == 1


def test_a_stop_between_two_slices_is_not_overlooked(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(kafka={"offset_commit_threshold": 2})
    seen = recorder(app)
    loop = Loop(app, clock)
    loop.put("a", *range(6))
    commit = loop.client.commit

    def signalled(offsets: Any) -> None:
        commit(offsets)
        loop.consumer.stop()

    loop.client.commit = signalled
    loop.consumer.run()
    assert seen == [0, 1]
    assert loop.committed("a") == 2


def test_a_stopped_loop_ends_while_it_waits_for_a_new_client(clock: Clock) -> None:
    app = make_app()
    recorder(app)
    loop = Loop(app, clock)

    def unavailable(settings: Any, group: str) -> Any:
        if clock.now > 1060:
            loop.consumer.stop()
        raise BrokerUnavailable("no Kafka broker answers at 127.0.0.1:9")

    loop.consumer.make_client = unavailable
    loop.consumer.run()
    waits = [float(message.split("again in ")[1].split(" s")[0]) for _, _, message in loop.events.errors]
    assert waits[0] < 0.6
    assert 10 < waits[-1] <= 15
    assert "nothing is lost" in loop.events.errors[0][2]


def test_a_configuration_error_ends_the_loop(clock: Clock) -> None:
    app = make_app()
    recorder(app)
    loop = Loop(app, clock)

    def refuses(settings: Any, group: str) -> Any:
        raise ConfigurationError("no such option")

    loop.consumer.make_client = refuses
    with pytest.raises(ConfigurationError, match="no such option"):
        loop.consumer.run()


def test_a_broken_client_is_replaced_and_nothing_is_lost(clock: Clock) -> None:
    app = make_app(kafka={"offset_commit_interval": HOUR})
    seen = recorder(app)
    loop = Loop(app, clock)
    loop.turn()
    loop.put("a", 1, 2)
    loop.turn()
    broken = loop.client

    def poll(timeout: float, most: int) -> Any:
        loop.put("a", 3)
        raise RuntimeError("CRC check failed")

    broken.poll = poll
    with pytest.raises(RuntimeError):
        loop.turn()
    loop.consumer._reconnect(RuntimeError("CRC check failed"))
    assert broken.closed
    loop.turn()
    assert loop.client is not broken
    assert seen == [1, 2, 3]


def test_a_loop_that_waits_for_a_broker_is_not_stuck(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """However short ``kafka.max_poll_interval`` is: a probe that took it for dead would have it started again in vain."""
    loop = Loop(make_app(), clock)
    idle: list[float] = []

    def sleep(seconds: float) -> None:
        clock.now += seconds
        idle.append(clock.now - loop.consumer.turned_at)

    monkeypatch.setattr(clock, "sleep", sleep)
    for _ in range(8):
        loop.consumer._reconnect(RuntimeError("CRC check failed"))
    assert len(idle) > 100
    assert max(idle[1:]) < 0.1


# Long batches, so that a rebalance of the group does not wait for them.


def test_a_long_batch_leaves_for_a_poll_and_goes_on_without_loss(clock: Clock) -> None:
    app = make_app()
    seen: list[int] = []

    @app.topic("a")
    def handler(value: int) -> None:
        seen.append(value)
        clock.now += 4

    loop = Loop(app, clock)
    loop.put("a", *range(10))
    turned = []
    while len(seen) < 10:
        before = clock.now
        loop.turn()
        turned.append(clock.now - before)
    assert seen == list(range(10))
    assert max(turned) <= LONGEST_BATCH + 2 * 4
    assert len(turned) > 1
    assert loop.committed("a") == 10


def test_many_short_batches_leave_for_a_poll_too(clock: Clock) -> None:
    app = make_app()
    seen: list[tuple[int, int]] = []

    @app.topic("a")
    def handler(value: int, message: Message) -> None:
        seen.append((message.partition, value))
        clock.now += 4

    loop = Loop(app, clock)
    loop.broker.create("a", 20)
    for partition in range(20):
        loop.put("a", 1, 2, partition=partition)
    turned = []
    while len(seen) < 40:
        before = clock.now
        loop.turn()
        turned.append(clock.now - before)
    assert sorted(seen) == [(partition, value) for partition in range(20) for value in (1, 2)]
    assert max(turned) <= LONGEST_BATCH + 2 * 4
    assert all(loop.committed("a", partition) == 2 for partition in range(20))


def test_slow_hooks_leave_for_a_poll_too(clock: Clock) -> None:
    app = make_app(inline=False)
    recorder(app)
    hooked: list[int] = []

    @app.before_enqueue("a")
    def slow(value: int) -> None:
        hooked.append(value)
        clock.now += 4

    redis = Redis()
    loop = Loop(app, clock, redis)
    loop.broker.create("a", 2)
    loop.put("a", *range(10))
    loop.put("a", *range(10), partition=1)
    turned = []
    while len(redis.jobs) < 20:
        before = clock.now
        loop.turn()
        turned.append(clock.now - before)
    assert max(turned) <= LONGEST_BATCH + 2 * 4
    assert sorted(redis.jobs) == [("a", p, offset) for p in (0, 1) for offset in range(10)]
    assert len(hooked) == 20
    assert (loop.committed("a", 0), loop.committed("a", 1)) == (10, 10)


# Rebalances.


def test_a_revoked_partition_is_committed_as_far_as_it_is_done(clock: Clock) -> None:
    app = make_app(kafka={"offset_commit_interval": HOUR})
    seen = failing_at(app, 3)
    loop = Loop(app, clock)
    loop.turn()
    loop.put("a", 1, 2, 3, 4)
    loop.turn()
    assert loop.committed("a") is None
    loop.take_away("a")
    assert loop.committed("a") == 2
    assert loop.consumer.tracks == {}
    loop.turn()
    assert seen == [1, 2, 3, 3]


def test_a_lost_partition_is_not_committed_and_comes_again(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    app = make_app(kafka={"offset_commit_interval": HOUR})
    seen = recorder(app)
    loop = Loop(app, clock)
    loop.turn()
    loop.put("a", 1, 2)
    loop.turn()
    loop.take_away("a", lost=True)
    loop.broker.commits["g"][Partition("a", 0)] = 1  # by who had it meanwhile
    assert loop.committed("a") == 1
    assert "lost a[0]; what was not committed comes again" in caplog.text
    loop.turn(2)
    assert seen == [1, 2, 2]


def test_a_paused_partition_that_leaves_and_comes_back_is_not_paused_any_more(clock: Clock) -> None:
    app = make_app(retry=Retry(first=HOUR))
    seen = failing_at(app, 1, until=1)
    loop = Loop(app, clock)
    loop.put("a", 1, 2)
    loop.turn()
    assert loop.client.paused == {Partition("a", 0)}
    loop.take_away("a")  # the client keeps its pause, as kafka-python does
    loop.turn()
    assert loop.client.paused == set()
    loop.turn()
    assert seen == [1, 1, 2]


def relaying(clock: Clock, **settings: Any) -> tuple[Loop, list[int]]:
    """A loop that has begun, commits offsets once an hour, and answers each message; and what it has handled."""
    app = make_app(**{"kafka": {"offset_commit_interval": HOUR}, **settings})
    seen = relay(app)
    loop = Loop(app, clock)
    loop.turn()
    return loop, seen


@pytest.mark.parametrize("lost", [False, True], ids=["revoked", "lost"])
def test_no_offset_is_ahead_of_a_response_when_a_partition_leaves(clock: Clock, lost: bool) -> None:
    loop, seen = relaying(clock)
    refuse_values(loop, 3, times=1)
    loop.put("a", 1, 2, 3, 4)
    loop.turn()
    assert seen == [1, 2, 3, 4]
    loop.take_away("a", lost=lost)
    assert loop.committed("a") == (None if lost else 2)
    loop.turn(2)
    assert seen == [1, 2, 3, 4, 3, 4]
    assert loop.values("out") == [1, 2, 4, 3, 4]


def test_responses_are_waited_for_when_a_partition_leaves_so_that_nothing_is_repeated(clock: Clock) -> None:
    loop, seen = relaying(clock)
    loop.put("a", 1, 2, 3, 4)
    loop.turn()
    loop.take_away("a")
    assert loop.committed("a") == 4
    loop.turn(2)
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("later", [0, 1, 2], ids=["with the next poll", "a poll later", "for another reason"])
def test_why_a_membership_was_lost_is_said(clock: Clock, later: int, caplog: pytest.LogCaptureFixture) -> None:
    loop, _ = relaying(clock)
    loop.turn(after=40)
    loop.turn(later)
    loop.consumer.lost([Partition("a", 0)])
    assert ("It had not polled for 40 s" in caplog.text) == (later < 2)


class Late:
    """While ``on``, nothing that is sent has ended when the loop looks, but for those that it waits for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = True
        client = flowkit.clients.memory.Producer
        confirmed, ended = client.confirmed, client.ended
        monkeypatch.setattr(client, "confirmed", lambda *args: 0 if self.on else confirmed(*args))
        monkeypatch.setattr(client, "ended", lambda *args: not self.on and ended(*args))


def test_a_response_of_a_partition_that_left_is_no_matter_of_its_next_stay(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    Late(monkeypatch)
    loop, seen = relaying(clock)
    refuse_values(loop, 2, times=1)
    loop.put("a", 1, 2, 3, 4)
    loop.turn()
    loop.take_away("a")
    loop.broker.commits["g"][Partition("a", 0)] = 4  # somebody else has handled the rest
    loop.put("a", 5)
    loop.turn(3)
    loop.consumer.inline.settle()
    loop.consumer.commit()
    assert seen == [1, 2, 3, 4, 5]
    assert loop.committed("a") == 5
    assert not [error for _, error, _ in loop.events.errors if isinstance(error, DeliveryError)]


def test_responses_are_waited_for_in_the_turn_that_no_message_came(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    Late(monkeypatch)
    app = make_app()
    relay(app)
    loop = Loop(app, clock)
    loop.turn()
    loop.put("a", 1, 2)
    loop.turn(after=1)
    assert loop.consumer.inline.waits
    assert loop.committed("a") in (None, 0)
    loop.turn(after=1)
    assert not loop.consumer.inline.waits
    assert loop.committed("a") == 2


@pytest.mark.parametrize("most", [4, 10])
def test_responses_are_waited_for_when_there_are_too_many(
    clock: Clock, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Late(monkeypatch)
    monkeypatch.setattr(flowkit.inline, "MOST_SENT", most)
    loop, seen = relaying(clock)
    refuse_values(loop, 5, times=1)
    loop.put("a", *range(1, 9))
    loop.turn()
    assert loop.consumer.inline.waits == (most == 10)
    loop.turn(3)
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8]


def test_a_failed_response_is_seen_at_the_end_of_its_turn(clock: Clock) -> None:
    loop, seen = relaying(clock)
    refuse_values(loop, 2, times=1)
    loop.put("a", 1, 2, 3)
    loop.turn()
    loop.put("a", 4)
    loop.turn()
    assert seen == [1, 2, 3, 2, 3, 4]


def test_a_dead_letter_in_the_middle_of_a_batch_leaves_what_was_under_way_behind_it_to_come_again(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Late(monkeypatch)
    app = make_app(retry=1, dead_letter="dead", kafka={"offset_commit_interval": 0.1})
    seen: list[int] = []

    @app.topic("a")
    @app.responds_to("out")
    def handle(value: int) -> int:
        seen.append(value)
        clock.now += 1 if value < 10 else 0  # the first partition is where it looks in the middle
        return value

    loop = Loop(app, clock)
    loop.broker.create("a", 2)
    loop.turn()
    refuse_values(loop, 50, 51, 52, times=3)
    loop.put("a", 50, 51, 52, partition=1)
    loop.turn()
    assert loop.committed("a", 1) in (None, 0)
    late.on = False
    loop.put("a", 1, 2)
    loop.put("a", 53, partition=1)
    loop.turn(3, after=1)
    assert [value for value in seen if value >= 10] == [50, 51, 52, 51, 52, 53]
    assert loop.values("dead") == [50]
    assert set(loop.values("out")) == {1, 2, 51, 52, 53}
    assert (loop.committed("a"), loop.committed("a", 1)) == (2, 4)


@pytest.mark.parametrize("options", [{}, {"batch": True}], ids=["one by one", "batches"])
def test_a_threshold_waits_for_responses(
    clock: Clock, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Late(monkeypatch)
    app = make_app(kafka={"offset_commit_interval": HOUR, "offset_commit_threshold": 1})
    seen: list[int] = []

    @app.topic("a", **options)
    @app.responds_to("out", multiple_usage=True)
    def handle(value: Any) -> None:
        for one in value if options else [value]:
            seen.append(one)
            app.respond_to("out", one)

    loop = Loop(app, clock)
    loop.turn()
    loop.put("a", 1, 2, 3)
    loop.turn()
    assert seen == [1, 2, 3]
    assert [commit[Partition("a", 0)] for commit in loop.commits] == [1, 2, 3]


def test_whether_a_message_that_has_failed_is_over_it_is_waited_for(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    Late(monkeypatch)
    loop, seen = relaying(clock, retry=Retry(first=1, factor=2, jitter=0))
    refuse_values(loop, 1, times=3)
    loop.put("a", 1)
    loop.turn(2)  # in the second one no message comes, so it is waited for
    for wait in (1, 2, 4):
        assert loop.consumer.tracks[A].resume_at == clock.now + wait
        assert not loop.events.count("recovered")
        loop.turn(after=wait)  # it lets the partition go on
        loop.turn()
    assert seen == [1] * 4
    assert loop.events.count("recovered") == 1


def test_responses_behind_a_replaced_producer_go_to_the_next_one(clock: Clock) -> None:
    app = make_app()
    made: list[list[bytes | None]] = []

    @app.topic("a")
    @app.responds_to("out")
    def handle(value: int) -> int:
        if value == 2:
            with pytest.raises(DeliveryError):
                loop.producer.send("out", b"99")
        return value

    def make(settings: Any) -> Any:
        client, sent = loop.broker.producer(settings), []
        accept = client.send
        made.append(sent)

        def send(topic: str, value: bytes | None, *rest: Any) -> Any:
            sent.append(value)
            return RuntimeError("too large") if value == b"99" else accept(topic, value, *rest)

        client.send = send  # type: ignore[method-assign]
        return client

    loop = Loop(app, clock)
    loop.producer._make = make  # type: ignore[assignment]
    loop.put("a", 1)
    loop.turn()
    loop.put("a", 2, 3)
    loop.turn(2, after=1)
    assert made == [[b"1", b"99"], [b"2", b"3"]]
    assert loop.committed("a") == 3


@pytest.mark.parametrize("options", [{}, {"batch": True, "max_batch": 2}], ids=["one by one", "batches"])
def test_where_one_refused_response_ends_what_was_sent_with_it_each_goes_alone(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """As kafka-python's batches do in which one record is not valid: always together again, if they are sent so again."""
    under_way: list[tuple[list[DeliveryError | None], tuple[Any, ...]]] = []
    client = flowkit.clients.memory.Producer

    def send(self: Any, topic: str, *message: Any) -> list[DeliveryError | None]:
        delivery: list[DeliveryError | None] = []
        if topic == "dead":
            self.broker.append(topic, *message)
            delivery.append(None)
        else:
            under_way.append((delivery, (topic, *message)))
        return delivery

    def flush(self: Any, timeout: float) -> None:
        good = all(message[1] != b"3" for _, message in under_way)
        for delivery, message in under_way:
            if good:
                self.broker.append(*message)
                delivery.append(None)
            else:
                delivery.append(DeliveryError("refused", with_another=message[1] != b"3"))
        under_way.clear()

    monkeypatch.setattr(client, "send", send)
    monkeypatch.setattr(client, "flush", flush)
    monkeypatch.setattr(client, "ended", lambda _, delivery: bool(delivery))
    monkeypatch.setattr(client, "outcome", lambda _, delivery: delivery[0] if delivery else DeliveryError("not yet"))
    monkeypatch.setattr(client, "confirmed", lambda _, deliveries: sum(1 for one in deliveries if one == [None]))
    app = make_app(retry=2, dead_letter="dead", kafka={"offset_commit_interval": 0.1})
    seen: list[int] = []

    @app.topic("a", **options)
    @app.responds_to("out", multiple_usage=bool(options))
    def handle(value: Any) -> None:
        for one in value if options else [value]:
            seen.append(one)
            app.respond_to("out", one)

    loop = Loop(app, clock)
    loop.put("a", 1, 2, 3, 4, 5, 6)
    loop.turn(20, after=5)
    assert loop.values("dead") == [3]
    assert set(loop.values("out")) == {1, 2, 4, 5, 6}
    assert loop.committed("a") == 6
    assert seen.count(3) <= 2 + 2
    loop.put("a", *range(10, 20))
    loop.turn(2, after=5)
    assert loop.committed("a") == 16
    assert loop.consumer.tracks[Partition("a", 0)].alone_to is None


def test_nobody_waits_for_responses_when_a_client_is_given_up(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    late = Late(monkeypatch)
    loop, seen = relaying(clock)
    flushed: list[float] = []
    loop.put("a", 1, 2)
    loop.turn()
    monkeypatch.setattr(flowkit.clients.memory.Producer, "flush", lambda _, timeout: flushed.append(timeout))
    loop.consumer._reconnect(RuntimeError("CRC check failed"))
    assert flushed == []
    assert loop.committed("a") in (None, 0)
    assert not loop.consumer.stopping
    late.on = False
    loop.turn(2)
    assert seen == [1, 2, 1, 2]


def test_a_log_that_was_cut_off_is_not_committed_past_a_response(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Late(monkeypatch)
    late.on = False
    loop, _ = relaying(clock, kafka={"offset_commit_interval": 1})
    loop.put("a", 1, 2, 3, 4, 5)
    loop.turn(after=2)
    assert loop.committed("a") == 5
    late.on = True
    loop.put("a", 6)
    loop.turn()
    del loop.broker.topics["a"][0][1:]
    loop.client.seek(Partition("a", 0), 1)
    loop.consumer.moved(Partition("a", 0), 6, 1)
    loop.put("a", 20)
    loop.turn(after=2)
    assert loop.committed("a") == 1
    loop.turn(after=2)
    assert loop.committed("a") == 2


def test_messages_of_a_waiting_partition_are_not_skipped_whatever_the_client_does(clock: Clock) -> None:
    app = make_app(retry=Retry(first=10, jitter=0))
    seen = failing_at(app, 1, until=1)
    loop = Loop(app, clock)
    loop.put("a", 1, 2)
    loop.turn()
    loop.client.paused.clear()  # a client that gives what it had fetched before the pause
    loop.turn()
    assert seen == [1]
    loop.turn(2, after=10)
    assert seen == [1, 1, 2]


def test_messages_of_a_partition_that_was_not_assigned_stop_the_turn(clock: Clock) -> None:
    app = make_app()
    seen = recorder(app)
    loop = Loop(app, clock)
    loop.put("a", 1)
    loop.client._rebalance.assigned = lambda partitions: None
    with pytest.raises(Exception, match=r"a\[0\] gave messages, but was not assigned"):
        loop.turn()
    assert seen == []


# Hooks of inline routes.


def test_hooks_run_before_the_handler_and_may_abort(clock: Clock) -> None:
    app = make_app()
    seen: list[int] = []

    @app.topic("a")
    @app.responds_to("out")
    def handler(value: int) -> int:
        seen.append(value)
        return value

    @app.before_enqueue("a")
    def triage(value: int, message: Message) -> None:
        if value == 2:
            app.abort()
        message.payload = value * 10

    loop = Loop(app, clock)
    loop.put("a", 1, 2, 3)
    loop.turn()
    assert seen == [10, 30]
    assert loop.values("out") == [10, 30]
    assert loop.committed("a") == 3


def test_a_handler_that_aborts_sends_nothing_and_is_done(clock: Clock) -> None:
    app = make_app()

    @app.topic("a")
    @app.responds_to("out")
    def handler(value: int) -> None:
        app.respond_to("out", value)
        if value == 1:
            app.abort()

    loop = Loop(app, clock)
    loop.put("a", 1, 2)
    loop.turn()
    assert loop.values("out") == [2]
    assert loop.committed("a") == 2


def test_a_missing_topic_is_told_once_and_consumed_when_it_comes(clock: Clock) -> None:
    app = make_app()
    seen = recorder(app)
    loop = Loop(app, clock)
    loop.turn(2)
    ((event, _, message),) = loop.events.errors
    assert event == "topics"
    assert "there is no topic 'a' on the brokers; group 'g' waits for it" in message
    loop.put("a", 1)
    loop.turn()
    assert seen == [1]


# Queued routes: each message once, in order, and its offset only after it.


def queued_app(**options: Any) -> Flowkit:
    app = make_app(inline=False)
    app.add_topic("a", lambda value: None, **options)
    return app


A = Partition("a", 0)


def jobs(*offsets: int) -> list[tuple[str, int, int]]:
    return [("a", 0, offset) for offset in offsets]


def test_messages_are_queued_before_their_offset_is_committed(clock: Clock) -> None:
    redis = Redis()
    loop = Loop(queued_app(queue="q"), clock, redis)
    loop.put("a", 1, 2, 3)
    commit = loop.client.commit

    def check(offsets: Any) -> None:
        assert redis.jobs == jobs(0, 1, 2)
        commit(offsets)

    loop.client.commit = check
    loop.turn()
    assert loop.committed("a") == 3
    assert redis.queued == {A: 3}
    assert redis.noted == {A: 3}
    assert redis.queues == ["q"] * 3


def test_a_batch_of_many_partitions_is_one_call(clock: Clock) -> None:
    redis = Redis()
    app = queued_app()
    app.add_topic("b", lambda value: None, queue="other")
    loop = Loop(app, clock, redis)
    loop.broker.create("a", 3)
    for partition in range(3):
        loop.put("a", 1, 2, partition=partition)
    loop.put("b", 1)
    loop.turn()
    assert redis.enqueued == 1
    assert len(redis.jobs) == 7


def test_messages_that_come_again_after_a_crash_are_not_queued_twice(clock: Clock) -> None:
    redis = Redis()
    first = Loop(queued_app(), clock, redis)
    first.put("a", 1, 2, 3)

    def die(offsets: Any) -> None:
        raise RuntimeError("killed")

    first.client.commit = die
    with pytest.raises(RuntimeError, match="killed"):
        first.turn()
    second = Loop(queued_app(), clock, redis, broker=first.broker)
    second.put("a", 4)
    second.turn()
    assert redis.jobs == jobs(0, 1, 2, 3)
    assert second.committed("a") == 4


def test_hooks_do_not_run_again_for_messages_that_are_queued(clock: Clock) -> None:
    redis = Redis()
    redis.queued[A] = 2
    app = queued_app()
    hooked: list[int] = []
    app.before_enqueue("a")(lambda value: hooked.append(value))
    loop = Loop(app, clock, redis)
    loop.put("a", 1, 2, 3)
    loop.turn()
    assert hooked == [3]
    assert redis.jobs == jobs(2)


def test_a_deliberate_rewind_queues_again(clock: Clock) -> None:
    redis = Redis()
    first = Loop(queued_app(), clock, redis)
    first.put("a", 1, 2, 3)
    first.turn()
    first.broker.commits["g"][A] = 1
    second = Loop(queued_app(), clock, redis, broker=first.broker)
    second.turn()
    assert redis.jobs == jobs(0, 1, 2, 1, 2)
    assert second.events.count("rewound") == 1
    assert redis.queued == {A: 3}


def test_a_topic_made_anew_is_queued_from_its_start(clock: Clock) -> None:
    redis = Redis()
    redis.queued[A] = 500
    loop = Loop(queued_app(), clock, redis)
    loop.put("a", 1, 2)
    loop.turn()
    assert redis.jobs == jobs(0, 1)


def test_a_topic_made_anew_while_it_is_consumed_is_queued_from_its_start(clock: Clock) -> None:
    redis = Redis()
    loop = Loop(queued_app(), clock, redis)
    loop.put("a", 1, 2, 3)
    loop.turn()
    loop.broker.topics["a"] = [[]]
    loop.put("a", 4, 5)
    loop.client.positions[A] = 0  # out of range, so the client starts from the earliest
    loop.turn(2, after=1)
    assert redis.jobs == jobs(0, 1, 2, 0, 1)
    assert loop.events.count("rewound") == 1
    assert loop.committed("a") == 2


@pytest.mark.parametrize("when", ["at the start", "while it is consumed"])
def test_a_topic_made_anew_is_read_from_its_start_though_redis_goes_away_in_the_same_turn(
    clock: Clock, when: str
) -> None:
    redis = Redis()
    app = queued_app()
    app.add_topic("b", lambda value: None)
    loop = Loop(app, clock, redis)
    loop.put("a", 1, 2, 3)
    loop.put("b", 1)
    loop.turn()
    loop.broker.topics["a"] = [[]]
    loop.broker.ids["a"] = "another"
    loop.put("a", 4, 5, 6, 7, 8)
    loop.put("b", 2)
    if when == "at the start":
        loop = Loop(app, clock, redis, broker=loop.broker)

    def away() -> None:
        redis.before_enqueue = lambda: None
        redis.down = 1

    redis.before_enqueue = away
    loop.turn(5, after=20)
    assert [job for job in redis.jobs if job[0] == "a"] == jobs(0, 1, 2, 0, 1, 2, 3, 4)
    assert [job for job in redis.jobs if job[0] == "b"] == [("b", 0, 0), ("b", 0, 1)]
    assert loop.committed("a") == 5


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_what_somebody_else_queued_meanwhile_is_not_queued_twice(clock: Clock, ahead: int) -> None:
    redis = Redis()
    loop = Loop(queued_app(), clock, redis)
    loop.put("a", 1, 2, 3)

    def meanwhile() -> None:
        redis.before_enqueue = lambda: None
        redis.put(A, range(ahead))

    redis.before_enqueue = meanwhile
    loop.turn()
    assert redis.jobs == jobs(0, 1, 2)
    assert loop.committed("a") == 3
    loop.put("a", 4)
    loop.turn(after=1)
    assert redis.jobs == jobs(0, 1, 2, 3)


def test_somebody_else_who_is_further_ahead_is_believed(clock: Clock) -> None:
    redis = Redis()
    loop = Loop(queued_app(), clock, redis)
    loop.broker.create("a", 2)
    loop.put("a", 1, 2)
    loop.put("a", 11, 12, partition=1)

    def meanwhile() -> None:
        redis.before_enqueue = lambda: None
        redis.put(A, range(5))

    redis.before_enqueue = meanwhile
    loop.turn()
    assert redis.jobs == [*jobs(0, 1, 2, 3, 4), ("a", 1, 0), ("a", 1, 1)]
    loop.put("a", 3, 4, 5, 6)
    loop.turn(after=1)
    assert redis.jobs[-1] == ("a", 0, 5)
    assert len(redis.jobs) == 8


def test_marks_that_were_flushed_away_are_said_aloud_and_the_rest_goes_on(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    redis = Redis()
    loop = Loop(queued_app(), clock, redis)
    loop.put("a", 1, 2)
    loop.turn()
    redis.queued.clear()
    loop.put("a", 3)
    loop.turn(after=1)
    assert redis.jobs == jobs(0, 1, 2)
    assert "Redis knows nothing of a[0], though jobs went up to offset 2: it lost its data" in caplog.text
    assert "set the offsets of group g back" in caplog.text


def test_what_redis_has_lost_is_queued_again(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    # Given a Redis that comes back with what it had saved some time ago
    redis = Redis()
    app = queued_app()
    app.add_topic("b", lambda value: None)
    loop = Loop(app, clock, redis)
    loop.put("a", 1, 2, 3)
    loop.turn()
    redis.queued[A], redis.jobs = 1, jobs(0)
    # When the next messages are queued, then so is what was lost, and what came with it
    loop.put("a", 4)
    loop.put("b", 5)
    loop.turn(after=1)
    loop.turn(after=1)
    assert sorted(redis.jobs) == [*jobs(0, 1, 2, 3), ("b", 0, 0)]
    assert loop.committed("a") == 4
    assert "Redis knows jobs of a[0] up to offset 1 only, though they went up to 3" in caplog.text


def test_few_messages_gather_while_no_worker_is_free(clock: Clock) -> None:
    redis = Redis()
    loop = Loop(queued_app(), clock, redis)
    loop.put("a", 1)
    loop.turn()
    assert redis.asked == []
    redis.busy = True
    clock.sleep(0.1)
    began = clock.now
    loop.put("a", 2)
    loop.turn()
    assert LINGER <= clock.now - began < 2 * LINGER
    assert redis.jobs == jobs(0, 1)
    redis.busy = False
    began = clock.now
    loop.turn()
    assert clock.now == began
    redis.asked.clear()
    loop.turn()  # nothing was queued by the turn before
    assert redis.asked == []


def test_many_messages_do_not_wait(clock: Clock) -> None:
    redis = Redis()
    redis.busy = True
    loop = Loop(queued_app(), clock, redis)
    loop.put("a", *range(2 * MOST_QUEUED))
    began = clock.now
    loop.turn(2)
    assert clock.now == began
    assert len(redis.jobs) == 2 * MOST_QUEUED


def test_a_mark_behind_the_commit_is_said_aloud_at_the_start(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    redis = Redis()
    redis.queued[A] = redis.noted[A] = 1
    loop = Loop(queued_app(), clock, redis)
    loop.put("a", 1, 2, 3)
    loop.broker.commits["g"][A] = 3
    loop.put("a", 4)
    loop.turn()
    assert redis.jobs == jobs(3)
    assert "Redis knows jobs of a[0] up to offset 1 only" in caplog.text
    assert "or was set forward; to queue them again, set the offsets of group g back" in caplog.text
    # and it is said once
    caplog.clear()
    Loop(queued_app(), clock, redis, broker=loop.broker).turn()
    assert caplog.text == ""


def test_a_redis_without_marks_is_said_aloud_at_the_start(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    redis = Redis()
    loop = Loop(queued_app(), clock, redis)
    loop.put("a", 1, 2, 3)
    loop.broker.commits["g"][A] = 2
    loop.turn()
    assert redis.jobs == jobs(2)
    assert "Redis knows nothing of a[0], though jobs went up to offset 2" in caplog.text


def test_the_mark_is_not_behind_the_commit_where_no_job_came_of_the_messages(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    redis = Redis()
    app = queued_app()
    app.before_enqueue("a")(lambda value: app.abort())
    loop = Loop(app, clock, redis)
    loop.put("a", 1, 2)
    loop.turn()
    assert (loop.committed("a"), redis.queued) == (2, {A: 2})
    Loop(app, clock, redis, broker=loop.broker).turn()
    assert caplog.text == ""


def test_redis_that_is_away_puts_everything_back_and_resumes(clock: Clock) -> None:
    redis = Redis()
    app = queued_app()
    seen = recorder(app, "inline", inline=True)
    loop = Loop(app, clock, redis)
    loop.broker.create("a", 2)
    loop.turn()
    redis.down = 3
    loop.put("a", 1, 2)
    loop.put("a", 11, partition=1)
    loop.put("inline", 7)
    loop.turn(after=1)
    assert seen == [7]
    assert redis.jobs == []
    assert (loop.committed("a", 0), loop.committed("a", 1)) == (0, 0)
    assert len(loop.client.paused) == 2
    assert "trying again in" in loop.events.errors[-1][2]
    loop.turn(20, after=1)
    assert sorted(redis.jobs) == [("a", 0, 0), ("a", 0, 1), ("a", 1, 0)]
    assert (loop.committed("a", 0), loop.committed("a", 1)) == (2, 1)
    assert loop.client.paused == set()
    assert loop.consumer.queueing._failures == 0


def test_a_reply_of_redis_that_got_lost_queues_nothing_twice(clock: Clock) -> None:
    redis = Redis()
    loop = Loop(queued_app(), clock, redis)
    loop.put("a", 1, 2)
    enqueue, calls = redis.enqueue, []

    def lossy(*arguments: Any) -> int:
        calls.append(1)
        count = enqueue(*arguments)
        if len(calls) == 1:
            raise RedisUnavailable("timed out")
        return count

    redis.enqueue = lossy  # type: ignore[method-assign]
    loop.turn(10, after=1)
    assert redis.jobs == jobs(0, 1)
    assert loop.committed("a") == 2


def test_redis_that_is_away_when_partitions_come_loses_nothing(clock: Clock) -> None:
    redis = Redis()
    redis.down = 3
    redis.queued[A] = 1
    app = queued_app()
    seen: list[int] = []
    app.add_topic("b", lambda value: seen.append(value), inline=True)
    loop = Loop(app, clock, redis)
    loop.put("a", 1, 2)
    loop.put("b", 7)
    client = loop.client
    loop.turn()
    # The messages that need no Redis go on, with the same client
    assert seen == [7]
    assert loop.committed("a") is None
    loop.turn(6, after=20)
    assert redis.jobs == jobs(1)
    assert (loop.committed("a"), loop.client) == (2, client)
    assert loop.events.count("recovered") == 1


def test_partitions_that_come_while_redis_is_away_wait_with_the_others(clock: Clock) -> None:
    redis = Redis()
    redis.down = 2
    loop = Loop(queued_app(), clock, redis)
    loop.put("a", 1)
    loop.turn()
    loop.broker.topics["a"].append([])  # a partition is added
    loop.put("a", 2, partition=1)
    redis.queued[Partition("a", 1)] = 1
    loop.turn()
    assert redis.jobs == []
    loop.turn(8, after=20)
    assert redis.jobs == jobs(0)  # the other one was queued before
    assert [loop.committed("a", number) for number in (0, 1)] == [1, 1]


def test_a_custom_worker_does_not_get_a_message_again_because_redis_is_away(clock: Clock) -> None:
    got: list[int] = []

    class Elsewhere:
        @staticmethod
        def perform_async(topic: str, params: Mapping[str, Any]) -> None:
            got.append(params["offset"])

    redis = Redis()
    app = queued_app()

    @app.before_enqueue("a")
    def choose(value: int, message: Message) -> None:
        if value < 10:
            message.worker = Elsewhere

    loop = Loop(app, clock, redis)
    loop.turn()
    redis.down = 5
    loop.put("a", 1, 2, 10, 3)
    loop.turn(20, after=20)
    assert got == [0, 1, 3]
    assert redis.jobs == jobs(2)
    assert loop.committed("a") == 4


def test_a_dead_letter_leaves_no_mark_behind_the_commit(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    redis = Redis()
    app = queued_app(retry=1, dead_letter="dead")

    @app.before_enqueue("a")
    def fail(value: int) -> None:
        if value == 3:
            raise ValueError("three")

    loop = Loop(app, clock, redis)
    loop.put("a", 1, 2, 3)
    loop.turn()
    loop.turn(after=1)
    assert (loop.committed("a"), redis.queued[A]) == (3, 3)


def test_what_is_committed_in_a_rebalance_is_noted_so_that_a_rewind_behind_it_is_seen(clock: Clock) -> None:
    redis = Redis()
    loop = Loop(queued_app(), clock, redis)
    loop.turn()
    loop.consumer._commit_at = clock.now + HOUR  # nothing is committed but what a rebalance does
    loop.put("a", 1, 2, 3)
    loop.turn()
    assert loop.committed("a") is None
    loop.consumer.stop()
    loop.consumer.run()
    assert (loop.committed("a"), redis.noted) == (3, {A: 3})
    loop.broker.commits["g"][A] = 1
    Loop(queued_app(), clock, redis, broker=loop.broker).turn()
    assert redis.jobs == jobs(0, 1, 2, 1, 2)


def test_what_an_interchanger_makes_no_json_of_stops_its_own_partition_only(clock: Clock) -> None:
    class Odd:
        @staticmethod
        def load(value: bytes) -> Any:
            return "\ud800" if value == b"2" else value.decode()

        @staticmethod
        def parse(data: Any) -> bytes:
            return str(data).encode()

    redis = Redis()
    app = queued_app(interchanger=Odd)
    app.add_topic("b", lambda value: None)
    loop = Loop(app, clock, redis)
    loop.put("a", 1, 2, 3)
    loop.put("b", 4)
    loop.turn()
    assert redis.jobs == [("a", 0, 0), ("b", 0, 0)]
    assert loop.committed("a") == 1
    assert "neither bytes nor JSON" in loop.events.errors[-1][2]


def test_redis_that_is_away_after_a_commit_changes_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    redis = Redis()
    loop = Loop(queued_app(), clock, redis)
    loop.put("a", 1)
    commit = loop.client.commit

    def then_down(offsets: Any) -> None:
        commit(offsets)
        redis.down = 1

    loop.client.commit = then_down
    loop.turn()
    assert loop.committed("a") == 1
    assert "the commit is not noted in Redis" in caplog.text
    loop.turn(2, after=1)
    assert redis.jobs == jobs(0)


def hook_that_fails(app: Flowkit, poison: int, until: int = 10**9) -> list[tuple[int, int]]:
    hooked: list[tuple[int, int]] = []
    failures = 0

    def hook(value: int, message: Message) -> None:
        nonlocal failures
        hooked.append((value, message.attempt))
        if value == poison and failures < until:
            failures += 1
            raise ValueError(f"hook cannot do {value}")

    app.before_enqueue("a")(hook)
    return hooked


def test_a_hook_that_fails_in_the_middle_keeps_the_rest_for_later(clock: Clock) -> None:
    redis = Redis()
    app = queued_app()
    hooked = hook_that_fails(app, 3, until=2)
    loop = Loop(app, clock, redis)
    loop.broker.create("a", 2)
    loop.put("a", 1, 2, 3, 4)
    loop.put("a", 11, partition=1)
    loop.turn()
    assert sorted(redis.jobs) == [*jobs(0, 1), ("a", 1, 0)]
    assert (loop.committed("a", 0), loop.committed("a", 1)) == (2, 1)
    assert loop.client.positions[A] == 2
    loop.turn(2, after=1)
    assert sorted(redis.jobs) == [*jobs(0, 1, 2, 3), ("a", 1, 0)]
    assert hooked == [(1, 1), (2, 1), (3, 1), (11, 1), (3, 2), (3, 3), (4, 1)]
    loop.turn(after=1)
    assert loop.committed("a") == 4


def test_a_hook_that_always_fails_leads_to_a_dead_letter(clock: Clock) -> None:
    redis = Redis()
    app = queued_app(dead_letter="dead", retry=Retry(attempts=3, first=0))
    hook_that_fails(app, 2)
    loop = Loop(app, clock, redis)
    loop.put("a", 1, 2, 3)
    loop.turn(5, after=1)
    assert redis.jobs == jobs(0, 2)
    assert loop.values("dead") == [2]
    assert loop.committed("a") == 3


def test_a_failing_hook_while_redis_is_away_loses_nothing(clock: Clock) -> None:
    redis = Redis()
    app = queued_app()
    hook_that_fails(app, 2, until=3)
    loop = Loop(app, clock, redis)
    loop.broker.create("a")
    loop.turn()
    loop.put("a", 1, 2, 3)
    redis.down = 2
    loop.turn(20, after=1)
    assert redis.jobs == jobs(0, 1, 2)
    assert loop.committed("a") == 3


def test_a_hook_may_choose_the_queue_and_abort(clock: Clock) -> None:
    redis = Redis()
    app = queued_app()

    @app.before_enqueue("a")
    def triage(value: int, message: Message) -> None:
        if value == 2:
            app.abort()
        if value == 3:
            message.queue = "express"

    loop = Loop(app, clock, redis)
    loop.put("a", 1, 2, 3)
    loop.turn()
    assert list(zip(redis.jobs, redis.queues, strict=True)) == [(("a", 0, 0), "default"), (("a", 0, 2), "express")]
    assert loop.committed("a") == 3


def test_a_batch_whose_messages_were_all_aborted_is_committed(clock: Clock) -> None:
    app = queued_app()
    app.before_enqueue("a")(lambda value: app.abort())
    redis = Redis()
    loop = Loop(app, clock, redis)
    loop.put("a", 1, 2)
    loop.turn()
    assert redis.jobs == []
    assert loop.committed("a") == 2


class Poisoned:
    """An interchanger that cannot carry one value."""

    @staticmethod
    def load(value: bytes) -> str:
        if value == b"2":
            raise ValueError("cannot carry 2")
        return value.decode()

    @staticmethod
    def parse(value: str) -> bytes:
        return value.encode()


def test_a_message_that_cannot_be_carried_holds_its_partition_only(clock: Clock) -> None:
    redis = Redis()
    loop = Loop(queued_app(interchanger=Poisoned, dead_letter="dead", retry=2), clock, redis)
    loop.broker.create("a", 2)
    loop.put("a", 1, 2, 3)
    loop.put("a", 11, partition=1)
    loop.turn()
    assert sorted(redis.jobs) == [*jobs(0), ("a", 1, 0)]
    assert loop.committed("a") == 1
    loop.turn(5, after=1)
    assert sorted(redis.jobs) == [*jobs(0, 2), ("a", 1, 0)]
    assert loop.values("dead") == [2]


def test_a_stop_among_hooks_queues_what_is_done_and_leaves_the_rest(clock: Clock) -> None:
    redis = Redis()
    app = queued_app()

    @app.before_enqueue("a")
    def hook(value: int) -> None:
        if value == 2:
            loop.consumer.stop()

    loop = Loop(app, clock, redis)
    loop.broker.create("a", 2)
    loop.put("a", 1, 2, 3)
    loop.put("a", 11, partition=1)
    loop.consumer.run()
    assert redis.jobs == jobs(0, 1)
    assert (loop.committed("a", 0), loop.committed("a", 1)) == (2, None)


# Custom workers.


class Worker:
    def __init__(self, poison: int | None = None, until: int = 1) -> None:
        self.done: list[int] = []
        self.poison = poison
        self.until = until

    def perform_async(self, topic: str, params: Mapping[str, Any]) -> None:
        if params["offset"] == self.poison and self.until:
            self.until -= 1
            raise OSError("the queue is full")
        self.done.append(params["offset"])


def test_a_custom_worker_gets_each_message_and_needs_no_redis(clock: Clock) -> None:
    worker = Worker()
    loop = Loop(queued_app(worker=worker), clock)
    loop.put("a", 1, 2, 3)
    loop.turn()
    assert worker.done == [0, 1, 2]
    assert loop.committed("a") == 3


def test_a_custom_worker_that_fails_in_the_middle_gets_the_rest_later(clock: Clock) -> None:
    worker = Worker(poison=1, until=2)
    loop = Loop(queued_app(worker=worker), clock)
    loop.put("a", 1, 2, 3)
    loop.turn()
    assert worker.done == [0]
    assert loop.committed("a") == 1
    loop.turn(3, after=1)
    assert worker.done == [0, 1, 2]
    assert loop.committed("a") == 3


def test_a_hook_may_choose_a_custom_worker_beside_the_queue(clock: Clock) -> None:
    redis, worker = Redis(), Worker(poison=3)
    app = queued_app()

    @app.before_enqueue("a")
    def choose(value: int, message: Message) -> None:
        if value % 2 == 0:
            message.worker = worker

    loop = Loop(app, clock, redis)
    loop.put("a", 1, 2, 3, 4, 5)
    loop.turn(3, after=1)
    assert redis.jobs == jobs(0, 2, 4)
    assert worker.done == [1, 3]
    assert loop.committed("a") == 5


def test_a_message_sent_back_to_a_queue_that_is_not_there_is_kept(clock: Clock) -> None:
    app = queued_app(worker=Worker())

    @app.before_enqueue("a")
    def choose(value: int, message: Message) -> None:
        message.worker = None

    loop = Loop(app, clock)  # no route of its own needs Redis, so there is none
    loop.put("a", 1)
    loop.turn(3)
    assert loop.committed("a") == 0
    assert "redis" in loop.events.errors[0][2]


# The real loop: run() on a thread, ended from another one.


def test_run_ends_soon_after_a_stop(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    app = make_app()
    seen = threading.Event()
    app.add_topic("a", lambda value: seen.set())
    broker = Broker()
    broker.append("a", b"1")
    producer = Producer(lambda: app.settings, broker.producer)
    consumer = Consumer("g", app.handlings, app.settings, Events(), producer, broker.consumer)
    thread = threading.Thread(target=consumer.run)
    thread.start()
    assert seen.wait(5)
    consumer.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert broker.commits["g"] == {A: 1}


# What the monitor is told.


def test_consumed_counts_the_messages_of_a_partition_inline_and_queued(clock: Clock) -> None:
    app = Flowkit("shop")
    app.add_topic("a", lambda payload: None, inline=True)
    app.add_topic("b", lambda payload: None)
    loop = Loop(app, clock, Redis())
    loop.put("a", 1, 2)
    loop.put("b", 3)
    loop.turn(2)
    told = [details for event, details in loop.events.notices if event == "consumed"]
    assert sorted(told, key=lambda details: details["topic"]) == [
        {"topic": "a", "partition": 0, "count": 2, "group": "g"},
        {"topic": "b", "partition": 0, "count": 1, "group": "g"},
    ]
    assert [details for event, details in loop.events.notices if event == "queued"] == [
        {"topic": "b", "queue": "default", "count": 1, "jobs": 1, "group": "g"}
    ]


def test_responded_counts_what_kafka_confirmed(clock: Clock) -> None:
    app = make_app()

    @app.topic("a")
    @app.responds_to("x", multiple_usage=True)
    def handler(value: int) -> None:
        for _ in range(value):
            app.respond_to("x", value)

    loop = Loop(app, clock)
    loop.put("a", 1, 2)
    loop.turn()
    assert [details for event, details in loop.events.notices if event == "responded"] == [{"topic": "x", "count": 3}]


def test_failed_retried_and_dead_follow_a_message(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=2, first=0), dead_letter="dead")
    failing_at(app, 1)
    loop = Loop(app, clock)
    loop.put("a", 1)
    told: list[tuple[str, Any]] = []

    def notice_error(event: str, error: BaseException, **details: Any) -> None:
        told.append((event, (details["attempt"], details["last"])))

    loop.broker.create("dead")
    loop.events.notice_error = notice_error  # type: ignore[method-assign]
    loop.turn(3)
    where = {"topic": "a", "partition": 0, "offset": 0, "group": "g"}
    notices = [(event, details) for event, details in loop.events.notices if event in ("retried", "dead")]
    # a turn in which nothing was finished is not spoken of; the dead letter's message counts
    assert [details["count"] for event, details in loop.events.notices if event == "consumed"] == [1]
    assert told == [("failed", (1, False)), ("failed", (2, True))]
    assert notices == [
        ("retried", {**where, "attempt": 2, "delay": 0.0}),
        ("dead", {**where, "attempt": 2, "dead_letter": "dead"}),
    ]


def test_a_message_without_a_dead_letter_has_no_last_attempt(clock: Clock) -> None:
    app = make_app(retry=Retry(attempts=2, first=0))
    last: list[bool] = []

    @app.topic("a")
    def handler(value: int, message: Message) -> None:
        last.append(message.last_attempt)
        raise ValueError

    @app.after_failure
    def report(error: Exception, message: Message) -> None:
        last.append(message.last_attempt)

    loop = Loop(app, clock)
    loop.put("a", 1)
    loop.turn(4)
    assert last == [False] * 8


def test_a_custom_worker_is_told_of_with_its_name(clock: Clock) -> None:
    class Slow:
        def perform_async(self, topic: str, params: Any) -> None: ...

    app = Flowkit("shop")
    app.add_topic("a", lambda payload: None, worker=Slow())
    loop = Loop(app, clock)
    loop.put("a", 1, 2)
    loop.turn()
    [told] = [details for event, details in loop.events.notices if event == "queued"]
    assert told == {"topic": "a", "worker": Slow.__qualname__, "count": 2, "group": "g"}


@pytest.mark.parametrize("confirmed_later", [False, True])
def test_an_end_whose_last_commit_is_refused_is_not_clean(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, confirmed_later: bool
) -> None:
    app = make_app(kafka={"offset_commit_interval": 60})
    recorder(app)
    loop = Loop(app, clock)
    loop.put("a", 1)
    loop.turn()  # which commits, as a first turn does
    loop.put("a", 2)
    loop.turn()
    client = loop.client
    close = client.close

    def refuse(offsets: Mapping[Partition, int]) -> None:
        if offsets:
            raise CommitRefused("the group has moved on")

    def close_with_a_rebalance(timeout: float) -> None:
        if confirmed_later:
            loop.consumer.confirmed(loop.consumer.revoked([Partition("a", 0)]))
        close(timeout)

    monkeypatch.setattr(client, "commit", refuse)
    monkeypatch.setattr(client, "close", close_with_a_rebalance)
    loop.consumer._commit_at = 0.0
    loop.consumer._end()
    assert loop.consumer.clean is confirmed_later


@pytest.mark.parametrize(
    ("kafka", "partitions", "takes", "most"),
    [
        ({}, 4, 0.0, 500),
        ({}, 200, 0.0, 1_000),
        ({}, 2_000, 0.0, 5_000),
        ({}, 200, 0.01, 500),
        ({"max_poll_records": 7}, 200, 0.0, 7),
        ({"max_poll_records": 100_000}, 200, 0.0, 50_000),
        ({"offset_commit_threshold": 300}, 200, 0.0, 500),
    ],
)
def test_a_poll_is_for_more_of_many_partitions_where_handlers_are_fast(
    clock: Clock, kafka: dict[str, Any], partitions: int, takes: float, most: int
) -> None:
    app = make_app(kafka=kafka)

    @app.topic("a", group="g")
    def handle(value: int) -> None:
        clock.now += takes

    loop = Loop(app, clock)
    loop.broker.create("a", partitions)
    for partition in range(min(20, partitions)):
        loop.put("a", 1, partition=partition)
    loop.turn(2)
    polled: list[int] = []
    poll = loop.client.poll

    def counting(timeout: float, limit: int) -> Any:
        polled.append(limit)
        return poll(timeout, limit)

    loop.client.poll = counting
    for partition in range(min(20, partitions)):
        loop.put("a", 1, partition=partition)

    loop.turn(2)

    assert polled[-1] == most


def test_of_many_partitions_those_that_wait_are_looked_at_until_they_go_on(clock: Clock) -> None:
    app = make_app(retry=Retry(first=2, factor=1))
    bad = {"3", "5"}

    @app.topic("a", group="g")
    def handle(value: int) -> None:
        if str(value) in bad:
            raise ValueError(value)

    loop = Loop(app, clock)
    loop.broker.create("a", 8)
    for partition in range(8):
        loop.put("a", partition, partition=partition)
    loop.turn(3)
    assert loop.consumer._troubled == {Partition("a", 3), Partition("a", 5)}
    bad.clear()
    loop.turn(2, after=2)
    loop.consumer.commit()
    assert loop.consumer._troubled == set()
    assert [loop.committed("a", partition) for partition in range(8)] == [1] * 8
    assert sorted(details["message"] for name, details in loop.events.notices if name == "recovered") == [
        "a[3]@0",
        "a[5]@0",
    ]


def test_partitions_that_come_one_by_one_while_redis_is_away_wait_with_the_first(clock: Clock) -> None:
    """librdkafka gives them one by one: each would count as another failure, and the wait be minutes soon."""
    app = make_app(inline=False)
    app.topic("a", group="g")(lambda value: None)
    redis = Redis()
    loop = Loop(app, clock, redis)
    loop.consumer.reconnect = Retry(first=1, factor=2, jitter=0)
    loop.broker.create("a", 6)
    loop.turn()  # its partitions are known, and Redis was asked about them
    poll = loop.client.poll
    loop.client.poll = lambda timeout, most: poll(timeout, 1)
    for partition in range(6):
        loop.put("a", 1, partition=partition)
    redis.down = 1

    loop.turn(6)
    assert {track.resume_at for track in loop.consumer.tracks.values()} == {clock.now + 1}
    assert [event for event, *_ in loop.events.errors] == ["queue"]
    loop.turn(7, after=1)

    assert sorted(redis.jobs) == [("a", partition, 0) for partition in range(6)]
    assert [event for event, *_ in loop.events.errors] == ["queue"]


def test_when_redis_is_back_nobody_waits_for_the_time_that_it_was_thought_to_be_away(clock: Clock) -> None:
    app = make_app(inline=False)
    app.topic("a", group="g")(lambda value: None)
    redis = Redis()
    loop = Loop(app, clock, redis)
    loop.consumer.reconnect = Retry(first=15, factor=1, jitter=0)
    loop.turn()
    loop.put("a", 1)
    redis.down = 1
    loop.turn()
    assert redis.jobs == []
    loop.turn(after=16)
    loop.put("a", 2)
    loop.turn(2)
    assert redis.jobs == [("a", 0, 0), ("a", 0, 1)]
    assert loop.consumer.queueing is not None
    assert loop.consumer.queueing._away_until == 0.0


def test_partitions_that_come_while_redis_is_known_to_be_away_do_not_ask(clock: Clock) -> None:
    app = make_app(inline=False)
    app.topic("a", group="g")(lambda value: None)
    redis = Redis()
    loop = Loop(app, clock, redis)
    loop.consumer.reconnect = Retry(first=4, factor=2, jitter=0)
    loop.put("a", 1)
    loop.turn()
    loop.put("a", 2)
    redis.down = 1
    loop.turn()
    loop.broker.topics["a"].append([])  # a partition is added
    loop.put("a", 3, partition=1)
    loop.turn(2)
    assert [event for event, *_ in loop.events.errors] == ["queue"]
    loop.turn(3, after=4)
    assert sorted(redis.jobs) == [("a", 0, 0), ("a", 0, 1), ("a", 1, 0)]
