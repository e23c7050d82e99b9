"""RQ's worker as flowkit runs it: quicker, and in Redis, for RQ's commands and for whoever looks, the same.

First it is compared with RQ's own, key by key, then the real command is watched from outside. (With Kafka on both sides, and
killed: test_workers.py.)
"""

from __future__ import annotations

import inspect
import json
import re
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import rq
from commands import NOBODY, command
from processes import Process
from redis import Redis
from redis.client import Pipeline
from redis.connection import AbstractConnection
from rq import Queue, Repeat, Retry, SimpleWorker
from rq import Worker as RqWorker
from rq.command import send_shutdown_command, send_stop_job_command
from rq.executions import Execution
from rq.job import Job
from rq.registry import FailedJobRegistry, ScheduledJobRegistry, StartedJobRegistry
from servers import WaitFor
from support import an_entry, make_app, put_jobs

from flowkit import jobs as jobs_module
from flowkit import worker as module
from flowkit.jobs import OwnJob, OwnWorker
from flowkit.queues import PERFORM, RUNS, Envelope
from flowkit.worker import EASE, LIFE, Worker

ARGUMENTS = ("app", "x", 1, [])
"""Of a job that flowkit's worker reads; ``x``, the topic, is what the functions below are given."""

MakeWorker = Callable[[Redis], SimpleWorker]


def ours(redis: Redis) -> SimpleWorker:
    return Worker(["default"], name="w", connection=redis, serializer=Envelope)


def theirs(redis: Redis) -> SimpleWorker:
    return SimpleWorker(["default"], name="w", connection=redis, serializer=Envelope, job_class=OwnJob)


class Bench:
    """A queue, and jobs whose function a test gives."""

    def __init__(self, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
        self.redis = redis
        self.queue = Queue("default", connection=redis, serializer=Envelope)
        self.calls = 0
        self._monkeypatch = monkeypatch

    def put(self, name: str = "a-job", **options: Any) -> Job:
        return self.queue.enqueue(PERFORM, *ARGUMENTS, job_id=name, description="a job", **options)

    def work(
        self, make: MakeWorker, function: Callable[..., Any] = lambda text: None, **options: Any
    ) -> SimpleWorker:
        def counted(*arguments: Any) -> Any:
            self.calls += 1
            return function(arguments[1])

        self._monkeypatch.setattr(jobs_module, "perform", counted)
        worker = make(self.redis)
        worker.work(**{"burst": True, "logging_level": "CRITICAL", **options})
        return worker

    def dump(self) -> dict[str, Any]:
        """All that is in Redis, but for what differs between any two runs."""
        found: dict[str, Any] = {}
        for key in sorted(self.redis.scan_iter()):
            kind = self.redis.type(key)
            value: Any
            if kind == b"hash":
                value = {name: _plain(name, field) for name, field in self.redis.hgetall(key).items()}
                value.pop(b"ip_address", None)
            elif kind == b"zset":
                value = self.redis.zrange(key, 0, -1)
            elif kind == b"set":
                value = sorted(self.redis.smembers(key))
            elif kind == b"list":
                value = self.redis.lrange(key, 0, -1)
            elif kind == b"stream":
                value = [{k: _plain(k, v) for k, v in entry.items()} for _, entry in self.redis.xrange(key)]
            else:
                value = self.redis.get(key)
            lives = "expires" if self.redis.ttl(key) > 0 else "stays"
            found[_without_ids(key.decode())] = (_without_ids(repr(value)), lives)
        return found


def _plain(name: bytes, value: bytes) -> str:
    """A field as it is whenever and wherever a job ran."""
    if name == b"data":  # RQ packs it again with each change; it reads it packed or not
        try:
            return repr(zlib.decompress(value))
        except zlib.error:
            return repr(value)
    if re.fullmatch(rb"\d{4}-\d\d-\d\dT[\d:.]+Z", value):
        return "a date"
    if re.fullmatch(rb"\d+\.\d+(e-\d+)?", value):
        return "seconds"
    if name == b"exc_string":
        return "frames"  # of other functions; the error itself is looked at elsewhere
    if name == b"exc_info":
        return "".join(zlib.decompress(value).decode().splitlines()[-1:])
    return repr(value)


def _without_ids(text: str) -> str:
    return re.sub(r"\b[0-9a-f]{32}\b", "an-id", text)


@pytest.fixture
def bench(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    monkeypatch.setattr(OwnWorker, "stopping", False)
    monkeypatch.setattr(OwnWorker, "told", None)
    yield Bench(redis, monkeypatch)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def fail(text: str) -> None:
    raise ValueError("no " + text)


def one(bench: Bench, **options: Any) -> None:
    bench.put(**options)


def depending(bench: Bench) -> None:
    first = bench.put()
    bench.put("b-job", depends_on=first)


def begun_again(bench: Bench) -> None:
    """A job that has failed, and somebody asks for once more."""
    job = bench.put()
    bench.redis.delete(bench.queue.key)
    FailedJobRegistry(queue=bench.queue).add(job, ttl=100, exc_string="no")
    FailedJobRegistry(queue=bench.queue).requeue(job.id)


CASES: dict[str, tuple[Callable[[Bench], None], Callable[..., Any]]] = {
    "done": (lambda b: one(b, result_ttl=60, retry=RUNS), lambda text: None),
    "done, RQ's own time to keep it": (lambda b: one(b), lambda text: None),
    "done, deleted at once": (lambda b: one(b, result_ttl=0), lambda text: None),
    "done, kept for ever": (lambda b: one(b, result_ttl=-1), lambda text: None),
    "done, and another one waited for it": (depending, lambda text: None),
    "done, and to be repeated": (lambda b: one(b, repeat=Repeat(times=1, interval=60)), lambda text: None),
    "done after a failure": (begun_again, lambda text: None),
    "failed": (lambda b: one(b), fail),
    "failed, to be tried again at once": (lambda b: one(b, retry=Retry(max=2, interval=0)), fail),
    "failed, to be tried again later": (lambda b: one(b, retry=RUNS, result_ttl=60), fail),
    "failed, and another one waited for it": (depending, fail),
    "asks to be tried again": (lambda b: one(b), lambda text: Retry(max=1, interval=60)),
}


@pytest.mark.parametrize("case", CASES)
def test_redis_holds_the_same_after_a_job_of_rqs_own_worker(bench: Bench, case: str) -> None:
    prepare, function = CASES[case]
    dumps = []
    for make in (theirs, ours):
        bench.redis.flushdb()
        prepare(bench)
        bench.work(make, function)
        dumps.append((bench.calls, bench.dump()))
        bench.calls = 0
    assert dumps[0][0] > 0
    assert dumps[1] == dumps[0]


def test_redis_holds_the_same_during_a_job(bench: Bench) -> None:
    dumps: list[dict[str, Any]] = []
    for make in (theirs, ours):
        bench.redis.flushdb()
        bench.put(result_ttl=60, retry=RUNS)
        bench.work(make, lambda text: dumps.append(bench.dump()))
    assert dumps[1] == dumps[0]
    assert "b'state': \"b'busy'\"" in dumps[1]["rq:worker:w"][0]
    assert dumps[1]["rq:wip:default"][0] == "[b'a-job:an-id']"


def test_rq_is_the_one_this_was_written_for() -> None:
    """What flowkit's worker overrides and calls of RQ and redis-py: if this fails, look at it before the version is allowed."""
    assert rq.__version__.split(".")[0] == "3"
    signatures = {
        "bootstrap": "(self, logging_level, date_format, log_format)",
        "check_for_suspension": "(self, burst)",
        "cleanup_execution": "(self, job, pipeline, execution)",
        "dequeue_job_and_maintain_ttl": "(self, timeout, max_idle_time)",
        "execute_job": "(self, job, queue)",
        "get_heartbeat_ttl": "(self, job, working_time)",
        "handle_exception": "(self, job, exc_info)",
        "handle_execution_ended": "(self, job, queue, heartbeat_ttl)",
        "handle_job_success": "(self, job, queue, started_job_registry, execution)",
        "heartbeat": "(self, timeout, pipeline)",
        "increment_successful_job_count": "(self, pipeline)",
        "increment_total_working_time": "(self, job_execution_time, pipeline)",
        "maintain_heartbeats": "(self, job, execution)",
        "perform_job": "(self, job, queue, execution)",
        "prepare_execution": "(self, job)",
        "prepare_job_execution": "(self, job, remove_from_intermediate_queue)",
        "procline": "(self, message)",
        "request_force_stop": "(self, signum, frame)",
        "request_stop": "(self, signum, frame)",
        "set_state": "(self, state, pipeline)",
        "teardown": "(self)",
    }
    found = {name: _parameters(getattr(SimpleWorker, name)) for name in signatures}
    assert found == signatures
    assert _parameters(Execution.create) == "(job, ttl, pipeline, worker_name)"
    assert _parameters(Job.prepare_for_execution) == "(self, worker_name, pipeline)"
    worker = inspect.getsource(rq.worker.base)
    for name in ("_state", "_stop_requested", "_shutdown_requested_date", "executions", "_exc_handlers"):
        assert f"self.{name}" in worker, name
    assert isinstance(Pipeline(None, {}, True, None).command_stack, list)


def _parameters(function: Callable[..., Any]) -> str:
    return f"({', '.join(inspect.signature(function).parameters)})"


def test_a_job_costs_three_calls_of_redis(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    send = AbstractConnection.send_packed_command

    def count(self: Any, data: Any, *arguments: Any, **options: Any) -> Any:
        calls[threading.current_thread().name] += 1
        return send(self, data, *arguments, **options)

    def trips(make: MakeWorker, jobs: int) -> int:
        bench.redis.flushdb()
        for number in range(jobs):
            bench.put(f"job-{number}", result_ttl=60, retry=RUNS)
        calls.clear()
        bench.work(make)
        return calls[threading.current_thread().name]

    monkeypatch.setattr(AbstractConnection, "send_packed_command", count)
    trips(ours, 1)  # loads the scripts
    assert trips(ours, 21) - trips(ours, 1) == 20 * 3
    assert trips(theirs, 21) - trips(theirs, 1) >= 20 * 15


def test_a_job_in_hand_expires_soon_after_its_last_heartbeat(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)
    registry = StartedJobRegistry(queue=bench.queue)
    lives: list[float] = []

    def left() -> float:
        ((_, score),) = bench.redis.zrange(registry.key, 0, -1, withscores=True)
        return float(score) - time.time()

    def look(text: str) -> None:
        lives.append(left())
        bench.redis.zadd(registry.key, dict.fromkeys(bench.redis.zrange(registry.key, 0, -1), time.time() + 5))
        deadline = time.monotonic() + 10
        while left() < LIFE - 3:
            assert time.monotonic() < deadline, "no heartbeat in 10 s"
        lives.append(left())
        (execution,) = bench.redis.scan_iter("rq:execution:*")
        lives.append(bench.redis.ttl(execution))

    bench.put(job_timeout=1000)
    worker = bench.work(ours, look)
    assert worker.successful_job_count == 0  # that is for Redis to count
    assert bench.redis.hget("rq:worker:w", "successful_job_count") == b"1"
    assert len(lives) == 3
    assert all(LIFE - 3 <= life <= LIFE + 1 for life in lives), lives


def test_one_thread_beats_for_all_jobs_and_ends_with_the_worker(bench: Bench, wait_for: WaitFor) -> None:
    def beating() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "flowkit-heartbeat"]

    seen: list[threading.Thread] = []
    for number in range(5):
        bench.put(f"job-{number}")
    bench.work(ours, lambda text: seen.extend(beating()))
    assert len(seen) == 5
    assert len(set(seen)) == 1
    wait_for(lambda: not beating(), 10, "the end of the thread")


def test_a_worker_that_goes_from_job_to_job_says_so_every_few_seconds(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EASE", 0.2)
    assert 0 < EASE < module.IDLE / 2
    beats: list[Any] = []
    signs: list[int] = []
    monkeypatch.setattr(Worker, "beat", lambda self: signs.append(1))

    def look(text: str) -> None:
        beats.append(bench.redis.hget("rq:worker:w", "last_heartbeat"))

    for number in range(300):
        bench.put(f"job-{number}")
    began = time.monotonic()
    bench.work(ours, look)
    took = time.monotonic() - began
    assert 1 < len(set(beats)) <= took / 0.2 + 2
    assert len(signs) >= 300  # the supervisor hears of each step all the same
    assert bench.redis.ttl("rq:worker:w") > 0


# A job is in some list at every moment.


def test_a_worker_killed_between_taking_a_job_and_beginning_it_leaves_it_in_the_list_of_taken_ones(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(Worker, "prepare_execution", die)
    bench.put()
    with pytest.raises(SystemExit):
        bench.work(ours)
    assert bench.queue.job_ids == []
    assert bench.queue.intermediate_queue.get_job_ids() == ["a-job"]


def test_a_stop_while_a_job_is_being_taken_does_not_leave_it_behind(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ's own worker ends at once then, and the job waits for a clean-up."""
    runs: list[str] = []
    bench.put("a-job")
    bench.put("b-job")
    worker = Worker(["default"], name="w", connection=bench.redis, serializer=Envelope)
    take = worker._take_script

    def stop_meanwhile(*arguments: Any) -> Any:
        taken = take(*arguments)
        signal.raise_signal(signal.SIGTERM)
        return taken

    worker._take_script = stop_meanwhile
    bench.work(lambda redis: worker, lambda text: runs.append(text), burst=False)
    assert runs == ["x"]
    assert bench.queue.job_ids == ["b-job"]
    assert bench.queue.intermediate_queue.get_job_ids() == []
    assert Job.fetch("a-job", connection=bench.redis, serializer=Envelope).get_status() == "finished"


def test_a_stop_when_there_was_no_job_is_heeded(bench: Bench) -> None:
    worker = Worker(["default"], name="w", connection=bench.redis, serializer=Envelope)
    take = worker._take_script

    def stop_meanwhile(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return take(*arguments)

    worker._take_script = stop_meanwhile
    began = time.monotonic()
    bench.work(lambda redis: worker, burst=False)
    assert time.monotonic() - began < 10
    assert worker.executed == 0


def test_a_job_that_was_deleted_is_passed_over(bench: Bench) -> None:
    runs: list[str] = []
    first = bench.put("a-job")
    bench.put("b-job")
    bench.redis.delete(first.key)
    bench.work(ours, lambda text: runs.append(text))
    assert runs == ["x"]


def test_a_dependent_that_is_added_during_the_job_is_begun_too(bench: Bench) -> None:
    """RQ would WATCH for it; the script looks."""
    runs: list[str] = []

    def work(text: str) -> None:
        runs.append(text)
        if len(runs) == 1:
            bench.put("b-job", depends_on="a-job")

    bench.put("a-job")
    bench.work(ours, work)
    assert runs == ["x", "x"]


# The real command.


class Steps:
    """The application ``apps/steps.py``: jobs to put into its queue, and the command that works on them."""

    def __init__(self, redis: Redis, url: str, logs: Path, wait_for: WaitFor) -> None:
        self.redis = redis
        self.url = url
        self.wait_for = wait_for
        self._log = logs / "worker.log"
        self._app = make_app(inline=False, redis=url)
        self._app.add_topic("steps", print)
        self._app.reference = "steps:app"
        self._count = 0

    def put(self, *tasks: dict[str, Any], size: int = 1) -> list[str]:
        """Queues messages as `flowkit run` does, ``size`` in a job; gives the ids of the jobs."""
        entries = [
            an_entry("steps", number, value=json.dumps(task).encode())
            for number, task in enumerate(tasks, self._count)
        ]
        self._count += len(tasks)
        return put_jobs(self.redis, self._app, "steps", entries, size)

    def worker(self, *options: str) -> Process:
        return Process(
            "flowkit",
            "worker",
            "steps:app",
            *options,
            env={"FLOWKIT_REDIS": self.url, "FLOWKIT_KAFKA_HOSTS": NOBODY},
            log=self._log,
        )

    def rq(self, *arguments: str) -> str:
        """RQ's own command; gives what it printed."""
        done = command("rq", *arguments, "--url", self.url)
        assert done.code == 0, done.err
        return done.out

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """Every call of the handler so far: n, attempt, process id."""
        items: Any = self.redis.lrange("runs", 0, -1)
        return [tuple(json.loads(item)) for item in items]

    @property
    def numbers(self) -> list[int]:
        return [n for n, _, _ in self.runs]

    def wait_for_runs(self, count: int, timeout: float = 40) -> None:
        self.wait_for(lambda: len(self.runs) >= count, timeout, f"{count} calls of the handler")

    @property
    def registered(self) -> RqWorker:
        """The one worker that RQ knows."""
        (found,) = RqWorker.all(connection=self.redis)
        return found

    def status(self, job: str) -> str:
        return str(Job.fetch(job, connection=self.redis).get_status().value)


@pytest.fixture
def steps(redis: Redis, redis_url: str, tmp_path: Path, wait_for: WaitFor) -> Steps:
    return Steps(redis, redis_url, tmp_path, wait_for)


def test_rq_info_shows_the_worker_what_it_does_and_the_job_in_hand(steps: Steps) -> None:
    with steps.worker() as worker:
        steps.wait_for(lambda: RqWorker.count(connection=steps.redis) == 1, 40, "the worker in RQ's list")
        steps.wait_for(lambda: steps.registered.get_state() == "idle", 20, "an idle worker")
        assert "idle default. jobs: 0 finished, 0 failed" in steps.rq("info", "--raw")
        job, _ = steps.put({"n": 0, "do": "wait"}, {"n": 1})
        steps.wait_for_runs(1)
        seen = steps.rq("info", "--raw")
        assert "busy default. jobs: 0 finished, 0 failed" in seen
        assert "queue default 1" in seen
        assert steps.registered.get_current_job_id() == job
        assert StartedJobRegistry("default", connection=steps.redis).get_job_ids() == [job]
        steps.redis.rpush("gate", "open")
        steps.wait_for(lambda: "idle default. jobs: 2 finished" in steps.rq("info", "--raw"), 20, "an idle worker")
        assert steps.registered.get_current_job_id() is None
        assert StartedJobRegistry("default", connection=steps.redis).get_job_ids() == []
        assert worker.stop() == 0


def test_finished_jobs_are_deleted_after_their_time(steps: Steps) -> None:
    jobs = steps.put({"n": 0}, {"n": 1})
    with steps.worker("--burst") as worker:
        assert worker.wait() == 0
    for job in jobs:
        assert steps.status(job) == "finished"
        assert 0 < steps.redis.ttl(f"rq:job:{job}") <= 60
        assert 0 < steps.redis.ttl(f"rq:results:{job}") <= 60
    now = time.time()
    scores = dict(steps.redis.zrange("rq:finished:default", 0, -1, withscores=True))
    assert {job.encode() for job in jobs} == scores.keys()
    assert all(now < score <= now + 61 for score in scores.values())


def test_a_failed_message_is_scheduled_by_its_routes_retry_and_ends_among_rqs_failed_jobs(steps: Steps) -> None:
    (job,) = steps.put({"n": 0, "do": "fail"})
    scheduled = ScheduledJobRegistry("default", connection=steps.redis)
    for attempt in (1, 2):
        before = datetime.now(UTC)
        with steps.worker("--burst") as worker:
            assert worker.wait() == 0
        assert [made for _, made, _ in steps.runs][-1] == attempt
        assert steps.status(job) == "scheduled"
        due = scheduled.get_scheduled_time(job)
        assert timedelta(0) <= due - before.replace(microsecond=0) <= timedelta(seconds=20)
        scheduled.remove(job)
        steps.redis.rpush("rq:queue:default", job)  # as a scheduler does
    with steps.worker("--burst") as worker:
        assert worker.wait() == 0
    failed = FailedJobRegistry("default", connection=steps.redis)
    assert failed.get_job_ids() == [job]
    fetched = Job.fetch(job, connection=steps.redis)
    assert (fetched.get_status(), fetched.retries_left) == ("failed", 0)
    assert "ValueError: no 0" in (fetched.latest_result().exc_string or "")
    assert [made for _, made, _ in steps.runs] == [1, 2, 3]
    # and RQ's own command brings it back
    steps.rq("requeue", "--queue", "default", job)
    with steps.worker("--burst") as worker:
        assert worker.wait() == 0
    assert len(steps.runs) == 4


def test_rq_suspend_holds_the_worker_and_rq_resume_lets_it_go_on(steps: Steps) -> None:
    with steps.worker() as worker:
        steps.put({"n": 0})
        steps.wait_for_runs(1)
        steps.rq("suspend")
        steps.put({"n": 1, "do": "wait"}, {"n": 2}, {"n": 3})  # RQ's worker takes one that it waits for already
        steps.redis.rpush("gate", "open")
        steps.wait_for(lambda: steps.registered.get_state() == "suspended", 20, "the worker to be suspended")
        assert steps.numbers == [0, 1]
        assert steps.redis.llen("rq:queue:default") == 2
        with steps.worker("--burst") as other:
            assert other.wait() == 0
        assert steps.numbers == [0, 1]
        steps.rq("resume")
        steps.wait_for_runs(4)
        assert worker.stop() == 0
    assert steps.numbers == [0, 1, 2, 3]


def test_a_suspended_worker_can_be_stopped(steps: Steps) -> None:
    steps.rq("suspend")
    steps.put({"n": 0})
    with steps.worker() as worker:
        steps.wait_for(lambda: RqWorker.count(connection=steps.redis) == 1, 40, "the worker in RQ's list")
        steps.wait_for(lambda: steps.registered.get_state() == "suspended", 20, "the worker to be suspended")
        assert worker.stop() == 0
    steps.rq("resume")
    assert steps.numbers == []
    assert steps.redis.llen("rq:queue:default") == 1


def test_rqs_command_to_shut_down_ends_a_process_after_the_job_in_hand(steps: Steps) -> None:
    job, _ = steps.put({"n": 0, "do": "wait"}, {"n": 1})
    with steps.worker() as worker:
        steps.wait_for_runs(1)
        name = steps.registered.name
        send_shutdown_command(steps.redis, name)
        steps.wait_for(
            lambda: steps.redis.hexists(f"rq:worker:{name}", "shutdown_requested_date"), 20, "it to be heard"
        )
        assert steps.numbers == [0]
        steps.redis.rpush("gate", "open")
        steps.wait_for_runs(2)  # by the process that the supervisor has started in its place
        assert steps.status(job) == "finished"
        assert len({pid for _, _, pid in steps.runs}) == 2
        assert worker.stop() == 0


def test_rqs_command_to_stop_a_job_marks_it_stopped_when_it_fails(steps: Steps) -> None:
    """As with RQ's SimpleWorker: there is no horse that could be killed, and the job is not tried again."""
    (job,) = steps.put({"n": 0, "do": "wait and fail"})
    with steps.worker() as worker:
        steps.wait_for_runs(1)
        subscribers = dict(steps.redis.pubsub_numsub(f"rq:pubsub:{steps.registered.name}"))
        assert list(subscribers.values()) == [1]
        send_stop_job_command(steps.redis, job)
        send_shutdown_command(steps.redis, steps.registered.name)  # what came before it has been heard when this is
        steps.wait_for(
            lambda: any(
                steps.redis.hexists(key, "shutdown_requested_date")
                for key in steps.redis.scan_iter("rq:worker:*", _type="hash")
            ),
            20,
            "it to be heard",
        )
        steps.redis.rpush("gate", "open")
        steps.wait_for(lambda: steps.status(job) == "stopped", 20, "the job to be stopped")
        assert worker.stop() == 0
    assert ScheduledJobRegistry("default", connection=steps.redis).get_job_ids() == []


def test_after_max_jobs_a_process_makes_room_for_a_new_one(steps: Steps) -> None:
    steps.put(*({"n": number} for number in range(7)))
    with steps.worker("--max-jobs", "3") as worker:
        steps.wait_for_runs(7)
        pids = Counter(pid for _, _, pid in steps.runs)
        assert sorted(pids.values()) == [1, 3, 3]
        steps.put({"n": 7}, {"n": 8}, {"n": 9})
        steps.wait_for_runs(10)
        assert worker.stop() == 0
        assert "a new one starts in" not in worker.output
        assert "ERROR" not in worker.output
        assert worker.output.count("has done its 3 jobs; a new one starts") >= 2
    assert steps.numbers == list(range(10))


def test_with_burst_a_process_ends_for_good_after_max_jobs(steps: Steps) -> None:
    steps.put(*({"n": number} for number in range(7)))
    with steps.worker("--max-jobs", "3", "--burst") as worker:
        assert worker.wait() == 0
    assert steps.numbers == [0, 1, 2]
    with steps.worker("--max-jobs", "1", "--burst", "--processes", "2") as worker:
        assert worker.wait() == 0
    assert sorted(steps.numbers) == [0, 1, 2, 3, 4]
    with steps.worker("--max-jobs", "100", "--burst") as worker:
        assert worker.wait() == 0
    assert sorted(steps.numbers) == list(range(7))


def test_max_jobs_must_be_a_number_of_jobs() -> None:
    done = command("flowkit", "worker", "steps:app", "--max-jobs", "0")
    assert done.code == 2
    assert "--max-jobs" in done.err


def test_processes_share_a_queue(steps: Steps) -> None:
    steps.put(*({"n": number, "do": "wait"} for number in range(3)))
    with steps.worker("--processes", "3") as worker:
        steps.wait_for_runs(3)
        assert {pid for _, _, pid in steps.runs} == set(worker.children())
        assert len(worker.children()) == 3
        steps.redis.rpush("gate", *["open"] * 3)
        assert worker.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_the_message_in_hand_finish_and_puts_the_rest_of_its_job_in_front(
    steps: Steps, number: signal.Signals
) -> None:
    steps.put({"n": 0, "do": "wait"}, {"n": 1}, {"n": 2}, size=3)
    (last,) = steps.put({"n": 3})
    with steps.worker() as worker:
        steps.wait_for_runs(1)
        worker.signal(number)
        steps.wait_for(
            lambda: steps.redis.hexists(f"rq:worker:{steps.registered.name}", "shutdown_requested_date"),
            20,
            "the note",
        )
        assert worker.popen.poll() is None
        steps.redis.rpush("gate", "open")
        assert worker.wait() == 0
    assert steps.numbers == [0]
    waiting: Any = steps.redis.lrange("rq:queue:default", 0, -1)
    assert len(waiting) == 2
    assert waiting[1] == last.encode()
    with steps.worker("--burst") as worker:
        assert worker.wait() == 0
    assert steps.numbers == [0, 1, 2, 3]
    assert {attempt for _, attempt, _ in steps.runs} == {1}


def test_a_stop_lets_every_job_in_hand_finish(steps: Steps) -> None:
    steps.put(*({"n": number, "do": "wait"} for number in range(2)), {"n": 2})
    with steps.worker("--processes", "2") as worker:
        steps.wait_for_runs(2)
        worker.signal(signal.SIGTERM)
        steps.wait_for(
            lambda: (
                sum(
                    steps.redis.hexists(key, "shutdown_requested_date")
                    for key in steps.redis.scan_iter("rq:worker:*", _type="hash")
                )
                == 2
            ),
            20,
            "both to note the signal",
        )
        steps.redis.rpush("gate", "open", "open")
        assert worker.wait() == 0
    assert sorted(steps.numbers) == [0, 1]
    assert steps.redis.llen("rq:queue:default") == 1
