"""What does not change: the cost of a message as routes, partitions and loads grow, the memory, and what a start takes.

    make bench-growth                                 # or:
    python tests/benchmarks/growth.py [routes] [partitions] [sizes] [processes] [skew] [idle] [memory] [start] \\
        [--client kafka-python] [--client confluent] [--count 200000] [--many 5000000] [--rounds 5] [--kafka HOST:PORT]

routes      one topic is busy, and 0, 9, 99 or 999 others of the same group have nothing.
partitions  the same messages in 1, 10, 100 and 1,000 partitions.
sizes       messages of 100 bytes to 100 KB, against a bare loop of the same client.
processes   ``flowkit run --processes`` with 1, 2 and 4, and a handler that takes 0.2 ms of a processor, of which the broker
            has its part too.
skew        all messages in one partition of 4 and of 64, and one with as many as all others, against as many in each.
idle        the processor's time of a consumer that has nothing to do, with 1 and 1,000 partitions.
memory      how much more there is of it at most in the second half of ``--many`` messages than in the first.
start       ``import flowkit`` against Python alone, and ``flowkit --help``.

Everything is inline: JSON to a no-op handler, but for the processes. Each count is checked: none missing, none twice.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path

import confluent_kafka
import consume
from common import (
    APPS,
    SIZE,
    TESTS,
    Tally,
    about,
    broker,
    consumer_of,
    in_turn,
    payload,
    show,
    show_figure,
    show_ratio,
    wait_until,
)
from confluent_kafka.admin import AdminClient
from ledger import Ledger
from processes import Process

from flowkit import Flowkit
from flowkit.consumer import Consumer
from flowkit.devstack import create_topics
from flowkit.server import collecting_less

CLIENTS = ("kafka-python", "confluent")

SIZES = (100, 1_000, 10_000, 100_000)
MOST_BYTES = 400_000_000
"""Of the messages of one size."""

PROCESSES, BUSY = (1, 2, 4), 40_000
"""How many there are, and the messages that they have in all."""


def fill(hosts: str, topic: str, count: int, partitions: Iterable[int], size: int = SIZE) -> None:
    """Puts the messages 0 to ``count - 1`` into these partitions, in turn and again and again."""
    failed: list[object] = []
    producer = confluent_kafka.Producer(
        {"bootstrap.servers": hosts, "linger.ms": 20, "queue.buffering.max.messages": 100_000}
    )
    where = cycle(partitions)
    for number in range(count):
        while True:
            try:
                producer.produce(
                    topic,
                    payload(number, size),
                    partition=next(where),
                    on_delivery=lambda error, _: failed.append(error) if error else None,
                )
                break
            except BufferError:
                producer.poll(0.1)
    left = producer.flush(120)
    if left or failed:
        raise SystemExit(f"{topic}: {left} messages are not confirmed, {len(failed)} were refused: {failed[:1]}")


def open_consumer(
    client: str, hosts: str, topics: Sequence[str], group: str, partitions: int
) -> tuple[Consumer, Tally]:
    """A consumer that has its partitions, so many in all, and what its handlers count."""
    tally = Tally()
    app = Flowkit("growth", kafka={"hosts": hosts}, inline=True, client=client)
    for topic in topics:
        app.add_topic(topic, tally.take, group=group)
    consumer = consumer_of(app)
    wait_until(lambda: consumer.turn() or len(consumer.tracks) == partitions, "the partitions", every=0)
    return consumer, tally


def close(consumer: Consumer) -> None:
    consumer.stop()
    consumer.run()  # ends at once: commits, leaves the group


def rate(client: str, hosts: str, topics: Sequence[str], run: str, count: int, partitions: int) -> float:
    """Messages a second."""
    consumer, tally = open_consumer(client, hosts, topics, f"growth-{run}", partitions)
    before, start = tally.count, time.perf_counter()
    while tally.count < count:
        consumer.turn()
    seconds = time.perf_counter() - start
    close(consumer)
    tally.check(count, f"{topics[0]} and {len(topics) - 1} more")
    return (count - before) / seconds


class Bench:
    def __init__(self, hosts: str, clients: Sequence[str], count: int, many: int, rounds: int) -> None:
        self.hosts = hosts
        self.clients = clients
        self.count = count
        self.many = many
        self.rounds = rounds
        self.name = f"growth-{time.time_ns():x}"

    def compare(self, what: str, cases: dict[str, tuple[Sequence[str], int]], pairs: dict[str, str]) -> None:
        """Measures cases, each with its topics and their partitions in all, and shows each of ``pairs`` as a ratio."""
        for client in self.clients:
            sides: dict[str, Callable[[str], float]] = {
                side: lambda run, t=topics, p=partitions, c=client: rate(c, self.hosts, t, run, self.count, p)
                for side, (topics, partitions) in cases.items()
            }
            figures = in_turn(sides, self.rounds, note=False)
            print(f"{what}, {client}: {self.count:,} {about()}, {self.rounds} rounds")
            show(figures)
            for over, under in pairs.items():
                show_ratio(figures, over, under, 0.9)

    def routes(self) -> None:
        busy = f"{self.name}-busy"
        others = [f"{self.name}-quiet-{number}" for number in range(999)]
        create_topics(self.hosts, {busy: 4, **dict.fromkeys(others, 1)})
        fill(self.hosts, busy, self.count, range(4))
        cases = {f"{1 + n} routes": ([busy, *others[:n]], 4 + n) for n in (0, 9, 99, 999)}
        self.compare("routes", cases, dict.fromkeys(list(cases)[1:], "1 routes"))

    def partitions(self) -> None:
        cases = {}
        for number in (1, 10, 100, 1_000):
            topic = f"{self.name}-{number}"
            create_topics(self.hosts, {topic: number})
            fill(self.hosts, topic, self.count, range(number))
            cases[f"{number} partitions"] = ([topic], number)
        self.compare("partitions", cases, dict.fromkeys(list(cases)[1:], "1 partitions"))

    def sizes(self) -> None:
        counts = {size: min(self.count, MOST_BYTES // size) for size in SIZES}
        for size, count in counts.items():
            create_topics(self.hosts, {f"{self.name}-{size}": 4})
            fill(self.hosts, f"{self.name}-{size}", count, range(4), size)
        for client in self.clients:
            for size, count in counts.items():
                place = client, "consume", self.hosts, f"{self.name}-{size}"
                sides: dict[str, Callable[[str], float]] = {
                    "bare": lambda run, p=place, n=count: consume.bare(*p, run, n),
                    "flowkit": lambda run, p=place, n=count: consume.flowkit(*p, run, n),
                }
                figures = in_turn(sides, self.rounds, note=False)
                print(f"sizes, {client}: {count:,} messages of {size:,} bytes, {self.rounds} rounds")
                show(figures)
                show_ratio(figures, "flowkit", "bare", consume.CASES["consume"][client])

    def processes(self) -> None:
        for client in self.clients:
            sides: dict[str, Callable[[str], float]] = {
                f"{number} processes": lambda run, n=number, c=client: self._rate_of_processes(c, n, run)
                for number in PROCESSES
            }
            figures = in_turn(sides, self.rounds, note=False)
            print(f"processes, {client}: {BUSY:,} messages that take 0.2 ms each, 8 partitions, {self.rounds} rounds")
            show(figures)
            for number in PROCESSES[1:]:
                show_ratio(figures, f"{number} processes", "1 processes")

    def _rate_of_processes(self, client: str, number: int, run: str) -> float:
        topic = f"{self.name}-{run}"
        create_topics(self.hosts, {topic: 8})
        admin = AdminClient({"bootstrap.servers": self.hosts})
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
            ledger = Ledger(Path(directory) / "ledger", BUSY)
            env = {
                "BENCH_TOPIC": topic,
                "BENCH_GROUP": topic,
                "BENCH_LEDGER": ledger.path,
                "FLOWKIT_KAFKA_HOSTS": self.hosts,
                "FLOWKIT_CLIENT": client,
                "PYTHONPATH": f"{APPS}{os.pathsep}{TESTS.parent}",
                "PYTHONWARNINGS": "ignore",
            }
            command = ("flowkit", "run", "busy_flowkit:app", "--processes", str(number))
            with Process(*command, cwd=APPS, env=env, log=Path(directory) / "log") as process:

                def have_theirs() -> bool:
                    found = admin.describe_consumer_groups([topic])[topic].result()
                    members = [member.assignment.topic_partitions for member in found.members]
                    return len(members) == number and sorted(map(len, members)) == [8 // number] * number

                wait_until(have_theirs, f"{number} processes have their partitions")
                fill(self.hosts, topic, BUSY, range(8))
                wait_until(lambda: not ledger.missing(BUSY), "all messages are handled")
                process.popen.terminate()
                process.wait(30)
            ledger.check(BUSY, f"{number} processes")
            first, last = ledger.span(BUSY)
        return (BUSY - 1) / (last - first)

    def skew(self) -> None:
        cases = {}
        for number in (4, 64):
            shares = {
                "even": range(number),
                "one of them": [0],
                "half in one": [part for other in range(1, number) for part in (0, other)],
            }
            for kind, partitions in shares.items():
                topic = f"{self.name}-{kind.replace(' ', '-')}-{number}"
                create_topics(self.hosts, {topic: number})
                fill(self.hosts, topic, self.count, partitions)
                cases[f"{number}, {kind}"] = ([topic], number)
        pairs = {f"{n}, {kind}": f"{n}, even" for n in (4, 64) for kind in ("one of them", "half in one")}
        self.compare("skew", cases, pairs)

    def idle(self) -> None:
        for number in (1, 1_000):
            topic = f"{self.name}-idle-{number}"
            create_topics(self.hosts, {topic: number})
            for client in self.clients:
                consumer, _ = open_consumer(client, self.hosts, [topic], f"{topic}-{client}", number)
                end = time.monotonic() + 2
                while time.monotonic() < end:
                    consumer.turn()
                used, began = time.process_time(), time.monotonic()
                while time.monotonic() < began + 10:
                    consumer.turn()
                share = 100 * (time.process_time() - used) / (time.monotonic() - began)
                close(consumer)
                show_figure(f"idle, {number} partitions, {client}", share, "% of a processor", 3)

    def memory(self) -> None:
        topic = f"{self.name}-many"
        create_topics(self.hosts, {topic: 4})
        fill(self.hosts, topic, self.many, range(4))
        for client in self.clients:
            consumer, tally = open_consumer(client, self.hosts, [topic], f"{topic}-{client}", 4)
            most: list[float] = []
            for share in (0.5, 1.0):
                peak = 0.0
                while tally.count < self.many * share:
                    consumer.turn()
                    peak = max(peak, resident())
                most.append(peak)
            close(consumer)
            tally.check(self.many, f"memory, {client}")
            what = f"memory, {client}: {most[0]:.0f} MB at most in the first half of {self.many:,} messages; in the second"
            show_figure(what, max(0.0, most[1] - most[0]), "MB more", 5)

    def start(self) -> None:
        python = [sys.executable, "-I", "-c"]
        took: dict[str, list[float]] = {"python": [], "import flowkit": [], "flowkit --help": []}
        commands = {
            "python": [*python, "pass"],
            "import flowkit": [*python, "import flowkit"],
            "flowkit --help": [str(Path(sys.executable).parent / "flowkit"), "--help"],
        }
        for _ in range(4 * self.rounds + 1):
            for what, command in commands.items():
                began = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                took[what].append(time.perf_counter() - began)
        middle = {what: 1000 * statistics.median(found[1:]) for what, found in took.items()}
        show_figure("import flowkit, over Python alone", middle["import flowkit"] - middle["python"], "ms", 30)
        show_figure("flowkit --help", middle["flowkit --help"], "ms", 400)


def resident() -> float:
    """MB of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


SECTIONS = {
    name: getattr(Bench, name)
    for name in ("routes", "partitions", "sizes", "processes", "skew", "idle", "memory", "start")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="all if none is named")
    parser.add_argument("--client", action="append", choices=CLIENTS, help="both if none is named")
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--many", type=int, default=5_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kafka", help="a running broker, instead of one started for this run")
    options = parser.parse_args()
    with broker(options.kafka) as hosts, collecting_less():
        bench = Bench(hosts, options.client or CLIENTS, options.count, options.many, options.rounds)
        for name in options.sections or SECTIONS:
            SECTIONS[name](bench)


if __name__ == "__main__":
    main()
