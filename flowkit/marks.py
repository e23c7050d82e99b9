"""What Redis remembers of a group's partitions, so that a message is queued once: see ``intake`` for the rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import redis

from .errors import RedisUnavailable
from .message import Partition, places
from .queues import redis_errors


class Mark(NamedTuple):
    """Of one partition: the offset after the last queued message, the last commit that Kafka is known to have taken, and the
    era, ``<topic id>/<number>``, which is another one whenever the other two were set back.
    """

    queued: int | None = None
    committed: int | None = None
    era: str | None = None

    @property
    def topic_id(self) -> str:
        """Which topic of its name it is of; empty where that is not known."""
        return (self.era or "").partition("/")[0]


# Each of them is changed only by who knows what is there: a consumer that stood still for a while changes nothing.
CHANGE = """
for i = 1, #ARGV, 3 do
  if ARGV[i] ~= ARGV[4] and (redis.call('HGET', KEYS[1], ARGV[i]) or '') ~= ARGV[i + 1] then return 0 end
end
for i = 1, #ARGV, 3 do
  if ARGV[i + 2] == '' then redis.call('HDEL', KEYS[1], ARGV[i])
  else redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 2]) end
end
return 1
"""

NOTE = """
for i = 1, #ARGV, 4 do
  local before = tonumber(redis.call('HGET', KEYS[1], ARGV[i]) or '-1')
  if (redis.call('HGET', KEYS[1], ARGV[i + 2]) or '') == ARGV[i + 3] and before < tonumber(ARGV[i + 1]) then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
return 1
"""


class Marks:
    """The marks in one Redis."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._change = client.register_script(CHANGE)
        self._note = client.register_script(NOTE)

    def read(self, group: str, partitions: Sequence[Partition]) -> dict[Partition, Mark]:
        """What Redis remembers of these partitions."""
        names = [mark_field(kind, p) for p in partitions for kind in Mark._fields]
        with redis_errors():
            values: Any = self._client.hmget(marks_key(group), names) if names else []
        found = {}
        for at, partition in enumerate(partitions):
            try:
                queued, committed, era = (
                    None if value is None else value.decode() for value in values[3 * at : 3 * at + 3]
                )
                found[partition] = Mark(queued and int(queued), committed and int(committed), era)
            except ValueError as error:
                key, fields = marks_key(group), " ".join(mark_field(kind, partition) for kind in Mark._fields)
                raise RedisUnavailable(
                    f"{key} holds of {places([partition])} what flowkit did not write: {error}. Take it away"
                    f" (HDEL {key} {fields}); the partition is then queued from the group's committed offset on"
                ) from error
        return found

    def change(self, group: str, partition: Partition, before: Mark, after: Mark) -> bool:
        """Puts one mark in the place of another. False, and nothing is changed, if it is not ``before``, but for its commit,
        which may have been noted meanwhile.
        """
        arguments = [
            part
            for kind, old, new in zip(Mark._fields, before, after, strict=True)
            for part in (mark_field(kind, partition), _text(old), _text(new))
        ]
        with redis_errors():
            return bool(self._change(keys=[marks_key(group)], args=arguments))

    def note(self, group: str, offsets: Mapping[Partition, tuple[int, str]]) -> None:
        """Remembers what Kafka has confirmed, offset and era, so that a later, smaller offset is known for a deliberate rewind.

        It never goes back, and is of no effect where the era has ended.
        """
        arguments = [
            part
            for partition, (offset, era) in offsets.items()
            for part in (mark_field("committed", partition), offset, mark_field("era", partition), era)
        ]
        with redis_errors():
            self._note(keys=[marks_key(group)], args=arguments)


def expectations(expected: Mapping[Partition, Mark], moved: Mapping[Partition, int]) -> list[tuple[str, str, str]]:
    """Fields of the hash of marks, what must be in them, and what will be, where marks move to the offsets of ``moved``."""
    fields = []
    for partition, offset in moved.items():
        mark = expected[partition]
        if mark.era is not None:
            fields.append((mark_field("era", partition), mark.era, mark.era))
        fields.append((mark_field("queued", partition), _text(mark.queued), str(offset)))
    return fields


def marks_key(group: str) -> str:
    return f"flowkit:marks:{group}"


def mark_field(kind: str, partition: Partition) -> str:
    return f"{kind}:{partition.topic}:{partition.partition}"


def _text(value: object) -> str:
    return "" if value is None else str(value)
