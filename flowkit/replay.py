"""What ``flowkit dead`` does: finds the dead letters of an application, sends them again, or notes that they are dropped.

A letter that was replayed or dropped stays in its topic, where nothing but time deletes it. A note behind it says that it is
handled; see ``deadletters.note``.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .deadletters import Origin, note, noted, origin, replay
from .errors import ConfigurationError, DeliveryError
from .message import Partition, Record
from .responses import Response
from .route import name_mistake

if TYPE_CHECKING:
    from .app import Flowkit
    from .clients.kafka_letters import Letterbox

AT_ONCE = 100
"""Letters that are sent, and then noted together: so many may be sent a second time after a kill."""

Place = tuple[str, int, int]
"""Topic, partition and offset of a dead letter."""


class Wanted(NamedTuple):
    """Which dead letters are meant. None: any. Times are Unix seconds; topic, partition and offset are those of the message."""

    topic: str | None = None
    group: str | None = None
    error: str | None = None
    since: float | None = None
    until: float | None = None
    key: bytes | None = None
    partition: int | None = None
    offset: int | None = None
    places: Collection[Place] = ()

    def has(self, found: Found) -> bool:
        it = found.origin
        told = f"{it.error or ''}: {it.text or ''}".lower()
        return (
            (not self.places or found.place in self.places)
            and self.topic in (None, it.topic)
            and self.group in (None, it.group)
            and (self.error is None or self.error.lower() in told)
            and (self.since is None or found.time >= self.since)
            and (self.until is None or found.time < self.until)
            and self.key in (None, found.key)
            and self.partition in (None, it.partition)
            and self.offset in (None, it.offset)
        )


class Found(NamedTuple):
    """A dead letter, without its value. ``time``: when it failed, in Unix seconds."""

    place: Place
    origin: Origin
    key: bytes | None
    time: float
    handled: bool = False

    @property
    def name(self) -> str:
        """Where it stands, as the commands take it."""
        return ":".join(map(str, self.place))


class Handled:
    """Which letters of each partition are replayed or dropped."""

    def __init__(self) -> None:
        self._ranges: dict[Partition, list[tuple[int, int]]] = defaultdict(list)
        self._merged: dict[Partition, tuple[list[int], list[int]]] = {}

    def add(self, record: Record, ranges: Iterable[range]) -> None:
        """What a note says; it can speak of letters in front of it only."""
        where = Partition(record.topic, record.partition)
        self._ranges[where] += [(part.start, min(part.stop, record.offset)) for part in ranges]
        self._merged.pop(where, None)

    def __contains__(self, place: Place) -> bool:
        topic, number, offset = place
        where = Partition(topic, number)
        if where not in self._merged:
            self._merged[where] = self._merge(where)
        starts, stops = self._merged[where]
        at = bisect.bisect_right(starts, offset) - 1
        return at >= 0 and offset < stops[at]

    def _merge(self, where: Partition) -> tuple[list[int], list[int]]:
        starts: list[int] = []
        stops: list[int] = []
        for start, stop in sorted(self._ranges.get(where, ())):
            if stops and start <= stops[-1]:
                stops[-1] = max(stops[-1], stop)
            else:
                starts.append(start)
                stops.append(stop)
        return starts, stops


def topics_of(app: Flowkit) -> list[str]:
    """The dead-letter topics of an application. Raises ``ConfigurationError`` where it has none."""
    topics = {handling.dead_letter for handling in app.handlings.values() if handling.dead_letter}
    if not topics:
        raise ConfigurationError(
            f"no route of {app.reference} has a dead_letter; name the topic to look into with --from"
        )
    return sorted(topics)


def find(box: Letterbox, wanted: Wanted) -> list[Found]:
    """The dead letters that are meant, the oldest first, handled ones too."""
    handled, letters = Handled(), []
    for record in box.read():
        it = origin(record.headers)
        if it is not None:
            place = (record.topic, record.partition, record.offset)
            when = record.timestamp / 1000 if it.failed_at is None else it.failed_at
            letter = Found(place, it._replace(text=it.text and it.text[:500]), record.key, when)
            if wanted.has(letter):
                letters.append(letter)
        elif ranges := noted(record.headers):
            handled.add(record, ranges)
    found = [letter._replace(handled=letter.place in handled) for letter in letters]
    return sorted(found, key=lambda letter: (letter.time, letter.place))


def read(box: Letterbox, places: Collection[Place]) -> Iterator[Record]:
    """These dead letters, in the order of their partitions. What was deleted meanwhile is left out."""
    firsts: dict[Partition, int] = {}
    for topic, number, offset in places:
        where = Partition(topic, number)
        firsts[where] = min(offset, firsts.get(where, offset))
    for where, first in sorted(firsts.items()):
        left = {offset for topic, number, offset in places if (topic, number) == where}
        for record in box.read({where: first}):
            if record.offset in left:
                left.remove(record.offset)
                yield record
                if not left:
                    break


class Ways(NamedTuple):
    """Where letters are sent again: to ``to``, or else to the topic and the partition that each is from."""

    to: str | None
    partitions: Mapping[str, int]

    def again(self, record: Record) -> Response:
        it = origin(record.headers)
        assert it is not None
        if self.to is not None:
            return replay(record, self.to, None)
        known = it.partition is not None and 0 <= it.partition < self.partitions[it.topic]
        return replay(record, it.topic, it.partition if known else None)


def ways(app: Flowkit, found: Sequence[Found], to: str | None) -> Ways:
    """Raises ``ConfigurationError`` where something of what was found cannot be sent again.

    Where a letter is from its headers say, and those somebody else may have written: so it goes to topics of this application
    only, unless a person names one.
    """
    from .clients.kafka_admin import Cluster

    if to is not None and (mistake := name_mistake("topic", to)):
        raise ConfigurationError(f"--to: {mistake}")
    if to is None:
        strange = sorted({letter.origin.topic for letter in found} - app.routes.keys())
        if strange:
            raise ConfigurationError(
                f"some of these dead letters are from {', '.join(strange)}, of which {app.reference} has no route: choose"
                " others with --topic, or say where these are to go with --to"
            )
    targets = {to} if to is not None else {letter.origin.topic for letter in found}
    with Cluster(app.settings) as cluster:
        states = cluster.topics(targets)
    for topic in sorted(targets - states.keys()):
        raise ConfigurationError(f"there is no topic {topic!r} on the brokers; nothing was sent")
    return Ways(to, {name: state.partitions for name, state in states.items()})


def send_again(app: Flowkit, box: Letterbox, found: Sequence[Found], where: Ways, tell: Callable[[int], None]) -> int:
    """Sends dead letters again, and notes it behind them; ``tell`` is called with how many it has done so far. Gives how many.

    After a kill some may be sent a second time, ``AT_ONCE`` at most; none is left out. Raises ``DeliveryError`` that names what
    Kafka did not take, when the others that were begun are noted.
    """
    done = 0
    for records in _batches(read(box, [letter.place for letter in found])):
        refused = _send(app, records, where)
        _note(app, [record for record in records if record not in [bad for bad, _ in refused]], "replayed")
        done += len(records) - len(refused)
        tell(done)
        if refused:
            (record, error), more = refused[0], len(refused) - 1
            name = f"{record.topic}:{record.partition}:{record.offset}"
            others = f" (and {more} more)" if more else ""
            raise DeliveryError(f"{done} sent again; {name}{others} was not, and stays a dead letter: {error}")
    return done


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _send(app: Flowkit, records: Sequence[Record], where: Ways) -> list[tuple[Record, Exception]]:
    """Sends messages and waits for all of them. Gives those that Kafka did not take."""
    producer, started = app.producer, []
    refused: list[tuple[Record, Exception]] = []
    for record in records:
        try:
            started.append((record, producer.start(where.again(record))))
        except DeliveryError as error:
            refused.append((record, error))
            break
    producer.flush()
    for record, delivery in started:
        if (problem := producer.outcome(delivery)) is not None:
            refused.append((record, problem))
    if refused:
        producer.renew()
        sent = [record for record, _ in started]
        refused += [(record, DeliveryError("not tried")) for record in records[len(sent) + 1 :]]
    return refused


def drop(app: Flowkit, found: Sequence[Found]) -> None:
    """Notes that dead letters are not needed any more."""
    for start in range(0, len(found), 10 * AT_ONCE):
        _note_places(app, [letter.place for letter in found[start : start + 10 * AT_ONCE]], "dropped")


def _note(app: Flowkit, records: Sequence[Record], what: str) -> None:
    _note_places(app, [(record.topic, record.partition, record.offset) for record in records], what)


def _note_places(app: Flowkit, places: Sequence[Place], what: str) -> None:
    offsets: dict[Partition, list[int]] = defaultdict(list)
    for topic, number, offset in places:
        offsets[Partition(topic, number)].append(offset)
    app.producer.send_all([note(*where, numbers, what) for where, numbers in sorted(offsets.items())])
