"""The inline half of a group's loop: handle, check, send, flush, look at every delivery. Then the loop commits.

It is part of ``Consumer``, and runs on its thread only.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .errors import DeliveryError
from .message import Partition, Record
from .responses import Response

if TYPE_CHECKING:
    from .consumer import Consumer, Track
    from .dispatch import Handling
    from .transactions import Transactions


class Inline:
    """What one group handles itself."""

    def __init__(self, loop: Consumer) -> None:
        self.loop = loop
        self._sent: list[tuple[Record, Response, Any]] = []
        self.parallel = any(handling.concurrency > 1 for handling in loop.handlings.values())
        self.transactions: Transactions | None = None
        if any(handling.transactional for handling in loop.handlings.values()):
            from .transactions import Transactions

            self.transactions = Transactions(loop)

    def take(self, partition: Partition, records: Sequence[Record]) -> None:
        """Handles the messages of one partition, until one fails or the time has come."""
        loop = self.loop
        handling = loop.handlings[partition.topic]
        track = loop.track(partition)
        if not loop.may_start(partition, track, records[0]):
            return
        if handling.due_after is not None:
            records = self._due(partition, track, records, handling.due_after)
            if not records:
                return
        if handling.batch_wait and not self._gathered(partition, track, records, handling):
            return
        if track.begun is None:
            track.begun = records[0].offset
        send = self._send
        if handling.transactional and self.transactions is not None:
            send = partial(self.transactions.add, partition, track)
        threshold = loop.settings.kafka.offset_commit_threshold
        at = 0
        while at < len(records):
            limit = max(0, threshold - loop.since_commit) if threshold else len(records)
            slice_ = records[at : at + limit] if at or limit < len(records) else records
            with loop.loan:
                attempt = track.attempt_of(records[at])
                done, error = handling.run(
                    slice_, send, attempt=attempt, received=loop.received, until=loop.until, ahead=track.ahead
                )
            if partition in loop.left:
                if self._forget(partition) and done and not handling.transactional:
                    loop.done_too_late(partition, track, records[at + done - 1].offset + 1)
                break
            if done:
                at += done
                loop.since_commit += done
                track.done = records[at - 1].offset + 1
            if error is not None:
                # what its partition has waiting goes first: with its dead letter the offset moves on
                if handling.transactional and (partition in self.settle() or partition in loop.left):
                    break
                if not loop.failing.failed(handling, track, records[at], error, send):
                    break
                track.ahead.pop(records[at].offset, None)  # of one that could not be sent
                at += 1
                loop.since_commit += 1
                continue
            if at == len(records) or (loop.stopping and records[at].offset not in track.ahead):
                break
            if not self._pause_for_breath(partition, records[at]):
                break
        loop.tell_consumed(partition, at)

    def _due(self, partition: Partition, track: Track, records: Sequence[Record], wait: float) -> Sequence[Record]:
        """The messages of a retry topic that have waited. The others come again, when the first of them is due."""
        loop = self.loop
        now = time.time()
        waited = records[0].offset == track.awaited
        for at, record in enumerate(records):
            left = record.timestamp / 1000 + wait - now
            if left <= 0 or (
                waited and left > wait
            ):  # the clock was set back since, by which it would wait for hours
                continue
            if at:
                loop.client.seek(partition, record.offset)
            else:
                track.awaited = record.offset
                loop.put_back(partition, track, record.offset, min(left, wait))
            return records[:at]
        return records

    def work_ahead(self, batch: Mapping[Partition, Sequence[Record]]) -> None:
        """Handles what of a batch may be handled at once, before the partitions have their turn one by one."""
        from .parallel import works_of

        loop = self.loop
        may_start = {
            partition: track
            for partition in batch.keys() - loop.left.keys()
            if (track := loop.tracks.get(partition)) is not None and track.resume_at is None and not track.held
        }
        for handling, works in works_of(batch, may_start, loop.handlings).items():
            with loop.loan:
                handling.work(works, loop.received, loop.until)

    def _gathered(self, partition: Partition, track: Track, records: Sequence[Record], handling: Handling) -> bool:
        """Whether a batch is as long as it may be, or has waited; if not, its partition waits."""
        first = records[0].offset
        if len(records) >= min(handling.max_batch, self.loop.most) or first in (track.awaited, track.failed_at):
            return True
        track.awaited = first
        self.loop.put_back(partition, track, first, handling.batch_wait)
        return False

    def _pause_for_breath(self, partition: Partition, following: Record) -> bool:
        """In the middle of a batch: settles and commits what is due. False if the rest of the batch is polled again."""
        loop = self.loop
        if partition in self.settle() or partition in loop.left:
            return False
        if loop.commit_due():
            loop.commit()
        if loop.clock_starts() > loop.poll_by:
            loop.client.seek(partition, following.offset)
            return False
        return True

    def _send(self, record: Record, responses: Sequence[Response]) -> None:
        start = self.loop.producer.start
        for response in responses:
            self._sent.append((record, response, start(response)))

    def settle(self) -> set[Partition]:
        """Waits for every response, and puts back the messages whose responses Kafka did not confirm.

        Gives the partitions of those messages: they go on from there with the next poll.
        """
        self.loop.producer.settle()
        failed = self._settle_sent() if self._sent else set()
        return failed if self.transactions is None else failed | self.transactions.settle()

    def _settle_sent(self) -> set[Partition]:
        loop = self.loop
        loop.producer.flush()
        failed: dict[Partition, tuple[Record, Response, DeliveryError]] = {}
        confirmed: Counter[str] = Counter()
        for record, response, delivery in self._sent:
            error = loop.producer.outcome(delivery)
            if error is None:
                confirmed[response.topic] += 1
                continue
            partition = Partition(record.topic, record.partition)
            if partition not in failed or record.offset < failed[partition][0].offset:
                passing = error.passing or loop.handlings[record.topic].take_apart(record)
                failed[partition] = record, response, DeliveryError(f"{response.topic}: {error}", passing=passing)
        for partition, (record, _, _) in failed.items():
            # before all else, so that nothing is committed past it whatever breaks below
            track = loop.track(partition)
            track.done, track.ahead = (
                record.offset,
                {},
            )  # what stands behind it comes again, so that keys keep their order
        self._sent = []
        for topic, count in confirmed.items():
            loop.monitor.notice("responded", topic=topic, count=count)
        if failed:
            loop.producer.renew()  # first: a dead letter sent by a client that has failed would fail too
        for partition, (record, response, problem) in failed.items():
            if partition in loop.left:  # while a hook took long
                continue
            handling, track = loop.handlings[record.topic], loop.track(partition)
            if handling.is_copy([response]):
                loop.failing.not_sent(handling, track, record, response, problem)
            elif loop.failing.failed(handling, track, record, problem):
                loop.client.seek(partition, record.offset + 1)
        return set(failed)

    def unsettled(self) -> dict[Partition, int]:
        """Of each partition the first message that is handled, but whose responses are not confirmed yet."""
        offsets: dict[Partition, int] = {}
        for record, _, _ in self._sent:
            offsets.setdefault(Partition(record.topic, record.partition), record.offset)
        if self.transactions is not None:
            offsets.update(self.transactions.unsettled())
        return offsets

    def sender(self, record: Record) -> Any:
        """What sends a dead letter of a message: it has ``send_all``, as ``Producer`` has."""
        if self.transactions is None or not self.loop.handlings[record.topic].transactional:
            return self.loop.producer
        return self.transactions.sender(record)

    def open(self) -> None:
        """Opens what is to be open before the first message comes."""
        if self.transactions is not None:
            self.transactions.open()

    def _forget(self, partition: Partition) -> bool:
        """Its messages are somebody else's now, and come again there. Gives whether all their responses arrived."""
        sent, self._sent = self._sent, []
        its = []
        for record, response, delivery in sent:
            if Partition(record.topic, record.partition) == partition:
                its.append(delivery)
            else:
                self._sent.append((record, response, delivery))
        if its:
            self.loop.producer.flush()
        return all(self.loop.producer.outcome(delivery) is None for delivery in its)

    def drop(self) -> None:
        """Forgets what is not confirmed: its messages come again."""
        self._sent = []
        if self.transactions is not None:
            self.transactions.drop()

    def close(self) -> None:
        if self.transactions is not None:
            self.transactions.close(2.0)
