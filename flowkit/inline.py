"""The inline half of a group's loop: handle, check, send, look at every delivery. The loop commits what Kafka has confirmed.

It is part of ``Consumer``, and runs on its thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .errors import DeliveryError
from .message import Partition, Record, places
from .underway import Passed, Sent, UnderWay

if TYPE_CHECKING:
    from .consumer import Consumer, Track
    from .crowd import Crowd
    from .dispatch import Handling, Send
    from .transactions import Transactions


logger = logging.getLogger(__name__)

MOST_SENT = 10_000
"""Deliveries under way, beyond which nothing is handled until Kafka has confirmed them."""

LAST_CHANCE = 5.0
"""Seconds that a rebalance waits for what Kafka has not confirmed of partitions that leave. The rest comes again elsewhere."""


class Inline:
    """What one group handles itself."""

    def __init__(self, loop: Consumer) -> None:
        self.loop = loop
        self._sent: dict[Partition, UnderWay] = {}
        self.waits = False
        """Whether there may be responses that Kafka has not confirmed, as far as was looked."""
        self.is_urgent = False
        """Whether what is under way is to be waited for now."""
        self.crowd: Crowd | None = None
        if any(handling.concurrency > 1 for handling in loop.handlings.values()):
            from .crowd import Crowd

            self.crowd = Crowd(loop)
        self.transactions: Transactions | None = None
        if any(handling.transactional for handling in loop.handlings.values()):
            from .transactions import Transactions

            self.transactions = Transactions(loop)

    def take(self, partition: Partition, records: Sequence[Record]) -> None:
        """Handles the messages of one partition, until one fails or the time has come."""
        loop = self.loop
        handling = loop.handlings[partition.topic]
        track = loop.track(partition)
        window = track.window
        if self.is_at_once(partition):
            if window is None or not window.records or window.records[0].offset != records[0].offset:
                return  # it was put back in this turn
        elif not loop.may_start(partition, track, records):
            return
        if handling.due_after is not None:
            records = self._due(partition, track, records, handling.due_after)
            if not records:
                return
        if handling.batch_wait and not self._gathered(partition, track, records, handling):
            return
        if track.begun is None:
            track.begun = records[0].offset
        threshold = loop.threshold
        at = 0
        while at < len(records):
            limit = max(1, threshold - loop.since_commit) if threshold else len(records)
            alone = track.alone_to is not None and self._goes_alone(track, records[at])
            if alone:
                limit = 1
            slice_ = records[at : at + limit] if at or limit < len(records) else records
            send, kept = self._sender(handling, partition, track)
            with loop.loan:
                attempt = 1 if track.failed_at is None else track.attempt_of(records[at])
                try:
                    done, error = handling.run(
                        slice_, send, attempt=attempt, received=loop.received, until=loop.until, ahead=window
                    )
                except BaseException:
                    # how far it has come nobody says, so none of it may be committed
                    if self.transactions is not None:
                        self.transactions.drop_from(partition, records[at].offset)
                    raise
            self.waits = self.waits or bool(kept)
            if partition in loop.left:
                if self._forget(partition) and done and not handling.transactional:
                    loop.done_too_late(partition, track, records[at + done - 1].offset + 1)
                break
            if done:
                at += done
                loop.since_commit += done
                track.done = records[at - 1].offset + 1
                if window is not None:
                    window.pass_to(track.done)
                # whether one that has failed before is over it, is to be known before it counts as that
                self.is_urgent = self.is_urgent or track.failed_at is not None
                if alone and (partition in self.settle() or partition in loop.left):
                    break
            if error is not None:
                # what its partition has waiting goes first: with its dead letter the offset moves on
                if handling.transactional and (partition in self.settle() or partition in loop.left):
                    break
                goes_on = loop.failing.failed(handling, track, records[at], error, send)
                self.waits = self.waits or bool(kept)
                if not goes_on:
                    break
                if window is not None:
                    window.pass_over(records[at])
                at += 1
                loop.since_commit += 1
                if loop.stopping_for is not None:
                    break
                continue
            if at == len(records) or (loop.stopping and window is None) or (window is not None and window.is_closed):
                break
            if not self._pause_for_breath(partition, records[at]):
                break
        loop.count_consumed(partition, at)

    def _goes_alone(self, track: Track, record: Record) -> bool:
        """Whether this message is to be over before the next one is begun: one of them was refused for good, and with it ended
        what is not to blame. Sent together again, they would end together again.
        """
        if track.alone_to is not None and record.offset > track.alone_to:
            track.alone_to = None
        return track.alone_to is not None

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
        due = loop.commit_due(time.monotonic())
        if partition in self.settle_if_due(commits=due) or partition in loop.left:
            return False
        if due:
            loop.commit()
        if loop.clock_starts() > loop.poll_by:
            if not self.is_at_once(partition):
                loop.client.seek(partition, following.offset)
            return False
        return True

    def _sender(self, handling: Handling, partition: Partition, track: Track) -> tuple[Send, Sequence[Any]]:
        """What takes the responses of one slice, and what then has them until Kafka has confirmed them."""
        if handling.transactional and self.transactions is not None:
            return partial(self.transactions.add, partition, track), ()
        found = self._sent.get(partition)
        if found is None or found.track is not track:
            found = self._sent[partition] = UnderWay(track, self.loop.producer)
        return found.sender, found.sent

    def settle_if_due(self, *, commits: bool) -> set[Partition]:
        """``settle``, if it cannot wait. ``commits``: offsets are about to be committed; those behind what Kafka has not
        confirmed are left for the next time, so that responses are under way while the next messages are handled. Unless it
        is for their number.
        """
        loop = self.loop
        if self.waits:
            self._let_go()
        idle = not loop.batch and not (self.crowd is not None and self.crowd.is_busy)
        urgent = self.is_urgent or self.transactions is not None or idle
        if urgent or (commits and (loop.enough_to_commit() or loop.producer.under_way or self._is_to_be_asked())):
            return self.settle()
        return set()

    def _is_to_be_asked(self) -> bool:
        """Whether it is not known what Kafka has confirmed until everything is waited for."""
        if not self.waits:
            return False
        client = self.loop.producer.here
        return client is not None and not client.tells_each

    def settle(self) -> set[Partition]:
        """Waits for every response, and puts back the messages whose responses Kafka did not confirm.

        Gives the partitions of those messages: they go on from there with the next poll.
        """
        self.is_urgent = False
        self.loop.producer.settle()
        failed = self._settle_sent() if any(self._sent.values()) else set()
        self.waits = any(self._sent.values())
        return failed if self.transactions is None else failed | self.transactions.settle()

    def _settle_sent(self) -> set[Partition]:
        loop, client = self.loop, self.loop.producer.here
        if client is not None:
            client.has_failed = False
        loop.producer.flush()
        failed: dict[Partition, tuple[Sent, DeliveryError]] = {}
        for partition, under_way in [*self._sent.items()]:
            track, refused = under_way.track, self._look_at(under_way)
            if refused is not None:
                # before all else, so that nothing is committed past it whatever breaks below, or if its partition comes back
                track.done = under_way.offset
                track.close_window()  # what stands behind it comes again, so that keys keep their order
                if refused[1].with_another:
                    track.alone_to = under_way.last_offset
            if loop.tracks.get(partition) is not track:
                del self._sent[partition]
            elif refused is not None:
                failed[partition] = refused
                under_way.clear()
        if failed:
            loop.producer.renew()  # first: a dead letter sent by a client that has failed would fail too
        for partition, ((record, response, _), error) in failed.items():
            if partition in loop.left:  # while a hook took long
                continue
            handling, track = loop.handlings[partition.topic], loop.track(partition)
            if isinstance(record, Passed):
                # handled once more, and its response is sent by itself: if that is refused too, the message is at hand
                logger.debug("%s@%d is handled once more: %s", places([partition]), record.offset, error)
                track.alone_to = max(record.offset, track.alone_to or 0)
                loop.put_back(partition, track, record.offset, 0.0)
                continue
            passing = error.passing or handling.take_apart(record)
            problem = DeliveryError(f"{response.topic}: {error}", passing=passing)
            if handling.is_copy([response]):
                loop.failing.not_sent(handling, track, record, response, problem)
            elif loop.failing.failed(handling, track, record, problem):
                # what its batch in hand has is behind what comes again now
                loop.put_back(partition, track, record.offset + 1, 0.0)
        return set(failed)

    def _look_at(self, under_way: UnderWay) -> tuple[Sent, DeliveryError] | None:
        """Removes what Kafka has confirmed, up to the first that it has not: gives that, and why."""
        confirmed, problem = under_way.look(self.loop.producer.here)
        self._tell(confirmed)
        return problem

    def _tell(self, confirmed: Mapping[str, int]) -> None:
        for topic, count in confirmed.items():
            self.loop.monitor.notice("responded", topic=topic, count=count)

    def _let_go(self) -> None:
        """Removes what Kafka has confirmed by now, and waits for nothing. It is urgent if one has failed, or too many wait."""
        client = self.loop.producer.here
        if client is None:
            return
        self.waits, left = False, 0
        for under_way in self._sent.values():
            if under_way:
                self._tell(under_way.let_go(client))
                left += len(under_way.sent)
                if under_way:
                    self.waits = True
                    if under_way.has_ended(client):
                        self.is_urgent = True
        self.is_urgent = self.is_urgent or client.has_failed or left > MOST_SENT

    def is_at_once(self, partition: Partition) -> bool:
        """Whether many messages of this partition are handled at once."""
        return self.crowd is not None and partition.topic in self.crowd.topics

    def leave(self, partitions: Sequence[Partition], *, finish: bool = False) -> None:
        """Looks at what is under way of partitions that leave, so that it need not come again. Waits for it, unless they leave
        because their client is given up: then nobody waits for what comes of that. ``finish``: also for what is in hand.
        """
        loop, producer = self.loop, self.loop.producer
        if not partitions or loop.is_without_client:
            return
        with producer.in_place_of(loop.claim):
            # while somebody else polls, the loop's thread may be at what is ready itself, unless it only waits for its end
            if finish and self.crowd is not None and (not loop.loan.is_kept or self.crowd.is_ending):
                patience = min(LAST_CHANCE, loop.settings.kafka.session_timeout / 3)
                ready = self.crowd.leave(partitions, patience)
                # what a transaction would have to take with it comes again
                self.pass_last({p: rs for p, rs in ready.items() if not loop.handlings[p.topic].transactional})
        producer.settle(LAST_CHANCE)
        leaving = [found for partition in partitions if (found := self._sent.get(partition))]
        if leaving:
            with producer.in_place_of(loop.claim):
                producer.flush(LAST_CHANCE)
                for under_way in leaving:
                    self._look_at(under_way)

    def finish(self) -> Mapping[Partition, Sequence[Record]]:
        """At the end: waits for what is in hand. Gives what can still have its turn, for ``pass_last``."""
        return {} if self.crowd is None else self.crowd.finish()

    def pass_last(self, ready: Mapping[Partition, Sequence[Record]]) -> None:
        """Sends what came of messages that were in hand when the loop, or their partition, came to its end. Those from the
        first that failed on come again.
        """
        loop = self.loop
        for partition, records in ready.items():
            handling, track = loop.handlings[partition.topic], loop.tracks[partition]
            send, _ = self._sender(handling, partition, track)
            done, error = handling.run(
                records, send, attempt=1, received=loop.received, until=loop.until, ahead=track.window
            )
            if error is not None:
                logger.debug("%s@%d comes again: %r", places([partition]), records[done].offset, error)
            if done:
                track.done = records[done - 1].offset + 1
                loop.count_consumed(partition, done)

    def unsettled(self) -> dict[Partition, int]:
        """Of each partition the first message that is handled, but whose responses are not confirmed yet."""
        loop = self.loop
        offsets: dict[Partition, int] = {}
        for partition, under_way in [*self._sent.items()]:
            track = under_way.track
            if under_way and (loop.tracks.get(partition) is track or loop.left.get(partition) is track):
                offsets[partition] = under_way.offset
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
        found = self._sent.pop(partition, None)
        if not found:
            return True
        self.loop.producer.flush()
        return self._look_at(found) is None

    def drop(self) -> None:
        """Forgets what is not confirmed: its messages come again."""
        self._sent = {}
        self.waits = False
        if self.transactions is not None:
            self.transactions.drop()

    def close(self) -> None:
        if self.transactions is not None:
            self.transactions.close(2.0)
