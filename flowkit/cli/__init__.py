"""The ``flowkit`` command. Exit code 0 for success, 1 for a failure while running, 2 for a wrong call.

A command is a function of one of the modules here; what it does is a module of flowkit, imported when it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from ..reporting import reported
from .base import cli, version_of
from .cluster import lag, topics
from .completing import words_with_colons
from .console import console
from .dead import dead
from .dev import dev
from .install import install
from .running import run, stop, worker
from .sending import Send, send
from .showing import flow, help_, info, routes
from .web import web

__all__ = ["cli", "main"]

# In the order of `flowkit -h`: try it, run it, look at it.
cli.command()(install)
cli.command()(dev)
cli.command(cls=Send)(send)
cli.command()(run)
cli.command()(worker)
cli.command()(stop)
cli.command()(routes)
cli.command()(flow)
cli.command()(topics)
cli.command()(lag)
cli.add_typer(dead)
cli.command()(info)
cli.command()(console)
cli.command()(web)
cli.command("help")(help_)
SECOND_NAMES: dict[str, Callable[..., None]] = {"c": console, "s": run, "server": run, "w": worker, "r": routes}
for name, command in SECOND_NAMES.items():
    cli.command(name, hidden=True)(command)


def main() -> NoReturn:
    """The entry point: turns what a user can cause into one message and an exit code."""
    with reported(), words_with_colons():
        cli()
    sys.exit(0)


def _version_option(value: bool) -> None:
    if value:
        typer.echo(f"flowkit {version_of('flowkit-kafka')}")
        raise typer.Exit


@cli.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version_option, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
