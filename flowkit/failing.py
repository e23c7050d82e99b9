"""What becomes of a message that fails in a group's loop: it is tried again, for ever or until it is let go.

Only its partition waits. Of a queued route these are the messages whose hooks fail; for those in a job see ``jobs``.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from .deadletters import letter, origin
from .deadletters import send as send_letter
from .dispatch import Handling, Send
from .errors import BrokerUnavailable, DeliveryError, FlowkitError, PoisonMessage, Stopped, is_passing
from .message import Partition, Record, about, place
from .route_options import RetryTopic

if TYPE_CHECKING:
    from .consumer import Consumer, Track
    from .responses import Response


class Failing:
    """The failures of one group."""

    def __init__(self, loop: Consumer) -> None:
        self.loop = loop

    def failed(
        self, handling: Handling, track: Track, record: Record, error: Exception, send: Send | None = None
    ) -> bool:
        """True if the message is done with: its dead letter was sent, it is skipped, or it waits in a retry topic, to which
        ``send``, if given, sends it. Else its partition waits, and starts with it.
        """
        loop = self.loop
        track.count(record.offset)
        message, failures = handling.original(record)
        attempt, retry = failures + track.attempt, handling.retry
        ends = retry.ends(attempt, error)
        last = ends and handling.on_poison is not None
        elsewhere = None
        if send is not None and handling.retry_topics and not last and not is_passing(error):
            elsewhere = handling.retry_topic(attempt)
        delay = retry.delay(track.waits) if elsewhere is None else elsewhere.wait
        what = "failed in" if handling.inline else "could not be queued for"
        text = f"{place(message)} {what} {handling.route.name}, attempt {attempt}"
        then = self._then(handling, record, delay, last, ends, elsewhere)
        loop.monitor.notice_error(
            "failed",
            error,
            message=f"{text}, {then}: {type(error).__name__}: {error}",
            traceback=attempt == 1 and not isinstance(error, FlowkitError),
            **about(message, loop.group),
            attempt=attempt,
            last=last,
        )
        where = Partition(record.topic, record.partition)
        with loop.loan if loop.may_keep(where) else contextlib.nullcontext():
            handling.failed(message, error, attempt, loop.received, last=last)
        if where in loop.left:
            return False
        if last:
            gone = self._let_go(handling, message, record, error, attempt)
        else:
            gone = (
                elsewhere is not None
                and send is not None
                and self._send_copy(send, elsewhere, message, record, error, attempt)
            )
        following = attempt if is_passing(error) else attempt + 1  # Kafka's absence is no fault of the message
        if gone:
            track.done = record.offset + 1
            track.failed_at = None
        else:
            loop.put_back(where, track, record.offset, delay)
            track.attempt = following - failures
        if not last or not (gone or loop.stopping_for):
            loop.monitor.notice("retried", **about(message, loop.group), attempt=following, delay=delay)
        return gone

    def _then(
        self, handling: Handling, record: Record, delay: float, last: bool, ends: bool, elsewhere: RetryTopic | None
    ) -> str:
        """What becomes of it, in words."""
        if last:
            ways = {"stop": "the application stops", "skip": "it is skipped"}
            return ways.get(handling.on_poison or "", f"goes to {handling.dead_letter}")
        if elsewhere is not None:
            then = f"again in {delay:g} s; until then it is in {elsewhere.topic}, and its partition goes on"
        else:
            then = f"again in {delay:.1f} s; partition {record.partition} of {record.topic} waits, nothing is skipped"
        return f"{then}; to let such messages go, name a topic for them: dead_letter=..." if ends else then

    def _send_copy(
        self, send: Send, elsewhere: RetryTopic, message: Record, record: Record, error: Exception, attempt: int
    ) -> bool:
        """Sends a message where it waits, as its responses are sent: the offset is committed when Kafka has confirmed it."""
        try:
            send(record, [letter(elsewhere.topic, message, self.loop.group, error, attempt)])
        except (DeliveryError, BrokerUnavailable) as problem:
            what = f"{place(message)} waits in its partition, because it could not be sent elsewhere: {problem}"
            self.loop.monitor.notice_error("delivery", problem, message=what, topic=elsewhere.topic)
            return False
        return True

    def not_sent(
        self, handling: Handling, track: Track, record: Record, copy: Response, problem: FlowkitError
    ) -> None:
        """Kafka has not taken what was to wait in a retry topic: the message waits in its partition instead."""
        loop = self.loop
        message, failures = handling.original(record)
        found = origin(copy.headers)
        assert found is not None
        track.count(record.offset)
        track.attempt = (found.attempts or 0) + 1 - failures
        what = f"{place(message)} waits in its partition, because it could not be sent elsewhere: {problem}"
        loop.monitor.notice_error("delivery", problem, message=what, topic=copy.topic)
        loop.put_back(
            Partition(record.topic, record.partition), track, record.offset, handling.retry.delay(track.waits)
        )

    def _let_go(self, handling: Handling, message: Record, record: Record, error: Exception, attempt: int) -> bool:
        """What becomes of a message that failed for the last time. False if it stays where it is."""
        loop = self.loop
        if handling.on_poison == "skip":
            loop.monitor.notice_error("skipped", error, **handling.skipped(message, error, attempt))
            return True
        if handling.on_poison == "stop":
            self._stop_for(
                PoisonMessage(
                    f"{place(message)} failed in {handling.route.name}, attempt {attempt}, and on_poison='stop': its offset"
                    f" is not committed, and it comes first at the next start: {type(error).__name__}: {error}"
                )
            )
            return False
        return self._bury(handling, message, record, error, attempt)

    def _bury(self, handling: Handling, message: Record, record: Record, error: Exception, attempt: int) -> bool:
        loop = self.loop
        dead = handling.dead(message, error, attempt)
        try:
            send_letter(loop.inline.sender(record), dead)
        except (DeliveryError, BrokerUnavailable) as problem:
            what = f"{place(message)} waits, because its dead letter could not be sent: {problem}"
            loop.monitor.notice_error("delivery", problem, message=what, topic=dead.topic)
            return False
        loop.monitor.notice("dead", **about(message, loop.group), attempt=attempt, dead_letter=dead.topic)
        if (limit := handling.count_dead()) is not None:
            self._stop_for(limit)
        return True

    def _stop_for(self, reason: Stopped) -> None:
        """Ends the loop after the message in hand; then ``run`` raises the reason."""
        loop = self.loop
        loop.stopping_for = loop.stopping_for or reason
        loop.stop()
