"""Topics with the fixed names that examples have, empty at the start of a test: a shared broker may hold an older run's."""

from __future__ import annotations

import contextlib
import time

from kafka import KafkaAdminClient
from servers import Kafka

from flowkit.errors import DevStackError


def renew_topics(kafka: Kafka, *names: str, timeout: float = 30) -> None:
    """Deletes those of the topics that exist, and makes all anew, with one partition each."""
    deadline = time.monotonic() + timeout
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=kafka.hosts, bootstrap_timeout_ms=10_000)) as admin:
        if old := set(names).intersection(admin.list_topics()):
            admin.delete_topics(sorted(old))
        while left := old.intersection(admin.list_topics()):
            assert time.monotonic() < deadline, f"Kafka did not delete {sorted(left)}"
            time.sleep(0.02)
    for name in names:
        _create(kafka, name, deadline)


def _create(kafka: Kafka, name: str, deadline: float) -> None:
    while True:
        try:
            return kafka.create_topic(name)
        except DevStackError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)  # its name is still that of the deleted one
