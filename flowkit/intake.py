"""From the consumer into Redis: many messages in one call, and each of them once, though Kafka may deliver it twice."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rq import Queue

from .clients import ConsumerClient
from .dispatch import Admitted, Entry, Handling
from .errors import RedisUnavailable
from .jobs import Envelope, connect, job_arguments, job_size, make_job, queues_key, redis_errors
from .message import Partition, Record, places

logger = logging.getLogger(__name__)


class Pack(NamedTuple):
    """Messages of one topic for one queue, in order."""

    handling: Handling
    queue: str
    entries: list[Entry]


class Mark(NamedTuple):
    """What Redis remembers of one partition: the offset after the last queued message, and the last commit."""

    queued: int | None
    committed: int | None


Marks = dict[Partition, int | None]


# A message is queued once, though Kafka may deliver it twice: the jobs of a batch and the mark behind its last message
# move together, and only if the marks are still those the batch was cut by. The marks move last: Redis does not undo what
# a script did before an error, and messages queued twice are better than lost ones.
ENQUEUE = """
local at = 2
for _ = 1, tonumber(ARGV[1]) do
  if (redis.call('HGET', KEYS[1], ARGV[at]) or '') ~= ARGV[at + 1] then return 0 end
  at = at + 3
end
while at <= #ARGV do
  local fields = tonumber(ARGV[at + 3])
  redis.call('HSET', ARGV[at], unpack(ARGV, at + 4, at + 3 + fields))
  redis.call('RPUSH', ARGV[at + 1], ARGV[at + 2])
  redis.call('SADD', KEYS[2], ARGV[at + 1])
  redis.call('SADD', KEYS[3], ARGV[at + 1])
  at = at + 4 + fields
end
at = 2
for _ = 1, tonumber(ARGV[1]) do
  redis.call('HSET', KEYS[1], ARGV[at], ARGV[at + 2])
  at = at + 3
end
return 1
"""


class MarksMoved(Exception):
    """Somebody else queued messages of these partitions meanwhile: read the marks again, and cut the batch anew."""


class JobQueue:
    """The consumer's side of the queue, for one application."""

    def __init__(self, redis_settings: str | Mapping[str, Any], application: str, reference: str) -> None:
        self.redis = connect(redis_settings)
        self.application = application
        self.reference = reference
        self._script = self.redis.register_script(ENQUEUE)

    def marks(self, group: str, partitions: Sequence[Partition]) -> dict[Partition, Mark]:
        """What Redis remembers of these partitions."""
        names = [name for p in partitions for name in (_field("queued", p), _field("committed", p))]
        with redis_errors():
            values: Any = self.redis.hmget(_key(group), names) if names else []
        numbers = [None if value is None else int(value) for value in values]
        return {p: Mark(numbers[2 * i], numbers[2 * i + 1]) for i, p in enumerate(partitions)}

    def rewind(self, group: str, partition: Partition, offset: int | None) -> None:
        """Forgets that messages from ``offset`` on were queued: they are to be queued again."""
        queued, committed = _field("queued", partition), _field("committed", partition)
        with redis_errors(), self.redis.pipeline() as pipe:
            pipe.hdel(_key(group), queued, committed)
            if offset is not None:
                pipe.hset(_key(group), mapping={queued: offset, committed: offset})
            pipe.execute()

    def committed(self, group: str, offsets: Mapping[Partition, int]) -> None:
        """Remembers what Kafka has confirmed, so that a later, smaller offset is known for a deliberate rewind."""
        with redis_errors():
            self.redis.hset(_key(group), mapping={_field("committed", p): offset for p, offset in offsets.items()})

    def enqueue(self, group: str, packs: Iterable[Pack], expected: Marks, moved: Mapping[Partition, int]) -> int:
        """Queues every message of ``packs`` and moves the marks, in one call; gives the number of jobs.

        Raises ``MarksMoved`` if a mark is not the expected one: then nothing was queued. A call whose reply got lost may be
        repeated: the marks tell.
        """
        arguments: list[Any] = [len(moved)]
        for partition, offset in moved.items():
            before = expected.get(partition)
            arguments += [_field("queued", partition), "" if before is None else before, offset]
        count = 0
        with redis_errors():
            for pack in packs:
                queue = Queue(pack.queue, connection=self.redis, serializer=Envelope)
                for start in range(0, len(pack.entries), job_size(pack.handling)):
                    entries = pack.entries[start : start + job_size(pack.handling)]
                    job = make_job(queue, self.reference, pack.handling, entries)
                    arguments += job_arguments(queue, job)
                    count += 1
            if not self._script(
                keys=[_key(group), Queue.redis_queues_keys, queues_key(self.application)], args=arguments
            ):
                raise MarksMoved
        return count


def _key(group: str) -> str:
    return f"flowkit:marks:{group}"


def _field(kind: str, partition: Partition) -> str:
    return f"{kind}:{partition.topic}:{partition.partition}"


class Intake:
    """The way of one group into its queues. It knows, as Redis does, up to where each partition has been queued."""

    def __init__(self, job_queue: JobQueue, group: str, monitor: Any) -> None:
        self.job_queue = job_queue
        self.group = group
        self.monitor = monitor
        self._queued: dict[Partition, int | None] = {}

    def has(self, record: Record) -> bool:
        """Whether this message was queued before."""
        queued = self._queued.get(Partition(record.topic, record.partition))
        return queued is not None and record.offset < queued

    def welcome(self, partitions: Sequence[Partition], client: ConsumerClient) -> None:
        """Learns up to where these partitions, new to this consumer, have been queued; sees what was set back."""
        marks = self.job_queue.marks(self.group, partitions)
        for partition, mark in marks.items():
            committed = client.committed(partition)
            # The committed offset only grows, unless somebody sets it back on purpose, or the topic is another one.
            rewound = mark.committed is not None and (committed is None or committed < mark.committed)
            made_anew = mark.queued is not None and mark.queued > client.end_offset(partition)
            if rewound or made_anew:
                self.rewind(partition, committed)
                continue
            self._queued[partition] = mark.queued
            if committed and (mark.queued is None or mark.queued < committed):
                self._tell_loss(partition, mark.queued, committed, "or its route ran inline before")
                self._queued[partition] = committed  # and said once: the next batch moves the mark
                self.job_queue.rewind(self.group, partition, committed)

    def forget(self, partitions: Iterable[Partition]) -> None:
        """These partitions have gone to somebody else."""
        for partition in partitions:
            self._queued.pop(partition, None)

    def rewind(self, partition: Partition, offset: int | None) -> None:
        """Messages from ``offset`` on are queued again, though they were queued before."""
        self.job_queue.rewind(self.group, partition, offset)
        self._queued[partition] = offset
        self.monitor.notice("rewound", group=self.group, partition=places([partition]), offset=offset)

    def put(
        self, admitted: Mapping[Partition, Sequence[Admitted]], moved: Mapping[Partition, int]
    ) -> dict[Partition, int]:
        """Queues what Redis does not have yet, in one call, and moves the marks to the offsets of ``moved``, also past
        messages that no job came of: so a mark is never behind a commit.

        If a mark was moved by somebody else meanwhile, looks again at what is left. If one went back, because Redis has
        lost what it had, nothing is queued: gives those partitions, and the offsets from which on they are to be read again.
        """
        while True:
            packs: dict[tuple[str, str], Pack] = {}
            ahead: dict[Partition, int] = {}
            for partition, end in moved.items():
                queued = self._queued.get(partition) or 0
                if end > queued:
                    ahead[partition] = end
                for offset, handling, queue, entry in admitted.get(partition, ()):
                    if offset >= queued:
                        pack = packs.get((handling.topic, queue))
                        if pack is None:
                            pack = packs[handling.topic, queue] = Pack(handling, queue, [])
                        pack.entries.append(entry)
            if not ahead:
                return {}
            expected: Marks = {partition: self._queued.get(partition) for partition in ahead}
            try:
                self.job_queue.enqueue(self.group, packs.values(), expected, ahead)
            except MarksMoved:
                if lost := self._look_again(ahead):
                    return lost
                continue
            self._queued.update(ahead)
            for (topic, queue), pack in packs.items():
                count = len(pack.entries)
                jobs = math.ceil(count / job_size(pack.handling))
                self.monitor.notice("queued", topic=topic, queue=queue, count=count, jobs=jobs, group=self.group)
            return {}

    def _look_again(self, partitions: Collection[Partition]) -> dict[Partition, int]:
        """Reads the marks anew. Gives those that went back, which only a loss in Redis explains."""
        lost: dict[Partition, int] = {}
        for partition, mark in self.job_queue.marks(self.group, list(partitions)).items():
            known, self._queued[partition] = self._queued.get(partition), mark.queued
            if known is not None and (mark.queued is None or mark.queued < known):
                self._tell_loss(partition, mark.queued, known)
                if mark.queued is not None:
                    lost[partition] = mark.queued
        return lost

    def _tell_loss(self, partition: Partition, mark: int | None, known: int, unless: str = "") -> None:
        place = places([partition])
        if mark is None:
            what = f"Redis knows nothing of {place}, though jobs went up to offset {known}: it lost its data"
        else:
            what = (
                f"Redis knows jobs of {place} up to offset {mark} only, though they went up to {known}: it lost data"
            )
        then = "they are queued again"
        if mark is None or unless:
            then = f"to queue them again, set the offsets of group {self.group} back while no consumer of it runs"
        logger.error("%s; %s", f"{what}, {unless}" if unless else what, then)

    def remember(self, offsets: Mapping[Partition, int]) -> None:
        """Notes what Kafka has confirmed."""
        try:
            self.job_queue.committed(self.group, offsets)
        except RedisUnavailable as error:  # only makes the next deliberate rewind harder to recognise
            logger.warning("group %s: the commit is not noted in Redis: %s", self.group, error)
