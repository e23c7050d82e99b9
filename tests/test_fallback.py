"""An RQ that stores jobs in a way flowkit does not know: everything goes through RQ's own functions, with the same guarantees.

And what the fast way rests upon: that the jobs it writes are those that RQ's own functions write.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import command
from redis import Redis
from redis.exceptions import TimeoutError as RedisTimeoutError
from rq import Queue, SimpleWorker
from rq.job import Job
from support import an_entry, make_app
from test_jobs import AT_ONCE, Shop, _opened, fail_on, kill_worker_of, log_runs, offsets_of

from flowkit import queues
from flowkit.errors import RedisUnavailable
from flowkit.jobqueue import JobQueue, MarksMoved, Pack
from flowkit.jobs import SPLIT_AFTER, OwnWorker
from flowkit.marks import Mark
from flowkit.message import Partition
from flowkit.queues import BACK, FRONT, PERFORM, RESULT_TTL, RUNS, Envelope, Writer, make_jobs

A = Partition("orders", 0)


def a_renamed_field(monkeypatch: pytest.MonkeyPatch) -> None:
    """RQ writes, and reads, the time-out under another name."""
    to_dict, restore = Job.to_dict, Job.restore

    def renamed(job: Job, *arguments: Any, **options: Any) -> dict[str, Any]:
        fields = to_dict(job, *arguments, **options)
        if "timeout" in fields:
            fields["limit"] = fields.pop("timeout")
        return fields

    def read(job: Job, raw: dict[bytes, Any]) -> None:
        raw = dict(raw)
        if b"limit" in raw:
            raw[b"timeout"] = raw.pop(b"limit")
        restore(job, raw)

    monkeypatch.setattr(Job, "to_dict", renamed)
    monkeypatch.setattr(Job, "restore", read)


def a_function_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What flowkit asks of RQ beyond what is public is not there."""
    prepare = Queue._prepare_for_queue

    def gone(queue: Queue, job: Job) -> Any:
        if job.id == "probe":
            raise AttributeError("'Queue' object has no attribute '_prepare_for_queue'")
        return prepare(queue, job)

    monkeypatch.setattr(Queue, "_prepare_for_queue", gone)


def another_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """RQ reads something else out of the fields than was written."""
    restore = Job.restore

    def read(job: Job, raw: dict[bytes, Any]) -> None:
        restore(job, raw)
        if job.id == "probe":
            job.retries_left = 1

    monkeypatch.setattr(Job, "restore", read)


@pytest.fixture(params=[a_renamed_field, a_function_that_is_gone, another_meaning])
def shop(
    request: pytest.FixtureRequest, redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shop]:
    request.param(monkeypatch)
    queues.warn_of.cache_clear()
    found = Shop(redis, redis_url, retry=AT_ONCE)
    assert Writer(redis, "shop").shared is None
    yield from _opened(found)


def test_it_is_said_once(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    queues.warn_of.cache_clear()
    log_runs(shop, fail_on(1, 2, 3, times=1))
    shop.enqueue("orders", b"1", b"2", b"3", b"4")
    shop.work_all()
    assert caplog.text.count("this version of RQ stores jobs in another way than flowkit knows") == 1
    assert "they are queued through RQ's own functions, which is slower" in caplog.text


def test_messages_are_packed_and_run_in_order(shop: Shop) -> None:
    runs = log_runs(shop)
    shop.app.routes["orders"].job_size = 10
    jobs = shop.enqueue("orders", *(str(number).encode() for number in range(25)))
    assert offsets_of(jobs) == list(range(25))
    assert [len(job.args[3]) if len(job.args) == 4 else 0 for job in jobs] == [10, 10, 5]
    fetched = Job.fetch(jobs[0].id, connection=shop.redis)
    assert (fetched.func_name, fetched.origin, fetched.timeout) == (PERFORM, "default", jobs[0].timeout)
    assert (fetched.result_ttl, fetched.retries_left, fetched.retry_intervals) == (
        RESULT_TTL,
        RUNS.max,
        RUNS.intervals,
    )
    assert fetched.description.startswith("orders[0]@0 to [0]@")
    shop.work()
    assert [payload for payload, _ in runs] == list(range(25))
    assert shop.failed() == []


def test_the_worker_of_flowkit_runs_them_too(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("application", shop.app), ("stopping", False), ("told", None)):
        monkeypatch.setattr(OwnWorker, name, value)
    runs = log_runs(shop, fail_on(2, times=1))
    shop.enqueue("orders", b"1", b"2", b"3")
    shop.work_by_flowkit()
    assert shop.bring_due() == 1
    shop.work_by_flowkit()
    assert runs == [(1, 1), (2, 1), (3, 1), (2, 2)]


def test_a_failing_message_gets_a_job_of_its_own_and_the_others_are_done(shop: Shop) -> None:
    runs = log_runs(shop, fail_on(2))
    shop.enqueue("orders", b"1", b"2", b"3")
    shop.work()
    assert [offsets_of([job]) for job in shop.scheduled()] == [[1]]
    shop.work_all()
    assert runs == [(1, 1), (2, 1), (3, 1), (2, 2), (2, 3)]
    assert [offsets_of([job]) for job in shop.failed()] == [[1]]


def test_a_killed_worker_s_job_goes_on_where_it_was(shop: Shop) -> None:
    runs = log_runs(shop)
    (job,) = shop.enqueue("orders", b"1", b"2", b"3")
    shop.redis.hset(job.key, "flowkit-done", 1)  # what the killed one had noted
    for _ in range(SPLIT_AFTER):
        kill_worker_of(shop, job)
        shop.bring_due()
    shop.work()
    # the message that may be what kills it has gone to a job of its own
    assert sorted(runs) == [(2, 1), (3, 1)]
    assert shop.failed() == []


def test_a_stop_puts_the_rest_in_front(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("application", shop.app), ("stopping", False), ("told", None)):
        monkeypatch.setattr(OwnWorker, name, value)

    def stop(payload: Any, message: Any) -> None:
        OwnWorker.stop()

    log_runs(shop, stop)
    shop.enqueue("orders", b"1", b"2", b"3")
    SimpleWorker(["default"], connection=shop.redis).work(burst=True, max_jobs=1, logging_level="ERROR")
    assert offsets_of(shop.jobs()) == [1, 2]


def test_jobs_and_marks_move_together_and_not_twice(shop: Shop) -> None:
    shop.app.add_topic("orders", lambda payload: None)
    shop.enqueue("orders", b"1", b"2")
    assert shop.queue.marks.read("shop_orders", [A])[A].queued == 2
    keys = set(shop.redis.keys())
    pack = Pack(shop.app.handling("orders"), "default", [an_entry("orders", 2)])
    for wrong in (Mark(), Mark(1), Mark(3)):
        with pytest.raises(MarksMoved):
            shop.queue.enqueue("shop_orders", [pack], {A: wrong}, {A: 3})
    assert set(shop.redis.keys()) == keys
    assert shop.queue.enqueue("shop_orders", [pack], {A: Mark(2)}, {A: 3}).waiting == {"default": 3}


def test_a_call_whose_reply_got_lost_queues_nothing_twice(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.app.add_topic("orders", lambda payload: None)
    queue = shop.queue
    by_rq = queue._enqueue_by_rq

    def and_then_silence(*arguments: Any) -> Any:
        by_rq(*arguments)
        raise RedisTimeoutError("Timeout reading from socket")

    pack = Pack(shop.app.handling("orders"), "default", [an_entry("orders", 0)])
    monkeypatch.setattr(queue, "_enqueue_by_rq", and_then_silence)
    with pytest.raises(RedisUnavailable):
        queue.enqueue("shop_orders", [pack], {A: Mark()}, {A: 1})
    monkeypatch.setattr(queue, "_enqueue_by_rq", by_rq)
    with pytest.raises(MarksMoved):
        queue.enqueue("shop_orders", [pack], {A: Mark()}, {A: 1})
    assert offsets_of(shop.jobs()) == [0]


def test_of_two_consumers_that_have_the_same_messages_one_queues_them(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one comes between the look at the marks and the transaction."""
    shop.app.add_topic("orders", lambda payload: None)
    pack = Pack(shop.app.handling("orders"), "default", [an_entry("orders", 0)])
    first, second = shop.queue, shop.queue
    by_rq = Writer.by_rq

    def between(writer: Writer, pipe: Any, jobs: Any) -> None:
        if writer is first.writer:
            second.enqueue("shop_orders", [pack], {A: Mark()}, {A: 1})
        by_rq(writer, pipe, jobs)

    monkeypatch.setattr(Writer, "by_rq", between)
    with pytest.raises(MarksMoved):
        first.enqueue("shop_orders", [pack], {A: Mark()}, {A: 1})
    assert offsets_of(shop.jobs()) == [0]


# The fast way against RQ's own.


def both_ways(redis: Redis, url: str, place: str) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """The hash of the same job, written by flowkit and by RQ."""
    app = make_app(inline=False, redis=url)
    app.add_topic("orders", print)
    app.reference = "support:app"
    handling = app.handling("orders")
    found = []
    for fast in (True, False):
        redis.flushdb()
        (job,) = make_jobs(app.reference, handling, "default", [an_entry("orders", 0)], size=9, place=place)
        writer = Writer(redis, "t")
        assert writer.shared is not None
        if fast:
            redis.register_script(f"{queues.STORE}\nstore(1)")(keys=writer.keys, args=writer.arguments([job]))
        else:
            with redis.pipeline() as pipe:
                writer.by_rq(pipe, [job])
                pipe.execute()
        stored = redis.hgetall(f"rq:job:{job.id}")
        keys = {key: redis.type(key) for key in redis.scan_iter() if not key.startswith(b"rq:job:")}
        found.append((stored, keys))
        assert redis.smembers("rq:queues") == {b"rq:queue:default"}
    (ours, our_keys), (theirs, their_keys) = found
    assert our_keys == their_keys
    return ours, theirs


@pytest.mark.parametrize("place", [BACK, FRONT, "4102444800"], ids=["back", "front", "later"])
def test_every_field_is_what_rqs_own_functions_write(redis: Redis, redis_url: str, place: str) -> None:
    ours, theirs = both_ways(redis, redis_url, place)
    differ = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
    # the times, and the data, which RQ packs and reads unpacked too; a scheduled job is not enqueued yet
    assert differ <= {b"created_at", b"enqueued_at", b"data"}, {n: (ours.get(n), theirs.get(n)) for n in differ}
    for fields in (ours, theirs):
        job = Job("probe", connection=redis, serializer=Envelope)
        job.restore(fields)
        assert job.func_name == PERFORM
        assert job.args == ("support:app", "orders", 1, [an_entry("orders", 0)])


def test_rqs_own_worker_reads_what_flowkit_writes(redis: Redis, redis_url: str, tmp_path: Path) -> None:
    module = tmp_path / "counted.py"
    module.write_text(
        "import os\nfrom flowkit import Flowkit\nfrom redis import Redis\n"
        "app = Flowkit('counted', kafka={'hosts': '127.0.0.1:1'})\n"
        "@app.topic('orders')\ndef work(n: int) -> None:\n    Redis.from_url(os.environ['FLOWKIT_REDIS']).rpush('runs', n)\n"
    )
    app = make_app(inline=False, redis=redis_url)
    app.add_topic("orders", print)
    entries = [an_entry("orders", offset, value=b"%d" % offset) for offset in range(25)]
    queue = JobQueue(redis_url, "counted", "counted:app")
    queue.enqueue("g", [Pack(app.handling("orders"), "default", entries)], {A: Mark()}, {A: 25})
    worker = ("rq", "worker", "--burst", "--url", redis_url, "--path", str(tmp_path))
    done = command(*worker, cwd=tmp_path, env={"FLOWKIT_REDIS": redis_url}, timeout=120)
    assert done.code == 0, done.err
    assert redis.lrange("runs", 0, -1) == [b"%d" % number for number in range(25)]
    assert Queue("default", connection=redis).failed_job_registry.count == 0
