"""``flowkit run`` and ``flowkit worker``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import ConfigurationError
from .base import App, LogLevel, load_and_log


def run(app: App = None, log_level: LogLevel = "info") -> None:
    """Consume: run inline handlers, put other messages on their queues.

    Ends on SIGTERM or Ctrl-C after the message in hand; a second one ends it at once.

    \b
    Examples:
      flowkit run shop:app
      FLOWKIT_KAFKA_HOSTS=kafka:9092 flowkit run shop:app
    """
    from ..server import Server

    code = Server(load_and_log(app, log_level)).run()
    if code:
        raise typer.Exit(code)


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
    from ..worker import Workers, route_queues

    application = load_and_log(app, log_level)
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
