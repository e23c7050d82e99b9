"""Numbered messages through the queue, while consumers, workers and horses are killed at random: what is lost or done twice?

    make soak                                         # or:
    python tests/chaos/soak.py [--count 1000000] [--seed N] [--workers flowkit|rq|mixed] [--every 3]

Real processes on an Apache Kafka and a Redis of its own. The counts come from three witnesses, none of which is flowkit:

- the ledger: each run of a handler writes one line into a file of its process (tests/apps/ledger.py);
- Redis itself: its append-only file holds every command it ran, so every job that was ever queued, and by whom;
- the topic of the responses.

Ends with exit code 0 if nothing was lost, nothing was queued twice, and what was repeated was in hand at a kill.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from redis import Redis

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from processes import Process
from servers import ApacheKafka, RedisServer
from witnesses import PARTITIONS, ScenarioError, left_in, payload, values_in

from flowkit.devstack import create_topics

ANSWERED = 10
"""As in tests/apps/ledger.py: each so many messages one is answered."""

PATIENCE = 200.0
"""Seconds without a newly handled message after which the soak gives up. The job of a killed worker comes back within about a
minute."""

MOST_REPEATED = 0.5
"""The largest part of what killed jobs had handled that may be handled again. Their progress is noted every few milliseconds,
so it is a small part, except where a busy machine holds a note up; without such notes it is all."""

CREWS = {
    "flowkit": ("flowkit-1", "flowkit-2"),
    "rq": ("rq-1", "rq-2", "rq-3"),
    "mixed": ("flowkit-1", "rq-1", "rq-2"),
}
"""The workers of ``--workers``. Each ``flowkit worker`` has two processes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a soak does. Times are in seconds."""

    count: int = 1_000_000
    workers: str = "mixed"
    seed: int = 1
    every: float = 3.0
    """Between two kills, on average."""
    work: float = 0.000_5
    """That a message takes in its handler, on average."""
    deadline: float = 3600.0
    """For all of it."""
    job_seconds: float = 1.0
    """As long as a job takes: so what is repeated of a killed one is told from all that it had done."""

    @property
    def stock(self) -> int:
        """Messages that are there when the consumers start."""
        return min(100_000, self.count // 10)

    @property
    def ahead(self) -> int:
        """Messages in the topic, after that beginning, which no handler has seen. They come in waves, a fourth at a time, as a
        trickle would make small jobs."""
        return min(30_000, self.count // 10)

    @property
    def backlog(self) -> int:
        """``max_backlog``: consumers pause and go on all the time."""
        return self.ahead // 2


class Kill(NamedTuple):
    """One SIGKILL, or several at a time as when a machine fails. ``uncommitted``: messages that were queued already, but would
    come from Kafka again."""

    number: int
    kind: str
    pids: tuple[int, ...]
    at: float
    uncommitted: int


@dataclass(slots=True)
class Findings:
    """What a soak has found. ``faults`` says in words what should not be so."""

    plan: Plan
    seconds: float = 0.0
    kills: list[Kill] = field(default_factory=list)
    never_queued: int = 0
    never_handled: int = 0
    queued_twice: int = 0
    jobs: int = 0
    put_back: int = 0
    runs: int = 0
    repeated: int = 0
    unexplained: int = 0
    repeated_by: Counter[int] = field(default_factory=Counter)
    """By the number of a kill: the handler runs that came again because of it."""
    in_hand_by: Counter[int] = field(default_factory=Counter)
    """By the number of a kill: the messages that the jobs in hand had handled by then."""
    oldest: float = 0.0
    """Seconds before the kill of the oldest run that came again."""
    unanswered: int = 0
    answered_again: int = 0
    codes: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return max(self.never_queued, self.never_handled)

    def report(self) -> str:
        plan = self.plan
        again = sum(kill.uncommitted for kill in self.kills)
        lines = [
            f"{plan.count:,} messages of 200 bytes in {PARTITIONS} partitions, workers: {plan.workers}, seed {plan.seed}:"
            f" {self.seconds:.0f} s, {len(self.kills)} kills",
            f"  lost            {self.lost:>9,}   (never queued {self.never_queued:,}, never handled {self.never_handled:,})",
            f"  queued twice    {self.queued_twice:>9,}   ({again:,} were queued but not committed when a consumer was killed)",
            f"  jobs            {self.jobs:>9,}   (of the consumers; workers made {self.put_back:,} more of parts of them)",
            f"  repeated runs   {self.repeated:>9,}   (of {self.runs:,}; {self.unexplained:,} not explained by a kill;"
            f" the oldest ended {self.oldest * 1000:.0f} ms before it)",
            f"  unanswered      {self.unanswered:>9,}   (answered again {self.answered_again:,})",
            "  exit codes at the end: " + ", ".join(f"{name} {code}" for name, code in self.codes.items()),
            f"  {'killed':<28}{'times':>6}{'repeated':>10}{'most':>8}{'of those handled in the jobs in hand':>38}",
        ]
        for kind in sorted({kill.kind for kill in self.kills}):
            numbers = [kill.number for kill in self.kills if kill.kind == kind]
            counts = [self.repeated_by[number] for number in numbers]
            handled = sum(self.in_hand_by[number] for number in numbers)
            lines.append(f"  {kind:<28}{len(counts):>6}{sum(counts):>10,}{max(counts):>8,}{handled:>38,}")
        lines += [f"  FAULT: {fault}" for fault in self.faults] or ["  as promised"]
        return "\n".join(lines)


# Redis as a witness.


class WitnessRedis(RedisServer):
    """A Redis that never rewrites its append-only file, so that all it ever did is in there."""

    def command(self) -> list[str]:
        return [*super().command(), "--auto-aof-rewrite-percentage", "0"]

    def commands(self) -> Iterator[list[bytes]]:
        """Every command that changed something, in order. Only after a clean stop is the file complete."""
        assert self.directory is not None
        manifest = next(self.directory.glob("appendonlydir/*.manifest")).read_text().splitlines()
        for line in manifest:
            _, name, _, _, _, kind = line.split()
            if kind == "i":
                yield from commands_in(self.directory / "appendonlydir" / name)


def commands_in(path: Path) -> Iterator[list[bytes]]:
    """The commands of one append-only file: arrays of the Redis protocol, and lines of comment."""
    with path.open("rb") as file:
        while head := file.readline():
            if head[:1] == b"#":
                continue
            if head[:1] != b"*":
                raise ScenarioError(f"{path} has {head[:40]!r} where a command should begin")
            command = []
            for _ in range(int(head[1:])):
                size = int(file.readline()[1:])
                command.append(file.read(size))
                file.read(2)
            yield command


class Queued(NamedTuple):
    """One job that was written into Redis."""

    by_consumer: bool
    job: str
    data: bytes


def queued_jobs(commands: Iterator[list[bytes]]) -> Iterator[Queued]:
    """Every job that was written with its data. A consumer's come in one transaction with the marks of their partitions."""
    transaction: list[list[bytes]] | None = None
    for command in commands:
        name = command[0].upper()
        if name == b"MULTI":
            transaction = []
        elif name == b"EXEC":
            yield from _jobs_of(transaction or [])
            transaction = None
        elif transaction is not None:
            transaction.append(command)
        else:
            yield from _jobs_of([command])


def _jobs_of(commands: list[list[bytes]]) -> Iterator[Queued]:
    hsets = [command for command in commands if command[0].upper() in (b"HSET", b"HMSET")]
    by_consumer = any(command[1].startswith(b"flowkit:marks:") for command in hsets)
    for _, key, *flat in hsets:
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        if key.startswith(b"rq:job:") and b"data" in fields:
            yield Queued(by_consumer, key.removeprefix(b"rq:job:").decode(), fields[b"data"])


class _Primitives(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise ScenarioError(f"the data of a job asks for {module}.{name}")


def messages_of(data: bytes) -> list[tuple[int, int]]:
    """Partition and offset of each message in a job. The only place that knows how jobs are laid out."""
    with contextlib.suppress(zlib.error):
        data = zlib.decompress(data)
    _, _, arguments, _ = _Primitives(io.BytesIO(data)).load()
    return [(partition, offset) for _, partition, offset, *_ in arguments[3]]


# The ledger.


class Run(NamedTuple):
    """One run of the handler."""

    file: int
    job: bytes
    at: float


class Ledgers:
    """What the handlers have written, as far as it has been read."""

    def __init__(self, directory: Path, count: int) -> None:
        self.directory = directory
        self.pids: list[int] = []
        self.last_job: list[bytes] = []
        self.last_at: list[float] = []
        self.in_hand: list[int] = []
        """Runs of the last job of each file."""
        self.hands: Counter[bytes] = Counter()
        """By job: the processes that have worked on it."""
        self.handled = 0
        self.runs = 0
        self.misplaced = 0
        self._names: dict[str, int] = {}
        self._read_to: list[int] = []
        self._first_file = array("l", [-1]) * count
        self.first_at = array("d", [0.0]) * count
        self._first_job: dict[int, bytes] = {}
        self._again: dict[int, list[Run]] = defaultdict(list)

    def read(self) -> None:
        """Reads on."""
        with os.scandir(self.directory) as entries:
            for entry in entries:
                number = self._names.get(entry.name)
                if number is None:
                    number = self._names[entry.name] = len(self.pids)
                    self.pids.append(int(entry.name.partition("-")[0]))
                    self.last_job.append(b"")
                    self.last_at.append(0.0)
                    self.in_hand.append(0)
                    self._read_to.append(0)
                if entry.stat().st_size > self._read_to[number]:
                    self._read_file(number, entry.path)

    def _read_file(self, number: int, path: str) -> None:
        with open(path, "rb") as file:
            file.seek(self._read_to[number])
            text = file.read()
        whole = text.rfind(b"\n") + 1  # the line that is being written, if any, is left for later
        self._read_to[number] += whole
        for line in text[:whole].splitlines():
            message, partition, offset, job, at = line.split()
            self.runs += 1
            self._note(int(message), int(partition), int(offset), Run(number, job, int(at) / 1e9))
            self.last_at[number] = int(at) / 1e9
            if job != self.last_job[number]:
                self.last_job[number], self.in_hand[number] = job, 0
                self.hands[job] += 1
            self.in_hand[number] += 1

    def _note(self, message: int, partition: int, offset: int, run: Run) -> None:
        if message != offset * PARTITIONS + partition:
            self.misplaced += 1
        if self._first_file[message] < 0:
            self.handled += 1
            self._first_file[message], self.first_at[message] = run.file, run.at
            self._first_job[message] = run.job
        else:
            self._again[message].append(run)

    def repeated(self) -> Iterator[list[Run]]:
        """For each message with more than one run: all of them, by time."""
        for message, more in self._again.items():
            first = Run(self._first_file[message], self._first_job[message], self.first_at[message])
            yield sorted([first, *more], key=lambda run: run.at)

    def missing(self) -> list[int]:
        return [message for message, file in enumerate(self._first_file) if file < 0]


# The processes.


class Fleet:
    """Who consumes and works. Each has a seat; whoever is killed is replaced at once."""

    def __init__(self, workers: str, env: Mapping[str, str], logs: Path, rng: random.Random) -> None:
        self.env = env
        self.logs = logs
        self.rng = rng
        self.kills: list[Kill] = []
        self.orphans: list[tuple[int, int]] = []
        self.ledgers = Path(env["LEDGER"])
        self.redis = Redis.from_url(env["FLOWKIT_REDIS"])
        rq = ("rq", "worker", "--url", env["FLOWKIT_REDIS"], "--job-monitoring-interval", "1", "--quiet", "default")
        commands = {
            "consumer": ("flowkit", "run", "ledger:app"),
            "flowkit": ("flowkit", "worker", "ledger:app", "--processes", "2"),
            "rq": rq,
        }
        seats = ("consumer-1", "consumer-2", *CREWS[workers])
        self.commands = {seat: commands[seat.partition("-")[0]] for seat in seats}
        self.seats: dict[str, Process] = {}
        methods: dict[str, tuple[str, int, Callable[[str], tuple[int, ...]]]] = {
            "consumer": ("consumer", 6, self._kill_consumer),
            "flowkit worker's child": ("flowkit", 4, self._kill_child),
            "flowkit worker's parent": ("flowkit", 2, self._kill),
            "flowkit worker, whole": ("flowkit", 2, self._kill_whole),
            "rq worker's horse": ("rq", 4, self._kill_horse),
            "rq worker's parent": ("rq", 2, self._kill),
            "rq worker, whole": ("rq", 2, self._kill_whole),
        }
        self.methods = {
            kind: (weight, kill, [seat for seat in seats if seat.startswith(who)])
            for kind, (who, weight, kill) in methods.items()
            if any(seat.startswith(who) for seat in seats)
        }

    def __enter__(self) -> Self:
        for seat in self.commands:
            self._start(seat)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.seats.values():
            process.kill_with_children()
            process.__exit__()
        for pid in self.living_orphans():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.redis.close()

    def kill_one(self) -> Kill:
        """Kills somebody, and starts who takes the place."""
        kind = self.rng.choices([*self.methods], [weight for weight, _, _ in self.methods.values()])[0]
        _, kill, seats = self.methods[kind]
        pids = kill(self.rng.choice(seats))
        at = time.monotonic()
        done = Kill(len(self.kills), kind, pids, at, self._uncommitted() if kind == "consumer" else 0)
        self.kills.append(done)
        with (self.logs / "kills.log").open("a") as log:
            print(f"{at:.3f} {kind}: {', '.join(str(pid) for pid in pids)}", file=log)
        return done

    def check(self) -> None:
        """Nobody may end unasked."""
        for seat, process in self.seats.items():
            if process.popen.poll() is not None:
                raise ScenarioError(
                    f"{seat} ended by itself, with {process.popen.returncode}:\n{process.output[-4000:]}"
                )

    def stop(self) -> dict[str, int]:
        """Ends them cleanly; gives their exit codes."""
        for process in self.seats.values():
            process.popen.terminate()
        return {seat: process.wait() for seat, process in self.seats.items()}

    def living_orphans(self) -> list[int]:
        """The children of killed parents that still run."""
        return [pid for pid, session in self.orphans if session_of(pid) == session]

    def _start(self, seat: str) -> None:
        self.seats[seat] = Process(*self.commands[seat], env=self.env, log=self.logs / f"{seat}.log")

    def _uncommitted(self) -> int:
        """Messages that Redis has, but Kafka does not know it."""
        queued: dict[str, int] = {}
        committed: dict[str, int] = {}
        for key in self.redis.scan_iter("flowkit:marks:*"):
            for name, offset in self.redis.hgetall(key).items():
                kind, _, place = name.decode().partition(":")
                if kind == "queued":
                    queued[place] = int(offset)
                elif kind == "committed":
                    committed[place] = int(offset)
        return sum(max(0, offset - committed.get(place, 0)) for place, offset in queued.items())

    def _kill_consumer(self, seat: str) -> tuple[int, ...]:
        """At any moment; each second time at one where messages are queued that are not committed."""
        deadline = time.monotonic() + (5 if self.rng.random() < 0.5 else 0)
        while time.monotonic() < deadline and not self._uncommitted():
            time.sleep(0.002)
        return self._kill(seat)

    def _kill(self, seat: str) -> tuple[int, ...]:
        process = self.seats[seat]
        self.orphans += [(pid, process.pid) for pid in process.children()]
        process.kill()
        self._start(seat)
        return (process.pid,)

    def _kill_whole(self, seat: str) -> tuple[int, ...]:
        pids = self.seats[seat].kill_with_children()
        self._start(seat)
        return tuple(pids)

    def _kill_child(self, seat: str) -> tuple[int, ...]:
        return (self.seats[seat].kill_child(),)

    def _kill_horse(self, seat: str) -> tuple[int, ...]:
        """Any horse; each second time one that has handled a message already. Most of a horse's time goes into its imports."""
        worker = self.seats[seat]
        deadline = time.monotonic() + (10 if self.rng.random() < 0.5 else 0)
        delay = self.rng.random() * 0.02
        while time.monotonic() < deadline:
            for pid in worker.children():
                if any(self.ledgers.glob(f"{pid}-*")):
                    time.sleep(delay)
                    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                        os.kill(pid, signal.SIGKILL)
                        return (pid,)
            time.sleep(0.002)
        return (worker.kill_child(),)


def session_of(pid: int) -> int | None:
    """The session of a process; None if it has ended."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


# The soak.


class Soak:
    """One soak, step by step."""

    def __init__(self, plan: Plan, hosts: str, redis: WitnessRedis, directory: Path) -> None:
        self.plan = plan
        self.hosts = hosts
        self.redis = redis
        self.directory = directory
        run = f"{time.time_ns():x}"
        self.topic, self.answers = f"soak-{run}", f"soak-answers-{run}"
        ledgers = directory / "ledgers"
        ledgers.mkdir(parents=True)
        self.ledgers = Ledgers(ledgers, plan.count)
        self.rng = random.Random(plan.seed)
        env = {
            "FLOWKIT_KAFKA_HOSTS": hosts,
            "FLOWKIT_REDIS": redis.url,
            "FLOWKIT_JOB_SECONDS": str(plan.job_seconds),
            "FLOWKIT_MAX_BACKLOG": str(plan.backlog),
            "LEDGER": str(ledgers),
            "LEDGER_IN": self.topic,
            "LEDGER_OUT": self.answers,
            "LEDGER_WORK": str(plan.work),
        }
        self.fleet = Fleet(plan.workers, env, directory, self.rng)
        self.end_by = 0.0
        self.produced = 0
        self.findings = Findings(plan, kills=self.fleet.kills)

    def run(self) -> Findings:
        """Raises ``ScenarioError`` if it comes to no end."""
        began = time.monotonic()
        self.end_by = began + self.plan.deadline
        create_topics(self.hosts, {self.topic: PARTITIONS, self.answers: PARTITIONS})
        with contextlib.closing(
            KafkaProducer(
                bootstrap_servers=self.hosts, enable_idempotence=True, acks="all", linger_ms=20, batch_size=262_144
            )
        ) as producer:
            self.produce(producer, self.plan.stock)
            with self.fleet:
                self.attack(producer)
                self.leave_in_peace()
                self.findings.codes = self.fleet.stop()
        self.findings.seconds = time.monotonic() - began
        self.ledgers.read()
        self.look_at_offsets()
        self.look_at_answers()
        self.redis.stop()
        self.look_at_jobs()
        self.look_at_runs()
        self.judge()
        return self.findings

    def produce(self, producer: KafkaProducer, up_to: int) -> None:
        """Sends the messages up to this number. Each partition has one producer, so a number says which offset is its own."""
        for number in range(self.produced, up_to):
            producer.send(self.topic, payload(number), partition=number % PARTITIONS)
            self.produced = number + 1

    def attack(self, producer: KafkaProducer) -> None:
        """Kills at random, from the first handled message until all are in the topic."""
        watch = Watch(self.end_by, self.ledgers, self.fleet, lambda: f"{self.produced:,} in the topic")
        watch.wait_until(lambda: self.ledgers.handled > 0)
        kill_at = time.monotonic()
        while self.produced < self.plan.count:
            watch.look()
            ahead = min(self.plan.count, self.ledgers.handled + self.plan.ahead)
            if ahead == self.plan.count or ahead - self.produced >= self.plan.ahead // 4:
                self.produce(producer, ahead)
            if time.monotonic() >= kill_at:
                self.fleet.kill_one()
                kill_at = time.monotonic() + self.plan.every * self.rng.uniform(0.2, 1.8)
        producer.flush()

    def leave_in_peace(self) -> None:
        """Waits until every message is handled, and nothing is left in the queue, nor with a worker."""
        watch = Watch(self.end_by, self.ledgers, self.fleet, self.in_redis)
        watch.wait_until(lambda: self.ledgers.handled == self.plan.count and not self.in_redis())
        watch.wait_until(lambda: not self.fleet.living_orphans())

    def in_redis(self) -> str:
        """What is still to do, in words; nothing if all is done."""
        return left_in(self.redis.url)

    # What the witnesses say.

    def look_at_offsets(self) -> None:
        """Everything is committed when the consumers have stopped."""
        partitions = [TopicPartition(self.topic, number) for number in range(PARTITIONS)]
        with contextlib.closing(KafkaAdminClient(bootstrap_servers=self.hosts)) as admin:
            committed = admin.list_group_offsets({self.topic: partitions})[self.topic]
        for partition in partitions:
            end = len(range(partition.partition, self.plan.count, PARTITIONS))
            offset = committed[partition].offset if partition in committed else None
            if offset != end:
                self.findings.faults.append(f"partition {partition.partition} is committed to {offset}, not {end}")

    def look_at_answers(self) -> None:
        counts = Counter(map(int, values_in(self.hosts, self.answers, PARTITIONS)))
        wanted = set(range(0, self.plan.count, ANSWERED))
        self.findings.unanswered = len(wanted - set(counts))
        self.findings.answered_again = sum(counts.values()) - len(counts)
        if extra := set(counts) - wanted:
            self.findings.faults.append(f"{len(extra)} answers to messages that ask for none: {sorted(extra)[:5]}")

    def look_at_jobs(self) -> None:
        """How often each message was queued by a consumer, by the word of Redis."""
        times = array("l", [0]) * self.plan.count
        doubled: dict[str, str] = {}
        consumers: set[str] = set()
        others: set[str] = set()  # RQ writes a job anew with its result, too
        for by_consumer, job, data in queued_jobs(self.redis.commands()):
            if not by_consumer:
                others.add(job)
                continue
            consumers.add(job)
            for partition, offset in messages_of(data):
                message = offset * PARTITIONS + partition
                times[message] += 1
                if times[message] > 1:
                    self.findings.queued_twice += 1
                    doubled.setdefault(job, f"partition {partition} offset {offset} and more in job {job}")
        self.findings.jobs = len(consumers)
        self.findings.put_back = len(others - consumers)
        self.findings.never_queued = times.count(0)
        if doubled:
            self.findings.faults.append(f"queued twice: {'; '.join([*doubled.values()][:5])}")
        if self.findings.never_queued:
            self.findings.faults.append(f"never queued: messages {self._places(times.index(0))}, ...")

    def look_at_runs(self) -> None:
        found, ledgers = self.findings, self.ledgers
        by_pid: dict[int, list[Kill]] = defaultdict(list)
        for kill in found.kills:
            for pid in kill.pids:
                by_pid[pid].append(kill)

        def killed(run: Run) -> Kill | None:
            """The kill that took the process of this run; a process id may be given again later."""
            kills = [kill for kill in by_pid[ledgers.pids[run.file]] if kill.at + 0.05 >= run.at]
            return min(kills, key=lambda kill: kill.at, default=None)

        unexplained: dict[str, None] = {}
        again: set[int] = set()
        for runs in ledgers.repeated():
            for run in runs[:-1]:
                found.repeated += 1
                kill = killed(run)
                if kill is None or ledgers.last_job[run.file] != run.job:
                    found.unexplained += 1
                    unexplained[" then ".join(f"{r.job.decode()} in {ledgers.pids[r.file]}" for r in runs)] = None
                    continue
                found.repeated_by[kill.number] += 1
                again.add(run.file)
                found.oldest = max(found.oldest, kill.at - run.at)
        for file, job in enumerate(ledgers.last_job):
            kill = killed(Run(file, job, ledgers.last_at[file]))
            if kill is not None and (ledgers.hands[job] > 1 or file in again):  # else it was finished
                found.in_hand_by[kill.number] += ledgers.in_hand[file]
        found.runs = ledgers.runs
        if unexplained:
            found.faults.append(f"handled again though in no killed hand: {'; '.join([*unexplained][:5])}")
        missing = ledgers.missing()
        found.never_handled = len(missing)
        if missing:
            found.faults.append(f"never handled: {self._places(*missing[:5])}, ...")
        if ledgers.misplaced:
            found.faults.append(f"{ledgers.misplaced} messages had the partition or offset of another one")

    def judge(self) -> None:
        found = self.findings
        handled = found.in_hand_by.total()
        repeated = found.repeated_by.total()
        if handled >= 1_000 and repeated > handled * MOST_REPEATED:
            share = f"{repeated:,} of {handled:,}"
            found.faults.append(f"{share} messages that killed jobs had done were done again: progress is not kept")
        if found.unanswered:
            found.faults.append(f"{found.unanswered} answers are missing")
        if bad := [f"{seat} with {code}" for seat, code in found.codes.items() if code]:
            found.faults.append(f"ended not clean: {', '.join(bad)}")

    @staticmethod
    def _places(*messages: int) -> str:
        return ", ".join(f"[{message % PARTITIONS}]@{message // PARTITIONS}" for message in messages)


class Watch:
    """Reads the ledgers on, says how it goes, and gives up when nothing goes on."""

    def __init__(self, end_by: float, ledgers: Ledgers, fleet: Fleet, rest: Callable[[], str]) -> None:
        self.end_by = end_by
        self.ledgers = ledgers
        self.fleet = fleet
        self.rest = rest
        self.began = self.changed = self.told = time.monotonic()
        self.handled = ledgers.handled

    def look(self) -> None:
        time.sleep(0.05)
        self.ledgers.read()
        self.fleet.check()
        now = time.monotonic()
        if self.ledgers.handled != self.handled:
            self.handled, self.changed = self.ledgers.handled, now
        if now > self.told + 10:
            self.told = now
            print(f"  {self.state()}", flush=True)
        if now > self.end_by:
            raise ScenarioError(f"it has taken too long: {self.state()}")
        if now > self.changed + PATIENCE:
            raise ScenarioError(f"nothing was handled for {PATIENCE:g} s: {self.state()}")

    def wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.look()

    def state(self) -> str:
        kills = len(self.fleet.kills)
        return f"{self.ledgers.handled:,} handled in {self.ledgers.runs:,} runs, {kills} kills; {self.rest() or 'all done'}"


def soak(plan: Plan, hosts: str, directory: Path) -> Findings:
    """A soak on a running Apache Kafka, with a Redis of its own. Leaves logs, ledgers and Redis' file in ``directory``."""
    with WitnessRedis(directory / "redis") as redis:
        return Soak(plan, hosts, redis, directory).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = Plan()
    parser.add_argument("--count", type=int, default=usual.count, help="messages")
    parser.add_argument("--seed", type=int, help="of who is killed when; a new one each time if not given")
    parser.add_argument("--workers", choices=sorted(CREWS), default=usual.workers)
    parser.add_argument("--every", type=float, default=usual.every, help="seconds between two kills, on average")
    parser.add_argument("--work", type=float, default=usual.work, help="seconds a message takes, on average")
    parser.add_argument("--deadline", type=float, default=usual.deadline, help="seconds for all of it")
    parser.add_argument("--kafka", metavar="HOST:PORT", help="a running broker, instead of one started for this run")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave logs, ledgers and Redis' file here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # with a clean-up
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    plan = Plan(options.count, options.workers, seed, options.every, options.work, options.deadline)
    with contextlib.ExitStack() as stack:
        directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hosts = options.kafka or stack.enter_context(ApacheKafka(directory / "kafka")).hosts
        print(f"soak of {plan.count:,} messages, workers: {plan.workers}, seed {plan.seed}", flush=True)
        findings = soak(plan, hosts, directory)
    print(findings.report())
    return 1 if findings.faults else 0


if __name__ == "__main__":
    sys.exit(main())
