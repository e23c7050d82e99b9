"""The shards of ordered routes in Redis: messages in a list, and one RQ job, the ticket, that says "work on this shard".

RQ alone keeps no order: a retry and a killed worker's job come back behind what was queued later. So the messages of a shard
are not in jobs but in a list that only shrinks at its head, and a shard has one ticket at a time, whose id is noted beside it.
A job with another id has nothing to do with the shard any more. A run of the ticket holds the shard's lock while it lives, and
its own token must still be the noted one whenever it says how far it is. Why that keeps the order is in docs/queue.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import redis
from redis.exceptions import WatchError
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry, ScheduledJobRegistry, StartedJobRegistry

from .dispatch import Handling
from .progress import NOTHING, PACE, JobTaken, Took
from .queues import BACK, PERFORM, STORE, Envelope, Made, Parcel, Writer, job_id, paces_key, redis_errors

logger = logging.getLogger(__name__)

LEASE = 15.0
"""Seconds that the lock of a shard outlives a process that was killed with it."""

PROLONG_EVERY = 3.0
"""Seconds between the prolongations of the lock while a message takes long."""


def shard_prefix(application: str) -> str:
    """What the keys of an application's shards begin with; the name of the queue follows."""
    return f"flowkit:shard:{application}:"


def shard_key(application: str, queue: str) -> str:
    """The Redis hash of a shard: ``ticket``, the job that works on it; ``messages`` that wait; ``done``, how many of the first
    pack are done with; ``attempt``, the next one of the first that is not; ``run``, the token of the run that counts; ``runs``
    since anything was done. It exists while there are messages. Behind it, ``:packs`` and ``:lock``.
    """
    return shard_prefix(application) + queue


def layouts_key(application: str) -> str:
    """The Redis hash of the shards that ordered topics were last divided into: topic to queue and number."""
    return f"flowkit:shards:{application}"


def layout(handling: Handling) -> str:
    """How an ordered route divides its messages, as it is remembered in Redis."""
    return f"{handling.queue} {len(handling.shards)}"


def make_ticket(reference: str, topic: str, queue: str, timeout: float, place: str = BACK) -> Made:
    """The job that works on a shard for ``timeout`` seconds at most."""
    args = (reference, topic, 0, [queue])
    number = queue.rpartition(".")[2]
    data = Envelope.dumps((PERFORM, None, args, {}))
    name = job_id(f"{topic}-shard-{number}")
    return Made(name, queue, place, f"{topic}, shard {number}", max(1, round(timeout)), args, data)


def ticket_timeout(handling: Handling) -> float:
    """Seconds that RQ gives a ticket: it begins no message after ``longest_job``."""
    return handling.job_timeout + handling.longest_job


# Into the shards, as a part of the consumer's call.

LINE_UP = """
-- The first shard that still has messages of another division of its topic than the wanted one, which is noted if none has.
local function occupied(layouts, prefix, topic, wanted)
  local before = redis.call('HGET', layouts, topic)
  if before == wanted then return nil end
  if before then
    local queue, count = string.match(before, '^(.*) (%d+)$')
    for number = 0, tonumber(count) - 1 do
      local name = queue .. '.' .. topic .. '.' .. number
      if tonumber(redis.call('HGET', prefix .. name, 'messages') or '0') > 0 then return name end
    end
  end
  redis.call('HSET', layouts, topic, wanted)
  return nil
end
-- Packs for one shard in ARGV from at on, and the ticket that it gets if it has none.
local function line_up(at, common)
  local state, packs = ARGV[at], tonumber(ARGV[at + 1])
  at = at + 2
  for _ = 1, packs do
    redis.call('RPUSH', state .. ':packs', ARGV[at])
    redis.call('HINCRBY', state, 'messages', ARGV[at + 1])
    at = at + 2
  end
  if redis.call('HEXISTS', state, 'ticket') == 0 then
    write(at, common)
    redis.call('HSET', state, 'ticket', ARGV[at + 2], 'timeout', ARGV[at + 6])
  end
  return at + 11
end
"""


class Line(NamedTuple):
    """Packs that go to one shard together, and a ticket, should it have none."""

    packs: Sequence[Made]
    ticket: Made

    def arguments(self, writer: Writer) -> list[Any]:
        """As ``line_up`` takes it."""
        packed = [part for pack in self.packs for part in (pack.data, pack.messages)]
        state = shard_key(writer.application, self.ticket.queue)
        return [state, len(self.packs), *packed, *writer.fields(self.ticket)]

    def by_rq(self, writer: Writer, watched: Any) -> list[Any]:
        """The same as commands for a transaction that watches the shard. Gives the ticket if it is needed."""
        state = shard_key(writer.application, self.ticket.queue)
        watched.watch(state)
        return [] if watched.hexists(state, "ticket") else [self.ticket]

    def add(self, writer: Writer, pipe: Any, tickets: Sequence[Made]) -> None:
        """Puts the commands of ``by_rq`` into its transaction."""
        state = shard_key(writer.application, self.ticket.queue)
        for pack in self.packs:
            pipe.rpush(f"{state}:packs", pack.data)
            pipe.hincrby(state, "messages", pack.messages)
        for ticket in tickets:
            writer.by_rq(pipe, [ticket])
            pipe.hset(state, mapping={"ticket": ticket.id, "timeout": ticket.timeout})


def occupied_by_rq(watched: Any, application: str, topic: str, wanted: str) -> str | None:
    """What ``occupied`` of ``LINE_UP`` finds, read by a transaction that watches it; nothing is noted."""
    watched.watch(layouts_key(application))
    before = watched.hget(layouts_key(application), topic)
    if before is None or before.decode() == wanted:
        return None
    queue, _, count = before.decode().rpartition(" ")
    for number in range(int(count)):
        name = f"{queue}.{topic}.{number}"
        watched.watch(shard_key(application, name))
        if int(watched.hget(shard_key(application, name), "messages") or 0):
            return name
    return None


# Out of them: one run of a ticket.

BEGIN = """
if redis.call('HGET', KEYS[1], 'ticket') ~= ARGV[1] then return false end
local lease = redis.call('PTTL', KEYS[3])
if lease > 0 then return lease end
redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[3])
redis.call('HSET', KEYS[1], 'run', ARGV[2])
local runs = redis.call('HINCRBY', KEYS[1], 'runs', 1)
local done, attempt = unpack(redis.call('HMGET', KEYS[1], 'done', 'attempt'))
return {runs, done or '0', attempt or '1', redis.call('LINDEX', KEYS[2], 0) or ''}
"""

NOTE = f"""
{PACE}
if redis.call('HGET', KEYS[1], 'run') ~= ARGV[1] then return false end
redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[2])
redis.call('HSET', KEYS[1], 'done', ARGV[3], 'attempt', ARGV[4])
if ARGV[5] ~= '0' then
  redis.call('HSET', KEYS[1], 'runs', 1)
  redis.call('HINCRBY', KEYS[1], 'messages', -ARGV[5])
end
if ARGV[7] ~= '0' then pace(KEYS[4], ARGV[8], tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[10]) end
if ARGV[9] == '0' then return '' end
redis.call('LPOP', KEYS[2])
return redis.call('LINDEX', KEYS[2], 0) or ''
"""

# Where no message is left, nothing of the shard is; else the ticket stays the noted one until there is another.
END = """
if redis.call('HGET', KEYS[1], 'run') ~= ARGV[1] then return false end
redis.call('DEL', KEYS[3])
if redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('DEL', KEYS[1])
  return 0
end
redis.call('HSET', KEYS[1], 'runs', 0)
redis.call('HDEL', KEYS[1], 'run')
return 1
"""

PROLONG = """
if redis.call('HGET', KEYS[1], 'run') == ARGV[1] then redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[2]) end
"""

BREAK_OFF = """
if redis.call('HGET', KEYS[1], 'run') == ARGV[1] then
  redis.call('DEL', KEYS[3])
  redis.call('HDEL', KEYS[1], 'run')
  if tonumber(redis.call('HGET', KEYS[1], 'runs')) > 0 then redis.call('HINCRBY', KEYS[1], 'runs', -1) end
end
"""

REPLACE = f"""
{STORE}
if (redis.call('HGET', KEYS[3], 'ticket') or '') ~= ARGV[1] then return 0 end
store(3)
redis.call('HSET', KEYS[3], 'ticket', ARGV[2])
return 1
"""


class Begun(NamedTuple):
    """What a run finds. ``runs``: how many have begun since one of them got anything done, this one included."""

    runs: int
    done: int
    attempt: int
    pack: bytes


class Shard:
    """One shard. A run is between ``begin`` and ``end``; each call of it raises ``JobTaken`` if another run has begun."""

    def __init__(self, writer: Writer, queue: str) -> None:
        self.writer = writer
        self.queue = queue
        self.key = shard_key(writer.application, queue)
        self._token = ""

    def _run(self, script: str, *arguments: Any) -> Any:
        keys = [self.key, f"{self.key}:packs", f"{self.key}:lock", paces_key(self.writer.application)]
        with redis_errors():
            return self.writer.connection.register_script(script)(keys, arguments)

    def begin(self, ticket: str) -> Begun | float | None:
        """Takes the shard for a run of this ticket. Gives None if another ticket is the noted one, and the seconds until the
        lock runs out if another run has it, which may be a dead one.
        """
        token = os.urandom(8).hex()
        found = self._run(BEGIN, ticket, token, round(LEASE * 1000))
        if found is None or isinstance(found, int):
            return None if found is None else found / 1000
        self._token = token
        runs, done, attempt, pack = found
        return Begun(runs, int(done), int(attempt), pack)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Prolongs the lock, however long a message takes. Where an error breaks this run off, the next one may begin."""
        ended = threading.Event()
        thread = threading.Thread(target=self._prolong, args=(ended,), name="flowkit-shard", daemon=True)
        thread.start()
        try:
            yield
        except JobTaken:
            raise
        except BaseException:
            with contextlib.suppress(
                Exception
            ):  # then the lock runs out; what went wrong is told by who gets the error
                self._run(BREAK_OFF, self._token)
            raise
        finally:
            ended.set()

    def _prolong(self, ended: threading.Event) -> None:
        while not ended.wait(PROLONG_EVERY):
            try:
                self._run(PROLONG, self._token, round(LEASE * 1000))
            except Exception as error:
                logger.warning("the lock of queue %s is not prolonged: %s", self.queue, error)

    def note(
        self,
        done: int,
        attempt: int,
        finished: int,
        *,
        pop: bool = False,
        topic: str = "",
        took: Took = NOTHING,
    ) -> bytes:
        """Remembers how many messages of the first pack are done with, and the number of the next one's attempt.

        ``finished`` of them are so since the last note. ``pop`` takes the pack away; gives the next one then, if any.
        """
        found = self._run(
            NOTE,
            self._token,
            round(LEASE * 1000),
            done,
            attempt,
            finished,
            f"{took.seconds:.9f}",
            took.messages,
            topic,
            int(pop),
            int(took.cold),
        )
        if found is None:
            raise JobTaken(f"queue {self.queue} is another worker's by now, because this one stood still")
        return bytes(found)

    def end(self) -> bool:
        """Ends the run. Whether messages are left, for which there must be another ticket."""
        found = self._run(END, self._token)
        if found is None:
            raise JobTaken(f"queue {self.queue} is another worker's by now, because this one stood still")
        return bool(found)

    def replace(self, ticket: str, made: Made) -> bool:
        """Puts another ticket in the place of the noted one; not if that is not ``ticket``."""
        with redis_errors():
            if self.writer.shared is None:
                return self._replace_by_rq(ticket, made)
            script = self.writer.connection.register_script(REPLACE)
            return bool(script([*self.writer.keys, self.key], [ticket, made.id, *self.writer.arguments([made])]))

    def _replace_by_rq(self, ticket: str, made: Made) -> bool:
        while True:
            with self.writer.connection.pipeline() as pipe:
                pipe.watch(self.key)  # type: ignore[no-untyped-call]
                noted: Any = pipe.hget(self.key, "ticket")
                if (noted or b"").decode() != ticket:
                    return False
                pipe.multi()
                pipe.hset(self.key, "ticket", made.id)
                self.writer.by_rq(pipe, [made])
                try:
                    pipe.execute()
                except WatchError:  # more messages have come
                    continue
            return True


# Tickets that got lost.

MISSING = """
if redis.call('EXISTS', KEYS[2]) == 0 or redis.call('EXISTS', KEYS[3]) == 1 then return false end
local ticket, timeout = unpack(redis.call('HMGET', KEYS[1], 'ticket', 'timeout'))
if ticket then
  for i = 4, 5 do
    for _, id in ipairs(redis.call('LRANGE', KEYS[i], 0, -1)) do
      if id == ticket then return false end
    end
  end
  if redis.call('ZSCORE', KEYS[6], ticket) then return false end
  for _, entry in ipairs(redis.call('ZRANGE', KEYS[7], 0, -1)) do
    if string.sub(entry, 1, #ticket + 1) == ticket .. ':' then return false end
  end
end
return {ticket or '', timeout or '0', redis.call('LINDEX', KEYS[2], 0)}
"""


def restore_ticket(writer: Writer, queue: Queue) -> bool:
    """Gives a shard a ticket if it has messages and its own is gone: deleted by somebody, or failed as often as RQ lets it.

    Gives whether it did. A queue that is no shard has no messages of this kind.
    """
    shard = Shard(writer, queue.name)
    connection = writer.connection
    keys = [
        shard.key,
        f"{shard.key}:packs",
        f"{shard.key}:lock",
        queue.key,
        queue.intermediate_queue_key,
        ScheduledJobRegistry(queue=queue).key,
        StartedJobRegistry(queue=queue).key,
    ]
    with redis_errors():
        found = connection.register_script(MISSING)(keys)
        if found is None:
            return False
        ticket, timeout, pack = found
        parcel = Parcel.of(Envelope.loads(pack)[2])
        made = make_ticket(parcel.reference, parcel.topic, queue.name, float(timeout))
        if not shard.replace(ticket.decode(), made):
            return False
        failed = FailedJobRegistry(queue=queue)
        if connection.zrem(failed.key, ticket):  # the new one does what it could not
            connection.delete(Job.key_for(ticket.decode()))
    logger.warning("queue %s had messages and no job; it has one again", queue.name)
    return True


def shard_messages(connection: redis.Redis, application: str, queue: str) -> int:
    """Messages in a shard, also those in hand; none for a queue that is no shard."""
    found: Any = connection.hget(shard_key(application, queue), "messages")
    return int(found or 0)
