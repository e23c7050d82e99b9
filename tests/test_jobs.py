"""Messages through the queue: into a real Redis by one call, out of it by RQ's own worker."""

from __future__ import annotations

import json
import os
import pickle
import secrets
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from rq import Callback, Queue, SimpleWorker, Webhook
from rq.job import Job
from rq.registry import FailedJobRegistry, ScheduledJobRegistry
from rq.serializers import DefaultSerializer

from flowkit import Flowkit, Message, Retry
from flowkit.alarm import Alarm
from flowkit.clients.memory import Broker
from flowkit.clients.memory import Producer as MemoryProducer
from flowkit.dispatch import Handling
from flowkit.errors import DeliveryError, QueueError, RedisUnavailable, RouteNotFound
from flowkit.interchangers import Base64
from flowkit.jobqueue import JobQueue, MarksMoved, Pack
from flowkit.jobs import SPLIT_AFTER, OwnWorker, perform
from flowkit.marks import Mark
from flowkit.message import Partition, PlainRecord
from flowkit.producer import Producer
from flowkit.progress import Progress
from flowkit.queues import PERFORM, RUNS, Envelope, Writer, connect, known_queues, make_jobs, redis_errors
from flowkit.upkeep import Upkeep
from flowkit.worker import Worker

NEW = {Partition("orders", 0): Mark()}
AT_ONCE = Retry(attempts=3, first=0, jitter=0)
HELD = signal.SIGINT, signal.SIGTERM, signal.SIGALRM


class Shop:
    """An application that jobs find by its name, its queue in the shared Redis, and a Kafka in memory."""

    def __init__(self, redis: Redis, url: str, **settings: Any) -> None:
        self.redis = redis
        self.url = url
        self.broker = Broker()
        self.app = Flowkit("shop", kafka={"hosts": "127.0.0.1:1"}, redis=url, **settings)
        self.module = types.ModuleType(f"shop_{secrets.token_hex(4)}")
        self.module.app = self.app  # type: ignore[attr-defined]
        self.app.reference = f"{self.module.__name__}:app"
        self.app._producer = Producer(lambda: self.app.settings, self.broker.producer)

    @property
    def queue(self) -> JobQueue:
        return JobQueue(self.url, "shop", self.app.reference)

    def enqueue(self, topic: str, *values: bytes | None, queue: str = "default", **fields: Any) -> list[Job]:
        """Queues messages from offset 0 on, and gives the jobs as RQ's default serializer reads them."""
        handling = self.app.handling(topic)
        entries = [
            handling.entry(record, 1_700_000_001.5, record.value)
            for record in (
                PlainRecord(topic, 0, offset, 1_700_000_000_000, fields.get("key"), value, fields.get("headers", ()))
                for offset, value in enumerate(values)
            )
        ]
        before = {job.id for job in self.jobs(queue)}
        pack = Pack(handling, queue, entries)
        self.queue.enqueue(handling.group, [pack], {Partition(topic, 0): Mark()}, {Partition(topic, 0): len(values)})
        return [job for job in self.jobs(queue) if job.id not in before]

    def jobs(self, queue: str = "default") -> list[Job]:
        return Queue(queue, connection=self.redis).jobs

    def work(self, queue: str = "default") -> None:
        """RQ's own worker, with nothing of ours set, until the queue is empty."""
        SimpleWorker([queue], connection=self.redis).work(burst=True, logging_level="ERROR")

    def work_by_flowkit(self, queue: str = "default") -> None:
        """The worker of `flowkit worker`, until the queue is empty. See the fixture ``own``."""
        Worker([queue], connection=self.redis, serializer=Envelope).work(burst=True, logging_level="ERROR")

    def work_all(self, queue: str = "default") -> None:
        """The same, and all waits of retries pass at once."""
        self.work(queue)
        while self.bring_due(queue):
            self.work(queue)

    def bring_due(self, queue: str = "default") -> int:
        """Lets the waits of all scheduled jobs of the queue pass."""
        registry = ScheduledJobRegistry(queue, connection=self.redis)
        ids = registry.get_job_ids()
        for id_ in ids:
            self.redis.zadd(registry.key, {id_: 1})
        upkeep = Upkeep(self.url, "shop")
        upkeep.turn()
        upkeep.close()
        return len(ids)

    def scheduled(self, queue: str = "default") -> list[Job]:
        ids = ScheduledJobRegistry(queue, connection=self.redis).get_job_ids()
        return [Job.fetch(id_, connection=self.redis) for id_ in ids]

    def failed(self, queue: str = "default") -> list[Job]:
        ids = FailedJobRegistry(queue, connection=self.redis).get_job_ids()
        return [Job.fetch(id_, connection=self.redis) for id_ in ids]


@pytest.fixture
def shop(redis: Redis, redis_url: str) -> Iterator[Shop]:
    yield from _opened(Shop(redis, redis_url, retry=AT_ONCE))


@pytest.fixture
def own(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """The shop in a process of `flowkit worker`."""
    monkeypatch.setattr(OwnWorker, "application", shop.app)
    monkeypatch.setattr(OwnWorker, "stopping", False)
    monkeypatch.setattr(OwnWorker, "told", None)
    return shop


def _opened(shop: Shop) -> Iterator[Shop]:
    """Makes the module of the shop importable; RQ's worker keeps signal handlers, which are put back."""
    handlers = {number: signal.getsignal(number) for number in HELD}
    sys.modules[shop.module.__name__] = shop.module
    yield shop
    del sys.modules[shop.module.__name__]
    for number, handler in handlers.items():
        signal.signal(number, handler)


def data_of(job: Job) -> dict[str, Any]:
    app, topic, attempt, messages = job.args
    return {"app": app, "topic": topic, "attempt": attempt, "messages": messages}


def offsets_of(jobs: Sequence[Job]) -> list[int]:
    return [entry[2] for job in jobs for entry in data_of(job)["messages"]]


def log_runs(shop: Shop, fails: Callable[[Any, Message], object] = lambda payload, message: None) -> list[Any]:
    """A handler of ``orders`` that writes down (payload, attempt), and then does what ``fails`` does."""
    runs: list[Any] = []

    def handler(payload: Any, message: Message) -> None:
        runs.append((payload, message.attempt))
        fails(payload, message)

    shop.app.add_topic("orders", handler)
    return runs


# Into the queue.


def test_a_job_is_what_rq_itself_would_have_written(shop: Shop) -> None:
    log_runs(shop)
    (job,) = shop.enqueue("orders", b'{"id": 7}', key=b"ann")

    fetched = Job.fetch(job.id, connection=shop.redis)
    assert fetched.func_name == PERFORM
    assert fetched.origin == "default"
    assert fetched.description == "orders[0]@0"
    assert fetched.get_status() == "queued"
    assert fetched.timeout == 180
    assert fetched.result_ttl == 60
    assert fetched.retries_left == RUNS.max
    assert fetched.retry_intervals == RUNS.intervals
    assert fetched.enqueued_at is not None
    assert fetched.created_at is not None
    assert fetched.meta == {"topic": "orders", "offsets": {0: (0, 0)}}
    assert data_of(fetched) == {
        "app": shop.app.reference,
        "topic": "orders",
        "attempt": 1,
        "messages": [("orders", 0, 0, 1_700_000_000_000, b"ann", b'{"id": 7}', (), 1_700_000_001.5)],
    }


def test_a_job_has_the_fields_of_rqs_own_enqueue(shop: Shop) -> None:
    log_runs(shop)
    (ours,) = shop.enqueue("orders", b"1")
    theirs = Queue("default", connection=shop.redis).enqueue(
        PERFORM,
        "shop:app",
        "orders",
        1,
        [],
        description="x",
        result_ttl=60,
        retry=RUNS,
        job_timeout=180,
        meta={"topic": "orders"},
    )
    assert set(shop.redis.hkeys(ours.key)) == set(shop.redis.hkeys(theirs.key))
    assert shop.redis.smembers(Queue.redis_queues_keys) == {b"rq:queue:default"}


def test_the_queues_of_an_application_are_known(shop: Shop, redis: Redis) -> None:
    log_runs(shop)
    shop.enqueue("orders", b"1")
    shop.redis.delete("flowkit:marks:shop_orders")
    shop.enqueue("orders", b"1", queue="express")
    assert known_queues(redis, "shop") == {"default", "express"}
    assert known_queues(redis, "another") == set()


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"job_size": 3}, [3, 3, 1]),
        ({"job_size": 100}, [7]),
        ({"job_size": 1}, [1] * 7),
        ({"job_size": 3, "retry": 1}, [1] * 7),  # what fails has no second attempt that could be a job of its own
    ],
)
def test_messages_are_packed_into_jobs_of_job_size_in_order(
    shop: Shop, options: dict[str, Any], sizes: list[int]
) -> None:
    shop.app.add_topic("orders", lambda payload: None, **options)
    jobs = shop.enqueue("orders", *(str(number).encode() for number in range(7)))
    assert [len(data_of(job)["messages"]) for job in jobs] == sizes
    assert offsets_of(jobs) == list(range(7))
    assert [job.timeout for job in jobs] == [
        180 if size == 1 else 181 for size in sizes
    ]  # and a second for the others


def test_a_queue_is_busy_while_a_job_would_have_to_wait(shop: Shop, redis: Redis) -> None:
    shop.app.add_topic("orders", lambda payload: None)
    queue = shop.queue
    assert not queue.is_busy("default")
    (job,) = shop.enqueue("orders", b"1")
    assert queue.is_busy("default")
    taken = Queue.dequeue_any([Queue("default", connection=redis)], timeout=None, connection=redis)
    assert taken is not None
    assert not queue.is_busy("default")  # nobody is known to work, and nothing waits
    first, second = (Worker(["default"], connection=redis, serializer=Envelope, name=name) for name in "ab")
    first.register_birth()
    assert queue.is_busy("default")  # on its way
    first.prepare_execution(job)
    assert queue.is_busy("default")  # in hand
    second.register_birth()
    assert not queue.is_busy("default")
    second.register_death()
    redis.zadd("rq:wip:default", dict.fromkeys(redis.zrange("rq:wip:default", 0, -1), time.time() - 1))
    assert not queue.is_busy("default")  # its worker died, and RQ has not cleaned up


def test_a_queue_is_not_busy_while_a_process_waits_for_another_job(shop: Shop, redis: Redis) -> None:
    shop.app.add_topic("orders", lambda payload: None)
    (job,) = shop.enqueue("orders", b"1", b"2")
    Queue.dequeue_any([Queue("default", connection=redis)], timeout=None, connection=redis)
    worker = Worker(["default"], connection=redis, serializer=Envelope, name="a")
    worker.register_birth()
    worker.prepare_execution(job)
    assert shop.queue.is_busy("default")
    progress = Progress(Writer(redis, "shop"), job, "orders")
    assert progress.look("default", 60_000) is None
    assert not shop.queue.is_busy("default")
    redis.delete("flowkit:marks:shop_orders")
    (following,) = shop.enqueue("orders", b"1", b"2", b"3")
    assert shop.queue.is_busy("default")
    progress.begin()
    found = progress.look("default", 1)
    assert found is not None
    assert progress.take("default", found)
    assert not Job.exists(following.id, connection=redis)
    time.sleep(0.005)
    assert shop.queue.is_busy("default")  # it has that one in hand now


def test_the_description_of_a_pack_names_its_ends(shop: Shop) -> None:
    shop.app.add_topic("orders", lambda payload: None)
    (job,) = shop.enqueue("orders", b"1", b"2", b"3")
    assert job.description == "orders[0]@0 to [0]@2, 3 messages"
    assert job.id.startswith("orders-0-0-3-")


def test_the_meta_of_a_pack_names_the_offsets_of_each_partition(shop: Shop) -> None:
    shop.app.add_topic("orders", lambda payload: None)
    places = [(2, 5), (2, 7), (2, 9), (0, 1), (1, 4), (1, 5)]
    entries = [("orders", partition, offset, 0, None, b"1", (), 0.0) for partition, offset in places]
    (made,) = make_jobs("shop:app", shop.app.handling("orders"), "default", entries, size=10)
    assert made.meta == {"topic": "orders", "offsets": {2: (5, 9), 0: (1, 1), 1: (4, 5)}}


def test_topics_that_differ_only_in_dots_underscores_and_dashes_do_not_share_ids(shop: Shop) -> None:
    topics = ["a.b", "a_b", "a-b", "a_db", "a__b", "a..b", "a_.b", "a._b"]
    for topic in topics:
        shop.app.add_topic(topic, lambda payload: None)
    ids = [job.id for topic in topics for job in shop.enqueue(topic, b"1")]
    assert len({id_.rpartition("-")[0] for id_ in ids}) == len(topics)  # without the random part
    assert all(Job.exists(id_, connection=shop.redis) for id_ in ids)


def test_jobs_and_marks_move_together(shop: Shop) -> None:
    shop.app.add_topic("orders", lambda payload: None)
    partition = Partition("orders", 0)
    assert shop.queue.marks.read("shop_orders", [partition]) == {partition: Mark(None, None)}
    shop.enqueue("orders", b"1", b"2")
    assert shop.queue.marks.read("shop_orders", [partition]) == {partition: Mark(2, None)}


def test_several_partitions_and_queues_go_in_one_call(shop: Shop) -> None:
    shop.app.add_topic("orders", lambda payload: None)
    handling = shop.app.handling("orders")
    entries = [handling.entry(PlainRecord("orders", n, 5, 0, None, b"1"), 0.0, b"1") for n in range(3)]
    packs = [Pack(handling, "default", entries[:2]), Pack(handling, "express", entries[2:])]
    marks = {Partition("orders", number): 6 for number in range(3)}
    queued = shop.queue.enqueue("shop_orders", packs, dict.fromkeys(marks, Mark()), marks)
    assert queued == ([1, 1], {"default": 2, "express": 1})
    assert shop.queue.marks.read("shop_orders", list(marks)) == {p: Mark(6, None) for p in marks}
    assert (len(shop.jobs()), len(shop.jobs("express"))) == (1, 1)


@pytest.mark.parametrize("expected", [None, 1, 3])
def test_if_a_mark_is_not_the_expected_one_nothing_is_written(shop: Shop, expected: int | None) -> None:
    shop.app.add_topic("orders", lambda payload: None)
    handling = shop.app.handling("orders")
    shop.enqueue("orders", b"1", b"2")
    keys = set(shop.redis.keys())
    entry = handling.entry(PlainRecord("orders", 0, 2, 0, None, b"3"), 0.0, b"3")
    other, partition = Partition("orders", 1), Partition("orders", 0)
    with pytest.raises(MarksMoved):
        shop.queue.enqueue(
            "shop_orders",
            [Pack(handling, "default", [entry])],
            {other: Mark(), partition: Mark(expected)},
            {other: 1, partition: 3},  # the first would be fine alone
        )
    assert set(shop.redis.keys()) == keys
    assert len(shop.jobs()) == 1
    assert shop.queue.marks.read("shop_orders", [partition, other]) == {
        partition: Mark(2, None),
        other: Mark(None, None),
    }


def test_a_call_whose_reply_got_lost_can_be_repeated(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis did it, but the reply never came: the second call says so, and queues nothing."""
    shop.app.add_topic("orders", lambda payload: None)
    handling = shop.app.handling("orders")
    entry = handling.entry(PlainRecord("orders", 0, 0, 0, None, b"1"), 0.0, b"1")
    queue, partition = shop.queue, Partition("orders", 0)
    script = queue._script

    def and_then_silence(**arguments: Any) -> Any:
        script(**arguments)
        raise RedisTimeoutError("Timeout reading from socket")

    monkeypatch.setattr(queue, "_script", and_then_silence)
    before = {partition: Mark()}
    call = ("shop_orders", [Pack(handling, "default", [entry])], before, {partition: 1})
    with pytest.raises(RedisUnavailable):
        queue.enqueue(*call)
    monkeypatch.setattr(queue, "_script", script)
    with pytest.raises(MarksMoved):
        queue.enqueue(*call)
    assert queue.marks.read("shop_orders", [partition])[partition].queued == 1
    assert len(shop.jobs()) == 1


@pytest.mark.parametrize("garbage", [b"many", b"\xff", b"1.5"])
def test_marks_that_flowkit_did_not_write_are_named_and_nothing_is_guessed(shop: Shop, garbage: bytes) -> None:
    partition = Partition("orders", 0)
    shop.redis.hset("flowkit:marks:g", "queued:orders:0", garbage)
    with pytest.raises(
        RedisUnavailable, match=r"HDEL flowkit:marks:g queued:orders:0 committed:orders:0 era:orders:0"
    ):
        shop.queue.marks.read("g", [partition])
    assert shop.queue.marks.read("g", [Partition("orders", 1)]) == {Partition("orders", 1): Mark()}


def test_marks_are_changed_only_by_who_knows_them(shop: Shop) -> None:
    marks, a, b = shop.queue.marks, Partition("orders", 0), Partition("orders", 1)
    assert marks.read("g", [a, b]) == {a: Mark(), b: Mark()}
    assert marks.change("g", a, Mark(), Mark(5, 3, "x/1"))
    assert not marks.change("g", a, Mark(), Mark(7, 7, "x/2"))
    assert not marks.change("g", a, Mark(5, 3, "x/0"), Mark(7, 7, "x/2"))
    assert marks.read("g", [a, b]) == {a: Mark(5, 3, "x/1"), b: Mark()}
    assert not marks.change("g", a, Mark(4, 3, "x/1"), Mark(7, 7, "x/2"))
    assert marks.change("g", a, Mark(5, 4, "x/1"), Mark(None, None, "y/2"))
    assert marks.read("g", [a]) == {a: Mark(None, None, "y/2")}
    assert marks.read("another", [a]) == {a: Mark()}
    assert marks.read("g", []) == {}


def test_a_note_never_goes_back_and_counts_in_its_era_only(shop: Shop) -> None:
    marks, a = shop.queue.marks, Partition("orders", 0)
    marks.change("g", a, Mark(), Mark(9, None, "x/1"))
    for offset, era, noted in ((7, "x/1", 7), (3, "x/1", 7), (9, "x/0", 7), (8, "x/1", 8)):
        marks.note("g", {a: (offset, era)})
        assert marks.read("g", [a]) == {a: Mark(9, noted, "x/1")}


def test_jobs_of_another_era_are_not_queued(shop: Shop) -> None:
    log_runs(shop)
    handling, a = shop.app.handling("orders"), Partition("orders", 0)
    shop.queue.marks.change("g", a, Mark(), Mark(5, 5, "x/1"))
    pack = Pack(handling, "default", [handling.entry(PlainRecord("orders", 0, 5, 0, None, b"1"), 0.0, b"1")])
    for mark in (Mark(5, 5, "x/2"), Mark(4, 5, "x/1")):
        with pytest.raises(MarksMoved):
            shop.queue.enqueue("g", [pack], {a: mark}, {a: 6})
    assert shop.jobs() == []
    shop.queue.enqueue("g", [pack], {a: Mark(5, None, "x/1")}, {a: 6})
    assert len(shop.jobs()) == 1


def test_a_queue_whose_key_is_something_else_is_refused_before_anything_is_written(shop: Shop) -> None:
    log_runs(shop)
    handling, a = shop.app.handling("orders"), Partition("orders", 0)
    shop.redis.set("rq:queue:taken", "a text")
    entry = handling.entry(PlainRecord("orders", 0, 0, 0, None, b"1"), 0.0, b"1")
    packs = [Pack(handling, "default", [entry]), Pack(handling, "taken", [entry])]
    with pytest.raises(RedisUnavailable, match="rq:queue:taken is a string, and no queue"):
        shop.queue.enqueue("g", packs, {a: Mark()}, {a: 1})
    assert shop.jobs() == []
    assert shop.redis.keys("rq:job:*") == []


# A stop.


def test_a_stop_just_before_a_message_that_is_alone_in_its_job_does_not_lose_it(
    own: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = log_runs(own)
    own.enqueue("orders", b"1")
    allow = Alarm.allow

    def stop(self: Alarm, seconds: float) -> None:
        allow(self, seconds)
        OwnWorker.stop()

    monkeypatch.setattr(Alarm, "allow", stop)
    own.work_by_flowkit()
    assert runs == [(1, 1)]


# What a job may hold.


def test_rqs_default_serializer_reads_an_envelope() -> None:
    value: Any = (PERFORM, None, ("shop:app", "orders", 1, [(0, b"1")]), {})
    assert DefaultSerializer.loads(Envelope.dumps(value)) == value
    assert Envelope.loads(DefaultSerializer.dumps(value)) == value


class Evil:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("evil", [Evil(os.system, "false"), Evil(eval, "1"), Evil(getattr, "", "join"), Shop, len])
def test_an_envelope_refuses_everything_but_data(evil: Any) -> None:
    with pytest.raises(QueueError, match="flowkit's jobs hold data only"):
        Envelope.loads(pickle.dumps((PERFORM, None, (evil,), {})))


@pytest.mark.parametrize(
    "call",
    [
        ("os.system", None, ("true",), {}),
        ("os.system", None, ("a:b", "t", 1, []), {}),
        ("flowkit.jobs.connect", None, ("a:b", "t", 1, []), {}),
        (None, None, ("a:b", "t", 1, []), {}),
        ["os.system", None, ["true"], {}],
        [PERFORM, None, ("a:b", "t", 1, []), {}],
        (PERFORM, "an instance", ("a:b", "t", 1, []), {}),
        (PERFORM, None, ["a:b", "t", 1, []], {}),
        (PERFORM, None, (), {}),
        (PERFORM, None, ("true",), {}),
        (PERFORM, None, ("a:b", "t", "1", []), {}),
        (PERFORM, None, ("a:b", "t", 1, ()), {}),
        (PERFORM, None, (b"a:b", "t", 1, []), {}),
        (PERFORM, None, ("a:b", "t", 1, []), {"data": "true"}),
        (PERFORM, None, ("a:b", "t", 1, [])),
        (),
        "text",
    ],
)
def test_an_envelope_refuses_a_job_that_calls_anything_else(call: Any) -> None:
    with pytest.raises(QueueError, match="flowkit's jobs call"):
        Envelope.loads(Envelope.dumps(call))


@pytest.mark.parametrize("value", [None, {}, {"attempt": 3}])
def test_an_envelope_holds_results_and_meta(value: Any) -> None:
    assert Envelope.loads(Envelope.dumps(value)) == value


# What flowkit's own worker refuses.


@pytest.mark.parametrize(
    "data", [["CALL", None, ["x"], {}], {"CALL": 1, "": 2, "x": 3, "y": 4}, ("CALL", None, ("x",), {})]
)
def test_flowkits_worker_runs_nothing_but_flowkits_jobs(own: Shop, data: Any) -> None:
    called = _recorder(own)
    log_runs(own)
    (job,) = own.enqueue("orders", b"1")
    data = pickle.dumps(data, protocol=0).replace(b"CALL", f"{own.module.__name__}.call".encode())
    own.redis.hset(job.key, mapping={"data": data, "retries_left": 0})
    own.work_by_flowkit()
    assert called == []
    assert [failed.id for failed in own.failed()] == [job.id]


def test_flowkits_worker_calls_nobody_back(own: Shop) -> None:
    called = _recorder(own)
    runs = log_runs(own, fail_on(1))
    own.app.routes["orders"].retry = Retry(attempts=1)
    for job in own.enqueue("orders", b"0", b"1"):
        own.redis.hset(job.key, mapping=_callbacks(own))
    own.work_by_flowkit()
    assert runs == [(0, 1), (1, 1)]
    assert len(own.failed()) == 1
    assert called == []


def test_a_job_of_somebody_else_fails_clearly_and_is_unharmed(own: Shop) -> None:
    called = _recorder(own)
    queue = Queue("default", connection=own.redis)
    name = f"{own.module.__name__}.call"
    job = queue.enqueue(name, 1, b=[2], meta={"made": types.SimpleNamespace()}, on_failure=Callback(name))
    before = own.redis.hgetall(job.key)
    own.work_by_flowkit()
    (failed,) = own.failed()
    result = failed.latest_result()
    assert result is not None
    assert f"a job asks for {name}; flowkit's jobs call {PERFORM}" in (result.exc_string or "")
    assert called == []
    after = own.redis.hgetall(job.key)
    assert {field for field in before if before[field] != after.get(field)} <= {
        b"status",
        b"started_at",
        b"ended_at",
        b"last_heartbeat",
        b"worker_name",
    }
    failed.requeue()
    own.work()
    assert called == [((1,), {"b": [2]})]
    assert own.failed() == []


def test_flowkits_worker_sends_no_webhooks(own: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(Webhook, "send", lambda *arguments, **options: sent.append(arguments))
    log_runs(own)
    for job in own.enqueue("orders", b"0"):
        hook = Webhook("http://127.0.0.1:1/", "finished")
        own.redis.hset(job.key, "webhooks", json.dumps([hook.to_dict()]))
    own.work_by_flowkit()
    assert sent == []


def _recorder(shop: Shop) -> list[Any]:
    """What the function ``call`` in the module of the shop is called with, if it is."""
    called: list[Any] = []
    shop.module.call = lambda *args, **options: called.append((args, options))  # type: ignore[attr-defined]
    return called


def _callbacks(shop: Shop) -> dict[str, str]:
    """Fields of a job that would have RQ call it."""
    return {f"{kind}_callback_name": f"{shop.module.__name__}.call" for kind in ("success", "failure", "stopped")}


def test_flowkits_worker_imports_no_other_application(
    own: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"other_{secrets.token_hex(4)}"
    tmp_path.joinpath(f"{name}.py").write_text("raise ValueError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    runs = log_runs(own)
    own.app.reference = f"{name}:app"
    (job,) = own.enqueue("orders", b"1")
    own.app.reference = f"{own.module.__name__}:app"
    own.redis.hset(job.key, "retries_left", 0)
    own.work_by_flowkit()
    (failed,) = own.failed()
    result = failed.latest_result()
    assert result is not None
    assert f"QueueError: this job belongs to the application '{name}:app'" in (result.exc_string or "")
    assert runs == []
    monkeypatch.setattr(OwnWorker, "application", None)  # a plain worker imports what jobs name
    failed.requeue()
    own.work()
    result = failed.latest_result()
    assert result is not None
    assert (result.exc_string or "").splitlines()[-1] == "ValueError: imported"


def test_every_byte_survives_the_queue(shop: Shop) -> None:
    got: list[Any] = []

    def handler(message: Message) -> None:
        got.append((message.value, message.key, message.headers.pairs, message.timestamp.timestamp()))

    values = [
        bytes(range(256)),
        b"\x00" * 5,
        b"",
        b"\xff\xfe",
        "é€😀\u2028".encode(),
        os.urandom(900_000),
        b"x" * 900_000,
    ]
    headers = (("trace", b"\xff\x00"), ("trace", b"again"), ("none", None))
    shop.app.add_topic("orders", handler)
    shop.app.add_topic("base", handler, interchanger=Base64)
    for topic in ("orders", "base"):
        shop.enqueue(topic, *values, key=b"\x00key\xff", headers=headers)
    shop.work()
    assert got == [(value, b"\x00key\xff", headers, 1_700_000_000.0) for value in values * 2]


def test_an_interchanger_may_give_bytes_or_anything_json_can_hold(shop: Shop) -> None:
    class Backwards:
        def load(self, value: bytes) -> bytes:
            return value[::-1]

        def parse(self, data: Any) -> bytes:
            assert isinstance(data, bytes)
            return data[::-1]

    class Numbers:
        def load(self, value: bytes) -> list[int]:
            return list(value)

        def parse(self, data: Any) -> bytes:
            return bytes(data)

    got: list[bytes | None] = []

    def handler(message: Message) -> None:
        got.append(message.value)

    shop.app.add_topic("a", handler, interchanger=Backwards())
    shop.app.add_topic("b", handler, interchanger=Numbers())
    value = bytes(range(256))
    for topic in ("a", "b"):
        shop.enqueue(topic, value, b"text")
    shop.work()
    assert shop.failed() == []
    assert got == [value, b"text"] * 2


def test_a_tombstone_is_still_one_in_the_worker(shop: Shop) -> None:
    runs = log_runs(shop)
    shop.enqueue("orders", None, b"null", b"")
    shop.work()
    assert runs == [(None, 1), (None, 1), ({"message": b""}, 1)]


def test_what_a_hook_made_of_the_payload_reaches_the_worker(shop: Shop) -> None:
    runs = log_runs(shop)

    @shop.app.before_enqueue("orders")
    def enrich(order: dict[str, Any], message: Message) -> None:
        order["seen"] = True  # in place

    record = PlainRecord("orders", 0, 0, 0, None, b'{"id": 1}')
    handling = shop.app.handling("orders")
    ticket = handling.admit(record, 1, 0.0)
    assert ticket is not None
    message, entry = ticket
    shop.queue.enqueue("g", [Pack(handling, message.queue or "", [entry])], NEW, {Partition("orders", 0): 1})
    shop.work()
    assert runs == [({"id": 1, "seen": True}, 1)]  # and the hook did not run again


def test_a_message_in_the_worker_knows_where_it_comes_from(shop: Shop) -> None:
    seen: list[Any] = []

    @shop.app.topic("orders", group="billing", queue="express")
    def handler(message: Message) -> None:
        seen.append((message.topic, message.partition, message.offset, message.group, message.queue))
        seen.append(message.received_at.timestamp())

    shop.enqueue("orders", b"1", queue="express")
    shop.work("express")
    assert seen == [("orders", 0, 0, "billing", "express"), 1_700_000_001.5]


# Out of the queue.


def test_a_stock_rq_worker_runs_a_pack_in_order_and_sends_its_responses(shop: Shop) -> None:
    @shop.app.topic("orders")
    @shop.app.responds_to("invoices")
    def bill(order: Any) -> None:
        shop.app.respond_to("invoices", {"order": order}, key=f"k{order}")

    shop.enqueue("orders", *(str(number).encode() for number in range(250)))
    assert len(shop.jobs()) == 5  # of 50: it is not known yet what the handler takes
    shop.work()
    invoices = shop.broker.records("invoices")
    assert [json.loads(record.value or b"") for record in invoices] == [{"order": number} for number in range(250)]
    assert invoices[7].key == b"k7"
    assert shop.failed() == []


ENTRY = ("t", 0, 0, 0, None, b"1", (), 0.0)


@pytest.mark.parametrize("by_flowkit", [False, True])
def test_a_finished_job_holds_no_messages_any_more(
    own: Shop, by_flowkit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ keeps it for a minute, which are many messages."""
    runs = log_runs(own)
    jobs = own.enqueue("orders", *(b"1" for _ in range(51)))
    assert [len(job.args[3]) for job in jobs] == [50, 1]
    if by_flowkit:
        own.work_by_flowkit()
    else:
        monkeypatch.setattr(OwnWorker, "application", None)
        own.work()
    assert len(runs) == 51
    for job in jobs:
        finished = Job.fetch(job.id, connection=own.redis)
        assert finished.get_status() == "finished"
        assert list(finished.args) == ["", "orders", 1, []]
        assert finished.description == job.description
        assert finished.meta == job.meta
        perform(*finished.args)  # RQ failed behind it and runs it once more: there is nothing to do
    assert len(runs) == 51


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("text",),
        ("a:b", "t", 1),
        ("a:b", "t", 1, [ENTRY], 5),
        (7, "t", 1, [ENTRY]),
        ("a:b", "t", "1", [ENTRY]),
        ("a:b", "t", 1, "text"),
        ("a:b", "t", 1, [()]),
        ("a:b", "t", 1, [7]),
        ("a:b", "t", 1, [ENTRY, ENTRY[:7]]),
        ("a:b", "t", 1, [("other", *ENTRY[1:])]),
        ("a:b", "t", 1, [("t", "0", *ENTRY[2:])]),
        ("a:b", "t", 1, [("t", 0, None, *ENTRY[3:])]),
    ],
    ids=repr,
)
def test_a_job_that_is_not_ours_is_refused(args: Any) -> None:
    with pytest.raises(QueueError, match="not one of flowkit's"):
        perform(*args)


def test_a_message_that_flowkit_did_not_queue_fails_alone(shop: Shop) -> None:
    runs = log_runs(shop)
    for part in ((5, b"1", ()), (None, "text", ()), (None, b"1", [["a", 7]]), (None, b"1", 7)):
        with pytest.raises(QueueError, match="holds what flowkit did not queue"):
            perform(shop.app.reference, "orders", 1, [("orders", 0, 0, 0, *part, 0.0)])
    assert runs == []


def test_a_job_for_an_unknown_topic_says_which_are_known(shop: Shop) -> None:
    log_runs(shop)
    with pytest.raises(RouteNotFound, match=r"'oders'; known are: orders"):
        perform(shop.app.reference, "oders", 1, [("oders", *ENTRY[1:])])


def test_an_application_that_fails_at_import_shows_its_own_error(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ's own import would say `Invalid attribute name` for it."""
    name = f"broken_{secrets.token_hex(4)}"
    tmp_path.joinpath(f"{name}.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    log_runs(shop)
    (job,) = shop.enqueue("orders", b"1")
    shop.redis.hset(job.key, "data", Envelope.dumps((PERFORM, None, (f"{name}:app", *job.args[1:]), {})))
    shop.redis.hset(job.key, "retries_left", 0)
    shop.work()
    (failed,) = shop.failed()
    result = failed.latest_result()
    assert result is not None
    assert "ModuleNotFoundError: No module named 'a_package_that_is_not_there'" in (result.exc_string or "")


def test_a_job_waits_for_an_application_that_cannot_be_imported_now(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken deployment is no failed attempt of the message."""
    runs = log_runs(shop)
    shop.enqueue("orders", b"1")
    del sys.modules[shop.module.__name__]
    for _ in range(AT_ONCE.attempts + 1):
        shop.work()
        shop.bring_due()
    sys.modules[shop.module.__name__] = shop.module
    shop.work_all()
    assert runs == [(1, 1)]
    assert shop.failed() == []


# Failure.


def fail_on(*payloads: Any, times: int = 99) -> Callable[[Any, Message], None]:
    def fail(payload: Any, message: Message) -> None:
        if payload in payloads and message.attempt <= times:
            raise ValueError(f"no {payload}")

    return fail


def test_a_message_that_fails_in_a_pack_gets_a_job_of_its_own_and_the_others_are_done(shop: Shop) -> None:
    runs = log_runs(shop, fail_on(1, 3, times=2))
    shop.enqueue("orders", b"0", b"1", b"2", b"3")
    shop.work()
    assert runs == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert offsets_of(sorted(shop.scheduled(), key=lambda job: offsets_of([job]))) == [1, 3]
    assert all(job.timeout == 180 for job in shop.scheduled())

    shop.work_all()
    assert sorted(runs[4:]) == [(1, 2), (1, 3), (3, 2), (3, 3)]
    assert shop.failed() == []
    assert shop.jobs() == []


@pytest.mark.parametrize("values", [[b"1"], [b"0", b"1"]], ids=["alone", "in a pack"])
def test_attempts_are_counted_told_to_the_hook_and_then_the_job_is_in_rqs_failed_registry(
    shop: Shop, values: list[bytes]
) -> None:
    runs = log_runs(shop, fail_on(1))
    told: list[Any] = []
    shop.app.after_failure("orders")(lambda error: told.append(str(error)))

    @shop.app.after_failure("orders")
    def report(error: Exception, message: Message) -> None:
        told.append((message.offset, message.attempt))

    shop.enqueue("orders", *values)
    shop.work_all()
    offset = len(values) - 1
    assert [run for run in runs if run[0] == 1] == [(1, 1), (1, 2), (1, 3)]
    assert told == ["no 1", (offset, 1), "no 1", (offset, 2), "no 1", (offset, 3)]
    (failed,) = shop.failed()
    result = failed.latest_result()
    assert result is not None
    assert "ValueError: no 1" in (result.exc_string or "")
    assert offsets_of([failed]) == [offset]


def test_waits_are_those_of_the_route(shop: Shop, redis: Redis) -> None:
    shop.app.add_topic("orders", _always_fails, retry=Retry(attempts=4, first=100, factor=3, cap=500, jitter=0))
    shop.enqueue("orders", b"0", b"1")
    registry = ScheduledJobRegistry("default", connection=redis)
    for wait in (100, 300, 500):
        shop.work()
        assert len(registry) == 2
        for id_ in registry.get_job_ids():
            seconds = registry.get_scheduled_time(id_).timestamp() - redis.time()[0]
            assert wait - 3 <= seconds <= wait + 1
        shop.bring_due()
    shop.work()
    assert len(shop.failed()) == 2


def _always_fails(payload: Any) -> None:
    raise ValueError("no")


def test_the_dead_letter_follows_the_last_attempt(shop: Shop) -> None:
    shop.app.add_topic("orders", _always_fails, dead_letter="orders.dead")
    shop.enqueue("orders", b"\xff", b"1", key=b"ann", headers=(("trace", b"t"),))
    shop.work_all()
    dead = shop.broker.records("orders.dead")
    assert sorted(record.value or b"" for record in dead) == [b"1", b"\xff"]
    for record in dead:
        headers = dict(record.headers)
        assert record.key == b"ann"
        assert headers["trace"] == b"t"
        assert headers["kafka_dlt-original-topic"] == b"orders"
        assert headers["flowkit-attempts"] == b"3"
    assert shop.failed() == []
    assert shop.scheduled() == []


def test_what_is_never_tried_again_ends_with_its_first_failure(shop: Shop) -> None:
    shop.app.add_topic("orders", _always_fails, retry=Retry(attempts=3, first=0, never=ValueError))
    shop.enqueue("orders", b"0", b"1", b"2")
    shop.work()
    assert shop.scheduled() == []
    assert sorted(offsets_of(shop.failed())) == [0, 1, 2]
    # requeued by hand they fail again, and are there again
    for job in shop.failed():
        FailedJobRegistry("default", connection=shop.redis).requeue(job)
    shop.work()
    assert sorted(offsets_of(shop.failed())) == [0, 1, 2]


def test_skipped_messages_leave_no_job_behind_and_their_neighbours_alone(shop: Shop) -> None:
    runs = log_runs(shop, fail_on(1))
    shop.app.routes["orders"].on_poison = "skip"
    shop.enqueue("orders", b"0", b"1", b"2")
    shop.work_all()
    assert runs == [(0, 1), (1, 1), (2, 1), (1, 2), (1, 3)]
    assert (shop.failed(), shop.scheduled(), shop.jobs()) == ([], [], [])


def test_a_message_that_always_kills_its_worker_is_skipped_too(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    runs = log_runs(shop, fail_on())
    shop.app.routes["orders"].on_poison = "skip"
    (job,) = shop.enqueue("orders", b"0")
    job.retries_left = 0  # as after so many runs that had no end
    job.save()
    shop.work()
    assert (runs, shop.failed()) == ([], [])
    assert "is skipped (on_poison='skip')" in caplog.text


def test_a_plain_worker_counts_dead_letters_within_a_job_and_goes_on(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    shop.app.add_topic("orders", _always_fails, retry=1, dead_letter="{topic}.dead", dead_letter_limit=2)
    shop.enqueue("orders", b"0", b"1", b"2")
    shop.work_all()
    assert len(shop.broker.records("orders.dead")) == 3
    assert "2 messages one after the other" in caplog.text
    assert "This worker goes on: it has a new process for each job." in caplog.text


def test_a_dead_letter_that_kafka_refuses_is_sent_later(shop: Shop) -> None:
    runs = log_runs(shop, fail_on(0))
    shop.app.routes["orders"].dead_letter = "orders.dead"
    shop.app.routes["orders"].retry = Retry(attempts=1)
    shop.broker.refuse = DeliveryError("no leader", passing=True)
    shop.enqueue("orders", b"0")
    for _ in range(RUNS.max + 2):  # longer than RQ alone would try
        shop.work()
        assert shop.failed() == []
        assert shop.bring_due() == 1
    shop.broker.refuse = None
    shop.work_all()
    assert len(shop.broker.records("orders.dead")) == 1
    assert runs == [(0, 1)] * (RUNS.max + 3)
    assert shop.failed() == []


def test_a_message_whose_dead_letter_can_never_be_sent_fails_for_its_own_reason(shop: Shop) -> None:
    log_runs(shop, fail_on(0))
    shop.app.routes["orders"].dead_letter = "orders.dead"
    shop.app.routes["orders"].retry = Retry(attempts=1)
    shop.broker.refuse = RuntimeError("too large")
    shop.enqueue("orders", b"0")
    shop.work_all()
    (failed,) = shop.failed()
    result = failed.latest_result()
    assert result is not None
    assert (result.exc_string or "").splitlines()[-1] == "ValueError: no 0"


def test_a_route_with_one_attempt_fails_once(shop: Shop) -> None:
    runs = log_runs(shop, fail_on(1))
    shop.app.routes["orders"].retry = Retry(attempts=1)
    shop.enqueue("orders", b"0", b"1", b"2")
    shop.work_all()
    assert runs == [(0, 1), (1, 1), (2, 1)]
    assert offsets_of(shop.failed()) == [1]


def test_a_failed_job_can_be_requeued_by_hand(shop: Shop) -> None:
    runs = log_runs(shop, fail_on(1, times=3))
    shop.enqueue("orders", b"1")
    shop.work_all()
    (failed,) = shop.failed()
    failed.requeue()
    shop.work_all()
    assert len(runs) == 4
    assert [job.id for job in shop.failed()] == [failed.id]
    assert runs[3] == (1, 3)  # again its last attempt


def test_a_response_that_kafka_refuses_fails_only_its_message(shop: Shop) -> None:
    attempts: list[Any] = []

    @shop.app.topic("orders")
    @shop.app.responds_to("invoices")
    def bill(order: int, message: Message) -> int:
        attempts.append((order, message.attempt))
        shop.broker.refuse = RuntimeError("too large") if (order, message.attempt) == (1, 1) else None
        return order

    shop.enqueue("orders", b"0", b"1", b"2")
    shop.work_all()
    assert attempts == [(0, 1), (1, 1), (2, 1), (1, 2)]
    assert [record.value for record in shop.broker.records("invoices")] == [b"0", b"2", b"1"]


def test_of_several_responses_the_one_that_is_itself_refused_decides_whether_it_was_an_attempt(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[int] = []

    @shop.app.topic("orders")
    @shop.app.responds_to("invoices")
    @shop.app.responds_to("receipts")
    def bill(order: int, message: Message) -> None:
        attempts.append(message.attempt)
        shop.app.respond_to("invoices", order)
        shop.app.respond_to("receipts", order)

    refusals = {
        "invoices": DeliveryError("ended with another", with_another=True),
        "receipts": DeliveryError("too large"),
    }
    send = MemoryProducer.send
    monkeypatch.setattr(
        MemoryProducer,
        "send",
        lambda self, topic, *rest: refusals.pop(topic, None) or send(self, topic, *rest),
    )
    shop.enqueue("orders", b"1")
    shop.work_all()
    assert attempts == [1, 2]
    assert [record.value for topic in ("invoices", "receipts") for record in shop.broker.records(topic)] == [
        b"1",
        b"1",
    ]


def test_kafkas_absence_is_no_attempt_of_a_message_in_a_pack(shop: Shop) -> None:
    @shop.app.topic("orders")
    @shop.app.responds_to("invoices")
    def bill(order: int, message: Message) -> list[int]:
        if order == 1:
            raise ValueError("no")
        return [order, message.attempt]

    shop.broker.refuse = DeliveryError("no answer", passing=True)
    shop.enqueue("orders", b"0", b"1")
    shop.work()
    assert {offsets_of([job])[0]: data_of(job)["attempt"] for job in shop.scheduled()} == {0: 1, 1: 2}
    shop.broker.refuse = None
    shop.work_all()
    assert [record.value for record in shop.broker.records("invoices")] == [b"[0,1]"]


def test_after_a_refusal_a_new_producer_is_made(shop: Shop) -> None:
    """A fatal error of an idempotent producer is for ever, and a worker's producer lives as long as the worker."""
    made: list[Any] = []

    def make(settings: Any) -> Any:
        made.append(shop.broker.producer(settings))
        return made[-1]

    shop.app._producer = Producer(lambda: shop.app.settings, make)
    shop.app.add_topic("orders", lambda order: order)
    shop.app.add_response(shop.app.routes["orders"].handler, "invoices")
    shop.enqueue("orders", b"0")
    shop.broker.refuse = RuntimeError("out of sequence")
    shop.work()
    assert len(made) == 1
    shop.broker.refuse = None
    shop.work_all()
    assert len(made) == 2
    assert [record.value for record in shop.broker.records("invoices")] == [b"0"]


def test_a_failed_check_sends_nothing(shop: Shop) -> None:
    @shop.app.topic("orders")
    @shop.app.responds_to("invoices")
    @shop.app.responds_to("alerts")
    def bill(order: int) -> None:
        shop.app.respond_to("invoices", order)

    shop.enqueue("orders", b"0")
    shop.work_all()
    assert shop.broker.records("invoices") == []
    assert len(shop.failed()) == 1


def test_an_abort_in_the_worker_is_done(shop: Shop) -> None:
    runs = log_runs(shop, lambda payload, message: shop.app.abort() if payload == 1 else None)
    shop.enqueue("orders", b"0", b"1", b"2")
    shop.work_all()
    assert runs == [(0, 1), (1, 1), (2, 1)]
    assert shop.failed() == []


def test_a_time_out_hits_only_the_message_at_hand(shop: Shop) -> None:
    """A job of three messages may take three times as long as one, but no message may take the time of the others."""
    told: list[str] = []

    def hang(payload: Any, message: Message) -> None:
        if payload == 1 and message.attempt == 1:
            threading.Event().wait(30)

    runs = log_runs(shop, hang)
    shop.app.routes["orders"].job_timeout = 0.3
    shop.app.after_failure("orders")(lambda error: told.append(type(error).__name__))
    shop.enqueue("orders", b"0", b"1", b"2")
    shop.work_all()
    assert runs == [(0, 1), (1, 1), (2, 1), (1, 2)]
    assert told == ["JobTimeoutException"]
    assert shop.failed() == []


def test_a_failure_hook_is_timed_too(shop: Shop) -> None:
    """The alarm rings once; without a new one, a hook that hangs would keep the worker for ever."""
    ended: list[str] = []
    runs = log_runs(shop, lambda payload, message: threading.Event().wait(30) if message.attempt == 1 else None)
    shop.app.routes["orders"].job_timeout = 0.3

    @shop.app.after_failure("orders")
    def hang(error: Exception) -> None:
        try:
            threading.Event().wait(30)
        finally:
            ended.append(repr(sys.exception()))

    shop.enqueue("orders", b"0")
    shop.work_all()
    assert [error.partition("(")[0] for error in ended] == ["JobTimeoutException"]
    assert runs == [(0, 1), (0, 2)]


def test_a_flush_may_take_longer_than_a_message(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken off, it would have the whole job done again, with all that is sent already."""
    flush = Producer.flush

    def slowly(producer: Producer) -> None:
        threading.Event().wait(0.6)
        flush(producer)

    monkeypatch.setattr(Producer, "flush", slowly)
    runs: list[Any] = []

    @shop.app.topic("orders", job_timeout=0.2, dead_letter="orders.dead")
    @shop.app.responds_to("invoices")
    def bill(order: int, message: Message) -> int:
        runs.append((order, message.attempt))
        if order == 2:
            raise ValueError("no")
        return order

    shop.enqueue("orders", b"0", b"1", b"2")
    shop.work_all()
    assert runs == [(0, 1), (1, 1), (2, 1), (2, 2), (2, 3)]
    assert [record.value for record in shop.broker.records("invoices")] == [b"0", b"1"]
    assert len(shop.broker.records("orders.dead")) == 1
    assert shop.failed() == []


# Workers that are to stop.


def test_a_stop_puts_back_what_was_not_begun(own: Shop) -> None:
    def stop_at_1(payload: Any, message: Message) -> None:
        if payload == 1 and message.attempt == 1:
            OwnWorker.stop()
            raise ValueError("no")

    runs = log_runs(own, stop_at_1)
    own.app.routes["orders"].job_size = 4
    own.enqueue("orders", *(str(number).encode() for number in range(6)))
    first, second = own.jobs()
    SimpleWorker(["default"], connection=own.redis).work(burst=True, max_jobs=1, logging_level="ERROR")
    assert first.get_status() == "finished"
    assert runs == [(0, 1), (1, 1)]
    rest, last = own.jobs()
    assert (offsets_of([rest]), data_of(rest)["attempt"]) == ([2, 3], 1)
    assert last.id == second.id
    OwnWorker.stopping = False
    own.work_all()
    assert runs[2:] == [(2, 1), (3, 1), (4, 1), (5, 1), (1, 2)]


def test_a_worker_gives_its_sign_of_life_though_redis_is_away(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is not stuck, and a new one would fare no better."""
    worker = Worker(["default"], connection=shop.redis, serializer=Envelope)
    signs: list[int] = []
    monkeypatch.setattr(worker, "beat", lambda: signs.append(1))
    monkeypatch.setattr(worker, "connection", Redis(port=1))
    with pytest.raises(RedisConnectionError):
        worker.heartbeat()
    assert signs == [1]


# Workers that are killed. RQ retries their jobs; here it is told so by hand.


def kill_worker_of(shop: Shop, job: Job) -> None:
    """Leaves the job as a worker leaves it that was killed in the middle of it, and has RQ find it."""
    registry = Queue("default", connection=shop.redis).started_job_registry
    shop.redis.lrem("rq:queue:default", 1, job.id)
    shop.redis.hset(job.key, "status", "started")
    shop.redis.zadd(registry.key, {f"{job.id}:1": 1})
    registry.cleanup()


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_killed_worker_is_no_failed_attempt(shop: Shop, attempts: int) -> None:
    runs = log_runs(shop)
    shop.app.routes["orders"].retry = Retry(attempts=attempts)
    (job,) = shop.enqueue("orders", b"1")
    for _ in range(4):
        kill_worker_of(shop, job)
        assert shop.failed() == []
        shop.bring_due()
    shop.work()
    assert runs == [(1, 1)]


def test_the_message_that_may_be_killing_its_worker_gets_a_job_of_its_own(shop: Shop) -> None:
    runs = log_runs(shop)
    (job,) = shop.enqueue("orders", b"0", b"1", b"2")
    for _ in range(SPLIT_AFTER):
        kill_worker_of(shop, job)
        shop.bring_due()
    shop.work()
    # the first one is the suspect, as no run has come further; the others go on before it
    assert runs == [(1, 1), (2, 1), (0, 1)]
    assert shop.scheduled() == []


def test_a_message_that_always_kills_its_worker_becomes_a_dead_letter(shop: Shop) -> None:
    runs = log_runs(shop)
    shop.app.routes["orders"].dead_letter = "orders.dead"
    (job,) = shop.enqueue("orders", b"1")
    for _ in range(RUNS.max):
        kill_worker_of(shop, job)
        assert shop.failed() == []
        shop.bring_due()
    shop.work()
    assert runs == []
    (dead,) = shop.broker.records("orders.dead")
    assert b"killed" in (dict(dead.headers)["kafka_dlt-exception-message"] or b"")
    assert shop.failed() == []


def test_a_job_that_ran_out_of_runs_can_be_requeued_by_hand(shop: Shop) -> None:
    """After a deployment that was broken for long, `rq requeue` means: run it, and not: bury it."""
    runs = log_runs(shop)
    shop.app.routes["orders"].dead_letter = "orders.dead"
    shop.enqueue("orders", b"1")
    del sys.modules[shop.module.__name__]
    shop.work_all()
    sys.modules[shop.module.__name__] = shop.module
    (failed,) = shop.failed()
    failed.requeue()
    shop.work()
    assert runs == [(1, 1)]
    assert shop.broker.records("orders.dead") == []
    assert shop.failed() == []


# Redis.


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RedisConnectionError("Error 111 connecting"), "Redis does not answer: Error 111 connecting; is it running"),
        (RedisTimeoutError("Timeout reading"), "Redis does not answer: Timeout reading"),
        (ResponseError("OOM command not allowed"), "Redis refuses: OOM command not allowed"),
    ],
)
def test_redis_errors_say_what_to_do(error: Exception, text: str) -> None:
    with pytest.raises(RedisUnavailable, match=f"^{text}"), redis_errors():
        raise error


def test_a_redis_that_is_not_there_is_redis_unavailable(shop: Shop) -> None:
    queue = JobQueue({"host": "127.0.0.1", "port": 1, "retry": None}, "shop", "shop:app")
    with pytest.raises(RedisUnavailable, match="does not answer"):
        queue.marks.read("g", [Partition("orders", 0)])
    with pytest.raises(RedisUnavailable, match="does not answer"):
        queue.marks.note("g", {Partition("orders", 0): (1, "x/1")})
    with pytest.raises(RedisUnavailable, match="does not answer"):
        queue.marks.change("g", Partition("orders", 0), Mark(), Mark(1))
    log_runs(shop)
    handling = shop.app.handling("orders")
    with pytest.raises(RedisUnavailable, match="does not answer"):
        queue.enqueue("g", [Pack(handling, "default", [_entry(handling)])], NEW, {Partition("orders", 0): 1})


def _entry(handling: Handling) -> list[Any]:
    return handling.entry(PlainRecord("orders", 0, 0, 0, None, b"1"), 0.0, b"1")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("redis://example.org:7000/2", {"host": "example.org", "port": 7000, "db": 2}),
        ({"host": "example.org", "db": 4}, {"host": "example.org", "db": 4}),
        ({"url": "redis://example.org/5", "username": "ann"}, {"host": "example.org", "db": 5, "username": "ann"}),
        ({"host": "h", "socket_timeout": 3}, {"socket_timeout": 3}),
        ("redis://h?socket_timeout=4", {"socket_timeout": 4.0}),
        ("unix:///tmp/redis.sock", {"path": "/tmp/redis.sock"}),
    ],
)
def test_connect_takes_urls_and_options(settings: Any, expected: dict[str, Any]) -> None:
    options = connect(settings).connection_pool.connection_kwargs
    assert expected.items() <= options.items()
    assert options["socket_connect_timeout"] == 5
    assert options.get("socket_timeout", 0) > 0
    if "socket_timeout" not in expected:
        assert options["socket_timeout"] == 15


# Custom workers.


class Elsewhere:
    """A custom worker as one in front of Celery would be: it stores its parameters as JSON."""

    def __init__(self) -> None:
        self.stored: list[tuple[str, str]] = []

    def perform_async(self, topic: str, params: Mapping[str, Any]) -> None:
        self.stored.append((topic, json.dumps(params)))


def test_a_custom_worker_gives_its_messages_back_to_the_application(shop: Shop) -> None:
    worker = Elsewhere()

    @shop.app.topic("orders", worker=worker)
    @shop.app.responds_to("invoices")
    def bill(order: Any, message: Message) -> Any:
        if order == {"message": b"\xff"}:
            raise ValueError(f"no, attempt {message.attempt}")
        return [order, message.offset, message.attempt]

    told: list[int] = []

    @shop.app.after_failure("orders")
    def report(error: Exception, message: Message) -> None:
        told.append(message.attempt)

    handling = shop.app.handling("orders")

    for offset, value in enumerate([b"5", b"\xff"]):
        ticket = handling.admit(PlainRecord("orders", 0, offset, 0, b"\xfe", value), 1, 0.0)
        assert ticket is not None
        message, entry = ticket
        message.worker.perform_async("orders", shop.app.handling("orders").params(entry))

    (topic, good), (_, bad) = worker.stored
    shop.app.perform(topic, json.loads(good))
    assert [record.value for record in shop.broker.records("invoices")] == [b"[5,0,1]"]
    with pytest.raises(ValueError, match="no, attempt 2"):
        shop.app.perform(topic, {**json.loads(bad), "attempt": 2})
    assert told == [2]
    with pytest.raises(QueueError, match="params lack 'offset'"):
        shop.app.perform(topic, {"partition": 0})


# What the monitor and the hooks are told.


def test_events_follow_the_messages_of_a_job(shop: Shop) -> None:
    shop.app.add_topic("orders", _fails_for_two, retry=Retry(attempts=2, first=0, jitter=0))
    shop.app.add_response(_fails_for_two, "bills")
    told: list[tuple[str, dict[str, Any]]] = []
    last: list[tuple[int, bool]] = []

    @shop.app.on_event("performed", "responded", "failed", "retried", "dead")
    def remember(event: str, **details: Any) -> None:
        details.pop("error", None)
        details.pop("message", None)
        told.append((event, details))

    @shop.app.after_failure
    def report(error: Exception, message: Message) -> None:
        last.append((message.attempt, message.last_attempt))

    shop.enqueue("orders", b"1", b"2", b"3")
    shop.work_all()

    where = {"topic": "orders", "partition": 0, "offset": 1, "group": "shop_orders"}
    assert told == [
        ("responded", {"topic": "bills", "count": 1}),
        ("failed", {**where, "attempt": 1, "last": False}),
        ("retried", {**where, "attempt": 2, "delay": 0}),
        ("responded", {"topic": "bills", "count": 1}),
        ("performed", {"topic": "orders", "count": 3, "failed": 1}),
        ("performed", {"topic": "orders", "count": 1, "failed": 1}),
        ("failed", {**where, "attempt": 2, "last": True}),
        ("dead", {**where, "attempt": 2, "dead_letter": None}),
    ]
    assert last == [(1, False), (2, True)]


def test_a_custom_workers_messages_are_told_too_and_it_says_which_attempt_is_the_last(shop: Shop) -> None:
    class Other:
        def perform_async(self, topic: str, params: Any) -> None: ...

    told: list[tuple[str, dict[str, Any]]] = []
    last: list[bool] = []

    @shop.app.topic("orders", worker=Other())
    def fail(order: Any, message: Message) -> None:
        last.append(message.last_attempt)
        raise ValueError

    shop.app.on_event("performed", "failed")(lambda event, **details: told.append((event, details)))

    @shop.app.after_failure
    def report(error: Exception, message: Message) -> None:
        last.append(message.last_attempt)

    entry = shop.app.handling("orders").entry(PlainRecord("orders", 0, 7, 0, None, b"1"), 0.0, b"1")

    for more in ({"attempt": 9}, {"attempt": 10, "last_attempt": True}):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            shop.app.perform("orders", {**shop.app.handling("orders").params(entry), **more})

    where = {"topic": "orders", "partition": 0, "offset": 7, "group": "shop_orders", "error": caught.value}
    assert [event for event, _ in told] == ["performed", "failed"] * 2
    assert told[2] == ("performed", {"topic": "orders", "count": 1, "failed": 1})
    text = "orders[0]@7 failed, attempt 10: ValueError: "
    assert told[3] == ("failed", {**where, "attempt": 10, "last": True, "message": text})
    assert last == [False, False, True, True]


def test_a_dead_letter_is_told_with_its_topic(shop: Shop) -> None:
    shop.app.add_topic("orders", _always_fails, retry=1, dead_letter="orders.dead")
    told: list[dict[str, Any]] = []
    shop.app.on_event("dead")(lambda event, **details: told.append(details))

    shop.enqueue("orders", b"1")
    shop.work_all()

    where = {"topic": "orders", "partition": 0, "offset": 0, "group": "shop_orders"}
    assert told == [{**where, "attempt": 1, "dead_letter": "orders.dead"}]


def _fails_for_two(payload: int) -> int:
    if payload == 2:
        raise ValueError("two")
    return payload


def test_sys_exit_in_a_handler_is_a_failed_attempt_like_any_other(shop: Shop) -> None:
    def leave(payload: Any) -> None:
        sys.exit(3)

    shop.app.add_topic("orders", leave, retry=Retry(attempts=2, first=0, jitter=0), dead_letter="orders.dead")
    shop.enqueue("orders", b"1", b"2")
    shop.work_all()
    assert [record.value for record in shop.broker.records("orders.dead")] == [b"1", b"2"]
    dead = dict(shop.broker.records("orders.dead")[0].headers)
    assert dead["kafka_dlt-exception-message"] == b"it called sys.exit(3), which ends nothing here"


def test_the_log_says_how_a_failed_message_goes_on(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.app.add_topic("orders", _always_fails, retry=Retry(attempts=2, first=0, jitter=0))
    shop.enqueue("orders", b"1")
    shop.work_all()
    told = [record.getMessage() for record in caplog.records if record.name == "flowkit"]
    assert "orders[0]@0 failed, attempt 1 of 2, to be tried again: ValueError: no" in told
    assert "orders[0]@0 failed, attempt 2 of 2, stays in RQ's failed jobs: ValueError: no" in told
