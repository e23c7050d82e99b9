"""The consumer client on confluent-kafka, which is librdkafka. What that does unlike other clients is written beside the line
that copes with it.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from operator import ne
from typing import Any, overload

from ..errors import BrokerUnavailable, ConfigurationError
from ..message import HeaderPairs, Partition, Record
from ..settings import Settings
from . import CommitRefused, Offsets, Rebalance, Unreadable
from .complaints import displaced, gone, without_offset
from .confluent_options import consumer_options, is_cooperative
from .confluent_trouble import NO_TOPIC, REFUSED, Trouble, confluent_kafka

logger = logging.getLogger(__name__)

TIMEOUT = 10.0
"""Seconds that one question to the brokers may take."""

COORDINATOR = re.compile(r'"GroupCoordinator":\s*\{.*?"state":\s*"(\w+)"')

LOOK_EVERY = 5.0
"""Seconds between questions for what tells a topic from a later one of the same name."""

KafkaError, KafkaException = confluent_kafka.KafkaError, confluent_kafka.KafkaException
OFFSET_STORED, TopicPartition = confluent_kafka.OFFSET_STORED, confluent_kafka.TopicPartition
ERROR, VALUE = confluent_kafka.Message.error, confluent_kafka.Message.value
TOPIC, NUMBER = confluent_kafka.Message.topic, confluent_kafka.Message.partition

BROKEN = {KafkaError._BAD_MSG, KafkaError._BAD_COMPRESSION, KafkaError._NOT_IMPLEMENTED, KafkaError.INVALID_MSG}


class ConfluentRecord:
    """A ``Record``: a message of confluent-kafka, whose parts are made when they are asked for."""

    __slots__ = ("_message",)

    def __init__(self, message: Any) -> None:
        self._message = message

    @property
    def topic(self) -> str:
        return self._message.topic()  # type: ignore[no-any-return]

    @property
    def partition(self) -> int:
        return self._message.partition()  # type: ignore[no-any-return]

    @property
    def offset(self) -> int:
        return self._message.offset()  # type: ignore[no-any-return]

    @property
    def timestamp(self) -> int:
        return self._message.timestamp()[1]  # type: ignore[no-any-return]

    @property
    def key(self) -> bytes | None:
        return self._message.key()  # type: ignore[no-any-return]

    @property
    def value(self) -> bytes | None:
        return self._message.value()  # type: ignore[no-any-return]

    @property
    def headers(self) -> HeaderPairs:
        return self._message.headers() or ()


class Records(Sequence[Record]):
    """Messages of one partition. A record is made of each when it is asked for."""

    __slots__ = ("_messages",)

    def __init__(self, messages: list[Any]) -> None:
        self._messages = messages

    @property
    def parts(self) -> tuple[list[Any], Any]:
        """As ``quick`` asks for them: a value is made when it is its turn, in memory that the one before has just left."""
        return self._messages, VALUE

    def __len__(self) -> int:
        return len(self._messages)

    def __iter__(self) -> Iterator[Record]:
        return map(ConfluentRecord, self._messages)

    @overload
    def __getitem__(self, at: int) -> Record: ...
    @overload
    def __getitem__(self, at: slice) -> Records: ...
    def __getitem__(self, at: int | slice) -> Record | Records:
        if isinstance(at, slice):
            return Records(self._messages[at])
        return ConfluentRecord(self._messages[at])


def _partition(where: Any) -> Partition:
    return Partition(where.topic, where.partition)


def _partition_of(message: Any) -> Partition:
    return Partition(message.topic(), message.partition())


def _places(offsets: Offsets) -> list[Any]:
    return [TopicPartition(*partition, offset) for partition, offset in offsets.items()]


class Consumer:
    """A ``ConsumerClient`` on librdkafka's consumer."""

    def __init__(self, settings: Settings, group: str) -> None:
        options = consumer_options(settings, group)
        self._instance = settings.kafka.group_instance_id
        self._reset = str(settings.kafka.options.get("auto_offset_reset", "earliest"))
        if self._reset not in ("earliest", "latest", "none"):
            raise ConfigurationError(
                f"kafka.auto_offset_reset: expected one of earliest, latest, none, got {self._reset!r}"
            )
        self._cooperative = is_cooperative(options)
        self._trouble = Trouble(settings)
        callbacks = {"stats_cb": self._look, "on_commit": self._on_commit}
        self._consumer = self._trouble.opened(confluent_kafka.Consumer, {**options, **callbacks})
        self._options = options
        self._admin: Any = None
        self._rebalance: Rebalance | None = None
        self._topics = 0
        self._joined = False
        self._given_up = False
        self._in_touch = True
        self._at: dict[Partition, int] = {}
        self._paused: set[Partition] = set()
        self._broken: dict[Partition, Unreadable] = {}
        self._begun: Offsets = {}
        """The commit that is under way."""
        self._failed: Exception | None = None
        """Why it is the end of this client."""
        self._ids: dict[str, str | None] = {}
        self._asked: dict[str, Any] = {}
        self._ask_at = 0.0

    # The group.

    def subscribe(self, topics: Sequence[str], rebalance: Rebalance) -> None:
        self._rebalance = rebalance
        self._topics = len(topics)
        self._consumer.subscribe(
            list(topics), on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )

    def _on_assign(self, _: Any, assigned: Sequence[Any]) -> None:
        assert self._rebalance is not None
        if self._given_up:
            return
        partitions = [_partition(where) for where in assigned]
        committed = self._offsets(partitions)
        if (without := [partition for partition, at in committed.items() if at is None]) and self._reset == "none":
            raise without_offset(without)
        starts = {
            p: self._ends(p)[0 if self._reset == "earliest" else 1] if at is None else at
            for p, at in committed.items()
        }
        found = [TopicPartition(*partition, at) for partition, at in starts.items()]
        (self._consumer.incremental_assign if self._cooperative else self._consumer.assign)(found)
        self._at.update(starts)
        self._joined = True
        self._rebalance.assigned(partitions)

    def _on_revoke(self, consumer: Any, revoked: Sequence[Any]) -> None:
        assert self._rebalance is not None
        if self._given_up:
            return
        if not consumer.memberid():  # a rebalance had asked for them before, and found nobody that polls
            self._on_lost(consumer, revoked)
            return
        partitions = [_partition(where) for where in revoked]
        offsets = self._rebalance.revoked(partitions)
        if offsets and not self._given_up:
            try:
                self._look_at_commit(self._commit(offsets))  # another thread's would wait until this callback is over
                self._rebalance.confirmed(offsets)
            except CommitRefused as error:
                logger.warning("the offsets of revoked partitions were not committed; messages come again: %s", error)
        self._forget(partitions)

    def _on_lost(self, _: Any, lost: Sequence[Any]) -> None:
        assert self._rebalance is not None
        if self._given_up:
            return
        self._joined = False
        partitions = [_partition(where) for where in lost]
        self._rebalance.lost(partitions)
        self._forget(partitions)

    def _forget(self, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            self._at.pop(partition, None)
            self._paused.discard(partition)
            self._broken.pop(partition, None)

    def joined(self) -> bool:
        return self._joined and self._in_touch

    def in_touch(self) -> bool:
        return self._in_touch

    def _look(self, text: str) -> None:
        """Sees in librdkafka's figures whether it is connected to the broker that leads the group."""
        found = COORDINATOR.search(text)
        self._in_touch = found is None or found[1] == "UP"

    def membership(self) -> Any:
        found = self._consumer.consumer_group_metadata()
        # brokers take offsets from "no member" unchecked, so whether this was one is asked afterwards
        if not self._joined or not self._consumer.memberid():
            raise CommitRefused("this consumer is no longer a member of the group")
        return found

    # Messages.

    def poll(self, timeout: float, most: int = 500) -> Mapping[Partition, Sequence[Record]]:
        if self._broken:
            self._tell_broken()
        if self._failed is not None:
            raise self._failed
        # consume() waits until it has as many as it may give, or its time is over: it is asked only for what is there already
        first = self._consumer.poll(timeout)
        if first is None:
            return {}
        rest = self._consumer.consume(most - 1, 0) if most > 1 else ()
        if not rest and first.error() is None:
            return self._alone(first)
        messages = [first, *rest]
        errors: list[Any] = []
        if any(map(ERROR, messages)):
            messages, errors = self._parted(messages)
        found = self._by_partition(messages)
        if not all(map(self._at.__contains__, found)):  # they left while the rest was given
            found = {partition: records for partition, records in found.items() if partition in self._at}
        for partition, records in found.items():
            self._at[partition] = records[-1].offset + 1
        if errors:
            self._look_at(errors)
        if not found:
            self._tell_broken()
        return found

    def _alone(self, message: Any) -> dict[Partition, Sequence[Record]]:
        """One that came by itself, as they do where few come: a third of what it takes with all the rest of ``poll``."""
        partition = _partition_of(message)
        if partition not in self._at:
            return {}
        self._at[partition] = message.offset() + 1
        return {partition: Records([message])}

    def _by_partition(self, messages: list[Any]) -> dict[Partition, Sequence[Record]]:
        """They come in runs of one partition; where one ends is found without a line of Python for each message."""
        if not messages:
            return {}
        numbers = list(map(NUMBER, messages))
        topics = list(map(TOPIC, messages)) if self._topics > 1 else []
        if topics and topics.count(topics[0]) == len(topics):
            topics = []  # where to look for an end within one takes longer
        if not topics and numbers.count(numbers[0]) == len(numbers):
            return {_partition_of(messages[0]): Records(messages)}
        ends = bytearray(map(ne, numbers, islice(numbers, 1, None)))
        if topics:
            ends = bytearray(map(max, ends, map(ne, topics, islice(topics, 1, None))))
        found: dict[Partition, list[Any]] = {}
        begin = 0
        while begin < len(messages):
            end = ends.find(1, begin) + 1 or len(messages)
            found.setdefault(_partition_of(messages[begin]), []).extend(messages[begin:end])
            begin = end
        return {partition: Records(run) for partition, run in found.items()}

    def _parted(self, messages: list[Any]) -> tuple[list[Any], list[Any]]:
        """The messages, and those that stand for an error. What comes behind a record that cannot be read comes again."""
        good: list[Any] = []
        errors: list[Any] = []
        for message in messages:
            error, offset = message.error(), message.offset()
            partition = _partition_of(message)
            if error is None:
                if partition not in self._broken:
                    good.append(message)
            elif error.code() in BROKEN and offset is not None and offset >= 0:
                self._broken.setdefault(partition, Unreadable(partition, offset, None, KafkaException(error)))
            else:
                errors.append(message)
        return good, errors

    def _look_at(self, errors: list[Any]) -> None:
        """Raises those that are the end of this client."""
        anew: dict[Partition, int] = {}
        for message in errors:
            error, offset = message.error(), message.offset()
            if error.code() == KafkaError._AUTO_OFFSET_RESET:
                partition = _partition_of(message)
                at = self._at.get(partition)
                if (
                    at is not None
                ):  # of another offset it may be an old one: if ours is not there either, that is said next
                    anew[partition] = self._where_to_go_on(partition, at) if at == offset else at
            elif error.code() in NO_TOPIC:
                logger.debug("%s", error)  # who consumes it says so
            elif self._is_displaced(error):
                raise displaced(self._instance)
            else:
                self._trouble.met(error)
        self._place(anew)

    def _is_displaced(self, error: Any) -> bool:
        fatal = error.code() == KafkaError._FATAL and "group.instance.id" in error.str()
        return fatal or error.code() == KafkaError.FENCED_INSTANCE_ID

    def _tell_broken(self) -> None:
        """Raises what could not be read, if anything; after the messages that stand before it were given."""
        if self._broken:
            partition = next(iter(self._broken))
            broken = self._broken.pop(partition)
            self.seek(partition, broken.offset)
            raise broken

    def _where_to_go_on(self, partition: Partition, offset: int) -> int:
        """In a partition that does not have this offset. Raises ``MessagesGone`` where it may not choose."""
        first, end = self._ends(partition)
        if self._reset == "none":
            raise gone(partition, offset, first)
        after = first if self._reset == "earliest" else end
        if self._rebalance is not None:
            self._rebalance.moved(partition, offset, after)
        return after

    def _place(self, anew: Mapping[Partition, int]) -> None:
        """Lets partitions go on from there that stand still after an error, which ``seek`` cannot."""
        assigned = {_partition(where) for where in self._consumer.assignment()} if anew else set()
        places_ = [TopicPartition(*partition, offset) for partition, offset in anew.items() if partition in assigned]
        if not places_:
            return
        self._at.update({_partition(where): where.offset for where in places_})
        if self._cooperative:
            self._consumer.incremental_unassign(places_)
            self._consumer.incremental_assign(places_)
        else:
            others = assigned - anew.keys()
            kept = [TopicPartition(*partition, self._at.get(partition, OFFSET_STORED)) for partition in others]
            self._consumer.assign([*places_, *kept])
        for partition in self._paused & assigned:
            self._consumer.pause([TopicPartition(*partition)])

    def position(self, partition: Partition) -> int | None:
        return self._at.get(partition)

    def pause(self, partition: Partition) -> None:
        self._paused.add(partition)
        self._consumer.pause([TopicPartition(*partition)])

    def resume(self, partition: Partition) -> None:
        self._paused.discard(partition)
        self._consumer.resume([TopicPartition(*partition)])

    def seek(self, partition: Partition, offset: int) -> None:
        if partition in self._at:
            self._at[partition] = offset
        try:
            self._consumer.seek(TopicPartition(*partition, offset))
        except KafkaException as error:
            if error.args[0].code() != KafkaError._STATE:  # it has not begun yet, or stands still after an error
                raise
            self._place({partition: offset})

    # Offsets.

    def commit(self, offsets: Offsets) -> None:
        self._begun = {}  # whatever becomes of it
        answers: list[list[Any]] = []

        def commit() -> None:
            try:
                answers.append(self._commit(offsets))
            except RuntimeError as error:  # this client was closed meanwhile
                logger.debug("a commit that was not waited for any more: %s", error)

        # librdkafka waits for the brokers as long as it likes
        committing = threading.Thread(target=commit, name="flowkit-committing", daemon=True)
        committing.start()
        committing.join(TIMEOUT)
        if not answers:
            raise BrokerUnavailable(f"Kafka did not take the offsets of what is finished within {TIMEOUT:g} s")
        self._look_at_commit(answers[0])

    def begin_commit(self, offsets: Offsets) -> None:
        try:
            self._consumer.commit(offsets=_places(offsets), asynchronous=True)
        except KafkaException as error:
            self._look_at_commit([error.args[0]])  # which raises
        self._begun = dict(offsets)

    def _on_commit(self, error: Any, answers: Sequence[Any] | None) -> None:
        """Called back within a poll: a commit has ended. That may be one that was waited for, which is no concern of this."""
        offsets = {_partition(where): where.offset for where in answers or ()}
        if not self._begun or offsets != self._begun or self._given_up or self._rebalance is None:
            return
        self._begun = {}
        # what has left since did so with what was committed then
        errors = {
            _partition(one): one.error if error is None else error
            for one in answers or ()
            if _partition(one) in self._at
        }
        self._rebalance.confirmed({partition: offsets[partition] for partition, one in errors.items() if one is None})
        refused = {partition: offsets[partition] for partition, one in errors.items() if one is not None}
        try:
            self._look_at_commit([one for one in errors.values() if one is not None])
        except CommitRefused as refusal:
            self._rebalance.refused(refused, refusal)
        except Exception as problem:  # raised in the next poll: librdkafka could not hand it on
            self._failed = problem

    def _commit(self, offsets: Offsets) -> list[Any]:
        """The errors, if any."""
        try:
            answers = self._consumer.commit(offsets=_places(offsets), asynchronous=False)
        except KafkaException as error:
            return [error.args[0]]
        return [answer.error for answer in answers if answer.error is not None]

    def _look_at_commit(self, errors: list[Any]) -> None:
        for error in errors:
            if error.code() in REFUSED:
                raise CommitRefused(error.str())
            if self._is_displaced(error):
                raise displaced(self._instance)
            self._trouble.met(error)
            raise BrokerUnavailable(f"Kafka did not take the offsets of what is finished: {error.str()}")

    def committed(self, partition: Partition) -> int | None:
        return self._offsets([partition])[partition]

    def _offsets(self, partitions: Sequence[Partition]) -> dict[Partition, int | None]:
        """What is committed. While a transaction that may still move an offset is open, that is not known, and waited for."""
        wanted = [TopicPartition(*partition) for partition in partitions]
        until = time.monotonic() + TIMEOUT
        while True:
            with self._trouble.named():
                found = self._consumer.committed(wanted, timeout=TIMEOUT) if wanted else []
            errors = [where.error for where in found if where.error is not None]
            if not errors:
                return {_partition(where): where.offset if where.offset >= 0 else None for where in found}
            if time.monotonic() > until:
                raise BrokerUnavailable(f"Kafka does not say what is committed: {errors[0].str()}")
            time.sleep(0.1)

    def first_offset(self, partition: Partition) -> int:
        return self._ends(partition)[0]

    def end_offset(self, partition: Partition) -> int:
        return self._ends(partition)[1]

    def _ends(self, partition: Partition) -> tuple[int, int]:
        with self._trouble.named():
            first, end = self._consumer.get_watermark_offsets(TopicPartition(*partition), timeout=TIMEOUT)
        return first, end

    # Topics.

    def topic_id(self, topic: str) -> str | None:
        """As of some seconds ago: only an admin client may ask, and its answers are not waited for, but for the first one."""
        if self._asked:
            self._admin.poll(0)
            for name in [name for name, answer in self._asked.items() if answer.done()]:
                self._note_id(name, self._asked.pop(name))
        if topic not in self._ids:
            self._ids[topic] = None
            self._ask([topic])
            self._note_id(topic, self._asked.pop(topic))
        elif time.monotonic() >= self._ask_at and not self._asked:
            self._ask(list(self._ids))
        return self._ids[topic]

    def _ask(self, topics: list[str]) -> None:
        if self._admin is None:
            from confluent_kafka.admin import AdminClient

            self._admin = AdminClient(self._trouble.common(self._options))
        self._ask_at = time.monotonic() + LOOK_EVERY
        self._asked.update(
            self._admin.describe_topics(confluent_kafka.TopicCollection(topics), request_timeout=TIMEOUT)
        )

    def _note_id(self, topic: str, answer: Any) -> None:
        try:
            found = b64decode(f"{answer.result().topic_id}==", "-_")
            self._ids[topic] = found.hex() if any(found) else None  # as other clients write it
        except KafkaException as error:
            if error.args[0].code() in NO_TOPIC:
                self._ids[topic] = None
            else:
                logger.debug("what tells %s from a later topic of its name is not known now: %s", topic, error)

    def missing_topics(self, topics: Sequence[str]) -> list[str]:
        with self._trouble.named():
            present = self._consumer.list_topics(timeout=TIMEOUT).topics
        return sorted(topic for topic in topics if topic not in present)

    def close(self, timeout: float) -> None:
        # librdkafka waits for the brokers as long as it likes
        closing = threading.Thread(target=self._close, name="flowkit-closing", daemon=True)
        closing.start()
        closing.join(timeout)
        self._given_up = True  # whoever it would tell may have another client by then

    def _close(self) -> None:
        try:
            self._consumer.close()
        except RuntimeError as error:  # it was closed before
            logger.debug("%s", error)
        except Exception as error:
            logger.warning("leaving the group failed, which will miss this member later: %r", error)
