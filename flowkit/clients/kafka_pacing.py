"""When kafka-python 3.0 asks the brokers for more, and how long they may hold what it asks.

kafka-python has one fetch under way with a broker at a time, and the broker holds one that finds its partitions empty. What it
has in hand of a partition it does not ask for meanwhile: at the end of that, the busiest partition waits for the empty ones,
and then for its own messages, while nothing is handled. Here no fetch is held while there are messages in hand, and where
there are many, one that asks also for what is behind them is sent shortly before their end, and no other.

This reaches into kafka-python's internals, and is to be looked at again with another version of it.
"""

from __future__ import annotations

import time
from typing import Any

GAP = 20
"""Milliseconds between two fetches while the same few messages are in hand, at least. What they bring has its turn when those
are over, so they need not be sent in each poll: that takes some microseconds for each partition, and a way to kafka-python's
IO thread and back.
"""

AHEAD = 0.2
"""Seconds before the end of many messages in hand to ask for what is behind them, or twice as long as that took the last time.
When something has come kafka-python asks for nothing else before their end: asked for sooner, what comes meanwhile of another
partition would wait longer, and what was asked for without it would leave nothing to do behind their end.
"""

BUSY_WAIT, IDLE_AFTER = 10, 1.0
"""Milliseconds that a broker may hold a fetch where within so many seconds messages came, or a partition was paused or sought:
if it goes on, or back, it may not be in the fetch that is under way.
"""

IDLE_WAIT = 200
"""Milliseconds otherwise, at least, since each fetch costs a processor something."""

LONGEST = 1_000
"""Of ``GAP`` and ``IDLE_WAIT``, which are one millisecond for each partition where those are many."""


class Pace:
    """That of one ``KafkaConsumer``, from when it is made on."""

    def __init__(self, consumer: Any) -> None:
        self._subscription = consumer._subscription
        self._fetcher = fetcher = consumer._fetcher
        self._in_hand: Any = None
        self._next = 0.0
        self._is_ahead, self._took = False, 0.0
        self._behind: Any = None
        """The position behind what is in hand, if that is near its end and it is known."""
        self._busy_at = time.monotonic()
        self._send, self._create = fetcher.send_fetches, fetcher._create_fetch_requests
        self._handle = fetcher._handle_fetch_response
        fetcher.send_fetches, fetcher._create_fetch_requests = self._send_fetches, self._create_requests
        fetcher._handle_fetch_response = self._handle_response

    def note(self) -> None:
        """Messages have come, or a partition was paused or sought."""
        self._busy_at = time.monotonic()

    def _send_fetches(self) -> Any:
        """Called by kafka-python in a poll, unless there is more fetched than what is in hand."""
        now, options = time.monotonic(), self._fetcher.config
        in_hand = self._fetcher._next_partition_records or None
        if in_hand is not self._in_hand:
            self._in_hand, self._behind, self._is_ahead, self._next = in_hand, None, False, now
        if in_hand is None:
            options["fetch_max_wait_ms"] = BUSY_WAIT if now < self._busy_at + IDLE_AFTER else self._grown(IDLE_WAIT)
            return self._send()
        if not self._is_ahead and self._was_full(in_hand):
            if in_hand.batches.seconds_left() > max(AHEAD, 2 * self._took):
                return []
            self._behind, self._is_ahead, self._next = in_hand.batches.end(), True, now
        if now < self._next:
            return []
        self._next = now + self._grown(GAP) / 1000
        options["fetch_max_wait_ms"] = 0
        return self._send()

    def _was_full(self, records: Any) -> bool:
        """Whether there was more behind it, when it was fetched."""
        return bool(records.batches.size >= self._fetcher.config["max_partition_fetch_bytes"] // 2)

    def _grown(self, least: int) -> int:
        return min(max(least, len(self._subscription.assignment)), LONGEST)

    def _create_requests(self) -> Any:
        """On kafka-python's IO thread, for which the one that polls waits: makes it take what is in hand for over."""
        fetcher, in_hand, behind = self._fetcher, self._in_hand, self._behind
        state = None if behind is None else self._subscription.assignment.get(in_hand.topic_partition)
        if state is None or not state.is_fetchable():
            return self._create()
        here = state.position
        fetcher._next_partition_records, state.position = None, behind
        try:
            return self._create()
        finally:
            fetcher._next_partition_records, state.position = in_hand, here

    def _handle_response(self, node: Any, offsets: Any, sent_at: float, response: Any) -> None:
        """On kafka-python's IO thread: the partition that is in hand comes behind the others."""
        in_hand = self._in_hand
        if in_hand is not None:
            if self._is_ahead:
                self._took = time.monotonic() - sent_at
            topic, number = in_hand.topic_partition
            response.responses.sort(key=lambda found: found.topic == topic)
            for found in response.responses:
                if found.topic == topic:
                    found.partitions.sort(key=lambda one: one.partition_index == number)
        self._handle(node, offsets, sent_at, response)
