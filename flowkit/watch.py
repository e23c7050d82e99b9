"""What arrives in topics, seen from outside, as any other consumer would."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from .clients.kafka_python import reader
from .message import Partition

Show = Callable[[str, str], None]


class Watcher:
    """Reads ``topics``, given with their partitions, from their beginning without a group; calls ``show(topic, value)``,
    and counts.

    ``at_once`` is how many messages of a topic are shown at a time, ``in_all`` how many altogether (None: no limit).
    """

    def __init__(
        self,
        hosts: str,
        topics: Mapping[str, int],
        show: Show,
        *,
        at_once: int = 10,
        in_all: int | None = None,
    ) -> None:
        self._consumer: Any = reader(
            hosts, [Partition(topic, p) for topic, count in topics.items() for p in range(count)]
        )
        self._show = show
        self._at_once = at_once
        self._in_all = in_all
        self.counts: Counter[str] = Counter()
        self.last: dict[str, float] = {}

    def look(self, timeout: float = 0.1) -> None:
        """Shows what has arrived; waits for it up to ``timeout`` seconds."""
        for partition, records in self._consumer.poll(timeout_ms=int(timeout * 1000)).items():
            topic = partition.topic
            left = len(records) if self._in_all is None else max(0, self._in_all - self.counts[topic])
            shown = records[: min(left, self._at_once)]
            for record in shown:
                self._show(topic, _text(record.value))
            if self._in_all is None and len(records) > len(shown):
                self._show(topic, f"... and {len(records) - len(shown)} more")
            self.counts[topic] += len(records)
            self.last[topic] = time.monotonic()

    def close(self) -> None:
        self._consumer.close(autocommit=False, timeout_ms=1_000)


def _text(value: bytes | None, width: int = 120) -> str:
    text = "(no value)" if value is None else value.decode(errors="backslashreplace")
    return text if len(text) <= width else text[: width - 3] + "..."
