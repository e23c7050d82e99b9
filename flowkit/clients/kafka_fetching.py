"""What kafka-python 3.0 does where it cannot go on reading a partition, made to be told: a record that cannot be read, and one
that the broker does not have.

kafka-python itself never returns from the poll after a record that it cannot parse, and says nothing of what it passes over
when its position is out of range. This reaches into its internals, and is to be looked at again with another version of it.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from functools import partial
from math import inf
from typing import Any
from weakref import WeakKeyDictionary

from kafka import errors as kafka_errors
from kafka.consumer.fetcher import Fetcher
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.memory_records import MemoryRecords
from kafka.structs import OffsetAndMetadata

from ..message import Partition
from . import Rebalance, Unreadable
from .kafka_refusals import FORBIDDEN

MAGIC = 2
"""The format of records, of which a batch says where it ends."""


def tell(consumer: Any, rebalance: Rebalance) -> None:
    """Makes the ``poll`` of a ``KafkaConsumer`` raise ``Unreadable``, after which it may be called again, and tell what it
    passes over, maybe on its IO thread.
    """
    _tell_unreadable(consumer._fetcher)
    _tell_moved(consumer._fetcher, rebalance)


def _tell_unreadable(fetcher: Any) -> None:
    fetcher.PartitionRecords = partial(_Records, fetcher._subscriptions)
    parse, subscriptions = fetcher._parse_fetched_data, fetcher._subscriptions

    def parsed(fetch: Any) -> Any:
        state = subscriptions.assignment.get(fetch.topic_partition)
        if state is None or state.position is None or state.position.offset != fetch.fetched_offset:
            return None  # it was asked for before a seek: what is wrong with it is of no concern
        try:
            return parse(fetch)
        except (kafka_errors.OffsetOutOfRangeError, *FORBIDDEN):
            raise
        except Exception as error:
            raise Unreadable(Partition(*fetch.topic_partition), fetch.fetched_offset, None, error) from error

    fetcher._parse_fetched_data = parsed


class _Batches:
    """The batches of one fetch. The one that was given last is kept, to be asked where it ends."""

    def __init__(self, records: Any) -> None:
        self._records = records
        self.size: int = records.size_in_bytes()
        self.last: Any = None
        self._asked: tuple[float, int] | None = None

    def next_batch(self) -> Any:
        self.last = self._records.next_batch()
        return self.last

    def seconds_left(self) -> float:
        """Until their end, by how long those have taken that were given since this was asked for the first time: when messages
        are taken from here, they are not handled yet. kafka-python's place is one batch ahead.
        """
        if self._records._next_slice is None:  # what may stand behind is a part of a batch
            return 0.0
        now, at = time.monotonic(), self._records._pos
        began, first = self._asked = self._asked or (now, at)
        return (now - began) / (at - first) * (self.size - at) if at > first else inf

    def end(self) -> Any:
        """The position behind all of them, as kafka-python writes it; None where they do not say it."""
        last, buffer, end = self._records._next_slice, self._records._buffer, self._records._pos
        while end + MemoryRecords.LOG_OVERHEAD <= len(buffer):
            (length,) = struct.unpack_from(">i", buffer, end + MemoryRecords.LENGTH_OFFSET)
            following = end + MemoryRecords.LOG_OVERHEAD + length
            if length <= 0 or following > len(buffer):  # a part of one
                break
            last, end = memoryview(buffer)[end:following], following
        if last is not None:
            is_whole = len(last) >= DefaultRecordBatch.HEADER_STRUCT.size
            batch = DefaultRecordBatch(last) if is_whole and last[MemoryRecords.MAGIC_OFFSET] == MAGIC else None
        else:
            batch = self.last if getattr(self.last, "magic", None) == MAGIC else None
        return None if batch is None else OffsetAndMetadata(batch.next_offset, "", batch.leader_epoch)


class _Records(Fetcher.PartitionRecords):  # type: ignore[misc]
    """The records of one fetch from one partition. After an error there are no more of them: they are fetched again."""

    def __init__(self, subscriptions: Any, *arguments: Any, **options: Any) -> None:
        self._subscriptions = subscriptions
        super().__init__(*arguments, **options)

    def _unpack_records(self, where: Any, records: Any, *deserializers: Any) -> Iterator[Any]:
        self.batches = _Batches(records)
        unpacked: Iterator[Any] = super()._unpack_records(where, self.batches, *deserializers)
        return unpacked

    def take(self, n: int | None = None) -> list[Any]:
        try:
            taken: list[Any] = super().take(n)
        except Exception as error:
            offset, following = self.next_fetch_offset, getattr(self.batches.last, "next_offset", None)
            highwater = self._subscriptions.assignment[self.topic_partition].highwater
            if following is not None and not offset < following <= (highwater or 0):
                following = None  # it is broken too
            self.drain()  # else the next poll asks it for more, gets nothing, asks it for more ...
            raise Unreadable(Partition(*self.topic_partition), offset, following, error) from error
        return taken


def _tell_moved(fetcher: Any, rebalance: Rebalance) -> None:
    subscriptions = fetcher._subscriptions
    request, reset = subscriptions.request_offset_reset, fetcher._reset_offset_if_needed
    left: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # by the state of an assigned partition, and gone with it

    def requested(where: Any, *strategy: Any) -> None:
        state = subscriptions.assignment[where]
        if state.position is not None:
            left[state] = state.position.offset
        request(where, *strategy)

    def done(where: Any, timestamp: Any, offset: int) -> None:
        reset(where, timestamp, offset)
        state = subscriptions.assignment.get(where)
        if state is not None and state.position is not None and (before := left.pop(state, None)) is not None:
            rebalance.moved(Partition(*where), before, state.position.offset)

    subscriptions.request_offset_reset = requested
    fetcher._reset_offset_if_needed = done
