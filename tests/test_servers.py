"""``flowkit run --processes``: several consumers under one command, on a real broker."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from commands import flowkit
from kafka import KafkaAdminClient, KafkaProducer
from processes import APPS, Process, program
from servers import Kafka, MakeTopic, WaitFor
from test_health import ask, asked

from flowkit.devstack import HOST, free_port

PARTITIONS = 4


class Several:
    """The application ``apps/several.py`` on a topic of its own: its processes, and what they handled."""

    def __init__(self, kafka: Kafka, topic: str, directory: Path, wait_for: WaitFor) -> None:
        self.hosts = kafka.hosts
        self.topic = topic
        self.log = directory / "several.log"
        self.wait_for = wait_for
        self.port = free_port()
        self.env = {
            "FLOWKIT_KAFKA_HOSTS": kafka.hosts,
            "FLOWKIT_HEALTH": f"{HOST}:{self.port}",
            "SEVERAL_IN": topic,
            "SEVERAL_MARK": str(directory / "mark"),
        }

    def run(self, *options: str, count: int = 2, **env: str) -> Process:
        command = ("flowkit", "run", "several:app", "--processes", str(count), *options)
        return Process(*command, env={**self.env, **env}, log=self.log)

    def wait_until_ready(self) -> None:
        self.wait_for(asked(self.port, "/readyz", 200), 60, "all to be ready")

    def send(self, numbers: range, **task: object) -> None:
        """One message for each number, to the partitions in turn."""
        producer = KafkaProducer(bootstrap_servers=self.hosts)
        try:
            for number in numbers:
                value = json.dumps({"n": number, **task}).encode()
                producer.send(self.topic, value, partition=number % PARTITIONS)
            producer.flush()
        finally:
            producer.close()

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The number and the process of each message that was handled."""
        text = self.log.read_text(errors="replace")
        return [(int(n), int(pid)) for n, pid in re.findall(r"^handled (\d+) (\d+)$", text, re.MULTILINE)]

    def wait_for_all(self, count: int) -> Counter[int]:
        """Waits until the numbers below ``count`` were handled; how often each of them was."""
        self.wait_for(lambda: len({n for n, _ in self.runs}) == count, 60, f"{count} messages")
        return Counter(n for n, _ in self.runs)


@pytest.fixture
def several(kafka: Kafka, topic: MakeTopic, tmp_path: Path, wait_for: WaitFor) -> Several:
    return Several(kafka, topic("several", partitions=PARTITIONS), tmp_path, wait_for)


@pytest.mark.parametrize("client", ["kafka-python", "confluent"])
def test_they_share_the_partitions_and_end_clean(several: Several, client: str) -> None:
    with several.run(FLOWKIT_CLIENT=client) as process:
        several.wait_until_ready()
        several.send(range(40))
        assert set(several.wait_for_all(40).values()) == {1}
        by_process = {pid: {n % PARTITIONS for n, other in several.runs if other == pid} for _, pid in several.runs}
        assert set(by_process) == set(process.children())
        assert [len(partitions) for partitions in by_process.values()] == [2, 2]
        assert process.stop() == 0
    assert process.output.count("SIGTERM, finishing the messages in hand") == 1
    assert process.output.count("clean=True") == 2


def test_one_that_is_killed_is_started_again_and_nothing_is_lost(several: Several) -> None:
    with several.run(FLOWKIT_KAFKA_OFFSET_COMMIT_THRESHOLD="20") as process:
        several.wait_until_ready()
        first = set(process.children())
        several.send(range(100))
        several.send(range(100, 101), do="die")
        several.send(range(101, 300))
        counts = several.wait_for_all(300)
        assert set(counts.values()) <= {1, 2}
        assert sum(counts.values()) - 300 <= 40  # what was not committed, and the batch in hand
        several.wait_until_ready()
        now = set(process.children())
        assert len(now) == 2
        assert len(now & first) == 1
        assert re.search(r"consumer [12] ended with -9; a new one starts in 0\.5 s", process.output)
        assert process.stop() == 0


def test_probes_are_told_of_each_process(several: Several, wait_for: WaitFor) -> None:
    with several.run(FLOWKIT_STUCK_AFTER="3") as process:
        several.wait_until_ready()
        answer = ask(several.port, "/readyz")
        for number, part in enumerate(answer.body["parts"], 1):
            assert re.fullmatch(rf"consumer {number} \(process \d+\)", part["name"])
            assert part["state"] == f"group {several.topic} has 2 partitions"

        child = process.children()[0]
        os.kill(child, signal.SIGSTOP)
        answer = wait_for(asked(several.port, "/healthz", 503))
        assert f"(process {child}) has given no sign of life for " in answer.parts
        os.kill(child, signal.SIGCONT)
        wait_for(asked(several.port, "/healthz", 200))

        several.wait_until_ready()
        os.kill(child, signal.SIGKILL)
        answer = wait_for(asked(several.port, "/readyz", 503))
        assert "has ended 1 times, and starts again" in answer.parts
        assert ask(several.port, "/healthz").status == 200
        several.wait_until_ready()

        several.send(range(1), do="hang")
        answer = wait_for(asked(several.port, "/healthz", 503))
        assert f"group {several.topic} has not turned for " in answer.parts
        process.kill_with_children()
    with socket.create_server((HOST, several.port)):
        pass  # no process that was forked has kept the port


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_all_of_them_get_ends_none_in_the_midst(several: Several, number: signal.Signals) -> None:
    """As from a terminal, and from supervisors that signal every process of a service."""
    with several.run() as process:
        several.wait_until_ready()
        several.send(range(4), seconds=1)
        several.wait_for(lambda: several.runs, 30, "the first message")
        os.killpg(process.pid, number)
        assert process.wait() == 0
    assert process.output.count(f"{number.name}, finishing the messages in hand") == 1
    assert process.output.count("clean=True") == 2
    assert "again" not in process.output


def test_a_second_signal_ends_them_at_once(several: Several) -> None:
    with several.run() as process:
        several.wait_until_ready()
        several.send(range(4), do="hang")
        process.wait_for("hangs")
        process.signal(signal.SIGTERM)
        process.wait_for("finishing the messages in hand")
        began = time.monotonic()
        process.signal(signal.SIGTERM)
        assert process.wait() == 1
        assert time.monotonic() - began < 10  # shutdown_timeout is 30 s
    assert process.output.count("SIGTERM again, ending at once") == 1


def test_a_handler_that_does_not_end_keeps_them_for_shutdown_timeout(several: Several) -> None:
    with several.run(FLOWKIT_SHUTDOWN_TIMEOUT="1") as process:
        several.wait_until_ready()
        several.send(range(1), do="hang")
        process.wait_for("hangs")
        assert process.stop() == 1
    assert "did not end within shutdown_timeout (1 s)" in process.output


def test_without_the_first_process_they_end(several: Several, wait_for: WaitFor) -> None:
    with several.run() as process:
        several.wait_until_ready()
        children = process.children()
        process.kill()
        wait_for(lambda: not [pid for pid in children if Path(f"/proc/{pid}").exists()], 20, "the end of the others")
    assert process.output.count("clean=True") == 2


def test_what_stops_one_for_good_stops_all(several: Several) -> None:
    with several.run(FLOWKIT_ON_POISON="stop", FLOWKIT_RETRY="1") as process:
        several.wait_until_ready()
        several.send(range(1), do="fail")
        assert process.wait() == 1
    assert "the application with it" in process.output
    assert process.output.count("clean=True") == 1  # the other one
    assert "a new one starts" not in process.output


@pytest.mark.parametrize("client", ["kafka-python", "confluent"])
def test_what_the_brokers_refuse_ends_all_with_code_2(several: Several, client: str) -> None:
    times = {"FLOWKIT_KAFKA_SESSION_TIMEOUT": "3600", "FLOWKIT_KAFKA_MAX_POLL_INTERVAL": "3600"}
    with several.run(FLOWKIT_CLIENT=client, **times) as process:
        assert process.wait() == 2
    text = "stops, and the others with it: kafka.session_timeout: 3600 s is not in the range that the brokers allow"
    assert text in process.output
    assert "a new one starts" not in process.output


@pytest.mark.parametrize("client", ["kafka-python", "confluent"])
def test_a_strategy_that_the_group_has_not_in_common_is_said(several: Several, client: str, tmp_path: Path) -> None:
    command = ("flowkit", "run", "several:app")
    env = {**several.env, "FLOWKIT_CLIENT": client, "FLOWKIT_HEALTH": ""}
    strategy = "FLOWKIT_KAFKA_PARTITION_ASSIGNMENT_STRATEGY"
    with Process(*command, env=several.env, log=several.log):
        several.wait_until_ready()
        with Process(*command, env={**env, strategy: "cooperative-sticky"}, log=tmp_path / "other.log") as other:
            assert other.wait() == 2
    assert "kafka.partition_assignment_strategy: the members of the group have none in common" in other.output
    assert "Traceback" not in other.output


def test_what_is_wrong_at_once_is_said_once(several: Several) -> None:
    done = flowkit("run", "several:app", "--processes", "3", "--topics", "ordres", env=several.env)
    assert done.code == 2
    assert done.err.count("--topics ordres: there is no such topic in this application") == 1
    done = flowkit("run", "several:app", "--processes", "0", env=several.env)
    assert done.code == 2
    assert "--processes" in done.err


def test_each_has_a_static_name_of_its_own_and_keeps_its_partitions_over_a_death(several: Several) -> None:
    def members() -> dict[str, int]:
        admin = KafkaAdminClient(bootstrap_servers=several.hosts)
        try:
            found = admin.describe_groups([several.topic])[several.topic]["members"]
        finally:
            admin.close()
        return {
            member["group_instance_id"]: len(member["member_assignment"]["assigned_partitions"]) for member in found
        }

    with several.run(FLOWKIT_KAFKA_GROUP_INSTANCE_ID="shop", FLOWKIT_KAFKA_SESSION_TIMEOUT="30") as process:
        several.wait_until_ready()
        assert set(members()) == {"shop-1", "shop-2"}
        several.send(range(40))
        several.wait_for_all(40)
        before = {n % PARTITIONS: pid for n, pid in several.runs}
        killed = before[0]
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        several.wait_for(lambda: len(set(process.children()) - {killed}) == 2, 30, "a new process")
        several.send(range(40, 80))
        several.wait_for_all(80)
        assert time.monotonic() - began < 20  # its session had not ended
        after = {n % PARTITIONS: pid for n, pid in several.runs if n >= 40}
        (new,) = set(process.children()) - set(before.values())
        assert after == {partition: new if pid == killed else pid for partition, pid in before.items()}
        assert process.stop() == 0


def test_a_start_that_always_fails_ends(several: Several) -> None:
    with several.run(SEVERAL_STARTUP="fails") as process:
        assert process.wait() == 1
    assert process.output.count("as the environment asks") >= 6
    assert process.output.count("none of them has come to its work, so there is no other start") == 1


def test_what_the_import_prints_is_there_once(several: Several) -> None:
    with several.run(SEVERAL_PRINTS="imported", PYTHONUNBUFFERED="") as process:
        several.wait_until_ready()
        assert process.stop() == 0
    assert process.output.count("imported") == 1


def test_an_output_that_is_full_makes_no_process_go_on_in_the_place_of_the_first(
    several: Several, tmp_path: Path
) -> None:
    """What it has not written cannot be flushed at its end."""
    file = tmp_path / "health"
    env = {**os.environ, **several.env, "PYTHONUNBUFFERED": "", "FLOWKIT_HEALTH_FILE": str(file)}
    command = [program("flowkit"), "run", "several:app", "--processes", "2"]
    with open("/dev/full", "wb") as full, several.log.open("wb") as log:
        process = subprocess.Popen(command, cwd=APPS, env=env, stdout=full, stderr=log)
        try:
            several.wait_until_ready()
            children = {
                part["name"]: int(part["name"].split()[-1][:-1])
                for part in ask(several.port, "/readyz").body["parts"]
            }
            os.kill(children[min(children)], signal.SIGTERM)
            several.wait_for(lambda: "a new one starts" in several.log.read_text(), 30, "another start")
            assert file.exists()
            several.wait_until_ready()
            process.terminate()
            process.wait(40)
        finally:
            process.kill()
            process.wait()
    assert several.log.read_text().count("clean=True") == 3


@pytest.mark.parametrize("code", [2, 3, 4])
def test_an_exit_code_of_somebody_elses_is_a_death_as_any(several: Several, code: int) -> None:
    with several.run() as process:
        several.wait_until_ready()
        several.send(range(1), do="exit", code=code)
        process.wait_for(f"ended with {code}; a new one starts in 0.5 s")
        several.send(range(1, 8))
        several.wait_for(lambda: {n for n, _ in several.runs} >= set(range(1, 8)), 60, "the others")
        assert process.stop() == 0


def test_a_signal_while_one_has_halted_ends_the_other_in_order(several: Several) -> None:
    with several.run(FLOWKIT_ON_POISON="stop", FLOWKIT_RETRY="1") as process:
        several.wait_until_ready()
        several.send(range(4), do="stop", seconds=4)
        process.wait_for("has ended for good, so the others are told to stop")
        process.signal(signal.SIGTERM)
        assert process.wait() == 1
    assert process.output.count("clean=True") == 1
    assert len(several.runs) == 1


def test_threads_of_the_import_are_told_of(several: Several) -> None:
    with several.run(SEVERAL_THREAD="1") as process:
        several.wait_until_ready()
        assert process.stop() == 0
    assert process.output.count("has started threads (made-at-import), which its processes do not have") == 1


def test_in_the_background(several: Several, tmp_path: Path) -> None:
    files = ("--pid", str(tmp_path / "run.pid"), "--log", str(several.log))
    done = flowkit("run", "several:app", "--processes", "2", "--daemon", *files, env=several.env)
    try:
        assert done.code == 0, done.err
        assert ask(several.port, "/readyz").status == 200
        several.send(range(8))
        several.wait_for_all(8)
    finally:
        done = flowkit("stop", *files[:2])
    assert done.code == 0, done.err
