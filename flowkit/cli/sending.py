"""``flowkit send``."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from ..errors import ConfigurationError, DeliveryError, FlowkitError
from ..reporting import load
from .completing import application_or_topic

if TYPE_CHECKING:
    from ..app import Flowkit


class Send(typer.core.TyperCommand):
    """Says in its usage line what the positions mean, which click cannot know: the first may be left out."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return ["[OPTIONS]", "[APP] TOPIC", "{VALUE | - | --file FILE}"]


def send(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="[APP] TOPIC [VALUE]", hidden=True, autocompletion=application_or_topic),
    ],
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
    from ..responses import response
    from ..route import check_name
    from ..topics import uses

    expected = 2 if file is None else 1
    reference = arguments.pop(0) if len(arguments) == expected + 1 else None
    unnamed = reference is None and not os.environ.get("FLOWKIT_APP")
    if len(arguments) != expected or unnamed or (reference is None and ":" in arguments[0]):
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
    noted = topic not in application.routes  # what others read from a topic of theirs is not known here
    lines = _lines(file) if file is not None or arguments[1] == "-" else [os.fsencode(arguments[1])]
    try:
        for batch in _batches(lines):
            keys = [_field(line, key_field) if key_field else key for line in batch]
            for line in batch:
                if not noted and (note := _unread(application, topic, line)):
                    print(f"flowkit: note: {note}", file=sys.stderr)
                    noted = True
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
        near = difflib.get_close_matches(topic, uses(application), n=1)
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


def _unread(application: Flowkit, topic: str, line: bytes) -> str:
    """Why the route of a topic will not read a message; nothing if it will. Both may run code of the user's."""
    try:
        parser = application.handlings[topic].parser
    except Exception as error:
        return f"{application.reference} is not ready to read {topic!r}: {_said(error)}"
    try:
        parser.parse(line)
    except Exception as error:
        return f"the parser of {topic!r} does not read this: {_said(error)}"
    return ""


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, FlowkitError) else f"{type(error).__name__}: {error}"


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
