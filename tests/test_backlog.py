"""What is in the queues, counted on a real Redis."""

from __future__ import annotations

import time

import pytest
from redis import Redis
from rq import Queue, SimpleWorker
from support import an_entry, make_app, put_jobs

from flowkit import Flowkit, SettingsError, backlog
from flowkit.backlog import Backlog, Count
from flowkit.queues import Envelope, queues_key

NONE = Count(0, 0)


@pytest.fixture
def app(redis_url: str) -> Flowkit:
    app = make_app(inline=False, redis=redis_url)
    app.add_topic("orders-2024.eu_west", print)
    app.add_topic("mails", print, queue="mail")
    app.reference = "support:app"
    return app


def put(app: Flowkit, redis: Redis, topic: str, messages: int) -> str:
    """Queues one job of so many messages as the consumer does, and gives its id."""
    (job_id,) = put_jobs(redis, app, topic, [an_entry(topic, offset) for offset in range(messages)])
    return job_id


def test_queues_without_jobs_are_shown_too(app: Flowkit, redis: Redis) -> None:
    assert backlog.backlog(app) == [
        Backlog("default", NONE, NONE, NONE, NONE),
        Backlog("mail", NONE, NONE, NONE, NONE),
    ]


def test_messages_are_counted_and_not_only_jobs(app: Flowkit, redis: Redis) -> None:
    for count in (100, 1, 7):
        put(app, redis, "orders-2024.eu_west", count)
    put(app, redis, "mails", 3)
    default, mail = backlog.backlog(app)
    assert default.waiting == Count(jobs=3, messages=108)
    assert default.messages == 108
    assert mail.waiting == Count(1, 3)


def test_a_job_of_somebody_else_is_a_job_without_messages(app: Flowkit, redis: Redis) -> None:
    queue = Queue("default", connection=redis)
    queue.enqueue("os.getpid")
    queue.enqueue("os.getpid", job_id="nightly-2024-11-24-cafebabe0")
    assert backlog.backlog(app)[0].waiting == Count(2, 0)


def test_jobs_in_the_hand_of_a_worker_scheduled_and_failed_ones_are_told_apart(app: Flowkit, redis: Redis) -> None:
    queue = Queue("default", connection=redis, serializer=Envelope)
    due = str(time.time() + 3600)
    put_jobs(redis, app, "orders-2024.eu_west", [an_entry("orders-2024.eu_west", 7)], place=due)
    job_id = put(app, redis, "orders-2024.eu_west", 5)
    worker = SimpleWorker([queue], connection=redis, serializer=Envelope)
    job = queue.fetch_job(job_id)
    assert job is not None
    redis.lmove(queue.key, queue.intermediate_queue_key)
    assert backlog.backlog(app)[0] == Backlog("default", Count(1, 5), NONE, Count(1, 1), NONE)
    execution = worker.prepare_execution(job)
    worker.prepare_job_execution(job, remove_from_intermediate_queue=True)
    assert backlog.backlog(app)[0] == Backlog("default", NONE, Count(1, 5), Count(1, 1), NONE)
    assert backlog.backlog(app)[0].messages == 6
    job.retries_left = 0
    worker.handle_job_failure(job, queue, exc_string="broken", execution=execution)
    assert backlog.backlog(app)[0] == Backlog("default", NONE, NONE, Count(1, 1), Count(1, 5))
    assert backlog.backlog(app)[0].messages == 1


def test_queues_that_hooks_chose_are_among_them(app: Flowkit, redis: Redis) -> None:
    redis.sadd(queues_key("shop"), "rq:queue:express")
    assert [row.queue for row in backlog.backlog(app)] == ["default", "express", "mail"]


def test_long_queues_are_read_in_pages(app: Flowkit, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "PAGE", 2)
    for _ in range(5):
        put(app, redis, "mails", 2)
    assert backlog.backlog(app)[1].waiting == Count(5, 10)


def test_without_the_redis_setting_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLOWKIT_REDIS", raising=False)
    app = make_app(inline=False, kafka={"hosts": "127.0.0.1:1"})
    app.add_topic("orders", print)
    with pytest.raises(SettingsError, match="redis: is required by queued routes"):
        backlog.backlog(app)
