"""Each message into the queue once, though Kafka may deliver it twice: up to where each partition has been queued.

The rule, and why it holds whatever is killed when, is in docs/queue.md.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from .clients import ConsumerClient
from .dispatch import Entry, Handling
from .errors import RedisUnavailable
from .jobqueue import JobQueue, Marks, MarksMoved, Pack
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
        self, admitted: Mapping[Partition, Admitted], moved: Mapping[Partition, int]
    ) -> tuple[dict[str, int], dict[Partition, int]]:
        """Queues what Redis does not have yet, in one call, and moves the marks to the offsets of ``moved``, also past
        messages that no job came of: so a mark is never behind a commit. Gives the messages that now wait in each queue.

        If a mark was moved by somebody else meanwhile, looks again at what is left. If one went back, because Redis has
        lost what it had, nothing is queued: gives those partitions, and the offsets from which on they are to be read again.
        """
        while True:
            packs: dict[tuple[str, str], Pack] = {}
            ahead: dict[Partition, int] = {}
            for partition, end in moved.items():
                queued = self._queued.get(partition) or 0
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
            expected: Marks = {partition: self._queued.get(partition) for partition in ahead}
            try:
                done = self.job_queue.enqueue(self.group, list(packs.values()), expected, ahead)
            except MarksMoved:
                if lost := self._look_again(ahead):
                    return {}, lost
                continue
            self._queued.update(ahead)
            for ((topic, queue), pack), jobs in zip(packs.items(), done.jobs, strict=True):
                count = len(pack.entries)
                self.monitor.notice("queued", topic=topic, queue=queue, count=count, jobs=jobs, group=self.group)
            return done.waiting, {}

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
