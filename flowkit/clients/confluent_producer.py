"""Sending, in transactions or not, on confluent-kafka, which is librdkafka."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from operator import length_hint
from queue import Empty, SimpleQueue
from typing import Any

from kafka.partitioner import murmur2

from ..errors import ConfigurationError, DeliveryError
from ..message import HeaderPairs
from ..settings import Settings
from . import LONGEST_REQUEST, CommitRefused, InDoubt, Offsets
from .complaints import displaced, id_refused, no_topic, no_transactions, time_not_allowed
from .confluent_deliveries import UNKNOWN, Deliveries, Delivery
from .confluent_options import PRODUCER, confluent_options
from .confluent_trouble import FORBIDDEN, NO_TOPIC, REFUSED, Trouble, confluent_kafka
from .kafka_options import in_ms

logger = logging.getLogger(__name__)

METADATA_AGE = 30.0
"""Seconds after which a topic is looked up anew."""

KafkaError, KafkaException = confluent_kafka.KafkaError, confluent_kafka.KafkaException
TopicPartition = confluent_kafka.TopicPartition

NO_FAULT_OF_THE_MESSAGE = {
    KafkaError._MSG_TIMED_OUT,
    KafkaError._TIMED_OUT,
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._PURGE_QUEUE,
    KafkaError._PURGE_INFLIGHT,
    KafkaError._FATAL,
    KafkaError._FENCED,
    KafkaError._STATE,
    KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER,
    KafkaError.UNKNOWN_PRODUCER_ID,
    KafkaError.INVALID_PRODUCER_EPOCH,
    KafkaError.INVALID_PRODUCER_ID_MAPPING,
    KafkaError.INVALID_TXN_STATE,
    KafkaError.PRODUCER_FENCED,
    KafkaError.NOT_ENOUGH_REPLICAS,
    KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.KAFKA_STORAGE_ERROR,
    KafkaError.NETWORK_EXCEPTION,
    *NO_TOPIC,
}

FAILED = (KafkaException, SystemError, TimeoutError)
"""What confluent-kafka 2 raises from a call that calls back, a ``SystemError`` where it did so with an error raised; and what
is raised here for one that does not come back.
"""

LATE = 1.0
"""Seconds beyond its time that a call is waited for. ``send_offsets_to_transaction`` of librdkafka 2.16 was still under way
half a minute after the broker had been killed in it and was back, with a time-out of 5 s.
"""


def _call(function: Callable[..., Any], *arguments: Any, deadline: float) -> None:
    """Calls it with the seconds that are left as its last argument. Raises ``TimeoutError`` if it does not come back."""
    left = max(0.001, deadline - time.monotonic())
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def call() -> None:
        try:
            function(*arguments, left)
        except BaseException as error:  # raised below
            ended.put(error)
        else:
            ended.put(None)

    threading.Thread(target=call, name="flowkit-transaction", daemon=True).start()
    try:
        error = ended.get(timeout=left + LATE)
    except Empty:
        raise TimeoutError(f"librdkafka has not come back within {left + LATE:.1f} s") from None
    if error is not None:
        raise error


def _cause(error: BaseException) -> Any:
    """The ``KafkaError`` of either, or what there is."""
    found = error.__cause__ if isinstance(error, SystemError) else error
    return found.args[0] if isinstance(found, KafkaException) else found or error


class Producer:
    """A ``ProducerClient`` on librdkafka's producer.

    ``tells_each`` is whether confluent-kafka calls back for a message that Kafka has confirmed, which takes as long as to send
    it. Else it does for those that Kafka refuses only, and the others are known to be confirmed when none is under way.
    """

    def __init__(self, settings: Settings, *, tells_each: bool = True, **more: Any) -> None:
        options = {**confluent_options(settings, PRODUCER), "delivery.report.only.error": not tells_each, **more}
        self._timeout = settings.connection_pool.timeout
        self._trouble = Trouble(settings)
        self._producer = self._trouble.opened(confluent_kafka.Producer, options)
        self._partitions: dict[str, int] = {}
        self._known_until = 0.0
        self.tells_each = tells_each
        self.has_failed = False
        self.apart: deque[Delivery] | None = deque()
        """Those to be sent again by themselves; None where they cannot be."""
        self._started = self.drained = 0
        """The number of the last message that was started, and of one up to which all have ended. A message has its number when
        librdkafka has it, not before.
        """
        self._serving: threading.Thread | None = None
        self._lock, self._one_by_one = threading.Lock(), threading.Lock()
        self._waiting: list[tuple[Delivery, Callable[[], None]]] = []
        self.fatal: Any = None
        """Why it is of no more use."""
        self._closed = False

    def _number(self) -> int:
        with self._lock:
            self._started += 1
            return self._started

    def _note_drained(self, started: int) -> None:
        """``started``: the number of the last message when it was asked whether any is under way, and none was."""
        if self.fatal is None:
            with self._lock:
                self.drained = max(self.drained, started)

    def send(
        self, topic: str, value: bytes | None, key: bytes | None, headers: HeaderPairs, partition: int | None
    ) -> Delivery:
        if topic not in self._partitions or time.monotonic() > self._known_until:
            self._count(topic)
        number = -1 if partition is None else partition
        delivery = Delivery(self, topic, value, key, number, headers)
        if headers:
            self._start(delivery)
            return delivery
        try:
            self._producer.produce(topic, value, key, number, delivery.end)
            delivery.number = self._number()
        except (BufferError, KafkaException, TypeError, ValueError):
            self._start(delivery)  # which waits, or says what is wrong
        return delivery

    def send_together(self, topic: str, values: Sequence[bytes | None]) -> Deliveries:
        if topic not in self._partitions or time.monotonic() > self._known_until:
            self._count(topic)
        found = Deliveries(self, topic, values)
        produce, end = self._producer.produce, found.end
        rest = iter(values)
        while length_hint(rest):
            try:
                for value in rest:
                    produce(topic, value, None, -1, end)
            except (BufferError, KafkaException, TypeError, ValueError):
                at = len(values) - length_hint(rest) - 1
                try:
                    self._start(found.alone(at, values[at]))  # which waits, or says what is wrong
                except DeliveryError as error:
                    found.end_before(at, error)
                    break
        found.number = self._number()
        return found

    def _start(self, delivery: Delivery) -> None:
        topic, deadline = delivery.topic, 0.0
        message = topic, delivery.value, delivery.key, delivery.partition, delivery.end
        while True:
            try:
                self._producer.produce(*message, headers=[*delivery.headers])
                delivery.number = self._number()
                return
            except BufferError as error:  # it holds as many as it may
                deadline = deadline or time.monotonic() + self._timeout
                self._served(self._producer.poll, 0.01)
                if time.monotonic() > deadline:
                    raise DeliveryError(f"{topic}: Kafka is too slow: {error}", passing=True) from error
            except KafkaException as error:
                if error.args[0].code() == KafkaError._FATAL:
                    self.fatal = error.args[0]
                raise self._problem(f"{topic}: librdkafka refuses this message", error.args[0]) from error
            except (TypeError, ValueError) as error:
                raise DeliveryError(f"{topic}: confluent-kafka refuses this message: {error!r}") from error

    def _problem(self, what: str, error: Any) -> DeliveryError:
        passing = error.retriable() or error.code() in NO_FAULT_OF_THE_MESSAGE
        return DeliveryError(f"{what}: {error.name()}: {error.str()}", passing=passing)

    def _count(self, topic: str) -> int:
        """The number of its partitions. librdkafka would make a topic that does not exist, or find out half a minute later."""
        known = self._partitions.get(topic, 0)
        if known and time.monotonic() < self._known_until:
            return known
        try:
            topics = self._producer.list_topics(timeout=self._timeout).topics  # of one topic alone, it would make it
        except KafkaException as error:
            if known:  # else each message would wait as long
                self._known_until = time.monotonic() + self._timeout
                return known
            raise no_topic(topic, self._timeout) from error
        self._known_until = time.monotonic() + METADATA_AGE
        self._partitions = {name: len(found.partitions) for name, found in topics.items() if found.partitions}
        if topic not in self._partitions:
            raise no_topic(topic, self._timeout)
        return self._partitions[topic]

    def flush(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        left = self._flushed(timeout)
        with self._one_by_one:  # also to wait for those that another thread sends again
            while self.apart and not left:
                self._start_alone(self.apart.popleft())
                left = self._flushed(max(0.0, deadline - time.monotonic()))
        if left:
            logger.warning("Kafka did not confirm every message within %g s", timeout)

    def _flushed(self, timeout: float) -> int:
        started = self._started
        left = self._served(self._producer.flush, timeout)
        if not left:
            self._note_drained(started)
        return left

    def _served(self, call: Callable[[float], int], timeout: float) -> int:
        """What a call gives that calls back for deliveries. After an error that is the end of this client, none more are told:
        confluent-kafka 2 raises it, or a ``SystemError`` because it has called back with it.
        """
        if self.fatal is not None:
            return 0
        try:
            return call(timeout)
        except FAILED as error:
            self.fatal = _cause(error)
            logger.warning("this producer is of no more use: %s", self.fatal)
            return 0
        except BaseException as error:
            if (
                not self.tells_each
            ):  # it may have interrupted a call that tells of a failure: what has ended well is not known
                self.fatal = error
            raise

    def _start_alone(self, delivery: Delivery) -> None:
        """Again, but by itself."""
        delivery.alone, delivery.number = True, UNKNOWN
        delivery.waits = False
        try:
            self._start(delivery)
        except DeliveryError as error:
            delivery.end(error, None)

    def ended(self, delivery: Delivery | Deliveries) -> bool:
        if not delivery.is_done:
            self._serve_now()
            if self.apart:
                self.flush(self._timeout)
        return delivery.is_done or delivery.client.is_over

    def outcome(self, delivery: Delivery | Deliveries) -> DeliveryError | None:
        if not delivery.is_done:
            end = delivery.client.fatal
            why = f": {end}" if end is not None else " in time"
            return DeliveryError(f"Kafka did not confirm the message{why}", passing=True)
        if delivery.error is None:
            return None
        if isinstance(delivery.error, DeliveryError):
            return delivery.error
        return self._problem("Kafka did not take the message", delivery.error)

    def confirmed(self, deliveries: Iterable[Delivery | Deliveries]) -> int:
        self._serve_now()
        return sum(1 for _ in takewhile(lambda one: one.is_done and one.error is None, deliveries))

    def _serve_now(self, timeout: float = 0) -> None:
        self._served(self._producer.poll, timeout)
        started = self._started
        if not len(self._producer):
            self._note_drained(started)

    def notify(self, delivery: Delivery, tell: Callable[[], None]) -> None:
        with self._lock:
            if not delivery.is_done and not self.is_over:
                self._waiting.append((delivery, tell))
                if self._serving is None:  # librdkafka tells nothing by itself
                    self._serving = threading.Thread(target=self._serve, name="flowkit-deliveries", daemon=True)
                    self._serving.start()
                return
        tell()

    @property
    def is_over(self) -> bool:
        return self._closed or self.fatal is not None

    def _serve(self) -> None:
        """Tells of deliveries that have ended, and at the end of those that have not."""
        over = False
        while not over:
            over = self.is_over
            self._serve_now(0.01 if self._waiting else 0.1)
            if self.apart:
                self.flush(self._timeout)
            with self._lock:
                waiting, self._waiting = self._waiting, []
                ended: list[tuple[Delivery, Callable[[], None]]] = []
                for one, tell in waiting:
                    (ended if over or one.is_done else self._waiting).append((one, tell))
            for _, tell in ended:
                tell()

    def partition_for(self, topic: str, key: bytes) -> int:
        return int((murmur2(key) & 0x7FFFFFFF) % self._count(topic))  # as Kafka's own partitioners place keys

    def close(self, timeout: float) -> None:
        if self._flushed(timeout):
            self._producer.purge()
            self._served(self._producer.flush, 0)
        self._closed = True


class TransactionalProducer(Producer):
    """A ``TransactionalClient`` on librdkafka's producer. Making one ends what another with the same id has left open.

    Raises ``ConfigurationError`` where the brokers refuse transactions, ``BrokerUnavailable`` where they do not answer.
    """

    def __init__(self, settings: Settings, transactional_id: str) -> None:
        self.longest = longest = settings.kafka.transaction_timeout
        self._instance = settings.kafka.group_instance_id
        options = confluent_options(settings, PRODUCER)
        super().__init__(
            settings,
            tells_each=False,
            **{
                "transactional.id": transactional_id,
                "transaction.timeout.ms": in_ms(longest),
                # beyond its own time a transaction is void, whatever comes of its messages
                "request.timeout.ms": min(options["request.timeout.ms"], in_ms(longest * LONGEST_REQUEST)),
                "delivery.timeout.ms": min(options["delivery.timeout.ms"], in_ms(longest)),
                "socket.timeout.ms": min(options["socket.timeout.ms"], in_ms(longest)),
            },
        )
        self.apart = None  # the transaction is void then, and tried again without the message
        try:
            self._producer.init_transactions(longest)
        except KafkaException as error:
            problem = error.args[0]
            if problem.code() == KafkaError.INVALID_TRANSACTION_TIMEOUT:
                raise time_not_allowed(longest) from error
            if problem.code() == KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED:
                raise id_refused(transactional_id) from error
            if problem.code() in FORBIDDEN:
                raise ConfigurationError(f"Kafka refuses this application: {problem.str()}") from error
            raise no_transactions(longest) from error

    def begin(self) -> None:
        try:
            self._producer.begin_transaction()
        except FAILED as error:
            raise DeliveryError(
                f"Kafka takes no transaction of this client: {_cause(error)}", passing=True
            ) from error

    def flush(self, timeout: float) -> None:
        super().flush(min(timeout, self.longest))

    def commit(self, offsets: Offsets, membership: Any) -> None:
        deadline = time.monotonic() + self.longest
        self._send_offsets(offsets, membership, deadline)
        try:
            _call(self._producer.commit_transaction, deadline=deadline)
        except FAILED as error:  # whatever it was: the request was on its way
            raise InDoubt(str(_cause(error))) from error

    def _send_offsets(self, offsets: Offsets, membership: Any, deadline: float) -> None:
        places_ = [TopicPartition(*partition, offset) for partition, offset in offsets.items()]
        try:
            _call(self._producer.send_offsets_to_transaction, places_, membership, deadline=deadline)
        except FAILED as error:
            problem = _cause(error)
            if isinstance(problem, KafkaError):
                if problem.code() in REFUSED:
                    raise CommitRefused(problem.str()) from error
                if problem.code() == KafkaError.FENCED_INSTANCE_ID:
                    raise displaced(self._instance) from error
                if problem.code() in FORBIDDEN:
                    raise ConfigurationError(f"Kafka refuses this application: {problem.str()}") from error
            raise DeliveryError(
                f"Kafka did not take the offsets of the transaction: {problem}", passing=True
            ) from error
