"""``redis_durability="wait"``: an offset is committed only when what was queued up to it is on a disk or on a replica.

The jobs of a batch are in Redis, and workers may have them, before that. Only the commit waits, while the next batches go on:
so what Redis loses is what Kafka delivers again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import redis
from redis.exceptions import NoPermissionError, ResponseError

from .errors import ConfigurationError, RedisUnavailable
from .marks import mark_field, marks_key
from .message import Partition
from .queues import redis_errors

if TYPE_CHECKING:
    from .consumer import Track

LONGEST = 5.0
"""Seconds that Redis may take to bring something to its disk, and to a replica; then it is asked again, after a pause."""

SINCE = (7, 2)
"""The first version of Redis that has WAITAOF."""

HONEST = 0.8
"""Seconds that three answers of WAITAOF take at least with ``appendfsync everysec``, where it answers after the fsync.

Redis 7.4.0 to 7.4.2 and Valkey 8.0 to 9.1 answer at once, before it: https://github.com/redis/redis/pull/13793.
"""

_tried: dict[str, bool] = {}
"""What ``_honest`` has found of each server, which does not change while it runs."""

# The write has others before it on their way to the disk and to replicas, whichever connections those came by. That the marks
# are there tells that this is still the Redis which got the jobs, and that it was not started from older data meanwhile.
BARRIER = """
redis.call('HINCRBY', KEYS[1], 'kept', 1)
local behind = {}
for i = 1, #ARGV, 2 do
  local mark = tonumber(redis.call('HGET', KEYS[1], ARGV[i]) or '')
  if not mark or mark < tonumber(ARGV[i + 1]) then behind[#behind + 1] = (i - 1) / 2 end
end
return behind
"""


class NotDurable(ConfigurationError):
    """Redis is set up in such a way that it cannot give the guarantee of ``redis_durability="wait"``."""


class Waits(NamedTuple):
    """What is waited for after a write; neither where ``appendfsync always`` has it on the disk before its reply."""

    disk: bool
    replica: bool


class Keeper:
    """Asks Redis, on a connection of its own, whether something is on a disk or on a replica, and does not wait for the answer.

    Its loop asks and looks for the answer from time to time; one question is under way at a time.
    """

    def __init__(self, client: redis.Redis, group: str) -> None:
        self._client = client
        self._key = marks_key(group)
        self._connection: Any = client.connection_pool.make_connection()
        self._waits: Waits | None = None
        self._asked: list[Partition] = []
        self._due: list[str] = []
        self._replies: list[Any] = []
        self._overdue = 0.0

    def look(self) -> None:
        """Sees what Redis can guarantee, if that is not known of this connection.

        Raises ``RedisUnavailable`` where it does not answer, and where it can guarantee nothing.
        """
        if self._waits is None:
            try:
                self._waits = waits(self._client)
            except NotDurable as error:
                raise RedisUnavailable(str(error)) from error

    def ask(self, marks: Mapping[Partition, int]) -> None:
        """Asks whether these marks, and all that was written before, are safe. Raises ``RedisUnavailable``."""
        self.look()
        assert self._waits is not None
        self._asked = list(marks)
        fields = [part for partition, mark in marks.items() for part in (mark_field("queued", partition), mark)]
        milliseconds = int(LONGEST * 1000)
        commands: list[tuple[Any, ...]] = [("EVAL", BARRIER, 1, self._key, *fields)]
        self._due, self._replies = ["marks"], []
        if self._waits.disk:
            commands.append(("WAITAOF", 1, 0, milliseconds))
            self._due.append("its disk")
        if self._waits.replica:
            commands.append(("WAIT", 1, milliseconds))
            self._due.append("a replica")
        self._overdue = time.monotonic() + LONGEST * len(commands) + 5
        with self._broken(), redis_errors():
            self._connection.send_packed_command(self._connection.pack_commands(commands))

    def answer(self, seconds: float = 0.0) -> list[Partition] | None:
        """The answer to the last question, where it comes within so many seconds; None while there is none.

        Gives the partitions whose marks Redis has lost: none of them if all is safe. Raises ``RedisUnavailable`` where it is
        not: Redis went away, or took longer than ``LONGEST``. The next question then is a new one.
        """
        with self._broken(), redis_errors():
            while len(self._replies) < len(self._due):
                if not self._connection.can_read(timeout=seconds):
                    if time.monotonic() > self._overdue:
                        raise RedisUnavailable("Redis does not answer whether it has what was queued on its disk")
                    return None
                self._replies.append(self._connection.read_response())
            behind, *kept = self._replies
            for where, reply in zip(self._due[1:], kept, strict=True):
                if not (reply[0] if isinstance(reply, list) else reply):
                    raise RedisUnavailable(
                        f"Redis did not bring what was queued to {where} within {LONGEST:g} s; it is not committed before"
                    )
        self._due = []
        return [self._asked[int(index)] for index in behind]

    @property
    def under_way(self) -> bool:
        """Whether a question has no answer yet."""
        return bool(self._due)

    def drop(self) -> None:
        """Forgets the question that is under way."""
        self._due, self._replies = [], []
        self._connection.disconnect()

    @contextlib.contextmanager
    def _broken(self) -> Iterator[None]:
        """After an error nothing is known any more: a new connection may lead to another Redis."""
        try:
            yield
        except BaseException:
            self._waits = None
            self.drop()
            raise


class Ahead:
    """How far the partitions of one group are queued, where that is further than what is known to be safe.

    ``Track.done``, which may be committed at any time, is the latter.
    """

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self.queued: dict[Partition, int] = {}
        self.asked: dict[Partition, int] = {}

    def forget(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            self.queued.pop(partition, None)
            self.asked.pop(partition, None)

    @contextlib.contextmanager
    def as_queued(self, partition: Partition, track: Track) -> Iterator[None]:
        """Within it ``track.done`` says how far the partition is queued; what it is set to there waits to become safe.

        What goes back, because Redis has lost something or the topic is another one, does so at once.
        """
        safe = track.done
        track.done = self.queued.get(partition, safe)
        try:
            yield
        finally:
            queued, track.done = track.done, safe
            if queued is not None and safe is not None and queued > safe:
                self.queued[partition] = queued
            else:
                track.done = queued
                self.queued.pop(partition, None)
            if queued is None or self.asked.get(partition, queued) > queued:
                self.asked.pop(partition, None)

    def safe(self, partition: Partition, track: Track) -> None:
        """The last question was answered."""
        offset = self.asked.pop(partition, None)
        if offset is not None:
            track.done = offset
            if self.queued.get(partition) == offset:
                del self.queued[partition]


def waits(client: redis.Redis) -> Waits:
    """What to wait for after a write, so that it is on the disk of this Redis or on a replica, as it is set up now.

    Takes some seconds where only WAITAOF tells. Raises ``NotDurable`` where nothing does, and ``RedisUnavailable``.
    """
    same: Any = client
    with redis_errors(), same.client() as one:
        info: Any = one.info()
        role = str(info.get("role"))
        if role != "master":
            raise RedisUnavailable(f"Redis refuses: it is a replica (its role is {role}), and takes no writes")
        replica = any(
            isinstance(found, dict) and found.get("state") == "online"
            for name, found in info.items()
            if name.startswith("slave")
        )
        version = tuple(int(part) for part in str(info.get("redis_version", "0")).split(".")[:2])
        if not int(info.get("aof_enabled", 0)):
            if replica:
                return Waits(disk=False, replica=True)
            what = "it has no append-only file, and no replica is connected"
            always = " and appendfsync always" if version < SINCE else ""
            raise _not_durable(what, f"set appendonly yes{always}, or add a replica")
        fsync = _fsync(one)
        if fsync == "always":
            return Waits(disk=False, replica=replica)
        if fsync == "no":
            what, disk = "its appendfsync is no, so its disk is behind by any time", False
        elif version < SINCE:
            what, disk = f"Redis {info['redis_version']} cannot tell when it has brought something to its disk", False
        else:
            what = "its WAITAOF answers before anything is on the disk, a fault of this version"
            disk = _honest(one, str(info["run_id"]))
        if not disk and not replica:
            raise _not_durable(what, "set appendfsync always, or add a replica")
        return Waits(disk, replica)


def _not_durable(what: str, advice: str) -> NotDurable:
    return NotDurable(
        f'redis_durability="wait" cannot be had from this Redis: {what}. In its configuration {advice}; or leave'
        ' redis_durability at "memory"'
    )


def _fsync(client: Any) -> str:
    """``always``, ``everysec`` or ``no``; empty where Redis does not tell, as those which somebody else runs often do."""
    try:
        config = client.config_get("appendfsync")
    except (NoPermissionError, ResponseError):
        return ""
    return str(config.get("appendfsync", ""))


def _honest(client: Any, run: str) -> bool:
    """Whether WAITAOF waits for the disk, which gets something only once a second: see ``HONEST``. ``run`` names this start
    of the server.
    """
    if run in _tried:
        return _tried[run]
    began = 0.0
    for number in range(3):
        client.set("flowkit:durability", number, ex=60)
        reply = client.execute_command("WAITAOF", 1, 0, int(LONGEST * 1000))
        if not reply[0]:
            raise RedisUnavailable(f"Redis did not bring a first key to its disk within {LONGEST:g} s")
        began = began or time.monotonic()
    _tried[run] = time.monotonic() - began >= HONEST
    return _tried[run]
