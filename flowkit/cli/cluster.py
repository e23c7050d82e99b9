"""``flowkit topics`` and ``flowkit lag``: what the cluster has, and how far behind the application is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FlowkitError
from ..reporting import load
from .base import App, AsJson, print_json, style, table

if TYPE_CHECKING:
    from ..app import Flowkit
    from ..backlog import Backlog
    from ..clients.kafka_admin import Cluster, Lag
    from ..topics import Need


def topics(
    app: App = None,
    create: Annotated[bool, typer.Option("--create", help="Make the topics that are missing.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if a topic is missing or not as it is declared.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the topics it needs, and what the cluster has.

    Topics are declared with app.declare_topic(name, partitions=..., replication_factor=..., config={...}); what that leaves
    out is as kafka.partitions and kafka.replication_factor say, or else the brokers. A topic that exists is never changed
    and never deleted: where it differs, this says how to change it.

    \b
    Examples:
      flowkit topics shop:app
      flowkit topics shop:app --create
      flowkit topics shop:app --check
    """
    from ..clients.kafka_admin import Cluster
    from ..topics import needs

    application = load(app)
    made: set[str] = set()
    with Cluster(application.settings_for_kafka()) as cluster:
        found = needs(application, cluster)
        if create and any(need.state is None for need in found):
            made = set(cluster.create(need.wanted for need in found if need.state is None))
            found = needs(application, cluster)
    if as_json:
        print_json([topic_row(need, made) for need in found])
    elif not found:
        typer.echo(f"{application.reference} has no topics; register a handler with @app.topic(...)")
    else:
        _show_topics(application, found, made)
    if check and any(need.verdict != "there" for need in found):
        raise typer.Exit(1)


def topic_row(need: Need, made: set[str]) -> dict[str, Any]:
    """One topic as JSON."""
    state = need.state
    return {
        "topic": need.topic,
        "uses": need.uses,
        "state": "made" if need.topic in made else need.verdict,
        "partitions": state.partitions if state else None,
        "replication_factor": state.replication_factor if state else None,
        "wanted": {
            "partitions": need.wanted.partitions,
            "replication_factor": need.wanted.replication_factor,
            "config": dict(need.wanted.config),
        },
        "differences": [difference._asdict() for difference in need.differences],
    }


def _show_topics(app: Flowkit, found: list[Need], made: set[str]) -> None:
    table(
        [
            {
                "TOPIC": need.topic,
                "USED AS": ", ".join(need.uses),
                "PARTITIONS": str(need.state.partitions if need.state else need.wanted.partitions or "default"),
                "REPLICATION": str(
                    need.state.replication_factor if need.state else need.wanted.replication_factor or "default"
                ),
                "STATE": "made" if need.topic in made else need.verdict,
            }
            for need in found
        ],
        usual={},
    )
    for need in found:
        for difference in need.differences:
            typer.echo(
                style(f"\n{need.topic}:", bold=True)
                + f" {difference.what} is {difference.found}, declared is {difference.declared}; to change it:\n"
                + f"  {difference.advice}"
            )
    missing = sum(need.state is None for need in found)
    if missing:
        what = "1 topic is" if missing == 1 else f"{missing} topics are"
        typer.echo(f"\n{what} missing; make what is missing with: flowkit topics {app.reference} --create")


def lag(
    app: App = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", help="Seconds between two looks.", min=0.1)] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Show how many messages wait, in Kafka and in the queues.

    The lag is counted in each partition from what the group has committed; where it never has, from where it will begin.
    MESSAGES of a queue are those in its waiting, running and scheduled jobs. With --watch, a terminal is drawn anew each
    time; elsewhere each look is one line.

    \b
    Examples:
      flowkit lag shop:app
      flowkit lag shop:app --watch --every 5
      flowkit lag shop:app --json
    """
    application = load(app)
    application.settings_for_kafka()
    with _Looks(application) as looks:
        if not watch:
            _show(looks.look(), as_json=as_json)
            return
        try:
            for number in _ticks(every):
                _look_again(looks, first=number == 0, every=every, as_json=as_json)
        except KeyboardInterrupt:
            typer.echo()


class Look:
    """What was found at one moment."""

    def __init__(self, lags: list[Lag], queues: list[Backlog]) -> None:
        self.lags = lags
        self.queues = queues

    def as_json(self) -> dict[str, Any]:
        return {
            "groups": [row._asdict() for row in self.lags],
            "queues": [
                {
                    "queue": queue.queue,
                    "messages": queue.messages,
                    **{
                        kind: getattr(queue, kind)._asdict() for kind in ("waiting", "running", "scheduled", "failed")
                    },
                }
                for queue in self.queues
            ],
            "sum": {
                "lag": sum(row.lag or 0 for row in self.lags),
                "messages": sum(queue.messages for queue in self.queues),
                "failed_jobs": sum(queue.failed.jobs for queue in self.queues),
            },
        }

    @property
    def sum_line(self) -> str:
        total = self.as_json()["sum"]
        line = f"lag {total['lag']:,} in {_count(len({row.group for row in self.lags}), 'group')}"
        if self.queues:
            failed = _count(total["failed_jobs"], "failed job")
            line += f"; {_count(total['messages'], 'message')} in {_count(len(self.queues), 'queue')}, {failed}"
        return line


class _Looks:
    """Looks at an application's groups and queues, over one connection to each as long as they last."""

    def __init__(self, app: Flowkit) -> None:
        self.app = app
        self._cluster: Cluster | None = None
        self._redis: Any = None

    def __enter__(self) -> _Looks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.close()
        if self._redis is not None:
            self._redis.close()
        self._cluster = self._redis = None

    def look(self) -> Look:
        """Raises ``BrokerUnavailable`` or ``RedisUnavailable``; the next look then connects anew."""
        from ..backlog import backlog
        from ..clients.kafka_admin import Cluster
        from ..queues import connect, route_queues
        from ..topics import groups

        try:
            if self._cluster is None:
                self._cluster = Cluster(self.app.settings)
            lags = self._cluster.lag(groups(self.app))
            queues: list[Backlog] = []
            if route_queues(self.app):
                if self._redis is None:
                    redis = self.app.settings.redis or self.app.settings_for_queues().redis
                    assert redis is not None
                    self._redis = connect(redis)
                queues = backlog(self.app, self._redis)
        except FlowkitError:
            self.close()
            raise
        return Look(lags, queues)


def _look_again(looks: _Looks, *, first: bool, every: float, as_json: bool) -> None:
    """One of many looks. A failure is told and passes, except that of the first: it may be a mistake in the call."""
    now = time.strftime("%H:%M:%S")
    try:
        found = looks.look()
    except FlowkitError as error:
        if first:
            raise
        print(f"{now} {error}", file=sys.stderr)
        return
    if as_json:
        typer.echo(json.dumps({"time": time.time(), **found.as_json()}))
    elif sys.stdout.isatty():
        sys.stdout.write("\x1b[H\x1b[2J")  # to the top left corner, and everything off
        typer.echo(style(f"{looks.app.reference} at {now}, every {every:g} s; Ctrl-C ends", dim=True) + "\n")
        _show(found, as_json=False)
    else:
        typer.echo(f"{now} {found.sum_line}")
    sys.stdout.flush()


def _ticks(every: float) -> Iterator[int]:
    number = 0
    due = time.monotonic()
    while True:
        yield number
        number += 1
        due = max(due + every, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


def _show(found: Look, *, as_json: bool) -> None:
    if as_json:
        return print_json(found.as_json())
    if found.lags:
        table([_lag_row(row) for row in found.lags], usual={}, right=("PARTITION", "COMMITTED", "END", "LAG"))
        typer.echo()
    if found.queues:
        numbers = ("MESSAGES", "JOBS WAITING", "RUNNING", "SCHEDULED", "FAILED")
        table([_queue_row(queue) for queue in found.queues], usual={}, right=numbers)
        typer.echo()
    typer.echo(style("sum:", bold=True) + f" {found.sum_line}")
    return None


def _lag_row(row: Lag) -> Mapping[str, str]:
    missing = row.partition is None
    return {
        "GROUP": row.group,
        "TOPIC": row.topic,
        "PARTITION": "-" if row.partition is None else str(row.partition),
        "COMMITTED": "-" if missing else "never" if row.committed is None else f"{row.committed:,}",
        "END": "-" if row.end is None else f"{row.end:,}",
        "LAG": "no such topic" if missing else "no leader" if row.lag is None else f"{row.lag:,}",
    }


def _queue_row(queue: Backlog) -> Mapping[str, str]:
    return {
        "QUEUE": queue.queue,
        "MESSAGES": f"{queue.messages:,}",
        "JOBS WAITING": f"{queue.waiting.jobs:,}",
        "RUNNING": f"{queue.running.jobs:,}",
        "SCHEDULED": f"{queue.scheduled.jobs:,}",
        "FAILED": f"{queue.failed.jobs:,}",
    }


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
