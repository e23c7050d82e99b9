"""``flowkit run`` and ``flowkit worker``, and ``flowkit stop`` for those that run in the background."""

from __future__ import annotations

import contextlib
import difflib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigurationError
from . import completing
from .base import App, LogLevel, load_and_log, names_of

logger = logging.getLogger(__name__)

AsDaemon = Annotated[
    bool,
    typer.Option("--daemon", "-d", help="Go on in the background, once everything is ready; see `flowkit stop`."),
]
PidPath = Annotated[
    Path | None,
    typer.Option("--pid", metavar="FILE", help="With --daemon: its pid file, if not tmp/flowkit-COMMAND.pid."),
]
LogPath = Annotated[
    Path | None,
    typer.Option("--log", metavar="FILE", help="With --daemon: for its output, if not log/flowkit-COMMAND.log."),
]
RUN_PID = Path("tmp/flowkit-run.pid")


def run(
    app: App = None,
    topics: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Consume these topics only, with commas.", autocompletion=completing.topics
        ),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Consume the topics of these groups only, with commas.",
            autocompletion=completing.groups,
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", "-n", metavar="COUNT", help="Processes, which share the partitions.", min=1)
    ] = 1,
    log_level: LogLevel = None,
    daemon: AsDaemon = False,
    pid: PidPath = None,
    log: LogPath = None,
) -> None:
    """Consume: run inline handlers, put other messages on their queues.

    Ends on SIGTERM or Ctrl-C after the message in hand; a second one ends it at once. Start several, on one machine or
    many: they share the partitions. --processes starts several here, and again if one dies. systemd, Docker and Kubernetes
    want it in the foreground, as it is; where none of them is at hand, --daemon lets it go on alone, and the command returns
    when it consumes or has failed. SIGHUP reopens the log.

    \b
    Examples:
      flowkit run shop:app
      flowkit run shop:app --topics orders,payments
      flowkit run shop:app --processes 4
      FLOWKIT_KAFKA_HOSTS=kafka:9092 flowkit run shop:app
      flowkit run shop:app --daemon --pid shop.pid --log shop.log
    """
    from ..server import Server
    from ..servers import Servers

    with _maybe_daemon("run", daemon, pid, log) as ready:
        application = load_and_log(app, log_level)
        topic_names, group_names = names_of(topics), names_of(groups)
        if processes == 1:
            code = Server(application, topics=topic_names, groups=group_names, on_ready=ready).run()
        else:
            code = Servers(application, processes, topics=topic_names, groups=group_names, on_ready=ready).run()
        if code:
            raise typer.Exit(code)


def worker(
    app: App = None,
    queues: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Queues, with commas; if not given, those of the routes and of hooks.",
            autocompletion=completing.queues,
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            "--processes", "-n", metavar="COUNT", help="Processes for each queue that keeps no order.", min=1
        ),
    ] = 1,
    max_jobs: Annotated[
        int | None,
        typer.Option(metavar="COUNT", help="Jobs after which a process makes room for a new one.", min=1),
    ] = None,
    burst: Annotated[bool, typer.Option("--burst", help="End when the queues are empty.")] = False,
    log_level: LogLevel = None,
    daemon: AsDaemon = False,
    pid: PidPath = None,
    log: LogPath = None,
) -> None:
    """Work on the queues: run the handlers of queued messages.

    Does what `rq worker` does, with the application imported once. Several queues are several processes, so that no job is
    lost when one is killed; --processes gives each queue more of them. One that ends is started again. Where handlers leave
    more and more memory behind, --max-jobs gives it back; with --burst too, a process ends after so many, for good.

    \b
    Examples:
      flowkit worker shop:app
      flowkit worker shop:app --processes 4
      flowkit worker shop:app --queues default,express
      flowkit worker shop:app --max-jobs 10000
    """
    from ..queues import route_queues
    from ..workers import Workers

    with _maybe_daemon("worker", daemon, pid, log) as ready:
        application = load_and_log(app, log_level)
        application.settings_for_queues()
        names = names_of(queues) or None
        if not (names or route_queues(application)):
            raise ConfigurationError(
                f"{application.reference} queues nothing: all its routes are inline; `flowkit run` does all the work"
            )
        _note_near_names(names or [], route_queues(application))
        logger.info("working on %s", ", ".join(names or route_queues(application)))
        code = Workers(application, names, burst=burst, processes=processes, max_jobs=max_jobs, on_ready=ready).run()
        if code:
            raise typer.Exit(code)


def _note_near_names(names: list[str], known: list[str]) -> None:
    """A name that no route has may be that of a hook; it is allowed, but looked at for a slip."""
    for name in names:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if near and name not in known:
            note = f"no route names the queue {name!r}; did you mean {near[0]!r}?"
            print(f"flowkit: note: {note}", file=sys.stderr)


def stop(
    pid: Annotated[Path, typer.Option("--pid", metavar="FILE", help="The pid file it was started with.")] = RUN_PID,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Seconds to wait for its end.", min=0)] = 60.0,
) -> None:
    """Stop what runs in the background: finish the messages in hand.

    Returns when it has ended, with code 0 if its end was clean.

    \b
    Examples:
      flowkit stop
      flowkit stop --pid shop.pid --timeout 120
    """
    from ..daemon import stop

    typer.echo(stop(pid, timeout))


@contextlib.contextmanager
def _maybe_daemon(
    command: str, daemon: bool, pid: Path | None, log: Path | None
) -> Iterator[Callable[[], None] | None]:
    if not daemon:
        if pid or log:
            raise ConfigurationError("--pid and --log are for --daemon; without it, output goes to where you see it")
        yield None
        return
    from ..daemon import daemonized

    with daemonized(
        pid or RUN_PID.with_name(f"flowkit-{command}.pid"), log or Path(f"log/flowkit-{command}.log")
    ) as ready:
        yield ready
