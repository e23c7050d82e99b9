"""Concurrency and shutdown: one thread and one client a group, several processes a load, and an end that loses nothing."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from commands import NOBODY
from processes import Process
from redis import Redis
from servers import Kafka, WaitFor
from support import make_app

from flowkit.clients.memory import Broker
from flowkit.processes import PRESS_FOR
from flowkit.server import Server
from seed.system import System


@pytest.fixture
def apache(kafka: Kafka) -> Kafka:
    if not kafka.apache:
        pytest.skip("the embedded broker has no groups with several members to be relied on")
    return kafka


# One thread and one client for each group.


def test_each_group_has_a_thread_of_its_own(wait_for: WaitFor) -> None:
    app, broker = make_app(kafka={"hosts": NOBODY}), Broker()
    for topic, group in [("a", "first"), ("b", "first"), ("c", "second"), ("d", "third")]:
        app.topic(topic, group=group)(lambda: None)
    server = Server(app, broker.consumer)
    running = threading.Thread(target=server.run)
    running.start()
    try:
        wait_for(lambda: len(consumer_threads()) == 3, 10, "three threads")
        assert consumer_threads() == {"flowkit-first", "flowkit-second", "flowkit-third"}
    finally:
        server.stop()
        running.join(10)
    assert consumer_threads() == set()


def consumer_threads() -> set[str]:
    names = {thread.name for thread in threading.enumerate()}
    return names & {"flowkit-first", "flowkit-second", "flowkit-third"}


def test_a_busy_group_does_not_hold_up_the_others(system: System, kafka: Kafka) -> None:
    # Given a group that is busy with a message for as long as we like
    with system.run() as server, system.worker() as worker:
        system.send("payload", {"n": 1, "wait": "gate"})
        system.wait_for_note("payload", 1)
        # When others get messages, then they do not wait
        system.send("message", {"n": 2})
        system.send("typed", {"n": 3})
        assert [answer["n"] for answer in system.answers(2)] == [2, 3]
        # and the broker has one member of each, all of them in this one process
        if kafka.apache:
            groups = (f"{system.name}.shared", f"shapes_{system.name}.message", f"shapes_{system.name}.typed")
            members = [system.group(group)["members"] for group in groups]
            assert [len(found) for found in members] == [1, 1, 1]
            assert len({found[0]["member_id"] for found in members}) == 3
        system.redis.rpush("gate", "open")
        assert [answer["n"] for answer in system.answers(3)] == [1, 2, 3]
        assert worker.stop() == 0
        assert server.stop() == 0


# Several processes.


def test_several_processes_share_the_load_and_one_that_ends_hands_over(
    apache: Kafka, redis: Redis, redis_url: str, tmp_path: Path, wait_for: WaitFor
) -> None:
    system = System(apache, redis, redis_url, tmp_path, wait_for, partitions=4)
    group = f"{system.name}.shared"

    def shares() -> list[int]:
        """How many partitions each member has, by the broker's description."""
        found = [member["member_assignment"] for member in system.group(group)["members"]]
        assigned = [assignment["assigned_partitions"] for assignment in found if assignment]  # "" until it has joined
        return sorted(sum(len(topic["partitions"]) for topic in topics) for topics in assigned)

    def send(start: int) -> None:
        for partition in range(4):
            system.send(
                "payload", *({"n": start + partition * 5 + number} for number in range(5)), partition=partition
            )

    with system.run() as first, system.run() as second:
        # Given two processes, which have half of the partitions each
        wait_for(lambda: shares() == [4, 4], 30, "both to have half of two topics with four partitions")
        send(0)
        answers = system.answers(20)
        assert Counter(answer["pid"] for answer in answers) == {first.pid: 10, second.pid: 10}
        # When one ends, then the other does it all
        assert first.stop() == 0
        wait_for(lambda: shares() == [8], 30, "the other to have all")
        send(20)
        answers = system.answers(40)
        assert {answer["pid"] for answer in answers[20:]} == {second.pid}
        assert second.stop() == 0
    assert [answer["n"] for answer in answers] == list(range(40))  # each once


# Shutdown.


@pytest.mark.parametrize("plain", [False, True], ids=["flowkit worker", "rq worker"])
def test_a_stop_finishes_what_is_in_hand_everywhere_and_loses_nothing(system: System, plain: bool) -> None:
    # Given a message in hand inline and one in a worker, and more behind each of them
    system.send("payload", {"n": 1, "wait": "gate"}, {"n": 2})
    system.send("message", {"n": 3, "wait": "gate"}, {"n": 4})
    with system.run() as server, system.worker(plain=plain) as worker:
        system.wait_for_note("payload", 1)
        system.wait_for_note("message", 3)
        # When both are asked to stop
        for process in (server, worker):
            process.signal(signal.SIGTERM)
        server.wait_for("SIGTERM, finishing the messages in hand")
        # Then they finish what they have, and end clean
        assert (server.popen.poll(), worker.popen.poll()) == (None, None)
        system.redis.rpush("gate", "open", "open")
        assert server.wait() == 0
        assert worker.wait() == 0
    if not plain:  # RQ's own finishes its whole job
        assert [answer["n"] for answer in system.answers(2)] == [1, 3]
    # and what was behind is done by the next ones
    with system.run() as server, system.worker(plain=plain) as worker:
        assert [answer["n"] for answer in system.answers(4)] == [1, 2, 3, 4]
        assert server.stop() == 0
        assert worker.stop() == 0
    assert [len(system.notes(what, n)) for what, n in [("payload", 1), ("message", 3)]] == [1, 1]


def test_a_second_signal_ends_at_once_and_what_was_in_hand_is_not_committed(system: System) -> None:
    system.send("payload", {"n": 1, "wait": "gate"})
    with system.run() as server:
        system.wait_for_note("payload", 1)
        server.signal(signal.SIGTERM)
        server.wait_for("SIGTERM, finishing the messages in hand")
        server.signal(signal.SIGTERM)
        assert server.wait(5) == 1
        assert "ending at once; unfinished messages come again" in server.output
    assert system.committed(f"{system.name}.shared", "payload") in (None, 0)


def test_a_stop_that_takes_too_long_is_cut_off_and_the_message_comes_again(system: System) -> None:
    system.send("payload", {"n": 1, "wait": "gate"})
    with system.run(FLOWKIT_SHUTDOWN_TIMEOUT="1") as server:
        system.wait_for_note("payload", 1)
        assert ended_within(server, 1, 6) == 1
        assert "did not end within shutdown_timeout (1 s); its message comes again" in server.output
        assert "in work" in server.output  # where it was stuck
    with system.run() as server:
        system.wait_for_note("payload", 1, count=2)
        system.redis.rpush("gate", "open", "open")
        assert [answer["n"] for answer in system.answers(1)] == [1]
        assert server.stop() == 0


def test_a_job_that_outlasts_the_stop_is_cut_off_and_comes_again(system: System) -> None:
    with system.run() as server:
        system.send("message", {"n": 1, "wait": "gate"}, {"n": 2})
        with system.start("flowkit", "worker", "shapes:app", FLOWKIT_SHUTDOWN_TIMEOUT="2") as worker:
            system.wait_for_note("message", 1)
            assert ended_within(worker, 2, 9) == 1
            assert (
                f"a job of {system.name} did not end within shutdown_timeout (2 s); it comes again" in worker.output
            )
        with system.worker() as worker:
            system.wait_for_note("message", 1, count=2)
            system.redis.rpush("gate", "open", "open")
            assert [answer["n"] for answer in system.answers(2)] == [1, 2]
            assert worker.stop() == 0
        assert server.stop() == 0


def test_a_job_that_heeds_no_signal_does_not_hold_up_the_stop_for_ever(system: System) -> None:
    with system.run():
        system.send("message", {"n": 1, "deaf": True, "wait": "gate"})
        with system.start("flowkit", "worker", "shapes:app", FLOWKIT_SHUTDOWN_TIMEOUT="0.5") as worker:
            system.wait_for_note("message", 1)
            assert ended_within(worker, 0.5 + PRESS_FOR, 25) == 1, worker.output


def ended_within(process: Process, least: float, most: float) -> int:
    """SIGTERM; gives the exit code."""
    began = time.monotonic()
    code = process.stop(timeout=most)
    assert time.monotonic() - began >= least * 0.9
    return code
