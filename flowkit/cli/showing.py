"""``flowkit routes``, ``flowkit flow`` and ``flowkit info``: what an application is."""

from __future__ import annotations

import platform
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigurationError, FlowkitError
from ..reporting import load
from ..settings import unknown_name
from ..signature import name_of
from .base import App, AsJson, print_json, style, table, version_of

if TYPE_CHECKING:
    from ..app import Flowkit
    from ..topics import Need


def routes(app: App = None, as_json: AsJson = False) -> None:
    """List the routes: topic, handler, where it runs, group, retry.

    Columns in which every route has the default (parser, interchanger) are left out; --json has everything.

    \b
    Examples:
      flowkit routes shop:app
      flowkit routes shop:app --json
    """
    from ..flowmap import queue_name, runs

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
                    "transactional": handling.transactional,
                    "queue": None if handling.inline or handling.worker else queue_name(handling),
                    "worker": name_of(handling.worker) if handling.worker else None,
                    "parser": name_of(handling.parser),
                    "interchanger": name_of(handling.interchanger),
                    "responder": name_of(handling.route.responder) if handling.route.responder else None,
                    "attempts": handling.retry.attempts,
                    "retry": str(handling.retry),
                    "retry_topics": dict(handling.retry_topics),
                    "dead_letter": handling.dead_letter,
                    "on_poison": handling.on_poison,
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
                "RUNS": runs(handling),
                "GROUP": handling.group,
                "ATTEMPTS": str(handling.retry.attempts),
                "RETRY TOPICS": _from_to([waiting for waiting, _ in handling.retry_topics]),
                "DEAD LETTER": handling.dead_letter or (f"({handling.on_poison})" if handling.on_poison else ""),
                "RESPONDER": name_of(handling.route.responder) if handling.route.responder else "",
                "PARSER": name_of(handling.parser),
                "INTERCHANGER": name_of(handling.interchanger),
            }
            for topic, handling in handlings
        ],
        usual={"PARSER": "Json", "INTERCHANGER": "Plain", "RETRY TOPICS": "", "DEAD LETTER": "", "RESPONDER": ""},
    )
    return None


def _from_to(names: list[str]) -> str:
    """``orders.retry.1..4``, as the names of shards are shown."""
    return f"{names[0]}..{len(names)}" if len(names) > 1 else "".join(names)


class Format(StrEnum):
    """How ``flowkit flow`` draws."""

    text = "text"
    mermaid = "mermaid"
    dot = "dot"
    svg = "svg"


def flow(
    app: App = None,
    format: Annotated[
        Format, typer.Option("--format", "-f", help="text, or a map: mermaid for Markdown, dot for Graphviz, svg.")
    ] = Format.text,
    as_json: AsJson = False,
) -> None:
    """Show which topics come in, and what each of them leads to.

    "always" is a required response; "one or more" may be sent several times a call. In the maps a solid line is always
    sent, a dashed one sometimes, and a dotted one leads to dead letters; a queued handler has a double frame.

    \b
    Examples:
      flowkit flow shop:app
      flowkit flow shop:app --format svg > flow.svg
      flowkit flow shop:app --json
    """
    from .. import flowmap

    application = load(app)
    if as_json:
        print_json(flowmap.rows(application))
    elif format is not Format.text:
        draw = {Format.mermaid: flowmap.mermaid, Format.dot: flowmap.dot, Format.svg: flowmap.svg}[format]
        typer.echo(draw(application), nl=False)
    elif not application.handlings:
        typer.echo(f"{application.reference} has no topics; register a handler with @app.topic(...)")
    else:
        for line in flowmap.text(application):
            typer.echo(line)


def info(app: App = None, as_json: AsJson = False) -> None:
    """Show versions, settings and topics; do Kafka and Redis answer?

    Passwords and other secrets are masked.

    \b
    Examples:
      flowkit info shop:app
      flowkit info shop:app --json
    """
    from ..queues import route_queues

    application = load(app)
    packages = ("flowkit-kafka", "kafka-python", "rq", "redis", "typer", "orjson")
    kafka, found_topics = _kafka_state(application)
    found = {
        "application": application.reference,
        "environment": application.settings.env,
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in packages}},
        "settings": dict(application.settings.rows()),
        "groups": sorted({handling.group for handling in application.handlings.values()}),
        "queues": route_queues(application),
        "topics": found_topics,
        "kafka": kafka,
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


def _kafka_state(app: Flowkit) -> tuple[str, dict[str, str]]:
    """What the brokers say, and the state of each topic that the application needs."""
    from ..topics import needs, uses

    unknown = dict.fromkeys(uses(app), "unknown")
    if not app.settings.kafka.hosts:
        return "kafka.hosts is not set", unknown
    from ..clients.kafka_admin import Cluster

    try:
        with Cluster(app.settings) as cluster:
            return f"answers: {', '.join(cluster.brokers())}", {
                need.topic: _topic_state(need) for need in needs(app, cluster)
            }
    except FlowkitError as error:
        return str(error), unknown


def _topic_state(need: Need) -> str:
    if need.state is None:
        return "missing"
    partitions = f"{need.state.partitions} partition{'' if need.state.partitions == 1 else 's'}"
    return f"{need.verdict}, {partitions}, replication factor {need.state.replication_factor}"


def _redis_state(app: Flowkit) -> str:
    if not app.settings.redis:
        return "not set; only queued routes need it"
    from ..queues import connect, redis_errors

    try:
        with redis_errors():
            connect(app.settings.redis).ping()
    except FlowkitError as error:
        return str(error)
    return "answers"


def _commands(ctx: typer.Context, incomplete: str) -> list[str]:
    return [name for name in sorted(_known(ctx)) if name.startswith(incomplete)]


def _known(ctx: typer.Context) -> dict[str, Any]:
    """The commands by name, without the hidden second names."""
    assert ctx.parent is not None
    group: Any = ctx.parent.command
    return {name: command for name, command in group.commands.items() if not command.hidden}


def help_(
    ctx: typer.Context,
    command: Annotated[
        str | None, typer.Argument(metavar="COMMAND", help="The command.", autocompletion=_commands)
    ] = None,
) -> None:
    """Show what there is, or the options of a command.

    \b
    Examples:
      flowkit help
      flowkit help run
    """
    assert ctx.parent is not None
    if command is None:
        return typer.echo(ctx.parent.get_help())
    found = _known(ctx).get(command)
    if found is None:
        raise ConfigurationError(unknown_name(f"help {command}", command, _known(ctx), "command"))
    options = {"help_option_names": ctx.help_option_names}
    with found.make_context(command, [], parent=ctx.parent, resilient_parsing=True, **options) as inner:
        typer.echo(found.get_help(inner))
    return None
