"""The ``flowkit`` command. Exit code 0 for success, 1 for a failure while running, 2 for a wrong call."""

from __future__ import annotations

import difflib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core

from .errors import ConfigurationError, DeliveryError, FlowkitError
from .reporting import load, reported

if TYPE_CHECKING:
    from .app import Flowkit

cli = typer.Typer(
    name="flowkit",
    help="Applications made of Kafka messages.",
    epilog="""\b
APP is module:attribute, for example shop:app for the app in shop.py; `shop`
alone means shop:app. It is looked for in the working directory first. Where
none is given, the environment variable FLOWKIT_APP names it.

`flowkit COMMAND -h` shows the options of a command, with examples.

\b
Examples:
  flowkit dev shop:app                          try it on this machine
  flowkit send shop:app orders '{"id": 1}'      give it a message
  flowkit flow shop:app                         see what leads where
  flowkit run shop:app                          in production: consume,
  flowkit worker shop:app                       and work on the queues
""",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

App = Annotated[str | None, typer.Argument(metavar="APP", help="module:attribute; FLOWKIT_APP if not given.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
LogLevel = Annotated[str, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")]


def main() -> NoReturn:
    """The entry point: turns what a user can cause into one message and an exit code."""
    with reported():
        cli()
    sys.exit(0)


def _log(level: str) -> int:
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ConfigurationError(f"--log-level is debug, info, warning or error, not {level!r}")
    return number


def _load_and_log(reference: str | None, level: str) -> Flowkit:
    """The application, and our log lines on stderr unless it has set up logging itself."""
    from .server import log_to_stderr

    number = _log(level)
    application = load(reference)
    log_to_stderr(number)
    return application


@cli.command()
def run(app: App = None, log_level: LogLevel = "info") -> None:
    """Consume: run inline handlers, put other messages on their queues.

    Ends on SIGTERM or Ctrl-C after the message in hand; a second one ends it at once.

    \b
    Examples:
      flowkit run shop:app
      FLOWKIT_KAFKA_HOSTS=kafka:9092 flowkit run shop:app
    """
    from .server import Server

    code = Server(_load_and_log(app, log_level)).run()
    if code:
        raise typer.Exit(code)


@cli.command()
def worker(
    app: App = None,
    queues: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Queues, with commas; if not given, those of the routes and of hooks."),
    ] = None,
    burst: Annotated[bool, typer.Option("--burst", help="End when the queues are empty.")] = False,
    log_level: LogLevel = "info",
) -> None:
    """Work on the queues: run the handlers of queued messages.

    Does what `rq worker` does, with the application imported once; one process a queue.

    \b
    Examples:
      flowkit worker shop:app
      flowkit worker shop:app --queues default,express
    """
    from .worker import Workers, route_queues

    application = _load_and_log(app, log_level)
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
    broker_port: Annotated[
        int | None, typer.Option(metavar="PORT", help="Port of the broker; 0: any free one.", min=0, max=65535)
    ] = None,
    redis_port: Annotated[
        int | None, typer.Option(metavar="PORT", help="Port of Redis; 0: any free one.", min=0, max=65535)
    ] = None,
    partitions: Annotated[int, typer.Option(metavar="COUNT", help="Partitions of each topic.", min=1)] = 4,
    seconds: Annotated[float | None, typer.Option(metavar="SECONDS", help="Stop after so many seconds.")] = None,
) -> None:
    """Try it here: start a broker, Redis, the consumer and a worker.

    Shows what arrives in the topics that the application sends to. Broker and Redis are embedded and keep nothing. They
    listen where the application expects them, if that is on this machine, else on a free port. Ctrl-C stops them all.

    \b
    Examples:
      flowkit dev shop:app
      flowkit dev shop:app --broker-port 0 --redis-port 0
    """
    from .dev import DevStack, sent_topics, stop_requested
    from .watch import Watcher

    application = load(app)
    if not application.routes:
        raise ConfigurationError(f"{application.reference} has no topics; register a handler with @app.topic(...)")
    with stop_requested() as stop:
        stack = DevStack(application, _say, broker_port=broker_port, redis_port=redis_port, partitions=partitions)
        with stack:
            variables = "".join(f"{name}={value} " for name, value in stack.needed_to_send().items())
            first = next(iter(application.routes))
            _say("dev", f"send it something: {variables}flowkit send {application.reference} {first} '{{...}}'")
            ends = time.monotonic() + seconds if seconds else None
            watcher = Watcher(stack.broker.hosts, sent_topics(application), partitions, _say)
            code = stack.wait(lambda: stop.is_set() or (ends is not None and time.monotonic() >= ends), watcher.look)
            watcher.close()
    if code:
        raise typer.Exit(code)


COLOURS = {"dev": typer.colors.CYAN, "run": typer.colors.GREEN, "worker": typer.colors.MAGENTA}


def _say(name: str, line: str) -> None:
    # in one piece, because several threads do this
    typer.echo(_style(f"{name:>6} |", fg=COLOURS.get(name)) + f" {line}")


def _style(text: str, **style: Any) -> str:
    """For a terminal; ``typer.echo`` takes it away again where the output goes elsewhere."""
    return text if os.environ.get("NO_COLOR") else typer.style(text, **style)


@cli.command()
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
        return _json(
            [
                {
                    "topic": topic,
                    "group": handling.group,
                    "handler": handling.route.name,
                    "inline": handling.inline,
                    "queue": None if handling.inline or handling.worker else handling.queue,
                    "worker": _name(handling.worker) if handling.worker else None,
                    "parser": _name(handling.parser),
                    "interchanger": _name(handling.interchanger),
                    "responder": _name(handling.route.responder) if handling.route.responder else None,
                    "attempts": handling.retry.attempts,
                    "retry": str(handling.retry),
                    "dead_letter": handling.dead_letter,
                }
                for topic, handling in handlings
            ]
        )
    if not handlings:
        typer.echo(f"{application.reference} has no topics; register a handler with @app.topic(...)")
    _table(
        [
            {
                "TOPIC": topic,
                "HANDLER": handling.route.name,
                "RUNS": "inline"
                if handling.inline
                else f"worker {_name(handling.worker)}"
                if handling.worker
                else f"queue {handling.queue}",
                "GROUP": handling.group,
                "ATTEMPTS": str(handling.retry.attempts),
                "DEAD LETTER": handling.dead_letter or "",
                "RESPONDER": _name(handling.route.responder) if handling.route.responder else "",
                "PARSER": _name(handling.parser),
                "INTERCHANGER": _name(handling.interchanger),
            }
            for topic, handling in handlings
        ],
        usual={"PARSER": "Json", "INTERCHANGER": "Plain", "DEAD LETTER": "", "RESPONDER": ""},
    )
    return None


def _name(thing: Any) -> str:
    return getattr(thing, "__qualname__", None) or getattr(thing, "__name__", None) or type(thing).__qualname__


def _table(rows: Sequence[Mapping[str, str]], usual: Mapping[str, str]) -> None:
    """Columns under their names, as wide as they need to be; without those that hold the usual value only."""
    names = [name for name in rows[0] if any(row[name] != usual.get(name) for row in rows)] if rows else []
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    if names:
        typer.echo(_style("  ".join(f"{name:<{widths[name]}}" for name in names).rstrip(), bold=True))
    for row in rows:
        typer.echo("  ".join(f"{row[name]:<{widths[name]}}" for name in names).rstrip())


@cli.command()
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
        return _json(rows)
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


@cli.command()
def info(app: App = None, as_json: AsJson = False) -> None:
    """Show versions and settings, and whether Kafka and Redis answer.

    Passwords and other secrets are masked.

    \b
    Examples:
      flowkit info shop:app
      flowkit info shop:app --json
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
            typer.echo(_style(name, bold=True))
            for key, item in value.items():
                typer.echo(f"  {key + ':':<34}{item}")
        else:
            text = (", ".join(value) or "none") if isinstance(value, list) else value
            typer.echo(_style(f"{name}:", bold=True) + f" {text}")
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
        return str(error)


def _redis_state(app: Flowkit) -> str:
    if not app.settings.redis:
        return "not set; only queued routes need it"
    from .jobs import connect, redis_errors

    try:
        with redis_errors():
            connect(app.settings.redis).ping()
    except FlowkitError as error:
        return str(error)
    return "answers"


class _Send(typer.core.TyperCommand):
    """Says in its usage line what the positions mean, which click cannot know: the first may be left out."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return ["[OPTIONS]", "[APP] TOPIC", "{VALUE | - | --file FILE}"]


@cli.command(cls=_Send)
def send(
    arguments: Annotated[list[str], typer.Argument(metavar="[APP] TOPIC [VALUE]", hidden=True)],
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with one message a line, for example JSON lines.")
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="KEY", help="Key of each message.")] = None,
    key_field: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Field of each JSON message that is its key.")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Header of each message; may be repeated.")
    ] = None,
    partition: Annotated[
        int | None,
        typer.Option(metavar="NUMBER", help="Partition, instead of the one the key belongs to.", min=0),
    ] = None,
) -> None:
    """Send one message, or each line of a file or of stdin (-).

    The text is sent as it is, with the application's own Kafka settings. Returns when the broker has confirmed every
    message.

    \b
    Examples:
      flowkit send shop:app orders '{"id": 1, "user": "ann"}' --key ann
      flowkit send shop:app orders --file orders.jsonl --key-field user
      gunzip -c orders.jsonl.gz | flowkit send shop:app orders -
    """
    from .dev import topics_of
    from .responses import response
    from .route import check_name

    expected = 2 if file is None else 1
    reference = arguments.pop(0) if len(arguments) == expected + 1 else None
    if len(arguments) != expected or (reference is None and ":" in arguments[0]):
        raise ConfigurationError(
            "this call of send is not complete or has too much; it is one of:\n"
            "  flowkit send APP TOPIC VALUE\n"
            "  flowkit send APP TOPIC -              (one message a line of stdin)\n"
            "  flowkit send APP TOPIC --file FILE    (one message a line)\n"
            "and APP may be left out where FLOWKIT_APP is set"
        )
    if key is not None and key_field is not None:
        raise ConfigurationError("give --key or --key-field, not both")
    topic = check_name("topic", arguments[0])
    headers = [_header(item) for item in header or []]
    application = load(reference)
    application.settings_for_kafka()
    count = 0
    lines = _lines(file) if file is not None or arguments[1] == "-" else [arguments[1].encode()]
    try:
        for batch in _batches(lines):
            keys = [_field(line, key_field) if key_field else key for line in batch]
            application.producer.send_all(
                [
                    response(topic, line, None, k, partition, None, headers)
                    for line, k in zip(batch, keys, strict=True)
                ]
            )
            count += len(batch)
    except FlowkitError as error:
        if count:
            print(f"flowkit: the first {count} messages were sent; then:", file=sys.stderr)
        near = difflib.get_close_matches(topic, topics_of(application), n=1)
        if isinstance(error, DeliveryError) and near and near[0] != topic:
            raise DeliveryError(f"{error}; did you mean {near[0]!r}?") from error
        raise
    application.producer.close()
    typer.echo(f"{count} message{'' if count == 1 else 's'} sent to {topic}")


def _batches(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    """A thousand at a time at most, which bounds what waits for the broker."""
    iterator = iter(lines)
    while batch := list(itertools.islice(iterator, 1_000)):
        yield batch


def _header(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not name or not equals:
        raise ConfigurationError(f"--header is name=value, not {item!r}")
    return name, value


def _lines(file: Path | None) -> Iterator[bytes]:
    if file is None:
        if sys.stdin.isatty():
            print("flowkit: one message a line; end with Ctrl-D", file=sys.stderr)
        yield from (line.rstrip(b"\r\n") for line in sys.stdin.buffer if line.strip())
        return
    try:
        with file.open("rb") as opened:
            yield from (line.rstrip(b"\r\n") for line in opened if line.strip())
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from error


def _field(line: bytes, name: str) -> str:
    try:
        value = json.loads(line)[name]
        if value is None:
            raise KeyError(name)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"--key-field {name}: this message has none: {line[:80].decode(errors='replace')}"
        ) from error
    return value if isinstance(value, str) else json.dumps(value)


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
