"""``flowkit console``."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .base import App, load_and_log, version_of

if TYPE_CHECKING:
    from ..app import Flowkit


def console(
    app: App = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Python's own console, also where IPython is at hand.")
    ] = False,
) -> None:
    """Open a Python console with the application at hand.

    It has `app`, its `routes`, `send(topic, value)` to Kafka, and `client`, which runs a message through a handler here,
    without Kafka and Redis: client.send("orders", {"id": 1}).responses. It is IPython where that is installed.

    \b
    Examples:
      flowkit console shop:app
      flowkit console shop:app --plain
    """
    application = load_and_log(app, None)
    names = _names(application)
    try:
        if plain or importlib.util.find_spec("IPython") is None:
            _python(_banner(application), names)
        else:
            _ipython(_banner(application), names)
    finally:
        application.stop()
        application.producer.close()


def _names(app: Flowkit) -> dict[str, Any]:
    """What is at hand in the console. Nothing connects until it is used."""
    from .. import Message
    from ..testing import Client

    return {
        "app": app,
        "routes": dict(sorted(app.routes.items())),
        "producer": app.producer,
        "send": app.producer.send,
        "client": Client(app),
        "Message": Message,
    }


def _banner(app: Flowkit) -> str:
    from ..flowmap import runs

    handlings = sorted(app.handlings.items())
    width = max((len(topic) for topic, _ in handlings), default=0)
    routes = [f"    {topic:<{width}}  {handling.route.name} ({runs(handling)})" for topic, handling in handlings]
    hosts = ", ".join(app.settings.kafka.hosts) or "kafka.hosts is not set"
    return "\n".join(
        [
            f"flowkit {version_of('flowkit-kafka')}, {app.reference}, Kafka at {hosts}",
            "  app       the application",
            "  routes    its routes by topic:",
            *routes,
            '  send      send("orders", {"id": 1}, key="ann") to Kafka; waits for the broker. The same: producer.send',
            '  client    client.send("orders", {"id": 1}) runs a handler here, without Kafka and Redis, and gives the call:',
            "            its responses, error, queue; startup hooks run with app.start(connected=False)",
        ]
    )


def _python(banner: str, names: dict[str, Any]) -> None:
    import code
    import contextlib

    with contextlib.suppress(ImportError):  # not there on every system; it edits lines, and completes names with Tab
        import readline
        import rlcompleter

        readline.set_completer(rlcompleter.Completer(names).complete)
        readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    code.interact(banner=banner, local=names, exitmsg="")


def _ipython(banner: str, names: dict[str, Any]) -> None:
    from IPython import start_ipython
    from IPython.terminal.interactiveshell import TerminalInteractiveShell
    from traitlets.config import Config

    config = Config()
    config.TerminalInteractiveShell.banner1 = banner + "\n"
    config.TerminalInteractiveShell.banner2 = ""
    config.TerminalInteractiveShell.confirm_exit = False
    if hasattr(TerminalInteractiveShell, "enable_tip"):  # since IPython 9
        config.TerminalInteractiveShell.enable_tip = False
    start_ipython(argv=[], user_ns=names, config=config)
