"""A queue that is too long holds in Kafka what fills it until workers have caught up: turn by turn, in Redis, as a whole."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer
from processes import Process
from redis import Redis as RealRedis
from rq import Queue
from servers import Kafka, MakeTopic, RedisServer, WaitFor
from support import an_entry, put_jobs
from test_consumer import A, Clock, Loop, Redis, jobs, make_app, stopped_clock

from flowkit import Flowkit, Message
from flowkit.backlog import backlog
from flowkit.jobqueue import JobQueue
from flowkit.message import Partition


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return stopped_clock(monkeypatch)


class Backlog(Redis):
    """A Redis whose queues are as long as a test says: ``lengths``."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: dict[str, int] = {}
        self.looks = 0

    def enqueue(self, *arguments: Any) -> Any:
        queued = super().enqueue(*arguments)
        return queued._replace(waiting={queue: self.lengths.get(queue, 0) for queue in queued.waiting})

    def waiting(self, queue: str) -> int:
        self.looks += 1
        self._ask()
        return self.lengths.get(queue, 0)


def pressed(*topics: str, **options: Any) -> Flowkit:
    app = make_app(inline=False, max_backlog=100)
    for topic in topics:
        app.add_topic(topic, lambda value: None, **options)
    return app


def told(loop: Loop) -> list[tuple[str, Any, Any]]:
    return [(e, d["queue"], d["messages"]) for e, d in loop.events.notices if e in ("paused", "resumed")]


# Turn by turn.


def test_above_max_backlog_its_partitions_wait_and_below_half_they_go_on(clock: Clock) -> None:
    redis = Backlog()
    loop = Loop(pressed("a"), clock, redis)
    loop.broker.create("a", 2)
    redis.lengths["default"] = 100
    loop.put("a", 1)
    loop.turn(after=1)
    assert told(loop) == []  # not above
    redis.lengths["default"] = 101
    loop.put("a", 2)
    loop.put("a", 9, partition=1)
    loop.turn(after=1)
    assert told(loop) == [("paused", "default", 101)]
    assert loop.client.paused == {A, Partition("a", 1)}
    # what is queued is committed all the same
    loop.turn(after=1)
    assert (loop.committed("a"), loop.committed("a", 1)) == (2, 1)
    loop.put("a", 3)
    for length in (101, 99, 51):
        redis.lengths["default"] = length
        loop.turn(2, after=1)
        assert loop.client.paused == {A, Partition("a", 1)}, length
    redis.lengths["default"] = 50
    loop.turn(2, after=1)
    assert told(loop) == [("paused", "default", 101), ("resumed", "default", 50)]
    assert loop.client.paused == set()
    assert sorted(redis.jobs) == [*jobs(0, 1, 2), ("a", 1, 0)]
    assert loop.committed("a") == 3


def test_it_is_told_once_and_looked_at_ten_times_a_second_at_most(clock: Clock) -> None:
    redis = Backlog()
    loop = Loop(pressed("a"), clock, redis)
    redis.lengths["default"] = 500
    loop.put("a", 1)
    loop.turn(after=1)
    assert redis.looks == 0
    assert loop.consumer.queueing is not None
    assert loop.consumer.queueing.patience == pytest.approx(0.1)
    loop.turn(100, after=0.01)
    assert 8 <= redis.looks <= 11
    assert told(loop) == [("paused", "default", 500)]
    redis.lengths["default"] = 0
    loop.turn(after=1)
    assert loop.consumer.queueing.patience == float("inf")


def test_other_queues_and_inline_topics_of_the_same_group_go_on(clock: Clock) -> None:
    redis = Backlog()
    app = pressed("a")
    app.add_topic("b", lambda value: None, queue="other")
    seen: list[int] = []
    app.add_topic("c", lambda value: seen.append(value), inline=True)
    loop = Loop(app, clock, redis)
    redis.lengths = {"default": 500, "other": 3}
    for number in range(3):
        for topic in ("a", "b", "c"):
            loop.put(topic, number)
        loop.turn(2, after=1)
    assert loop.client.paused == {A}
    assert [job[0] for job in redis.jobs] == ["a", "b", "b", "b"]
    assert seen == [0, 1, 2]
    assert [loop.committed(topic) for topic in "abc"] == [1, 3, 3]


def test_a_partition_that_fills_two_queues_waits_for_both(clock: Clock) -> None:
    redis = Backlog()
    app = pressed("a")

    @app.before_enqueue("a")
    def spread(value: int, message: Message) -> None:
        message.queue = "even" if value % 2 == 0 else "odd"

    loop = Loop(app, clock, redis)
    redis.lengths = {"even": 500, "odd": 300}
    loop.put("a", 1, 2, 3)
    loop.turn(after=1)
    assert sorted(told(loop)) == [("paused", "even", 500), ("paused", "odd", 300)]
    redis.lengths["even"] = 0
    loop.put("a", 4)
    loop.turn(3, after=1)
    assert told(loop)[2:] == [("resumed", "even", 0)]
    assert loop.client.paused == {A}
    assert sorted(redis.jobs) == jobs(0, 1, 2)
    redis.lengths["odd"] = 0
    loop.turn(2, after=1)
    assert loop.client.paused == set()
    assert sorted(redis.jobs) == jobs(0, 1, 2, 3)


def test_a_partition_that_fills_only_a_short_queue_goes_on(clock: Clock) -> None:
    redis = Backlog()
    app = pressed("a")

    @app.before_enqueue("a")
    def spread(value: int, message: Message) -> None:
        message.queue = "long" if message.partition == 0 else "short"

    loop = Loop(app, clock, redis)
    loop.broker.create("a", 2)
    redis.lengths = {"long": 500}
    loop.put("a", 1)
    loop.put("a", 1, partition=1)
    loop.turn(after=1)
    loop.put("a", 2)
    loop.put("a", 2, partition=1)
    loop.turn(2, after=1)
    assert loop.client.paused == {A}
    assert sorted(redis.jobs) == [("a", 0, 0), ("a", 1, 0), ("a", 1, 1)]


def test_what_the_client_had_fetched_before_its_pause_is_not_lost(clock: Clock) -> None:
    redis = Backlog()
    loop = Loop(pressed("a"), clock, redis)
    redis.lengths["default"] = 500
    loop.put("a", 1, 2)
    loop.turn(after=1)
    loop.client.paused.clear()  # whatever the client does
    loop.put("a", 3, 4)
    loop.turn(3, after=1)
    assert redis.jobs == jobs(0, 1)
    redis.lengths["default"] = 0
    loop.turn(3, after=1)
    assert redis.jobs == jobs(0, 1, 2, 3)
    assert loop.committed("a") == 4


def test_a_held_partition_that_leaves_and_comes_back_is_looked_at_anew(clock: Clock) -> None:
    redis = Backlog()
    loop = Loop(pressed("a", "b"), clock, redis)
    redis.lengths["default"] = 500
    loop.put("a", 1)
    loop.put("b", 1)
    loop.turn(after=1)
    assert loop.client.paused == {A, Partition("b", 0)}
    loop.take_away("a")
    loop.put("a", 2)
    loop.turn(after=1)  # it comes back, and its next batch is too much again
    loop.turn(2, after=1)
    assert redis.jobs == [("a", 0, 0), ("b", 0, 0), ("a", 0, 1)]
    assert loop.client.paused == {A, Partition("b", 0)}
    redis.lengths["default"] = 0
    loop.put("a", 3)
    loop.turn(3, after=1)
    assert loop.client.paused == set()
    assert loop.committed("a") == 3


def test_a_queue_whose_partitions_have_all_gone_is_let_go(clock: Clock) -> None:
    redis = Backlog()
    loop = Loop(pressed("a"), clock, redis)
    redis.lengths["default"] = 500
    loop.put("a", 1)
    loop.turn(after=1)
    loop.take_away("a", lost=True)
    redis.lengths["default"] = 0
    loop.turn(3, after=1)
    assert told(loop)[-1] == ("resumed", "default", 0)
    assert loop.client.paused == set()


def test_a_new_client_begins_without_pauses(clock: Clock) -> None:
    redis = Backlog()
    loop = Loop(pressed("a"), clock, redis)
    redis.lengths["default"] = 500
    loop.put("a", 1)
    loop.turn(after=1)
    loop.consumer._reconnect(RuntimeError("poll failed"))
    redis.lengths["default"] = 0
    loop.put("a", 2)
    loop.turn(3, after=1)
    assert redis.jobs == jobs(0, 1)
    assert loop.client.paused == set()


def test_redis_that_is_away_while_partitions_wait_is_told_and_waited_for(clock: Clock) -> None:
    redis = Backlog()
    loop = Loop(pressed("a"), clock, redis)
    redis.lengths["default"] = 500
    loop.put("a", 1)
    loop.turn(after=1)
    redis.down = 3
    loop.put("a", 2)
    loop.turn(2, after=0.2)
    assert len(loop.events.errors) == 1
    loop.turn(3, after=0.01)  # it backs off
    assert len(loop.events.errors) == 1
    redis.lengths["default"] = 0
    loop.turn(8, after=20)
    assert len(loop.events.errors) == 3
    assert redis.jobs == jobs(0, 1)
    assert loop.client.paused == set()
    assert loop.committed("a") == 2
    assert loop.events.count("recovered") == 1


def test_a_stop_while_partitions_wait_commits_what_is_queued(clock: Clock) -> None:
    redis = Backlog()
    app = make_app(inline=False, max_backlog=100, kafka={"offset_commit_interval": 600})
    app.add_topic("a", lambda value: None)
    loop = Loop(app, clock, redis)
    loop.turn()
    redis.lengths["default"] = 500
    loop.put("a", 1, 2)
    loop.turn(after=1)
    loop.put("a", 3)
    loop.turn(after=1)
    loop.consumer.stop()
    loop.consumer._end()
    assert loop.committed("a") == 2
    assert loop.consumer.clean


def test_a_partition_that_waits_for_a_failed_message_too_waits_for_both(clock: Clock) -> None:
    redis = Backlog()
    app = pressed("a")
    fails = [True]

    @app.before_enqueue("a")
    def hook(value: int) -> None:
        if value == 2 and fails[0]:
            raise ValueError("no")

    loop = Loop(app, clock, redis)
    redis.lengths["default"] = 500
    loop.put("a", 1, 2, 3)
    loop.turn(3, after=1)
    fails[0] = False
    assert loop.client.paused == {A}
    redis.lengths["default"] = 0
    loop.turn(4, after=1)
    assert redis.jobs == jobs(0, 1, 2)
    assert loop.committed("a") == 3


def test_a_max_backlog_below_one_batch_lets_one_batch_through_at_a_time(clock: Clock) -> None:
    redis = Backlog()
    app = make_app(inline=False, max_backlog=1)
    app.add_topic("a", lambda value: None)
    loop = Loop(app, clock, redis)
    batch = 0
    for number in range(4):
        loop.put("a", *range(20))
        redis.lengths["default"] = 20
        loop.turn(2, after=1)
        assert len(redis.jobs) == 20 * (number + 1)
        assert loop.client.paused == {A}
        redis.lengths["default"] = 0
        loop.turn(after=1)
        batch += 20
    assert redis.jobs == jobs(*range(batch))


# The estimate, in Redis.


@pytest.fixture
def queue(redis: RealRedis, redis_url: str) -> tuple[Flowkit, JobQueue]:
    app = make_app(inline=False, redis=redis_url, job_size=1000)
    app.add_topic("orders-1.eu_west", print)
    app.reference = "support:app"
    return app, JobQueue(redis_url, "t", app.reference)


def fill(redis: RealRedis, app: Flowkit, *sizes: int, place: str = "") -> None:
    for size in sizes:
        entries = [an_entry("orders-1.eu_west", offset) for offset in range(size)]
        put_jobs(redis, app, "orders-1.eu_west", entries, place=place)


def test_the_messages_of_an_empty_queue_and_of_one_that_never_was_are_none(queue: tuple[Flowkit, JobQueue]) -> None:
    assert queue[1].waiting("default") == queue[1].waiting("never") == 0


@pytest.mark.parametrize("sizes", [[1], [7, 1, 500], [3] * 64, list(range(1, 65))])
def test_the_messages_of_up_to_64_jobs_are_counted(
    redis: RealRedis, queue: tuple[Flowkit, JobQueue], sizes: list[int]
) -> None:
    fill(redis, queue[0], *sizes)
    assert queue[1].waiting("default") == sum(sizes)


@pytest.mark.parametrize("count", [65, 300])
def test_those_of_many_jobs_are_taken_from_both_ends(
    redis: RealRedis, queue: tuple[Flowkit, JobQueue], count: int
) -> None:
    fill(redis, queue[0], *[5] * count)
    assert queue[1].waiting("default") == 5 * count
    fill(redis, queue[0], *[15] * count)
    assert queue[1].waiting("default") == 20 * count


def test_jobs_of_somebody_else_are_a_message_each(redis: RealRedis, queue: tuple[Flowkit, JobQueue]) -> None:
    fill(redis, queue[0], 10)
    others = Queue("default", connection=redis)
    others.enqueue("os.getpid", job_id="5f0a9c3e-1017-4100-8091-0123456789ab")  # as RQ makes them
    others.enqueue("os.getpid", job_id="nightly")
    assert queue[1].waiting("default") == 12


def test_messages_that_are_to_be_tried_again_count_too(redis: RealRedis, queue: tuple[Flowkit, JobQueue]) -> None:
    fill(redis, queue[0], 10)
    fill(redis, queue[0], 1, 1, 1, place="4102444800")
    assert queue[1].waiting("default") == 13


# As a whole.


def test_a_producer_much_faster_than_the_worker_fills_kafka_and_not_redis(
    kafka: Kafka, topic: MakeTopic, tmp_path: Path, wait_for: WaitFor
) -> None:
    if not kafka.apache:
        pytest.skip("the embedded broker has no rebalances to be relied on")
    # a server of our own, for its memory
    with RedisServer(tmp_path / "redis") as server, RealRedis.from_url(server.url) as redis:
        _outrun(kafka.hosts, topic("pressed"), server.url, redis, tmp_path, wait_for)


def _outrun(hosts: str, name: str, redis_url: str, redis: RealRedis, tmp_path: Path, wait_for: WaitFor) -> None:
    count, most, batch = 30_000, 2_000, 500
    env = {
        "FLOWKIT_KAFKA_HOSTS": hosts,
        "FLOWKIT_REDIS": redis_url,
        "FLOWKIT_MAX_BACKLOG": str(most),
        "FLOWKIT_KAFKA_MAX_POLL_RECORDS": str(batch),
        "FLOWKIT_KAFKA_MAX_POLL_INTERVAL": "6",
        "FLOWKIT_LOG_LEVEL": "debug",
        "PRESSED_IN": name,
        "PRESSED_GATE": str(tmp_path / "gate"),
    }
    app = Flowkit("pressed", kafka={"hosts": hosts}, redis=redis_url)
    app.add_topic(name, print)
    producer = KafkaProducer(bootstrap_servers=hosts, linger_ms=20)
    with contextlib.closing(producer):
        for number in range(count):
            producer.send(name, json.dumps({"n": number, "s": "x" * 200}).encode(), partition=0)
        producer.flush()

    def look() -> int:
        (found,) = backlog(app, redis)
        backlogs.append(found.waiting.messages)
        memory.append(int(redis.info("memory")["used_memory_dataset"]))  # type: ignore[index]
        return int(redis.scard("seen"))  # type: ignore[arg-type]

    backlogs: list[int] = []
    memory = [int(redis.info("memory")["used_memory_dataset"])]  # type: ignore[index]
    with Process("flowkit", "run", "pressed:app", env=env, log=tmp_path / "run") as consumer:
        consumer.wait_for("paused group=")
        wait_for(lambda: look() == 0 and max(backlogs) > most / 2, 20)  # of many jobs it is an estimate
        with Process("flowkit", "worker", "pressed:app", env=env, log=tmp_path / "worker") as worker:
            # first a pause that is longer than max_poll_interval: nothing is worked off
            wait_for(lambda: int(redis.get("held") or 0) > 0, 30, "the worker to hold its first message")
            pause = secrets.token_hex(4)
            redis.set(pause, 1, px=8_000)
            wait_for(lambda: look() is not None and not redis.exists(pause), 20)
            assert "resumed" not in consumer.output
            # Redis holds what it may, and not all that is in Kafka (jobs that are done stay for a minute more, so it is now)
            assert max(memory) - min(memory) < (most + batch) * 1_000 < count * 200
            Path(env["PRESSED_GATE"]).touch()
            wait_for(lambda: look() == count, 280, "every message to be handled")
            assert worker.stop() == 0
        assert consumer.output.count("rebalanced") == 1  # when it joined
        assert "has not polled" not in consumer.output
        assert consumer.output.count("resumed group=") >= 3
        assert consumer.stop() == 0
    # what is seen from outside, while a worker puts back what it has not begun, is an estimate; what the consumer sees is not
    assert max(backlogs) <= (most + batch) * 1.5, "messages that wait in the queue"
    held = [int(text) for text in re.findall(r"paused group=\S+ queue=\S+ messages=(\d+)", consumer.output)]
    assert max(held) <= most + batch
    assert int(redis.get("handled") or 0) == count  # each of them once
