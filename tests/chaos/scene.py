"""What a scenario acts on: the processes of an application, the load, and the disturbances that it makes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from kafka import KafkaProducer
from kafka.errors import KafkaError
from processes import Process
from witnesses import Ledgers, ScenarioError, Stream, left_in, payload, uncommitted

LOOK_EVERY = 0.05
"""Seconds between looks at the ledgers and the processes."""


@dataclass(slots=True)
class Disturbance:
    """What was done to them, from when until when."""

    what: str
    began: float
    ended: float = 0.0


class Part:
    """One process of the application that can be ended and started again."""

    def __init__(self, scene: Scene, name: str, command: tuple[str, ...], restarts: bool) -> None:
        self.scene = scene
        self.name = name
        self.command = command
        self.restarts = restarts
        self.process: Process | None = None
        self.deaths = 0
        self.start()

    def start(self) -> Self:
        self.process = Process(*self.command, env=self.scene.env, log=self.scene.directory / f"{self.name}.log")
        self.scene.tell(f"{self.name} started, process {self.process.pid}")
        return self

    @property
    def running(self) -> Process:
        if self.process is None:
            raise ScenarioError(f"{self.name} does not run")
        return self.process

    def kill(self) -> None:
        """SIGKILL, to it alone."""
        self._ended("killed").kill()

    def kill_whole(self) -> None:
        """SIGKILL to it and its children, as when their machine fails."""
        self._ended("killed, with its children").kill_with_children()

    def kill_child(self, *, working: bool = False) -> None:
        """SIGKILL to a child: the horse of ``rq worker``, a process of ``flowkit worker``. Any, or one that has handled
        something: most of a horse's life goes into its imports.
        """
        if not working:
            pid = self.running.kill_child()
            return self.scene.tell(f"process {pid} of {self.name} killed")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for pid in self.running.children():
                if any(self.scene.ledgers.directory.glob(f"{pid}-*")):
                    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                        os.kill(pid, signal.SIGKILL)
                        return self.scene.tell(f"process {pid} of {self.name} killed, which was at work")
            time.sleep(0.002)
        raise ScenarioError(f"no child of {self.name} was at work within 30 s; {self.scene.state()}")

    def stop(self) -> None:
        """SIGTERM, as a deployment does; it must end clean."""
        process = self._ended("told to stop")
        if code := process.stop(60):
            raise ScenarioError(f"{self.name} was told to stop and ended with {code}:\n{process.output[-3000:]}")

    def freeze(self) -> None:
        """SIGSTOP to it and its children. They go on with ``thaw``."""
        self._signal(signal.SIGSTOP, "frozen")

    def thaw(self) -> None:
        self._signal(signal.SIGCONT, "goes on")

    def wait_for_work(self, timeout: float = 60) -> None:
        """Waits until it has handled something inline: whoever waits for partitions is not worth a kill."""
        pid = self.running.pid
        self.scene.wait_until(lambda: self.scene.ledgers.pids[pid], timeout, f"{self.name} to handle something")

    def look(self) -> None:
        """Starts it again if that is asked for; else it may not end unasked."""
        if self.process is None or (code := self.process.popen.poll()) is None:
            return
        if not self.restarts:
            raise ScenarioError(f"{self.name} ended by itself, with {code}:\n{self.process.output[-3000:]}")
        self.deaths += 1
        self.scene.tell(f"{self.name} ended by itself, with {code}")
        self.start()

    def _ended(self, how: str) -> Process:
        process, self.process = self.running, None
        self.scene.tell(f"{self.name} {how}, process {process.pid}")
        return process

    def _signal(self, number: signal.Signals, what: str) -> None:
        for pid in (self.running.pid, *self.running.children()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        self.scene.tell(f"{self.name} {what}")


class Load(threading.Thread):
    """Sends the messages of all streams: a few of each, and the others, when they are ``warm``, ``rate`` a second together."""

    def __init__(self, hosts: str, streams: list[Stream], rate: float, acts: Callable[[str, int], str]) -> None:
        super().__init__(name="load", daemon=True)
        self.hosts = hosts
        self.streams = streams
        self.rate = rate
        self.acts = acts
        self.error: BaseException | None = None
        self.limit = 1.0
        """The part of all messages that may be sent by now: the load waits for a scenario that is late."""
        self.warm = threading.Event()
        self.ended = threading.Event()
        self.refusal = ""
        """What Kafka said to the last message that it refused."""

    def run(self) -> None:
        try:
            producer = self._producer()
            try:
                self._send_all(producer)
                if not self.ended.is_set():
                    producer.flush(timeout=300)
            finally:
                producer.close(timeout=5)
        except BaseException as error:  # told by ``check``
            self.error = error

    def _producer(self) -> Any:
        return KafkaProducer(
            bootstrap_servers=self.hosts,
            acks="all",
            enable_idempotence=True,
            linger_ms=5,
            batch_size=65_536,
            request_timeout_ms=10_000,
            delivery_timeout_ms=240_000,
            reconnect_backoff_max_ms=1_000,
        )

    def _send_all(self, producer: Any) -> None:
        for stream in self.streams:
            self._send(producer, stream, stream.warm_up)
        while not self.warm.wait(0.1):
            if self.ended.is_set():
                return
        at, part = time.monotonic(), 0.0
        total = sum(stream.count - stream.warm_up for stream in self.streams)
        while not self.ended.is_set() and self.produced < 1:
            at, before = time.monotonic(), at
            part = max(part, min(self.limit, part + (at - before) * self.rate / total))
            for stream in self.streams:
                self._send(producer, stream, stream.warm_up + int((stream.count - stream.warm_up) * part))
            self.ended.wait(0.01)

    def _send(self, producer: Any, stream: Stream, up_to: int) -> None:
        for number in range(stream.produced, up_to):
            act = self.acts(stream.name, number) if number >= stream.warm_up else ""
            stream.poisoned += act == "fail"
            delivery = producer.send(stream.topic, payload(number, act), partition=number % stream.partitions)
            delivery.add_callback(partial(self._confirmed, stream, number))
            delivery.add_errback(partial(self._refused, stream, number))
            stream.produced = number + 1

    def _confirmed(self, stream: Stream, number: int, _: object) -> None:
        stream.note_sent(number)

    def _refused(self, stream: Stream, number: int, error: object) -> None:
        stream.refused += 1
        self.refusal = f"{stream.name} message {number}: {error!r}"

    @property
    def produced(self) -> float:
        """The part of all messages that have been given to the producer, up to 1."""
        return sum(stream.produced for stream in self.streams) / sum(stream.count for stream in self.streams)

    def check(self) -> None:
        if self.error is not None:
            raise ScenarioError(f"the load broke: {self.error!r}") from self.error


class Scene:
    """One scenario while it runs: its servers, processes, load and witnesses.

    ``kafka`` and ``redis`` are the servers (tests/servers.py), to be disturbed if they are the scenario's own.
    """

    def __init__(
        self,
        *,
        kafka: Any,
        redis: Any,
        streams: list[Stream],
        rate: float,
        env: Mapping[str, str],
        directory: Path,
        quick: bool,
        seed: int,
        deadline: float,
        tell: Callable[[str], None],
    ) -> None:
        self.kafka = kafka
        self.redis = redis
        self.streams = streams
        self.rate = rate
        self.directory = directory
        self.quick = quick
        self.seed = seed
        self.rng = random.Random(seed)
        self.began = time.monotonic()
        self.end_by = self.began + deadline
        self.deadline = deadline
        self.parts: list[Part] = []
        self.disturbances: list[Disturbance] = []
        self.acts: Callable[[str, int], str] = lambda stream, number: ""
        """By stream and number: what the handler of that message is to do; set it before ``load``."""
        self.faults: list[str] = []
        """What is not as promised, in words. A scenario may add what else it looks at."""
        ledger = directory / "ledger"
        ledger.mkdir(parents=True)
        self.ledgers = Ledgers(ledger, streams)
        self.env = {
            "FLOWKIT_KAFKA_HOSTS": kafka.hosts,
            "FLOWKIT_REDIS": redis.url,
            "CHAOS_LEDGER": str(ledger),
            **{f"CHAOS_{stream.name.upper()}": stream.topic for stream in streams},
            **env,
        }
        self._tell = tell
        self._load: Load | None = None

    # The processes.

    def consumers(self, count: int = 1, *, restarts: bool = False) -> list[Part]:
        """Starts ``flowkit run``, so many times. ``restarts``: one that ends by itself is started again, as by systemd."""
        return self._parts("consumer", ("flowkit", "run", "chaotic:app"), count, restarts)

    def workers(
        self,
        count: int = 1,
        kind: Literal["flowkit", "rq"] = "flowkit",
        *,
        processes: int = 1,
        restarts: bool = False,
    ) -> list[Part]:
        """Starts ``flowkit worker`` or ``rq worker``, so many times."""
        if kind == "flowkit":
            command = ("flowkit", "worker", "chaotic:app", "--processes", str(processes))
        else:  # the interval is how soon the death of its machine is noticed: 60 s after the last beat
            command = (
                "rq",
                "worker",
                "--url",
                self.redis.url,
                "--job-monitoring-interval",
                "1",
                "--quiet",
                "default",
            )
        return self._parts(f"{kind}-worker", command, count, restarts)

    def _parts(self, name: str, command: tuple[str, ...], count: int, restarts: bool) -> list[Part]:
        have = sum(part.name.rpartition("-")[0] == name for part in self.parts)
        made = []
        for number in range(have + 1, have + count + 1):
            made.append(Part(self, f"{name}-{number}", command, restarts))
            self.parts.append(made[-1])
        return made

    # The load and the disturbances.

    @contextlib.contextmanager
    def load(self) -> Iterator[None]:
        """Sends the messages. Its block begins when some of each partition have been handled, and ends when all are sent."""
        self._load = Load(self.kafka.hosts, self.streams, self.rate, self.acts)
        self._load.start()

        def warm() -> bool:
            return all(stream.handled >= stream.warm_up for stream in self.streams)

        self.wait_until(warm, 90, "the first messages of each partition to be handled")
        self._load.warm.set()
        self.tell("all partitions are being worked on")
        yield
        self.wait_until(lambda: not self.loading.is_alive(), 600, "all messages to be sent")
        self.tell(f"all sent: {sum(stream.sent for stream in self.streams):,}")

    @property
    def loading(self) -> Load:
        if self._load is None:
            raise ScenarioError("there is no load yet: `with scene.load():`")
        return self._load

    def moments(self, count: int, quick: int = 1, *, apart: float = 0.0) -> Iterator[int]:
        """So many moments in the course of the load, from its first tenth to its eighth; chance has a say in each. The load
        waits for a scenario whose disturbances take long.

        ``apart``: seconds at least after the disturbance before, so that it is over with.
        """
        count = quick if self.quick else count
        for number in range(count):
            part = 0.1 + 0.7 * (number + self.rng.uniform(0.0, 0.6)) / count
            self.loading.limit = part + 0.15  # behind the last one a part is left, in which it goes on
            self.wait_until(lambda part=part: self.loading.produced >= part, 600, "more messages to be sent")
            if self.disturbances:
                self.wait(self.disturbances[-1].ended + apart - time.monotonic())
            yield number
        self.loading.limit = 1.0

    @contextlib.contextmanager
    def disturbance(self, what: str) -> Iterator[Disturbance]:
        """Counts what its block does as one disturbance. Recovery is measured from its end."""
        self.tell(f"disturbance: {what}")
        done = Disturbance(what, time.monotonic())
        self.disturbances.append(done)
        try:
            yield done
        finally:
            done.ended = time.monotonic()

    # Waiting.

    def wait(self, seconds: float) -> None:
        """Lets it all run on."""
        until = time.monotonic() + seconds
        self.wait_until(lambda: time.monotonic() >= until, seconds + 60, f"{seconds:g} s")

    def wait_until(self, condition: Callable[[], Any], timeout: float, what: str) -> None:
        """Raises ``ScenarioError`` if it takes longer, somebody ends unasked, or the scenario's time is up."""
        deadline = time.monotonic() + timeout
        while not condition():
            time.sleep(LOOK_EVERY)
            self.look()
            if time.monotonic() > deadline:
                raise ScenarioError(f"waited {timeout:g} s for {what}; {self.state()}")

    def look(self) -> None:
        self.ledgers.read()
        for part in self.parts:
            part.look()
        if self._load is not None:
            self._load.check()
        if time.monotonic() > self.end_by:
            raise ScenarioError(f"it has taken longer than {self.deadline:g} s; {self.state()}")

    def drained(self) -> bool:
        """Whether all that was sent has been handled, and nothing is left in Redis."""
        return all(stream.handled >= stream.sent - stream.poisoned for stream in self.streams) and not self.in_redis()

    def committed(self) -> bool:
        """Whether the groups have committed all that is in their topics, by the word of Kafka."""
        try:
            return not any(uncommitted(self.kafka.hosts, stream) for stream in self.streams)
        except KafkaError as error:
            if not error.retriable:  # one that has just come back does not know its groups yet
                raise
            return False

    def in_redis(self) -> str:
        """What is still to do there, in words."""
        return left_in(self.redis.url) if any(stream.name == "queued" for stream in self.streams) else ""

    def state(self) -> str:
        """How far it is, in words."""
        return "; ".join(f"{s.name}: {s.sent:,} sent, {s.handled:,} handled in {s.runs:,} runs" for s in self.streams)

    def tell(self, what: str) -> None:
        self._tell(f"  {time.monotonic() - self.began:6.1f} s  {what}")

    # The end.

    def stop(self) -> None:
        """Ends every process as a deployment does. One that does not end clean is a fault."""
        parts = [part for part in self.parts if part.process is not None]
        for part in parts:
            part.running.popen.terminate()
        codes = {part.name: part.running.wait(60) for part in parts}
        self.faults += [f"{name} did not end clean, but with {code}" for name, code in codes.items() if code]

    def close(self) -> None:
        """Leaves nothing behind: not the children of killed processes either, which are known by their environment."""
        if self._load is not None:
            self._load.ended.set()
            self._load.join(20)
        for part in self.parts:
            if part.process is not None:
                part.process.kill_with_children()
        for pid in running_with(f"CHAOS_LEDGER={self.env['CHAOS_LEDGER']}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def running_with(variable: str) -> list[int]:
    """The processes that have this ``NAME=value`` in the environment they were started with."""
    wanted = variable.encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found
