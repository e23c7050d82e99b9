"""The clients on kafka-python 3. What it does unlike other clients is written beside the line that copes with it."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

with warnings.catch_warnings():  # kafka-python 3.0 warns at its own import, which must not fail under -W error
    warnings.simplefilter("ignore", DeprecationWarning)
    from kafka import KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition

from kafka import errors as kafka_errors
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener
from kafka.partitioner import murmur2
from kafka.partitioner.sticky import StickyPartitioner
from kafka.serializer import Serializer
from kafka.structs import MemberState

from ..errors import BrokerUnavailable, ConfigurationError, DeliveryError
from ..message import HeaderPairs, Partition, Record
from ..settings import Settings
from . import CommitRefused, Offsets, Rebalance
from .complaints import displaced, gone, no_common_strategy, no_topic, session_not_allowed, without_offset
from .heap import give_back_large
from .kafka_assigning import assignors, bind
from .kafka_fetching import tell
from .kafka_opening import Door, open_client
from .kafka_options import CONSUMER, PRODUCER, client_options, in_ms
from .kafka_pacing import Pace
from .kafka_refusals import FORBIDDEN

logger = logging.getLogger(__name__)

SHORTEST_JOIN = 0.1
"""Seconds that a poll waits at least while a join is under way."""

REFUSED = (
    kafka_errors.CommitFailedError,
    kafka_errors.RebalanceInProgressError,
    kafka_errors.IllegalGenerationError,
    kafka_errors.UnknownMemberIdError,
)

AWAY = (kafka_errors.KafkaTimeoutError, kafka_errors.KafkaConnectionError, kafka_errors.RetriableError)


class _Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]
    """Runs on kafka-python's IO thread while ``poll`` waits. A sync listener could not commit there."""

    def __init__(self, consumer: Any, rebalance: Rebalance) -> None:
        self._consumer = consumer
        self._rebalance = rebalance

    async def on_partitions_assigned(self, assigned: Any) -> None:
        # What it asked about committed offsets before a rebalance, and has not looked at since, it would take for the answer to
        # the next question about the same partitions: a process that slept would go on where it was, behind all the others.
        self._consumer._coordinator._offset_fetch_futures.clear()
        self._rebalance.assigned([Partition(*partition) for partition in assigned])

    async def on_partitions_revoked(self, revoked: Any) -> None:
        offsets = self._rebalance.revoked([Partition(*partition) for partition in revoked])
        if not offsets:
            return
        try:
            await self._consumer.commit_async(_kafka_offsets(offsets))
            self._rebalance.confirmed(offsets)
        except kafka_errors.KafkaError as error:
            logger.warning("the offsets of revoked partitions were not committed; messages come again: %r", error)

    async def on_partitions_lost(self, lost: Any) -> None:
        self._rebalance.lost([Partition(*partition) for partition in lost])


def _kafka_offsets(offsets: Offsets) -> dict[Any, Any]:
    return {TopicPartition(*partition): OffsetAndMetadata(offset, "", -1) for partition, offset in offsets.items()}


class EndedWithAnother(kafka_errors.KafkaError):  # type: ignore[misc]
    """What had this error was not refused itself. When a broker refuses a message for good, kafka-python ends all that is under
    way, in every partition, and gives it the error of that one.
    """


PART_OF_A_BATCH = "part of a batch"
"""In the error of records that kafka-python ends because another one of their batch was refused."""


def _is_confirmed(delivery: Any) -> bool:
    return bool(delivery.is_done) and not delivery.failed()


class Consumer:
    """A ``ConsumerClient`` on ``KafkaConsumer``, without deserializers: an error in one makes ``poll`` spin for ever."""

    def __init__(self, settings: Settings, group: str) -> None:
        kafka = settings.kafka
        options = client_options(settings, KafkaConsumer, CONSUMER)
        options.update(
            group_id=group,
            session_timeout_ms=in_ms(kafka.session_timeout),
            heartbeat_interval_ms=in_ms(kafka.heartbeat_interval),
            max_poll_interval_ms=in_ms(kafka.max_poll_interval),
        )
        if kafka.group_instance_id is not None:
            options["group_instance_id"] = kafka.group_instance_id
        found = assignors(kafka.partition_assignment_strategy)
        if found:
            options["partition_assignment_strategy"] = found
        give_back_large()
        self._settings = kafka
        self._instance = kafka.group_instance_id
        self._door = Door()
        self._consumer = open_client(KafkaConsumer, settings, options, self._door)
        bind(found, self._consumer)
        self._poll = self._consumer.poll
        self._pace = None if "fetch_max_wait_ms" in kafka.options else Pace(self._consumer)

    def subscribe(self, topics: Sequence[str], rebalance: Rebalance) -> None:
        tell(self._consumer, rebalance)
        self._consumer.subscribe(list(topics), listener=_Listener(self._consumer, rebalance))

    def poll(self, timeout: float, most: int = 500) -> Mapping[Partition, Sequence[Record]]:
        coordinator = self._consumer._coordinator
        if coordinator.rejoining:
            # A poll that ended within a rejoin that new metadata had asked for: kafka-python would forget that one is under
            # way, never look at the answer, and be a member without partitions for ever.
            coordinator.rejoin_needed = True
            # And it throws away a join that ends between two polls, to begin another one: this one is waited for.
            timeout = max(timeout, SHORTEST_JOIN)
        try:
            records: Mapping[Partition, Sequence[Record]] = self._poll(timeout_ms=in_ms(timeout), max_records=most)
        except (kafka_errors.KafkaConnectionError, *FORBIDDEN) as error:
            raise self._door.explained(error) from error
        except kafka_errors.InvalidSessionTimeoutError as error:
            raise session_not_allowed(self._settings.session_timeout) from error
        except kafka_errors.InconsistentGroupProtocolError as error:
            raise no_common_strategy(self._settings.partition_assignment_strategy) from error
        except kafka_errors.FencedInstanceIdError as error:
            raise displaced(self._instance) from error
        except kafka_errors.OffsetOutOfRangeError as error:
            where, offset = next(iter(error.args[0].items()))
            raise gone(Partition(*where), offset, self.first_offset(Partition(*where))) from error
        except kafka_errors.NoOffsetForPartitionError as error:
            raise without_offset([Partition(*where) for where in error.args[0]]) from error
        if self._instance is not None and self._is_displaced():
            raise displaced(self._instance)
        if records:
            self._note_busy()
        return records

    def _note_busy(self) -> None:
        if self._pace is not None:
            self._pace.note()

    def _is_displaced(self) -> bool:
        # a heartbeat was answered so; kafka-python logs it, sends no more of them, and polls on for ever without being a member
        coordinator = self._consumer._coordinator
        return coordinator.state is MemberState.STABLE and not coordinator._heartbeat_enabled

    def joined(self) -> bool:
        # its state stays the same when the brokers go; what it forgets then is which of them leads the group
        stable = self._consumer.group_metadata().state is MemberState.STABLE
        return stable and self.in_touch()

    def in_touch(self) -> bool:
        return self._consumer._coordinator.coordinator_id is not None

    def commit(self, offsets: Offsets) -> None:
        try:
            self._consumer.commit(_kafka_offsets(offsets), timeout_ms=10_000)
        except REFUSED as error:
            raise CommitRefused(str(error) or type(error).__name__) from error
        except kafka_errors.FencedInstanceIdError as error:
            raise displaced(self._instance) from error
        except FORBIDDEN as error:
            raise ConfigurationError(f"Kafka refuses this application: {error}") from error
        except AWAY as error:
            raise BrokerUnavailable(f"Kafka did not take the offsets of what is finished: {error!r}") from error

    def committed(self, partition: Partition) -> int | None:
        offset: int | None = self._consumer.committed(TopicPartition(*partition), timeout_ms=10_000)
        return offset

    def membership(self) -> Any:
        member = self._consumer.group_metadata()
        # a broker takes offsets of a transaction from "no member" without a check, so it must not be asked
        if member.generation_id < 0 or not member.member_id:
            raise CommitRefused("this consumer is no longer a member of the group")
        return member

    def topic_id(self, topic: str) -> str | None:
        found = self._consumer._client.cluster.topic_id(topic)
        return str(found.hex) if found and found.int else None

    def first_offset(self, partition: Partition) -> int:
        where = TopicPartition(*partition)
        return int(self._consumer.beginning_offsets([where], timeout_ms=10_000)[where])

    def end_offset(self, partition: Partition) -> int:
        where = TopicPartition(*partition)
        return int(self._consumer.end_offsets([where], timeout_ms=10_000)[where])

    def position(self, partition: Partition) -> int | None:
        # its own position() waits for the brokers, where none is known
        state = self._consumer._subscription.assignment.get(TopicPartition(*partition))
        return None if state is None or state.position is None else int(state.position.offset)

    def pause(self, partition: Partition) -> None:
        self._note_busy()
        self._consumer.pause(TopicPartition(*partition))

    def resume(self, partition: Partition) -> None:
        where = TopicPartition(*partition)
        self._consumer.resume(where)
        # What kafka-python had parsed of a paused partition it gives only if no other partition had its turn meanwhile, else
        # never, and it fetches nothing in its place: without this it is fetched again, from its position.
        parked = self._consumer._fetcher._paused_partition_records.pop(where, None)
        if parked is not None:
            parked.drain()

    def seek(self, partition: Partition, offset: int) -> None:
        self._note_busy()
        self._consumer.seek(TopicPartition(*partition), offset)

    def missing_topics(self, topics: Sequence[str]) -> list[str]:
        try:
            present = self._consumer.topics()
        except AWAY as error:  # one that has just come back knows of no others, and not of itself
            raise BrokerUnavailable(
                f"the brokers do not say which topics there are: {type(error).__name__}"
            ) from error
        return sorted(topic for topic in topics if topic not in present)

    def close(self, timeout: float) -> None:
        self._consumer.close(autocommit=False, timeout_ms=in_ms(timeout))


class _AsItIs(Serializer):  # type: ignore[misc]
    """Lets a message with neither key nor value through, which Kafka takes and kafka-python refuses before it serializes."""

    nothing = bytes(bytearray(b"nothing"))  # known by its identity

    def serialize(self, topic: str, headers: Any, data: bytes | None) -> bytes | None:  # noqa: ARG002
        return None if data is self.nothing else data


class Producer:
    """A ``ProducerClient`` on ``KafkaProducer``."""

    tells_each = True
    has_failed = False

    def __init__(self, settings: Settings, **more: Any) -> None:
        options = {**client_options(settings, KafkaProducer, PRODUCER), **more}
        options["max_block_ms"] = in_ms(settings.connection_pool.timeout)
        options.setdefault("partitioner", StickyPartitioner())
        self._timeout = settings.connection_pool.timeout
        self._producer = open_client(KafkaProducer, settings, options)
        # not as an option: agents that watch kafka-python wrap the serializers that it is given, and expect older ones
        self._producer.config["value_serializer"] = _AsItIs()
        self._transactions = self._producer._transaction_manager
        """Also of a producer without transactions: it counts the messages, so that none is written twice."""
        self._dispatch_error = self._producer._sender._dispatch_error
        if not self._transactions.is_transactional():
            self._producer._sender._dispatch_error = self._failed

    def _failed(self, batch: Any, exception: Exception, partition_response: Any) -> None:
        """On the client's own thread: a batch has failed. If that is the end of the client, the others are to know why."""
        try:
            self._dispatch_error(batch, exception, partition_response)
        finally:
            if self.is_over and self._transactions.last_error is exception:
                self._transactions._last_error = EndedWithAnother(repr(exception))

    @property
    def is_over(self) -> bool:
        return bool(self._transactions.has_fatal_error())

    def send(
        self, topic: str, value: bytes | None, key: bytes | None, headers: HeaderPairs, partition: int | None
    ) -> Any:
        # kafka-python takes no header without a value, though its consumer gives some
        pairs = [(name, item if item is not None else b"") for name, item in headers]
        if value is None and key is None:
            value = _AsItIs.nothing
        try:
            return self._producer.send(topic, value=value, key=key, headers=pairs, partition=partition)
        except kafka_errors.KafkaTimeoutError as error:
            raise no_topic(topic, self._timeout) from error
        except kafka_errors.IllegalStateError as error:  # somebody else has just closed it, to have a new one
            raise DeliveryError(f"{topic}: this producer is closed: {error!r}", passing=True) from error
        except (kafka_errors.KafkaError, AssertionError, TypeError, ValueError) as error:
            raise DeliveryError(f"{topic}: kafka-python refuses this message: {error!r}") from error

    def flush(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                self._producer.flush(timeout=left)
                return
            except kafka_errors.KafkaTimeoutError:
                break
            except kafka_errors.KafkaError as error:  # a batch that was too large is sent again in parts
                logger.debug("flushing once more: %r", error)
                time.sleep(0.005)
        logger.warning("Kafka did not confirm every message within %g s", timeout)

    def ended(self, delivery: Any) -> bool:
        return bool(delivery.is_done)

    def outcome(self, delivery: Any) -> DeliveryError | None:
        # flush() returns None even when a delivery failed, so each one is looked at
        if not delivery.is_done:
            return DeliveryError("Kafka did not confirm the message in time", passing=True)
        if not delivery.failed():
            return None
        error = delivery.exception
        return DeliveryError(
            f"Kafka did not take the message: {error!r}",
            passing=bool(getattr(error, "retriable", False)),
            with_another=isinstance(error, EndedWithAnother) or PART_OF_A_BATCH in str(error),
        )

    def confirmed(self, deliveries: Iterable[Any]) -> int:
        return sum(1 for _ in takewhile(_is_confirmed, deliveries))

    def notify(self, delivery: Any, tell: Callable[[], None]) -> None:
        delivery.add_both(lambda _: tell())

    def partition_for(self, topic: str, key: bytes) -> int:
        try:
            count = len(self._producer.partitions_for(topic))
        except kafka_errors.KafkaTimeoutError as error:
            raise no_topic(topic, self._timeout) from error
        except kafka_errors.KafkaError as error:
            raise DeliveryError(f"{topic}: its partitions cannot be looked up: {error!r}") from error
        return int((murmur2(key) & 0x7FFFFFFF) % count)  # as Kafka's own partitioners place keys

    def close(self, timeout: float) -> None:
        try:
            self._producer.close(timeout=timeout)
        except kafka_errors.KafkaError as error:  # raised before it has ended its thread, which would go on for ever
            logger.debug("closing a producer by force: %r", error)
            self._producer._sender.force_close()


def reader(hosts: str, partitions: Sequence[Partition]) -> Any:
    """A consumer of these partitions from their beginning, without a group: for looking on."""
    consumer = KafkaConsumer(bootstrap_servers=hosts, group_id=None, **CONSUMER)
    consumer.assign([TopicPartition(*partition) for partition in partitions])
    return consumer
