"""Dead letters: a message that is given up, as it goes to its dead-letter topic, is read back, and goes on to where it was.

Names and formats of the headers are those of Spring Kafka's DeadLetterPublishingRecoverer, so that its tools read them. Letters
that it wrote can be read back too.
"""

from __future__ import annotations

import re
import struct
from datetime import UTC, datetime
from typing import Any, NamedTuple

from .errors import ConfigurationError, DeliveryError
from .message import HeaderPairs, Record
from .responses import Response
from .route import name_mistake

SPRING = "kafka_dlt-"
TOPIC, PARTITION, OFFSET = (f"{SPRING}original-{part}" for part in ("topic", "partition", "offset"))
TIMESTAMP, GROUP = f"{SPRING}original-timestamp", f"{SPRING}original-consumer-group"
ERROR, TEXT = f"{SPRING}exception-fqcn", f"{SPRING}exception-message"
ATTEMPTS, FAILED_AT = "flowkit-attempts", "flowkit-failed-at"
WRITTEN = (TOPIC, PARTITION, OFFSET, TIMESTAMP, GROUP, ERROR, TEXT, ATTEMPTS, FAILED_AT)
"""The headers of a dead letter, in this order behind those of its message."""

FEWEST = (TOPIC, PARTITION, OFFSET, GROUP, ATTEMPTS)
"""Those of a letter that is too large with all of them."""

REPLAY_OF, REPLAYS = "flowkit-replay-of", "flowkit-replays"
"""The headers of a message that was sent again: which dead letter it was, and the how manieth time this is."""

HANDLED = "flowkit-handled"
"""The header of a note in a dead-letter topic: which letters of its partition were replayed or dropped."""

LONGEST_TEXT = 2000
"""Characters of an error's message that a dead letter holds, at most."""


# Where dead letters go.


def filled(pattern: str, topic: str, group: str) -> str:
    """The name that a pattern means for one route."""
    return pattern.replace("{topic}", topic).replace("{group}", group)


def check_ways(ways: dict[str, str | None]) -> None:
    """Raises ``ConfigurationError`` where dead letters (``{topic: dead-letter topic}``) would come back for ever."""
    for topic in ways:
        way = [topic]
        while following := ways.get(way[-1]):
            way.append(following)
            if following == topic:
                end = "itself" if len(way) == 2 else "itself in the end: " + " to ".join(way)
                raise ConfigurationError(
                    f"topic {topic!r}: its dead letters cannot go to {end}, they would come back for ever; give it another"
                    " dead_letter=, or dead_letter=False"
                )
            if following in way[:-1]:
                break


# Writing one.


def letter(topic: str, record: Record, group: str, error: Exception, attempts: int) -> Response:
    """The dead letter of a record: key, value and headers untouched, and in more headers where it is from, and why."""
    failed_at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    values = (
        record.topic.encode(),
        struct.pack(">i", record.partition),
        struct.pack(">q", record.offset),
        struct.pack(">q", record.timestamp),
        group.encode(),
        f"{type(error).__module__}.{type(error).__qualname__}".encode(errors="backslashreplace"),
        str(error)[:LONGEST_TEXT].encode(errors="backslashreplace")[:LONGEST_TEXT],
        str(attempts).encode(),
        failed_at.encode(),
    )
    return Response(topic, record.value, record.key, headers=(*record.headers, *zip(WRITTEN, values, strict=True)))


def send(producer: Any, item: Response) -> None:
    """Sends a dead letter and waits for the broker. One that Kafka does not take goes with the fewest headers.

    Raises ``DeliveryError`` or ``BrokerUnavailable`` where it is not confirmed.
    """
    try:
        producer.send_all([item])
    except DeliveryError as error:
        if error.passing:
            raise
        message, block = item.headers[: -len(WRITTEN)], item.headers[-len(WRITTEN) :]
        shorter = tuple(pair for pair in block if pair[0] in FEWEST)
        try:
            producer.send_all([item._replace(headers=(*message, *shorter))])
        except DeliveryError as problem:
            if problem.passing:
                raise
            raise DeliveryError(
                f"{problem}; the message has {_size(item)} bytes with the headers of a dead letter: if that is too large,"
                f" raise max.message.bytes of {item.topic!r} above it (and above that of the topic it is from)"
            ) from problem


def _size(item: Response) -> int:
    parts = [item.key, item.value, *(part for name, value in item.headers for part in (name.encode(), value))]
    return sum(len(part) for part in parts if part is not None)


# Reading one back.


class Origin(NamedTuple):
    """Where a dead letter is from and why it is one. None: it does not say."""

    topic: str
    partition: int | None
    offset: int | None
    timestamp: int | None
    group: str | None
    error: str | None
    text: str | None
    attempts: int | None
    failed_at: float | None

    @property
    def place(self) -> str:
        partition = "?" if self.partition is None else self.partition
        return f"{self.topic}[{partition}]@{'?' if self.offset is None else self.offset}"


def origin(headers: HeaderPairs) -> Origin | None:
    """What the headers of a dead letter say; None for a record that is none. Of names that repeat, the last one counts."""
    last = dict(headers)
    topic = _text(last.get(TOPIC))
    if not topic or name_mistake("topic", topic):
        return None
    attempts = _text(last.get(ATTEMPTS)) or ""
    return Origin(
        topic,
        _number(last.get(PARTITION), ">i"),
        _number(last.get(OFFSET), ">q"),
        _number(last.get(TIMESTAMP), ">q"),
        _text(last.get(GROUP)),
        _text(last.get(f"{SPRING}exception-cause-fqcn") or last.get(ERROR)),
        _text(last.get(TEXT)),
        int(attempts) if re.fullmatch(r"[0-9]{1,9}", attempts) else None,
        _time(_text(last.get(FAILED_AT))),
    )


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="backslashreplace")


def _number(value: bytes | None, form: str) -> int | None:
    return int(struct.unpack(form, value)[0]) if value is not None and len(value) == struct.calcsize(form) else None


def _time(text: str | None) -> float | None:
    try:
        return None if text is None else datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None


def headers_of_message(headers: HeaderPairs) -> HeaderPairs:
    """The headers that the message had before it was a dead letter."""
    names = [name for name, _ in headers]
    at = next((index for index in reversed(range(len(names))) if names[index] == TOPIC), len(names))
    if tuple(names[at:]) in (WRITTEN, FEWEST):  # written by flowkit: what stands before it is not touched
        return tuple(headers[:at])
    ours = (ATTEMPTS, FAILED_AT)
    return tuple(pair for pair in headers if not pair[0].startswith(SPRING) and pair[0] not in ours)


def replay(record: Record, topic: str, partition: int | None) -> Response:
    """A dead letter as the message that it was, for ``topic``: key, value and headers as they were, and two that mark it."""
    before = headers_of_message(record.headers)
    last = _text(dict(before).get(REPLAYS)) or "0"
    count = int(last) + 1 if re.fullmatch(r"[0-9]{1,9}", last) else 1
    marks = (
        (REPLAY_OF, f"{record.topic}/{record.partition}/{record.offset}".encode()),
        (REPLAYS, str(count).encode()),
    )
    kept = [pair for pair in before if pair[0] not in (REPLAY_OF, REPLAYS)]
    return Response(topic, record.value, record.key, partition, headers=(*kept, *marks))


# Notes of what was replayed or dropped.


def note(topic: str, partition: int, offsets: list[int], what: str) -> Response:
    """Says in a dead-letter topic that letters of one partition were ``replayed`` or ``dropped``.

    It stands in their partition and behind them, so it is there as long as they are. To others it is a record without a value,
    and without the headers of a dead letter; no other has its key.
    """
    text = f"{what} {','.join(_ranges(offsets))}"
    return Response(topic, None, f"{HANDLED}:{min(offsets)}".encode(), partition, headers=((HANDLED, text.encode()),))


def noted(headers: HeaderPairs) -> list[range] | None:
    """The offsets that a note names; None for a record that is none."""
    text = _text(dict(headers).get(HANDLED))
    found = re.fullmatch(
        r"(?:replayed|dropped) ([0-9]{1,19}(?:-[0-9]{1,19})?(?:,[0-9]{1,19}(?:-[0-9]{1,19})?)*)", text or ""
    )
    if found is None:
        return None
    ranges = []
    for part in found[1].split(","):
        first, _, last = part.partition("-")
        ranges.append(range(int(first), int(last or first) + 1))
    return ranges


def _ranges(offsets: list[int]) -> list[str]:
    parts: list[list[int]] = []
    for offset in sorted(offsets):
        if parts and offset == parts[-1][1] + 1:
            parts[-1][1] = offset
        else:
            parts.append([offset, offset])
    return [str(first) if first == last else f"{first}-{last}" for first, last in parts]


def where(record: Record) -> str:
    """Where a dead letter stands, as the commands take it."""
    return f"{record.topic}:{record.partition}:{record.offset}"
