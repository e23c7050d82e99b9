"""What a handler may know of its message."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from .errors import ParserError

HeaderPairs = Sequence[tuple[str, bytes | None]]


class Partition(NamedTuple):
    """One partition of one topic. Equal to kafka-python's TopicPartition, which is a tuple of the same two."""

    topic: str
    partition: int


class Record(Protocol):
    """A message as a client delivers it; kafka-python's ConsumerRecord is one. ``timestamp`` is in milliseconds."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> HeaderPairs: ...


class PlainRecord(NamedTuple):
    """A record that came from a queue or a test instead of a client. ``received``: when a consumer got it, in Unix seconds."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: HeaderPairs = ()
    received: float = 0.0


class Headers(Mapping[str, bytes | None]):
    """The headers by name; where a name repeats, the last one counts. ``pairs`` has them all, in order."""

    __slots__ = ("_last", "pairs")

    def __init__(self, pairs: HeaderPairs) -> None:
        self.pairs = tuple((name, value) for name, value in pairs)
        self._last = dict(self.pairs)

    def __getitem__(self, name: str) -> bytes | None:
        return self._last[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._last)

    def __len__(self) -> int:
        return len(self._last)

    def __repr__(self) -> str:
        return f"Headers({list(self.pairs)!r})"


class Reception(NamedTuple):
    """What the messages that a route was given together have in common."""

    decode: Callable[[bytes | None], Any]
    group: str
    attempt: int = 1
    last: bool = False
    received: float = 0.0
    queue: str | None = None
    worker: Any = None


class Message:
    """One message. A handler or hook that has a parameter annotated ``Message`` is given it.

    ``payload`` is the parsed value, ``queue`` the RQ queue and ``worker`` the object with ``perform_async`` that the
    message goes to: hooks of ``before_enqueue`` may change these three. The rest is as Kafka has it: ``topic``,
    ``partition``, ``offset``, ``key`` and ``value`` (bytes), ``headers``, ``timestamp``. ``received_at`` is when the consumer
    got it, ``group`` the consumer group, ``attempt`` the number of this attempt (1 is the first), ``last_attempt`` whether no
    other one follows by itself: the message then goes to its dead letter topic, or stays in RQ's FailedJobRegistry.
    """

    __slots__ = (
        "_payload",
        "_queue",
        "_reception",
        "_record",
        "_worker",
    )  # the first, second and last when they are set

    def __init__(self, record: Record, reception: Reception) -> None:
        self._record = record
        self._reception = reception

    @property
    def payload(self) -> Any:
        """The parsed value; parsed when first asked for. Raises ``ParserError`` where a typed one cannot be."""
        if not hasattr(self, "_payload"):
            self._payload = self._reception.decode(self._record.value)
        return self._payload

    @payload.setter
    def payload(self, value: Any) -> None:
        self._payload = value

    @property
    def payload_changed(self) -> bool:
        """Whether a hook left another payload than the value of the message says, by assignment or in place."""
        if not hasattr(self, "_payload"):
            return False
        try:
            return bool(self._payload != self._reception.decode(self._record.value))
        except ParserError:
            return True  # a hook put it in the place of one that cannot be parsed

    @property
    def queue(self) -> str | None:
        return self._queue if hasattr(self, "_queue") else self._reception.queue

    @queue.setter
    def queue(self, name: str | None) -> None:
        self._queue = name

    @property
    def worker(self) -> Any:
        return self._worker if hasattr(self, "_worker") else self._reception.worker

    @worker.setter
    def worker(self, worker: Any) -> None:
        self._worker = worker

    @property
    def topic(self) -> str:
        return self._record.topic

    @property
    def partition(self) -> int:
        return self._record.partition

    @property
    def offset(self) -> int:
        return self._record.offset

    @property
    def key(self) -> bytes | None:
        return self._record.key

    @property
    def value(self) -> bytes | None:
        return self._record.value

    @property
    def headers(self) -> Headers:
        return Headers(self._record.headers)

    @property
    def timestamp(self) -> datetime:
        """When the message was made, by its producer's or its broker's clock; aware, in UTC.

        Kafka takes any number for it: one beyond the years 1 to 9999 is given as their first or last moment.
        """
        return _moment(self._record.timestamp / 1000)

    @property
    def received_at(self) -> datetime:
        return _moment(self._reception.received)

    @property
    def group(self) -> str:
        return self._reception.group

    @property
    def attempt(self) -> int:
        return self._reception.attempt

    @property
    def last_attempt(self) -> bool:
        return self._reception.last

    def __repr__(self) -> str:
        return f"<Message {place(self._record)} attempt {self.attempt}>"


def _moment(seconds: float) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):  # OSError: of some systems' C library
        return (datetime.max if seconds > 0 else datetime.min).replace(tzinfo=UTC)


class Abort(BaseException):
    """Raised by ``app.abort()``: this message is done. A BaseException, so that ``except Exception`` lets it through."""


def place(record: Record) -> str:
    """Where a record stands, as every error and log line of flowkit writes it: ``orders[2]@1017``."""
    return f"{record.topic}[{record.partition}]@{record.offset}"


def places(partitions: Iterable[Partition]) -> str:
    """Partitions as every log line of flowkit writes them: ``orders[0],orders[1]``."""
    return ",".join(f"{topic}[{number}]" for topic, number in sorted(partitions)) or "none"


def about(record: Record, group: str) -> dict[str, Any]:
    """Where a record stands, as events have it."""
    return {"topic": record.topic, "partition": record.partition, "offset": record.offset, "group": group}
