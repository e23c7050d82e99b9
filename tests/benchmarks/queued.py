"""The background path in figures: flowkit's queue against RQ alone, and against other task queues, on the same Redis.

    make bench-queue                                  # or:
    python tests/benchmarks/queued.py [queueing] [running] [latency] [sizes] [--rounds 3] [--quick]
                                      [--kafka HOST:PORT] [--redis URL]

The sides of a comparison run in turn in one run, so many rounds, after one that does not count. Every side is checked: each
message was handled once, or (where only queueing is measured) is in the queue once. Messages are 200 bytes of JSON that
do not resemble each other, in 4 partitions. Whatever Redis holds under ``rq:*`` is deleted between measurements.

queueing
    From Kafka into Redis, in this process: the consumer as ``flowkit run`` makes it, on a queued route; the same one on an
    inline route with a no-op; ``rq.Queue.enqueue`` and ``enqueue_many`` (500 at a time) of the same payloads, which
    are spared Kafka: they come from a list. Then what a queued message takes of Redis's memory. The jobs are run by a
    ``flowkit worker`` afterwards, which must find every message once.
running
    A no-op handler, which gets the parsed message. Everything is queued before; then one worker process is started, and
    messages per second count from the first handled one to the last ("whole": from the start of the process to the last).
    flowkit's jobs under ``flowkit worker`` and ``rq worker``; one message a job under ``rq worker`` and under RQ's
    SimpleWorker; Dramatiq, Huey, Celery and Taskiq with one message a task, as fast as their options make them.
latency
    1,000 messages a second from a producer in this process; ``flowkit run``, and ``flowkit worker`` or ``rq worker``.
    From the call of ``produce`` to the first line of the handler, on the machine's one monotonic clock. The first
    seconds are for warming up and do not count.
sizes
    Handlers of 1 us, 1 ms, 1 s, and a mixture on one route (of 1,000 messages one takes 1 s, and 200 take 1 ms), each with
    a worker process: how many messages came to be in one job, and how long the longest job ran. A tenth of the messages
    goes ahead and does not count, so that something is known of the handlers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from common import (
    APPS,
    PARTITIONS,
    PATIENCE,
    TESTS,
    Figures,
    Tally,
    about,
    broker,
    consumer_of,
    fill,
    in_turn,
    payload,
    redis_server,
    show,
    show_figure,
    show_ratio,
    wait_until,
)
from confluent_kafka import Producer as ConfluentProducer
from kafka import KafkaProducer
from ledger import Ledger
from processes import Process
from redis import Redis
from rq import Queue

from flowkit import Flowkit
from flowkit.devstack import create_topics
from flowkit.settings import Settings

JOB = re.compile(r"(?P<topic>.+)-\d+-\d+-(?P<count>\d+)-[0-9a-f]{8}$")
"""The id of one of flowkit's jobs."""

LEDGER = 1_000_000
"""Messages that the ledger has room for."""

UNBOUNDED = {"max_backlog": 100_000_000} if hasattr(Settings, "max_backlog") else {}
"""The backlog is the point here: no partition is to be paused."""


@dataclass
class Bench:
    """The servers, and what is the same for every process of this run."""

    hosts: str
    url: str
    directory: Path
    rounds: int
    scale: float
    redis: Redis = field(init=False)
    ledger: Ledger = field(init=False)
    env: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.redis = Redis.from_url(self.url)
        self.ledger = Ledger(self.directory / "ledger", LEDGER)
        self.env = {
            "FLOWKIT_KAFKA_HOSTS": self.hosts,
            "FLOWKIT_REDIS": self.url,
            "BENCH_LEDGER": self.ledger.path,
            "BENCH_TOPIC": "-",
            "BENCH_GROUP": "-",
            "PYTHONDONTWRITEBYTECODE": "",  # a work horse imports the application anew, compiled once as anywhere
            "PYTHONPATH": f"{APPS}{os.pathsep}{TESTS.parent}",
            **PREFETCH,
            **{f"FLOWKIT_{name.upper()}": str(value) for name, value in UNBOUNDED.items()},
        }

    def count(self, wanted: int) -> int:
        """So many messages, or fewer where a quick run was asked for."""
        return max(80, int(wanted * self.scale))

    @contextlib.contextmanager
    def process(self, *command: str, **env: str) -> Iterator[Process]:
        """A process in the folder of the applications; it is asked to end, and killed if it does not."""
        log = self.directory / f"{command[0]}-{time.time_ns():x}.log"
        with Process(*command, cwd=APPS, env={**self.env, **env}, log=log) as process:
            yield process
            if process.popen.poll() is None:
                process.popen.terminate()
                with contextlib.suppress(AssertionError):
                    process.wait(15)

    def clean(self) -> None:
        """Takes from Redis what RQ and others have left there; what flowkit remembers of its routes stays."""
        for key in self.redis.scan_iter(count=10_000):
            if not key.startswith(b"flowkit:"):
                self.redis.unlink(key)
        self.ledger.clear()

    def used_memory(self) -> int:
        """What Redis uses for data: what it uses at all, without the buffers of its clients and of its append-only file."""
        memory = self.redis.info("memory")
        return int(memory["used_memory"]) - int(memory["mem_clients_normal"]) - int(memory["mem_aof_buffer"])

    def drain(self, count: int, side: str, **env: str) -> None:
        """Has a ``flowkit worker`` run what is queued, and checks that it is every message, once."""
        with self.process("flowkit", "worker", "noop_flowkit:app", "--burst", **env) as process:
            process.wait(PATIENCE)
        self.check(count, side)

    def check(self, count: int, side: str) -> None:
        self.ledger.check(count, side)


# 1. From Kafka into Redis.


def queueing(bench: Bench) -> None:
    count, alone, many = bench.count(200_000), bench.count(2_000), bench.count(20_000)
    name = f"queueing-{time.time_ns():x}"
    topics = {"unkeyed": f"{name}-unkeyed", "keyed": f"{name}-keyed"}
    fill(bench.hosts, topics["unkeyed"], range(count))
    fill(bench.hosts, topics["keyed"], range(count), keyed=True)
    payloads = [payload(number) for number in range(many)]
    bytes_each: Figures = {"unkeyed": [], "keyed": [], "Queue.enqueue": []}

    def flowkit(kind: str, run: str) -> float:
        bench.clean()
        before = bench.used_memory()
        rate = _queue_in_process(bench, topics[kind], run, count)
        bytes_each[kind].append((bench.used_memory() - before) / count)
        bench.drain(count, f"flowkit, {kind}", BENCH_TOPIC=topics[kind], BENCH_GROUP=run)
        return rate

    def rq(messages: int, run: str) -> float:
        bench.clean()
        queue = Queue("alone", connection=bench.redis)
        before = bench.used_memory()
        start = time.perf_counter()
        if messages == alone:
            for data in payloads[:messages]:
                queue.enqueue("noop_rq.noop", data, description="noop")
        else:
            for at in range(0, messages, 500):
                queue.enqueue_many(
                    [
                        Queue.prepare_data("noop_rq.noop", (data,), description="noop")
                        for data in payloads[at : at + 500]
                    ]
                )
        seconds = time.perf_counter() - start
        if messages == alone:
            bytes_each["Queue.enqueue"].append((bench.used_memory() - before) / messages)
        if len(queue) != messages or len(set(queue.job_ids)) != messages:
            raise SystemExit(f"RQ has queued {len(queue)} jobs of {messages}")
        return messages / seconds

    figures = in_turn(
        {
            "flowkit": functools.partial(flowkit, "unkeyed"),
            "flowkit, keyed": functools.partial(flowkit, "keyed"),
            "flowkit, inline": lambda run: _inline(bench, topics["unkeyed"], run, count),
            "Queue.enqueue": functools.partial(rq, alone),
            "enqueue_many": functools.partial(rq, many),
        },
        bench.rounds,
    )
    print(f"\nqueueing: {count} {about()}, {bench.rounds} rounds")
    show(figures)
    show_ratio(figures, "flowkit", "Queue.enqueue", 50)
    show_ratio(figures, "flowkit", "enqueue_many", 10)
    show_ratio(figures, "flowkit", "flowkit, inline", 0.75)
    for kind in ("unkeyed", "keyed"):
        show_figure(f"Redis memory, {kind}", statistics.median(bytes_each[kind]), "bytes a message", 300)
    print(f"  (a job of Queue.enqueue: {statistics.median(bytes_each['Queue.enqueue']):,.0f} bytes)")


def _queue_in_process(bench: Bench, topic: str, group: str, count: int) -> float:
    """Messages a second of flowkit's own consumer, into Redis."""
    app = Flowkit("bench", kafka={"hosts": bench.hosts}, redis=bench.url, **UNBOUNDED)
    app.reference = "noop_flowkit:app"

    @app.topic(topic, group=group)
    def noop(data: dict[str, Any]) -> None: ...  # that of the worker is in the application

    consumer = consumer_of(app)

    def done() -> int:
        return sum(track.done or 0 for track in consumer.tracks.values())

    rate = _time_turns(consumer, done, count)
    queue = Queue(app.settings.queue, connection=bench.redis)
    queued = sum(int(match["count"]) for match in map(JOB.match, queue.job_ids) if match)
    if queued != count:
        raise SystemExit(f"flowkit has queued {queued} messages of {count}")
    return rate


def _inline(bench: Bench, topic: str, group: str, count: int) -> float:
    tally = Tally()
    app = Flowkit("bench-inline", kafka={"hosts": bench.hosts}, inline=True)

    @app.topic(topic, group=group)
    def noop(data: dict[str, Any]) -> None:
        tally(data)

    rate = _time_turns(consumer_of(app), lambda: tally.count, count)
    tally.check(count, "flowkit, inline")
    return rate


def _time_turns(consumer: Any, done: Callable[[], int], count: int) -> float:
    deadline = time.monotonic() + PATIENCE
    while len(consumer.tracks) < PARTITIONS:
        consumer.turn()
    before = done()
    start = time.perf_counter()
    while done() < count:
        consumer.turn()
        if time.monotonic() > deadline:
            raise SystemExit(f"only {done()} of {count} messages in {PATIENCE:g} s")
    seconds = time.perf_counter() - start
    consumer.stop()
    consumer.run()  # ends at once: settles, commits, leaves the group
    return float(count - before) / seconds


# 2. Workers.

PEERS: Mapping[str, tuple[str, ...]] = {
    "Dramatiq": ("dramatiq", "noop_dramatiq", "--processes", "1", "--threads", "8"),
    "Huey": ("huey_consumer", "noop_huey.huey", "--workers", "4", "--quiet", "--no-periodic"),
    "Celery": (
        *("celery", "--app", "noop_celery", "worker", "--pool", "solo", "--loglevel", "WARNING"),
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
    ),
    "Taskiq": (
        *("taskiq", "worker", "noop_taskiq:broker", "--workers", "1", "--no-parse", "--log-level", "WARNING"),
        *("--max-prefetch", "100", "--ack-type", "when_received"),
    ),
}
"""One worker process each, with the options that made it fastest here."""

PREFETCH = {"dramatiq_queue_prefetch": "1000"}
"""What doubles the rate of Dramatiq."""


def running(bench: Bench) -> None:
    topic, group = f"running-{time.time_ns():x}", "bench-running"
    whole: Figures = {}

    def measure(side: str, count: int, command: tuple[str, ...], **env: str) -> float:
        start = time.monotonic()
        with bench.process(*command, **env) as process:
            try:
                wait_until(lambda: not bench.ledger.missing(count) or process.popen.poll() is not None, side)
                if "--burst" in command:
                    process.wait(30)
            except (AssertionError, SystemExit):
                print(process.output[-4_000:], file=sys.stderr)
                raise
        bench.check(count, side)
        first, last = bench.ledger.span(count)
        whole.setdefault(side, []).append(count / (last - start))
        return (count - 1) / (last - first)

    def flowkit(side: str, count: int, command: tuple[str, ...], run: str) -> float:
        bench.clean()
        _queue_by_flowkit(bench, topic, group, count)
        return measure(side, count, command, BENCH_TOPIC=topic, BENCH_GROUP=group)

    def alone(side: str, module: str, count: int, command: tuple[str, ...], run: str) -> float:
        bench.clean()
        program = f"import orjson, sys, {module} as m; m.fill([orjson.loads(line) for line in sys.stdin])"
        messages = b"\n".join(payload(number) for number in range(count))
        _run_with_input(bench, program, messages)
        return measure(side, count, command)

    plain = ("rq", "worker", "--burst", "--quiet", "--url", bench.url)
    sides: dict[str, Callable[[str], float]] = {}
    for side, count, command in (
        ("flowkit worker", bench.count(400_000), ("flowkit", "worker", "noop_flowkit:app", "--burst")),
        ("rq worker", bench.count(200_000), (*plain, "default")),
    ):
        sides[side] = functools.partial(flowkit, side, count, command)
    one = bench.count(300)
    sides["rq worker, one a job"] = functools.partial(
        alone, "rq worker, one a job", "noop_rq", one, (*plain, "alone")
    )
    simple = (*plain, "--worker-class", "rq.SimpleWorker", "alone")
    sides["SimpleWorker, one a job"] = functools.partial(
        alone, "SimpleWorker, one a job", "noop_rq", bench.count(1_000), simple
    )
    for side, command in PEERS.items():
        module = f"noop_{side.lower()}"
        sides[side] = functools.partial(alone, side, module, bench.count(5_000), command)
    figures = in_turn(sides, bench.rounds)
    whole = {side: found[1:] for side, found in whole.items()}
    print(f"\nrunning a no-op, one worker process: {about()}, {bench.rounds} rounds; first to last message")
    show(figures)
    show_ratio(figures, "rq worker", "rq worker, one a job", 300)
    show_ratio(figures, "flowkit worker", "rq worker, one a job", 1_000)
    show_ratio(figures, "flowkit worker", tuple(PEERS), 20)
    print("  whole, from the start of the process:")
    show(whole)


def _queue_by_flowkit(bench: Bench, topic: str, group: str, count: int) -> None:
    """Puts messages into the topic, and has ``flowkit run`` queue them."""
    env = {"BENCH_TOPIC": topic, "BENCH_GROUP": group}
    fill(bench.hosts, topic, range(count))
    queue = Queue("default", connection=bench.redis)

    def queued() -> int:
        return sum(int(match["count"]) for match in map(JOB.match, queue.job_ids) if match)

    with bench.process("flowkit", "run", "noop_flowkit:app", **env):
        wait_until(lambda: queued() >= count, "queueing")


def _run_with_input(bench: Bench, program: str, given: bytes) -> None:
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        input=given,
        cwd=APPS,
        env={**os.environ, **bench.env},
        check=True,
        timeout=PATIENCE,
    )


# 3. From produce to the handler.

RATE = 1_000
WARM_UP = 5.0
CATCH_UP = 20.0
"""Seconds after the last message in which all must have been handled."""


def latency(bench: Bench) -> None:
    sides = {
        "flowkit worker": (("flowkit", "worker", "noop_flowkit:app"), 15, 60),
        "rq worker": (("rq", "worker", "--quiet", "--url", bench.url, "default"), 50, 200),
    }
    seconds = max(10.0, 25 * bench.scale)
    print(
        f"\nlatency at {RATE} msg/s for {seconds - WARM_UP:g} s after {WARM_UP:g} s that do not count: {about()}; from"
        " produce to handler"
    )
    for side, (command, median, most) in sides.items():
        waits, missing = _latencies(bench, side, command, int(RATE * seconds))
        if missing:
            print(
                f"  {side}: MISSED: it did not keep up, {missing} messages still wait {CATCH_UP:g} s after the last one"
            )
            continue
        print(f"  {side}: {len(waits)} messages, longest wait {waits[-1]:,.1f} ms")
        show_figure(f"{side}, median", statistics.median(waits), "ms", median)
        show_figure(f"{side}, p99", waits[int(len(waits) * 0.99)], "ms", most)


def _latencies(bench: Bench, side: str, command: tuple[str, ...], count: int) -> tuple[list[float], int]:
    """Milliseconds from produce to handler, in order of size, of the messages after the warm-up; and how many are missing."""
    bench.clean()
    topic = group = f"latency-{time.time_ns():x}"
    create_topics(bench.hosts, {topic: PARTITIONS})
    env = {"BENCH_TOPIC": topic, "BENCH_GROUP": group}
    with (
        bench.process("flowkit", "run", "noop_flowkit:app", **env) as run,
        bench.process(*command, **env) as worker,
    ):
        run.wait_for("assigned=")
        sent = _produce_paced(bench.hosts, topic, count)
        deadline = time.monotonic() + CATCH_UP
        while (missing := bench.ledger.missing(count)) and time.monotonic() < deadline:
            time.sleep(0.02)
    if missing:
        print(run.output[-2_000:], worker.output[-2_000:], file=sys.stderr)
        return [], missing
    bench.check(count, side)
    begun = bench.ledger.times[:count]
    return sorted((at - put) * 1000 for put, at in zip(sent, begun, strict=True) if put - sent[0] >= WARM_UP), 0


def _produce_paced(hosts: str, topic: str, count: int) -> list[float]:
    """Produces ``RATE`` messages a second; gives the time of each call."""
    # of all clients the one that takes least of the processor, which is for what is measured
    producer = ConfluentProducer({"bootstrap.servers": hosts, "linger.ms": 0, "acks": "all"})
    producer.list_topics(topic)
    sent = []
    start = time.monotonic()
    for number in range(count):
        wait = start + number / RATE - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        sent.append(time.monotonic())
        producer.produce(topic, payload(number), partition=number % PARTITIONS)
        producer.poll(0)
    producer.flush()
    return sent


# 4. How many messages come to be in one job.


KINDS: Mapping[str, tuple[int, dict[float, int]]] = {
    "1 us": (100_000, {1e-6: 1}),
    "1 ms": (20_000, {1e-3: 1}),
    "1 s": (20, {1.0: 1}),
    "mixed": (10_000, {1e-6: 799, 1e-3: 200, 1.0: 1}),
}
"""Of each route its messages, and how many of them take how many seconds."""


class SizedJob(NamedTuple):
    """A job that has ended: its topic and number of messages, seconds since the epoch, and its time-out in seconds."""

    topic: str
    count: int
    began: float
    ended: float
    timeout: float


def sizes(bench: Bench) -> None:
    prefix = f"sizes-{time.time_ns():x}"
    bench.clean()
    topics = {kind: f"{prefix}-{kind.replace(' ', '')}" for kind in KINDS}
    create_topics(bench.hosts, dict.fromkeys(topics.values(), PARTITIONS))
    counts = {kind: max(20, int(count * bench.scale)) for kind, (count, _) in KINDS.items()}
    warming = {kind: max(10, count // 10) for kind, count in counts.items()}
    jobs: dict[str, SizedJob] = {}
    env = {"BENCH_TOPIC": prefix}
    with (
        bench.process("flowkit", "run", "sized_flowkit:app", **env),
        bench.process("flowkit", "worker", "sized_flowkit:app", **env),
    ):
        warm = _produce_work(bench.hosts, topics, warming, 0)
        wait_until(lambda: not bench.ledger.missing(warm), "the warm-up of sizes")
        since = time.time()
        last = _produce_work(bench.hosts, topics, counts, warm)

        def look() -> bool:
            _note_jobs(bench.redis, jobs)
            return not bench.ledger.missing(last)

        wait_until(look, "sizes", every=0.5)
        wait_until(lambda: not _running_jobs(bench.redis), "the end of the last jobs")
        _note_jobs(bench.redis, jobs)
    bench.check(last, "sizes")
    print(f"\nsizes: messages in one job, as queued at once after {warm} that do not count")
    for kind, topic in topics.items():
        found = [job for job in jobs.values() if job.topic == topic and job.began > since]
        size = sorted(job.count for job in found)
        runs = sorted(job.ended - job.began for job in found)
        longest = max(found, key=lambda job: job.ended - job.began)
        print(
            f"  {kind:>6}: {counts[kind]:>6} messages in {len(found):>5} jobs of {size[0]} to {size[-1]}, median"
            f" {statistics.median(size):,.0f}; a run took {statistics.median(runs):.3f} s in the median,"
            f" {runs[-1]:.3f} s at most (of {longest.count} messages; its time-out: {longest.timeout:g} s)"
        )


def _running_jobs(redis: Redis) -> int:
    return sum(queue.started_job_registry.count for queue in Queue.all(connection=redis))


def _produce_work(hosts: str, topics: Mapping[str, str], counts: Mapping[str, int], first: int) -> int:
    """Produces so many messages of each kind, with the ids from ``first`` on; gives the id after the last."""
    mixture = random.Random(6)
    producer = KafkaProducer(bootstrap_servers=hosts, linger_ms=20, batch_size=262_144)
    for kind, count in counts.items():
        seconds, shares = zip(*KINDS[kind][1].items(), strict=True)
        for number, takes in enumerate(mixture.choices(seconds, shares, k=count)):
            data = orjson.dumps({"id": first, "seconds": takes})
            producer.send(topics[kind], data, partition=number % PARTITIONS)
            first += 1
    producer.flush()
    producer.close()
    return first


def _note_jobs(redis: Redis, jobs: dict[str, SizedJob]) -> None:
    """Notes the jobs that have ended, which Redis keeps for a minute."""
    keys = [key for key in redis.scan_iter(match="rq:job:*", count=10_000) if key.count(b":") == 2]
    pipe = redis.pipeline(transaction=False)
    for key in keys:
        pipe.hmget(key, "started_at", "ended_at", "timeout")
    for key, (started, ended, timeout) in zip(keys, pipe.execute(), strict=True):
        match = JOB.match(key.decode().removeprefix("rq:job:"))
        if match and started and ended:
            began, over = (datetime.fromisoformat(at.decode()).timestamp() for at in (started, ended))
            jobs[key.decode()] = SizedJob(match["topic"], int(match["count"]), began, over, float(timeout or 0))


SECTIONS: Mapping[str, Callable[[Bench], None]] = {
    "queueing": queueing,
    "running": running,
    "latency": latency,
    "sizes": sizes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; all if none is named")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tenth of the messages: a trial, not a measurement")
    parser.add_argument("--kafka", help="a running broker, instead of one started for this run")
    parser.add_argument("--redis", help="URL of a running Redis whose database may be emptied, instead of a new one")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory,
        broker(options.kafka) as hosts,
        redis_server(options.redis) as url,
    ):
        bench = Bench(hosts, url, Path(directory), options.rounds, 0.1 if options.quick else 1)
        for name in options.sections or SECTIONS:
            SECTIONS[name](bench)


if __name__ == "__main__":
    main()
