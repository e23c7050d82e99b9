"""``flowkit web``."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from ..errors import ConfigurationError, missing_package
from .base import App, LogLevel, load_and_log

PASSWORD = "FLOWKIT_WEB_PASSWORD"

logger = logging.getLogger(__name__)


def web(
    app: App = None,
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="PORT", help="Port to listen on; 0: any free one.", min=0, max=65535)
    ] = 8080,
    user: Annotated[str, typer.Option(metavar="NAME", help="Name to log in with.")] = "flowkit",
    password: Annotated[
        str | None,
        typer.Option(
            metavar="PASSWORD",
            envvar=PASSWORD,
            show_default=False,
            help="Password to log in with; needed. Others on this machine see it in the list of processes: prefer the"
            " variable.",
        ),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="No retrying and deleting.")] = False,
    log_level: LogLevel = None,
) -> None:
    """Serve a web page: lag, queues, workers, failed jobs, flow map.

    It needs the extra `web` and a password. Only this machine reaches it unless --host says otherwise; then put a proxy with
    TLS in front of it. Ctrl-C stops it.

    \b
    Examples:
      FLOWKIT_WEB_PASSWORD=... flowkit web shop:app
      flowkit web shop:app --port 9000 --read-only
    """
    if not password:
        raise ConfigurationError(
            f"the web page needs a password: set {PASSWORD} to one, for example by\n"
            f"  export {PASSWORD}=\"$(python3 -c 'import secrets; print(secrets.token_urlsafe(16))')\""
        )
    if not user or ":" in user:
        raise ConfigurationError(f"--user is a name without a colon, not {user!r}")
    from ..queues import route_queues

    try:
        from ..web.pages import Access, make_pages
        from ..web.serve import is_loopback, serve
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("flask", "waitress", "werkzeug", "jinja2"):
            raise
        raise missing_package("flowkit web", package, "web") from error
    application = load_and_log(app, log_level)
    if route_queues(application):
        application.settings_for_queues()
    else:
        application.settings_for_kafka()
    exposed = not is_loopback(host)
    if exposed:
        logger.warning(
            "flowkit web listens on %s without TLS: whoever is on the way can read the password; put a proxy with TLS in"
            " front of it, or listen on 127.0.0.1",
            host,
        )
    pages = make_pages(application, Access(password, user, read_only, exposed))

    def ready(address: str) -> None:
        print(
            f"flowkit: {application.reference} is shown at {address} (user {user}); Ctrl-C ends it", file=sys.stderr
        )

    serve(pages, host, port, ready)
