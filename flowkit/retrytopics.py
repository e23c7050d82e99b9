"""Retry topics: where copies of failed messages wait for their next attempt, while their partition goes on.

Each wait has a topic of its own, so that what is due stands before what is not. The group that sent the copies reads them
too, and handles each as the message that it was. A copy looks as a dead letter does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .deadletters import headers_of_message, origin
from .dispatch import Handling, Run, Send, Until
from .errors import DeadLetterLimit
from .message import Abort, PlainRecord, Record, place
from .responses import Response
from .route_options import MOST_RETRY_TOPICS, RetryTopic

if TYPE_CHECKING:
    from .clients import ConsumerClient
    from .parallel import Window

logger = logging.getLogger(__name__)


class Waiting(Handling):
    """The route of one retry topic: its messages are handled as those of the route itself, when they have waited."""

    def __init__(self, handling: Handling, own: RetryTopic) -> None:
        self.__dict__.update(vars(handling))
        self._of = handling
        self.due_after = own.wait
        self.batch_wait = 0.0

    def run(
        self,
        records: Sequence[Record],
        send: Send,
        *,
        attempt: int,
        received: float,
        until: Until,
        call: Run | None = None,  # noqa: ARG002
        ahead: Window | None = None,  # noqa: ARG002
    ) -> tuple[int, Exception | None]:
        done, error = super().run(
            records, send, attempt=attempt, received=received, until=until, call=self._call_original
        )
        if done:
            self._of.dead_in_a_row = 0
        return done, error

    def _call_original(self, record: Record, attempt: int, received: float) -> Sequence[Response]:
        found = origin(record.headers)
        if found is not None and found.group != self.group:
            logger.debug("%s is passed over: it failed in group %s", place(record), found.group)
            raise Abort
        original, failures = self.original(record)
        return self.call(original, failures + attempt, received)

    def original(self, record: Record) -> tuple[Record, int]:
        found = origin(record.headers)
        if found is None:  # whoever sent it, it is to be handled
            return record, 0
        original = PlainRecord(
            found.topic,
            record.partition if found.partition is None else found.partition,
            record.offset if found.offset is None else found.offset,
            record.timestamp if found.timestamp is None else found.timestamp,
            record.key,
            record.value,
            headers_of_message(record.headers),
        )
        return original, found.attempts or 0

    def count_dead(self) -> DeadLetterLimit | None:
        return self._of.count_dead()


def with_retry_topics(handlings: Mapping[str, Handling]) -> dict[str, Handling]:
    """These routes, and those of their retry topics."""
    found = dict(handlings)
    for handling in handlings.values():
        found.update({own.topic: Waiting(handling, own) for own in handling.retry_topics})
    return found


def left_over(handlings: Mapping[str, Handling], client: ConsumerClient) -> dict[str, Handling]:
    """The routes of retry topics that exist from a time when ``Retry`` had more waits: messages may be left in them."""
    found: dict[str, Handling] = {}
    taken = {*handlings, *(handling.dead_letter for handling in handlings.values())}
    for handling in handlings.values():
        if handling.retry_stem is not None and handling.due_after is None:
            wait = handling.retry_topics[-1].wait if handling.retry_topics else 0.0
            for number in range(len(handling.retry_topics) + 1, MOST_RETRY_TOPICS + 1):
                own = RetryTopic(f"{handling.retry_stem}.{number}", wait)
                if own.topic not in taken:
                    found[own.topic] = Waiting(handling, own)
    missing = client.missing_topics(list(found)) if found else []
    return {topic: handling for topic, handling in found.items() if topic not in missing}
