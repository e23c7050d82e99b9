"""A real Redis that goes away, comes back, is full, busy, a replica or just loading: nothing is lost, nothing is queued twice.

The consumer here is the real loop on a Kafka in memory, and its time moves only when a test says so; the worker is that of
`flowkit worker`. (What whole processes do while Redis is away: test_workers.py and test_once.py.)
"""

from __future__ import annotations

import contextlib
import select
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Process
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry as RedisRetry
from servers import ChosenRedis, WaitFor
from support import an_entry, messages_of
from test_consumer import Clock, Events, Loop, make_app, stopped_clock

from flowkit import upkeep
from flowkit.errors import RedisUnavailable
from flowkit.jobqueue import JobQueue, Pack
from flowkit.marks import Mark
from flowkit.message import Partition

QUEUE = "rq:queue:default"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return stopped_clock(monkeypatch)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChosenRedis]:
    directory = tmp_path_factory.mktemp("trouble")
    with ChosenRedis(directory, enable_debug_command="yes", busy_reply_threshold=50) as server:
        yield server


class Troubled:
    """A consumer whose Redis is in trouble between ``begin`` and ``end``."""

    def __init__(self, server: ChosenRedis, clock: Clock) -> None:
        self.server = server
        self.redis = Redis.from_url(server.url, socket_timeout=30)
        self.at_once = {"url": server.url, "retry": RedisRetry(NoBackoff(), 0), "socket_timeout": 10}
        app = make_app(inline=False)
        app.add_topic("a", lambda value: None)
        app.add_topic("b", lambda value: None, inline=True)
        self.loop = Loop(app, clock, JobQueue(self.at_once, "t", "troubled:app"))  # type: ignore[arg-type]
        self.loop.broker.create("a")
        self.loop.broker.create("b")
        self.sent = 0

    def put(self, count: int = 3, size: int = 1) -> None:
        """Sends messages of so many bytes."""
        for _ in range(count):
            self.loop.broker.append("a", b"1" * size, partition=0)
        self.sent += count

    @property
    def queued(self) -> Counter[int]:
        """How often each offset is in the queue."""
        ids: Any = self.redis.lrange(QUEUE, 0, -1)
        found: Counter[int] = Counter()
        for id_ in ids:
            found.update(offset for _, offset in messages_of(self.redis.hget(b"rq:job:" + id_, "data")))  # type: ignore[arg-type]
        return found

    @property
    def events(self) -> Events:
        return self.loop.events

    def everything_is_queued_once(self) -> None:
        self.loop.turn(40, after=1)
        assert self.queued == dict.fromkeys(range(self.sent), 1)
        assert self.loop.committed("a") == self.sent
        assert self.loop.client.paused == set()


@pytest.fixture
def troubled(running: ChosenRedis, clock: Clock) -> Iterator[Troubled]:
    running.start()
    with Redis.from_url(running.url) as redis:
        redis.config_set("maxmemory", 0)
        redis.flushall()
    found = Troubled(running, clock)
    yield found
    found.redis.close()


# Each of these is in trouble within the block, and well behind it.


@contextlib.contextmanager
def away(troubled: Troubled) -> Iterator[None]:
    troubled.server.stop()
    try:
        yield
    finally:
        troubled.server.start()


@contextlib.contextmanager
def killed(troubled: Troubled) -> Iterator[None]:
    troubled.server.kill()
    try:
        yield
    finally:
        troubled.server.start()


@contextlib.contextmanager
def full(troubled: Troubled) -> Iterator[None]:
    troubled.redis.config_set("maxmemory", 1)
    try:
        yield
    finally:
        troubled.redis.config_set("maxmemory", 0)


@contextlib.contextmanager
def a_replica(troubled: Troubled) -> Iterator[None]:
    """As after a failover: the address leads to a server that takes no writes."""
    troubled.redis.replicaof("127.0.0.1", 1)
    try:
        yield
    finally:
        troubled.redis.replicaof("NO", "ONE")


@contextlib.contextmanager
def a_replica_without_master(troubled: Troubled) -> Iterator[None]:
    """One that answers nothing, MASTERDOWN, until its master is there."""
    troubled.redis.config_set("replica-serve-stale-data", "no")
    try:
        with a_replica(troubled):
            yield
    finally:
        troubled.redis.config_set("replica-serve-stale-data", "yes")


@contextlib.contextmanager
def loading(troubled: Troubled) -> Iterator[None]:
    """It reads its data, as after a start, and answers LOADING."""
    troubled.redis.mset({f"filling:{number}": "x" * 200 for number in range(4_000)})
    troubled.redis.config_set("key-load-delay", 4_000)
    troubled.redis.config_set("loading-process-events-interval-bytes", 1024)
    with Redis.from_url(troubled.server.url, socket_timeout=120) as other:
        thread = threading.Thread(target=other.execute_command, args=("DEBUG", "RELOAD"))
        thread.start()
        _wait_for_answer(troubled, "LOADING")
        try:
            yield
        finally:
            _ask_until_taken(troubled, "CONFIG", "SET", "key-load-delay", "0")
            thread.join(60)
    troubled.redis.delete(*(f"filling:{number}" for number in range(4_000)))


@contextlib.contextmanager
def busy(troubled: Troubled) -> Iterator[None]:
    """Somebody's script does not end."""
    with Redis.from_url(troubled.server.url, socket_timeout=120) as other:

        def spin() -> None:
            with contextlib.suppress(RedisError):  # it is killed
                other.eval("while true do end", 0)

        thread = threading.Thread(target=spin)
        thread.start()
        _wait_for_answer(troubled, "BUSY")
        try:
            yield
        finally:
            troubled.redis.script_kill()
            thread.join(60)


def _wait_for_answer(troubled: Troubled, text: str) -> None:
    for _ in range(3_000):
        try:
            troubled.redis.get("x")
        except RedisError as error:
            if text in str(error) or text in type(error).__name__.upper():
                return
    raise AssertionError(f"Redis did not answer {text}")


def _ask_until_taken(troubled: Troubled, *command: str) -> None:
    for _ in range(3_000):
        try:
            troubled.redis.execute_command(*command)
        except RedisError:
            continue
        return
    raise AssertionError(f"Redis did not take {command}")


TROUBLES = {
    away: "Redis does not answer",
    killed: "Redis does not answer",
    full: "Redis refuses: ",
    a_replica: "Redis refuses: ",
    a_replica_without_master: "Redis refuses: ",
    loading: "Redis ",
    busy: "Redis refuses: ",
}
ANSWERS = {
    full: "command not allowed when used memory > 'maxmemory'",
    a_replica: "read only replica",
    a_replica_without_master: "replica-serve-stale-data is set to 'no'",
    loading: "is loading the dataset in memory",
    busy: "busy running a script",
}
Trouble = Callable[[Troubled], contextlib.AbstractContextManager[None]]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.__name__)
def test_the_consumer_waits_says_so_and_goes_on_from_the_same_message(troubled: Troubled, trouble: Trouble) -> None:
    loop = troubled.loop
    troubled.put()
    loop.turn(2, after=1)
    assert loop.committed("a") == 3
    with trouble(troubled):
        troubled.put()
        loop.put("b", 7)
        loop.turn(after=1)
        assert loop.client.paused == {Partition("a", 0)}
        assert loop.committed("a") == 3
        assert loop.committed("b") == 1  # what needs no Redis goes on
        tries = len(troubled.events.errors)
        loop.turn(5, after=0.01)
        assert tries == len(troubled.events.errors) == 1  # it backs off
        loop.turn(8, after=20)  # in one of them it resumes, in the next one it tries
        assert len(troubled.events.errors) == 5  # and says so once a try
        for event, _, message in troubled.events.errors:
            assert event == "queue"
            assert TROUBLES[trouble] in message
            assert ANSWERS.get(trouble, "") in message
            assert "trying again in" in message
    troubled.put()
    troubled.everything_is_queued_once()
    assert troubled.events.count("recovered") == 1


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.__name__)
def test_the_consumer_begins_though_redis_is_in_trouble(troubled: Troubled, trouble: Trouble) -> None:
    troubled.put()
    with trouble(troubled):
        troubled.loop.turn(4, after=20)
        assert troubled.loop.committed("a") in (None, 0)
        assert troubled.events.errors
    troubled.everything_is_queued_once()


def test_connections_and_scripts_that_are_gone_are_no_trouble_at_all(troubled: Troubled) -> None:
    troubled.put()
    troubled.loop.turn(2, after=1)
    troubled.redis.script_flush()
    troubled.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    troubled.put()
    troubled.everything_is_queued_once()
    assert len(troubled.events.errors) <= 1  # a connection that breaks in the middle of a call


# Full in the middle of a call: the script is refused as a whole, at its first write, or it is carried out as a whole.


def used(redis: Redis) -> int:
    info: Any = redis.info("memory")
    return int(info["used_memory"])


@pytest.mark.parametrize("room", [0, 20_000, 200_000, 2_000_000])
def test_memory_that_runs_over_in_the_middle_of_a_batch_leaves_no_half_of_it(troubled: Troubled, room: int) -> None:
    loop, redis = troubled.loop, troubled.redis
    troubled.put()
    loop.turn(2, after=1)
    keys = set(redis.keys())
    redis.config_set("maxmemory", used(redis) + room)
    troubled.put(300, size=4_000)
    loop.turn(after=1)
    if troubled.events.errors:  # it was full when the call came, or when its arguments were read
        assert "maxmemory" in troubled.events.errors[0][2]
        assert set(redis.keys()) == keys
        assert loop.committed("a") == 3
    else:
        assert loop.committed("a") == troubled.sent
    for _ in range(3):  # whatever is tried while it is full
        troubled.put()
        loop.turn(2, after=20)
    redis.config_set("maxmemory", 0)
    troubled.everything_is_queued_once()


def test_redis_looks_at_its_memory_before_the_first_write_of_a_script_and_then_carries_it_out(
    troubled: Troubled,
) -> None:
    """What the two tests above rest upon."""
    redis = troubled.redis
    redis.config_set("maxmemory", used(redis) + 500_000)
    fill = "for i = 1, 100 do redis.call('SET', KEYS[1] .. i, string.rep('x', 100000)) end return 1"
    assert redis.eval(fill, 1, "filling:") == 1
    assert used(redis) > 10_000_000
    with pytest.raises(ResponseError, match="command not allowed when used memory"):
        redis.eval(fill, 1, "more:")
    assert redis.keys("more:*") == []


# The worker: a job in hand, and what it has to write about it.


@pytest.mark.parametrize("trouble", [full, killed, a_replica], ids=lambda trouble: trouble.__name__)
def test_a_worker_with_a_job_in_hand_loses_nothing_and_its_processes_start_again(
    troubled: Troubled, trouble: Trouble, tmp_path: Path, wait_for: WaitFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process ends at the first word that Redis does not take; the job comes back, and goes on where the last note was."""
    monkeypatch.setattr(upkeep, "CLEAN_EVERY", 0.5)
    monkeypatch.setattr(upkeep, "TAKEN", 2.0)
    server, redis, count = troubled.server, troubled.redis, 30
    app = make_app(inline=False)
    app.add_topic("orders", print)
    queue = JobQueue(server.url, "enduring", "enduring:app")
    entries = [an_entry("orders", number, value=b'{"n": %d}' % number) for number in range(count)]
    for start in (0, 10, 20):
        pack = Pack(app.handling("orders"), "default", entries[start : start + 10])
        place = Partition("orders", 0)
        queue.enqueue("g", [pack], {place: Mark(start or None)}, {place: start + 10})
    files = {"ENDURING_RUNS": str(tmp_path / "runs"), "ENDURING_GATE": str(tmp_path / "gate")}
    runs = Path(files["ENDURING_RUNS"])
    runs.touch()

    def handled() -> Counter[str]:
        return Counter(runs.read_text().split("\n")[:-1])

    env = {**files, "FLOWKIT_REDIS": server.url}
    with Process("flowkit", "worker", "enduring:app", env=env, log=tmp_path / "worker") as worker:
        wait_for(lambda: "3 1" in handled(), what="the worker to have a job in hand")
        with trouble(troubled):
            Path(files["ENDURING_GATE"]).touch()
            worker.wait_for("a new one starts in")
            worker.wait_for("Redis ")
            assert worker.popen.poll() is None  # what starts its processes goes on
        looking_after = upkeep.Upkeep(server.url, "enduring")

        def done() -> bool:
            with contextlib.suppress(RedisError, RedisUnavailable):  # it has just come back
                looking_after.turn()
            return {run.split()[0] for run in handled()} == {str(n) for n in range(count)} and handled()["14 2"] > 0

        wait_for(done, 90, "every message to be handled")
        wait_for(lambda: done() and "5 2" in handled(), 30, "the second attempts")
        assert worker.stop() == 0
        looking_after.close()
    repeated = {run: times for run, times in handled().items() if times > 1}
    assert all(int(run.split()[0]) < 10 for run in repeated), repeated  # only of the job in hand
    assert redis.llen(QUEUE) == redis.zcard("rq:failed:default") == 0
    assert redis.zcard("rq:wip:default") == redis.zcard("rq:scheduled:default") == 0


# An address that leads elsewhere from now on, while the old connections still work.


class Signpost(socketserver.ThreadingTCPServer):
    """Passes connections on to the port that it names when they are made."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Relay)
        self.port = port


class Relay(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.port)) as there:  # type: ignore[attr-defined]
            ends = {self.request: there, there: self.request}
            while True:
                for ready in select.select(list(ends), [], [])[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    ends[ready].sendall(data)


def test_after_a_failover_it_does_not_stay_with_the_old_master(troubled: Troubled, tmp_path: Path) -> None:
    """As with a name that a service moves: whoever is connected stays connected to what is a replica now."""
    with ChosenRedis(tmp_path / "other") as other, Signpost(troubled.server.port) as signpost:
        threading.Thread(target=signpost.serve_forever, daemon=True).start()
        at_once = troubled.at_once | {"url": f"redis://127.0.0.1:{signpost.server_address[1]}/0"}
        app = make_app(inline=False)
        app.add_topic("a", lambda value: None)
        loop = Loop(app, troubled.loop.clock, JobQueue(at_once, "t", "troubled:app"))  # type: ignore[arg-type]
        loop.put("a", 1)
        loop.consumer.turn()
        with Redis.from_url(other.url) as redis:
            redis.flushall()
            for key in troubled.redis.scan_iter():
                redis.restore(key, 0, troubled.redis.dump(key))  # type: ignore[arg-type]
            signpost.port = other.port
            with a_replica(troubled):
                loop.put("a", 2)
                loop.turn(10, after=20)
                assert redis.hget("flowkit:marks:g", "queued:a:0") == b"2", loop.events.errors[-1]
            assert len(loop.events.errors) == 1  # the answer of the old one
        signpost.shutdown()
