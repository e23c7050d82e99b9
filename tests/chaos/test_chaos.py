"""Each scenario of the chaos suite in its short form, and that the suite would see a broken promise."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import chaos
import pytest
from kafka import KafkaAdminClient, TopicPartition
from kafka.structs import OffsetAndMetadata
from processes import Process
from scenarios import SCENARIOS, Messages, Promise, Result, Scenario, Stage, chosen
from scene import Scene, running_with
from servers import Kafka, RedisServer, WaitFor
from witnesses import NEVER, Ledgers, Stream, payload

from flowkit.errors import DevStackError

ROOT = Path(__file__).parents[2]

chaos.load_scenarios()
QUICK = [each.name for each in chosen([], quick=True)]


@pytest.fixture
def stage(kafka: Kafka) -> Iterator[Stage]:
    if not kafka.apache:
        pytest.skip("the embedded broker does not hand a killed member's partitions on")
    with Stage(hosts=kafka.hosts) as stage:
        yield stage


@pytest.mark.parametrize("name", QUICK)
def test_the_promise_is_kept(name: str, stage: Stage, record_property: Callable[[str, object], None]) -> None:
    result = stage.perform(SCENARIOS[name], quick=True, seed=time.time_ns() % 1_000_000)
    print(f"\n{chaos.table([chaos.row(result)])}")
    record_property("row", chaos.row(result))
    assert result.faults == []
    assert result.lost == 0
    assert result.disturbances >= 1


def test_each_scenario_says_what_it_does_and_why_it_has_no_short_form() -> None:
    assert [each.name for each in SCENARIOS.values() if not each.about] == []
    assert [each.name for each in SCENARIOS.values() if each.quick == ""] == []


# The suite itself, on a small scale.


def made(run: Callable[[Scene], Result | None], promise: Promise, drain: float = 5) -> Scenario:
    """A scenario that is in no list."""
    return Scenario(
        name="made-up",
        messages=Messages(inline=600, rate=600),
        promise=promise,
        run=run,
        quick="it is made up",
        env={},
        kafka=None,
        redis=RedisServer,
        partitions=2,
        isolation="read_uncommitted",
        deadline=120,
        drain=drain,
    )


def move_offsets(scene: Scene, offset: int) -> None:
    """What a bug in commits would do: the group of the stream goes on from there."""
    (stream,) = scene.streams
    places = [TopicPartition(stream.topic, number) for number in range(stream.partitions)]
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=scene.kafka.hosts)) as admin:
        admin.alter_group_offsets(stream.topic, dict.fromkeys(places, OffsetAndMetadata(offset, "", -1)))


def moving_offsets_to(offset: int) -> Callable[[Scene], None]:
    def run(scene: Scene) -> None:
        (consumer,) = scene.consumers(1)
        with scene.load(), scene.disturbance("its offsets are moved"):
            consumer.stop()
        move_offsets(scene, offset)
        consumer.start()

    return run


def test_messages_that_were_passed_over_are_lost(stage: Stage) -> None:
    result = stage.perform(made(moving_offsets_to(295), Promise(recovered=60, of="any")), quick=False, seed=1)
    assert result.sent == 600
    assert result.lost == 600 - result.handled > 20
    assert f"{result.lost:,} messages were lost" in result.faults
    assert any("lost of inline: [" in fault for fault in result.faults)


def test_messages_that_come_again_beyond_the_promise_are_a_fault(stage: Stage) -> None:
    result = stage.perform(
        made(moving_offsets_to(0), Promise(each=1, recovered=60, of="any"), drain=60), quick=False, seed=1
    )
    assert result.lost == 0
    assert result.repeated == result.again > 1
    assert result.faults == [
        f"{result.repeated:,} messages were handled again, 1 were allowed",
        f"{result.again:,} answers were sent again, 1 were allowed",
    ]


def test_a_process_that_ends_unasked_breaks_the_scenario_and_none_is_left(stage: Stage) -> None:
    scenes: list[Scene] = []

    def run(scene: Scene) -> None:
        scenes.append(scene)
        (consumer,) = scene.consumers(1)
        scene.workers(1, "rq")
        with scene.load():
            consumer.running.kill()  # behind the back of the scene
            scene.wait(30)

    result = stage.perform(made(run, Promise()), quick=False, seed=1)
    assert any(fault.startswith("consumer-1 ended by itself, with -9") for fault in result.faults)
    assert running_with(f"CHAOS_LEDGER={scenes[0].env['CHAOS_LEDGER']}") == []
    assert not scenes[0].directory.exists()


def test_a_server_that_does_not_start_breaks_its_scenario_and_the_next_one_is_to_run(stage: Stage) -> None:
    class Absent:
        def __init__(self, _: Path) -> None:
            pass

        def __enter__(self) -> None:
            raise DevStackError("there is no disk for it")

        def __exit__(self, *_: object) -> None:
            pass

    result = stage.perform(dataclasses.replace(made(lambda _: None, Promise()), kafka=Absent), quick=False, seed=1)
    assert result.faults == ["nothing was disturbed", "nothing was sent", "there is no disk for it"]


def test_the_documentation_names_each_scenario() -> None:
    page = (ROOT / "docs" / "chaos.md").read_text()
    assert [name for name in SCENARIOS if f"| `{name}` |" not in page] == []


def test_a_scenario_has_a_deadline(stage: Stage) -> None:
    def run(scene: Scene) -> None:
        scene.end_by = time.monotonic()
        scene.wait(30)

    result = stage.perform(made(run, Promise()), quick=False, seed=1)
    assert any("it has taken longer than 120 s" in fault for fault in result.faults)


KEPT = Result("kept", sent=9, handled=9, responded=9, disturbances=1, recovered=1.0, recovered_allowed=2.0)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"lost": 1}, "1 messages were lost"),
        ({"repeated": 2, "repeated_allowed": 1}, "2 messages were handled again, 1 were allowed"),
        ({"again": 1}, "1 answers were sent again, 0 were allowed"),
        ({"recovered": 2.5}, "it took 2.5 s to go on (any), 2 s were allowed"),
        ({"recovered": NEVER}, "it never went on (any), 2 s were allowed"),
        ({"disturbances": 0}, "nothing was disturbed"),
        ({"sent": 0}, "nothing was sent"),
    ],
    ids=["lost", "repeated", "again", "late", "never", "undisturbed", "empty"],
)
def test_a_broken_promise_is_a_fault(change: dict[str, float], fault: str) -> None:
    result = Result(**{**{name: getattr(KEPT, name) for name in Result.__slots__}, "faults": [], **change})
    result.judge()
    assert result.faults == [fault]


@pytest.mark.parametrize(("faults", "code"), [([], 0), (["9 messages were lost"], 1)], ids=["kept", "broken"])
def test_the_exit_code_says_whether_every_promise_was_kept(
    faults: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def perform(self: Stage, scenario: Scenario, **_: object) -> Result:
        return Result(scenario.name, sent=12_345, faults=faults)

    monkeypatch.setattr(Stage, "perform", perform)
    table = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", ["chaos.py", "--only", "consumer-killed", "--markdown", str(table)])
    assert chaos.main() == code
    output = capsys.readouterr().out
    assert "consumer-killed  12,345" in output
    assert ("BROKEN consumer-killed: 9 messages were lost" in output) == bool(code)
    assert "| consumer-killed | 12,345 |" in table.read_text()
    assert "Apache Kafka" in table.read_text()


def test_an_unknown_scenario_is_a_wrong_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["chaos.py", "--only", "nothing-of-the-kind"])
    with pytest.raises(SystemExit) as ended:
        chaos.main()
    assert ended.value.code == 2
    assert "there is no scenario nothing-of-the-kind; there are consumer-killed" in capsys.readouterr().err


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path, wait_for: WaitFor) -> None:
    mark = f"CHAOS_TEST={os.getpid()}-{time.time_ns()}"
    name, _, value = mark.partition("=")
    script = str(Path(chaos.__file__))
    env = {name: value, "TMPDIR": str(tmp_path)}
    log = tmp_path / "log"
    with Process(sys.executable, "-W", "ignore", script, "--only", "horse-killed", env=env, log=log) as suite:
        suite.wait_for("rq-worker-2 started")
        wait_for(lambda: len(running_with(mark)) > 5, 30, "its processes")
        suite.signal(signal.SIGINT)
        assert suite.wait(60) != 0
        wait_for(lambda: not running_with(mark), 10, "all of its processes to end")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


# The witnesses.


def stream(count: int = 6, partitions: int = 2) -> Stream:
    """Messages that were all sent at 10.0."""
    made = Stream("inline", "t", count, partitions)
    for number in range(count):
        made.sent_at[number] = 10.0
        made.sent += 1
    return made


def handled(stream: Stream, *runs: tuple[int, float]) -> Stream:
    for number, at in runs:
        stream.note_run(number, number % stream.partitions, at)
    return stream


def test_a_message_is_not_lost_if_it_was_handled_and_answered_or_became_a_dead_letter() -> None:
    found = handled(stream(), (0, 11.0), (1, 11.0), (2, 11.0))
    found.answered.update([0, 1, 3])
    found.dead.update([4])
    assert found.lost() == {2, 3, 5}
    found.sent_at[5] = 0.0  # Kafka never confirmed that one
    assert found.lost() == {2, 3}


def test_recovery_is_measured_from_the_next_message_of_any_or_every_partition_or_the_last_of_all() -> None:
    found = handled(stream(), (0, 11.0), (1, 11.0), (2, 14.0), (3, 17.0), (4, 18.0), (5, 19.0))
    assert found.next_of_any(12.0) == 2.0
    assert found.next_of_every(12.0) == 5.0
    assert found.last_of_all(12.0) == 7.0


def test_what_does_not_go_on_never_recovers_but_what_was_finished_needs_not() -> None:
    found = handled(stream(), (0, 11.0), (1, 11.0), (2, 11.5), (4, 11.6))
    assert found.next_of_any(12.0) == found.next_of_every(12.0) == found.last_of_all(12.0) == NEVER
    handled(found, (3, 11.7), (5, 13.0))
    assert found.next_of_every(12.0) == found.last_of_all(12.0) == 1.0


def test_a_line_of_the_ledger_that_is_being_written_is_read_once_it_is_whole(tmp_path: Path) -> None:
    found = stream()
    ledgers = Ledgers(tmp_path, [found])
    file = tmp_path / "7-1"
    file.write_bytes(b"inline 1 1 0 - 11000000000\ninline 3 1 1 - 12")
    ledgers.read()
    assert (found.handled, found.runs, ledgers.pids) == (1, 1, {7: 1})
    file.write_bytes(b"inline 1 1 0 - 11000000000\ninline 3 1 1 - 12000000000\ninline 1 1 0 - 13000000000\n")
    ledgers.close()
    assert (found.handled, found.runs, found.repeated) == (2, 3, 1)
    assert [*found.times[1]] == [11.0, 12.0, 13.0]


@pytest.mark.parametrize("number", [0, 999_999])
@pytest.mark.parametrize("do", ["", "fail"], ids=["plain", "poison"])
def test_a_message_has_200_bytes(number: int, do: str) -> None:
    assert len(payload(number, do)) == 200


def test_the_load_waits_for_a_scenario_that_is_late(stage: Stage) -> None:
    """Else its last disturbances would show nothing."""
    left: list[float] = []

    def run(scene: Scene) -> None:
        scene.consumers(1)
        with scene.load():
            for _ in scene.moments(2, apart=3):  # of a load that takes one second
                left.append(1 - scene.loading.produced)
                with scene.disturbance("nothing"):
                    pass

    result = stage.perform(made(run, Promise()), quick=False, seed=1)
    assert result.faults == []
    assert result.sent == 600
    assert min(left) > 0.05
