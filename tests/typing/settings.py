"""Settings and retries are typed, and read only. Checked by mypy only; an ignore that is not needed is an error there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_type

from flowkit import Retry, Settings
from flowkit.settings import Kafka

settings = Settings(name="shop", kafka=Kafka(hosts=("a:1",)))
assert_type(settings.name, str)
assert_type(settings.retry, Retry)
assert_type(settings.kafka.ssl.ca_cert, str | None)
assert_type(settings.kafka.options, Mapping[str, Any])

settings.name = "other"  # type: ignore[misc]
settings.kafka.partitions = 3  # type: ignore[misc]
settings.retry.attempts = 3  # type: ignore[misc]

Settings("shop")  # type: ignore[call-arg]
Settings(nme="shop")  # type: ignore[call-arg]
Kafka(hosts=9092)  # type: ignore[arg-type]
Retry(3)  # type: ignore[call-arg]
Retry(attempts="3")  # type: ignore[arg-type]
