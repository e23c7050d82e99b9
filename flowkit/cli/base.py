"""What the commands share: the group they belong to, their common arguments, and how they print."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigurationError
from ..reporting import load
from ..settings import LOG_LEVELS
from .completing import applications

if TYPE_CHECKING:
    from ..app import Flowkit

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

App = Annotated[
    str | None,
    typer.Argument(metavar="APP", help="module:attribute; FLOWKIT_APP if not given.", autocompletion=applications),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
LogLevel = Annotated[
    str | None,
    typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error; the setting if not given."),
]


def load_and_log(reference: str | None, level: str | None) -> Flowkit:
    """The application, and our log lines on stderr unless it has set up logging itself."""
    from ..logs import log_to_stderr

    if level is not None and level.lower() not in LOG_LEVELS:
        raise ConfigurationError(f"--log-level is {', '.join(LOG_LEVELS[:-1])} or {LOG_LEVELS[-1]}, not {level!r}")
    application = load(reference)
    log_to_stderr(application, level)
    return application


def names_of(option: str | None) -> list[str]:
    """The names in an option that takes several, with commas."""
    return [name.strip() for name in (option or "").split(",") if name.strip()]


def style(text: str, **style: Any) -> str:
    """For a terminal; ``typer.echo`` takes it away again where the output goes elsewhere."""
    return text if os.environ.get("NO_COLOR") else typer.style(text, **style)


def table(rows: Sequence[Mapping[str, str]], usual: Mapping[str, str], right: Collection[str] = ()) -> None:
    """Columns under their names, as wide as they need to be; without those that hold the usual value only. Those of
    ``right`` hold numbers.
    """
    names = [name for name in rows[0] if any(row[name] != usual.get(name) for row in rows)] if rows else []
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}

    def line(row: Mapping[str, str]) -> str:
        cells = (f"{row[name]:{'>' if name in right else '<'}{widths[name]}}" for name in names)
        return "  ".join(cells).rstrip()

    if names:
        typer.echo(style(line({name: name for name in names}), bold=True))
    for row in rows:
        typer.echo(line(row))


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
