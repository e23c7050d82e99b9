"""``make demo``: real earthquakes through quakes.py, on an embedded broker and Redis, with a consumer and an RQ worker.

Shows the flow map and what arrives in each topic, and ends by itself: with code 0 when every message arrived, with 1 if
some had not within DEMO_SECONDS (60 if not set).
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path

import orjson
import typer

from flowkit import Flowkit, flowmap
from flowkit.dev import DevStack, stop_requested
from flowkit.locate import locate
from flowkit.responses import Response
from flowkit.watch import Watcher

HERE = Path(__file__).parent
ROUNDS = 6
"""How often the week of readings is sent: enough for a rate that means something."""

SHOWN = 3
"""Messages shown of each topic."""


def main() -> int:
    seconds = float(os.environ.get("DEMO_SECONDS", "60"))
    os.chdir(HERE)
    app = locate("quakes:app")
    readings = [line.encode() for line in (HERE / "data" / "quakes.jsonl").read_text().splitlines()]
    strong = sum(orjson.loads(line)["magnitude"] >= 5 for line in readings)
    expected = {"readings": len(readings), "regions": len(readings), "alerts": strong, "notices": strong}
    expected = {topic: count * ROUNDS for topic, count in expected.items()}

    heading(f"{len(readings)} earthquakes of one week, sent {ROUNDS} times through examples/quakes.py:")
    for line in flowmap.text(app):
        typer.echo(f"  {line}")
    heading("Starting an embedded broker, an embedded Redis, `flowkit run` and `flowkit worker`:")
    with stop_requested() as stop, DevStack(app, say, broker_port=0, redis_port=0) as stack:
        os.environ.update(stack.environment)
        app.settings_for_kafka()
        watcher = Watcher(stack.broker.hosts, stack.topics(), show, in_all=SHOWN)
        heading("What arrives:")
        start = began = time.monotonic()
        feed(app, readings)
        while not (stop.is_set() or complete(watcher.counts, expected)) and time.monotonic() < start + seconds:
            if watcher.counts["regions"] == 0:
                began = time.monotonic()  # the first answer: until then the group was starting
            watcher.look()
        app.producer.close()
        watcher.close()
        heading("In order, nothing running is left behind:")
    return summary(watcher.counts, expected, max(watcher.last.values(), default=began) - began)


def complete(counts: Counter[str], expected: dict[str, int]) -> bool:
    return all(counts[topic] >= count for topic, count in expected.items())


def feed(app: Flowkit, readings: list[bytes]) -> None:
    for _ in range(ROUNDS):
        app.producer.send_all(
            [Response("readings", line, key=orjson.loads(line)["region"].encode()) for line in readings]
        )


def summary(counts: Counter[str], expected: dict[str, int], took: float) -> int:
    heading("Summary:")
    for topic, count in expected.items():
        typer.echo(f"  {topic:<9}{counts[topic]:>7,} of {count:,}")
    if took > 0:
        rate = counts["readings"] / took
        typer.echo(f"  {rate:,.0f} readings a second, parsed, validated, handled and answered on this machine")
    if not complete(counts, expected):
        typer.secho("\nNot everything arrived in time; a higher DEMO_SECONDS gives it longer.", fg="red")
        return 1
    heading("Try next:")
    typer.echo(f"  . {Path(sys.prefix, 'bin', 'activate')} && cd {HERE}")
    typer.echo("  flowkit dev shop:app              # orders, invoices, alerts; then, in a second terminal:")
    typer.echo("""  flowkit send shop:app orders '{"id": 1, "user": "ann", "total": 2000}'""")
    typer.echo("  flowkit routes shop:app; flowkit flow shop:app; flowkit --help")
    return 0


def heading(text: str) -> None:
    typer.secho(f"\n{text}", bold=True)


def say(name: str, line: str) -> None:
    typer.echo(f"  {name:>6} | {line[:140]}")


def show(topic: str, value: str) -> None:
    typer.echo(typer.style(f"  {topic:<9}", fg="cyan") + value)


if __name__ == "__main__":
    sys.exit(main())
