"""How far a job of many messages has come: kept in Redis, so that a killed worker's job goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from redis.exceptions import WatchError
from rq.job import Job

from .queues import STORE, Made, Writer, paces_key, redis_errors

RUN, DONE = "flowkit-run", "flowkit-done"
"""Fields in a job's hash: which run of it counts, and how many of its messages are done with. RQ leaves them alone."""

BEGIN = f"""
if redis.call('EXISTS', KEYS[1]) == 0 then return false end
redis.call('HSET', KEYS[1], '{RUN}', ARGV[1])
return redis.call('HGET', KEYS[1], '{DONE}') or '0'
"""

PACE = """
-- Adds what so many messages took to what is known of their topic, which fades. One that also had to warm up a process tells
-- only where it took less than that.
local function pace(key, topic, seconds, messages, cold)
  local before = redis.call('HGET', key, topic)
  if cold == '1' and not before then return end
  if before then
    local s, m = string.match(before, '(%S+) (%S+)')
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


class Progress:
    """One run of one job. ``done`` is what earlier runs had finished."""

    def __init__(self, writer: Writer, job: Job, topic: str) -> None:
        self.writer = writer
        self.key = job.key
        self.topic = topic
        self.done = 0
        self._run = ""

    def begin(self) -> None:
        """Takes the job over from a run before this one. Raises ``JobTaken`` if it is not there any more."""
        run = os.urandom(8).hex()
        with redis_errors():
            done = self.writer.connection.register_script(BEGIN)(keys=[self.key], args=[run])
        if done is None:
            raise _taken()
        self._run, self.done = run, int(done)

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
