"""The soak in a short form, and that its witnesses would see what it looks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import Kafka
from soak import ANSWERED, Kill, Plan, Soak, Watch, WitnessRedis, soak
from support import make_app, make_record
from witnesses import PARTITIONS, ScenarioError

from flowkit.dispatch import Handling
from flowkit.jobqueue import JobQueue, Pack
from flowkit.message import Partition

GROUP = "a group"


def test_nothing_is_lost_nor_queued_twice_while_everybody_is_killed_at_random(
    kafka: Kafka, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    if not kafka.apache:
        pytest.skip("the embedded broker does not hand a killed member's partitions on")
    # Given messages, two consumers and workers of all kinds, one of which is killed every second or so
    plan = Plan(count=60_000, workers="mixed", seed=time.time_ns() % 1_000_000, every=1.0, work=0.000_4, deadline=240)
    # When all of it has been handled
    findings = soak(plan, kafka.hosts, tmp_path)
    print(f"\n{findings.report()}")
    record_property("report", findings.report())
    # Then every message was queued once, handled, and again only if it was in hand at a kill
    assert findings.faults == []
    assert (findings.lost, findings.queued_twice, findings.unexplained, findings.unanswered) == (0, 0, 0, 0)
    assert len(findings.kills) >= 5
    assert findings.runs == plan.count + findings.repeated


# The witnesses, on a small scale.


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[WitnessRedis]:
    with WitnessRedis(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def small(redis: WitnessRedis, tmp_path: Path) -> Soak:
    """A soak of two messages in each partition, whose processes are not started."""
    return Soak(Plan(count=2 * PARTITIONS), "127.0.0.1:1", redis, tmp_path)


@pytest.fixture
def put(redis: WitnessRedis, small: Soak) -> Callable[[int, list[int]], None]:
    """What a consumer does with these offsets of a partition."""
    app = make_app(redis=redis.url, kafka={"hosts": "127.0.0.1:1"}, inline=False)
    app.topic(small.topic)(lambda data: None)
    app.start()
    handling: Handling = app.handling(small.topic)
    queue = JobQueue(redis.url, "shop", "shop:app")

    def put(number: int, offsets: list[int]) -> None:
        partition = Partition(small.topic, number)
        records = [make_record(topic=small.topic, partition=number, offset=offset) for offset in offsets]
        packs = [Pack(handling, "default", handling.entries(records, 0.0))]
        queue.enqueue(GROUP, packs, queue.marks.read(GROUP, [partition]), {partition: offsets[-1] + 1})

    return put


def test_redis_bears_witness_of_each_message_that_was_queued(
    small: Soak, put: Callable[[int, list[int]], None]
) -> None:
    for number in range(PARTITIONS):
        put(number, [0, 1])
    small.redis.stop()
    small.look_at_jobs()
    assert (small.findings.never_queued, small.findings.queued_twice, small.findings.jobs) == (0, 0, PARTITIONS)
    assert small.findings.faults == []


def test_redis_bears_witness_of_messages_that_were_queued_twice_or_never(
    small: Soak, put: Callable[[int, list[int]], None]
) -> None:
    for number in range(PARTITIONS - 1):
        put(number, [0, 1])
    put(0, [1])
    small.redis.stop()
    small.look_at_jobs()
    assert (small.findings.never_queued, small.findings.queued_twice) == (2, 1)
    assert len(small.findings.faults) == 2
    assert "partition 0 offset 1" in " ".join(small.findings.faults)


class Handler:
    """A process that handles messages, as the ledgers tell of it."""

    def __init__(self, soak: Soak, pid: int) -> None:
        self.pid = pid
        self.path = soak.ledgers.directory / f"{pid}-{pid}"

    def run(self, *messages: int, job: str, at: float) -> None:
        with self.path.open("a") as file:
            for message in messages:
                offset, partition = divmod(message, PARTITIONS)
                file.write(f"{message} {partition} {offset} {job} {round(at * 1e9)}\n")


def look(soak: Soak, *kills: Kill) -> list[str]:
    soak.findings.kills.extend(kills)
    soak.ledgers.read()
    soak.look_at_runs()
    soak.judge()
    return soak.findings.faults


def test_a_run_is_repeated_with_good_reason_if_its_process_was_killed_with_the_job_in_hand(small: Soak) -> None:
    Handler(small, 7).run(*range(8), job="a", at=100.0)
    Handler(small, 8).run(*range(6, 12), job="a", at=101.0)
    faults = look(small, Kill(0, "a kind", (7,), 100.2, 0))
    assert faults == []
    assert (small.findings.repeated, small.findings.unexplained, small.findings.never_handled) == (2, 0, 0)
    assert small.findings.repeated_by == {0: 2}
    assert small.findings.in_hand_by == {0: 8}
    assert small.findings.oldest == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("later_job", "kill"),
    [
        pytest.param(None, Kill(0, "a kind", (9,), 100.2, 0), id="another-process-was-killed"),
        pytest.param(None, Kill(0, "a kind", (7,), 99.0, 0), id="it-was-killed-before"),
        pytest.param("b", Kill(0, "a kind", (7,), 100.2, 0), id="that-job-was-no-longer-in-hand"),
    ],
)
def test_any_other_repeated_run_is_a_fault(small: Soak, later_job: str | None, kill: Kill) -> None:
    killed = Handler(small, 7)
    killed.run(*range(8), job="a", at=100.0)
    if later_job:
        killed.run(8, job=later_job, at=100.1)
    Handler(small, 8).run(*range(7, 12), job="a", at=101.0)
    faults = look(small, kill)
    assert small.findings.unexplained >= 1
    assert "handled again though in no killed hand" in faults[0]


def test_messages_that_no_handler_has_seen_are_lost(small: Soak) -> None:
    Handler(small, 7).run(*range(10), job="a", at=100.0)
    assert look(small) == ["never handled: [4]@1, [5]@1, ..."]
    assert small.findings.lost == 2


def test_a_line_of_the_ledger_that_is_being_written_is_read_once_it_is_whole(small: Soak) -> None:
    handler = Handler(small, 7)
    handler.run(0, job="a", at=100.0)
    whole = handler.path.read_text()
    handler.path.write_text(whole[:-4])
    small.ledgers.read()
    assert small.ledgers.handled == 0
    handler.path.write_text(whole)
    small.ledgers.read()
    assert small.ledgers.handled == 1


def test_progress_that_is_not_kept_is_a_fault(tmp_path: Path, redis: WitnessRedis) -> None:
    soak = Soak(Plan(count=2_400), "127.0.0.1:1", redis, tmp_path)
    Handler(soak, 7).run(*range(2_400), job="a", at=100.0)
    Handler(soak, 8).run(*range(2_400), job="a", at=101.0)
    (fault,) = look(soak, Kill(0, "a kind", (7,), 100.2, 0))
    assert "progress is not kept" in fault


def test_a_soak_that_takes_too_long_ends_and_says_how_far_it_was(small: Soak) -> None:
    Handler(small, 7).run(0, job="a", at=100.0)
    watch = Watch(time.monotonic() - 1, small.ledgers, small.fleet, lambda: "3 jobs queued")
    with pytest.raises(ScenarioError, match="too long: 1 handled in 1 runs, 0 kills; 3 jobs queued"):
        watch.look()


def test_the_application_and_the_soak_mean_the_same_messages_by_those_that_are_answered() -> None:
    app = (Path(__file__).parents[1] / "apps" / "ledger.py").read_text()
    assert f"\nANSWERED = {ANSWERED}\n" in app
