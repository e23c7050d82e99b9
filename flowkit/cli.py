"""The ``flowkit`` command. Exit code 0 for success, 1 for a failure while running, 2 for a wrong call."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .errors import ConfigurationError, FlowkitError
from .locate import locate

if TYPE_CHECKING:
    from .app import Flowkit

cli = typer.Typer(
    name="flowkit",
    help="Applications made of Kafka messages. APP is module:attribute, for example app:app, or FLOWKIT_APP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

App = Annotated[str | None, typer.Argument(metavar="APP", help="module:attribute; FLOWKIT_APP if not given")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
LogLevel = Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")]


def main() -> NoReturn:
    """The entry point: turns what a user can cause into one message and an exit code."""
    try:
        cli()
    except ConfigurationError as error:
        _fail(error, 2)
    except FlowkitError as error:
        _fail(error, 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


def _fail(error: Exception, code: int) -> NoReturn:
    print(f"flowkit: {error}", file=sys.stderr)
    sys.exit(code)


def load(reference: str | None) -> Flowkit:
    """The application, or an exit that shows the user's own error as theirs: without a frame of flowkit."""
    try:
        return locate(reference)
    except FlowkitError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames if not f.filename.startswith(("<frozen importlib", os.path.dirname(__file__)))]
        print(f"flowkit: {reference or os.environ.get('FLOWKIT_APP')} could not be imported:\n", file=sys.stderr)
        if theirs:
            print("".join(traceback.format_list(theirs)), end="", file=sys.stderr)
        print("".join(traceback.format_exception_only(error)), end="", file=sys.stderr)
        sys.exit(1)


def _log(level: str) -> None:
    from .server import log_to_stderr

    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ConfigurationError(f"--log-level is debug, info, warning or error, not {level!r}")
    log_to_stderr(number)


@cli.command()
def run(app: App = None, log_level: LogLevel = "info") -> None:
    """Consume: run the handlers of inline routes, queue the messages of the others.

    Example: flowkit run shop:app
    """
    from .server import Server

    _log(log_level)
    code = Server(load(app)).run()
    if code:
        raise typer.Exit(code)


@cli.command()
def worker(
    app: App = None,
    queues: Annotated[
        str | None, typer.Option(help="Queues, with commas; if not given, those of the routes and of hooks.")
    ] = None,
    burst: Annotated[bool, typer.Option("--burst", help="End when the queues are empty.")] = False,
    log_level: LogLevel = "info",
) -> None:
    """Work on the queues: like `rq worker`, with the application imported once; one process a queue.

    Example: flowkit worker shop:app --queues default,express
    """
    from .worker import Workers, route_queues

    _log(log_level)
    application = load(app)
    application.settings_for_queues()
    names = [name.strip() for name in queues.split(",") if name.strip()] if queues else None
    if not (names or route_queues(application)):
        raise ConfigurationError(
            f"{application.reference} queues nothing: all its routes are inline; `flowkit run` does all the work"
        )
    print(f"flowkit: working on {', '.join(names or route_queues(application))}", file=sys.stderr)
    code = Workers(application, names, burst=burst).run()
    if code:
        raise typer.Exit(code)


@cli.command()
def dev(
    app: App = None,
    broker_port: Annotated[int | None, typer.Option(help="Port of the broker; 0: any free one.")] = None,
    redis_port: Annotated[int | None, typer.Option(help="Port of Redis; 0: any free one.")] = None,
    partitions: Annotated[int, typer.Option(help="Partitions of each topic.", min=1)] = 4,
    seconds: Annotated[float | None, typer.Option(help="Stop after so many seconds.")] = None,
) -> None:
    """Start an embedded broker and Redis, the consumer and a worker; Ctrl-C stops them all.

    They listen where the application expects them, if that is on this machine. Example: flowkit dev shop:app
    """
    from .dev import DevStack, stop_requested

    application = load(app)
    with stop_requested() as stop:
        stack = DevStack(application, _say, broker_port=broker_port, redis_port=redis_port, partitions=partitions)
        with stack:
            variables = " ".join(f"{name}={value}" for name, value in stack.environment.items())
            first = next(iter(application.routes), "TOPIC")
            _say("dev", f"send it something: {variables} flowkit send {application.reference} {first} '{{...}}'")
            ends = time.monotonic() + seconds if seconds else None
            code = stack.wait(lambda: stop.is_set() or (ends is not None and time.monotonic() >= ends))
    if code:
        raise typer.Exit(code)


COLOURS = {"dev": typer.colors.CYAN, "run": typer.colors.GREEN, "worker": typer.colors.MAGENTA}


def _say(name: str, line: str) -> None:
    typer.secho(f"{name:>6} | ", fg=COLOURS.get(name), nl=False)
    typer.echo(line)


@cli.command()
def routes(app: App = None, as_json: AsJson = False) -> None:
    """Show every route: topic, group, where its handler runs, parser and the rest.

    Example: flowkit routes shop:app
    """
    application = load(app)
    rows = [
        {
            "topic": topic,
            "group": handling.group,
            "handler": handling.route.name,
            "runs": "inline"
            if handling.inline
            else f"custom worker {_name(handling.worker)}"
            if handling.worker
            else f"queue {handling.queue}",
            "parser": _name(handling.parser),
            "interchanger": _name(handling.interchanger),
            "responder": _name(handling.route.responder) if handling.route.responder else "",
            "retry": str(handling.retry),
            "dead letter": handling.dead_letter or "",
        }
        for topic, handling in sorted(application.handlings.items())
    ]
    if as_json:
        return _json(rows)
    for row in rows:
        typer.secho(row["topic"], bold=True)
        for name, value in row.items():
            if name != "topic" and value:
                typer.echo(f"  {name + ':':<14}{value}")
    return None


def _name(thing: Any) -> str:
    return getattr(thing, "__qualname__", None) or getattr(thing, "__name__", None) or type(thing).__qualname__


@cli.command()
def flow(app: App = None, as_json: AsJson = False) -> None:
    """Show what goes in and what comes out of it: topic => topics, always or sometimes, once or more.

    Example: flowkit flow shop:app
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
        return _json(rows)
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


@cli.command()
def info(app: App = None, as_json: AsJson = False) -> None:
    """Show versions, settings (secrets masked), groups and queues, and whether Kafka and Redis answer.

    Example: flowkit info shop:app
    """
    from .worker import route_queues

    application = load(app)
    packages = ("flowkit-kafka", "kafka-python", "rq", "redis", "typer", "orjson")
    found = {
        "application": application.reference,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "settings": dict(application.settings.rows()),
        "groups": sorted({handling.group for handling in application.handlings.values()}),
        "queues": route_queues(application),
        "kafka": _kafka_state(application),
        "redis": _redis_state(application),
    }
    if as_json:
        return _json(found)
    for name, value in found.items():
        if isinstance(value, dict):
            typer.secho(name, bold=True)
            for key, item in value.items():
                typer.echo(f"  {key + ':':<34}{item}")
        else:
            typer.secho(f"{name}: ", bold=True, nl=False)
            typer.echo(", ".join(value) if isinstance(value, list) else value)
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kafka_state(app: Flowkit) -> str:
    if not app.settings.kafka.hosts:
        return "kafka.hosts is not set"
    from .clients.kafka_python import brokers

    try:
        return f"answers: {', '.join(brokers(app.settings))}"
    except FlowkitError as error:
        return f"does not answer: {error}"


def _redis_state(app: Flowkit) -> str:
    if not app.settings.redis:
        return "not set; only queued routes need it"
    from .jobs import connect, redis_errors

    try:
        with redis_errors():
            connect(app.settings.redis).ping()
    except FlowkitError as error:
        return f"does not answer: {error}"
    return "answers"


@cli.command()
def send(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="[APP] TOPIC [VALUE]", help="VALUE is one message; - reads lines from stdin."),
    ],
    file: Annotated[Path | None, typer.Option(help="File with one message a line, for example JSON lines.")] = None,
    key: Annotated[str | None, typer.Option(help="Key of each message.")] = None,
    key_field: Annotated[str | None, typer.Option(help="Field of each JSON message that is its key.")] = None,
    header: Annotated[list[str] | None, typer.Option(help="Header as name=value; may be repeated.")] = None,
    partition: Annotated[int | None, typer.Option(help="Partition, instead of the one the key belongs to.")] = None,
) -> None:
    """Send one message, the lines of a file, or the lines of stdin, with the application's settings.

    Examples: flowkit send shop:app orders '{"id": 1}' --key ann; flowkit send shop:app orders --file orders.jsonl
    """
    reference = arguments.pop(0) if ":" in arguments[0] else None
    if not 1 <= len(arguments) <= 2 or (len(arguments) == 2) == (file is not None):
        raise ConfigurationError(
            "call it as: flowkit send [APP] TOPIC VALUE, or TOPIC - for stdin, or TOPIC --file FILE"
        )
    from .responses import response
    from .route import check_name

    application = load(reference)
    application.settings_for_kafka()
    topic = check_name("topic", arguments[0])
    headers = [tuple(item.split("=", 1)) for item in header or []]
    count = 0
    lines: Iterable[str] = [arguments[1]] if len(arguments) == 2 and arguments[1] != "-" else _lines(file)
    deliveries = []
    for line in lines:
        chosen = _field(line, key_field) if key_field else key
        item = response(topic, line, None, chosen, partition, None, headers)
        deliveries.append(item)
        if len(deliveries) == 1_000:  # bounds what waits for the broker
            application.producer.send_all(deliveries)
            count += len(deliveries)
            deliveries = []
    application.producer.send_all(deliveries)
    count += len(deliveries)
    application.producer.close()
    typer.echo(f"{count} message{'' if count == 1 else 's'} sent to {topic}")


def _lines(file: Path | None) -> Iterator[str]:
    if file is None:
        yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        return
    try:
        with file.open(encoding="utf-8") as opened:
            yield from (line.rstrip("\r\n") for line in opened if line.strip())
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from error


def _field(line: str, name: str) -> str:
    try:
        return str(json.loads(line)[name])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"--key-field {name}: this message has none: {line[:80]}") from error


def _json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _version_option(value: bool) -> None:
    if value:
        typer.echo(f"flowkit {_version('flowkit-kafka')}")
        raise typer.Exit


@cli.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version_option, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
