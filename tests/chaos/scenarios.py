"""What a scenario is, what it promises, and what came of it.

    @scenario(
        "consumer-killed",
        Messages(inline=30_000, queued=30_000, rate=2_000),
        quick=Messages(inline=4_000, queued=4_000, rate=1_000),
        promise=Promise(each=500, recovered=15, of="every partition"),
    )
    def consumer_killed(scene: Scene) -> None:
        \"\"\"One of two consumers gets a SIGKILL, and another one takes its place.\"\"\"
        consumers = scene.consumers(2)
        scene.workers(1)
        with scene.load():
            for number in scene.moments(6, quick=1):
                with scene.disturbance("SIGKILL of a consumer"):
                    consumers[number % 2].kill()
                consumers[number % 2].start()

What it leaves running is waited for and stopped, the witnesses are asked, and the promise is checked.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kafka import KafkaAdminClient
from scene import Scene
from servers import ApacheKafka, RedisServer
from witnesses import NEVER, PARTITIONS, ScenarioError, Stream, uncommitted, values_in

from flowkit.errors import DevStackError, FlowkitError

Of = Literal["any", "every partition", "all sent"]


@dataclass(frozen=True, slots=True)
class Messages:
    """How many of each stream, and how many a second of all together."""

    inline: int = 0
    queued: int = 0
    rate: float = 2_000


@dataclass(frozen=True, slots=True)
class Promise:
    """Nothing is lost, and:

    each          messages that one disturbance may repeat
    repeated      messages that may be repeated anyhow, added to those
    again         answers that may be in their topic more than once; as many as are repeated, if not given
    recovered     seconds from the end of a disturbance until it goes on
    of            what "goes on" means, in each stream: the next message of any partition is handled, or the next one of every
                  partition, or the last one of all that had been sent by then
    """

    each: int = 0
    repeated: int = 0
    again: int | None = None
    recovered: float = 15.0
    of: Of = "every partition"


@dataclass(slots=True)
class Result:
    """A row of the table. ``faults`` says in words which promise was broken."""

    name: str
    sent: int = 0
    handled: int = 0
    responded: int = 0
    lost: int = 0
    repeated: int = 0
    repeated_allowed: int = 0
    again: int = 0
    again_allowed: int = 0
    disturbances: int = 0
    recovered: float = 0.0
    recovered_allowed: float = 0.0
    of: str = "any"
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def judge(self) -> None:
        """Puts what is not as promised before the other faults."""
        found = []
        if self.lost:
            found.append(f"{self.lost:,} messages were lost")
        if self.repeated > self.repeated_allowed:
            found.append(f"{self.repeated:,} messages were handled again, {self.repeated_allowed:,} were allowed")
        if self.again > self.again_allowed:
            found.append(f"{self.again:,} answers were sent again, {self.again_allowed:,} were allowed")
        if self.recovered > self.recovered_allowed:
            took = "it never went on" if self.recovered == NEVER else f"it took {self.recovered:.1f} s to go on"
            found.append(f"{took} ({self.of}), {self.recovered_allowed:g} s were allowed")
        if not self.disturbances:
            found.append("nothing was disturbed")
        if not self.sent:
            found.append("nothing was sent")
        self.faults[:0] = found


@dataclass(frozen=True, slots=True)
class Scenario:
    """A function that disturbs a scene, and what it is given. That of a big one may give a result of its own instead."""

    name: str
    messages: Messages
    promise: Promise
    run: Callable[[Scene], Result | None]
    quick: Messages | str
    """The short form; or why it has none, in words."""
    env: Mapping[str, str]
    """For the processes: settings (FLOWKIT_...), and what tests/apps/chaotic.py asks for (CHAOS_...)."""
    kafka: Callable[[Path], Any] | None
    """Makes the scenario's own; else the shared one must come to no harm."""
    redis: Callable[[Path], Any]
    partitions: int
    isolation: str
    """Of who reads the answers: with ``read_committed`` those of aborted transactions do not count."""
    deadline: float
    """Seconds for all of it but the servers."""
    drain: float
    """Seconds that all that was sent may take to be handled, when the scenario has done its work."""

    @property
    def about(self) -> str:
        return " ".join((self.run.__doc__ or "").split())


SCENARIOS: dict[str, Scenario] = {}
"""By name, in the order in which they run. See ``chaos.py`` for the modules that register them."""

LEFT_OUT: dict[str, str] = {}
"""By name: why a scenario cannot run on this machine."""


def scenario(
    name: str,
    messages: Messages,
    *,
    quick: Messages | str,
    promise: Promise,
    env: Mapping[str, str] | None = None,
    kafka: Callable[[Path], Any] | None = None,
    redis: Callable[[Path], Any] = RedisServer,
    partitions: int = PARTITIONS,
    isolation: str = "read_uncommitted",
    deadline: float = 420.0,
    drain: float = 150.0,
) -> Callable[[Callable[[Scene], Result | None]], Callable[[Scene], Result | None]]:
    """Registers a scenario. ``quick=""`` or a reason: it has no short form."""

    def register(run: Callable[[Scene], Result | None]) -> Callable[[Scene], Result | None]:
        if name in SCENARIOS:
            raise ValueError(f"there are two scenarios {name!r}: give one of them another name")
        SCENARIOS[name] = Scenario(
            name, messages, promise, run, quick, env or {}, kafka, redis, partitions, isolation, deadline, drain
        )
        return run

    return register


class Stage:
    """Where scenarios run, one after the other: the Kafka they share is started when the first one needs it."""

    def __init__(self, *, hosts: str = "", tell: Callable[[str], None] = print, keep: Path | None = None) -> None:
        self.tell = tell
        self.keep = keep
        """Where logs and ledgers are left, if at all."""
        self._shared: Any = _Running(hosts) if hosts else None
        self._stack = contextlib.ExitStack()
        self._runs = 0

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def perform(self, scenario: Scenario, *, quick: bool, seed: int) -> Result:
        """Runs it once. Faults are in the result; raises nothing for them."""
        self._runs += 1
        with contextlib.ExitStack() as stack:
            if self.keep is None:
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
            else:
                directory = self.keep / scenario.name
                directory.mkdir(parents=True)
            try:
                kafka = self._kafka(scenario, stack, directory / "kafka")
                redis = stack.enter_context(scenario.redis(directory / "redis"))
            except DevStackError as error:  # nothing has begun, and the next scenario is to run
                result = Result(scenario.name, faults=[str(error)])
                result.judge()
                return result
            scene = self._scene(scenario, kafka, redis, directory, quick=quick, seed=seed)
            stack.callback(scene.close)
            return self._perform(scenario, scene)

    def _kafka(self, scenario: Scenario, stack: contextlib.ExitStack, directory: Path) -> Any:
        if scenario.kafka is not None:
            return stack.enter_context(scenario.kafka(directory))
        if self._shared is None:
            shared = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-kafka-")))
            self._shared = self._stack.enter_context(ApacheKafka(shared / "kafka"))
        return self._shared

    def _scene(self, scenario: Scenario, kafka: Any, redis: Any, directory: Path, *, quick: bool, seed: int) -> Scene:
        messages = scenario.quick if quick and isinstance(scenario.quick, Messages) else scenario.messages
        run = f"{scenario.name}-{time.time_ns():x}-{self._runs}"
        counts = {"inline": messages.inline, "queued": messages.queued}
        streams = [
            Stream(name, f"{name}-{run}", count, scenario.partitions) for name, count in counts.items() if count
        ]
        return Scene(
            kafka=kafka,
            redis=redis,
            streams=streams,
            rate=messages.rate,
            env=scenario.env,
            directory=directory,
            quick=quick,
            seed=seed,
            deadline=scenario.deadline,
            tell=self.tell,
        )

    def _perform(self, scenario: Scenario, scene: Scene) -> Result:
        result: Result | None = None
        try:
            create_topics(scene, scenario.env)
            result = scenario.run(scene)
            if result is None:
                settle(scene, scenario.drain)
        except (AssertionError, FlowkitError) as error:  # also ScenarioError, and what Process and Server raise
            scene.faults.append(str(error))
        except Exception as error:  # a fault like any other, and the next scenario is to run
            scene.faults.append(f"it broke: {error!r}")
            scene.tell(traceback.format_exc())
        if result is None:
            result = found(scenario, scene)
        result.seconds = time.monotonic() - scene.began
        return result


@dataclass(frozen=True, slots=True)
class _Running:
    """A broker that runs already."""

    hosts: str


def create_topics(scene: Scene, env: Mapping[str, str]) -> None:
    """With as many copies as the brokers make by default."""
    names = [name for stream in scene.streams for name in (stream.topic, stream.answers)]
    names += [stream.dead_letters for stream in scene.streams if env.get("CHAOS_DEAD_LETTERS")]
    names += [name for stream in scene.streams for name in stream.retry_topics if env.get("CHAOS_RETRY_TOPICS")]
    if not names:
        return
    partitions = scene.streams[0].partitions
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=scene.kafka.hosts)) as admin:
        admin.create_topics({name: {"num_partitions": partitions, "replication_factor": -1} for name in names})
        admin.wait_for_topics(names)


def settle(scene: Scene, timeout: float) -> None:
    """Waits until all that was sent is handled and committed, and stops everybody."""
    try:
        scene.wait_until(scene.drained, timeout, "all that was sent to be handled, and an empty queue")
        scene.wait_until(scene.committed, 60, "all offsets to be committed")
    except ScenarioError as error:
        scene.faults.append(f"{error}; in Redis: {scene.in_redis() or 'nothing'}")
    scene.tell("all handled and committed" if not scene.faults else "it does not end")
    scene.stop()
    scene.faults += [fault for stream in scene.streams for fault in uncommitted(scene.kafka.hosts, stream)]


def found(scenario: Scenario, scene: Scene) -> Result:
    """What the witnesses say, and whether it is as promised."""
    promise, streams = scenario.promise, scene.streams
    scene.ledgers.close()
    for stream in streams:
        try:
            answers = values_in(
                scene.kafka.hosts, stream.answers, stream.partitions, isolation_level=scenario.isolation
            )
            stream.answered.update(map(int, answers))
            if scenario.env.get("CHAOS_DEAD_LETTERS"):
                dead = values_in(scene.kafka.hosts, stream.dead_letters, stream.partitions)
                stream.dead.update(number_in(value) for value in dead)
        except Exception as error:  # a broker that stayed away: what was lost cannot be said, so all of it is
            scene.faults.append(f"the answers of {stream.name} cannot be read: {error!r}")
        if stream.refused:
            scene.faults.append(f"Kafka refused {stream.refused:,} messages: {scene.loading.refusal}")
        if extra := set(stream.answered) - set(range(stream.count)):
            scene.faults.append(f"{len(extra)} answers to messages that there are not: {sorted(extra)[:5]}")
        if lost := sorted(stream.lost()):
            some = ", ".join(f"[{n % stream.partitions}] {n}" for n in lost[:8])
            scene.faults.append(f"lost of {stream.name}: {some}" + (", ..." if len(lost) > 8 else ""))
    took = [recovery(scene, disturbance.ended, promise.of) for disturbance in scene.disturbances]
    if took:
        scene.tell(f"went on ({promise.of}) after " + ", ".join(f"{seconds:.1f}" for seconds in took) + " s")
    result = Result(
        scenario.name,
        sent=sum(stream.sent for stream in streams),
        handled=sum(stream.handled for stream in streams),
        responded=sum(len(stream.answered) for stream in streams),
        lost=sum(len(stream.lost()) for stream in streams),
        repeated=sum(stream.repeated for stream in streams),
        again=sum(stream.answered_again for stream in streams),
        disturbances=len(scene.disturbances),
        recovered=max(took, default=0.0),
        recovered_allowed=promise.recovered,
        of=promise.of,
        faults=scene.faults,
    )
    result.repeated_allowed = promise.repeated + promise.each * len(scene.disturbances)
    result.again_allowed = result.repeated_allowed if promise.again is None else promise.again
    result.judge()
    return result


def recovery(scene: Scene, moment: float, of: Of) -> float:
    """Seconds from a moment until all streams went on."""
    measure = {"any": Stream.next_of_any, "every partition": Stream.next_of_every, "all sent": Stream.last_of_all}[of]
    return max((measure(stream, moment) for stream in scene.streams), default=NEVER)


def number_in(value: bytes) -> int:
    """The number of a message, from its beginning."""
    return int(value.removeprefix(b'{"id":').partition(b",")[0])


def chosen(names: list[str], *, quick: bool) -> Iterator[Scenario]:
    """Those of these names, or all; of those without a short form none, if that is asked for. Raises ``KeyError``."""
    for each in [SCENARIOS[name] for name in dict.fromkeys(names)] if names else SCENARIOS.values():
        if not quick or isinstance(each.quick, Messages):
            yield each
