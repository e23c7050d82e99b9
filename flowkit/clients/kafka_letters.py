"""Dead-letter topics read from their beginning up to where they end now, by kafka-python, without a group."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

with warnings.catch_warnings():  # kafka-python 3.0 warns at its own import, which must not fail under -W error
    warnings.simplefilter("ignore", DeprecationWarning)
    from kafka import KafkaConsumer, TopicPartition

from kafka import errors as kafka_errors

from ..errors import BrokerUnavailable, ConfigurationError
from ..message import Partition, Record
from ..settings import Settings
from .kafka_admin import Cluster
from .kafka_opening import open_client
from .kafka_options import CONSUMER, client_options
from .kafka_refusals import FORBIDDEN

SILENCE = 15.0
"""Seconds without anything new after which a broker counts as gone."""


class Letterbox:
    """The records that are in some topics at the moment when this is made. Used as ``with Letterbox(...) as box``.

    ``partitions`` has the number of partitions of each topic that exists. Every method raises ``BrokerUnavailable`` where no
    broker answers in time, and ``ConfigurationError`` where one refuses.
    """

    def __init__(self, settings: Settings, topics: Collection[str]) -> None:
        with Cluster(settings) as cluster:
            self.partitions = {name: state.partitions for name, state in cluster.topics(topics).items()}
        self._hosts = ", ".join(settings.kafka.hosts)
        options = client_options(settings, KafkaConsumer, CONSUMER)
        options.update(group_id=None, isolation_level="read_committed")
        self._consumer = open_client(KafkaConsumer, settings, options)
        places = [TopicPartition(name, number) for name, count in self.partitions.items() for number in range(count)]
        with self._errors():
            self._starts = self._consumer.beginning_offsets(places, timeout_ms=10_000) if places else {}
            self._ends = self._consumer.end_offsets(places, timeout_ms=10_000) if places else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close(autocommit=False)

    def read(self, starts: Mapping[Partition, int] | None = None) -> Iterator[Record]:
        """Every record, or those of the partitions in ``starts`` from there on; in order within a partition."""
        begin = self._starts if starts is None else {TopicPartition(*place): at for place, at in starts.items()}
        ends = {place: self._ends[place] for place, at in begin.items() if at < self._ends.get(place, 0)}
        heard = time.monotonic()
        positions = {place: max(begin[place], self._starts[place]) for place in ends}
        with self._errors():
            self._consumer.assign(list(ends))
            self._consumer.resume(*ends)  # those of an earlier reading
            for place, at in positions.items():
                self._consumer.seek(place, at)
        while ends:
            with self._errors():
                batch = self._consumer.poll(timeout_ms=200)
            for place, records in batch.items():
                for record in records:
                    if record.offset < ends.get(place, 0):
                        yield record
            with self._errors():
                now = {place: self._consumer.position(place, timeout_ms=10_000) for place in ends}
                for place in [place for place in ends if now[place] >= ends[place]]:
                    del ends[place]
                    self._consumer.pause(place)
            if now != positions:
                heard, positions = time.monotonic(), now
            elif time.monotonic() - heard > SILENCE:
                raise BrokerUnavailable(
                    f"Kafka at {self._hosts} gave nothing for {SILENCE:g} s; are its brokers running?"
                )

    @contextmanager
    def _errors(self) -> Iterator[Any]:
        try:
            yield
        except FORBIDDEN as error:
            raise ConfigurationError(f"Kafka at {self._hosts} refuses this application: {error}") from error
        except kafka_errors.KafkaError as error:
            raise BrokerUnavailable(
                f"Kafka at {self._hosts} does not answer as it should: {error or type(error).__name__}"
            ) from error
