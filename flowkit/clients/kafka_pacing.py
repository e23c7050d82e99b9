"""When kafka-python 3.0 asks the brokers for more, and how long they may hold what it asks.

kafka-python has one fetch under way with a broker at a time, and the broker holds one that finds its partitions empty. What it
has in hand of a partition it does not ask for meanwhile: at the end of that, the busiest partition waits for the empty ones,
and then for its own messages, while nothing is handled. Here the fetch that asks for the others asks also for what is behind
the messages in hand, and is not held.

This reaches into kafka-python's internals, and is to be looked at again with another version of it.
"""

from __future__ import annotations

import time
from typing import Any

GAP, GAP_FOR_EACH, LONGEST_GAP = 0.02, 0.001, 0.5
"""Seconds between two fetches while the same messages are in hand: at least, for each partition that is assigned, and at most.
What they bring has its turn when those are over, so they need not be sent in each poll: that takes some microseconds for each
partition, and a way to kafka-python's IO thread and back.
"""

BUSY_WAIT, IDLE_AFTER = 10, 1.0
"""Milliseconds that a broker may hold a fetch where messages came within so many seconds, or a partition is paused: one that
goes on, or back, may not be in the fetch that is under way.
"""

IDLE_WAIT, LONGEST_IDLE_WAIT, FOR_EACH = 100, 500, 0.5
"""Milliseconds otherwise, since each fetch costs a processor something: at least, at most, and for each partition."""


class Pace:
    """That of one ``KafkaConsumer``, from when it is made on."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._assignment = consumer._subscription.assignment
        self._fetcher = fetcher = consumer._fetcher
        self._in_hand: Any = None
        self._behind: Any = None
        """The position behind what is in hand, if that was as much as a fetch gives: else there was no more."""
        self._next = 0.0
        self._came_at = time.monotonic()
        self._send, self._create = fetcher.send_fetches, fetcher._create_fetch_requests
        fetcher.send_fetches, fetcher._create_fetch_requests = self._send_fetches, self._create_requests

    def note_records(self) -> None:
        """Messages have come."""
        self._came_at = time.monotonic()

    def _send_fetches(self) -> Any:
        """Called by kafka-python in a poll, unless there is more fetched than what is in hand."""
        now = time.monotonic()
        in_hand = self._fetcher._next_partition_records or None
        if in_hand is not self._in_hand:
            self._in_hand, self._next = in_hand, now
            self._behind = (
                None if in_hand is None else in_hand.end(self._fetcher.config["max_partition_fetch_bytes"] // 2)
            )
        if in_hand is None:
            self._fetcher.config["fetch_max_wait_ms"] = self._wait(now)
            return self._send()
        if now < self._next:
            return []
        self._next = now + min(max(GAP, GAP_FOR_EACH * len(self._assignment)), LONGEST_GAP)
        self._fetcher.config["fetch_max_wait_ms"] = 0
        return self._send()

    def _wait(self, now: float) -> int:
        if now < self._came_at + IDLE_AFTER or self._consumer.paused():
            return BUSY_WAIT
        return int(min(max(IDLE_WAIT, FOR_EACH * len(self._assignment)), LONGEST_IDLE_WAIT))

    def _create_requests(self) -> Any:
        """On kafka-python's IO thread, for which the one that polls waits: makes it take what is in hand for over."""
        fetcher, in_hand, behind = self._fetcher, self._in_hand, self._behind
        state = None if behind is None else self._assignment.get(in_hand.topic_partition)
        if state is None or not state.is_fetchable():
            return self._create()
        here = state.position
        fetcher._next_partition_records, state.position = None, behind
        try:
            return self._create()
        finally:
            fetcher._next_partition_records, state.position = in_hand, here
