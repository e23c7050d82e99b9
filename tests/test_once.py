"""No message is queued twice, and what somebody sets back on purpose is: `flowkit run`, Apache Kafka and Redis from outside.

No worker runs here. What is counted is what is in the queue of Redis. (What the consumer does turn by turn is in
test_consumer.py, the Lua call in test_jobs.py.)
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from processes import Process
from redis import Redis
from servers import ON_CONFLUENT, Kafka, MakeTopic, RedisServer, WaitFor, kafka_libs, why_not_apache_kafka
from support import messages_of

JOINED = "rebalanced group={} assigned="


class Once:
    """The application ``apps/once.py`` with a topic of its own."""

    def __init__(self, hosts: str, url: str, redis: Redis, topic: str, directory: Path, wait_for: WaitFor) -> None:
        self.hosts = hosts
        self.redis = redis
        self.topic = topic
        self.directory = directory
        self.wait_for = wait_for
        self.env = {"FLOWKIT_KAFKA_HOSTS": hosts, "FLOWKIT_REDIS": url, "ONCE_IN": topic}

    def run(self, name: str = "run", **env: str) -> Process:
        """`flowkit run`; its output goes to a file of that name."""
        environment = {**self.env, "ONCE_GATE": str(self.gate(name)), **env}
        return Process("flowkit", "run", "once:app", env=environment, log=self.directory / name)

    @contextlib.contextmanager
    def run_without_commits(self, name: str = "run", **env: str) -> Iterator[Process]:
        """The same when it has its partitions and waits for messages, and will commit only when it ends."""
        with self.run(name, **env, FLOWKIT_KAFKA_OFFSET_COMMIT_INTERVAL="600") as process:
            process.wait_for(JOINED.format(self.topic))  # what came before that would be committed in the same turn
            yield process

    def gate(self, name: str) -> Path:
        """What a process that holds a message waits for."""
        return self.directory / f"{name}.gate"

    def put(self, count: int, partition: int = 0) -> None:
        with contextlib.closing(KafkaProducer(bootstrap_servers=self.hosts, linger_ms=5)) as producer:
            sent = [producer.send(self.topic, b"%d" % number, partition=partition) for number in range(count)]
            producer.flush()
            assert all(delivery.succeeded() for delivery in sent)

    @property
    def queued(self) -> Counter[tuple[int, int]]:
        """How often each message, as partition and offset, is in the jobs of the queue."""
        counts: Counter[tuple[int, int]] = Counter()
        ids: Any = self.redis.lrange("rq:queue:default", 0, -1)
        with self.redis.pipeline(transaction=False) as pipe:
            for id_ in ids:
                pipe.hget(b"rq:job:" + id_, "data")
            for data in pipe.execute():
                counts.update(messages_of(data))
        return counts

    @property
    def count(self) -> int:
        """How many messages are in the jobs of the queue, by their ids, which is quick."""
        ids: Any = self.redis.lrange("rq:queue:default", 0, -1)
        return sum(int(id_.rsplit(b"-", 2)[1]) for id_ in ids)

    def wait_for_queued(self, count: int, timeout: float = 60) -> None:
        self.wait_for(lambda: self.count >= count, timeout, f"{count} queued messages")

    def committed(self, group: str = "", partition: int = 0) -> int | None:
        """What Kafka has as the committed offset of the group."""
        group = group or self.topic
        with contextlib.closing(KafkaAdminClient(bootstrap_servers=self.hosts)) as admin:
            found = admin.list_group_offsets(group)[group].get(TopicPartition(self.topic, partition))
        return None if found is None else int(found.offset)

    def wait_for_committed(self, offset: int, partition: int = 0) -> None:
        self.wait_for(lambda: self.committed(partition=partition) == offset, 30, f"{offset} to be committed")

    def make_topic_anew(self, partitions: int = 1) -> None:
        with contextlib.closing(KafkaAdminClient(bootstrap_servers=self.hosts)) as admin:
            admin.delete_topics([self.topic])
            self.wait_for(lambda: self.topic not in admin.list_topics(), 30, "the topic to be gone")
            admin.create_topics({self.topic: {"num_partitions": partitions, "replication_factor": 1}})
            admin.wait_for_topics([self.topic])


@pytest.fixture
def once(kafka: Kafka, topic: MakeTopic, redis: Redis, redis_url: str, tmp_path: Path, wait_for: WaitFor) -> Once:
    if not kafka.apache:
        pytest.skip("the embedded broker has no rebalances, and forgets offsets, to be relied on")
    return Once(kafka.hosts, redis_url, redis, topic("once", 2), tmp_path, wait_for)


def times(count: int, offsets: Iterable[int], partition: int = 0) -> Counter[tuple[int, int]]:
    return Counter(dict.fromkeys([(partition, offset) for offset in offsets], count))


# Not twice.


@pytest.mark.parametrize("hold", [10, 30], ids=["in its first batch", "after a batch that is not committed"])
def test_a_stalled_consumer_that_wakes_up_when_another_has_its_partitions(once: Once, hold: int) -> None:
    # Given a consumer that stands still with a batch in hand, and before it maybe one that is queued
    with once.run_without_commits("first", ONCE_HOLD=str(hold)) as first:
        once.put(40)
        first.wait_for(f"holding {hold}")
        first.signal(signal.SIGSTOP)
        count = once.queued.total()
        assert hold - 20 <= count <= hold
        assert once.queued == times(1, range(count))
        assert once.committed() is None
        # When its session is over and another one has queued everything
        with once.run("second") as second:
            once.wait_for_queued(40)
            once.wait_for_committed(40)
            # and it goes on
            once.gate("first").touch()
            first.signal(signal.SIGCONT)
            once.wait_for(lambda: first.output.count(JOINED.format(once.topic)) == 2, 60, "it to join again")
            once.put(5, 0)
            once.put(5, 1)
            once.wait_for_queued(50)
            assert first.stop() == 0
            assert second.stop() == 0
    # Then each message was queued once
    assert once.queued == times(1, range(45)) + times(1, range(5), partition=1)
    assert (once.committed(), once.committed(partition=1)) == (45, 5)


@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")], ids=" before ".join)
def test_two_consumers_that_have_the_same_messages_in_hand(once: Once, order: tuple[str, str]) -> None:
    once.put(20)
    with once.run("first", ONCE_HOLD="10") as first:
        first.wait_for("holding 10")
        first.signal(signal.SIGSTOP)
        with once.run("second", ONCE_HOLD="15") as second:
            second.wait_for("holding 15")
            assert once.queued == Counter()
            first.signal(signal.SIGCONT)
            for name in order:  # whoever is the first queues them, the other one nothing
                once.gate(name).touch()
                once.wait_for_queued(20)
            once.put(5)
            once.wait_for_queued(25)
            assert first.stop() == 0
            assert second.stop() == 0
    assert once.queued == times(1, range(25))
    assert once.committed() == 25


class Load:
    """Messages that a thread sends all the time, to each partition in turn. Used as ``with Load(...) as load``."""

    def __init__(self, hosts: str, topic: str, partitions: int) -> None:
        self.hosts = hosts
        self.topic = topic
        self.partitions = partitions
        self.sent: list[Any] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send)

    def _send(self) -> None:
        with contextlib.closing(KafkaProducer(bootstrap_servers=self.hosts)) as producer:
            while not self._ended.is_set() and len(self.sent) < 100_000:
                self.sent.append(producer.send(self.topic, b"1", partition=len(self.sent) % self.partitions))
                self._ended.wait(0.005)
            producer.flush()

    def end(self) -> int:
        """Gives how many messages were sent."""
        self._ended.set()
        self._thread.join(60)
        assert all(delivery.succeeded() for delivery in self.sent)
        return len(self.sent)

    @property
    def places(self) -> Counter[tuple[int, int]]:
        """Each message once."""
        return Counter(divmod(number, self.partitions)[::-1] for number in range(len(self.sent)))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)


def test_consumers_that_join_leave_stall_and_are_killed_under_load(
    kafka: Kafka, topic: MakeTopic, once: Once, wait_for: WaitFor
) -> None:
    once.topic = once.env["ONCE_IN"] = topic("load", 4)
    once.env["FLOWKIT_KAFKA_OFFSET_COMMIT_INTERVAL"] = "1"  # so that something queued is always uncommitted
    with Load(kafka.hosts, once.topic, 4) as load, contextlib.ExitStack() as stack:

        def goes_on(process: Process, joined: int = 1) -> None:
            """Waits until a process has partitions, and until more messages than there are now are queued."""
            joins = JOINED.format(once.topic)
            wait_for(lambda: process.output.count(joins) >= joined, what="a process to have partitions")
            once.wait_for_queued(len(load.sent) + 1)

        first = stack.enter_context(once.run("first"))
        goes_on(first)
        second = stack.enter_context(once.run("second"))  # joins while the first is in the middle
        goes_on(second)
        first.kill()  # its session runs out while the second goes on
        goes_on(second, 2)
        third = stack.enter_context(once.run("third"))
        goes_on(third)
        second.signal(signal.SIGSTOP)
        goes_on(third, 2)  # all partitions are its own now
        second.signal(signal.SIGCONT)
        goes_on(second, 3)
        assert third.stop() == 0
        goes_on(second, 4)
        count = load.end()
        once.wait_for_queued(count)
        assert second.stop() == 0
    assert once.queued == load.places
    assert sum(once.committed(partition=number) or 0 for number in range(4)) == count


def test_a_redis_that_stalls_and_answers_too_late_under_load(
    kafka: Kafka, topic: MakeTopic, tmp_path: Path, wait_for: WaitFor
) -> None:
    """The consumer gives a call up that Redis carries out all the same, later."""
    with RedisServer(tmp_path / "redis") as server, Redis.from_url(server.url) as redis:
        once = Once(kafka.hosts, f"{server.url}?socket_timeout=0.5", redis, topic("slow", 2), tmp_path, wait_for)
        assert server.process is not None
        with Load(kafka.hosts, once.topic, 2) as load, once.run() as process:
            for _ in range(4):
                once.wait_for_queued(len(load.sent) + 1)
                told = process.output.count("Redis does not answer")
                server.process.send_signal(signal.SIGSTOP)
                try:
                    wait_for(lambda told=told: process.output.count("Redis does not answer") > told)  # type: ignore[misc]
                finally:
                    server.process.send_signal(signal.SIGCONT)
            count = load.end()
            once.wait_for_queued(count)
            assert process.stop() == 0
        assert once.queued == load.places
        assert (once.committed() or 0) + (once.committed(partition=1) or 0) == count


def test_offsets_with_gaps(once: Once) -> None:
    """Where a transaction ends, an offset is taken that no message has."""
    with once.run_without_commits() as process:
        producer = KafkaProducer(bootstrap_servers=once.hosts, transactional_id=once.topic)
        with contextlib.closing(producer):
            producer.init_transactions()
            for _ in range(3):
                producer.begin_transaction()
                for _ in range(3):
                    producer.send(once.topic, b"1", partition=0)
                producer.flush()
                producer.commit_transaction()
        once.wait_for_queued(9)
        assert once.committed() is None
        process.kill()
    expected = times(1, [0, 1, 2, 4, 5, 6, 8, 9, 10])
    for offset in (12, 13):  # after a crash, and after an end in order
        with once.run() as process:
            process.wait_for(JOINED.format(once.topic))
            once.put(1)
            expected += times(1, [offset])
            once.wait_for_queued(expected.total())
            assert process.stop() == 0
    assert once.queued == expected
    assert "rewound" not in process.output


# Again on purpose.


def consumer_groups(hosts: str, *arguments: str) -> str:
    """Apache Kafka's own tool, kafka-consumer-groups.sh; gives what it prints."""
    if reason := why_not_apache_kafka():
        pytest.skip(f"Apache Kafka's tool cannot be run: {reason}")
    done = subprocess.run(
        [
            *("java", "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
            "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand",
            *("--bootstrap-server", hosts, *arguments),
        ],
        env={**os.environ, "CLASSPATH": f"{kafka_libs()}/*"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.stdout


def queue_all(once: Once, count: int) -> None:
    """Messages are put, queued and committed, and the consumer is stopped."""
    once.put(count)
    with once.run() as process:
        once.wait_for_queued(count)
        once.wait_for_committed(count)
        assert process.stop() == 0
    assert once.queued == times(1, range(count))


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        (("--reset-offsets", "--to-earliest", "--execute", "--all-topics"), 0),
        (("--reset-offsets", "--shift-by", "-4", "--execute", "--all-topics"), 26),
        (("--delete",), 0),
    ],
    ids=["to the earliest", "by some messages", "the group deleted"],
)
def test_a_group_set_back_by_kafkas_own_tool_queues_again(once: Once, arguments: tuple[str, ...], first: int) -> None:
    queue_all(once, 30)
    said = consumer_groups(once.hosts, "--group", once.topic, *arguments)
    with once.run() as process:
        process.wait_for("rewound")
        once.wait_for_queued(60 - first)
        once.wait_for_committed(30)
        assert process.stop() == 0
    again = times(1, range(30)) + times(1, range(first, 30))
    assert once.queued == again, said
    # and no more than that once
    with once.run() as process:
        once.put(1)
        once.wait_for_queued(again.total() + 1)
        assert process.stop() == 0
    assert once.queued == again + times(1, [30])


def test_kafkas_own_tool_sets_no_group_back_that_has_a_consumer(once: Once) -> None:
    """So a rewind is always seen at the start of a consumer, when it is given its partitions."""
    once.put(10)
    with once.run() as process:
        once.wait_for_queued(10)
        once.wait_for_committed(10)
        what = ("--reset-offsets", "--to-earliest", "--execute", "--all-topics")
        said = consumer_groups(once.hosts, "--group", once.topic, *what)
        assert "only be reset if the group" in said
        assert process.stop() == 0
    assert once.committed() == 10


def test_a_rewind_after_a_crash_before_the_first_commit_needs_the_marks_deleted(once: Once) -> None:
    """The crash alone looks the same: that is why they are kept."""
    with once.run_without_commits() as process:
        once.put(30)
        once.wait_for_queued(30)
        process.kill()
    what = ("--reset-offsets", "--to-earliest", "--execute", "--topic", once.topic)
    said: list[str] = []

    def is_set_back() -> bool:  # refused until the session of the killed one is over
        said.append(consumer_groups(once.hosts, "--group", once.topic, *what))
        return once.committed() == 0

    once.wait_for(is_set_back, 40, "the group to be set back")
    once.redis.delete(f"flowkit:marks:{once.topic}")
    with once.run() as process:
        once.wait_for_queued(60)
        assert process.stop() == 0
    assert once.queued == times(2, range(30)), said


def test_a_new_group_queues_all_again(once: Once) -> None:
    queue_all(once, 30)
    with once.run(ONCE_GROUP=f"{once.topic}-new") as process:
        once.wait_for_queued(60)
        once.wait_for(lambda: once.committed(f"{once.topic}-new") == 30)
        assert process.stop() == 0
    assert once.queued == times(2, range(30))


# Topics made anew.

ANEW = pytest.mark.parametrize("count", [10, 50], ids=["with fewer messages", "with more messages"])


@ANEW
def test_a_topic_made_anew_while_no_consumer_runs(once: Once, count: int) -> None:
    queue_all(once, 30)
    once.make_topic_anew()
    once.put(count)
    with once.run() as process:
        once.wait_for_queued(30 + count)
        once.wait_for_committed(count)
        assert process.stop() == 0
    assert once.queued == times(1, range(30)) + times(1, range(count))


@ANEW
def test_a_topic_made_anew_while_a_consumer_runs(once: Once, count: int) -> None:
    if ON_CONFLUENT and count > 30:
        pytest.skip(
            "librdkafka reads on in the new topic; that it is another one is known seconds later: see docs/kafka.md"
        )
    once.put(30)
    with once.run() as process:
        once.wait_for_queued(30)
        once.wait_for_committed(30)
        once.make_topic_anew()
        once.put(count)
        once.wait_for_queued(30 + count)
        once.wait_for_committed(count)
        assert process.stop() == 0
    assert once.queued == times(1, range(30)) + times(1, range(count))


@ANEW
def test_a_topic_made_anew_after_a_crash_before_the_first_commit(once: Once, count: int) -> None:
    with once.run_without_commits() as process:
        once.put(30)
        once.wait_for_queued(30)
        assert once.committed() is None
        process.kill()
    once.make_topic_anew()
    once.put(count)
    with once.run() as process:
        once.wait_for_queued(30 + count)
        assert process.stop() == 0
    assert once.queued == times(1, range(30)) + times(1, range(count))


@ANEW
def test_a_topic_made_anew_just_before_the_last_commit(once: Once, count: int) -> None:
    """Kafka takes the commit, which is one of the old topic, for the new one."""
    with once.run_without_commits() as process:
        once.put(30)
        once.wait_for_queued(30)
        assert once.committed() is None
        process.signal(signal.SIGSTOP)  # it does not see that happen
        once.make_topic_anew()
        process.signal(signal.SIGTERM)
        process.signal(signal.SIGCONT)
        assert process.wait() == 0
    once.put(count)
    with once.run() as process:
        once.wait_for_queued(30 + count)
        assert process.stop() == 0
    assert once.queued == times(1, range(30)) + times(1, range(count))
