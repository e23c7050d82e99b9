"""``flowkit dead``: the dead letters of an application, and what becomes of them."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from ..errors import ConfigurationError
from ..reporting import load
from .base import App, AsJson, print_json, style, table

if TYPE_CHECKING:
    from ..app import Flowkit
    from ..clients.kafka_letters import Letterbox
    from ..message import Record
    from ..replay import Found, Place, Wanted

dead = typer.Typer(
    name="dead",
    help="Look at dead letters, send them again, or drop them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

Topic = Annotated[str | None, typer.Option("--topic", metavar="TOPIC", help="Only those of messages of this topic.")]
Group = Annotated[str | None, typer.Option("--group", metavar="GROUP", help="Only those of this consumer group.")]
Error = Annotated[
    str | None, typer.Option("--error", metavar="TEXT", help="Only those with this in the error's type or text.")
]
Since = Annotated[
    str | None,
    typer.Option("--since", metavar="TIME", help="Only those that failed then or later: 2h, 3d, or a date."),
]
Until = Annotated[str | None, typer.Option("--until", metavar="TIME", help="Only those that failed before.")]
Key = Annotated[str | None, typer.Option("--key", metavar="KEY", help="Only those with this key.")]
Number = Annotated[
    int | None, typer.Option("--partition", metavar="NUMBER", help="Only of messages of this partition.", min=0)
]
Offset = Annotated[
    int | None, typer.Option("--offset", metavar="NUMBER", help="Only of messages at this offset.", min=0)
]
At = Annotated[
    list[str] | None,
    typer.Option("--at", metavar="LETTER", help="Only this one, as `list` names it; may be repeated."),
]
From = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="TOPIC", help="The dead-letter topic to look into, instead of those of the routes."
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="NUMBER", help="The oldest so many at most.", min=1)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


@dead.command("list")
def list_(
    app: App = None,
    topic: Topic = None,
    group: Group = None,
    error: Error = None,
    since: Since = None,
    until: Until = None,
    key: Key = None,
    partition: Number = None,
    offset: Offset = None,
    at: At = None,
    source: From = None,
    limit: Limit = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also those that were replayed or dropped already.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List dead letters, the oldest first: where each is from, and why it is one.

    \b
    Examples:
      flowkit dead list shop:app
      flowkit dead list shop:app --topic orders --error ValueError --since 2h
    """
    application, topics = _opened(app, source)
    wanted = _wanted(topics, topic, group, error, since, until, key, partition, offset, at)
    with _box(application, topics) as box:
        found = _find(box, wanted)
    open_ones = [letter for letter in found if not letter.handled]
    chosen = found if everything else open_ones
    shown = chosen[:limit]
    if as_json:
        print_json([_as_json(letter) for letter in shown])
        return
    if shown:
        usual = {"GROUP": "", "STATE": "open"}
        table([_row(application, letter) for letter in shown], usual=usual, right=("ATTEMPTS", "AGE"))
        typer.echo()
    handled = f", {len(found) - len(open_ones)} handled" if len(found) > len(open_ones) else ""
    more = f"; {len(chosen) - len(shown)} more are not shown" if len(chosen) > len(shown) else ""
    typer.echo(style("sum:", bold=True) + f" {_letters(len(open_ones))} in {', '.join(topics)}{handled}{more}")
    _tell_failed_jobs(application)


class Show(typer.core.TyperCommand):
    """Says in its usage line that the first position may be left out."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return ["[OPTIONS]", "[APP]", "LETTER"]


@dead.command("show", cls=Show)
def show(
    arguments: Annotated[list[str], typer.Argument(metavar="[APP] LETTER", hidden=True)],
    source: From = None,
    as_json: AsJson = False,
) -> None:
    """Show one dead letter with all that is in it.

    LETTER is PARTITION:OFFSET in the dead-letter topic, or TOPIC:PARTITION:OFFSET, as `list` names it.

    \b
    Examples:
      flowkit dead show shop:app 0:17
      flowkit dead show shop:app orders.dead:0:17 --json
    """
    from ..deadletters import origin
    from ..replay import Wanted, read

    if len(arguments) > 2 or (len(arguments) == 1 and not os.environ.get("FLOWKIT_APP")):
        raise ConfigurationError(
            "it is: flowkit dead show APP LETTER; APP may be left out where FLOWKIT_APP is set, and LETTER is a name that"
            " `flowkit dead list` gives"
        )
    application, topics = _opened(arguments[0] if len(arguments) == 2 else None, source)
    place = _place(arguments[-1], topics)
    with _box(application, topics) as box:
        record = next(read(box, [place]), None)
        it = None if record is None else origin(record.headers)
        if record is None or it is None:
            what = "is nothing" if record is None else "is a record, but no dead letter"
            raise ConfigurationError(f"at {arguments[-1]} {what}; `flowkit dead list` names those there are")
        (letter,) = _find(box, Wanted(places={place}))
    if as_json:
        headers = [[name, _bytes_as_json(value)] for name, value in record.headers]
        print_json({**_as_json(letter), "text": it.text, "headers": headers, "value": _bytes_as_json(record.value)})
    else:
        _show(application, record, letter, it.text)


@dead.command("replay")
def replay(
    app: App = None,
    topic: Topic = None,
    group: Group = None,
    error: Error = None,
    since: Since = None,
    until: Until = None,
    key: Key = None,
    partition: Number = None,
    offset: Offset = None,
    at: At = None,
    source: From = None,
    limit: Limit = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="TOPIC", help="Send them there, not to the topics they are from.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Send dead letters again, to where they are from, as they were.

    Each goes to its topic and partition, with the headers flowkit-replay-of and flowkit-replays, and all groups that read that
    topic get it. It is noted in the dead-letter topic, so that a second call does not send it once more.

    \b
    Examples:
      flowkit dead replay shop:app --dry-run
      flowkit dead replay shop:app --topic orders --error ValueError
      flowkit dead replay shop:app --at orders.dead:0:17
    """
    from ..replay import send_again, ways

    application, topics = _opened(app, source)
    wanted = _wanted(topics, topic, group, error, since, until, key, partition, offset, at)
    with _box(application, topics) as box:
        found = [letter for letter in _find(box, wanted) if not letter.handled][:limit]
        where = ways(application, found, to)
        targets = sorted({to or letter.origin.topic for letter in found})
        if dry_run or not found:
            would = (
                f"{_letters(len(found))} would be sent again to {', '.join(targets)}" if found else _nothing(topics)
            )
            typer.echo(would)
            return
        try:
            done = send_again(application, box, found, where, lambda count: _progress(count, len(found)))
        finally:
            application.producer.close()
    gone = f"; {len(found) - done} were deleted meanwhile" if done < len(found) else ""
    typer.echo(f"{_letters(done)} sent again to {', '.join(targets)}{gone}")


@dead.command("drop")
def drop(
    app: App = None,
    topic: Topic = None,
    group: Group = None,
    error: Error = None,
    since: Since = None,
    until: Until = None,
    key: Key = None,
    partition: Number = None,
    offset: Offset = None,
    at: At = None,
    source: From = None,
    limit: Limit = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Note that dead letters are not needed any more: they are not listed, and not sent again.

    They stay in their topic until its retention deletes them; `flowkit dead list --all` still has them.

    \b
    Examples:
      flowkit dead drop shop:app --topic orders --until 2026-01-31
      flowkit dead drop shop:app --at orders.dead:0:17 --yes
    """
    from ..replay import drop as note_dropped

    application, topics = _opened(app, source)
    wanted = _wanted(topics, topic, group, error, since, until, key, partition, offset, at)
    with _box(application, topics) as box:
        found = [letter for letter in _find(box, wanted) if not letter.handled][:limit]
    if dry_run or not found:
        typer.echo(f"{_letters(len(found))} would be dropped" if found else _nothing(topics))
        return
    if not yes:
        typer.confirm(f"Drop {_letters(len(found))} of {', '.join(topics)}?", abort=True)
    try:
        note_dropped(application, found)
    finally:
        application.producer.close()
    typer.echo(f"{_letters(len(found))} dropped")


# What is meant.


def _opened(reference: str | None, source: str | None) -> tuple[Flowkit, list[str]]:
    """The application, and the dead-letter topics to look into."""
    from ..replay import topics_of
    from ..route import name_mistake

    application = load(reference)
    application.settings_for_kafka()
    if source is not None and (mistake := name_mistake("topic", source)):
        raise ConfigurationError(f"--from: {mistake}")
    return application, [source] if source is not None else topics_of(application)


@contextmanager
def _box(app: Flowkit, topics: list[str]) -> Iterator[Letterbox]:
    from ..clients.kafka_letters import Letterbox

    with Letterbox(app.settings, topics) as box:
        for name in topics:
            if name not in box.partitions:
                print(f"flowkit: there is no topic {name!r} on the brokers (yet)", file=sys.stderr)
        yield box


def _find(box: Letterbox, wanted: Wanted) -> list[Found]:
    from ..replay import find

    return find(box, wanted)


def _wanted(
    topics: list[str],
    topic: str | None,
    group: str | None,
    error: str | None,
    since: str | None,
    until: str | None,
    key: str | None,
    partition: int | None,
    offset: int | None,
    at: list[str] | None,
) -> Wanted:
    from ..replay import Wanted

    return Wanted(
        topic,
        group,
        error,
        _moment("--since", since),
        _moment("--until", until),
        None if key is None else os.fsencode(key),
        partition,
        offset,
        {_place(name, topics) for name in at or ()},
    )


def _place(name: str, topics: list[str]) -> Place:
    """Topic, partition and offset of ``[TOPIC:]PARTITION:OFFSET``."""
    found = re.fullmatch(r"(?:([^:]+):)?([0-9]{1,9}):([0-9]{1,19})", name)
    if found is None:
        raise ConfigurationError(f"a dead letter is named PARTITION:OFFSET or TOPIC:PARTITION:OFFSET, not {name!r}")
    topic = found[1] or (topics[0] if len(topics) == 1 else None)
    if topic not in topics:
        known = f"the dead-letter topics are {', '.join(topics)}"
        raise ConfigurationError(f"{name!r}: {known}; name one of them, as in {topics[0]}:{found[2]}:{found[3]}")
    return topic, int(found[2]), int(found[3])


def _moment(option: str, text: str | None) -> float | None:
    """A time in Unix seconds: so long ago (``2h``), or a date with or without a time, of the local time zone if of none."""
    if text is None:
        return None
    if found := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhdw])", text):
        return time.time() - float(found[1]) * UNITS[found[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise ConfigurationError(
            f"{option} is a time such as 30m, 2h or 3d (so long ago), 2026-01-31 or 2026-01-31T12:00, not {text!r}"
        ) from None


# What is shown.


def _row(app: Flowkit, letter: Found) -> dict[str, str]:
    it = letter.origin
    route = app.handlings.get(it.topic)
    return {
        "LETTER": letter.name,
        "FROM": it.place,
        "GROUP": "" if route is not None and route.group == it.group else it.group or "?",
        "KEY": _short("" if letter.key is None else _readable(letter.key), 20),
        "ERROR": _short(_printable(f"{(it.error or '?').removeprefix('builtins.')}: {it.text or ''}"), 60),
        "ATTEMPTS": "?" if it.attempts is None else str(it.attempts),
        "AGE": _age(time.time() - letter.time),
        "STATE": "handled" if letter.handled else "open",
    }


def _as_json(letter: Found) -> dict[str, Any]:
    it = letter.origin
    topic, partition, offset = letter.place
    return {
        "letter": {"topic": topic, "partition": partition, "offset": offset},
        "origin": {"topic": it.topic, "partition": it.partition, "offset": it.offset, "timestamp": it.timestamp},
        "group": it.group,
        "error": it.error,
        "text": it.text,
        "attempts": it.attempts,
        "failed_at": _iso(letter.time),
        "key": _bytes_as_json(letter.key),
        "handled": letter.handled,
    }


def _bytes_as_json(value: bytes | None) -> Any:
    """A text where it is one, else ``{"base64": ...}``."""
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value or b"").decode()}


def _show(app: Flowkit, record: Record, letter: Found, text: str | None) -> None:
    it = letter.origin
    written = "" if it.timestamp is None else f", written {_iso(it.timestamp / 1000)}"
    lines = {
        "dead letter": f"{letter.name} ({'handled' if letter.handled else 'open'}), failed {_iso(letter.time)}",
        "from": it.place + written,
        "group": _printable(it.group or "?"),
        "attempts": "?" if it.attempts is None else str(it.attempts),
        "error": _printable(f"{it.error or '?'}: {text or ''}"),
        "key": "none" if record.key is None else _readable(record.key),
    }
    for name, value in lines.items():
        typer.echo(style(f"{name + ':':<13}", bold=True) + value)
    typer.echo(style("headers:", bold=True))
    from ..deadletters import headers_of_message

    for header, item in headers_of_message(record.headers):
        typer.echo(f"  {_printable(header)}: {'none' if item is None else _readable(item)}")
    typer.echo(style("value:", bold=True))
    typer.echo("  " + _value(app, it.topic, record.value).replace("\n", "\n  "))


def _value(app: Flowkit, topic: str, value: bytes | None) -> str:
    """As the route's parser reads it, if there is one and it can; else as text, or as the bytes themselves."""
    if value is None:
        return "none (a tombstone)"
    route = app.handlings.get(topic)
    if route is not None:
        try:
            return json.dumps(route.parser.parse(value), indent=2, ensure_ascii=False)
        except Exception as error:  # that may be why it is here
            print(
                f"flowkit: the parser of {topic!r} cannot read the value: {_printable(str(error))}", file=sys.stderr
            )
    return _readable(value)


def _readable(value: bytes) -> str:
    try:
        return _printable(value.decode())
    except UnicodeDecodeError:
        return repr(value)


def _printable(text: str) -> str:
    """Without what would move a terminal's cursor, or worse."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _age(seconds: float) -> str:
    unit = next((unit for unit in ("d", "h", "m") if seconds >= UNITS[unit]), "s")
    return f"{max(0, int(seconds / UNITS[unit]))}{unit}"


def _iso(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):  # somebody else's header may say anything
        return f"{seconds:g}"


def _letters(count: int) -> str:
    return f"{count:,} dead letter{'' if count == 1 else 's'}"


def _nothing(topics: Sequence[str]) -> str:
    return f"no such dead letters in {', '.join(topics)}"


def _progress(done: int, count: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done:,} of {count:,}", end="\n" if done == count else "", file=sys.stderr, flush=True)


def _tell_failed_jobs(app: Flowkit) -> None:
    """Says where the messages of queued routes without dead letters are, if some are there and Redis answers."""
    if not app.settings.redis or all(route.inline or route.dead_letter for route in app.handlings.values()):
        return
    from rq import Queue

    from ..errors import RedisUnavailable
    from ..queues import connect, redis_errors, route_queues

    client = connect(app.settings.redis)
    try:
        with redis_errors():
            count = sum(Queue(name, connection=client).failed_job_registry.count for name in route_queues(app))
    except RedisUnavailable:
        return
    finally:
        client.close()
    if count:
        jobs = "a failed job" if count == 1 else f"{count:,} failed jobs"
        typer.echo(f"beside them {jobs} in RQ, of routes without a dead_letter: `rq info`, `rq requeue`")
