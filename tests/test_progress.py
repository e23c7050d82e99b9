"""Jobs of many messages: how far they have come is kept, how large they are, and how long they may take."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import Process
from redis import Redis
from rq import Queue, SimpleWorker, get_current_job
from rq import Worker as RqWorker
from rq.job import Job
from rq.suspension import suspend
from servers import WaitFor
from support import an_entry
from test_jobs import AT_ONCE, Shop, _opened, kill_worker_of, log_runs, offsets_of

from flowkit import Message, Retry
from flowkit import jobs as jobs_module
from flowkit.errors import RedisUnavailable
from flowkit.jobqueue import FIRST_SIZE, JobQueue, Pack, Sizes
from flowkit.marks import Mark
from flowkit.message import Partition
from flowkit.progress import DONE, MORE, RUN, JobTaken, Progress, Took
from flowkit.queues import FRONT, MOST_BYTES, PERFORM, RUNS, Envelope, Writer, fitting, make_jobs, open_key, paces_key


@pytest.fixture
def shop(redis: Redis, redis_url: str) -> Any:
    yield from _opened(Shop(redis, redis_url, retry=AT_ONCE))


def numbers(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


# How far a job has come.


def progress_of(shop: Shop, job: Job) -> Progress:
    return Progress(Writer(shop.redis, "shop"), job, "orders")


def test_a_run_goes_on_where_the_one_before_it_was(shop: Shop) -> None:
    log_runs(shop)
    (job,) = shop.enqueue("orders", *numbers(5))
    first = progress_of(shop, job)
    first.begin()
    assert first.done == 0
    first.note(3)
    second = progress_of(shop, job)
    second.begin()
    assert second.done == 3


def test_a_run_whose_job_was_given_to_another_may_note_nothing(shop: Shop) -> None:
    """Its worker stood still for a minute. What it puts back would be there twice."""
    log_runs(shop)
    (job,) = shop.enqueue("orders", *numbers(5))
    late, now = progress_of(shop, job), progress_of(shop, job)
    late.begin()
    now.begin()
    again = make_jobs(shop.app.reference, shop.app.handling("orders"), "default", [an_entry("orders", 1)], size=1)
    with pytest.raises(JobTaken):
        late.note(4, again, Took(1.0, 4))
    assert shop.redis.hget(job.key, DONE) is None
    assert [found.id for found in shop.jobs()] == [job.id]
    assert not shop.redis.exists(paces_key("shop"))
    now.note(4, again)
    assert [found.id for found in shop.jobs()] == [job.id, again[0].id]


def test_a_deleted_job_stays_deleted(shop: Shop) -> None:
    log_runs(shop)
    (job,) = shop.enqueue("orders", *numbers(5))
    progress = progress_of(shop, job)
    progress.begin()
    job.delete()
    with pytest.raises(JobTaken):
        progress.note(1)
    with pytest.raises(JobTaken):
        progress_of(shop, job).begin()
    assert not shop.redis.exists(job.key)


def test_a_process_whose_job_was_taken_ends_without_a_word_to_rq(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(jobs_module.logging, "shutdown", lambda: None)

    def taken(payload: Any, message: Message) -> None:
        job = get_current_job()
        assert job is not None
        shop.redis.hset(job.key, RUN, "another")

    runs = log_runs(shop, taken)
    shop.enqueue("orders", *numbers(3))
    shop.work()
    assert ends == [0]
    assert runs[0] == (0, 1)
    assert "is another worker's by now" in caplog.text


def test_rq_leaves_a_job_alone_that_was_taken_from_its_work_horse(
    redis: Redis, redis_url: str, tmp_path: Path, wait_for: WaitFor
) -> None:
    """A horse that ends with a failure would be one of the job to RQ, which would queue it a second time."""
    ledger = tmp_path / "ledger"
    env = {"FLOWKIT_REDIS": redis_url, "FLOWKIT_KAFKA_HOSTS": "127.0.0.1:1", "SLOW_LEDGER": str(ledger)}
    shop = Shop(redis, redis_url)
    shop.app.reference = "slow:app"
    shop.app.add_topic("orders", lambda payload: None)
    (job,) = shop.enqueue("orders", *numbers(40))
    with Process("rq", "worker", "--url", redis_url, "default", env=env, log=tmp_path / "log") as worker:
        wait_for(lambda: ledger.exists() and ledger.read_bytes(), what="the first message")
        redis.hset(job.key, RUN, "another")
        worker.wait_for("this process ends")
        wait_for(lambda: not worker.children(), what="the horse to end")
        (name,) = RqWorker.all_keys(connection=redis)
        wait_for(lambda: redis.hget(name, "state") == b"idle", what="the worker to go on")
        assert "terminated unexpectedly" not in worker.output
    assert job.get_status() == "started"
    assert shop.scheduled() == shop.jobs() == []


def test_progress_and_what_is_tried_again_move_together(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis goes away at the note: neither is there, and the next run does both."""

    def fail_once(payload: Any, message: Message) -> None:
        if payload == 1 and message.attempt == 1:
            raise ValueError("no")

    runs = log_runs(shop, fail_once)
    (job,) = shop.enqueue("orders", *numbers(3))
    note, calls = Progress._note, []

    def away(self: Progress, *args: Any) -> bool:
        calls.append(args)
        if len(calls) == 1:
            raise RedisUnavailable("Redis does not answer")
        return note(self, *args)

    monkeypatch.setattr(Progress, "_note", away)
    SimpleWorker(["default"], connection=shop.redis).work(burst=True, max_jobs=1, logging_level="ERROR")
    assert shop.redis.hget(job.key, DONE) is None
    assert [found.id for found in shop.scheduled()] == [job.id]
    shop.work_all()
    assert Counter(runs) == {(0, 1): 2, (1, 1): 2, (2, 1): 1, (1, 2): 1}  # the note was due before the last one


def test_a_killed_horse_repeats_what_was_in_hand_and_nothing_else(
    redis: Redis, redis_url: str, tmp_path: Path, wait_for: WaitFor
) -> None:
    ledger = tmp_path / "ledger"
    env = {"FLOWKIT_REDIS": redis_url, "FLOWKIT_KAFKA_HOSTS": "127.0.0.1:1", "SLOW_LEDGER": str(ledger)}
    shop = Shop(redis, redis_url)
    shop.app.reference = "slow:app"
    shop.app.add_topic("orders", lambda payload: None)
    shop.app.settings_for_queues()
    handling = shop.app.handling("orders")
    entries = [an_entry("orders", offset, value=b"%d" % offset) for offset in range(60)]
    queue = shop.queue
    queue.sizes._guess["orders"] = 60
    queue.enqueue(
        "g", [Pack(handling, "default", entries)], {Partition("orders", 0): Mark()}, {Partition("orders", 0): 60}
    )
    assert len(shop.jobs()) == 1

    def seen() -> list[str]:
        return ledger.read_text().split() if ledger.exists() else []

    with Process("rq", "worker", "--url", redis_url, "--quiet", "default", env=env, log=tmp_path / "log") as worker:
        killed = []
        for at in (10, 25):
            wait_for(lambda at=at: len(seen()) >= at, what="messages")
            worker.kill_child()
            killed.append(len(seen()))
            wait_for(lambda: shop.bring_due() or len(seen()) > killed[-1], what="the job to come back")
        wait_for(lambda: len(set(seen())) == 60 and shop.bring_due() == 0 and not shop.jobs(), what="the end")
    counts = Counter(seen())
    assert set(counts) == {str(number) for number in range(60)}
    # 20 ms each, noted every 5 ms: one in hand, and one finished but not yet noted
    assert sum(counts.values()) - 60 <= 2 * 2, counts


def test_after_a_kill_each_message_is_noted_so_that_the_killer_is_found(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[int] = []
    note = Progress.note

    def remember(self: Progress, done: int, *args: Any, **more: Any) -> None:
        notes.append(done)
        note(self, done, *args, **more)

    monkeypatch.setattr(Progress, "note", remember)
    log_runs(shop)
    (job,) = shop.enqueue("orders", *numbers(4))
    kill_worker_of(shop, job)
    shop.bring_due()
    shop.work()
    assert notes == [1, 2, 3, 4, 4]


def test_what_was_done_before_two_kills_is_not_done_again(shop: Shop) -> None:
    runs = log_runs(shop)
    (job,) = shop.enqueue("orders", *numbers(6))
    progress = progress_of(shop, job)
    progress.begin()
    progress.note(2)
    for _ in range(jobs_module.SPLIT_AFTER):
        kill_worker_of(shop, job)
        shop.bring_due()
    shop.work()
    assert runs == [(3, 1), (4, 1), (5, 1), (2, 1)]  # the suspect has a job of its own, behind the others


def test_responses_are_confirmed_before_their_messages_are_noted(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kafka is slow: of five messages with a response each, the note in the middle of the job has none."""
    notes: list[int] = []
    note = Progress.note

    def remember(self: Progress, done: int, *args: Any, **more: Any) -> None:
        notes.append(done)
        note(self, done, *args, **more)

    monkeypatch.setattr(Progress, "note", remember)
    monkeypatch.setattr(type(shop.app.producer), "ended", lambda self, delivery: delivery is shop)

    def bill(payload: Any) -> None:
        time.sleep(jobs_module.NOTE_EVERY * 1.5)
        shop.app.respond_to("invoices", payload)

    shop.app.add_topic("orders", bill)
    shop.app.add_response(bill, "invoices")
    shop.enqueue("orders", *numbers(5))
    shop.work()
    assert notes == [5]
    assert len(shop.broker.records("invoices")) == 5


# The jobs behind one go up in it, where RQ starts a process for each.


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a process has done its own job, no other one waits: those that there are come a moment later."""
    look, looked = Progress.look, set()

    def later(self: Progress, *args: Any) -> Any:
        first = id(self) not in looked
        looked.add(id(self))
        return None if first else look(self, *args)

    monkeypatch.setattr(Progress, "look", later)


def test_where_jobs_wait_already_each_is_rqs_affair(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = log_runs(shop)
    asked, look = [], Progress.look

    def watched(self: Progress, queue: str, milliseconds: int) -> Any:
        found = look(self, queue, milliseconds)
        asked.append((found is None, shop.redis.exists(open_key("shop", queue))))
        return found

    monkeypatch.setattr(Progress, "look", watched)
    shop.app.routes["orders"].job_size = 4
    jobs = shop.enqueue("orders", *numbers(10))
    shop.work()
    assert runs == [(number, 1) for number in range(10)]
    # consumers are asked for more only by a process that has nothing to do: what comes for another one would always wait
    assert asked[:3] == [(False, 0), (False, 0), (True, 0)]
    assert set(asked[3:]) == {(True, 1)}
    assert [Job.fetch(job.id, connection=shop.redis).get_status() for job in jobs] == ["finished"] * 3


@pytest.mark.usefixtures("idle")
def test_jobs_behind_one_go_up_in_it(shop: Shop) -> None:
    runs = log_runs(shop)
    shop.app.routes["orders"].job_size = 4
    first, *others = shop.enqueue("orders", *numbers(10))
    shop.work()
    assert runs == [(number, 1) for number in range(10)]
    assert [Job.exists(job.id, connection=shop.redis) for job in others] == [False, False]
    finished = Job.fetch(first.id, connection=shop.redis)
    assert finished.get_status() == "finished"
    assert finished.description == "orders[0]@0 to [0]@3, 4 messages, and 6 of jobs behind it"
    assert not shop.redis.hexists(finished.key, MORE)
    assert Queue("default", connection=shop.redis).finished_job_registry.count == 1


def test_a_job_that_comes_within_the_wait_goes_up_too(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "LINGER", 2.0)
    runs = log_runs(shop)
    shop.enqueue("orders", *numbers(2))
    look = Progress.look

    def come(self: Progress, *args: Any) -> Any:
        found = look(self, *args)
        if len(runs) == 2 and found is None:
            shop.redis.delete("flowkit:marks:shop_orders")
            shop.enqueue("orders", *numbers(3))
        return None if len(runs) == 5 else found

    monkeypatch.setattr(Progress, "look", come)
    SimpleWorker(["default"], connection=shop.redis).work(burst=True, max_jobs=1, logging_level="ERROR")
    assert [number for number, _ in runs] == [0, 1, 0, 1, 2]
    assert shop.jobs() == []


def another_application(job: Job) -> dict[str, Any]:
    return {"data": Envelope.dumps((PERFORM, None, ("else:app", "orders", 1, job.args[3]), {}))}


def another_attempt(job: Job) -> dict[str, Any]:
    return {"data": Envelope.dumps((PERFORM, None, (job.args[0], "orders", 2, job.args[3]), {}))}


@pytest.mark.parametrize(
    "change",
    [
        another_application,
        another_attempt,
        lambda job: {"data": b"no job of flowkit's"},
        lambda job: {"timeout": 9999},
        lambda job: {"retries_left": RUNS.max - 1},
        lambda job: {DONE: 1},
        lambda job: {"started_at": "2026-01-01T00:00:00.000000Z"},
    ],
    ids=["application", "attempt", "foreign", "timeout", "retried", "begun", "started"],
)
@pytest.mark.usefixtures("idle")
def test_what_is_rqs_affair_stays_in_the_queue(shop: Shop, change: Callable[[Job], dict[str, Any]]) -> None:
    runs = log_runs(shop)
    shop.app.routes["orders"].job_size = 2
    _, other = shop.enqueue("orders", *numbers(4))
    shop.redis.hset(other.key, mapping=change(other))
    SimpleWorker(["default"], connection=shop.redis).work(burst=True, max_jobs=1, logging_level="ERROR")
    assert runs == [(0, 1), (1, 1)]
    assert Queue("default", connection=shop.redis).job_ids == [other.id]


@pytest.mark.parametrize("options", [{"job_size": 1}, {"retry": 1}])
@pytest.mark.usefixtures("idle")
def test_messages_that_are_to_have_a_job_each_go_up_in_none(shop: Shop, options: dict[str, Any]) -> None:
    runs = log_runs(shop)
    shop.app.add_topic("mails", runs.append, **options)
    shop.enqueue("orders", *numbers(2))
    shop.enqueue("mails", b"7")
    SimpleWorker(["default"], connection=shop.redis).work(burst=True, max_jobs=1, logging_level="ERROR")
    assert runs == [(0, 1), (1, 1)]
    shop.work()
    assert runs == [(0, 1), (1, 1), 7]


@pytest.mark.usefixtures("idle")
def test_behind_a_failure_or_a_kill_the_next_job_is_rqs(shop: Shop) -> None:
    def fail(payload: Any, message: Message) -> None:
        if payload == 1 and message.attempt == 1:
            raise ValueError("no")

    runs = log_runs(shop, fail)
    shop.app.routes["orders"].job_size = 2
    _, second, third = shop.enqueue("orders", *numbers(6))
    SimpleWorker(["default"], connection=shop.redis).work(burst=True, max_jobs=1, logging_level="ERROR")
    assert Queue("default", connection=shop.redis).job_ids == [second.id, third.id]
    kill_worker_of(shop, second)
    shop.bring_due()
    SimpleWorker(["default"], connection=shop.redis).work(burst=True, max_jobs=1, logging_level="ERROR")
    assert sorted(number for number, _ in runs) in ([0, 1, 4, 5], [0, 1, 1, 2, 3], [0, 1, 2, 3])
    shop.work_all()
    assert Counter(number for number, _ in runs) == {0: 1, 1: 2, 2: 1, 3: 1, 4: 1, 5: 1}


@pytest.mark.usefixtures("idle")
def test_other_topics_of_the_application_go_up_too(shop: Shop) -> None:
    runs = log_runs(shop)
    mails: list[int] = []
    shop.app.add_topic("mails", mails.append)
    shop.enqueue("orders", *numbers(3))
    shop.enqueue("mails", b"7")
    SimpleWorker(["default"], connection=shop.redis).work(burst=True, max_jobs=1, logging_level="ERROR")
    assert ([number for number, _ in runs], mails) == ([0, 1, 2], [7])
    assert shop.redis.hexists(paces_key("shop"), "mails")


@pytest.mark.usefixtures("idle")
def test_a_worker_that_is_to_stop_takes_nothing_up(shop: Shop) -> None:
    def stop(payload: Any, message: Message) -> None:
        job = get_current_job()
        assert job is not None
        shop.redis.hset(f"rq:worker:{job.worker_name}", "shutdown_requested_date", "now")

    runs = log_runs(shop, stop)
    shop.app.routes["orders"].job_size = 2
    _, other = shop.enqueue("orders", *numbers(4))
    SimpleWorker(["default"], connection=shop.redis).work(burst=True, max_jobs=1, logging_level="ERROR")
    assert len(runs) == 2
    assert Queue("default", connection=shop.redis).job_ids == [other.id]


@pytest.mark.usefixtures("idle")
def test_a_worker_that_has_jobs_in_another_queue_takes_nothing_up(shop: Shop) -> None:
    runs = log_runs(shop)
    shop.app.routes["orders"].job_size = 2
    _, other = shop.enqueue("orders", *numbers(4))
    both = SimpleWorker(["express", "default"], connection=shop.redis)
    handled = shop.app.handling("orders").call_queued

    def arrive(*args: Any) -> Any:
        Queue("express", connection=shop.redis).enqueue(len, "abc")
        return handled(*args)

    shop.app.handling("orders").call_queued = arrive
    both.work(burst=True, max_jobs=1, logging_level="ERROR")
    assert len(runs) == 2
    assert Queue("default", connection=shop.redis).job_ids == [other.id]


@pytest.mark.usefixtures("idle")
def test_jobs_go_up_until_some_time_has_passed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "TOGETHER", 0.2)
    runs = log_runs(shop, lambda payload, message: time.sleep(0.02))
    shop.app.routes["orders"].job_size = 2
    shop.app.routes["orders"].job_seconds = 0.01
    shop.enqueue("orders", *numbers(40))
    SimpleWorker(["default"], connection=shop.redis).work(burst=True, max_jobs=1, logging_level="ERROR")
    assert 6 <= len(runs) <= 12
    shop.work()
    assert runs == [(number, 1) for number in range(40)]


def test_a_kill_in_what_went_up_loses_and_repeats_nothing_that_is_noted(shop: Shop) -> None:
    runs = log_runs(shop)
    shop.app.routes["orders"].job_size = 4
    first, second = shop.enqueue("orders", *numbers(8))
    Queue("default", connection=shop.redis).remove(first)
    # Given a process that has taken up the second job, has noted one message of it, and is killed
    progress = progress_of(shop, first)
    assert progress.begin() is None
    progress.note(4)
    found = progress.look("default", 20)
    assert found is not None
    assert progress.take("default", found)
    progress.note(1)
    assert not Job.exists(second.id, connection=shop.redis)
    # When RQ runs its job again, as it was to RQ
    Queue("default", connection=shop.redis)._enqueue_job(first)
    shop.work()
    # Then the rest of the second one is handled, and nothing else
    assert runs == [(5, 1), (6, 1), (7, 1)]
    assert not shop.redis.hexists(first.key, MORE)


@pytest.mark.usefixtures("idle")
def test_the_end_is_noted_so_that_one_more_run_finds_nothing_to_do(shop: Shop) -> None:
    runs = log_runs(shop)
    shop.app.routes["orders"].job_size = 4
    first, _ = shop.enqueue("orders", *numbers(5))
    shop.work()
    assert len(runs) == 5
    Queue("default", connection=shop.redis)._enqueue_job(first)  # RQ has not heard of its end
    shop.work()
    assert len(runs) == 5


def test_a_run_that_does_not_count_any_more_takes_nothing_up(shop: Shop) -> None:
    log_runs(shop)
    shop.app.routes["orders"].job_size = 2
    first, second = shop.enqueue("orders", *numbers(4))
    Queue("default", connection=shop.redis).remove(first)
    late, now = progress_of(shop, first), progress_of(shop, first)
    late.begin()
    now.begin()
    found = late.look("default", 20)
    assert found is not None
    for refused in (lambda: late.take("default", found), lambda: late.end(2)):
        with pytest.raises(JobTaken):
            refused()
    assert Job.exists(second.id, connection=shop.redis)
    Queue("default", connection=shop.redis).empty()
    assert not now.take("default", found)


@pytest.mark.parametrize("done", [False, True], ids=["it was not done", "it was done"])
@pytest.mark.usefixtures("idle")
def test_a_redis_that_goes_away_while_a_job_goes_up_loses_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    """Whether it was done cannot be known: the job fails, and RQ runs it again."""
    take, calls = Progress.take, []

    def away(self: Progress, *args: Any) -> bool:
        calls.append(args)
        if len(calls) > 1:
            return take(self, *args)
        if done:
            take(self, *args)
        raise RedisUnavailable("Redis does not answer")

    monkeypatch.setattr(Progress, "take", away)
    runs = log_runs(shop)
    shop.app.routes["orders"].job_size = 2
    shop.enqueue("orders", *numbers(6))
    shop.work_all()
    assert sorted(runs) == [(number, 1) for number in range(6)]
    assert shop.jobs() == shop.failed() == shop.scheduled() == []


def test_a_call_that_is_repeated_because_its_reply_was_lost_says_the_same_again(shop: Shop) -> None:
    log_runs(shop)
    shop.app.routes["orders"].job_size = 2
    first, _, third = shop.enqueue("orders", *numbers(6))
    Queue("default", connection=shop.redis).remove(first)
    progress = progress_of(shop, first)
    progress.begin()
    found = progress.look("default", 20)
    assert found is not None
    assert [progress.take("default", found) for _ in range(2)] == [True, True]
    assert Queue("default", connection=shop.redis).job_ids == [third.id]


def test_a_job_that_was_run_meanwhile_does_not_go_up(shop: Shop) -> None:
    log_runs(shop)
    shop.app.routes["orders"].job_size = 2
    first, second = shop.enqueue("orders", *numbers(4))
    Queue("default", connection=shop.redis).remove(first)
    progress = progress_of(shop, first)
    progress.begin()
    found = progress.look("default", 20)
    assert found is not None
    shop.redis.hset(second.key, DONE, 1)
    assert not progress.take("default", found)
    assert Queue("default", connection=shop.redis).job_ids == [second.id]


@pytest.mark.usefixtures("idle")
def test_the_message_that_may_kill_workers_goes_up_in_no_other_job(shop: Shop) -> None:
    runs = log_runs(shop)
    (job,) = shop.enqueue("orders", *numbers(3))
    for _ in range(jobs_module.SPLIT_AFTER):
        kill_worker_of(shop, job)
        shop.bring_due()
    SimpleWorker(["default"], connection=shop.redis).work(burst=True, max_jobs=2, logging_level="ERROR")
    assert runs == [(1, 1), (2, 1)]  # in a job that another one stands behind
    assert offsets_of(shop.jobs()) == [0]
    shop.work()
    assert runs == [(1, 1), (2, 1), (0, 1)]


@pytest.mark.usefixtures("idle")
def test_suspended_workers_take_nothing_up(shop: Shop) -> None:
    runs = log_runs(shop, lambda payload, message: suspend(shop.redis))
    shop.app.routes["orders"].job_size = 2
    shop.enqueue("orders", *numbers(4))
    SimpleWorker(["default"], connection=shop.redis).work(burst=True, max_jobs=1, logging_level="ERROR")
    assert len(runs) == 2


@pytest.mark.usefixtures("idle")
def test_a_job_that_others_depend_on_goes_up_in_no_other(shop: Shop) -> None:
    runs = log_runs(shop)
    shop.app.routes["orders"].job_size = 2
    _, second = shop.enqueue("orders", *numbers(4))
    Queue("default", connection=shop.redis).enqueue(len, "abc", depends_on=second.id)
    SimpleWorker(["default"], connection=shop.redis).work(burst=True, max_jobs=1, logging_level="ERROR")
    assert len(runs) == 2


# How long a job may take.


def test_what_a_long_job_has_not_begun_goes_back_to_the_front_in_smaller_jobs(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowkit.dispatch.LONGEST_JOB", 0.2)
    runs = log_runs(shop, lambda payload, message: time.sleep(0.08 if payload < 4 else 0))
    shop.app.routes["orders"].job_seconds = 0.02
    shop.app.routes["orders"].job_size = 10
    shop.enqueue("orders", *numbers(12))
    assert [len(job.args[3]) for job in shop.jobs()] == [10, 2]
    SimpleWorker(["default"], connection=shop.redis).work(burst=True, max_jobs=1, logging_level="ERROR")
    begun = len(runs)
    assert begun in (3, 4)
    rest = shop.jobs()
    assert offsets_of(rest) == list(range(begun, 12))
    assert [len(job.args[3]) for job in rest] == [1] * (10 - begun) + [2]
    shop.work()
    assert runs == [(number, 1) for number in range(12)]


def test_a_job_whose_rest_went_to_other_jobs_does_nothing_when_it_is_run_once_more(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker was killed before RQ knew that it was done."""
    monkeypatch.setattr("flowkit.dispatch.LONGEST_JOB", 0.1)
    runs = log_runs(shop, lambda payload, message: time.sleep(0.03))
    shop.app.routes["orders"].job_seconds = 0.01
    (job,) = shop.enqueue("orders", *numbers(9))
    SimpleWorker(["default"], connection=shop.redis).work(burst=True, max_jobs=1, logging_level="ERROR")
    assert 0 < len(runs) < 9
    kill_worker_of(shop, job)
    shop.bring_due()
    shop.work()
    assert sorted(runs) == [(number, 1) for number in range(9)]


def test_slow_hooks_of_failing_messages_count_as_work_of_the_job(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a job of many failures would outlive its time-out, and what had been told would be told again."""
    monkeypatch.setattr("flowkit.dispatch.LONGEST_JOB", 0.2)
    told: list[int] = []

    def fail(payload: Any, message: Message) -> None:
        raise ValueError("no")

    @shop.app.after_failure("orders")
    def slow(error: Exception, message: Message) -> None:
        told.append(message.offset)
        time.sleep(0.06)

    log_runs(shop, fail)
    shop.app.routes["orders"].job_seconds = 0.02
    shop.enqueue("orders", *numbers(20))
    SimpleWorker(["default"], connection=shop.redis).work(burst=True, max_jobs=1, logging_level="ERROR")
    assert told == list(range(len(told)))
    assert len(told) <= 5
    assert offsets_of(shop.jobs()) == list(range(len(told), 20))


def test_a_job_may_take_as_long_as_its_packing_and_one_message_need(shop: Shop) -> None:
    log_runs(shop)
    shop.app.routes["orders"].job_timeout = 3
    shop.app.routes["orders"].job_seconds = 0.5
    made = make_jobs(
        "shop:app", shop.app.handling("orders"), "default", [an_entry("orders", n) for n in range(3)], size=2
    )
    assert [(job.messages, job.timeout) for job in made] == [(2, 8), (1, 3)]


def test_the_time_out_is_that_of_the_message_in_hand(shop: Shop) -> None:
    """Each takes less than the time-out, all together more; one takes longer, and fails alone."""

    def work(payload: Any, message: Message) -> None:
        time.sleep(2.0 if payload == 4 and message.attempt == 1 else 0.1)

    runs = log_runs(shop, work)
    shop.app.routes["orders"].job_timeout = 0.35
    shop.enqueue("orders", *numbers(7))
    before = signal.getsignal(signal.SIGALRM)
    shop.work_all()
    assert runs == [*((number, 1) for number in range(7)), (4, 2)]
    assert signal.getsignal(signal.SIGALRM) in (before, signal.SIG_DFL)


@pytest.mark.parametrize("fails", [False, True])
def test_a_note_that_takes_longer_than_the_time_out_breaks_nothing_off(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    note = Progress.note

    def slow(self: Progress, *args: Any, **more: Any) -> None:
        time.sleep(0.4)
        note(self, *args, **more)

    def work(payload: Any, message: Message) -> None:
        if fails and payload == 1 and message.attempt == 1:
            raise ValueError("no")

    monkeypatch.setattr(Progress, "note", slow)
    runs = log_runs(shop, work)
    shop.app.routes["orders"].job_timeout = 0.3
    shop.enqueue("orders", *numbers(3))
    shop.work_all()
    assert runs == [(0, 1), (1, 1), (2, 1), *([(1, 2)] if fails else [])]


# How large a job is.


def test_jobs_start_small_and_grow_while_all_are_busy(shop: Shop) -> None:
    log_runs(shop)
    handling = shop.app.handling("orders")
    sizes = Sizes()
    assert sizes.size(handling) == FIRST_SIZE
    sizes.grow(handling, busy=False)
    assert sizes.size(handling) == FIRST_SIZE
    sizes.grow(handling, busy=True)
    assert sizes.size(handling) == 2 * FIRST_SIZE
    for _ in range(20):
        sizes.grow(handling, busy=True)
    assert sizes.size(handling) == handling.job_size


@pytest.mark.parametrize(
    ("seconds", "expected"), [(1e-6, 5000), (0.0, 5000), (1e-3, 100), (0.03, 3), (0.1, 1), (1.0, 1), (60.0, 1)]
)
def test_a_job_holds_what_takes_job_seconds(shop: Shop, seconds: float, expected: int) -> None:
    log_runs(shop)
    handling = shop.app.handling("orders")
    assert fitting(seconds, handling) == expected
    sizes = Sizes()
    sizes.learn({"orders": f"{seconds * 7:.9f} 7.000".encode(), "other": b""})
    assert sizes.size(handling) == expected


def test_a_message_without_a_second_attempt_is_alone_unless_it_has_a_dead_letter(shop: Shop) -> None:
    shop.app.add_topic("orders", lambda payload: None, retry=1)
    shop.app.add_topic("mails", lambda payload: None, retry=1, dead_letter="dead")
    assert Sizes().size(shop.app.handling("orders")) == 1
    assert Sizes().size(shop.app.handling("mails")) == FIRST_SIZE


def test_workers_measure_and_the_consumer_learns(shop: Shop) -> None:
    runs = log_runs(shop, lambda payload, message: time.sleep(0.005))
    queue = shop.queue
    handling = shop.app.handling("orders")

    def put(first: int, count: int) -> list[int]:
        entries = [an_entry("orders", offset, value=b"1") for offset in range(first, first + count)]
        partition = Partition("orders", 0)
        before = queue.marks.read("g", [partition])[partition]
        queue.enqueue("g", [Pack(handling, "default", entries)], {partition: before}, {partition: first + count})
        return [len(job.args[3]) for job in shop.jobs()]

    jobs_module.Messages._warm = True
    assert put(0, 100) == [50, 50]
    shop.work()
    assert len(runs) == 100
    seconds, messages = (float(part) for part in (shop.redis.hget(paces_key("shop"), "orders") or b"").split())
    assert 0.005 <= seconds / messages < 0.02
    put(100, 1)
    shop.work()
    sizes = put(101, 100)
    assert 5 <= sizes[0] <= 20
    assert sum(sizes) == 100


@pytest.mark.parametrize("garbage", [b"", b"fast", b"1", b"1.0 0.000", b"nan nan", b"1.0 2.0 3.0", b"\xff \xfe"])
def test_what_others_wrote_in_the_place_of_a_measure_is_no_measure(shop: Shop, garbage: bytes) -> None:
    runs = log_runs(shop)
    shop.redis.hset(paces_key("shop"), "orders", garbage)
    sizes = Sizes()
    sizes.learn({"orders": garbage})
    assert sizes.size(shop.app.handling("orders")) == FIRST_SIZE
    shop.enqueue("orders", *numbers(3))
    jobs_module.Messages._warm = True
    shop.work()
    assert len(runs) == 3
    seconds, messages = (float(part) for part in (shop.redis.hget(paces_key("shop"), "orders") or b"").split())
    assert 0 < seconds / messages < 1


def test_what_is_measured_fades(shop: Shop) -> None:
    log_runs(shop)
    (job,) = shop.enqueue("orders", *numbers(2))
    progress = progress_of(shop, job)
    for _ in range(30):
        progress.note(0, took=Took(10.0, 10))
    for _ in range(30):
        progress.note(0, took=Took(0.001, 10))
    seconds, messages = (float(part) for part in (shop.redis.hget(paces_key("shop"), "orders") or b"").split())
    assert seconds / messages < 0.001


def test_what_warms_a_process_up_is_not_measured(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first message of each work horse imports and connects, which says nothing of the others."""
    key = paces_key("shop")

    def work(payload: Any, message: Message) -> None:
        if not jobs_module.Messages._warm:
            time.sleep(0.3)

    runs = log_runs(shop, work)
    monkeypatch.setattr(jobs_module.Messages, "_warm", False)
    shop.enqueue("orders", b"0")
    shop.work()
    assert runs == [(0, 1)]
    assert not shop.redis.exists(key)  # it may be slow or cold: a job of one message cannot tell
    monkeypatch.setattr(jobs_module.Messages, "_warm", False)
    shop.redis.delete("flowkit:marks:shop_orders")
    shop.enqueue("orders", *numbers(9), queue="other")
    shop.work("other")
    seconds, messages = (float(part) for part in (shop.redis.hget(key, "orders") or b"").split())
    assert messages == 8
    assert seconds < 0.1
    shop.redis.hset(key, "orders", "10.0 1.0")  # ten seconds: it may be fast by now
    monkeypatch.setattr(jobs_module.Messages, "_warm", False)
    shop.redis.delete("flowkit:marks:shop_orders")
    shop.enqueue("orders", b"0", queue="third")
    shop.work("third")
    assert (shop.redis.hget(key, "orders") or b"").startswith(b"7.3")  # 0.7 of it, and what is known at most


def test_large_messages_make_small_jobs(shop: Shop) -> None:
    log_runs(shop)
    handling = shop.app.handling("orders")
    entries = [an_entry("orders", offset, value=b"x" * (MOST_BYTES // 3)) for offset in range(7)]
    assert len(make_jobs("shop:app", handling, "default", entries, size=100)) == 4
    entries.append(an_entry("orders", 7, value=b"x" * (2 * MOST_BYTES)))
    made = make_jobs("shop:app", handling, "default", entries, size=100)
    assert [entry[2] for job in made for entry in job.args[3]] == list(range(8))
    assert all(len(job.data) <= MOST_BYTES or job.messages == 1 for job in made)


def test_jobs_put_in_front_stay_in_order(shop: Shop) -> None:
    log_runs(shop)
    (last,) = shop.enqueue("orders", b"9")
    handling = shop.app.handling("orders")
    entries = [an_entry("orders", offset) for offset in range(3)]
    made = make_jobs(shop.app.reference, handling, "default", entries, size=1, place=FRONT)
    progress_of(shop, last).note(0, made[::-1])
    assert Queue("default", connection=shop.redis).job_ids == [*(job.id for job in made), last.id]


def test_a_retry_that_is_due_later_is_scheduled(shop: Shop) -> None:
    log_runs(shop)
    shop.app.routes["orders"].retry = Retry(attempts=2, first=5, jitter=0)
    (job,) = shop.enqueue("orders", b"1")
    due = time.time() + 5
    made = make_jobs(
        shop.app.reference, shop.app.handling("orders"), "default", [an_entry("orders", 1)], size=1, place=str(due)
    )
    progress_of(shop, job).note(0, made)
    (found,) = shop.scheduled()
    assert found.get_status() == "scheduled"
    registry = Queue("default", connection=shop.redis).scheduled_job_registry
    assert registry.get_scheduled_time(found).timestamp() == pytest.approx(due, abs=1)


def test_a_writer_asks_rq_once(shop: Shop) -> None:
    queue: JobQueue = shop.queue
    assert queue.writer.shared is queue.writer.shared
