"""Who says what became of the messages, none of them flowkit: the ledgers of the handlers, the topics, and Redis."""

from __future__ import annotations

import contextlib
import os
import time
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from redis import Redis
from rq import Queue

PARTITIONS = 6
"""Of the topics, unless a scenario says otherwise."""

NEVER = float("inf")


class ScenarioError(AssertionError):
    """It could not be brought to its end."""


def payload(number: int, do: str = "") -> bytes:
    """A message of 200 bytes. ``do`` is what its handler is to do, see ``ACTS`` in tests/apps/chaotic.py."""
    head = b'{"id":%d,%s"pad":"' % (number, b'"do":"%s",' % do.encode() if do else b"")
    return head + b"x" * (198 - len(head)) + b'"}'


@dataclass(slots=True)
class Stream:
    """The messages of one topic, numbered from 0, number n in partition n % ``partitions``: ``inline`` or ``queued``."""

    name: str
    topic: str
    count: int
    partitions: int = PARTITIONS
    sent_at: array[float] = field(init=False)
    """By number: when Kafka confirmed it, 0 if it did not."""
    first_at: array[float] = field(init=False)
    """By number: when it was handled for the first time, 0 if never."""
    times: list[array[float]] = field(init=False)
    """By partition: when a handler ended."""
    runs: int = 0
    handled: int = 0
    produced: int = 0
    sent: int = 0
    refused: int = 0
    poisoned: int = 0
    """Messages whose handler fails each time, so that no handler notes them."""
    answered: Counter[int] = field(default_factory=Counter)
    dead: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.sent_at = array("d", bytes(8 * self.count))
        self.first_at = array("d", bytes(8 * self.count))
        self.times = [array("d") for _ in range(self.partitions)]

    @property
    def warm_up(self) -> int:
        """How many are sent first: flowkit then knows how long they take, and makes jobs of some size."""
        return min(self.count, 10 * self.partitions)

    @property
    def answers(self) -> str:
        return f"{self.topic}.answers"

    @property
    def retry_topics(self) -> list[str]:
        return [f"{self.topic}.retry.{number}" for number in (1, 2)]

    @property
    def dead_letters(self) -> str:
        return f"{self.topic}.dead"

    def note_sent(self, number: int) -> None:
        self.sent_at[number] = time.monotonic()
        self.sent += 1

    def note_run(self, number: int, partition: int, at: float) -> None:
        self.runs += 1
        self.times[partition].append(at)
        if not self.first_at[number]:
            self.first_at[number] = at
            self.handled += 1

    def numbers_sent(self) -> set[int]:
        return {number for number, at in enumerate(self.sent_at) if at}

    def numbers_handled(self) -> set[int]:
        return {number for number, at in enumerate(self.first_at) if at}

    def lost(self) -> set[int]:
        """Those that Kafka has, and that were not both handled and answered, nor became a dead letter."""
        return self.numbers_sent() - (self.numbers_handled() & set(self.answered)) - set(self.dead)

    @property
    def repeated(self) -> int:
        """Runs of handlers beyond the first of each message."""
        return self.runs - self.handled

    @property
    def answered_again(self) -> int:
        return sum(self.answered.values()) - len(self.answered)

    # How long after a moment it went on. Seconds; NEVER if it did not, 0 if there was nothing to do.

    def next_of_any(self, moment: float) -> float:
        return min((_next(times, moment) for times in self.times), default=NEVER)

    def next_of_every(self, moment: float) -> float:
        """Of the partition that took longest."""
        return max(
            _next(times, moment) if self._left(number, moment) else 0.0 for number, times in enumerate(self.times)
        )

    def last_of_all(self, moment: float) -> float:
        """Of the last one that had been sent by then."""
        waited = [
            first - moment for sent, first in zip(self.sent_at, self.first_at, strict=True) if 0 < sent <= moment
        ]
        lost = any(0 < sent <= moment and not first for sent, first in zip(self.sent_at, self.first_at, strict=True))
        return NEVER if lost else max(0.0, *waited, 0.0)

    def _left(self, partition: int, moment: float) -> bool:
        """Whether anything of a partition was to be handled after a moment."""
        numbers = range(partition, self.count, self.partitions)
        return any(self.sent_at[n] and not 0 < self.first_at[n] <= moment for n in numbers)


def _next(times: array[float], moment: float) -> float:
    """``times`` are in order."""
    at = bisect_right(times, moment)
    return times[at] - moment if at < len(times) else NEVER


class Ledgers:
    """What the handlers have written, as far as it has been read."""

    def __init__(self, directory: Path, streams: list[Stream]) -> None:
        self.directory = directory
        self.streams = {stream.name.encode(): stream for stream in streams}
        self.pids: Counter[int] = Counter()
        """By process: its runs."""
        self._read_to: dict[str, int] = {}

    @property
    def handled(self) -> int:
        return sum(stream.handled for stream in self.streams.values())

    def read(self) -> None:
        """Reads on."""
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.stat().st_size > self._read_to.get(entry.name, 0):
                    self._read_file(entry)

    def _read_file(self, entry: os.DirEntry[str]) -> None:
        with open(entry.path, "rb") as file:
            file.seek(self._read_to.get(entry.name, 0))
            text = file.read()
        whole = text.rfind(b"\n") + 1  # the line that is being written, if any, is left for later
        self._read_to[entry.name] = self._read_to.get(entry.name, 0) + whole
        lines = text[:whole].splitlines()
        self.pids[int(entry.name.partition("-")[0])] += len(lines)
        for line in lines:
            stream, number, partition, _, _, at = line.split()
            self.streams[stream].note_run(int(number), int(partition), int(at) / 1e9)

    def close(self) -> None:
        """Reads the rest, and puts the times of each partition in order."""
        self.read()
        for stream in self.streams.values():
            stream.times = [array("d", sorted(times)) for times in stream.times]


def values_in(hosts: str, topic: str, partitions: int, timeout: float = 120, **options: Any) -> Iterator[bytes]:
    """Every message of a topic, in a transaction or not, unless ``isolation_level="read_committed"`` is given."""
    places = [TopicPartition(topic, number) for number in range(partitions)]
    # for readers of what is committed, a topic ends where a transaction is open, which a killed process has left so for seconds
    with contextlib.closing(KafkaConsumer(bootstrap_servers=hosts)) as anybody:
        ends = anybody.end_offsets(places)
    with contextlib.closing(
        KafkaConsumer(bootstrap_servers=hosts, auto_offset_reset="earliest", max_poll_records=5_000, **options)
    ) as consumer:
        consumer.assign(places)
        deadline = time.monotonic() + timeout
        while any(consumer.position(place) < ends[place] for place in places):
            if time.monotonic() > deadline:
                raise ScenarioError(f"{topic} could not be read to its end within {timeout:g} s")
            for records in consumer.poll(timeout_ms=500).values():
                for record in records:
                    yield record.value


def uncommitted(hosts: str, stream: Stream) -> list[str]:
    """The partitions, in words, whose end the group of a stream has not committed."""
    places = [TopicPartition(stream.topic, number) for number in range(stream.partitions)]
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=hosts)) as admin:
        committed = admin.list_group_offsets({stream.topic: places})[stream.topic]
    with contextlib.closing(KafkaConsumer(bootstrap_servers=hosts)) as consumer:
        ends = consumer.end_offsets(places)
    offsets = {place: committed[place].offset if place in committed else None for place in places}
    return [
        f"{stream.name} partition {place.partition} is committed to {offsets[place]}, not {ends[place]}"
        for place in places
        if ends[place] and offsets[place] != ends[place]
    ]


def left_in(redis_url: str) -> str:
    """What is still to do in the queue of a Redis, in words; nothing if all is done."""
    with Redis.from_url(redis_url) as connection:
        queue = Queue("default", connection=connection)
        counts = {
            "queued": queue.count,
            "being started": connection.llen(queue.intermediate_queue_key),
            "started": queue.started_job_registry.get_job_count(cleanup=False),
            "scheduled": queue.scheduled_job_registry.get_job_count(cleanup=False),
            "deferred": queue.deferred_job_registry.get_job_count(cleanup=False),
            "failed": queue.failed_job_registry.get_job_count(cleanup=False),
        }
    return ", ".join(f"{count} jobs {name}" for name, count in counts.items() if count)
