"""Queued messages end to end, from Kafka to Kafka, by real processes that are stopped and killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition
from processes import Process
from redis import Redis
from rq.job import Job
from rq.registry import FailedJobRegistry, StartedJobRegistry
from servers import Kafka, MakeTopic, RedisServer, WaitFor
from support import make_app, messages_of

from flowkit import workers as workers_module
from flowkit.processes import Seat
from flowkit.progress import MORE
from flowkit.queues import queues_key
from flowkit.workers import Workers


class Tasks:
    """The application ``apps/tasks.py`` with topics of its own: processes to start, messages to send, answers to read."""

    def __init__(self, hosts: str, topic: MakeTopic, redis: Redis, url: str, logs: Path, wait_for: WaitFor) -> None:
        self.hosts = hosts
        self.redis = redis
        self.logs = logs
        self.wait_for = wait_for
        self.topic, self.out = topic("tasks"), topic("answers")
        self.url = url
        self.consumer = KafkaConsumer(bootstrap_servers=hosts, auto_offset_reset="earliest")
        self.consumer.assign([TopicPartition(self.out, 0)])
        self.found: list[dict[str, Any]] = []

    def start(self, *command: str, **env: str) -> Process:
        environment = {"FLOWKIT_KAFKA_HOSTS": self.hosts, "FLOWKIT_REDIS": self.url}
        environment |= {"TASKS_IN": self.topic, "TASKS_OUT": self.out, **env}
        return Process(*command, env=environment, log=self.logs / f"{command[0]}-{command[1]}.log")

    def send(self, *tasks: dict[str, Any]) -> None:
        producer = KafkaProducer(bootstrap_servers=self.hosts)
        try:
            for task in tasks:
                producer.send(self.topic, json.dumps(task).encode())
            producer.flush()
        finally:
            producer.close()

    def answers(self, count: int, timeout: float = 40) -> list[dict[str, Any]]:
        """Waits for so many answers, and gives them in the order of ``n``."""

        def read() -> bool:
            for records in self.consumer.poll(timeout_ms=20).values():
                self.found.extend(json.loads(record.value) for record in records)
            return len(self.found) >= count

        self.wait_for(read, timeout, f"{count} answers")
        return sorted(self.found, key=lambda answer: int(answer["n"]))

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """Every call of the handler so far: n, attempt, process id."""
        items: Any = self.redis.lrange("runs", 0, -1)
        return [tuple(json.loads(item)) for item in items]

    @property
    def calls(self) -> list[tuple[int, int]]:
        return sorted((n, attempt) for n, attempt, _ in self.runs)

    def wait_for_run(self, count: int = 1) -> tuple[int, int, int]:
        self.wait_for(lambda: len(self.runs) >= count, 30, f"{count} calls of the handler")
        return self.runs[count - 1]

    @property
    def queued(self) -> int:
        """How many messages are or were in a job; RQ keeps a finished job for a minute."""
        count = 0
        for key in self.redis.scan_iter("rq:job:*"):
            data: Any = self.redis.hget(key, "data")
            count += len(messages_of(data)) if data else 0
        return count

    def wait_for_queued(self, count: int, timeout: float = 40) -> None:
        self.wait_for(lambda: self.queued >= count, timeout, f"{count} queued messages")

    def statuses(self) -> Counter[str]:
        ids = [key.decode().removeprefix("rq:job:") for key in self.redis.scan_iter("rq:job:*")]
        jobs = Job.fetch_many(ids, connection=self.redis)
        return Counter(str(job.get_status(refresh=False).value) for job in jobs if job)


@pytest.fixture
def tasks(
    kafka: Kafka, topic: MakeTopic, redis: Redis, redis_url: str, tmp_path: Path, wait_for: WaitFor
) -> Iterator[Tasks]:
    found = Tasks(kafka.hosts, topic, redis, redis_url, tmp_path, wait_for)
    yield found
    found.consumer.close(autocommit=False)


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"n": number} for number in range(start, start + count)]


def test_a_plain_rq_worker_answers_queued_messages(tasks: Tasks) -> None:
    run, worker = ("flowkit", "run", "quick:app"), ("rq", "worker", "--url", tasks.url, "default")
    with tasks.start(*run) as consumer, tasks.start(*worker) as plain:
        tasks.send(*numbered(20))
        assert tasks.answers(20) == [{"n": number, "attempt": 1} for number in range(20)]
        assert plain.stop() == 0
        assert consumer.stop() == 0
    assert len(tasks.runs) == 20


def test_under_a_plain_rq_worker_a_failed_message_comes_back_alone_and_so_does_the_job_of_a_killed_horse(
    tasks: Tasks,
) -> None:
    """RQ itself leaves both in the registry of scheduled jobs for ever; `flowkit run` looks after it."""
    tasks.send({"n": 0}, {"n": 1, "do": "fail", "times": 2}, {"n": 2})
    worker = ("rq", "worker", "--url", tasks.url, "default")
    with tasks.start("flowkit", "run", "quick:app"), tasks.start(*worker) as plain:
        assert tasks.answers(3) == [{"n": 0, "attempt": 1}, {"n": 1, "attempt": 3}, {"n": 2, "attempt": 1}]
        assert tasks.calls == [(0, 1), (1, 1), (1, 2), (1, 3), (2, 1)]

        tasks.send({"n": 3, "do": "die"})
        assert tasks.answers(4)[3] == {"n": 3, "attempt": 1}  # that was no failed attempt
        assert tasks.calls[-2:] == [(3, 1), (3, 1)]
        assert "Work-horse terminated unexpectedly" in plain.output
        assert FailedJobRegistry("default", connection=tasks.redis).count == 0


def test_flowkit_worker_answers_and_serves_the_queues_that_hooks_choose(tasks: Tasks) -> None:
    with tasks.start("flowkit", "run", "quick:app"), tasks.start("flowkit", "worker", "quick:app") as worker:
        tasks.send(*numbered(10), {"n": 10, "queue": "express"}, {"n": 11, "do": "fail", "times": 1, "queue": "late"})
        assert [answer["attempt"] for answer in tasks.answers(12)] == [1] * 11 + [2]
        assert "working on queue express too" in worker.output
        pids = {n: pid for n, _, pid in tasks.runs}
        assert len({pids[0], pids[10], pids[11]}) == 3  # a process each
        assert set(pids.values()) <= set(worker.children())
        assert worker.stop() == 0


def test_a_worker_keeps_its_producer_from_job_to_job(tasks: Tasks) -> None:
    with tasks.start("flowkit", "run", "kept:app"), tasks.start("flowkit", "worker", "kept:app") as worker:
        tasks.send({"n": 0}, {"n": 1, "do": "fail", "times": 1})
        tasks.answers(2)
        for number in range(2, 6):
            tasks.send({"n": number})
            tasks.answers(number + 1)
        (pid,) = {pid for _, _, pid in tasks.runs}
        assert worker.children() == [pid]
        finished: Any = tasks.redis.zcard("rq:finished:default")
        assert finished >= 5
        made: Any = tasks.redis.lrange("producers", 0, -1)
        assert [int(maker) for maker in made].count(pid) == 1
        assert worker.pid not in [int(maker) for maker in made]  # it would be dead in the processes forked from it
        assert worker.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_message_in_hand_finish_and_puts_the_others_back(
    tasks: Tasks, number: signal.Signals
) -> None:
    tasks.send({"n": 0, "do": "wait"}, {"n": 1}, {"n": 2})
    with tasks.start("flowkit", "run", "quick:app"):
        with tasks.start("flowkit", "worker", "quick:app") as worker:
            tasks.wait_for_run()
            worker.signal(number)
            tasks.wait_for(lambda: _stop_is_noted(tasks.redis), 20, "the worker to note the signal")
            assert worker.popen.poll() is None
            tasks.redis.rpush("gate", "open")
            assert worker.wait() == 0
        assert tasks.calls == [(0, 1)]
        assert tasks.statuses()["finished"] == 1
        assert tasks.statuses().keys() == {"finished", "queued"}
        with tasks.start("flowkit", "worker", "quick:app", "--burst") as worker:
            assert worker.wait() == 0
    assert len(tasks.answers(3)) == 3
    assert tasks.calls == [(0, 1), (1, 1), (2, 1)]


def test_a_second_signal_breaks_off_the_job_in_hand_and_it_comes_back(tasks: Tasks) -> None:
    tasks.send({"n": 0, "do": "wait"})
    with tasks.start("flowkit", "run", "quick:app"):
        with tasks.start("flowkit", "worker", "quick:app") as worker:
            tasks.wait_for_run()
            worker.signal(signal.SIGTERM)
            tasks.wait_for(lambda: _stop_is_noted(tasks.redis), 20, "the worker to note the signal")
            noted = time.monotonic()
            # RQ takes a second signal within a second for the same one
            tasks.wait_for(lambda: time.monotonic() > noted + 1.2, 5, "RQ to heed another signal")
            worker.signal(signal.SIGTERM)
            assert worker.wait() == 1
        with tasks.start("flowkit", "worker", "quick:app"):
            tasks.redis.rpush("gate", "open")
            assert tasks.answers(1) == [{"n": 0, "attempt": 1}]
    assert tasks.calls == [(0, 1), (0, 1)]


def _stop_is_noted(redis: Redis) -> bool:
    return any(redis.hexists(key, "shutdown_requested_date") for key in redis.scan_iter("rq:worker:*", _type="hash"))


def test_a_stop_in_the_moment_a_process_starts_is_not_missed(tasks: Tasks) -> None:
    with tasks.start("flowkit", "worker", "early:app") as worker:
        assert worker.wait(20) == 0


def test_a_worker_and_its_horse_killed_in_a_job_that_went_up_in_another_lose_nothing(tasks: Tasks) -> None:
    """The job that RQ knows is done by then, and what is in hand are the messages of one behind it."""
    rq = ("rq", "worker", "--url", tasks.url, "--job-monitoring-interval", "1", "default")
    with tasks.start("flowkit", "run", "patient:app"), tasks.start(*rq) as worker:
        tasks.send({"n": 0}, {"n": 1})
        tasks.wait_for_run(2)
        tasks.send({"n": 2}, {"n": 3, "do": "wait"}, {"n": 4})
        tasks.wait_for(lambda: any(n == 3 for n, _, _ in tasks.runs), 60, "the one that waits")
        (job_id,) = StartedJobRegistry("default", connection=tasks.redis).get_job_ids(cleanup=False)
        assert tasks.redis.hexists(f"rq:job:{job_id}", MORE)
        assert len({pid for _, _, pid in tasks.runs}) == 1
        worker.kill_with_children()
        before = len(tasks.runs)
        with tasks.start(*rq):
            tasks.wait_for(lambda: len(tasks.runs) > before, 120, "the job to come back")
            tasks.redis.rpush("gate", 1)
            answers = 5  # and one or two more, if the message before it comes again
            while {answer["n"] for answer in tasks.answers(answers)} != set(range(5)):
                answers += 1
    counts = Counter(n for n, _, _ in tasks.runs)
    assert counts[3] == 2
    assert counts.total() <= 7  # the one before it, if it was done in the 5 ms before, and not noted


def test_burst_ends_when_the_queues_are_empty(tasks: Tasks) -> None:
    with tasks.start("flowkit", "run", "quick:app") as consumer:
        tasks.send(*numbered(5), {"n": 5, "queue": "express"})
        tasks.wait_for_queued(6)
        assert consumer.stop() == 0
    with tasks.start("flowkit", "worker", "quick:app", "--burst") as worker:
        assert worker.wait() == 0
    assert len(tasks.answers(6)) == 6
    assert tasks.statuses() == {"finished": 2}


def test_queues_that_hooks_make_up_get_processes_up_to_a_limit(
    redis: Redis, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a hook takes the names from messages, whoever sends those would choose how many processes there are."""
    monkeypatch.setattr(workers_module, "MAX_HOOK_QUEUES", 3)
    app = make_app()
    app.add_topic("orders", print, inline=False, queue="of-a-route")
    workers = Workers(app, None)
    workers._pids[1] = Seat("of-a-route")
    for names in (["of-a-route", "q1", "q2"], ["q3", "q4", "q5"], ["q6"]):
        redis.sadd(queues_key("shop"), *(f"rq:queue:{name}" for name in names))
        workers._look_for_queues(redis)
    assert sorted(seat.queue for seat in workers._start_at) == ["q1", "q2", "q3"]
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "more than 3 queues" in record.getMessage()
    assert "q4 for example" in record.getMessage()
    assert "--queues" in record.getMessage()


def test_a_worker_that_died_is_started_again(tasks: Tasks) -> None:
    with tasks.start("flowkit", "run", "quick:app"), tasks.start("flowkit", "worker", "quick:app") as worker:
        tasks.send({"n": 0, "do": "die"})
        tasks.wait_for_run()
        worker.wait_for("the worker of queue default ended with -9; a new one starts in")
        assert tasks.answers(1) == [{"n": 0, "attempt": 1}]
        assert len({pid for _, _, pid in tasks.runs}) == 2
        assert worker.stop() == 0


def test_the_job_of_a_killed_worker_comes_back(tasks: Tasks) -> None:
    with tasks.start("flowkit", "run", "quick:app"):
        tasks.send({"n": 0, "do": "wait"}, {"n": 1})
        with tasks.start("flowkit", "worker", "quick:app") as worker:
            tasks.wait_for_run()
            os.killpg(worker.pid, signal.SIGKILL)
            worker.popen.wait()
        with tasks.start("flowkit", "worker", "quick:app"):
            tasks.redis.rpush("gate", "open", "open")
            assert tasks.answers(2) == [{"n": 0, "attempt": 1}, {"n": 1, "attempt": 1}]
    assert tasks.calls == [(0, 1), (0, 1), (1, 1)]


def test_a_job_that_nothing_can_interrupt_costs_its_worker_and_comes_back(tasks: Tasks) -> None:
    timeout = {"FLOWKIT_JOB_TIMEOUT": "1"}
    with tasks.start("flowkit", "run", "quick:app", **timeout):
        tasks.send({"n": 0, "do": "hang"})
        with tasks.start("flowkit", "worker", "quick:app", **timeout) as worker:
            assert tasks.answers(1) == [{"n": 0, "attempt": 1}]
            assert "cannot be interrupted; its worker ends" in worker.output


def test_workers_do_not_outlive_the_process_that_started_them(tasks: Tasks) -> None:
    tasks.send({"n": 0, "do": "wait"})
    with tasks.start("flowkit", "run", "quick:app"), tasks.start("flowkit", "worker", "quick:app") as worker:
        _, _, child = tasks.wait_for_run()
        worker.kill()
        worker_log = "the process that started this one is gone"
        tasks.wait_for(lambda: worker_log in worker.output, 20, worker_log)
        tasks.redis.rpush("gate", "open")
        assert tasks.answers(1) == [{"n": 0, "attempt": 1}]
        tasks.wait_for(lambda: not _lives(child), 20, "the end of the worker")


def _lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_crash_between_queueing_and_commit_queues_nothing_twice(tasks: Tasks) -> None:
    # Given a consumer that was killed when it had queued messages and not committed them
    tasks.send(*numbered(20))
    with tasks.start("flowkit", "run", "crash:app") as consumer:
        assert consumer.wait() == -signal.SIGKILL
    assert 0 < tasks.queued <= 20
    assert committed(tasks) is None
    # When another one is given them again
    with tasks.start("flowkit", "run", "quick:app") as consumer:
        tasks.send({"n": 20})
        tasks.wait_for_queued(21)
        assert consumer.stop() == 0
    # Then each message is in one job, and handled once
    assert tasks.queued == 21
    assert committed(tasks) == 21
    plain = ("rq", "worker", "--url", tasks.url, "--burst", "default")  # runs the jobs of crash:app and of quick:app
    with tasks.start(*plain) as worker:
        assert worker.wait() == 0
    assert tasks.calls == [(number, 1) for number in range(21)]


def test_a_group_that_is_set_back_on_purpose_does_its_messages_again(tasks: Tasks) -> None:
    with tasks.start("flowkit", "run", "quick:app") as consumer:
        tasks.send(*numbered(5))
        tasks.wait_for_queued(5)
        tasks.wait_for(lambda: committed(tasks) == 5, 20, "the commit")
        assert consumer.stop() == 0
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=tasks.hosts)) as admin:
        admin.alter_group_offsets(tasks.topic, {TopicPartition(tasks.topic, 0): OffsetAndMetadata(2, "", -1)})
    with tasks.start("flowkit", "run", "quick:app") as consumer:
        tasks.wait_for_queued(8)
        assert consumer.stop() == 0
        assert "rewound" in consumer.output
    with tasks.start("flowkit", "worker", "quick:app", "--burst") as worker:
        assert worker.wait() == 0
    assert [n for n, _ in tasks.calls] == [0, 1, 2, 2, 3, 3, 4, 4]


def committed(tasks: Tasks) -> int | None:
    """What Kafka has as the committed offset of the group."""
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=tasks.hosts)) as admin:
        offsets = admin.list_group_offsets(tasks.topic)[tasks.topic]
    found = offsets.get(TopicPartition(tasks.topic, 0))
    return None if found is None else int(found.offset)


def test_while_redis_is_away_the_consumer_waits_and_nothing_is_lost(
    kafka: Kafka, topic: MakeTopic, tmp_path: Path, wait_for: WaitFor
) -> None:
    with RedisServer(tmp_path / "redis") as server, Redis.from_url(server.url) as redis:
        tasks = Tasks(kafka.hosts, topic, redis, server.url, tmp_path, wait_for)
        with (
            contextlib.closing(tasks.consumer),
            tasks.start("flowkit", "run", "quick:app") as consumer,
            tasks.start("flowkit", "worker", "quick:app") as worker,
        ):
            tasks.send(*numbered(10))
            tasks.answers(10)
            server.stop()
            tasks.send(*numbered(10, start=10))
            consumer.wait_for("Redis does not answer")
            consumer.wait_for("nothing is lost")
            server.start()
            assert {answer["n"] for answer in tasks.answers(20)} == set(range(20))
            assert worker.stop() == 0
            assert consumer.stop() == 0
    assert Counter(answer["n"] for answer in tasks.found) == Counter(range(20))
