"""Due retries go back to their queues, and so do the jobs of dead workers: once, whoever looks after them."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import NOBODY
from processes import Process
from redis import Redis
from rq import Queue, Retry, SimpleWorker, Webhook, Worker
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry, ScheduledJobRegistry
from rq.scheduler import RQScheduler
from servers import RedisServer, WaitFor
from support import an_entry, make_app, put_jobs

from flowkit import jobs
from flowkit import upkeep as module
from flowkit.queues import PERFORM, RUNS, Envelope, queues_key
from flowkit.upkeep import Upkeep
from flowkit.worker import Worker as FlowkitWorker


class Background:
    """The queue ``default`` of the application ``shop``."""

    def __init__(self, redis: Redis, url: str) -> None:
        self.redis = redis
        self.url = url
        self.queue = Queue("default", connection=redis, serializer=Envelope)
        self.scheduled = ScheduledJobRegistry(queue=self.queue)
        self.failed = FailedJobRegistry(queue=self.queue)
        redis.sadd(queues_key("shop"), self.queue.key)
        self.upkeeps: list[Upkeep] = []

    def upkeep(self) -> Upkeep:
        made = Upkeep(self.url, "shop")
        self.upkeeps.append(made)
        return made

    def job(self, retry: Retry | None = RUNS) -> Job:
        return self.queue.enqueue(PERFORM, "shop:app", "orders", 1, [], retry=retry, description="x")

    def due(self, seconds: float = -1) -> Job:
        """A job whose retry is due so many seconds from now."""
        job = self.job()
        self.redis.lrem(self.queue.key, 1, job.id)
        job.set_status(JobStatus.SCHEDULED)
        self.redis.zadd(self.scheduled.key, {job.id: int(self.redis.time()[0] + seconds)})
        return job

    def abandoned(self, retry: Retry | None = RUNS) -> Job:
        """A job whose worker died in the middle of it, and some time ago."""
        job = self.job(retry)
        worker = SimpleWorker([self.queue], connection=self.redis, serializer=Envelope)
        self.redis.lmove(self.queue.key, self.queue.intermediate_queue_key)
        worker.prepare_execution(job)
        worker.prepare_job_execution(job, remove_from_intermediate_queue=True)
        self.expire(1)
        return job

    def expire(self, when: float) -> None:
        """Sets when the heartbeats of the running jobs run out."""
        key = self.queue.started_job_registry.key
        members: Any = self.redis.zrange(key, 0, -1)
        self.redis.zadd(key, dict.fromkeys(members, when))

    def stuck(self) -> Job:
        """A job whose worker died when it had taken it from the queue and not begun it."""
        job = self.job()
        self.redis.lmove(self.queue.key, self.queue.intermediate_queue_key)
        return job

    def clean(self, upkeep: Upkeep) -> None:
        upkeep._clean_at = 0.0
        upkeep.turn()


@pytest.fixture
def background(redis: Redis, redis_url: str) -> Iterator[Background]:
    found = Background(redis, redis_url)
    yield found
    for made in found.upkeeps:
        made.stop()
        if made.is_alive():
            made.join(10)
        made.close()


def test_due_retries_go_back_and_others_wait(background: Background) -> None:
    due, later = background.due(-1), background.due(60)
    background.upkeep().turn()
    assert background.queue.job_ids == [due.id]
    assert Job.fetch(due.id, connection=background.redis).get_status() == "queued"
    assert background.scheduled.get_job_ids() == [later.id]


def test_a_due_job_that_cannot_be_read_keeps_no_other_one(
    background: Background, caplog: pytest.LogCaptureFixture
) -> None:
    """Its heartbeat may be all that is left of it: RQ writes one into a hash that has run out, and makes a new one."""
    beaten, dated, typed, fine, gone = (background.due() for _ in range(5))
    background.redis.delete(beaten.key, typed.key, gone.key)
    background.redis.hset(beaten.key, "last_heartbeat", "2026-01-01T00:00:00Z")
    background.redis.hset(dated.key, "created_at", "some day")
    background.redis.set(typed.key, "no hash")
    upkeep = background.upkeep()
    upkeep.turn()
    assert background.queue.job_ids == [fine.id]
    assert background.scheduled.get_job_ids() == []
    assert background.redis.exists(beaten.key, dated.key, typed.key) == 3
    told = [
        record.getMessage() for record in caplog.records if "cannot be read, and is tried no more" in record.message
    ]
    assert len(told) == 3
    for job in (beaten, dated, typed):
        assert sum(job.key in line for line in told) == 1

    later = background.due()
    upkeep.turn()
    assert background.queue.job_ids == [fine.id, later.id]
    assert len(caplog.records) == 3


def test_jobs_of_dead_workers_come_back(background: Background) -> None:
    job = background.abandoned()
    background.upkeep().turn()
    assert background.scheduled.get_job_ids() == [job.id]
    assert background.redis.zcard(background.queue.started_job_registry.key) == 0
    fetched = Job.fetch(job.id, connection=background.redis)
    assert (fetched.get_status(), fetched.retries_left) == ("scheduled", RUNS.max - 1)


@pytest.mark.parametrize("retry", [RUNS, None])
def test_it_calls_nobody_back(background: Background, monkeypatch: pytest.MonkeyPatch, retry: Retry | None) -> None:
    called: list[Any] = []
    monkeypatch.setattr(module, "call", lambda *arguments: called.append(arguments), raising=False)
    monkeypatch.setattr(module, "TAKEN", 0.0)
    found = [background.abandoned(retry), background.stuck()]
    for job in found:
        background.redis.hset(job.key, "failure_callback_name", "flowkit.upkeep.call")
        hook = Webhook("http://127.0.0.1:1/", "failed")
        background.redis.hset(job.key, "webhooks", json.dumps([hook.to_dict()]))
    monkeypatch.setattr(Webhook, "send", lambda *arguments, **options: called.append(arguments))
    background.upkeep().turn()
    assert called == []
    back = {*background.scheduled.get_job_ids(), *background.failed.get_job_ids(), *background.queue.job_ids}
    assert {job.id for job in found} == back


def test_a_running_job_is_left_alone(background: Background) -> None:
    job = background.abandoned()
    background.expire(1e12)
    background.upkeep().turn()
    assert background.scheduled.get_job_ids() == []
    assert Job.fetch(job.id, connection=background.redis).get_status() == "started"


def test_a_job_that_was_taken_and_not_begun_comes_back(
    background: Background, monkeypatch: pytest.MonkeyPatch, wait_for: WaitFor
) -> None:
    monkeypatch.setattr(module, "TAKEN", 0.3)
    upkeep = background.upkeep()
    waiting = background.job()
    job = background.stuck()  # the first one in the queue
    taken, waiting = waiting, job
    background.clean(upkeep)
    assert background.queue.job_ids == [waiting.id]  # it may be begun in this moment

    def back() -> bool:
        background.clean(upkeep)
        return background.queue.job_ids == [taken.id, waiting.id]  # where it was

    wait_for(back, 10, "the job to be back")
    assert background.queue.intermediate_queue.get_job_ids() == []
    fetched = Job.fetch(taken.id, connection=background.redis)
    assert (fetched.get_status(), fetched.retries_left) == ("queued", RUNS.max)  # that was no run of it


@pytest.mark.parametrize("status", ["finished", "failed", "scheduled", "queued"])
def test_an_entry_that_a_killed_worker_left_of_a_job_that_came_back_otherwise_is_removed(
    background: Background, status: str
) -> None:
    """RQ removes one of two entries; the other one is no job that waits."""
    job = background.stuck()
    background.redis.hset(job.key, "status", status)
    if status == "queued":
        background.redis.rpush(background.queue.key, job.id)
    before = background.queue.job_ids
    background.clean(background.upkeep())
    assert background.queue.job_ids == before
    assert background.queue.intermediate_queue.get_job_ids() == []


def test_a_job_that_is_taken_time_and_again_is_left_alone(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ remembers for a day that it has seen a job between the lists, and would put it back though it was taken just now."""
    monkeypatch.setattr(module, "TAKEN", 0.0)
    upkeep = background.upkeep()
    job = background.stuck()
    background.redis.set(background.queue.intermediate_queue.get_first_seen_key(job.id), 1)
    monkeypatch.setattr(module, "TAKEN", 100.0)
    background.clean(upkeep)
    background.clean(upkeep)
    assert background.queue.job_ids == []


def test_a_taken_job_is_not_begun_by_a_worker_that_stood_still_until_it_was_put_back(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TAKEN", 0.0)
    runs: list[str] = []
    monkeypatch.setattr(jobs, "perform", lambda *arguments: runs.append(arguments[1]))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    background.job()
    worker = FlowkitWorker(["default"], connection=background.redis, serializer=Envelope)
    prepare = worker.prepare_execution

    def stand_still(job: Job) -> Any:
        if not runs and background.queue.count == 0:
            background.clean(background.upkeep())
            assert background.queue.job_ids == [job.id]
            background.redis.set("stood", 1)
            monkeypatch.setattr(worker, "prepare_execution", prepare)
        return prepare(job)

    monkeypatch.setattr(worker, "prepare_execution", stand_still)
    worker.work(burst=True, logging_level="CRITICAL")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert background.redis.get("stood") == b"1"
    assert runs == ["orders"]


def test_its_waits_stay_bounded(background: Background) -> None:
    upkeep = background.upkeep()
    upkeep.turn()
    assert upkeep.redis.connection_pool.connection_kwargs["socket_timeout"] == 15


def test_two_of_them_put_nothing_back_twice(background: Background) -> None:
    due = [background.due() for _ in range(20)]
    jobs = [background.abandoned(Retry(max=1, interval=0)) for _ in range(20)]  # would go back to the queue at once
    barrier = threading.Barrier(4)

    def work(upkeep: Upkeep) -> None:
        barrier.wait(10)
        for _ in range(3):
            upkeep._clean_at = 0.0
            upkeep.turn()

    threads = [threading.Thread(target=work, args=(background.upkeep(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(background.queue.job_ids) == sorted(job.id for job in [*due, *jobs])


def test_the_next_one_takes_over_when_one_ends(background: Background) -> None:
    first, second = background.upkeep(), background.upkeep()
    first.turn()
    due = background.due()
    second.turn()
    assert background.queue.job_ids == []
    first.close()
    second.turn()
    assert background.queue.job_ids == [due.id]


def test_another_one_takes_over_within_a_minute_when_one_is_killed(background: Background) -> None:
    killed, other = background.upkeep(), background.upkeep()
    killed.turn()
    background.upkeeps.remove(killed)  # and from here on it does nothing more
    due = background.due()
    other.turn()
    assert background.queue.job_ids == []
    lock = RQScheduler.get_locking_key("default")
    assert 0 < background.redis.pttl(lock) <= module.LOCK * 1000 < 60_000
    background.redis.pexpire(lock, 1)  # as it does by itself then
    while background.redis.exists(lock):
        pass
    other.turn()
    assert background.queue.job_ids == [due.id]
    killed.redis.close()


def test_it_does_nothing_with_a_lock_that_it_has_lost(background: Background) -> None:
    """A process that stood still, and whose lock another one has by now, must not put a job back that the other one does."""
    stood_still = background.upkeep()
    stood_still.turn()
    background.redis.set(RQScheduler.get_locking_key("default"), "another")
    background.due()
    stood_still.turn()
    assert background.queue.job_ids == []


def test_jobs_of_dead_workers_come_back_where_rqs_own_scheduler_runs(background: Background) -> None:
    """`rq worker --with-scheduler` holds the lock on retries, and does not look for dead workers."""
    scheduler = RQScheduler(["default"], connection=background.redis)
    assert scheduler.acquire_locks() == {"default"}
    job = background.abandoned()
    background.upkeep().turn()
    assert background.scheduled.get_job_ids() == [job.id]
    scheduler.release_locks()


def test_it_keeps_out_of_the_way_of_rqs_own_cleaning(background: Background) -> None:
    background.abandoned()
    assert background.queue.acquire_maintenance_lock()
    upkeep = background.upkeep()
    upkeep.turn()
    assert background.scheduled.get_job_ids() == []
    background.queue.release_maintenance_lock()
    upkeep._clean_at = 0.0
    upkeep.turn()
    assert len(background.scheduled.get_job_ids()) == 1
    assert background.queue.acquire_maintenance_lock()  # it gave the lock back


def test_the_lock_of_an_rq_worker_that_was_killed_while_it_cleaned_does_not_hold_it_up_for_long(
    background: Background,
) -> None:
    job = background.abandoned()
    assert background.queue.acquire_maintenance_lock()
    upkeep = background.upkeep()
    upkeep.turn()
    assert background.scheduled.get_job_ids() == []
    lock = background.queue.registry_cleaning_key
    assert 0 < background.redis.pttl(lock) <= module.CLEAN_LOCK * 1000
    background.redis.pexpire(lock, 1)  # as it does by itself then
    while background.redis.exists(lock):
        pass
    background.clean(upkeep)
    assert background.scheduled.get_job_ids() == [job.id]


def test_a_failing_cleaning_does_not_keep_due_retries_waiting(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise ValueError("an entry that nobody understands")

    monkeypatch.setattr(Upkeep, "_clean", fail)
    due = background.due()
    with pytest.raises(ValueError, match="nobody understands"):
        background.upkeep().turn()
    assert background.queue.job_ids == [due.id]


def test_new_queues_are_looked_after_too(background: Background) -> None:
    upkeep = background.upkeep()
    upkeep.turn()
    background.redis.sadd(queues_key("shop"), "rq:queue:express")
    background.redis.sadd(queues_key("another"), "rq:queue:foreign")
    upkeep._clean_at = 0.0
    upkeep.turn()
    assert {key.decode() for key in background.redis.scan_iter("rq:scheduler-lock:*")} == {
        "rq:scheduler-lock:default",
        "rq:scheduler-lock:express",
    }


def test_an_application_without_queues_costs_nothing(redis: Redis, redis_url: str) -> None:
    upkeep = Upkeep(redis_url, "shop")
    upkeep.turn()
    upkeep.close()
    assert redis.keys() == []


def test_it_survives_a_redis_that_goes_away(
    tmp_path: Path, wait_for: WaitFor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "EVERY", 0.05)
    monkeypatch.setattr(module, "CLEAN_EVERY", 0.2)
    with RedisServer(tmp_path) as server, Redis.from_url(server.url) as redis:
        background = Background(redis, server.url)
        upkeep = background.upkeep()
        upkeep.start()
        first = background.due()
        wait_for(lambda: background.queue.job_ids == [first.id], 20, "the first retry")
        with caplog.at_level(logging.WARNING):
            server.stop()
            wait_for(lambda: "retries wait: Redis does not answer" in caplog.text, 20, "a word")
        server.start()
        second = background.due()
        wait_for(lambda: background.queue.job_ids == [first.id, second.id], 20, "the second retry")
        upkeep.stop()
        upkeep.join(10)
        assert not upkeep.is_alive()
        assert list(redis.scan_iter("rq:scheduler-lock:*")) == []


def test_rqs_own_worker_does_not_clean_while_it_does(background: Background) -> None:
    """The two share a lock, so a worker that starts in that moment leaves the job to us."""
    background.redis.set(background.queue.registry_cleaning_key, 1, ex=module.CLEAN_LOCK)
    background.abandoned()
    Worker([background.queue], connection=background.redis, serializer=Envelope).clean_registries()
    assert background.scheduled.get_job_ids() == []


# In production it says how this Redis may lose messages.


def test_a_redis_that_may_lose_messages_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer(tmp_path) as server, Redis.from_url(server.url) as redis:
        redis.config_set("maxmemory-policy", "allkeys-lru")
        redis.config_set("appendonly", "no")
        upkeep = Upkeep(server.url, "shop", check_redis=True)
        upkeep.turn()
        upkeep.turn()
        upkeep.close()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "Redis may throw queued messages away: its maxmemory-policy is allkeys-lru; set noeviction",
        "Redis loses queued messages when it is killed: set appendonly yes",
    ]


def test_a_durable_redis_is_not_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer(tmp_path) as server, Redis.from_url(server.url) as redis:
        redis.config_set("maxmemory-policy", "noeviction")
        redis.config_set("appendonly", "yes")
        assert module.weaknesses(redis) == []


def test_a_redis_that_does_not_tell_is_left_alone(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, Redis.from_url(server.url) as redis:
        redis.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "+@all", "-config")
        with Redis(port=server.port, username="app", password="pw") as limited:
            assert module.weaknesses(limited) == []


# A plain `rq worker` that is killed with the job in hand: RQ knows after 90 seconds at most.


class Plain:
    """`rq worker` on the application ``apps/steps.py``, and how soon its end may be noticed."""

    def __init__(self, background: Background, log: Path) -> None:
        self.background = background
        self.app = make_app(inline=False, redis=background.url)
        self.app.add_topic("steps", print)
        self.app.reference = "steps:app"
        self.log = log

    def put(self, do: str) -> str:
        entry = an_entry("steps", 0, value=json.dumps({"n": 0, "do": do}).encode())
        (job,) = put_jobs(self.background.redis, self.app, "steps", [entry])
        return job

    def start(self) -> Process:
        options = ("--url", self.background.url, "--job-monitoring-interval", "2")
        env = {"FLOWKIT_REDIS": self.background.url, "FLOWKIT_KAFKA_HOSTS": NOBODY}
        return Process("rq", "worker", *options, "default", env=env, log=self.log)

    @property
    def runs(self) -> int:
        count: Any = self.background.redis.llen("runs")
        return int(count)


@pytest.fixture
def plain(background: Background, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plain:
    assert (module.BEAT, module.LATE) == (30.0, 10.0)  # with the two looks, less than a minute
    assert module.BEAT + module.LATE + module.CLEAN_EVERY < 60
    monkeypatch.setattr(module, "BEAT", 2.0)
    monkeypatch.setattr(module, "LATE", 2.0)
    monkeypatch.setattr(module, "CLEAN_EVERY", 1.0)
    monkeypatch.setattr(module, "EVERY", 0.1)
    return Plain(background, tmp_path / "rq.log")


def test_the_job_of_a_killed_rq_worker_comes_back_before_rq_would_give_it_up(plain: Plain, wait_for: WaitFor) -> None:
    background = plain.background
    job = plain.put("wait")
    with plain.start() as worker:
        wait_for(lambda: plain.runs == 1, 40, "the job to run")
        worker.kill_with_children()
    ((_, until),) = background.redis.zrange(background.queue.started_job_registry.key, 0, -1, withscores=True)
    assert until - time.time() > 40
    background.upkeep().start()
    wait_for(lambda: background.queue.job_ids == [job], 30, "the job to be back")
    assert until - time.time() > 10
    assert Job.fetch(job, connection=background.redis).retries_left == RUNS.max - 1


def test_the_job_of_a_living_rq_worker_is_left_alone(plain: Plain, wait_for: WaitFor) -> None:
    background = plain.background
    job = plain.put("wait")
    with plain.start() as worker:
        wait_for(lambda: plain.runs == 1, 40, "the job to run")
        began = time.monotonic()
        background.upkeep().start()
        wait_for(lambda: time.monotonic() > began + 8, 20, "some looks")
        assert background.queue.started_job_registry.get_job_ids() == [job]
        background.redis.rpush("gate", "open")
        wait_for(lambda: Job.fetch(job, connection=background.redis).is_finished, 20, "the end of the job")
        assert worker.stop() == 0
    assert plain.runs == 1


def test_the_job_of_a_horse_that_outlives_its_rq_worker_is_left_alone(plain: Plain, wait_for: WaitFor) -> None:
    """The job is still being done, though nobody beats for it: its socket tells."""
    background = plain.background
    job = plain.put("wait")
    with plain.start() as worker:
        wait_for(lambda: plain.runs == 1, 40, "the job to run")
        (horse,) = worker.children()
        worker.kill()
        began = time.monotonic()
        background.upkeep().start()
        wait_for(lambda: time.monotonic() > began + 8, 20, "some looks")
        assert background.queue.started_job_registry.get_job_ids() == [job]
        background.redis.rpush("gate", "open")
        wait_for(lambda: Job.fetch(job, connection=background.redis).is_finished, 20, "the end of the job")
        wait_for(lambda: not Path(f"/proc/{horse}/cmdline").exists(), 20, "the end of the horse")
    assert plain.runs == 1


def test_a_worker_that_only_lost_its_ear_keeps_its_job(plain: Plain, wait_for: WaitFor) -> None:
    """RQ's thread that listens ends when connecting takes too long, and the worker goes on without; its heart beats."""
    background = plain.background
    job = plain.put("wait")
    with plain.start() as worker:
        wait_for(lambda: plain.runs == 1, 40, "the job to run")
        began = time.monotonic()
        background.upkeep().start()

        def deaf() -> bool:
            clients: Any = background.redis.client_list(_type="pubsub")
            for client in clients:
                background.redis.client_kill_filter(_id=client["id"])
            return time.monotonic() > began + 8

        wait_for(deaf, 20, "some looks")
        assert background.queue.started_job_registry.get_job_ids() == [job]
        background.redis.rpush("gate", "open")
        wait_for(lambda: Job.fetch(job, connection=background.redis).is_finished, 20, "the end of the job")
        assert worker.stop() == 0
    assert plain.runs == 1
