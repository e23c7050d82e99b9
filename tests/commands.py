"""The ``flowkit`` command as a user calls it, and what is in a topic afterwards."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kafka import KafkaConsumer, TopicPartition
from processes import APPS, program

NOBODY = "127.0.0.1:1"
"""Where no server listens: connecting is refused at once."""


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str


def command(
    name: str,
    *arguments: str,
    cwd: Path = APPS,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    timeout: float = 60,
) -> Done:
    """Runs a command to its end, without the variables of flowkit that the tests themselves may have been given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLOWKIT_")}
    done = subprocess.run(
        [program(name), *arguments],
        cwd=cwd,
        # A module that a test writes anew within a second and at the same size would be taken from its bytecode.
        env={**inherited, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def flowkit(*arguments: str, **options: Any) -> Done:
    """The script that pip installs."""
    return command("flowkit", *arguments, **options)


def python(*arguments: str, **options: Any) -> Done:
    return command(sys.executable, *arguments, **options)


def read_topic(hosts: str, topic: str, count: int, timeout: float = 60) -> list[Any]:
    """Waits for ``count`` messages of a topic, and gives all there are then, by partition and offset."""
    with contextlib.closing(KafkaConsumer(bootstrap_servers=hosts, auto_offset_reset="earliest")) as consumer:
        numbers = consumer.partitions_for_topic(topic) or set()
        consumer.assign([TopicPartition(topic, number) for number in sorted(numbers)])
        found: list[Any] = []
        deadline = time.monotonic() + timeout
        while len(found) < count:
            if time.monotonic() > deadline:
                values = [record.value for record in found]
                raise AssertionError(f"{topic} has {len(found)} of {count} messages after {timeout:g} s: {values}")
            for records in consumer.poll(timeout_ms=100).values():
                found += records
    return sorted(found, key=lambda record: (record.partition, record.offset))
