"""Each message into the queue once, though Kafka may deliver it twice: up to where each partition has been queued.

The rule, and why it holds whatever is killed when, is in docs/queue.md.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .clients import ConsumerClient
from .dispatch import Entry, Handling
from .errors import FlowkitError, RedisUnavailable
from .jobqueue import JobQueue, MarksMoved, Pack
from .marks import Mark
from .message import Partition, Record, places

logger = logging.getLogger(__name__)

Admitted = Mapping[str, Sequence[Entry]]
"""Messages of one partition that passed their hooks, in order, by the queue they go to."""


class Intake:
    """The way of one group into its queues. It knows, as Redis does, up to where each partition has been queued."""

    def __init__(self, job_queue: JobQueue, group: str, handlings: Mapping[str, Handling], monitor: Any) -> None:
        self.job_queue = job_queue
        self.group = group
        self.handlings = handlings
        self.monitor = monitor
        self._marks: dict[Partition, Mark] = {}
        self._unnoted: dict[Partition, int] = {}

    def has(self, record: Record) -> bool:
        """Whether this message was queued before."""
        mark = self._marks.get(Partition(record.topic, record.partition))
        return mark is not None and mark.queued is not None and record.offset < mark.queued

    def welcome(self, partitions: Sequence[Partition], client: ConsumerClient) -> set[Partition]:
        """Learns up to where these partitions, new to this consumer, have been queued; sees what was set back, and which topics
        are others of the same name. Gives the partitions that are read from their first message on for that reason.
        """
        sought: set[Partition] = set()
        waiting = list(partitions)
        for last in (False, False, True):  # a call of an owner before may come in between
            self._marks.update(self.job_queue.marks.read(self.group, waiting))
            waiting = [partition for partition in waiting if not self._welcome(partition, client, sought)]
            if waiting and last:
                raise FlowkitError(f"another consumer of group {self.group} goes on changing {places(waiting)}")
        return sought

    def _welcome(self, partition: Partition, client: ConsumerClient, sought: set[Partition]) -> bool:
        """False if what was read of a partition has changed meanwhile."""
        mark = self._marks[partition]
        topic_id = client.topic_id(partition.topic) or ""
        committed = client.committed(partition)
        end = client.end_offset(partition)
        another = self.is_another(partition, client)
        if another or (mark.queued is not None and mark.queued > end):
            if another or (committed is not None and committed > end):  # it is a commit of the old one
                if committed is not None:
                    client.commit({partition: 0})  # before the era is another one: else the next start would trust it
                committed = None
                client.seek(partition, 0)
                sought.add(partition)
            return self._rewind(partition, committed, topic_id)
        if mark.committed is not None and (committed is None or committed < mark.committed):
            # The committed offset only grows, unless somebody sets it back on purpose.
            return self._rewind(partition, committed, topic_id)
        if committed and (mark.queued is None or mark.queued < committed):
            self._tell_loss(partition, mark.queued, committed, "or its route ran inline before, or was set forward")
            return self._set(partition, Mark(committed, committed), topic_id)
        if mark.era is None or (committed is not None and committed > (mark.committed or -1)):
            return self._set(partition, mark._replace(committed=committed), topic_id)
        return True

    def _set(self, partition: Partition, mark: Mark, topic_id: str) -> bool:
        """Changes a mark and begins an era. False if somebody else has changed it meanwhile."""
        before = self._marks[partition]
        _, _, number = (before.era or "/0").partition("/")
        after = mark._replace(era=f"{topic_id}/{int(number) + 1}")
        if not self.job_queue.marks.change(self.group, partition, before, after):
            return False
        self._marks[partition] = after
        return True

    def rewind(self, partition: Partition, offset: int | None, client: ConsumerClient) -> None:
        """Messages from ``offset`` on are queued again, though they were queued before. Raises ``FlowkitError`` where somebody
        else has changed the mark meanwhile.
        """
        if not self._rewind(partition, offset, client.topic_id(partition.topic) or ""):
            raise self._outrun(partition)

    def _rewind(self, partition: Partition, offset: int | None, topic_id: str) -> bool:
        if not self._set(partition, Mark(offset, offset), topic_id):
            return False
        self._unnoted.pop(partition, None)
        self.monitor.notice("rewound", group=self.group, partition=places([partition]), offset=offset)
        return True

    def _outrun(self, partition: Partition) -> FlowkitError:
        return FlowkitError(
            f"another consumer of group {self.group} has set {places([partition])} anew; this one begins again"
        )

    def is_another(self, partition: Partition, client: ConsumerClient) -> bool:
        """Whether the topic is another one of its name than the mark is of: it was made anew."""
        now, mark = client.topic_id(partition.topic), self._marks.get(partition)
        return bool(now and mark is not None and mark.topic_id and mark.topic_id != now)

    def put(
        self,
        admitted: Mapping[Partition, Admitted],
        moved: Mapping[Partition, int],
        safe: Mapping[Partition, int | None] | None = None,
    ) -> tuple[dict[str, int], dict[Partition, int]]:
        """Queues what Redis does not have yet, in one call, and moves the marks to the offsets of ``moved``, also past
        messages that no job came of: so a mark is never behind a commit. Gives the messages that now wait in each queue.

        If a mark was moved by somebody else meanwhile, looks again at what is left. If one went back, because Redis has
        lost what it had, nothing is queued: gives those partitions, and the offsets from which on they are to be read again.
        Where it has lost all marks, those are the offsets of ``safe``, if given; else only what comes next is queued.
        """
        while True:
            packs: dict[tuple[str, str], Pack] = {}
            ahead: dict[Partition, int] = {}
            for partition, end in moved.items():
                queued = self._marks[partition].queued or 0
                if end <= queued:
                    continue
                ahead[partition] = end
                for queue, entries in admitted.get(partition, {}).items():
                    new = entries if entries[0][2] >= queued else [entry for entry in entries if entry[2] >= queued]
                    if new:
                        place = (partition.topic, queue)
                        pack = packs.setdefault(place, Pack(self.handlings[partition.topic], queue, []))
                        pack.entries.extend(new)
            if not ahead:
                return {}, {}
            try:
                done = self.job_queue.enqueue(self.group, list(packs.values()), self._marks, ahead)
            except MarksMoved:
                if lost := self.look_again(ahead, safe or {}):
                    return {}, lost
                continue
            self._marks.update({p: self._marks[p]._replace(queued=offset) for p, offset in ahead.items()})
            for ((topic, queue), pack), jobs in zip(packs.items(), done.jobs, strict=True):
                count = len(pack.entries)
                self.monitor.notice("queued", topic=topic, queue=queue, count=count, jobs=jobs, group=self.group)
            return done.waiting, {}

    def look_again(
        self, partitions: Collection[Partition], safe: Mapping[Partition, int | None]
    ) -> dict[Partition, int]:
        """Reads the marks anew. Gives those that went back, which only a loss in Redis explains; see ``put``. Raises
        ``FlowkitError`` where somebody else began another era: then this consumer is not the one that counts.
        """
        lost: dict[Partition, int] = {}
        before_all = {partition: self._marks[partition] for partition in partitions}
        try:
            for partition, mark in self.job_queue.marks.read(self.group, list(partitions)).items():
                before, self._marks[partition] = self._marks[partition], mark
                if mark.era is not None and mark.era != before.era:
                    raise self._outrun(partition)
                known = before.queued
                went_back = known is not None and (mark.queued is None or mark.queued < known)
                # What is committed from now on is less than before, and this is no deliberate rewind. Nor is it one if
                # Kafka has less than what is queued here: what Redis knows of its commits stays.
                if (went_back or mark.era is None) and not self._set(partition, mark, before.topic_id):
                    raise self._outrun(partition)
                if known is not None and went_back:
                    back = mark.queued if mark.queued is not None else safe.get(partition)
                    self._tell_loss(partition, mark.queued, known, back=back)
                    if back is not None:
                        lost[partition] = back
        except RedisUnavailable:
            self._marks.update(before_all)  # so that the loss is seen again, and not taken for what was always so
            raise
        return lost

    def _tell_loss(
        self, partition: Partition, mark: int | None, known: int, unless: str = "", back: int | None = None
    ) -> None:
        place = places([partition])
        if mark is None:
            what = f"Redis knows nothing of {place}, though jobs went up to offset {known}: it lost its data"
        else:
            what = (
                f"Redis knows jobs of {place} up to offset {mark} only, though they went up to {known}: it lost data"
            )
        then = f"to queue them again, set the offsets of group {self.group} back while no consumer of it runs"
        if mark is not None and not unless:
            then = "they are queued again"
        elif back is not None:
            then = (
                f"those from offset {back} on are queued again, as nothing behind it is committed; for others, {then}"
            )
        logger.error("%s; %s", f"{what}, {unless}" if unless else what, then)

    @property
    def is_behind(self) -> bool:
        """Whether Redis has not taken all notes."""
        return bool(self._unnoted)

    def remember(self, offsets: Mapping[Partition, int]) -> None:
        """Notes what Kafka has confirmed; what Redis does not take now, with the next one."""
        self._unnoted.update(offsets)
        known = {partition: self._marks.get(partition) for partition in self._unnoted}
        eras = {
            p: (self._unnoted[p], mark.era) for p, mark in known.items() if mark is not None and mark.era is not None
        }
        if not eras:
            return
        try:
            self.job_queue.marks.note(self.group, eras)
        except RedisUnavailable as error:  # until then the next deliberate rewind is harder to recognise
            logger.warning("group %s: the commit is not noted in Redis yet: %s", self.group, error)
        else:
            self._unnoted.clear()
