"""How far a job of many messages has come: kept in Redis, so that a killed worker's job goes on where it was.

And which job of behind it has gone up in it: a process that is warm may go on with that one, and RQ need not know.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from redis.exceptions import WatchError
from rq import Queue
from rq.job import Job
from rq.results import Result
from rq.suspension import WORKERS_SUSPENDED
from rq.worker.base import BaseWorker

from .queues import RUNS, STORE, Made, Writer, open_key, paces_key, redis_errors

RUN, DONE, MORE, TAKEN = "flowkit-run", "flowkit-done", "flowkit-more", "flowkit-taken"
"""Fields in a job's hash: which run of it counts, how many of its messages are done with; the data of the job that went up in
it, whose messages these are then, and the id of that one. RQ leaves them alone.
"""

BEGIN = f"""
if redis.call('EXISTS', KEYS[1]) == 0 then return false end
redis.call('HSET', KEYS[1], '{RUN}', ARGV[1])
return {{redis.call('HGET', KEYS[1], '{DONE}') or '0', redis.call('HGET', KEYS[1], '{MORE}')}}
"""

# The first job of a queue goes up in one that is done, whose run must still be the one that counts. A call whose reply got lost
# is repeated by redis-py, and says the same again.
TAKE = f"""
if redis.call('HGET', KEYS[1], '{RUN}') ~= ARGV[1] then return 0 end
if redis.call('HGET', KEYS[1], '{TAKEN}') == ARGV[2] then return 2 end
if redis.call('LINDEX', KEYS[2], 0) ~= ARGV[2] then return 1 end
local fields = redis.call('HMGET', KEYS[3], 'data', 'retries_left', '{DONE}', '{MORE}', 'started_at', 'description')
if not fields[1] or fields[2] ~= ARGV[3] or fields[3] or fields[4] or (fields[5] or '') ~= '' then return 1 end
redis.call('HSET', KEYS[1], '{MORE}', fields[1], '{TAKEN}', ARGV[2], '{DONE}', 0, 'description', fields[6] or '')
redis.call('LPOP', KEYS[2])
redis.call('DEL', KEYS[3])
return 2
"""

END = f"""
if redis.call('HGET', KEYS[1], '{RUN}') ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[1], '{MORE}', '{TAKEN}')
redis.call('HSET', KEYS[1], '{DONE}', ARGV[2])
return 1
"""

PACE = """
-- Adds what so many messages took to what is known of their topic, which fades. One that also had to warm up a process tells
-- only where it took less than that.
local function pace(key, topic, seconds, messages, cold)
  local s, m = string.match(redis.call('HGET', key, topic) or '', '^(%d+%.%d+) (%d+%.%d+)$')
  if cold == '1' and not s then return end
  if s then
    if cold == '1' and seconds * tonumber(m) > tonumber(s) * messages then return end
    seconds, messages = seconds + 0.7 * tonumber(s), messages + 0.7 * tonumber(m)
  end
  redis.call('HSET', key, topic, string.format('%.9f %.3f', seconds, messages))
end
"""

# What is done and what is to be tried again move together, and only for the run that counts: a worker that stood still
# for so long that its job was given to another must not put the same messages back once more.
NOTE = f"""
{STORE}
{PACE}
if ARGV[1] ~= '' then
  local run = redis.call('HGET', KEYS[3], '{RUN}')
  if run ~= ARGV[1] then return 0 end
end
if ARGV[7] ~= '' then store(7) end
if ARGV[1] ~= '' then redis.call('HSET', KEYS[3], '{DONE}', ARGV[2]) end
if ARGV[4] ~= '0' then pace(KEYS[4], ARGV[5], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[6]) end
return 1
"""


class Took(NamedTuple):
    """So many seconds for so many messages; ``cold``: the process had to warm up for them."""

    seconds: float = 0.0
    messages: int = 0
    cold: bool = False


NOTHING = Took()


class Following(NamedTuple):
    """A job that stands first in its queue."""

    id: str
    data: bytes
    timeout: int
    meta: bytes


NONE_OF_USE = Following("", b"", 0, b"")
"""In the place of a job that has run before, or whose queue is not the one that RQ would look into next."""


class Progress:
    """One run of one job. ``done`` is what earlier runs had finished."""

    def __init__(self, writer: Writer, job: Job, topic: str) -> None:
        self.writer = writer
        self.key = job.key
        self.topic = topic
        self.done = 0
        self._run = ""
        self._worker = (
            None if job.worker_name is None else f"{BaseWorker.redis_worker_namespace_prefix}{job.worker_name}"
        )
        self._others: list[str] | None = None

    def begin(self) -> bytes | None:
        """Takes the job over from a run before this one. Gives the data of the job that went up in it, if one did.

        Raises ``JobTaken`` if it is not there any more.
        """
        run = os.urandom(8).hex()
        with redis_errors():
            found = self.writer.connection.register_script(BEGIN)(keys=[self.key], args=[run])
        if found is None:
            raise _taken()
        self._run, self.done = run, int(found[0])
        more: bytes | None = found[1]
        return more

    def look(self, queue: str, milliseconds: int) -> Following | None:
        """The first job of a queue, if there is one; and says to consumers that for so long none would have to wait.

        None of use where the workers are suspended, or this one is asked to stop or has jobs in another queue.
        """
        connection = self.writer.connection
        with redis_errors():
            if self._worker is not None and self._others is None:
                queues: Any = connection.hget(self._worker, "queues") or b""
                others = set(queues.decode().split(",")) - {queue, ""}
                self._others = [Queue(name, connection=connection).key for name in sorted(others)]
            with connection.pipeline(transaction=False) as pipe:
                if milliseconds:
                    pipe.set(open_key(self.writer.application, queue), 1, px=milliseconds)
                pipe.lindex(Queue(queue, connection=connection).key, 0)
                pipe.exists(WORKERS_SUSPENDED)
                if self._worker is not None:
                    pipe.hexists(self._worker, "shutdown_requested_date")
                for other in self._others or ():
                    pipe.llen(other)
                found, *elsewhere = pipe.execute()[1 if milliseconds else 0 :]
            if any(elsewhere):
                return NONE_OF_USE
            if found is None:
                return None
            name = found.decode()
            with connection.pipeline(transaction=False) as pipe:
                pipe.hmget(Job.key_for(name), "data", "timeout", "meta", "retries_left", DONE, MORE, "started_at")
                pipe.exists(Job.dependents_key_for(name), Result.get_key(name))
                fields, others = pipe.execute()
        data, timeout, meta, retries, *begun = fields
        if data is None or any(begun) or others or retries != b"%d" % RUNS.max:
            return NONE_OF_USE
        return Following(name, data, int(timeout or 0), meta or b"")

    def take(self, queue: str, following: Following) -> bool:
        """Makes another job's messages those of this one, which is done, and deletes that one; both, or neither.

        False if it is not the first of its queue any more. Raises ``JobTaken``.
        """
        place = Queue(queue, connection=self.writer.connection).key
        keys = [self.key, place, Job.key_for(following.id)]
        with redis_errors():
            answer = self.writer.connection.register_script(TAKE)(keys=keys, args=[self._run, following.id, RUNS.max])
        if not answer:
            raise _taken()
        if answer == 2:
            self.done = 0
        return bool(answer == 2)

    def end(self, messages: int) -> None:
        """Forgets the job that went up in this one, and that this one's own messages, so many, are not done."""
        with redis_errors():
            ended = self.writer.connection.register_script(END)(keys=[self.key], args=[self._run, messages])
        if not ended:
            raise _taken()

    def note(self, done: int, again: Sequence[Made] = (), took: Took = NOTHING) -> None:
        """Remembers that so many messages are done with, of which those in ``again`` go on in jobs of their own, and what some
        of them took.

        Raises ``JobTaken`` if another worker has the job by now, or it was deleted: then nothing was remembered.
        """
        with redis_errors():
            if again and self.writer.shared is None:
                noted = self._note_by_rq(done, again) and self._note(done, (), took)
            else:
                noted = self._note(done, again, took)
        if not noted:
            raise _taken()
        self.done = done

    def _note(self, done: int, again: Sequence[Made], took: Took) -> bool:
        script = self.writer.connection.register_script(NOTE)
        stored = self.writer.arguments(again) if again else [""]
        return bool(
            script(
                keys=[*self.writer.keys, self.key, paces_key(self.writer.application)],
                args=[self._run, done, f"{took.seconds:.9f}", took.messages, self.topic, int(took.cold), *stored],
            )
        )

    def _note_by_rq(self, done: int, again: Sequence[Made]) -> bool:
        """The same by RQ's own functions, in a transaction."""
        while True:
            with self.writer.connection.pipeline() as pipe:
                pipe.watch(self.key)  # type: ignore[no-untyped-call]
                if self._run and pipe.hget(self.key, RUN) != self._run.encode():
                    return False
                pipe.multi()
                self.writer.by_rq(pipe, again)
                if self._run:
                    pipe.hset(self.key, DONE, done)
                try:
                    pipe.execute()
                except WatchError:  # a heartbeat of this job, which comes every few seconds
                    continue
            return True


class JobTaken(Exception):
    """Somebody else decides what becomes of this job now."""


def _taken() -> JobTaken:
    return JobTaken(
        "this job was deleted, or is another worker's by now, because this one stood still for a minute or more"
    )
