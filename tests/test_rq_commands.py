"""The commands that RQ comes with, and rq-dashboard, on jobs of flowkit: each test runs those very commands."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import NOBODY, Done, command
from processes import APPS, BIN, Process
from redis import Redis
from rq import Queue
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry
from servers import WaitFor
from support import messages_of

from flowkit.clients.memory import Broker
from flowkit.consumer import Consumer
from flowkit.devstack import free_port
from flowkit.jobqueue import JobQueue
from flowkit.locate import locate

TOPIC = "shop.orders"
DESCRIPTIONS = [
    "shop.orders[0]@0 to [0]@4, 5 messages",
    "shop.orders[0]@5 to [1]@1, 5 messages",
    "shop.orders[1]@2 to [1]@3, 2 messages",
]
IDS = [r"shop_dorders-0-0-5-[0-9a-f]{8}", r"shop_dorders-0-5-5-[0-9a-f]{8}", r"shop_dorders-1-2-2-[0-9a-f]{8}"]


class Shop:
    """The application ``apps/rq_shop.py`` with a consumer that queues into a real Redis, and a Kafka in memory."""

    def __init__(self, redis: Redis, url: str, logs: Path) -> None:
        self.redis = redis
        self.url = url
        self.logs = logs
        self.env = {"FLOWKIT_REDIS": url, "FLOWKIT_KAFKA_HOSTS": NOBODY}
        app = locate("rq_shop:app", APPS)
        app.start()
        broker = Broker()
        broker.create(TOPIC, 2)
        self.broker = broker
        queue = JobQueue(url, app.settings.name, app.reference)
        handlings = app.handlings
        group = handlings[TOPIC].group
        self.consumer = Consumer(group, handlings, app.settings, app.events, app.producer, broker.consumer, queue)
        self.queue = Queue(connection=redis)

    def put(self, *orders: int, partition: int = 0) -> None:
        for order in orders:
            self.broker.append(TOPIC, b"%d" % order, partition=partition)

    def consume(self) -> list[str]:
        """What was put is queued and committed; gives the ids of the jobs in the queue."""
        self.consumer.turn()
        self.consumer.commit()
        return self.queue.job_ids

    def put_twelve(self) -> list[str]:
        """Twelve messages of two partitions are queued, as three jobs."""
        self.put(*range(8))
        self.put(*range(8, 12), partition=1)
        return self.consume()

    def rq(self, *arguments: str) -> Done:
        """An ``rq`` command that ends by itself; anything but exit code 0 is a failure."""
        done = command(str(BIN / "rq"), arguments[0], "--url", self.url, *arguments[1:], env=self.env)
        assert done.code == 0, done
        return done

    def start(self, *arguments: str, **env: str) -> Process:
        return Process(*arguments, env={**self.env, **env}, log=self.logs / arguments[0])

    def fail(self, wait_for: WaitFor) -> Job:
        """Three messages, the second of which fails every attempt under a plain ``rq worker``; gives its job."""
        self.redis.sadd("broken", 1)
        self.put(0, 1, 2)
        self.consume()
        with self.start("rq", "worker", "--url", self.url, "--with-scheduler") as worker:
            wait_for(lambda: len(self.failed) == 1, what="the failed job")
            assert worker.stop() == 0
        assert self.billed == [0, 2]
        return Job.fetch(self.failed[0], connection=self.redis)

    @property
    def failed(self) -> list[str]:
        return FailedJobRegistry(connection=self.redis).get_job_ids()

    @property
    def billed(self) -> list[int]:
        items: Any = self.redis.lrange("billed", 0, -1)
        return [int(item) for item in items]


@pytest.fixture
def shop(redis: Redis, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setenv("FLOWKIT_REDIS", redis_url)
    monkeypatch.setenv("FLOWKIT_KAFKA_HOSTS", NOBODY)  # nothing is sent there
    monkeypatch.syspath_prepend(APPS)
    monkeypatch.delitem(sys.modules, "rq_shop", raising=False)
    shop = Shop(redis, redis_url, tmp_path)
    yield shop
    shop.consumer._drop_client(0.1)
    shop.consumer.producer.close(0.1)


# What is in a job.


def test_id_and_description_say_what_is_in_a_job(shop: Shop) -> None:
    ids = shop.put_twelve()
    assert all(re.fullmatch(pattern, id_) for pattern, id_ in zip(IDS, ids, strict=True)), ids
    jobs = [Job.fetch(id_, connection=shop.redis) for id_ in ids]
    assert [job.description for job in jobs] == DESCRIPTIONS
    contents = [messages_of(job.data) for job in jobs]
    assert contents[0] == [(0, offset) for offset in range(5)]
    assert contents[1] == [(0, 5), (0, 6), (0, 7), (1, 0), (1, 1)]
    assert contents[2] == [(1, 2), (1, 3)]
    assert [job.get_status() for job in jobs] == [JobStatus.QUEUED] * 3
    assert {job.func_name for job in jobs} == {"flowkit.jobs.perform"}


# rq info.


def test_rq_info_counts_our_jobs(shop: Shop) -> None:
    shop.put_twelve()
    lines = shop.rq("info").out.splitlines()
    assert re.fullmatch(r"default +\|█+ 3, 0 executing, 0 finished, 0 failed", lines[0])
    assert lines[1] == "1 queues, 3 jobs total"
    assert shop.rq("info", "--raw").out.splitlines() == ["queue default 3, 0 executing, 0 finished, 0 failed"]
    assert shop.rq("info", "--only-queues", "default").out.splitlines()[1] == "1 queues, 3 jobs total"


def test_rq_info_shows_a_worker_at_a_job_of_ours(shop: Shop, wait_for: WaitFor) -> None:
    shop.redis.sadd("slow", 6)
    shop.put_twelve()
    with shop.start("rq", "worker", "--url", shop.url) as worker:
        wait_for(lambda: shop.billed[-1:] == [5], what="the message before the slow one")
        info = shop.rq("info", "--raw").out.splitlines()
        assert info[0] == "queue default 1, 1 executing, 1 finished, 0 failed"
        assert re.fullmatch(rf"worker \S+ \(.* {worker.pid}\) busy default\. jobs: 1 finished, 0 failed", info[1])
        by_queue = shop.rq("info", "--by-queue").out
        assert re.search(r"^default: \S+ \(busy\)$", by_queue, re.M)
        assert "1 workers, 1 queues" in by_queue
        shop.redis.rpush("gate", "open")
        wait_for(lambda: len(shop.billed) == 12)
        ended = re.compile("queue default 0, 0 executing, [3-6] finished")  # a slow machine divides the slow job
        wait_for(lambda: ended.search(shop.rq("info", "--raw").out), what="the end of the last job")
        assert worker.stop() == 0


# rq worker.


@pytest.mark.parametrize("name", ["worker", "worker-pool"])
def test_a_burst_does_all_and_leaves_the_queue_empty(shop: Shop, name: str) -> None:
    ids = shop.put_twelve()
    workers = ("--num-workers", "2") if name == "worker-pool" else ()
    shop.rq(name, "--burst", *workers, "default")
    assert sorted(shop.billed) == list(range(12))
    assert shop.queue.job_ids == []
    assert {Job.fetch(id_, connection=shop.redis).get_status() for id_ in ids} == {JobStatus.FINISHED}
    assert "queue default 0, 0 executing, 3 finished, 0 failed" in shop.rq("info", "--raw").out


def test_the_log_of_rq_worker_names_the_messages(shop: Shop) -> None:
    ids = shop.put_twelve()
    said = shop.rq("worker", "--burst").out
    for id_, description in zip(ids, DESCRIPTIONS, strict=True):
        assert f"default: {description} ({id_})" in said
        assert f"Job OK ({id_})" in said


# Failed jobs, and rq requeue.


def test_what_fails_all_its_attempts_is_among_the_failed_jobs_alone(shop: Shop, wait_for: WaitFor) -> None:
    job = shop.fail(wait_for)
    assert job.description == "shop.orders[0]@1"
    assert re.fullmatch(r"shop_dorders-0-1-1-[0-9a-f]{8}", job.id)
    assert job.get_status() == JobStatus.FAILED
    result = job.latest_result()
    assert result is not None
    assert result.exc_string is not None
    assert result.exc_string.rstrip().endswith("ValueError: order 1 is broken")
    assert 'rq_shop.py"' in result.exc_string
    assert "queue default 0, 0 executing, 1 finished, 1 failed" in shop.rq("info", "--raw").out


@pytest.mark.parametrize("which", ["all of them", "by its id"])
def test_rq_requeue_runs_a_failed_message_again(shop: Shop, wait_for: WaitFor, which: str) -> None:
    job = shop.fail(wait_for)
    requeue = ("requeue", "--queue", "default", "--all" if which == "all of them" else job.id)
    # Given that its cause is still there, it is back among the failed ones
    assert "Requeueing 1 jobs from failed queue" in shop.rq(*requeue).out
    assert shop.queue.job_ids == [job.id]
    assert shop.failed == []
    shop.rq("worker", "--burst")
    assert (shop.failed, shop.billed) == ([job.id], [0, 2])
    # When it is mended, then the message is handled, and no other
    shop.redis.srem("broken", 1)
    assert "Requeueing 1 jobs from failed queue" in shop.rq(*requeue).out
    shop.rq("worker", "--burst")
    assert (shop.failed, shop.queue.job_ids, shop.billed) == ([], [], [0, 2, 1])
    assert job.get_status(refresh=True) == JobStatus.FINISHED
    assert "Nothing to do" in shop.rq("requeue", "--queue", "default", "--all").out


# rq empty, suspend and resume.


def test_what_rq_empty_removed_does_not_come_again(shop: Shop) -> None:
    ids = shop.put_twelve()
    assert shop.rq("empty", "default").out == "3 jobs removed from default queue\n"
    assert not any(Job.exists(id_, connection=shop.redis) for id_ in ids)
    assert "queue default 0, 0 executing, 0 finished, 0 failed" in shop.rq("info", "--raw").out
    # When more messages come, then only they are queued
    shop.put(12, 13)
    shop.consume()
    shop.rq("worker", "--burst")
    assert shop.billed == [12, 13]


@pytest.mark.parametrize("worker", [("rq", "worker"), ("flowkit", "worker", "rq_shop:app")], ids=" ".join)
def test_rq_suspend_holds_every_worker_until_rq_resume(
    shop: Shop, worker: tuple[str, ...], wait_for: WaitFor
) -> None:
    shop.redis.sadd("slow", 0)
    ids = shop.put_twelve()
    url = ("--url", shop.url) if worker[0] == "rq" else ()
    # a job may take long: else the rest of one whose first message waits goes back to the queue
    with shop.start(*worker, *url, FLOWKIT_JOB_SECONDS="30") as process:
        wait_for(lambda: len(shop.queue.job_ids) == 2, what="the first job to be taken")
        assert "Suspending workers" in shop.rq("suspend").out
        shop.redis.rpush("gate", "open")
        # What it has in hand is finished, and no other job is begun
        wait_for(lambda: "suspended default" in shop.rq("info", "--raw").out, what="a worker that is suspended")
        assert shop.billed == list(range(5))
        assert shop.queue.job_ids == ids[1:]
        assert "Resuming workers" in shop.rq("resume").out
        wait_for(lambda: len(shop.billed) == 12, what="every message")
        assert process.stop() == 0
    assert shop.queue.job_ids == []


# rq-dashboard.


class Dashboard:
    """The page of rq-dashboard, in a process of its own."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def page(self, path: str) -> str:
        with urllib.request.urlopen(self.address + path, timeout=20) as answer:
            return str(answer.read().decode())

    def get(self, path: str) -> Any:
        return json.loads(self.page(path))

    def post(self, path: str) -> Any:
        request = urllib.request.Request(self.address + path, data=b"", method="POST")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def jobs(self, registry: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get(f"/0/data/jobs/default/{registry}/8/asc/1.json")["jobs"]
        return found


@pytest.fixture
def dashboard(shop: Shop, wait_for: WaitFor) -> Iterator[Dashboard]:
    port = free_port()
    address = ("--bind", "127.0.0.1", "--port", str(port), "--redis-url", shop.url)
    found = Dashboard(port)

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return bool(found.page("/0/data/queues.json"))
        return False

    with shop.start("rq-dashboard", *address) as process:
        wait_for(lambda: process.popen.poll() is not None or answers(), what="rq-dashboard")
        assert process.popen.poll() is None, process.output
        yield found


def test_the_dashboard_shows_queue_and_jobs_with_what_is_in_them(shop: Shop, dashboard: Dashboard) -> None:
    ids = shop.put_twelve()
    (queue,) = dashboard.get("/0/data/queues.json")["queues"]
    assert (queue["name"], queue["count"], queue["failed_job_registry_count"]) == ("default", 3, 0)
    jobs = dashboard.jobs("queued")
    assert [job["id"] for job in jobs] == ids
    assert [job["description"] for job in jobs] == DESCRIPTIONS
    job = dashboard.get(f"/0/data/job/{ids[1]}.json")
    assert (job["description"], job["origin"], job["status"]) == (DESCRIPTIONS[1], "default", "queued")
    assert job["created_at"]
    assert job["enqueued_at"]
    # Its pages ask for these when they are in a browser
    assert "RQ dashboard" in dashboard.page("/")
    assert "default" in dashboard.page("/0/view/jobs/default/queued/8/asc/1")
    assert ids[1] in dashboard.page(f"/0/view/job/{ids[1]}")


def test_the_dashboard_shows_what_a_worker_has_in_hand(shop: Shop, dashboard: Dashboard, wait_for: WaitFor) -> None:
    shop.redis.sadd("slow", 0)
    ids = shop.put_twelve()
    with shop.start("rq", "worker", "--url", shop.url) as process:
        wait_for(lambda: len(shop.queue.job_ids) == 2, what="the first job to be taken")
        (worker,) = wait_for(
            lambda: [w for w in dashboard.get("/0/data/workers.json")["workers"] if w["current_job"] != "idle"]
        )
        assert worker["current_job"]["job_id"] == ids[0]
        assert worker["current_job"]["description"] == DESCRIPTIONS[0]
        assert worker["current_job"]["call_string"].startswith("flowkit.jobs.perform(")
        assert [job["id"] for job in dashboard.jobs("started")] == [ids[0]]
        shop.redis.rpush("gate", "open")
        wait_for(lambda: len(shop.billed) == 12)
        assert process.stop() == 0
    assert sorted(job["id"] for job in dashboard.jobs("finished")) == sorted(ids)


@pytest.mark.parametrize("button", ["/job/{id}/requeue", "/requeue/default"], ids=["one", "all"])
def test_the_dashboard_puts_a_failed_message_back(
    shop: Shop, dashboard: Dashboard, wait_for: WaitFor, button: str
) -> None:
    failed = shop.fail(wait_for)
    (queue,) = dashboard.get("/0/data/queues.json")["queues"]
    assert (queue["count"], queue["failed_job_registry_count"]) == (0, 1)
    (job,) = dashboard.jobs("failed")
    assert (job["id"], job["description"]) == (failed.id, "shop.orders[0]@1")
    assert job["exc_info"].rstrip().endswith("ValueError: order 1 is broken")
    shop.redis.srem("broken", 1)
    assert dashboard.post(button.format(id=failed.id))["status"] == "OK"
    assert dashboard.jobs("failed") == []
    assert [job["id"] for job in dashboard.jobs("queued")] == [failed.id]
    shop.rq("worker", "--burst")
    assert shop.billed == [0, 2, 1]
    assert dashboard.jobs("failed") == []
    assert failed.id in [job["id"] for job in dashboard.jobs("finished")]


def test_the_dashboard_deletes_a_job_of_ours_and_empties_our_queue(shop: Shop, dashboard: Dashboard) -> None:
    ids = shop.put_twelve()
    assert dashboard.post(f"/job/{ids[0]}/delete") == {"status": "OK"}
    assert [job["id"] for job in dashboard.jobs("queued")] == ids[1:]
    assert dashboard.post("/queue/default/queued/empty") == {"status": "OK"}
    assert dashboard.jobs("queued") == []
    assert not any(Job.exists(id_, connection=shop.redis) for id_ in ids)
