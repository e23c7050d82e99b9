"""``flowkit routes``, ``flowkit flow`` and ``flowkit info``: what an application is."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from ..errors import FlowkitError
from ..reporting import load
from ..signature import name_of
from .base import App, AsJson, print_json, style, table, version_of

if TYPE_CHECKING:
    from ..app import Flowkit


def routes(app: App = None, as_json: AsJson = False) -> None:
    """List the routes: topic, handler, where it runs, group, retry.

    Columns in which every route has the default (parser, interchanger) are left out; --json has everything.

    \b
    Examples:
      flowkit routes shop:app
      flowkit routes shop:app --json
    """
    application = load(app)
    handlings = sorted(application.handlings.items())
    if as_json:
        return print_json(
            [
                {
                    "topic": topic,
                    "group": handling.group,
                    "handler": handling.route.name,
                    "inline": handling.inline,
                    "queue": None if handling.inline or handling.worker else handling.queue,
                    "worker": name_of(handling.worker) if handling.worker else None,
                    "parser": name_of(handling.parser),
                    "interchanger": name_of(handling.interchanger),
                    "responder": name_of(handling.route.responder) if handling.route.responder else None,
                    "attempts": handling.retry.attempts,
                    "retry": str(handling.retry),
                    "dead_letter": handling.dead_letter,
                }
                for topic, handling in handlings
            ]
        )
    if not handlings:
        typer.echo(f"{application.reference} has no topics; register a handler with @app.topic(...)")
    table(
        [
            {
                "TOPIC": topic,
                "HANDLER": handling.route.name,
                "RUNS": "inline"
                if handling.inline
                else f"worker {name_of(handling.worker)}"
                if handling.worker
                else f"queue {handling.queue}",
                "GROUP": handling.group,
                "ATTEMPTS": str(handling.retry.attempts),
                "DEAD LETTER": handling.dead_letter or "",
                "RESPONDER": name_of(handling.route.responder) if handling.route.responder else "",
                "PARSER": name_of(handling.parser),
                "INTERCHANGER": name_of(handling.interchanger),
            }
            for topic, handling in handlings
        ],
        usual={"PARSER": "Json", "INTERCHANGER": "Plain", "DEAD LETTER": "", "RESPONDER": ""},
    )
    return None


def flow(app: App = None, as_json: AsJson = False) -> None:
    """Show which topics come in, and what each of them leads to.

    "always" is a required response; "one or more" may be sent several times a call.

    \b
    Examples:
      flowkit flow shop:app
      flowkit flow shop:app --json
    """
    application = load(app)
    rows = [
        {
            "topic": topic,
            "responses": [
                {"topic": d.topic, "required": d.required, "multiple_usage": d.multiple_usage}
                for d in sorted(handling.all_declarations.values(), key=lambda d: d.topic)
            ],
        }
        for topic, handling in sorted(application.handlings.items())
    ]
    if as_json:
        return print_json(rows)
    if not rows:
        typer.echo(f"{application.reference} has no topics; register a handler with @app.topic(...)")
    for line in flow_lines(application):
        typer.echo(line)
    return None


def flow_lines(app: Flowkit) -> Iterator[str]:
    """The flow map as text."""
    for topic, handling in sorted(app.handlings.items()):
        declared = sorted(handling.all_declarations.values(), key=lambda d: d.topic)
        if not declared:
            yield f"{topic} => (nothing)"
            continue
        yield f"{topic} =>"
        width = max(len(d.topic) for d in declared) + 1
        yield from (f"  - {d.topic + ':':<{width}} ({d.when}, {d.how_many})" for d in declared)


def info(app: App = None, as_json: AsJson = False) -> None:
    """Show versions and settings, and whether Kafka and Redis answer.

    Passwords and other secrets are masked.

    \b
    Examples:
      flowkit info shop:app
      flowkit info shop:app --json
    """
    from ..worker import route_queues

    application = load(app)
    packages = ("flowkit-kafka", "kafka-python", "rq", "redis", "typer", "orjson")
    found = {
        "application": application.reference,
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in packages}},
        "settings": dict(application.settings.rows()),
        "groups": sorted({handling.group for handling in application.handlings.values()}),
        "queues": route_queues(application),
        "kafka": _kafka_state(application),
        "redis": _redis_state(application),
    }
    if as_json:
        return print_json(found)
    for name, value in found.items():
        if isinstance(value, dict):
            typer.echo(style(name, bold=True))
            for key, item in value.items():
                typer.echo(f"  {key + ':':<34}{item}")
        else:
            text = (", ".join(value) or "none") if isinstance(value, list) else value
            typer.echo(style(f"{name}:", bold=True) + f" {text}")
    return None


def _kafka_state(app: Flowkit) -> str:
    if not app.settings.kafka.hosts:
        return "kafka.hosts is not set"
    from ..clients.kafka_python import brokers

    try:
        return f"answers: {', '.join(brokers(app.settings))}"
    except FlowkitError as error:
        return str(error)


def _redis_state(app: Flowkit) -> str:
    if not app.settings.redis:
        return "not set; only queued routes need it"
    from ..jobs import connect, redis_errors

    try:
        with redis_errors():
            connect(app.settings.redis).ping()
    except FlowkitError as error:
        return str(error)
    return "answers"
