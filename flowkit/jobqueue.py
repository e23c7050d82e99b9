"""From the consumer into Redis: many messages in one call, and each of them once, though Kafka may deliver it twice."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from redis.exceptions import WatchError
from rq import Queue
from rq.registry import ScheduledJobRegistry, StartedJobRegistry
from rq.worker_registration import WORKERS_BY_QUEUE_KEY

from .dispatch import Entry, Handling
from .errors import QueueError
from .marks import Mark, Marks, expectations, marks_key
from .message import Partition
from .queues import STORE, Made, Writer, connect, fitting, make_jobs, open_key, paces_key, redis_errors
from .shards import (
    LINE_UP,
    Line,
    layout,
    layouts_key,
    make_ticket,
    occupied_by_rq,
    shard_key,
    shard_prefix,
    ticket_timeout,
)

if TYPE_CHECKING:
    from .durability import Keeper

FIRST_SIZE = 50
"""Messages in a job while it is not known what its handler takes; twice as many with each call that finds jobs waiting."""


PACED = re.compile(rb"(\d+\.\d+) (\d+\.\d+)")
"""What Redis has of a topic: seconds, and messages."""


class Pack(NamedTuple):
    """Messages of one topic for one queue, in order."""

    handling: Handling
    queue: str
    entries: list[Entry]


class Queued(NamedTuple):
    """What a call has queued: jobs of each pack, in their order, and the messages that now wait in each queue."""

    jobs: list[int]
    waiting: dict[str, int]


# Messages that wait in a queue, among them those that are to be tried again later. A shard has a count of them. Elsewhere the
# number of each job is at the end of its id; of a long queue both ends are looked at, and the rest is taken to be alike.
WAITING = """
local function waiting(list, later, shard)
  local counted = redis.call('HGET', shard, 'messages')
  if counted then return tonumber(counted) end
  local jobs, seen, messages = redis.call('LLEN', list), 0, 0
  local function look(from, to)
    for _, id in ipairs(redis.call('LRANGE', list, from, to)) do
      seen = seen + 1
      -- the ids of others are UUIDs, of which one part may have no letters; behind that there are twelve digits
      messages = messages + (tonumber(string.match(id, '%-(%d+)%-%x%x%x%x%x%x%x%x$')) or 1)
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
{LINE_UP}
{WAITING}
local queues, topics, marks = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local layouts, lines, prefix = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local at = 7 + queues * 3 + topics
for i = 0, marks - 1 do
  if (redis.call('HGET', KEYS[3], ARGV[at + i * 3]) or '') ~= ARGV[at + i * 3 + 1] then return false end
end
for i = 0, queues - 1 do
  local kind = redis.call('TYPE', ARGV[7 + i * 3])['ok']
  if kind ~= 'none' and kind ~= 'list' then
    return redis.error_reply('WRONGTYPE ' .. ARGV[7 + i * 3] .. ' is a ' .. kind .. ', and no queue')
  end
end
local behind = at + marks * 3
for _ = 1, layouts do
  local shard = occupied(KEYS[5], prefix, ARGV[behind], ARGV[behind + 1])
  if shard then return shard end
  behind = behind + 2
end
local common
common, behind = alike(behind)
for _ = 1, lines do behind = line_up(behind, common) end
store(behind, common)
for i = 0, marks - 1 do
  redis.call('HSET', KEYS[3], ARGV[at + i * 3], ARGV[at + i * 3 + 2])
end
local answer = {{}}
for i = 0, queues - 1 do
  answer[#answer + 1] = waiting(ARGV[7 + i * 3], ARGV[8 + i * 3], ARGV[9 + i * 3])
end
for i = 0, topics - 1 do
  answer[#answer + 1] = redis.call('HGET', KEYS[4], ARGV[7 + queues * 3 + i]) or ''
end
return answer
"""

COUNT = f"""
{WAITING}
return waiting(KEYS[1], KEYS[2], KEYS[3])
"""


class MarksMoved(Exception):
    """Somebody else queued messages of these partitions meanwhile: read the marks again, and cut the batch anew."""


class ShardsOccupied(QueueError):
    """An ordered route divides its messages in another way than before, and some of before are left: nothing was queued."""


class JobQueue:
    """The consumers' side of the queues, for one application. Its groups share it, each in a thread of its own."""

    def __init__(self, redis_settings: str | Mapping[str, Any], application: str, reference: str) -> None:
        self.redis = connect(redis_settings)
        self.application = application
        self.reference = reference
        self.writer = Writer(self.redis, application)
        self.marks = Marks(self.redis)
        self.sizes = Sizes()
        self._asked: set[str] = set()
        self._script = self.redis.register_script(ENQUEUE)
        self._count = self.redis.register_script(COUNT)

    def keeper(self, group: str) -> Keeper:
        """Asks whether what a group has queued is safe. Raises nothing, and connects when it is first asked."""
        from .durability import Keeper

        return Keeper(self.redis, group)

    def waiting(self, queue: str) -> int:
        """Messages that wait in a queue, or are to be tried again later; of a long queue an estimate."""
        with redis_errors():
            return int(self._count(keys=self._places(queue)))

    def is_busy(self, queue: str) -> bool:
        """Whether one more job would have to wait: there are some already, or each worker of the queue has one in hand."""
        place = Queue(queue, connection=self.redis)
        with self.redis.pipeline(transaction=False) as pipe, redis_errors():
            pipe.llen(place.key)
            pipe.llen(place.intermediate_queue_key)  # on their way to a worker
            pipe.zcount(StartedJobRegistry(queue, connection=self.redis).key, time.time(), "inf")
            pipe.scard(WORKERS_BY_QUEUE_KEY % queue)
            pipe.exists(open_key(self.application, queue))
            waiting, taken, running, workers, is_open = pipe.execute()
        return bool(waiting) or (taken + running >= workers > 0 and not is_open)

    def enqueue(
        self, group: str, packs: Sequence[Pack], expected: Mapping[Partition, Mark], moved: Mapping[Partition, int]
    ) -> Queued:
        """Queues every message of ``packs`` and moves the marks, in one call.

        Raises ``MarksMoved`` if a mark is not the expected one, and ``ShardsOccupied``: then nothing was queued. A call whose
        reply got lost may be repeated: the marks tell.
        """
        self._ask_paces({pack.handling.topic for pack in packs})
        jobs = [
            make_jobs(self.reference, pack.handling, pack.queue, pack.entries, size=self.sizes.size(pack.handling))
            for pack in packs
        ]
        queues = sorted({pack.queue for pack in packs})
        topics = sorted({pack.handling.topic for pack in packs})
        layouts = {pack.handling.topic: layout(pack.handling) for pack in packs if pack.handling.shards}
        lines = [
            Line(made, make_ticket(self.reference, pack.handling.topic, pack.queue, ticket_timeout(pack.handling)))
            for pack, made in zip(packs, jobs, strict=True)
            if pack.handling.shards
        ]
        alone = [job for pack, made in zip(packs, jobs, strict=True) if not pack.handling.shards for job in made]
        marks = expectations(expected, moved)
        with redis_errors():
            if self.writer.shared is None:
                answer = self._enqueue_by_rq(group, alone, marks, queues, topics, layouts, lines)
            else:
                answer = self._script(
                    keys=[
                        *self.writer.keys,
                        marks_key(group),
                        paces_key(self.application),
                        layouts_key(self.application),
                    ],
                    args=[
                        len(queues),
                        len(topics),
                        len(marks),
                        len(layouts),
                        len(lines),
                        shard_prefix(self.application),
                        *(name for queue in queues for name in self._places(queue)),
                        *topics,
                        *(part for mark in marks for part in mark),
                        *(part for item in layouts.items() for part in item),
                        *self.writer.alike(),
                        *(part for line in lines for part in line.arguments(self.writer)),
                        *(part for job in alone for part in self.writer.fields(job)),
                    ],
                )
        if answer is None:
            raise MarksMoved
        if isinstance(answer, bytes):
            raise ShardsOccupied(
                f"the queue {answer.decode()!r} has messages of the time when its topic had another queue= or shards=, and"
                " newer ones wait until a worker has done them, so that their order holds"
            )
        waiting = dict(zip(queues, answer, strict=False))
        self.sizes.learn(dict(zip(topics, answer[len(queues) :], strict=True)))
        for pack, made in zip(packs, jobs, strict=True):
            self.sizes.grow(pack.handling, waiting[pack.queue] > sum(job.messages for job in made))
        return Queued([len(made) for made in jobs], waiting)

    def _ask_paces(self, topics: set[str]) -> None:
        """What is known of topics from before this process; later each call gives it."""
        if new := sorted(topics - self._asked):
            with redis_errors():
                paces: Any = self.redis.hmget(paces_key(self.application), new)
            self.sizes.learn(dict(zip(new, paces, strict=True)))
            self._asked.update(new)

    def _enqueue_by_rq(
        self,
        group: str,
        jobs: Sequence[Made],
        marks: Sequence[tuple[str, str, str]],
        queues: Sequence[str],
        topics: Sequence[str],
        layouts: Mapping[str, str],
        lines: Sequence[Line],
    ) -> list[Any] | bytes | None:
        """The same by RQ's own functions, in a transaction that ends without effect where a mark moves meanwhile."""
        with self.redis.pipeline() as pipe:
            pipe.watch(marks_key(group))  # type: ignore[no-untyped-call]
            now: Any = pipe.hmget(marks_key(group), [name for name, _, _ in marks]) if marks else []
            if [(value or b"").decode() for value in now] != [before for _, before, _ in marks]:
                return None
            for topic, wanted in layouts.items():
                if shard := occupied_by_rq(pipe, self.application, topic, wanted):
                    return shard.encode()
            tickets = [line.by_rq(self.writer, pipe) for line in lines]
            pipe.multi()
            self.writer.by_rq(pipe, jobs)
            for line, ticket in zip(lines, tickets, strict=True):
                line.add(self.writer, pipe, ticket)
            if layouts:
                pipe.hset(layouts_key(self.application), mapping=cast(Any, layouts))
            pipe.hset(marks_key(group), mapping={name: offset for name, _, offset in marks})
            try:
                pipe.execute()
            except WatchError:
                return None
        paces: Any = self.redis.hmget(paces_key(self.application), list(topics)) if topics else []
        return [*(self.waiting(queue) for queue in queues), *(pace or b"" for pace in paces)]

    def _places(self, queue: str) -> list[str]:
        """The keys of a queue's jobs: those that wait, those that are to be tried again later, and its shard, if it has one."""
        later = ScheduledJobRegistry(queue, connection=self.redis)
        return [Queue(queue, connection=self.redis).key, later.key, shard_key(self.application, queue)]


class Sizes:
    """How many messages go into a job: as many as are expected to take ``job_seconds``, by what workers have measured."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._guess: dict[str, int] = {}

    def size(self, handling: Handling) -> int:
        if handling.one_a_job:
            return 1
        seconds = self._seconds.get(handling.topic)
        if seconds is None:
            return min(handling.job_size, self._guess.get(handling.topic, FIRST_SIZE))
        return fitting(seconds, handling)

    def learn(self, paces: Mapping[str, bytes | None]) -> None:
        """Takes what Redis has of each topic."""
        for topic, pace in paces.items():
            found = PACED.fullmatch(pace or b"")
            if found is not None and float(found[2]):  # else nobody has measured, or it is not flowkit's
                self._seconds[topic] = float(found[1]) / float(found[2])

    def grow(self, handling: Handling, busy: bool) -> None:
        """Another call was made while it is not known what the handler takes: nobody works, or all are ``busy`` with the first.

        The size may be large then without harm: a job that takes too long is divided by the worker that has it.
        """
        if busy:
            guess = self._guess.get(handling.topic, FIRST_SIZE)
            self._guess[handling.topic] = min(2 * guess, handling.job_size)
