"""The consumer's guarantees on a real broker: failures, stops, rebalances, and brokers that come and go."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from commands import flowkit, read_topic
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from processes import Process
from servers import CLIENT, ApacheKafka, Kafka, MakeTopic, WaitFor, why_not_apache_kafka

from flowkit import Flowkit, Settings
from flowkit.clients import MakeConsumer
from flowkit.clients.opening import consumer_client, producer_client
from flowkit.consumer import Consumer
from flowkit.producer import Producer

SASL_PROPERTIES = """
listeners=PLAINTEXT://{host}:{port},SASL_PLAINTEXT://{host}:{sasl_port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{port},SASL_PLAINTEXT://{host}:{sasl_port}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT
sasl.enabled.mechanisms=PLAIN
listener.name.sasl_plaintext.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
user_ann="right";
"""


class Guarded:
    """The application ``guarded`` with topics and notes of its own."""

    def __init__(self, hosts: str, directory: Path, topic: str, out: str | None = None) -> None:
        self.hosts = hosts
        self.directory = directory
        self.topic = topic
        self.notes = directory / "notes"
        self.log = directory / "log"
        self.env = {
            "FLOWKIT_KAFKA_HOSTS": hosts,
            "GUARDED_NOTES": str(self.notes),
            "GUARDED_IN": topic,
            "GUARDED_OUT": out or f"{topic}-out",
        }

    def run(self, **env: str) -> Process:
        return Process("flowkit", "run", "guarded:app", env={**self.env, **env}, log=self.log)

    def file(self, name: str) -> Path:
        return self.directory / name

    def put(self, *orders: Any, partition: int = 0) -> None:
        """Numbers, or dicts with more to say."""
        with contextlib.closing(KafkaProducer(bootstrap_servers=self.hosts, linger_ms=5)) as producer:
            for order in orders:
                value = order if isinstance(order, Mapping) else {"n": order}
                producer.send(self.topic, json.dumps(value).encode(), partition=partition)
            producer.flush()

    def noted(self, what: str = "end", pid: int | None = None) -> list[int]:
        text = self.notes.read_text() if self.notes.exists() else ""
        words = [line.split() for line in text.rpartition("\n")[0].splitlines()]  # the last one may be half written
        return [int(number) for who, did, number in words if did == what and (pid is None or int(who) == pid)]

    def committed(self, partition: int = 0) -> int | None:
        with contextlib.closing(
            KafkaConsumer(bootstrap_servers=self.hosts, group_id=self.topic, enable_auto_commit=False)
        ) as consumer:
            offset: int | None = consumer.committed(TopicPartition(self.topic, partition))
            return offset


@pytest.fixture
def apache(kafka: Kafka) -> Kafka:
    if not kafka.apache:
        pytest.skip("the embedded broker has no rebalances, and forgets offsets, to be relied on")
    return kafka


@pytest.fixture
def guarded(apache: Kafka, topic: MakeTopic, tmp_path: Path) -> Guarded:
    return Guarded(apache.hosts, tmp_path, topic("guarded", 2))


# Failures.


def test_the_broker_has_the_offset_of_the_failing_message(guarded: Guarded, wait_for: WaitFor) -> None:
    # Given a message in the middle of a partition that cannot be handled yet
    repair = guarded.file("repair")
    guarded.put(0, 1, {"n": 2, "repair": str(repair)}, 3, 4)
    guarded.put(10, 11, partition=1)
    with guarded.run() as process:
        # When it has failed a few times
        wait_for(lambda: len(guarded.noted("fail")) >= 3)
        wait_for(lambda: guarded.committed() is not None and guarded.committed(1) == 2)
        # Then the broker has its offset, and the other partition has gone on
        assert guarded.committed() == 2
        assert sorted(guarded.noted()) == [0, 1, 10, 11]
        # When it can be handled, then the rest follows, and nothing was repeated
        repair.touch()
        wait_for(lambda: guarded.committed() == 5)
        assert process.stop() == 0
    assert sorted(guarded.noted()) == [0, 1, 2, 3, 4, 10, 11]
    assert "partition 0 of" in process.output
    assert "ValueError: 2 is broken" in process.output


def test_a_response_to_a_missing_topic_is_named_and_its_message_kept(
    apache: Kafka, guarded: Guarded, wait_for: WaitFor
) -> None:
    out = guarded.env["GUARDED_OUT"]
    guarded.put({"n": 0, "respond": True}, 1)
    with guarded.run(FLOWKIT_CONNECTION_POOL_TIMEOUT="1") as process:
        process.wait_for(f"DeliveryError: the topic '{out}' does not exist on the brokers")
        process.wait_for(
            f"there is no topic '{out}' on the brokers; handlers send to it: create it (`flowkit topics --create`)"
        )
        assert guarded.committed() in (None, 0)
        apache.create_topic(out)
        wait_for(lambda: guarded.committed() == 2)
        assert process.stop() == 0
    assert [json.loads(record.value) for record in read_topic(apache.hosts, out, 1)] == [{"n": 0, "padding": ""}]
    assert guarded.noted()[-1] == 1


def test_a_response_that_kafka_refuses_for_good_leads_to_a_dead_letter(
    apache: Kafka, topic: MakeTopic, small_topic: MakeTopic, tmp_path: Path, wait_for: WaitFor
) -> None:
    out, dead = small_topic("answers"), topic("dead")
    guarded = Guarded(apache.hosts, tmp_path, topic("guarded", 2), out)
    guarded.put({"n": 0, "respond": True}, {"n": 1, "respond": True, "size": 1_000}, {"n": 2, "respond": True})
    # Then the message whose response is too large becomes a dead letter, and the others are answered
    with guarded.run(GUARDED_DEAD=dead) as process:
        wait_for(lambda: guarded.committed() == 3)
        assert process.stop() == 0
    letters = read_topic(apache.hosts, dead, 1)
    assert [json.loads(record.value)["n"] for record in letters] == [1]
    reason = dict(letters[0].headers)["kafka_dlt-exception-message"]
    assert b"MessageSizeTooLarge" in reason or b"MSG_SIZE_TOO_LARGE" in reason
    assert {json.loads(record.value)["n"] for record in read_topic(apache.hosts, out, 2)} == {0, 2}


def test_among_many_answers_those_that_kafka_refuses_lead_to_dead_letters(
    apache: Kafka, topic: MakeTopic, small_topic: MakeTopic, tmp_path: Path, wait_for: WaitFor
) -> None:
    name, out, dead = topic("many", 2), small_topic("answers", 2), topic("dead")
    # Given 2,000 messages, of which two have an answer that is too large
    guarded = Guarded(apache.hosts, tmp_path, name, out)
    large = {700, 1_501}
    for partition in range(2):
        numbers = range(partition, 2_000, 2)
        guarded.put(*({"n": n, "size": 1_000 if n in large else 10} for n in numbers), partition=partition)
    env = {**guarded.env, "ANSWERING_DEAD": dead}
    with Process("flowkit", "run", "answering:app", env=env, log=guarded.log) as process:
        wait_for(lambda: (guarded.committed(), guarded.committed(1)) == (1_000, 1_000), 60)
        assert process.stop() == 0
    # Then those two become dead letters, once each, and all others are answered
    assert {json.loads(record.value)["n"] for record in read_topic(apache.hosts, dead, 2)} == large
    with contextlib.closing(KafkaConsumer(bootstrap_servers=apache.hosts)) as consumer:
        count = sum(consumer.end_offsets([TopicPartition(out, number) for number in range(2)]).values())
    answers = {json.loads(record.value)["n"] for record in read_topic(apache.hosts, out, count)}
    assert answers == set(range(2_000)) - large


def test_an_answer_that_is_not_valid_in_its_topic_is_the_only_one_to_become_a_dead_letter(
    apache: Kafka, topic: MakeTopic, compacted_topic: MakeTopic, tmp_path: Path, wait_for: WaitFor
) -> None:
    """A broker refuses a batch for it, and clients send it in the same batch again."""
    out, dead = compacted_topic("answers"), topic("dead")
    guarded = Guarded(apache.hosts, tmp_path, topic("keyed", 2), out)
    for partition in range(2):
        numbers = range(partition, 200, 2)
        guarded.put(
            *({"n": n, "size": 10} | ({} if n == 100 else {"key": f"{n}"}) for n in numbers), partition=partition
        )
    env = {**guarded.env, "ANSWERING_DEAD": dead}
    with Process("flowkit", "run", "answering:app", env=env, log=guarded.log) as process:
        wait_for(lambda: (guarded.committed(), guarded.committed(1)) == (100, 100), 60)
        assert process.stop() == 0
    assert [json.loads(record.value)["n"] for record in read_topic(apache.hosts, dead, 1)] == [100]
    answers = {json.loads(record.value)["n"] for record in read_topic(apache.hosts, out, 199)}
    assert answers == set(range(200)) - {100}


# Stopping.


def test_a_stop_finishes_the_message_in_hand_and_leaves_the_rest(guarded: Guarded, wait_for: WaitFor) -> None:
    gate = guarded.file("gate")
    guarded.put(0, 1, 2, {"n": 3, "gate": str(gate)}, *range(4, 10))
    with guarded.run() as first:
        wait_for(lambda: 3 in guarded.noted("begin"))
        first.signal(signal.SIGTERM)
        first.wait_for("SIGTERM, finishing the messages in hand")
        assert first.popen.poll() is None
        gate.touch()
        assert first.wait() == 0
    assert guarded.noted() == [0, 1, 2, 3]
    assert guarded.committed() == 4
    with guarded.run() as second:
        wait_for(lambda: len(guarded.noted()) >= 10)
        assert second.stop() == 0
    assert guarded.noted() == list(range(10))
    assert guarded.committed() == 10


def test_a_second_signal_ends_at_once(guarded: Guarded, wait_for: WaitFor) -> None:
    guarded.put(0, {"n": 1, "gate": str(guarded.file("never"))})
    with guarded.run() as process:
        wait_for(lambda: 1 in guarded.noted("begin"))
        process.signal(signal.SIGINT)
        process.wait_for("SIGINT, finishing the messages in hand")
        sent = time.monotonic()
        process.signal(signal.SIGTERM)
        assert process.wait() == 1
        assert time.monotonic() - sent < 2
    assert "SIGTERM again, ending at once; unfinished messages come again" in process.output
    assert guarded.committed() in (None, 0, 1)


def test_a_stop_that_takes_too_long_says_where_it_is_stuck(guarded: Guarded, wait_for: WaitFor) -> None:
    guarded.put(0, {"n": 1, "gate": str(guarded.file("never"))})
    with guarded.run(FLOWKIT_SHUTDOWN_TIMEOUT="0.5") as process:
        wait_for(lambda: 1 in guarded.noted("begin"))
        assert process.stop(timeout=10) == 1
    assert "did not end within shutdown_timeout (0.5 s); its message comes again. It is at:" in process.output
    assert "guarded.py" in process.output
    assert "in handle" in process.output
    assert guarded.committed() in (None, 0, 1)


# Rebalances.


def test_nothing_is_lost_while_consumers_join_and_leave_under_load(
    apache: Kafka, topic: MakeTopic, tmp_path: Path, wait_for: WaitFor
) -> None:
    partitions = 4
    guarded = Guarded(apache.hosts, tmp_path, topic("load", partitions))
    ended = threading.Event()
    sent: list[int] = []

    def load() -> None:
        with contextlib.closing(KafkaProducer(bootstrap_servers=apache.hosts)) as producer:
            while not ended.is_set() and len(sent) < 100_000:
                number = len(sent)
                producer.send(guarded.topic, b'{"n": %d}' % number, partition=number % partitions)
                sent.append(number)
                ended.wait(0.001)
            producer.flush()

    def places(process: Process) -> set[int]:
        """The partitions a process has handled messages of."""
        return {number % partitions for number in guarded.noted(pid=process.pid)}

    thread = threading.Thread(target=load)
    with guarded.run() as first:
        thread.start()
        try:
            wait_for(lambda: places(first) == set(range(partitions)))
            with guarded.run() as second:
                wait_for(lambda: len(places(second)) == 2)  # range: half of them each
                assert first.stop() == 0
                wait_for(lambda: places(second) == set(range(partitions)))
                with guarded.run() as third:
                    wait_for(lambda: len(places(third)) == 2)
                    ended.set()
                    thread.join(60)
                    wait_for(lambda: len(set(guarded.noted())) == len(sent))
                    assert second.stop() == 0
                    assert third.stop() == 0
        finally:
            ended.set()
            thread.join(60)
    counts = Counter(guarded.noted())
    assert sorted(counts) == sent
    assert max(counts.values()) == 1  # everybody left in order, so nothing came twice
    assert sum(guarded.committed(partition) or 0 for partition in range(partitions)) == len(sent)


QUICK = '{"heartbeat_interval": 0.3}'


def test_a_handler_longer_than_max_poll_interval_completes_once_and_is_committed(
    guarded: Guarded, wait_for: WaitFor
) -> None:
    gate = guarded.file("gate")
    guarded.put(0, {"n": 1, "gate": str(gate)}, 2)
    guarded.put(10, partition=1)
    with guarded.run(FLOWKIT_KAFKA_MAX_POLL_INTERVAL="2") as process:
        process.wait_for("longer than kafka.max_poll_interval (2 s): its partitions are kept meanwhile")
        process.wait_for("in handle")
        began = time.monotonic()
        guarded.put(11, partition=1)
        wait_for(lambda: time.monotonic() > began + 4)  # three times max_poll_interval in all
        assert 11 not in guarded.noted()  # what is paused waits
        gate.touch()
        wait_for(lambda: guarded.committed() == 3 and guarded.committed(1) == 2)
        guarded.put(3)
        wait_for(lambda: guarded.committed() == 4)
        assert process.stop() == 0
    assert Counter(guarded.noted("begin")) == Counter([0, 1, 2, 3, 10, 11])
    assert sorted(guarded.noted()) == [0, 1, 2, 3, 10, 11]
    for trouble in ("lost", "commit came too late", "Traceback"):
        assert trouble not in process.output


def test_another_member_that_joins_while_a_handler_takes_long_gets_its_partitions_soon(
    guarded: Guarded, wait_for: WaitFor
) -> None:
    gate = guarded.file("gate")
    guarded.put(0, {"n": 1, "gate": str(gate)}, 2)
    with guarded.run(FLOWKIT_KAFKA_MAX_POLL_INTERVAL="3", FLOWKIT_NAME="a", GUARDED_OPTIONS=QUICK) as process:
        wait_for(lambda: 1 in guarded.noted("begin"))
        # When another one joins, whose name comes later, and so gets the partition that comes later
        with guarded.run(FLOWKIT_NAME="b", GUARDED_OPTIONS=QUICK) as other:
            guarded.put(10, partition=1)
            wait_for(lambda: 10 in guarded.noted("end", other.pid))  # it need not wait for the handler
            gate.touch()
            # Then the first one has kept the message in hand, and the rest of its partition
            wait_for(lambda: guarded.committed() == 3)
            assert guarded.noted("begin", process.pid) == [0, 1, 2]
            assert guarded.noted("begin", other.pid) == [10]
            assert other.stop() == 0
        guarded.put(11, partition=1)
        wait_for(lambda: 11 in guarded.noted("end", process.pid))
        assert process.stop() == 0
    assert "lost" not in process.output


def test_a_message_whose_partition_leaves_while_it_is_in_hand_is_abandoned_and_comes_again_there(
    guarded: Guarded, wait_for: WaitFor
) -> None:
    first, second = guarded.file("first"), guarded.file("second")
    guarded.put({"n": 0, "gate": str(first)}, {"n": 1, "gate": str(second)}, 2, partition=1)
    with guarded.run(FLOWKIT_KAFKA_MAX_POLL_INTERVAL="3", FLOWKIT_NAME="a", GUARDED_OPTIONS=QUICK) as process:
        wait_for(lambda: 0 in guarded.noted("begin"))
        with guarded.run(FLOWKIT_NAME="b", GUARDED_OPTIONS=QUICK) as other:
            wait_for(lambda: 0 in guarded.noted("begin", other.pid))
            first.touch()
            wait_for(lambda: guarded.noted("end", process.pid) == [0])
            guarded.put(10)
            wait_for(lambda: 10 in guarded.noted("end", process.pid))  # it goes on with what it still has
            assert guarded.committed(1) in (None, 1)
            second.touch()
            wait_for(lambda: guarded.committed(1) == 3)
            assert guarded.noted("end", other.pid) == [0, 1, 2]
            assert guarded.noted("begin", process.pid) == [0, 10]
            assert other.stop() == 0
        assert process.stop() == 0


def test_a_handler_that_lets_no_other_thread_run_costs_its_membership_and_nothing_else(
    guarded: Guarded, wait_for: WaitFor
) -> None:
    guarded.put({"n": 0, "hold": 9}, 1)
    with guarded.run(FLOWKIT_KAFKA_MAX_POLL_INTERVAL="3") as process:
        wait_for(lambda: 0 in guarded.noted("begin"))
        with guarded.run(FLOWKIT_KAFKA_MAX_POLL_INTERVAL="3") as other:
            # When nothing is heard of it for session_timeout, then another one goes on, and gets the same message
            wait_for(lambda: 0 in guarded.noted("begin", other.pid))
            process.wait_for("It had not polled for")
            process.wait_for(
                "raise kafka.session_timeout (6 s) and kafka.max_poll_interval (3 s), or let RQ do the work"
            )
            # And though the same happens to that one, the group goes on behind it, and both are members again
            wait_for(lambda: guarded.committed() == 2)
            numbers = itertools.count(10)

            def both_handle() -> bool:
                for partition in (0, 1):
                    guarded.put(next(numbers), partition=partition)
                return all(max(guarded.noted("end", pid), default=0) >= 10 for pid in (process.pid, other.pid))

            wait_for(both_handle)
            assert other.stop() == 0
        assert process.stop() == 0
    assert guarded.noted("begin").count(0) == 2


class Told:
    """A monitor that remembers errors."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def notice(self, event: str, **details: Any) -> None:
        pass

    def notice_error(self, event: str, error: BaseException, message: str = "", **details: Any) -> None:
        self.errors.append(f"{event} {error!r} {message}")


def in_process(
    app: Flowkit, topics: str, monitor: Told, make_client: MakeConsumer = consumer_client
) -> tuple[Consumer, Producer]:
    settings = Settings.load({"name": "t", **app._given}, CLIENT)
    producer = Producer(lambda: settings, producer_client)
    return Consumer(topics, app.handlings, settings, monitor, producer, make_client), producer


# Static members.


def named(name: str, **env: str) -> dict[str, str]:
    return {"FLOWKIT_KAFKA_GROUP_INSTANCE_ID": name, "GUARDED_OPTIONS": QUICK, **env}


def test_a_static_member_that_restarts_keeps_its_partition_and_nobody_else_is_disturbed(
    guarded: Guarded, wait_for: WaitFor
) -> None:
    with guarded.run(**named("one")) as one:
        guarded.put(0)
        guarded.put(1, partition=1)
        wait_for(lambda: set(guarded.noted("end", one.pid)) == {0, 1})
        with Process(
            "flowkit", "run", "guarded:app", env={**guarded.env, **named("two")}, log=guarded.file("two")
        ) as two:
            numbers = itertools.count(10)

            def both_handle() -> bool:
                for partition in (0, 1):
                    guarded.put(next(numbers), partition=partition)
                return bool(guarded.noted("end", one.pid)[2:] and guarded.noted("end", two.pid))

            wait_for(both_handle)
            # When one stops, and starts again within session_timeout
            before = two.output.count("rebalanced")
            theirs = guarded.noted("end", one.pid)[-1] % 2  # even numbers are in partition 0
            assert one.stop() == 0
            with guarded.run(**named("one")) as again:
                guarded.put(1000 + theirs, partition=theirs)
                # Then it has what it had, and the other one has heard nothing of it
                wait_for(lambda: guarded.noted("end", again.pid) == [1000 + theirs])
                assert two.output.count("rebalanced") == before
                assert two.stop() == 0
                assert again.stop() == 0
    assert max(Counter(guarded.noted()).values()) == 1


@pytest.mark.parametrize("busy", [True, False], ids=["while it commits", "while it waits"])
def test_a_second_process_with_the_same_name_ends_the_first_one(
    guarded: Guarded, wait_for: WaitFor, busy: bool
) -> None:
    with guarded.run(**named("one")) as process:
        guarded.put(0)
        wait_for(lambda: guarded.committed() == 1)
        with Process(
            "flowkit", "run", "guarded:app", env={**guarded.env, **named("one")}, log=guarded.file("two")
        ) as other:
            if busy:
                wait_for(lambda: guarded.put(1) or process.popen.poll() is not None)
            assert process.wait(30) == 1
            assert (
                "another process took this one's place in the group, with the same kafka.group_instance_id 'one'"
                in process.output
            )
            assert "Give each process an id of its own" in process.output
            assert process.output.count("took this one's place") <= 2  # it does not try again
            assert "Traceback" not in process.output
            guarded.put(2, partition=1)
            wait_for(lambda: 2 in guarded.noted("end", other.pid))
            assert other.stop() == 0
    assert guarded.committed(1) == 1


# Topics and brokers that are not there, and options that cannot be.


def test_a_topic_that_is_made_later_is_consumed(apache: Kafka, tmp_path: Path, wait_for: WaitFor) -> None:
    guarded = Guarded(apache.hosts, tmp_path, f"later-{time.time_ns()}")
    with guarded.run() as process:
        process.wait_for(f"there is no topic '{guarded.topic}' on the brokers; group '{guarded.topic}' waits for it")
        apache.create_topic(guarded.topic, 2)
        guarded.put(0, 1, partition=1)
        wait_for(lambda: guarded.committed(1) == 2, timeout=15)
        assert process.stop() == 0
    assert guarded.noted() == [0, 1]


class Node(ApacheKafka):
    """A node with a door that asks for a password."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.sasl_port = self.controller_port + 1 if self.controller_port + 1 != self.port else self.port + 1

    def _format(self, properties: Path) -> None:
        super()._format(properties)
        where = {"host": "127.0.0.1", "port": self.port, "controller_port": self.controller_port}
        with properties.open("a") as file:
            file.write(SASL_PROPERTIES.format(**where, sasl_port=self.sasl_port))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A broker of this module's own, not running until a test starts it."""
    if reason := why_not_apache_kafka():
        pytest.skip(f"a broker to stop and start is needed, and {reason}")
    node = Node(tmp_path_factory.mktemp("node"))
    yield node
    node.stop()


def test_a_broker_that_is_down_is_waited_for_and_may_restart(node: Node, tmp_path: Path, wait_for: WaitFor) -> None:
    guarded = Guarded(node.hosts, tmp_path, "restarts")
    with guarded.run() as process:
        process.wait_for(f"no Kafka broker answers at {node.hosts}; is it running, and is kafka.hosts right?")
        process.wait_for("trying again in")
        assert "Traceback" not in process.output
        # When it comes up
        node.start()
        node.create_topic("restarts", 2)
        node.create_topic(guarded.env["GUARDED_OUT"])
        guarded.put(*({"n": number, "respond": True} for number in range(100)))
        wait_for(lambda: guarded.committed() == 100)
        # When it is gone in the middle of a message, whose response cannot be delivered then
        gate = guarded.file("gate")
        guarded.put(
            {"n": 100, "gate": str(gate), "respond": True}, *({"n": n, "respond": True} for n in range(101, 200))
        )
        wait_for(lambda: 100 in guarded.noted("begin"))
        node.kill()
        gate.touch()
        wait_for(lambda: 100 in guarded.noted())
        node.start()
        wait_for(lambda: guarded.committed() == 200, timeout=60)
        assert process.stop() == 0
    assert set(guarded.noted()) == set(range(200))
    answers = {json.loads(record.value)["n"] for record in read_topic(node.hosts, guarded.env["GUARDED_OUT"], 200)}
    assert answers == set(range(200))


SASL = {"security_protocol": "SASL_PLAINTEXT", "sasl_plain_username": "ann"}


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (
            {"fetch_max_wait": 1},
            "there is no such setting, or option of kafka-python; did you mean 'fetch_max_wait_ms'?",
        ),
        (
            {**SASL, "sasl_mechanism": "PLAIM"},
            "kafka.sasl_mechanism: there is no such mechanism; did you mean 'PLAIN'?",
        ),
        ({"security_protocol": "SASL_SLS"}, "there is no such protocol; did you mean 'SASL_SSL'?"),
        ({"security_protocol": "SASL_SSL"}, "logging in needs both"),
        ({"sasl_mechanism": "PLAIN"}, "logging in needs both"),
    ],
)
def test_options_that_cannot_be_end_it_with_a_hint(
    apache: Kafka, tmp_path: Path, options: dict[str, Any], hint: str
) -> None:
    guarded = Guarded(apache.hosts, tmp_path, "options")
    done = flowkit("run", "guarded:app", env={**guarded.env, "GUARDED_OPTIONS": json.dumps(options)})
    assert done.code == 2, done.err
    assert done.err.startswith("flowkit: the settings have") or done.err.splitlines()[-1].startswith("flowkit: ")
    assert hint in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


def test_a_wrong_password_ends_it_with_a_hint(node: Node, tmp_path: Path) -> None:
    node.start()
    guarded = Guarded(f"127.0.0.1:{node.sasl_port}", tmp_path, "sasl")
    options = {**SASL, "sasl_mechanism": "PLAIN", "sasl_plain_password": "wrong", "bootstrap_timeout_ms": 2_000}
    done = flowkit("run", "guarded:app", env={**guarded.env, "GUARDED_OPTIONS": json.dumps(options)})
    assert done.code == 2, done.err
    assert f"flowkit: Kafka at {guarded.hosts} refuses this application" in done.err
    assert "Traceback" not in done.err
    with guarded.run(GUARDED_OPTIONS=json.dumps({**options, "sasl_plain_password": "right"})) as process:
        process.wait_for("there is no topic 'sasl'")
        assert process.stop() == 0


class _Listener:
    """A consumer client's owner that commits nothing."""

    def __init__(self) -> None:
        self.assigned = self.confirmed = self.lost = lambda *_: None

    def revoked(self, partitions: Any) -> dict[Any, int]:
        return {}


def test_a_partition_that_was_paused_in_the_midst_of_what_was_fetched_is_read_to_its_end(
    kafka: Kafka, topic: MakeTopic, wait_for: WaitFor
) -> None:
    """kafka-python itself forgets it for ever, where another partition had its turn meanwhile."""
    name = topic("parked", 2)
    with contextlib.closing(KafkaProducer(bootstrap_servers=kafka.hosts, linger_ms=5)) as producer:
        for number in range(2_000):
            producer.send(name, b"%d" % number, partition=number % 2)
        producer.flush()
    client = consumer_client(Settings.load({"name": "shop", "kafka": {"hosts": kafka.hosts}}, CLIENT), name)
    got: Counter[Any] = Counter()

    def poll() -> bool:
        got.update({partition: len(records) for partition, records in client.poll(0.2, 100).items()})
        return bool(got)

    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(client.close, 2.0)
        client.subscribe([name], _Listener())
        wait_for(poll, what="the first messages")
        (first,) = got
        client.pause(first)
        other = first._replace(partition=1 - first.partition)
        wait_for(lambda: poll() and got[other] == 1_000, what="the other partition")
        assert got[first] < 1_000
        client.resume(first)
        wait_for(lambda: poll() and got[first] == 1_000, what="the rest")
