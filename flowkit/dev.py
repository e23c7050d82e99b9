"""``flowkit dev``: an embedded broker, an embedded Redis, the consumer and a worker, in one terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

from . import topics
from .devstack import WATCHED, EmbeddedBroker, EmbeddedRedis
from .queues import route_queues

if TYPE_CHECKING:
    from .app import Flowkit

Say = Callable[[str, str], None]
# The embedded broker lets a new group wait for half its session time-out before it may start.
QUICK_GROUPS = {"FLOWKIT_KAFKA_SESSION_TIMEOUT": "3", "FLOWKIT_KAFKA_HEARTBEAT_INTERVAL": "0.5"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Child:
    """One of our own commands as a child process, its output line by line to ``say``. It ends when we do."""

    def __init__(self, name: str, arguments: list[str], environment: dict[str, str], say: Say) -> None:
        self.name = name
        command = [sys.executable, "-u", "-m", "flowkit", *arguments]
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", WATCHED, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C reaches us alone; we stop the children in order
            text=True,
            errors="replace",
        )
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout, say), daemon=True)
        self._reader.start()

    def _read(self, output: IO[str], say: Say) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody reads us any more; the main thread finds out as well
            for line in output:
                say(self.name, line.rstrip("\n"))

    def stop(self, timeout: float) -> int:
        """SIGTERM, then SIGKILL after ``timeout`` seconds; gives the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = 1
        if code == -signal.SIGTERM:
            code = 0  # it had not begun: from its first message on it ends by itself
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its watcher, and itself if it did not end
        self.process.wait()
        self._reader.join(2.0)
        assert self.process.stdin is not None
        self.process.stdin.close()
        return code


class DevStack:
    """Broker, Redis, consumer and worker for one application. A ``with`` block starts them and leaves nothing behind."""

    def __init__(
        self,
        app: Flowkit,
        say: Say,
        *,
        broker_port: int | None = None,
        redis_port: int | None = None,
        partitions: int = 4,
    ) -> None:
        self.app = app
        self.say = say
        self.partitions = partitions
        settings = app.settings
        self.broker = EmbeddedBroker(_port(broker_port, settings.kafka.hosts[0] if settings.kafka.hosts else None))
        self.queued = bool(route_queues(app))  # what another worker than RQ needs is not ours to start
        redis = settings.redis if isinstance(settings.redis, str) else None
        self.redis = EmbeddedRedis(_port(redis_port, redis)) if self.queued else None
        self.children: list[Child] = []

    @property
    def environment(self) -> dict[str, str]:
        """What another process needs to reach this broker and this Redis."""
        found = {"FLOWKIT_KAFKA_HOSTS": self.broker.hosts}
        if self.redis is not None:
            found["FLOWKIT_REDIS"] = self.redis.url
        return found

    def needed_to_send(self) -> dict[str, str]:
        """The part of ``environment`` that ``flowkit send`` needs, because the application's own settings say otherwise."""
        hosts = self.broker.hosts
        return {} if self.app.settings.kafka.hosts == (hosts,) else {"FLOWKIT_KAFKA_HOSTS": hosts}

    def __enter__(self) -> DevStack:
        try:
            self.broker.start()
            self.say("dev", f"broker on {self.broker.hosts} (embedded, in memory)")
            if self.redis is not None:
                self.redis.start()
                self.say("dev", f"Redis on {self.redis.url}")
            self.broker.create_topics(self.topics())
            self._start_child("run")
            if self.queued:
                self._start_child("worker")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_child(self, command: str) -> None:
        arguments = [command, self.app.reference]
        environment = {**QUICK_GROUPS, **self.environment, "FLOWKIT_HEALTH": ""}  # two cannot have one port
        self.children.append(Child(command, arguments, environment, self.say))

    def topics(self) -> dict[str, int]:
        """Every topic that the application needs, with its partitions: as declared or set, else those of ``flowkit dev``."""
        found = {topic: topics.wanted(self.app, topic) for topic in topics.uses(self.app)}
        return {topic: wanted.partitions or self.partitions for topic, wanted in found.items()}

    def sent_topics(self) -> dict[str, int]:
        """Those of ``topics`` that the application sends to."""
        uses = topics.uses(self.app)
        return {
            topic: count for topic, count in self.topics().items() if {"response", "dead letter"} & {*uses[topic]}
        }

    def wait(self, until: Callable[[], bool], meanwhile: Callable[[], None]) -> int:
        """Until ``until`` is true (0) or one of the parts ended by itself (1); calls ``meanwhile`` in between."""
        while not until():
            for name, process in self._processes():
                if process is not None and process.poll() is not None:
                    self.say("dev", f"{name} ended with code {process.returncode}; stopping the rest")
                    return 1
            meanwhile()
        return 0

    def _processes(self) -> Iterator[tuple[str, subprocess.Popen[bytes] | subprocess.Popen[str] | None]]:
        yield from ((child.name, child.process) for child in self.children)
        yield "the broker", self.broker.process
        if self.redis is not None:
            yield "Redis", self.redis.process

    def __exit__(self, *_: object) -> None:
        timeout = self.app.settings.shutdown_timeout + 2
        for child in self.children:  # the consumer first, so that nothing is queued behind a stopped worker
            code = child.stop(timeout)
            self.say("dev", f"{child.name} stopped" + (f" with code {code}" if code else ""))
        if self.redis is not None:
            self.redis.stop()
        self.broker.stop()


def _port(given: int | None, configured: str | None) -> int | None:
    """The port to use: the one given (0: a free one), else the one the application expects on this machine."""
    if given is not None:
        return given or None
    if configured is None:
        return None
    parts = urlsplit(configured if "://" in configured else f"//{configured}")
    return parts.port if parts.hostname in LOOPBACK else None


@contextlib.contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set. A second signal ends this process at once, and its children with it."""
    event = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if event.is_set():
            os.write(2, f"flowkit: {signal.Signals(number).name} again, ending at once\n".encode())
            os._exit(1)
        event.set()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, old in before.items():
            signal.signal(number, old)
