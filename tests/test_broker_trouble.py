"""What whole applications do while a real Kafka is in trouble: they recover by themselves or stop with a reason, they neither
spin nor hang, and nothing is lost that Kafka still has. Each scenario has an inline and a queued route.

What of this is proved elsewhere:
  no broker at the start, a broker killed in the midst of a handler      test_consumer_kafka.py
  a topic made later, a response topic that is missing                   test_consumer_kafka.py
  leaders, coordinators and the only known host killed, of three nodes   seed/test_brokers.py
  what a broker refuses: logins, certificates, rights                    seed/test_security.py
  the loop of one group, step by step, on a Kafka in memory              test_consumer.py
  all of it for longer, with counts                                      chaos/
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from commands import read_topic
from crc32c import crc32c
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import UnsupportedCodecError
from processes import Process
from servers import ON_CONFLUENT, ApacheKafka, WaitFor, why_not_apache_kafka
from test_consumer import Clock, Loop, make_app, recorder, stopped_clock

import flowkit.lookout
from flowkit import Retry, Settings
from flowkit.clients import Unreadable
from flowkit.clients.kafka_options import CONSUMER
from flowkit.clients.kafka_python import Producer
from flowkit.errors import BrokerUnavailable
from flowkit.message import Partition

ROUTES = ("inline", "queued")
LITTLE = 0.25
"""Of a processor, that a process may need while it can do nothing: a loop that spins needs all of one."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApacheKafka]:
    if reason := why_not_apache_kafka():
        pytest.skip(f"a broker to bring into trouble is needed, and {reason}")
    node = ApacheKafka(tmp_path_factory.mktemp("troubled"))
    with node:
        yield node


class Troubled:
    """The application ``troubled``: its processes, its topics, and what came out of it."""

    def __init__(self, node: ApacheKafka, name: str, directory: Path, redis_url: str, partitions: int = 1) -> None:
        self.node = node
        self.name = name
        self.directory = directory
        self.env = {"FLOWKIT_KAFKA_HOSTS": node.hosts, "FLOWKIT_REDIS": redis_url, "TROUBLED": name}
        for route in ROUTES:
            node.create_topic(self.topic(route), partitions)
            node.create_topic(f"{self.topic(route)}-out")

    def topic(self, route: str) -> str:
        """Also the name of its group."""
        return f"{self.name}-{route}"

    def run(self, *, log: str = "run", options: dict[str, Any] | None = None, **env: str) -> Process:
        env = {**self.env, "TROUBLED_OPTIONS": json.dumps(options or {}), **env}
        return Process("flowkit", "run", "troubled:app", env=env, log=self.directory / log)

    def work(self) -> Process:
        return Process("flowkit", "worker", "troubled:app", env=self.env, log=self.directory / "worker")

    @contextlib.contextmanager
    def admin(self) -> Iterator[Any]:
        with contextlib.closing(KafkaAdminClient(bootstrap_servers=self.node.hosts)) as admin:
            yield admin

    def put(self, numbers: Any, partition: int = 0, padding: int = 0) -> None:
        """Sends numbers to both routes, as one batch each; returns when Kafka has them."""
        with contextlib.closing(
            KafkaProducer(bootstrap_servers=self.node.hosts, linger_ms=1_000, max_request_size=16_000_000)
        ) as producer:
            for number in numbers:
                value = json.dumps({"n": number, "padding": "x" * padding}).encode()
                for route in ROUTES:
                    producer.send(self.topic(route), value, partition=partition)
            producer.flush()

    def answers(self, route: str, count: int) -> Counter[int]:
        """How often each number was answered, when so many answers are there."""
        records = read_topic(self.node.hosts, f"{self.topic(route)}-out", count)
        return Counter(json.loads(record.value)["n"] for record in records)

    def committed(self, route: str, partition: int = 0) -> int | None:
        with contextlib.closing(
            KafkaConsumer(bootstrap_servers=self.node.hosts, group_id=self.topic(route), enable_auto_commit=False)
        ) as consumer:
            offset: int | None = consumer.committed(TopicPartition(self.topic(route), partition))
            return offset


def cpu(process: Process, seconds: float) -> float:
    """The part of one processor that a process uses for so long; its children count when they have ended."""

    def used() -> float:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before, began = used(), time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.popen.wait(seconds)
        raise AssertionError(f"it has ended:\n{process.output[-4000:]}")
    return (used() - before) / (time.monotonic() - began)


# Records that cannot be read. No broker takes them, so they are made in its files.


def batches(log: Path) -> dict[int, int]:
    """By the offset of its first record, where each batch of a log segment begins."""
    data, at, found = log.read_bytes(), 0, {}
    while at + 61 < len(data):
        offset, length = struct.unpack_from(">qi", data, at)
        if length <= 0:
            break
        found[offset] = at
        at += 12 + length
    return found


def spoil(node: ApacheKafka, topic: str, partition: int, offset: int, *, codec: int | None = None) -> None:
    """Gives the batch that begins at an offset a payload that its checksum is not of, or a codec."""
    log = node.directory / "data" / f"{topic}-{partition}" / "00000000000000000000.log"
    data, at = bytearray(log.read_bytes()), batches(log)[offset]
    end = at + 12 + struct.unpack_from(">i", data, at + 8)[0]
    if codec is None:
        data[end - 3] ^= 0xFF
    else:
        data[at + 22] = data[at + 22] & ~0x07 | codec
        struct.pack_into(">I", data, at + 17, crc32c(bytes(data[at + 21 : end])))
    log.write_bytes(data)


def test_a_record_that_cannot_be_read_holds_its_partition_only(
    node: ApacheKafka, redis: Any, redis_url: str, tmp_path: Path, wait_for: WaitFor
) -> None:
    # Given three partitions, with a batch in the middle of one that is broken, of another that is packed in an unknown way
    troubled = Troubled(node, "unreadable", tmp_path, redis_url, partitions=3)
    for partition in range(3):
        for first in (0, 3, 6):
            troubled.put(range(100 * partition + first, 100 * partition + first + 3), partition)
    node.stop(grace=30)  # a clean end, so that it does not look through its files at the start
    for route in ROUTES:
        spoil(node, troubled.topic(route), 0, 3)
        spoil(node, troubled.topic(route), 1, 3, codec=5)
    node.start()
    with troubled.work(), troubled.run() as process:
        # Then it says which, and what to do
        for route in ROUTES:
            topic = troubled.topic(route)
            for partition in (0, 1):
                process.wait_for(f"{topic}[{partition}]@3{'' if ON_CONFLUENT else ' to 5'} cannot be read")
            behind = "OFFSET" if ON_CONFLUENT else "6"  # librdkafka does not say where the broken batch ends
            assert f"--group {topic} --topic {topic}:0 --reset-offsets --to-offset {behind}" in process.output
        assert "crc" in process.output.lower()
        assert re.search("Unrecognized compression type: 5|codec 0x5", process.output)
        # And all that can be read before is answered, and the third partition goes on
        readable = {*range(3), *range(100, 103), *range(200, 209)}
        for route in ROUTES:
            assert set(troubled.answers(route, 15)) == readable
        troubled.put(range(209, 212), partition=2)
        for route in ROUTES:
            assert set(troubled.answers(route, 18)) == {*readable, 209, 210, 211}
        # And it neither spins, nor leaves its group, nor commits what it cannot read
        assert cpu(process, 3) < LITTLE
        assert process.output.count("rebalanced group=unreadable-inline assigned") == 1
        for route in ROUTES:
            assert [troubled.committed(route, partition) for partition in range(3)] == [3, 3, 12]
        assert process.stop() == 0
    # When the groups are set past them, as it said
    for route in ROUTES:
        topic = troubled.topic(route)
        for partition in (0, 1):
            said = next(line for line in process.output.splitlines() if f"{topic}[{partition}]@3" in line)
            command = said.partition("kafka-consumer-groups ")[2].split(";")[0].replace("OFFSET", "6")
            reset_offsets(node, command.split())
    # Then the rest is answered, each once
    with troubled.work(), troubled.run(log="again") as process:
        expected = {*readable, 209, 210, 211, 6, 7, 8, 106, 107, 108}
        for route in ROUTES:
            assert troubled.answers(route, len(expected)) == dict.fromkeys(expected, 1)
        wait_for(lambda: troubled.committed("inline", 0) == 9)
        assert process.stop() == 0


def reset_offsets(node: ApacheKafka, arguments: list[str]) -> None:
    """Kafka's own tool, called as the application said."""
    tool = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand"
    called = ["java", "-Xmx256m", "-XX:TieredStopAtLevel=1", tool, *arguments]
    called[called.index("...")] = node.hosts
    done = subprocess.run(called, env=node.environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Error" not in done.stdout, done.stdout + done.stderr


def test_a_record_larger_than_any_fetch_is_read(
    node: ApacheKafka, redis: Any, redis_url: str, tmp_path: Path
) -> None:
    troubled = Troubled(node, "large", tmp_path, redis_url)
    with troubled.admin() as admin:
        for route in ROUTES:
            admin.alter_configs([_config(troubled.topic(route), {"max.message.bytes": "4000000"})])
    troubled.put([0])
    troubled.put([1], padding=3_000_000)
    troubled.put([2])
    small = {"max_partition_fetch_bytes": 1_000, "fetch_max_bytes": 1_000}
    with troubled.work(), troubled.run(options=small) as process:
        for route in ROUTES:
            assert troubled.answers(route, 3) == {0: 1, 1: 1, 2: 1}
        assert process.stop() == 0


def _config(topic: str, configs: dict[str, str]) -> Any:
    from kafka.admin import ConfigResource, ConfigResourceType

    return ConfigResource(ConfigResourceType.TOPIC, topic, configs=configs)


# Messages and topics that go away.


def test_messages_that_retention_deleted_before_they_were_read_are_counted_aloud(
    node: ApacheKafka, redis: Any, redis_url: str, tmp_path: Path, wait_for: WaitFor
) -> None:
    # Given groups that have read ten messages, and are away while others come and the oldest are deleted
    troubled = Troubled(node, "retained", tmp_path, redis_url)
    troubled.put(range(10))
    with troubled.work(), troubled.run() as process:
        for route in ROUTES:
            wait_for(lambda route=route: troubled.committed(route) == 10)
            assert set(troubled.answers(route, 10)) == set(range(10))
        assert process.stop() == 0
    troubled.put(range(10, 30))
    with troubled.admin() as admin:
        admin.delete_records({TopicPartition(troubled.topic(route), 0): 25 for route in ROUTES})
    # Then, if it is not to go on behind a gap, it says why and stops
    with troubled.run(log="none", options={"auto_offset_reset": "none"}) as process:
        assert process.wait() == 1
        assert (
            "[0]@10 is not there: the first message there is has offset 25, up to 15 messages were deleted"
            in process.output
        )
        assert "as auto_offset_reset is 'none', set its offset yourself" in process.output
        assert "Traceback" not in process.output
    for route in ROUTES:
        assert troubled.committed(route) == 10
    # And else it says how many are lost, and goes on
    with troubled.work(), troubled.run(log="again") as process:
        for route in ROUTES:
            gone = f"{troubled.topic(route)}[0]@10 is gone: it was deleted, by retention or by hand"
            process.wait_for(gone)
            assert troubled.answers(route, 15) == dict.fromkeys([*range(10), *range(25, 30)], 1)
            wait_for(lambda route=route: troubled.committed(route) == 30)
            assert process.output.count(gone) == 1
        assert process.stop() == 0


def test_a_group_without_offsets_stops_where_it_may_not_choose_them(
    node: ApacheKafka, redis: Any, redis_url: str, tmp_path: Path
) -> None:
    troubled = Troubled(node, "none", tmp_path, redis_url)
    with troubled.run(options={"auto_offset_reset": "none"}) as process:
        assert process.wait() == 1
        assert "it has no committed offset for none-" in process.output
        assert "Traceback" not in process.output


def test_a_topic_that_is_deleted_is_waited_for_and_read_from_its_start_when_it_is_made_anew(
    node: ApacheKafka, redis: Any, redis_url: str, tmp_path: Path, wait_for: WaitFor
) -> None:
    troubled = Troubled(node, "deleted", tmp_path, redis_url)

    def delete() -> None:
        topics = [troubled.topic(route) for route in ROUTES]
        with troubled.admin() as admin:
            admin.delete_topics(topics)
            wait_for(lambda: not set(topics) & set(admin.list_topics()), what="the end of the topics")

    def make() -> None:
        for route in ROUTES:
            node.create_topic(troubled.topic(route))

    troubled.put(range(10))
    with troubled.work(), troubled.run() as process:
        for route in ROUTES:
            assert set(troubled.answers(route, 10)) == set(range(10))
        # When the topics are deleted, then it says so and waits
        delete()
        for route in ROUTES:
            process.wait_for(f"there is no topic {troubled.topic(route)!r} on the brokers any more", timeout=20)
        assert cpu(process, 3) < LITTLE
        # When they are made anew, then they are read from their start
        make()
        troubled.put(range(100, 105))
        for route in ROUTES:
            assert set(troubled.answers(route, 15)) == {*range(10), *range(100, 105)}
            wait_for(lambda route=route: troubled.committed(route) == 5)
        # When they are replaced by longer ones, while it does not look
        process.signal(signal.SIGSTOP)
        delete()
        make()
        troubled.put(range(200, 220))
        process.signal(signal.SIGCONT)
        # Then these are read from their start too
        for route in ROUTES:
            wait_for(lambda route=route: troubled.committed(route) == 20)
            assert {*range(10), *range(100, 105), *range(200, 220)} == set(troubled.answers(route, 35))
        assert process.stop() == 0


def test_partitions_that_are_added_are_read_from_their_first_message_on(
    node: ApacheKafka, redis: Any, redis_url: str, tmp_path: Path, wait_for: WaitFor
) -> None:
    troubled = Troubled(node, "added", tmp_path, redis_url)
    troubled.put(range(10))
    with troubled.work(), troubled.run() as process:
        for route in ROUTES:
            assert set(troubled.answers(route, 10)) == set(range(10))
        with troubled.admin() as admin:
            admin.create_partitions({troubled.topic(route): 3 for route in ROUTES})
        troubled.put(range(100, 110), partition=2)
        began = time.monotonic()
        for route in ROUTES:
            assert troubled.answers(route, 20) == dict.fromkeys([*range(10), *range(100, 110)], 1)
            wait_for(lambda route=route: troubled.committed(route, 2) == 10)
        assert time.monotonic() - began < 10  # it looks every 2 seconds here, every 30 if not told otherwise
        assert process.stop() == 0
    assert CONSUMER["metadata_max_age_ms"] == 30_000


# A broker that stands still, and one that comes and goes.

SHORT = {"request_timeout_ms": 3_000, "delivery_timeout_ms": 4_000, "max_poll_interval": 6, "session_timeout": 6}
"""Kafka lets no session time out sooner."""


class Load:
    """Numbers that are sent to both routes, one every few milliseconds, until the end; ``sent`` are those that Kafka has."""

    def __init__(self, troubled: Troubled, pause: float = 0.01) -> None:
        self.troubled = troubled
        self.pause = pause
        self.sent: dict[str, set[int]] = {route: set() for route in ROUTES}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with contextlib.closing(
            KafkaProducer(
                bootstrap_servers=self.troubled.node.hosts, reconnect_backoff_max_ms=1_000, request_timeout_ms=5_000
            )
        ) as producer:
            number = 0
            while not self._ended.wait(self.pause):
                for route in ROUTES:
                    delivery = producer.send(self.troubled.topic(route), json.dumps({"n": number}).encode())
                    delivery.add_callback(lambda _, route=route, number=number: self.sent[route].add(number))
                number += 1
            producer.flush(timeout=60)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(90)
        assert not self._thread.is_alive()


class Answers:
    """What comes out of a route, read as it comes."""

    def __init__(self, troubled: Troubled, route: str) -> None:
        self.counts: Counter[int] = Counter()
        self._consumer = KafkaConsumer(
            bootstrap_servers=troubled.node.hosts, auto_offset_reset="earliest", reconnect_backoff_max_ms=1_000
        )
        self._consumer.assign([TopicPartition(f"{troubled.topic(route)}-out", 0)])

    def look(self) -> Counter[int]:
        for records in self._consumer.poll(timeout_ms=50).values():
            self.counts.update(json.loads(record.value)["n"] for record in records)
        return self.counts

    def close(self) -> None:
        self._consumer.close(autocommit=False)


@contextlib.contextmanager
def answers_of(troubled: Troubled) -> Iterator[dict[str, Answers]]:
    answers = {route: Answers(troubled, route) for route in ROUTES}
    yield answers
    for each in answers.values():
        each.close()


def goes_on(answers: dict[str, Answers], load: Load, wait_for: WaitFor, within: float) -> float:
    """Waits until numbers that are sent from now on are answered on both routes; gives the seconds that took."""
    began = time.monotonic()
    newest = {route: max(load.sent[route], default=-1) for route in ROUTES}
    for route in ROUTES:
        wait_for(
            lambda route=route: max(answers[route].look(), default=-1) > newest[route],
            timeout=within,
            what=f"{route} answers",
        )
    return time.monotonic() - began


def all_answered(answers: dict[str, Answers], load: Load, wait_for: WaitFor) -> None:
    for route in ROUTES:
        wait_for(
            lambda route=route: load.sent[route] <= answers[route].look().keys(), what=f"the last {route} answers"
        )


def test_a_broker_that_stands_still_for_longer_than_every_time_out_is_waited_for(
    node: ApacheKafka, redis: Any, redis_url: str, tmp_path: Path, wait_for: WaitFor
) -> None:
    troubled = Troubled(node, "frozen", tmp_path, redis_url, partitions=2)
    with (
        answers_of(troubled) as answers,
        troubled.work(),
        troubled.run(options=SHORT) as process,
        Troubled(node, "idle", tmp_path, redis_url).run(log="idle", options=SHORT) as idle,
        Load(troubled) as load,
    ):
        goes_on(answers, load, wait_for, 60)
        late = {**SHORT, "offset_commit_interval": 600}
        with troubled.run(log="late", options=late, FLOWKIT_SHUTDOWN_TIMEOUT="4") as other:
            for route in ROUTES:
                joined = f"rebalanced group=frozen-{route} assigned"
                other.wait_for(joined)
                wait_for(
                    lambda joined=joined: process.output.count(joined) == 2, what="both to have their partitions"
                )
            goes_on(answers, load, wait_for, 60)
            # When the broker stands still
            freeze(node, signal.SIGSTOP)
            try:
                began = time.monotonic()
                # Then a stop ends in time, and says that not everything could be committed
                assert other.stop(timeout=10) == 1
                assert time.monotonic() - began < 6
                # And the others say that nobody answers, and do not spin, until well after the last time-out
                for route in ROUTES:
                    wait_for(
                        lambda route=route: f"ERROR   group 'frozen-{route}': " in process.output, what="a complaint"
                    )
                    idle.wait_for(f"group 'idle-{route}': no broker has answered for", timeout=30)
                assert cpu(process, 2) < LITTLE
                assert cpu(idle, 2) < LITTLE
            finally:
                freeze(node, signal.SIGCONT)
        frozen = time.monotonic() - began
        # And goes on when the broker does
        took = goes_on(answers, load, wait_for, 30)
        print(f"\nfrozen for {frozen:.0f} s, goes on after {took:.1f} s")
        load.__exit__()
        all_answered(answers, load, wait_for)
        idle.wait_for("recovered message=Kafka answers again")
        for each in (process, idle):
            assert each.stop() == 0
            assert "Traceback" not in each.output


def freeze(node: ApacheKafka, number: signal.Signals) -> None:
    assert node.process is not None
    os.killpg(node.process.pid, number)


def test_nothing_is_lost_while_the_broker_is_restarted_and_killed_under_load(
    node: ApacheKafka, redis: Any, redis_url: str, tmp_path: Path, wait_for: WaitFor
) -> None:
    troubled = Troubled(node, "restarted", tmp_path, redis_url)
    with (
        answers_of(troubled) as answers,
        troubled.work() as worker,
        troubled.run() as process,
        Load(troubled) as load,
    ):
        goes_on(answers, load, wait_for, 60)
        # When it is restarted, and when it is killed and comes back a while later
        node.restart()
        took = [goes_on(answers, load, wait_for, 30)]
        node.kill()
        assert cpu(process, 3) < LITTLE
        node.start()
        took.append(goes_on(answers, load, wait_for, 30))
        print(f"\ngoes on {took[0]:.1f} s after a restart, {took[1]:.1f} s after a kill")
        load.__exit__()
        all_answered(answers, load, wait_for)
        for route in ROUTES:
            wait_for(lambda route=route: troubled.committed(route) == len(load.sent[route]))
        # When it is killed again, then whoever is told to stop does so at once, and all is well: there is nothing to commit
        node.kill()
        asked = time.monotonic()
        assert worker.stop() == 0
        assert process.stop() == 0, process.output[-3000:]
        assert time.monotonic() - asked < 15
        node.start()


def test_a_stop_that_cannot_commit_says_so(
    node: ApacheKafka, redis: Any, redis_url: str, tmp_path: Path, wait_for: WaitFor
) -> None:
    troubled = Troubled(node, "uncommitted", tmp_path, redis_url)
    troubled.put(range(10))
    with troubled.run() as process:
        wait_for(lambda: troubled.committed("inline") == 10)
    # Given messages that are finished, whose offsets a killed broker cannot take
    with troubled.run(log="late", options={"offset_commit_interval": 3}) as process:
        process.wait_for("rebalanced group=uncommitted-inline assigned")
        troubled.put(range(10, 20))
        troubled.answers("inline", 20)
        node.kill()
        # When it is stopped while it tries to
        process.wait_for("trying again in")
        assert process.stop() == 1
        assert "stopped application=troubled clean=False" in process.output
        assert "Traceback" not in process.output
    node.start()


def test_a_producer_neither_doubles_nor_reorders_while_the_broker_is_killed(
    node: ApacheKafka, wait_for: WaitFor
) -> None:
    # Given responses on their way to one partition, as a handler sends them
    node.create_topic("ordered")
    settings = Settings.load({"name": "shop", "kafka": {"hosts": node.hosts}}, {})
    producer = Producer(settings)
    deliveries = []
    killed = threading.Event()

    def trouble() -> None:
        killed.wait(60)
        node.kill()
        node.start()

    thread = threading.Thread(target=trouble)
    thread.start()
    # When their broker is killed and comes back
    for number in range(30_000):
        deliveries.append(producer.send("ordered", b"%d" % number, None, (), 0))
        if number == 10_000:
            killed.set()
    thread.join(60)
    producer.flush(40)
    # Then each is there once, in order
    assert [producer.outcome(delivery) for delivery in deliveries if producer.outcome(delivery)] == []
    producer.close(10)
    records = read_topic(node.hosts, "ordered", len(deliveries))
    assert [int(record.value) for record in records] == list(range(len(deliveries)))


# What only shows step by step: the loop on a Kafka in memory, whose time moves when a test says so.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return stopped_clock(monkeypatch)


def test_what_cannot_be_read_is_tried_again_ever_more_seldom_and_goes_on_when_it_can(clock: Clock) -> None:
    app = make_app()
    seen = recorder(app)
    loop = Loop(app, clock)
    loop.consumer.reconnect = Retry(first=1, cap=4, jitter=0)
    loop.broker.create("a", 2)
    loop.put("a", 0)
    loop.turn()
    poll, tries = loop.client.poll, []
    broken = Partition("a", 0)

    def broken_poll(timeout: float, most: int) -> Any:
        if broken not in loop.client.paused:
            tries.append(clock.now)
            raise Unreadable(broken, 1, 3, ValueError("CRC"))
        return poll(timeout, most)

    loop.client.poll = broken_poll
    loop.put("a", 1, 2)
    for number in range(20, 40):
        loop.put("a", number, partition=1)
        loop.turn(after=0.5)
    assert seen == [0, *range(20, 40)]
    assert [int(after - before) for before, after in pairwise(tries)] == [1, 2, 4]
    assert "a[0]@1 to 2 cannot be read: CRC. It is tried again in 1.0 s" in loop.events.errors[0][2]
    assert "--group g --topic a:0 --reset-offsets --to-offset 3" in loop.events.errors[0][2]
    assert {event for event, _, _ in loop.events.errors} == {"unreadable"}
    assert loop.committed("a") == 1
    # When it can be read, then nothing is missing, and that is said
    loop.client.poll = poll
    loop.turn(10, after=1)
    assert seen[-2:] == [1, 2]
    assert loop.committed("a") == 3
    assert loop.events.count("recovered") == 1


def test_a_codec_that_is_not_installed_is_named_with_its_package(clock: Clock) -> None:
    app = make_app()
    recorder(app)
    loop = Loop(app, clock)
    loop.put("a", 0)
    loop.turn()
    problem = UnsupportedCodecError("Libraries for lz4 compression codec not found")
    loop.consumer.lookout.set_aside(Unreadable(Partition("a", 0), 1, None, problem))
    assert "pip install 'kafka-python[lz4]'" in loop.events.errors[0][2]
    loop.consumer.lookout.set_aside(Unreadable(Partition("a", 1), 1, None, problem))  # one that has left meanwhile
    assert len(loop.events.errors) == 1


def test_an_offset_of_a_deleted_topic_is_never_committed_for_the_next_one(clock: Clock) -> None:
    # Given messages that are finished and not committed
    app = make_app(kafka={"offset_commit_interval": 1000})
    seen = recorder(app)
    loop = Loop(app, clock)
    loop.put("a", 0)
    loop.turn()
    loop.put("a", 1, 2)
    loop.turn()
    assert loop.committed("a") == 1
    # When the topic is made anew, and longer, and its partition leaves before the loop has looked
    del loop.broker.topics["a"], loop.broker.commits["g"]
    loop.put("a", *range(10, 20))
    assert loop.consumer.revoked([]) == {}
    loop.consumer.commit()
    assert loop.committed("a") is None
    assert loop.consumer._uncommitted() == {}
    # Then it is read from its first message on
    loop.turn(2)
    assert seen == [0, 1, 2, *range(10, 20)]
    loop.turn(after=1000)
    assert loop.committed("a") == 10
    assert "was deleted and made anew" in loop.events.errors[-1][2]


def test_of_many_topics_one_that_is_made_anew_is_seen_with_its_first_message_and_the_others_a_second_later(
    clock: Clock,
) -> None:
    app = make_app(kafka={"offset_commit_interval": 1000})
    many = [f"t{number}" for number in range(flowkit.lookout.FEW)]
    seen = {topic: recorder(app, topic) for topic in ("a", *many)}
    loop = Loop(app, clock)
    for topic in ("a", "t1"):
        loop.put(topic, 1, 2, 3)
    loop.turn(2)
    asked: list[str] = []
    topic_id = loop.client.topic_id
    loop.client.topic_id = lambda topic: (asked.append(topic), topic_id(topic))[1]
    loop.put("a", 4)
    loop.turn()
    assert asked == ["a"]
    for topic in ("a", "t1"):
        del loop.broker.topics[topic]
    loop.put("a", 5, 6, 7, 8, 9)
    loop.put("t1", 4)
    loop.turn(2)
    assert seen["a"] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert seen["t1"] == [1, 2, 3]  # at an offset that is not there yet
    loop.turn(2, after=flowkit.lookout.ASK_EVERY)
    assert seen["t1"] == [1, 2, 3, 4]
    assert set(many) <= set(asked)


def test_a_client_that_reaches_nobody_is_told_of_now_and_then(clock: Clock) -> None:
    app = make_app()
    recorder(app)
    loop = Loop(app, clock)
    loop.put("a", 0)
    loop.turn()
    loop.client.in_touch = lambda: False
    loop.turn(120, after=1)
    said = [message for event, _, message in loop.events.errors if event == "broker"]
    assert len(said) == 5  # after 5, 10, 20, 40 and 80 seconds
    assert "group 'g': no broker has answered for 5 s" in said[0]
    del loop.client.in_touch
    loop.turn(2)
    assert loop.events.count("recovered") == 1


def test_a_stop_after_a_client_broke_is_clean_only_if_all_that_is_finished_is_committed(clock: Clock) -> None:
    for committed in (True, False):
        app = make_app(kafka={"offset_commit_interval": 1000})
        recorder(app)
        loop = Loop(app, clock)
        loop.put("a", 0)
        loop.turn()
        loop.put("a", 1)
        loop.turn()

        def refuse(timeout: float) -> None:
            raise BrokerUnavailable("no Kafka broker answers")

        if not committed:
            loop.client.close = refuse
        loop.consumer._reconnect(BrokerUnavailable("no Kafka broker answers"))
        loop.consumer.stop()
        loop.consumer._end()
        assert loop.consumer.clean is committed
