"""50,000 messages with SIGKILLs on the way: every response is there, and repeated ones stay within the promise."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from processes import Process
from servers import Kafka, MakeTopic

COUNT = 50_000
PARTITIONS = 4


@pytest.fixture
def env(kafka: Kafka, topic: MakeTopic, redis: Any, redis_url: str) -> dict[str, str]:
    if not kafka.apache:
        pytest.skip("the embedded broker does not hand a killed member's partitions on")
    return {
        "FLOWKIT_KAFKA_HOSTS": kafka.hosts,
        "FLOWKIT_REDIS": redis_url,
        "RELAY_IN": topic("in", PARTITIONS),
        "RELAY_OUT": topic("out", PARTITIONS),
    }


class Responses:
    """The numbers in the output topic, as far as they have been read."""

    def __init__(self, hosts: str, topic: str) -> None:
        self.counts: Counter[int] = Counter()
        self.consumer = KafkaConsumer(bootstrap_servers=hosts, auto_offset_reset="earliest", max_poll_records=5_000)
        self.consumer.assign([TopicPartition(topic, number) for number in range(PARTITIONS)])

    def read(self) -> int:
        """Reads on; gives how many different messages have been answered."""
        for records in self.consumer.poll(timeout_ms=20).values():
            self.counts.update(int(record.value) for record in records)
        return len(self.counts)

    def wait_for(self, wanted: int, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while (got := self.read()) < wanted:
            assert time.monotonic() < deadline, f"{got} of {wanted} messages answered after {timeout:g} s"

    @property
    def repeated(self) -> int:
        return sum(self.counts.values()) - len(self.counts)


@pytest.fixture
def responses(kafka: Kafka, env: dict[str, str]) -> Iterator[Responses]:
    found = Responses(kafka.hosts, env["RELAY_OUT"])
    yield found
    found.consumer.close(autocommit=False)


def fill(hosts: str, topic: str, count: int) -> None:
    producer = KafkaProducer(bootstrap_servers=hosts, linger_ms=20, batch_size=262_144)
    for number in range(count):
        producer.send(topic, b"%d" % number, partition=number % PARTITIONS)
    producer.flush()
    producer.close()


def test_no_response_is_lost_when_an_inline_consumer_is_killed_five_times(
    kafka: Kafka, env: dict[str, str], responses: Responses, tmp_path: Path, record_property: Any
) -> None:
    # Given messages to answer, and a consumer that is killed whenever it has answered some more of them
    fill(kafka.hosts, env["RELAY_IN"], COUNT)
    command = ("flowkit", "run", "relay:app")
    killed_at = []
    for step in range(1, 6):
        with Process(*command, env={**env, "RELAY_INLINE": "1"}, log=tmp_path / "run.log") as process:
            responses.wait_for(step * 8_000, timeout=60)
            process.kill()
            killed_at.append(responses.read())
    # When the last one is left in peace
    with Process(*command, env={**env, "RELAY_INLINE": "1"}, log=tmp_path / "run.log") as process:
        responses.wait_for(COUNT, timeout=90)
        process.wait_for("started application")
        assert process.stop() == 0
    # Then every message is answered, it was killed on the way, and only what was not committed is repeated
    assert set(responses.counts) == set(range(COUNT))
    assert all(count < COUNT for count in killed_at), killed_at
    assert responses.counts.most_common(1)[0][1] <= 6
    record_property("repeated", responses.repeated)
    assert responses.repeated <= 5 * 25_000  # a kill repeats what was handled since the last commit, 0.2 s before
    print(f"\nkilled at {killed_at}; lost 0, repeated {responses.repeated} of {COUNT}")


def test_no_response_is_lost_when_consumer_horse_and_worker_are_killed_under_a_plain_rq_worker(
    kafka: Kafka, env: dict[str, str], responses: Responses, tmp_path: Path, redis_url: str
) -> None:
    # Given messages to answer through RQ, a consumer, and a plain rq worker in the application's folder
    fill(kafka.hosts, env["RELAY_IN"], COUNT)
    # (the interval is how soon a worker's death can be noticed: 60 s after the last beat)
    rq = ("rq", "worker", "--url", redis_url, "--job-monitoring-interval", "1", "--quiet", "default")
    logs = {"run": tmp_path / "run.log", "rq": tmp_path / "rq.log"}
    run = Process("flowkit", "run", "relay:app", env=env, log=logs["run"])
    worker = Process(*rq, env=env, log=logs["rq"])
    try:
        killed = []
        for step, victim in enumerate(("horse", "consumer", "worker", "horse", "consumer"), 1):
            responses.wait_for(step * 6_000, timeout=240)
            if victim == "consumer":
                run.kill()
                run = Process("flowkit", "run", "relay:app", env=env, log=logs["run"])
            elif victim == "worker":
                worker.kill_with_children()
                worker = Process(*rq, env=env, log=logs["rq"])
            else:
                worker.kill_child()
            killed.append((victim, responses.read()))
        # When they are left in peace, then every message is answered
        responses.wait_for(COUNT, timeout=180)
        assert set(responses.counts) == set(range(COUNT))
        assert all(count < COUNT for _, count in killed), killed
        # and only messages of the jobs that were killed are repeated: 500 a job, 3 kills of a horse
        assert responses.repeated <= 3 * 500, responses.repeated
        assert run.stop() == 0
        print(f"\nkilled {killed}; lost 0, repeated {responses.repeated} of {COUNT}")
    finally:
        run.__exit__()
        worker.__exit__()
