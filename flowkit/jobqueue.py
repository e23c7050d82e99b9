"""From the consumer into Redis: many messages in one call, and each of them once, though Kafka may deliver it twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import redis
from redis.exceptions import WatchError
from rq import Queue
from rq.registry import ScheduledJobRegistry

from .dispatch import Entry, Handling
from .message import Partition
from .queues import STORE, Made, Writer, connect, make_jobs, paces_key, redis_errors

FIRST_SIZE = 10
"""Messages in a job while it is not known what its handler takes; twice as many with each call that finds jobs waiting."""


class Pack(NamedTuple):
    """Messages of one topic for one queue, in order."""

    handling: Handling
    queue: str
    entries: list[Entry]


class Mark(NamedTuple):
    """What Redis remembers of one partition: the offset after the last queued message, and the last commit."""

    queued: int | None
    committed: int | None


class Queued(NamedTuple):
    """What a call has queued: jobs of each pack, in their order, and the messages that now wait in each queue."""

    jobs: list[int]
    waiting: dict[str, int]


Marks = dict[Partition, int | None]

# Messages that wait in a queue, among them those that are to be tried again later. The number of each job is at the end of its
# id; of a long queue both ends are looked at, and the rest is taken to be alike.
WAITING = """
local function waiting(list, later)
  local jobs, seen, messages = redis.call('LLEN', list), 0, 0
  local function look(from, to)
    for _, id in ipairs(redis.call('LRANGE', list, from, to)) do
      seen = seen + 1
      messages = messages + (tonumber(string.match(id, '%-(%d+)%-%x+$')) or 1)
    end
  end
  if jobs <= 64 then look(0, -1) else look(0, 31) look(-32, -1) end
  if seen > 0 then messages = math.ceil(messages / seen * jobs) end
  return messages + redis.call('ZCARD', later)
end
"""

# A message is queued once, though Kafka may deliver it twice: the jobs of a batch and the mark behind its last message
# move together, and only if the marks are still those the batch was cut by. The marks move last: Redis does not undo what
# a script did before an error, and messages queued twice are better than lost ones.
ENQUEUE = f"""
{STORE}
{WAITING}
local queues, topics, marks = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local at = 4 + queues * 2 + topics
for i = 0, marks - 1 do
  if (redis.call('HGET', KEYS[3], ARGV[at + i * 3]) or '') ~= ARGV[at + i * 3 + 1] then return false end
end
store(at + marks * 3)
for i = 0, marks - 1 do
  redis.call('HSET', KEYS[3], ARGV[at + i * 3], ARGV[at + i * 3 + 2])
end
local answer = {{}}
for i = 0, queues - 1 do
  answer[#answer + 1] = waiting(ARGV[4 + i * 2], ARGV[5 + i * 2])
end
for i = 0, topics - 1 do
  answer[#answer + 1] = redis.call('HGET', KEYS[4], ARGV[4 + queues * 2 + i]) or ''
end
return answer
"""

COUNT = f"""
{WAITING}
return waiting(KEYS[1], KEYS[2])
"""


class MarksMoved(Exception):
    """Somebody else queued messages of these partitions meanwhile: read the marks again, and cut the batch anew."""


class JobQueue:
    """The consumers' side of the queues, for one application. Its groups share it, each in a thread of its own."""

    def __init__(self, redis_settings: str | Mapping[str, Any], application: str, reference: str) -> None:
        self.redis = connect(redis_settings)
        self.application = application
        self.reference = reference
        self.writer = Writer(self.redis, application)
        self.sizes = Sizes()
        self._script = self.redis.register_script(ENQUEUE)
        self._count = self.redis.register_script(COUNT)

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

    def waiting(self, queue: str) -> int:
        """Messages that wait in a queue, or are to be tried again later; of a long queue an estimate."""
        with redis_errors():
            return int(self._count(keys=_lists(self.redis, queue)))

    def enqueue(self, group: str, packs: Sequence[Pack], expected: Marks, moved: Mapping[Partition, int]) -> Queued:
        """Queues every message of ``packs`` and moves the marks, in one call.

        Raises ``MarksMoved`` if a mark is not the expected one: then nothing was queued. A call whose reply got lost may be
        repeated: the marks tell.
        """
        jobs = [
            make_jobs(self.reference, pack.handling, pack.queue, pack.entries, size=self.sizes.size(pack.handling))
            for pack in packs
        ]
        queues = sorted({pack.queue for pack in packs})
        topics = sorted({pack.handling.topic for pack in packs})
        marks: list[tuple[str, str, int]] = []
        for partition, offset in moved.items():
            before = expected.get(partition)
            marks.append((_field("queued", partition), "" if before is None else str(before), offset))
        with redis_errors():
            if self.writer.shared is None:
                answer = self._enqueue_by_rq(group, [job for made in jobs for job in made], marks, queues, topics)
            else:
                answer = self._script(
                    keys=[*self.writer.keys, _key(group), paces_key(self.application)],
                    args=[
                        len(queues),
                        len(topics),
                        len(marks),
                        *(name for queue in queues for name in _lists(self.redis, queue)),
                        *topics,
                        *(part for mark in marks for part in mark),
                        *self.writer.arguments(job for made in jobs for job in made),
                    ],
                )
        if answer is None:
            raise MarksMoved
        waiting = dict(zip(queues, answer, strict=False))
        self.sizes.learn(dict(zip(topics, answer[len(queues) :], strict=True)))
        for pack, made in zip(packs, jobs, strict=True):
            self.sizes.grow(pack.handling, waiting[pack.queue] > sum(job.messages for job in made))
        return Queued([len(made) for made in jobs], waiting)

    def _enqueue_by_rq(
        self,
        group: str,
        jobs: Sequence[Made],
        marks: Sequence[tuple[str, str, int]],
        queues: Sequence[str],
        topics: Sequence[str],
    ) -> list[Any] | None:
        """The same by RQ's own functions, in a transaction that ends without effect where a mark moves meanwhile."""
        with self.redis.pipeline() as pipe:
            pipe.watch(_key(group))  # type: ignore[no-untyped-call]
            now: Any = pipe.hmget(_key(group), [name for name, _, _ in marks]) if marks else []
            if [(value or b"").decode() for value in now] != [before for _, before, _ in marks]:
                return None
            pipe.multi()
            self.writer.by_rq(pipe, jobs)
            pipe.hset(_key(group), mapping={name: offset for name, _, offset in marks})
            try:
                pipe.execute()
            except WatchError:
                return None
        paces: Any = self.redis.hmget(paces_key(self.application), list(topics)) if topics else []
        return [*(self.waiting(queue) for queue in queues), *(pace or b"" for pace in paces)]


class Sizes:
    """How many messages go into a job: as many as are expected to take ``job_seconds``, by what workers have measured."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._guess: dict[str, int] = {}

    def size(self, handling: Handling) -> int:
        """One alone where a failed message gets no second attempt, which would be a job of its own."""
        if handling.retry.attempts == 1 and handling.dead_letter is None:
            return 1
        seconds = self._seconds.get(handling.topic)
        if seconds is None:
            return min(handling.job_size, self._guess.get(handling.topic, FIRST_SIZE))
        return fitting(seconds, handling)

    def learn(self, paces: Mapping[str, bytes]) -> None:
        """Takes what Redis has of each topic."""
        for topic, pace in paces.items():
            if pace:
                seconds, messages = pace.split()
                self._seconds[topic] = float(seconds) / float(messages)

    def grow(self, handling: Handling, busy: bool) -> None:
        """Another call was made while it is not known what the handler takes: nobody works, or all are ``busy`` with the first.

        The size may be large then without harm: a job that takes too long is divided by the worker that has it.
        """
        if busy:
            guess = self._guess.get(handling.topic, FIRST_SIZE)
            self._guess[handling.topic] = min(2 * guess, handling.job_size)


def fitting(seconds: float, handling: Handling) -> int:
    """Messages in a job, where one takes so many seconds."""
    return max(1, min(handling.job_size, int(handling.job_seconds / max(seconds, 1e-9))))


def _key(group: str) -> str:
    return f"flowkit:marks:{group}"


def _field(kind: str, partition: Partition) -> str:
    return f"{kind}:{partition.topic}:{partition.partition}"


def _lists(connection: redis.Redis, queue: str) -> list[str]:
    """The keys of a queue's jobs: those that wait, and those that are to be tried again later."""
    return [Queue(queue, connection=connection).key, ScheduledJobRegistry(queue, connection=connection).key]
