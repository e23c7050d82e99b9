"""What a group's loop sees of its brokers, and says aloud: topics that are missing, deleted or made anew, brokers that do not
answer, and records that are gone or cannot be read.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .clients import ConsumerClient, Unreadable
from .errors import BrokerUnavailable, ConfigurationError, MessagesGone
from .message import Partition, places

if TYPE_CHECKING:
    from .consumer import Consumer

CREATE = "create it (`flowkit topics --create`)"

SILENCE, LONGEST_SILENCE = 5.0, 60.0
"""Seconds without a broker after which it is said that there is none, and said again, at most."""

FEW, ASK_EVERY = 50, 1.0
"""Topics of which each is looked at in every turn; of more those that have given messages, and all of them after so many
seconds. With 1,000 it took half of the time of a loop that does nothing else.
"""


class Lookout:
    """What one group sees."""

    def __init__(self, loop: Consumer) -> None:
        self.loop = loop
        self._topic_ids: dict[str, str | None] = {}
        self._touched_at = self._tell_at = self._ask_at = 0.0

    def begin(self, client: ConsumerClient) -> None:
        """A new client."""
        self.for_topics(client)
        self._touched_at = time.monotonic()
        self._tell_at = self._touched_at + SILENCE

    def for_topics(self, client: ConsumerClient) -> None:
        """Says which topics are missing, before the first message finds out."""
        loop = self.loop
        answers = {topic for handling in loop.handlings.values() for topic in handling.sends_to}
        missing = client.missing_topics(sorted(answers | set(loop.handlings)))
        for topic in missing:
            what = f"handlers send to it: {CREATE}, or their messages fail and wait"
            if topic in loop.handlings:
                what = self._waits_for_it
            self._tell_topic(topic, f"there is no topic {topic!r} on the brokers; {what}")

    @property
    def _waits_for_it(self) -> str:
        return f"group {self.loop.group!r} waits for it: {CREATE}, and it is consumed within half a minute"

    def _tell_topic(self, topic: str, message: str) -> None:
        loop = self.loop
        error = ConfigurationError("missing topic")
        loop.monitor.notice_error("topics", error, message=message, topic=topic, group=loop.group)

    def for_brokers(self, client: ConsumerClient) -> None:
        """Says that none answers, now and then: an idle client finds nothing to complain of."""
        loop = self.loop
        now = time.monotonic()
        silent = now - self._touched_at
        if client.in_touch():
            if self._tell_at > self._touched_at + SILENCE:  # it was told
                loop.monitor.notice("recovered", message="Kafka answers again", group=loop.group)
            self._touched_at, self._tell_at = now, now + SILENCE
        elif now >= self._tell_at:
            self._tell_at = now + min(silent, LONGEST_SILENCE)
            error = BrokerUnavailable(f"no broker has answered for {silent:.0f} s")
            what = f"group {loop.group!r}: {error}; it waits for one that leads the group, nothing is lost"
            loop.monitor.notice_error("broker", error, message=what, group=loop.group)

    def sees_another(self, client: ConsumerClient) -> bool:
        """Whether a topic of the batch in hand is not the one that it was."""
        return any(client.topic_id(topic) != self._topic_ids.get(topic) for topic, _ in self.loop.batch)

    def for_other_topics(self, client: ConsumerClient) -> set[Partition]:
        """Sees which topics were deleted since the last turn, and which are others of the same name: these are read from their
        first message on. Gives their partitions, of which the batch in hand may be from anywhere.
        """
        loop = self.loop
        now = time.monotonic()
        topics: Iterable[str] = loop.handlings
        if len(loop.handlings) > FEW and now < self._ask_at:
            topics = {partition.topic for partition in loop.batch}
        else:
            self._ask_at = now + ASK_EVERY
        before, asked = self._topic_ids, {topic: client.topic_id(topic) for topic in topics}
        anew: set[Partition] = set()
        if asked.items() <= before.items():
            return anew
        self._topic_ids = ids = before | asked
        for topic in loop.handlings:
            if ids.get(topic) is None and before.get(topic) is not None:
                self._tell_topic(topic, f"there is no topic {topic!r} on the brokers any more; {self._waits_for_it}")
        for partition, track in list(loop.tracks.items()):
            found = ids.get(partition.topic)
            if found is None or track.topic_id is None:
                track.topic_id = track.topic_id or found
            elif found != track.topic_id:
                anew.add(partition)
                loop.read_anew(partition, found)
        for topic in sorted({partition.topic for partition in anew}):
            self._tell_topic(
                topic,
                f"the topic {topic!r} was deleted and made anew; group {loop.group!r} reads the new one from its first message",
            )
        return anew

    def set_aside(self, found: Unreadable) -> None:
        """A partition waits whose next record cannot be read; it may be better in a while."""
        loop = self.loop
        partition, offset = found.partition, found.offset
        track = loop.tracks.get(partition)
        if track is None:  # it has left meanwhile
            return
        window = track.window
        if track.failed_at is None or window is None or not window.records:  # else one before it is tried again
            track.count(offset)
        delay = loop.reconnect.delay(track.waits)
        loop.wait(partition, track, time.monotonic() + delay)
        where, group = f"{places([partition])}@{offset}", loop.group
        behind = "OFFSET"
        if found.following is not None:
            behind = str(found.following)
            where += f" to {found.following - 1}" if found.following - 1 > offset else ""
        loop.monitor.notice_error(
            "unreadable",
            found.reason,
            message=f"{where} cannot be read: {found.reason}{_how_to_unpack(found.reason)}. It is tried again in {delay:.1f} s;"
            f" its partition waits, the others go on. To pass over it, stop every process of the group, and:"
            f" kafka-consumer-groups --bootstrap-server ... --group {group} --topic {partition.topic}:{partition.partition}"
            f" --reset-offsets --to-offset {behind} --execute; it is lost then",
            topic=partition.topic,
            partition=partition.partition,
            offset=offset,
            group=loop.group,
        )

    def tell_gone(self, partition: Partition, before: int, after: int) -> None:
        """Says which messages were not read, because they are not there any more."""
        loop = self.loop
        where = f"{places([partition])}@{before}"
        if after > before:
            text = (
                f"{where} is gone: it was deleted, by retention or by hand, before group {loop.group!r} read it. The group goes"
                f" on at offset {after}; up to {after - before} messages are lost"
            )
        else:
            text = (
                f"{where} is not there: the topic was made anew, or its brokers have lost its end. Group {loop.group!r} goes on"
                f" at offset {after}"
            )
        loop.monitor.notice_error(
            "gone",
            MessagesGone(text),
            message=text,
            topic=partition.topic,
            partition=partition.partition,
            offset=before,
            count=max(0, after - before),
            group=loop.group,
        )


def _how_to_unpack(reason: Exception) -> str:
    """The package that kafka-python lacks for a compression, if that is all."""
    found = re.search("Libraries for (lz4|snappy|zstd) compression codec not found", str(reason))
    return f" (pip install 'kafka-python[{found[1]}]', and start it again)" if found else ""
