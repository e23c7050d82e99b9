"""flowkit beside bare loops of its clients and beside other frameworks: the same messages, each side in a process of its own.

    make bench-peers                                  # or:
    python tests/benchmarks/peers.py [consume] [respond] [latency] [--peers PYTHON] [--rounds 5] \\
        [--count 600000] [--seconds 20] [--kafka HOST:PORT] [--figures DIRECTORY]

consume   JSON to a handler that does next to nothing.
respond   the same, and each message is answered with what it was.
latency   1,000 messages a second from a producer in this process, in four partitions, to the first line of the handler; and
          the part of a processor that the side takes for it.

The sides run in turn, so many rounds, after one that does not count. Rates are from the first handled message to the last;
every side must have handled each message. All but "at most once" are at least once: offsets are committed five times a second,
after the answers. Slow sides are given a tenth of the messages. ``--peers`` is a Python with what ``peers.txt`` names; without
it only flowkit and bare loops are measured. ``--figures`` writes the tables as Markdown, and plots as SVG and PNG.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from common import APPS, PARTITIONS, PATIENCE, TESTS, about, broker, fill, in_turn, payload, show, show_ratio
from confluent_kafka import Producer
from processes import Process

from flowkit.devstack import create_topics

RATE, WARM_UP = 1_000, 5.0

KAFKA_PYTHON, CONFLUENT = "flowkit, kafka-python", "flowkit, confluent-kafka"
BARE_KAFKA_PYTHON, BARE_CONFLUENT = "bare kafka-python", "bare confluent-kafka"
QUIX, FAUST = "Quix Streams", "Faust-streaming"


class Side(NamedTuple):
    command: tuple[str, ...]
    env: Mapping[str, str] = {}
    slow: bool = False


OURS = {
    BARE_KAFKA_PYTHON: Side((sys.executable, "-W", "ignore", "inline_bare.py", "kafka-python")),
    KAFKA_PYTHON: Side(("flowkit", "run", "inline_flowkit:app")),
    BARE_CONFLUENT: Side((sys.executable, "-W", "ignore", "inline_bare.py", "confluent")),
    CONFLUENT: Side(("flowkit", "run", "inline_flowkit:app"), {"FLOWKIT_CLIENT": "confluent"}),
}

PEERS = {
    QUIX: ("quix", False),
    "FastStream in batches, aiokafka": ("faststream:aiokafka:batches", False),
    "FastStream in batches, confluent": ("faststream:confluent:batches", False),
    "FastStream, aiokafka": ("faststream:aiokafka:each", True),
    "FastStream, confluent": ("faststream:confluent:each", True),
    "FastStream at most once, aiokafka": ("faststream:aiokafka:default", True),
    "FastStream at most once, confluent": ("faststream:confluent:default", True),
    FAUST: ("faust", True),
}

Aim = tuple[str, str, float]
AIMS: Mapping[str, list[Aim]] = {
    "consume": [
        (KAFKA_PYTHON, BARE_KAFKA_PYTHON, 0.95),
        (CONFLUENT, BARE_CONFLUENT, 0.8),
        (CONFLUENT, QUIX, 5),
        (CONFLUENT, "FastStream in batches, confluent", 8),
        (CONFLUENT, "FastStream, confluent", 200),
        (KAFKA_PYTHON, QUIX, 1),
        (KAFKA_PYTHON, "FastStream in batches, aiokafka", 1.8),
    ],
    "respond": [
        (KAFKA_PYTHON, BARE_KAFKA_PYTHON, 0.85),
        (CONFLUENT, BARE_CONFLUENT, 0.85),
        (CONFLUENT, QUIX, 2.5),
    ],
}
"""What one side's rate is to be of another's."""


@dataclass
class Bench:
    hosts: str
    directory: Path
    sides: Mapping[str, Side]
    rounds: int
    count: int
    seconds: float
    figures: Path | None
    about: str

    def write(self, case: str, lines: Sequence[str]) -> None:
        """The table of a case, where figures are wanted."""
        if self.figures is not None:
            ends = f"Medians of {self.rounds} rounds. {self.about}."
            (self.figures / f"bench-{case}.md").write_text("\n".join([*lines, "", ends]) + "\n")

    def run(self, side: Side, case: str, topic: str, count: int, run: str, load: Any = None) -> dict[str, float]:
        """Starts a side, and gives what it says when it has handled ``count`` messages."""
        env = {
            "BENCH_CASE": case,
            "BENCH_COUNT": str(count),
            "BENCH_WARM_UP": str(int(WARM_UP * RATE)),
            "BENCH_HOSTS": self.hosts,
            "BENCH_TOPIC": topic,
            "BENCH_OUT": f"{topic}-out",
            "BENCH_GROUP": f"{topic}-{run}",
            "BENCH_DIRECTORY": str(self.directory / run),
            "FLOWKIT_KAFKA_HOSTS": self.hosts,
            "PYTHONPATH": f"{APPS}{os.pathsep}{TESTS.parent}",
            "PYTHONWARNINGS": "ignore",
            **side.env,
        }
        log = self.directory / f"{run}-{time.time_ns():x}.log"
        with Process(*side.command, cwd=APPS, env=env, log=log) as process:
            if load is not None:
                time.sleep(8)  # no two sides say alike that they have their partitions
                load()
            process.wait_for("RESULT ", PATIENCE)
            found: dict[str, float] = json.loads(process.output.split("RESULT ")[1].splitlines()[0])
            process.popen.terminate()
            with contextlib.suppress(AssertionError):
                process.wait(5)
        return found

    def rate(self, side: Side, case: str, topic: str, count: int, run: str) -> float:
        found = self.run(side, case, topic, count, run)
        if found["total"] != count * (count - 1) // 2:
            raise SystemExit(f"{side.command}: some messages are missing or repeated")
        return found["rate"]


def rates(bench: Bench, case: str) -> None:
    counts = {"large": bench.count, "small": bench.count // 10}
    topics = {size: f"{case}-{size}-{time.time_ns():x}" for size in counts}
    for size, count in counts.items():
        create_topics(bench.hosts, {f"{topics[size]}-out": PARTITIONS})
        fill(bench.hosts, topics[size], range(count))
    runs: dict[str, Any] = {}
    for name, side in bench.sides.items():
        if case == "respond" and "in batches" in name:
            continue  # its answers would be one list
        size = "small" if side.slow else "large"
        runs[name] = partial(bench.rate, side, case, topics[size], counts[size])
    found = in_turn(runs, bench.rounds)
    title = f"{case}: {bench.count:,} {about()}, {bench.rounds} rounds"
    print(title)
    show(found)
    for over, under, aim in AIMS[case]:
        if under in found:
            show_ratio(found, over, under, aim)
    lines = [f"| {case} | messages a second | from | to |", "|---|---:|---:|---:|"]
    for name, each in found.items():
        lines.append(f"| {name} | {statistics.median(each):,.0f} | {min(each):,.0f} | {max(each):,.0f} |")
    bench.write(case, lines)
    if bench.figures is not None:
        plot(bench.figures / f"bench-{case}", f"{case}, messages a second", found)


def latency(bench: Bench, case: str) -> None:
    count = int((WARM_UP + bench.seconds) * RATE)
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(bench.rounds):
        for name, side in bench.sides.items():
            if "at most once" in name or "in batches" in name:
                continue
            topic = f"latency-{time.time_ns():x}"
            create_topics(bench.hosts, {topic: PARTITIONS})
            load = partial(produce, bench.hosts, topic, count)
            one = bench.run(side, case, topic, count, f"{number}", load)
            found.setdefault(name, []).append(one)
            told = ", ".join(f"{what} {value:.2f}" for what, value in one.items())
            print(f"    round {number + 1}: {name}: {told}", file=sys.stderr)
    print(f"latency at {RATE:,} msg/s for {bench.seconds:g} s: {about()}, medians of {bench.rounds} rounds")
    lines = [
        "| latency at 1,000 msg/s | p50 ms | p99 ms | p99.9 ms | processor |",
        "|---|---:|---:|---:|---:|",
    ]
    medians: dict[str, dict[str, float]] = {}
    for name, each in found.items():
        middle = medians[name] = {what: statistics.median(one[what] for one in each) for what in each[0]}
        p50, p99, p999, cpu = (middle[what] for what in ("p50", "p99", "p999", "cpu"))
        print(f"  {name:>32}: p50 {p50:6.2f} ms, p99 {p99:6.2f} ms, p99.9 {p999:7.2f} ms, processor {cpu:5.1%}")
        lines.append(f"| {name} | {p50:.2f} | {p99:.2f} | {p999:.2f} | {cpu:.0%} |")
    bench.write(case, lines)
    for ours, bare in ((KAFKA_PYTHON, BARE_KAFKA_PYTHON), (CONFLUENT, BARE_CONFLUENT)):
        for what in ("p50", "p99"):
            more = medians[ours][what] - medians[bare][what]
            print(
                f"  {ours}: {what} {more:+.2f} ms to bare (aim: at most 0.3: {'reached' if more <= 0.3 else 'MISSED'})"
            )
    if QUIX in medians:
        for what in ("p50", "p99", "cpu"):
            better = medians[CONFLUENT][what] <= medians[QUIX][what]
            print(f"  {CONFLUENT}: {what} at least as good as Quix: {'reached' if better else 'MISSED'}")
    if bench.figures is not None:
        plot(
            bench.figures / "bench-latency",
            "produce to handler at 1,000 messages a second: median, ms",
            {name: [one["p50"] for one in each] for name, each in found.items()},
        )


def produce(hosts: str, topic: str, count: int) -> None:
    """Produces ``RATE`` messages a second, each with the time of its call."""
    producer = Producer({"bootstrap.servers": hosts, "linger.ms": 0, "acks": "all"})
    producer.list_topics(topic)
    start = time.monotonic()
    for number in range(count):
        wait = start + number / RATE - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        value = payload(number).replace(b'"text":"', b'"at":%.6f,"text":"' % time.monotonic())
        producer.produce(topic, value, partition=number % PARTITIONS)
        producer.poll(0)
    producer.flush()


def plot(path: Path, title: str, figures: Mapping[str, list[float]]) -> None:
    """The median of each side, and from where to where it was."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "flowkit"
    from matplotlib import pyplot

    names = [*figures][::-1]
    middles = [statistics.median(figures[name]) for name in names]
    spread = [
        [middle - min(figures[name]) for name, middle in zip(names, middles, strict=True)],
        [max(figures[name]) - middle for name, middle in zip(names, middles, strict=True)],
    ]
    colors = ["#0b7285" if name.startswith("flowkit") else "#adb5bd" for name in names]
    figure, axes = pyplot.subplots(figsize=(8, 0.42 * len(names) + 1))
    axes.barh(names, middles, xerr=spread, color=colors, error_kw={"ecolor": "#495057", "capsize": 2})
    axes.set_title(title, loc="left", fontsize=11)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=150)
    pyplot.close(figure)


def versions(peers: str | None) -> str:
    names = ("kafka-python", "confluent-kafka")
    found = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]
    if peers is not None:
        script = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in %r), sep=', ')"
        others = ("quixstreams", "faststream", "faust-streaming", "aiokafka")
        done = subprocess.run([peers, "-c", script % (others,)], capture_output=True, text=True, check=True)
        found.append(done.stdout.strip())
    return f"{', '.join(found)}; {os.cpu_count()} cores, which also ran Apache Kafka and the producer"


SECTIONS = {"consume": rates, "respond": rates, "latency": latency}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="all if none is named")
    parser.add_argument("--peers", metavar="PYTHON", help="one that has the other frameworks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=600_000, help="messages; slow sides are given a tenth")
    parser.add_argument("--seconds", type=float, default=20.0, help="of latencies that count")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="sides that have this in their names")
    parser.add_argument("--kafka", help="a running broker, instead of one started for this run")
    parser.add_argument("--figures", type=Path, metavar="DIRECTORY", help="write tables and plots here")
    options = parser.parse_args()
    peers = str(Path(options.peers).absolute()) if options.peers else None
    sides = dict(OURS)
    if peers is not None:
        script = (peers, "-W", "ignore", "inline_peers.py")
        sides.update({name: Side((*script, what), {}, slow) for name, (what, slow) in PEERS.items()})
    sides = {name: side for name, side in sides.items() if any(part in name for part in options.only)}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory, broker(options.kafka) as hosts:
        bench = Bench(
            hosts,
            Path(directory),
            sides,
            options.rounds,
            options.count,
            options.seconds,
            options.figures,
            versions(peers),
        )
        for name in options.sections or SECTIONS:
            SECTIONS[name](bench, name)
    print(bench.about)


if __name__ == "__main__":
    main()
