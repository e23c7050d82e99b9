"""``flowkit dev``."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ..errors import ConfigurationError
from ..reporting import load
from .base import App, style


def dev(
    app: App = None,
    broker_port: Annotated[
        int | None, typer.Option(metavar="PORT", help="Port of the broker; 0: any free one.", min=0, max=65535)
    ] = None,
    redis_port: Annotated[
        int | None, typer.Option(metavar="PORT", help="Port of Redis; 0: any free one.", min=0, max=65535)
    ] = None,
    partitions: Annotated[
        int, typer.Option(metavar="COUNT", help="Partitions of each topic that declares none.", min=1)
    ] = 4,
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
    from ..dev import DevStack, stop_requested
    from ..watch import Watcher

    application = load(app)
    if application.settings.env == "production":
        raise ConfigurationError(
            "flowkit dev keeps nothing, so it does not start in the environment production; use `flowkit run` and"
            " `flowkit worker`, or set FLOWKIT_ENV=development"
        )
    if not application.routes:
        raise ConfigurationError(f"{application.reference} has no topics; register a handler with @app.topic(...)")
    with stop_requested() as stop:
        stack = DevStack(application, _say, broker_port=broker_port, redis_port=redis_port, partitions=partitions)
        with stack:
            variables = "".join(f"{name}={value} " for name, value in stack.needed_to_send().items())
            first = next(iter(application.routes))
            _say("dev", f"send it something: {variables}flowkit send {application.reference} {first} '{{...}}'")
            ends = time.monotonic() + seconds if seconds else None
            watcher = Watcher(stack.broker.hosts, stack.sent_topics(), _say)
            code = stack.wait(lambda: stop.is_set() or (ends is not None and time.monotonic() >= ends), watcher.look)
            watcher.close()
    if code:
        raise typer.Exit(code)


COLOURS = {"dev": typer.colors.CYAN, "run": typer.colors.GREEN, "worker": typer.colors.MAGENTA}


def _say(name: str, line: str) -> None:
    # in one piece, because several threads do this
    typer.echo(style(f"{name:>6} |", fg=COLOURS.get(name)) + f" {line}")
