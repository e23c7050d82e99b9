"""What becomes of a message that fails in a group's loop: it is tried again, for ever or until it is let go.

Only its partition waits. Of a queued route these are the messages whose hooks fail; for those in a job see ``jobs``.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from .deadletters import send as send_letter
from .dispatch import Handling
from .errors import BrokerUnavailable, DeliveryError, FlowkitError, PoisonMessage, Stopped, is_passing
from .message import Partition, Record, about, place

if TYPE_CHECKING:
    from .consumer import Consumer, Track


class Failing:
    """The failures of one group."""

    def __init__(self, loop: Consumer) -> None:
        self.loop = loop

    def failed(self, handling: Handling, track: Track, record: Record, error: Exception) -> bool:
        """True if the message is done with: its dead letter was sent, or it is skipped. Else its partition waits, and starts
        with it.
        """
        loop = self.loop
        track.count(record.offset)
        attempt, retry = track.attempt, handling.retry
        ends = retry.ends(attempt, error)
        last = ends and handling.on_poison is not None
        delay = retry.delay(track.waits)
        loop.monitor.notice_error(
            "failed",
            error,
            message=self._what_failed(handling, record, error, attempt, delay, last=last, ends=ends),
            traceback=attempt == 1 and not isinstance(error, FlowkitError),
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            group=loop.group,
            attempt=attempt,
            last=last,
        )
        where = Partition(record.topic, record.partition)
        with loop.loan if loop.may_keep(where) else contextlib.nullcontext():
            handling.failed(record, error, attempt, loop.received, last=last)
        if where in loop.left:
            return False
        if last and self._let_go(handling, record, error, attempt):
            track.done = record.offset + 1
            track.failed_at = None
            return True
        loop.put_back(where, track, record.offset, delay)
        track.attempt = attempt if is_passing(error) else attempt + 1  # Kafka's absence is no fault of the message
        if not (last and loop.stopping_for):
            loop.monitor.notice("retried", **about(record, loop.group), attempt=track.attempt, delay=delay)
        return False

    def _what_failed(
        self,
        handling: Handling,
        record: Record,
        error: Exception,
        attempt: int,
        delay: float,
        *,
        last: bool,
        ends: bool,
    ) -> str:
        if last:
            then = {"stop": "the application stops", "skip": "it is skipped"}.get(
                handling.on_poison or "", f"goes to {handling.dead_letter}"
            )
        else:
            then = f"again in {delay:.1f} s; partition {record.partition} of {record.topic} waits, nothing is skipped"
            if ends:
                then += "; to let such messages go, name a topic for them: dead_letter=..."
        what = "failed in" if handling.inline else "could not be queued for"
        where = f"{place(record)} {what} {handling.route.name}, attempt {attempt}"
        return f"{where}, {then}: {type(error).__name__}: {error}"

    def _let_go(self, handling: Handling, record: Record, error: Exception, attempt: int) -> bool:
        """What becomes of a message that failed for the last time. False if it stays where it is."""
        loop = self.loop
        if handling.on_poison == "skip":
            loop.monitor.notice_error("skipped", error, **handling.skipped(record, error, attempt))
            return True
        if handling.on_poison == "stop":
            self._stop_for(
                PoisonMessage(
                    f"{place(record)} failed in {handling.route.name}, attempt {attempt}, and on_poison='stop': its offset"
                    f" is not committed, and it comes first at the next start: {type(error).__name__}: {error}"
                )
            )
            return False
        return self._bury(handling, record, error, attempt)

    def _bury(self, handling: Handling, record: Record, error: Exception, attempt: int) -> bool:
        loop = self.loop
        letter = handling.dead(record, error, attempt)
        try:
            send_letter(loop.inline.sender(record), letter)
        except (DeliveryError, BrokerUnavailable) as problem:
            what = f"{place(record)} waits, because its dead letter could not be sent: {problem}"
            loop.monitor.notice_error("delivery", problem, message=what, topic=letter.topic)
            return False
        loop.monitor.notice("dead", **about(record, loop.group), attempt=attempt, dead_letter=letter.topic)
        if (limit := handling.count_dead()) is not None:
            self._stop_for(limit)
        return True

    def _stop_for(self, reason: Stopped) -> None:
        """Ends the loop after the message in hand; then ``run`` raises the reason."""
        loop = self.loop
        loop.stopping_for = loop.stopping_for or reason
        loop.stop()
