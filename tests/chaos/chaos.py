"""Numbered messages through flowkit, while its processes, Kafka and Redis are killed, frozen and starved.

    make chaos                                        # or:
    python tests/chaos/chaos.py [--quick] [--only NAME ...] [--seed N] [--markdown FILE] [--keep DIR] [--list]

Each scenario runs real processes on an Apache Kafka and a Redis, and promises that nothing is lost, how much is repeated at
most, and how soon it goes on. The counts come from witnesses that are not flowkit: each run of a handler notes its message in a
file, and the answers are read from their topic. Ends with exit code 0 if every promise was kept, and with 1 if one was broken.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import random
import signal
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    importlib.import_module("kafka")

from redis import Redis
from scenarios import LEFT_OUT, SCENARIOS, Messages, Result, Stage, chosen
from servers import CLIENT, KAFKA_VERSION, RedisServer
from witnesses import NEVER

MODULES = ("consumers", "workers", "brokers", "redises", "handlers", "clocks")
"""The files with scenarios, in the order in which they run."""

HEADINGS = (
    "scenario",
    "sent",
    "handled",
    "responded",
    "lost",
    "repeated (allowed)",
    "responded twice (allowed)",
    "disturbances",
    "recovered in (allowed)",
    "seconds",
)


def load_scenarios() -> None:
    for module in MODULES:
        importlib.import_module(module)


def row(result: Result) -> list[str]:
    took = "never" if result.recovered == NEVER else f"{result.recovered:.1f} s"
    return [
        result.name,
        f"{result.sent:,}",
        f"{result.handled:,}",
        f"{result.responded:,}",
        f"{result.lost:,}",
        f"{result.repeated:,} ({result.repeated_allowed:,})",
        f"{result.again:,} ({result.again_allowed:,})",
        f"{result.disturbances:,}",
        f"{took} ({result.recovered_allowed:g} s, {result.of})",
        f"{result.seconds:.0f}",
    ]


def total(results: list[Result]) -> list[str]:
    fields = ("sent", "handled", "responded", "lost", "repeated", "again", "disturbances")
    sums = [f"{sum(getattr(result, name) for result in results):,}" for name in fields]
    return ["all", *sums, "", f"{sum(result.seconds for result in results):.0f}"]


def table(rows: list[list[str]]) -> str:
    """For a terminal."""
    widths = [max(len(row[at]) for row in [list(HEADINGS), *rows]) for at in range(len(HEADINGS))]
    lines = [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [list(HEADINGS), *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown(results: list[Result], quick: bool) -> str:
    """The same for the documentation, with what each scenario does and the versions."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in [*map(row, results), total(results)]]
    lines += ["", "| scenario | what happens |", "|---|---|"]
    lines += [f"| {result.name} | {SCENARIOS[result.name].about} |" for result in results]
    form = "The short form" if quick else "The figures"
    some = "" if len(results) == len(SCENARIOS) else f" of {len(results)} of its {len(SCENARIOS)} scenarios"
    lines += ["", f"{form} of `make chaos`{some}, with {versions()}."]
    return "\n".join(lines) + "\n"


def versions() -> str:
    client = {"confluent": "confluent-kafka"}.get(CLIENT.get("FLOWKIT_CLIENT", ""), "kafka-python")
    names = {client: client, "rq": "RQ"}
    packages = [f"{shown} {version(name)}" for name, shown in names.items()]
    servers = [f"Apache Kafka {KAFKA_VERSION}", f"Redis {redis_version()}", f"Python {platform.python_version()}"]
    return ", ".join([*servers, *packages])


def redis_version() -> str:
    with (
        tempfile.TemporaryDirectory() as directory,
        RedisServer(Path(directory)) as server,
        Redis.from_url(server.url) as connection,
    ):
        return str(connection.info("server")["redis_version"])


def listing() -> str:
    lines = []
    for each in SCENARIOS.values():
        quick = isinstance(each.quick, Messages)
        count = each.messages.inline + each.messages.queued
        lines.append(f"{each.name:<24}{count:>10,} messages  {each.about}")
        if not quick:
            lines.append(f"{'':<24}{'':>10}           not in the short form: {each.quick}")
    lines += [f"{name:<24}{'':>10}           not on this machine: {why}" for name, why in LEFT_OUT.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="the short form: fewer messages, and cheap scenarios only"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="these scenarios")
    parser.add_argument("--seed", type=int, help="of what is done when; a new one each time if not given")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here, too")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave logs and ledgers here, in a folder each")
    parser.add_argument("--list", action="store_true", help="show the scenarios, and run none")
    options = parser.parse_args()
    load_scenarios()
    if options.list:
        print(listing())
        return 0
    if unknown := [name for name in options.only if name not in SCENARIOS]:
        parser.error(f"there is no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    wanted = list(chosen(options.only, quick=options.quick))
    if not wanted:
        parser.error("none of these has a short form: see --list")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # with a clean-up
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    print(f"{len(wanted)} scenarios, seed {seed}", flush=True)
    began = time.monotonic()
    results = []
    with Stage(tell=lambda line: print(line, flush=True), keep=options.keep) as stage:
        for each in wanted:
            print(f"\n{each.name}: {each.about}", flush=True)
            results.append(stage.perform(each, quick=options.quick, seed=seed))
            for fault in results[-1].faults:
                print(f"  BROKEN: {fault}", flush=True)
    print(f"\n{table([*map(row, results), total(results)])}")
    if options.quick and not options.only:
        left_out = [each for each in SCENARIOS.values() if each not in wanted]
        for each in left_out:
            print(f"left out: {each.name} ({each.quick})")
    for name, why in LEFT_OUT.items():
        print(f"left out: {name} ({why})")
    print(f"{versions()}; {time.monotonic() - began:.0f} s, seed {seed}")
    if options.markdown is not None:
        options.markdown.write_text(markdown(results, options.quick))
    broken = [result for result in results if result.faults]
    for result in broken:
        print(f"BROKEN {result.name}: {'; '.join(result.faults)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
