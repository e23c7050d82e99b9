"""Dead letters on real servers: how they come about, when they stop the process, and ``flowkit dead``."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commands import Done, flowkit, read_topic
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from processes import Process
from redis import Redis
from rq.registry import FailedJobRegistry
from servers import Kafka, WaitFor

from flowkit import Settings
from flowkit.clients.kafka_python import Producer
from flowkit.deadletters import letter
from flowkit.message import PlainRecord
from flowkit.replay import AT_ONCE


class Mortal:
    """The application ``mortal`` with topics of its own."""

    def __init__(self, kafka: Kafka, directory: Path, redis_url: str = "", partitions: int = 1) -> None:
        self.kafka = kafka
        self.hosts = kafka.hosts
        self.prefix = f"{uuid.uuid4().hex[:8]}."
        self.log = directory / "log"
        self.mended = directory / "mended"
        self.env = {
            "FLOWKIT_KAFKA_HOSTS": self.hosts,
            "FLOWKIT_REDIS": redis_url,
            "MORTAL_PREFIX": self.prefix,
            "MORTAL_MENDED": str(self.mended),
            "MORTAL_INLINE": "0" if redis_url else "1",
        }
        if not redis_url:
            del self.env["FLOWKIT_REDIS"]
        for name in ("in", "in.dead", "out"):
            kafka.create_topic(self.topic(name), partitions)

    def topic(self, name: str) -> str:
        return self.prefix + name

    @property
    def letters(self) -> str:
        return self.topic("in.dead")

    def start(self, command: str = "run", **env: str) -> Process:
        return Process("flowkit", command, "mortal:app", env={**self.env, **env}, log=self.log)

    def dead(self, *arguments: str, stdin: str = "", **env: str) -> Done:
        command, *others = arguments
        return flowkit("dead", command, "mortal:app", *others, env={**self.env, **env}, stdin=stdin)

    def listed(self, *arguments: str) -> list[dict[str, Any]]:
        done = self.dead("list", "--json", *arguments)
        assert done.code == 0, done
        found: list[dict[str, Any]] = json.loads(done.out)
        return found

    def put(self, *numbers: int, bad: bool = False, raw: bytes | None = None, **options: Any) -> None:
        values = [json.dumps({"n": number, "bad": bad}).encode() for number in numbers] + ([raw] if raw else [])
        self.send(self.topic("in"), *values, **options)

    def send(self, topic: str, *values: bytes | None, **options: Any) -> None:
        with contextlib.closing(KafkaProducer(bootstrap_servers=self.hosts)) as producer:
            for value in values:
                producer.send(topic, value=value, **options)
            producer.flush()

    def bury(self, *values: bytes | None, **fields: Any) -> None:
        """Dead letters without a process that makes them."""
        with contextlib.closing(KafkaProducer(bootstrap_servers=self.hosts, linger_ms=50)) as producer:
            for offset, value in enumerate(values):
                record = PlainRecord(
                    **{
                        "topic": self.topic("in"),
                        "partition": 0,
                        "offset": offset,
                        "timestamp": 1_700_000_000_000,
                        "key": b"k",
                        "value": value,
                        **fields,
                    }
                )
                item = letter(self.letters, record, "mortal_in", ValueError("no"), 2)
                producer.send(self.letters, value=item.value, key=item.key, headers=list(item.headers))
            producer.flush()

    def read(self, name: str, count: int) -> list[Any]:
        return read_topic(self.hosts, self.topic(name), count)

    def outs(self, count: int) -> list[int]:
        return sorted(int(record.value) for record in self.read("out", count))

    def committed(self) -> int | None:
        with contextlib.closing(
            KafkaConsumer(
                bootstrap_servers=self.hosts, group_id=f"mortal_{self.topic('in')}", enable_auto_commit=False
            )
        ) as consumer:
            offset: int | None = consumer.committed(TopicPartition(self.topic("in"), 0))
            return offset


@pytest.fixture
def mortal(kafka: Kafka, tmp_path: Path) -> Mortal:
    return Mortal(kafka, tmp_path)


@pytest.fixture
def queued(kafka: Kafka, tmp_path: Path, redis: Redis, redis_url: str) -> Mortal:
    return Mortal(kafka, tmp_path, redis_url)


# How they come about.


def test_inline_a_bad_message_goes_to_its_dead_letter_and_the_others_go_on(mortal: Mortal) -> None:
    mortal.put(1)
    mortal.put(2, bad=True)
    mortal.put(raw=b"{broken", headers=[("flowkit", b"no")])
    mortal.put(4)
    with mortal.start() as process:
        assert mortal.outs(2) == [1, 4]
        assert process.stop() == 0
    assert mortal.committed() == 4
    found = mortal.listed()
    # what cannot be parsed is not even tried twice
    assert [(it["origin"]["offset"], it["attempts"], it["error"]) for it in found] == [
        (1, 2, "builtins.ValueError"),
        (2, 1, "flowkit.errors.PayloadError"),
    ]


def test_queued_too(queued: Mortal, wait_for: WaitFor) -> None:
    queued.put(1)
    queued.put(2, bad=True)
    queued.put(raw=b"{broken")
    with queued.start(), queued.start("worker"):
        assert queued.outs(1) == [1]
        queued.read("in.dead", 2)
    assert sorted((it["origin"]["offset"], it["attempts"]) for it in queued.listed()) == [(1, 2), (2, 1)]


# When it is enough.


def test_so_many_dead_letters_in_a_row_stop_the_application_and_nothing_is_lost(mortal: Mortal) -> None:
    # a success in between begins anew
    mortal.put(1, 2, bad=True)
    mortal.put(3)
    mortal.put(4, 5, 6, 7, 8, bad=True)
    with mortal.start(MORTAL_LIMIT="3") as process:
        assert process.wait() == 1
        assert "3 messages one after the other" in process.output
        assert "flowkit dead replay --topic" in process.output
        assert "Traceback" not in process.output.partition("3 messages one after")[2]
    assert len(mortal.listed()) == 5
    assert mortal.committed() == 6
    mortal.mended.touch()
    with mortal.start(MORTAL_LIMIT="3") as process:
        assert mortal.outs(3) == [3, 7, 8]
        assert process.stop() == 0


def test_in_workers_the_limit_ends_all_of_them_and_the_other_jobs_stay(queued: Mortal, wait_for: WaitFor) -> None:
    queued.put(*range(10), bad=True)
    with queued.start() as consumer:
        with queued.start("worker", MORTAL_LIMIT="3") as worker:
            assert worker.wait() == 1
            assert "stops, and the others with it" in worker.output
        before = len(queued.listed())
        assert 3 <= before < 10
        queued.mended.touch()
        with queued.start("worker"):
            assert len(set(queued.outs(10 - before))) == 10 - before
        assert consumer.stop() == 0


# on_poison.


def test_stop_ends_with_1_and_keeps_the_offset_of_the_message(mortal: Mortal) -> None:
    mortal.put(1)
    mortal.put(2, bad=True)
    mortal.put(3)
    with mortal.start(MORTAL_END="stop") as process:
        assert process.wait() == 1
        assert f"{mortal.topic('in')}[0]@1 failed in handle, attempt 2, and on_poison='stop'" in process.output
    assert mortal.committed() == 1
    mortal.mended.touch()
    with mortal.start(MORTAL_END="stop") as process:
        assert mortal.outs(3) == [1, 2, 3]
        assert process.stop() == 0


def test_skip_says_all_that_is_needed_to_find_the_message_and_goes_on(mortal: Mortal) -> None:
    mortal.put(2, bad=True, key=b"ann")
    mortal.put(3)
    with mortal.start(MORTAL_END="skip") as process:
        assert mortal.outs(1) == [3]
        assert process.stop() == 0
        where = f"topic {mortal.topic('in')}, partition 0, offset 0, key b'ann': ValueError: 2 is bad"
        assert f"is skipped (on_poison='skip'), attempt 2: {where}" in process.output
    assert mortal.committed() == 2


def test_skip_in_a_queue_ends_the_job_without_a_failed_one(queued: Mortal, redis: Redis, wait_for: WaitFor) -> None:
    queued.put(2, bad=True)
    queued.put(raw=b"{broken")
    queued.put(3)
    with queued.start(MORTAL_END="skip"), queued.start("worker", MORTAL_END="skip") as worker:
        assert queued.outs(1) == [3]
        wait_for(lambda: worker.output.count("is skipped (on_poison='skip')") == 2)
    assert FailedJobRegistry(f"{queued.prefix}queue", connection=redis).count == 0


def test_without_an_end_what_cannot_be_parsed_stays_among_the_failed_jobs_at_once(
    queued: Mortal, redis: Redis, wait_for: WaitFor
) -> None:
    queued.put(raw=b"{broken")
    queued.put(3)
    with queued.start(MORTAL_NOWHERE="1"), queued.start("worker", MORTAL_NOWHERE="1") as worker:
        assert queued.outs(1) == [3]
        wait_for(lambda: FailedJobRegistry(f"{queued.prefix}queue", connection=redis).count == 1)
    assert "attempt 1 of 2, stays in RQ's failed jobs" in worker.output
    assert "attempt 2" not in worker.output
    listed = queued.dead("list", MORTAL_NOWHERE="1")
    assert (listed.code, listed.out) == (2, "")
    assert "has a dead_letter; name the topic to look into with --from" in listed.err
    found = queued.dead("list", "--from", queued.letters, MORTAL_NOWHERE="1")
    assert f"sum: 0 dead letters in {queued.letters}\nbeside them a failed job in RQ" in found.out


@pytest.mark.parametrize("inline", [True, False])
def test_stop_is_refused_where_it_could_not_be_kept(inline: bool) -> None:
    env = {"MORTAL_PREFIX": "x.", "MORTAL_INLINE": str(int(inline)), "MORTAL_END": "stop"}
    done = flowkit("routes", "mortal:app", env=env)
    if inline:
        assert done.code == 0
        assert "(stop)" in done.out
    else:
        assert done.code == 2
        assert "on_poison='stop' is for routes with inline=True" in done.err


# flowkit dead.


def test_list_and_show(mortal: Mortal) -> None:
    mortal.bury(b'{"n": 1}', b"\xff\x00", headers=(("trace", b"t-1"), ("raw", b"\xff")))
    mortal.send(mortal.letters, b"from somebody else")
    topic, letters = mortal.topic("in"), mortal.letters

    listed = mortal.dead("list")
    assert listed.code == 0, listed
    assert [line.split()[:2] for line in listed.out.splitlines()[:3]] == [
        ["LETTER", "FROM"],
        [f"{letters}:0:0", f"{topic}[0]@0"],
        [f"{letters}:0:1", f"{topic}[0]@1"],
    ]
    assert f"sum: 2 dead letters in {letters}\n" in listed.out
    assert "sum: 2 dead letters" in mortal.dead("list", "--limit", "1").out
    assert "; 1 more are not shown" in mortal.dead("list", "--limit", "1").out

    shown = mortal.dead("show", "0:0")
    assert shown.code == 0, shown
    for line in (f"from:        {topic}[0]@0, written 2023-11-14T22:13:20.000Z", "key:         k", "  trace: t-1"):
        assert line in shown.out.splitlines()
    assert 'value:\n  {\n    "n": 1\n  }\n' in shown.out
    assert "raw: b'\\xff'" in shown.out

    other = mortal.dead("show", f"{letters}:0:1")
    assert "value:\n  b'\\xff\\x00'\n" in other.out
    assert f"the parser of '{topic}' cannot read the value" in other.err
    as_json = json.loads(mortal.dead("show", "0:1", "--json").out)
    assert as_json["value"] == {"base64": "/wA="}
    assert mortal.dead("show", "0:2").err == (
        "flowkit: at 0:2 is a record, but no dead letter; `flowkit dead list` names those there are\n"
    )
    assert mortal.dead("show", "0:9").code == 2
    assert mortal.dead("show", "x:0:1").code == 2


def test_the_options_choose(mortal: Mortal) -> None:
    mortal.bury(b"0", b"1", b"2")
    mortal.bury(b"3", key=b"bob", partition=4)
    ask = ["--topic", mortal.topic("in"), "--group", "mortal_in", "--error", "valueerror", "--since", "1h"]
    found = mortal.listed(*ask, "--until", "2100-01-01", "--key", "k", "--partition", "0", "--limit", "2")
    assert [it["origin"]["offset"] for it in found] == [0, 1]
    (found,) = mortal.listed("--at", f"{mortal.letters}:0:3", "--offset", "0")
    assert (found["origin"]["partition"], found["key"]) == (4, "bob")
    wrong = mortal.dead("list", "--since", "yesterday")
    assert wrong.code == 2
    assert "--since is a time such as 30m, 2h or 3d (so long ago)" in wrong.err


def test_a_replayed_message_is_handled_once_and_marks_itself(mortal: Mortal) -> None:
    mortal.put(1, bad=True, key=b"ann", headers=[("trace", b"t")])
    mortal.put(2, bad=True)
    with mortal.start() as process:
        mortal.read("in.dead", 2)
        # When it is sent again before the fault is mended
        one = mortal.dead("replay", "--at", "0:0")
        assert (one.code, one.out) == (0, f"1 dead letter sent again to {mortal.topic('in')}\n")
        mortal.read("in.dead", 4)  # two letters, a note, a letter
        first, second = [it["letter"]["offset"] for it in mortal.listed()]
        assert first == 1
        # And once more afterwards
        mortal.mended.touch()
        assert (
            mortal.dead("replay", "--dry-run").out == f"2 dead letters would be sent again to {mortal.topic('in')}\n"
        )
        assert mortal.dead("replay").out == f"2 dead letters sent again to {mortal.topic('in')}\n"
        assert mortal.dead("replay").out == f"no such dead letters in {mortal.letters}\n"
        assert mortal.outs(2) == [1, 2]
        assert process.stop() == 0
    *_, third, fourth = mortal.read("in", 5)
    again = {record.value: record for record in (third, fourth)}[b'{"n": 1, "bad": true}']
    assert again.key == b"ann"
    assert tuple(again.headers) == (
        ("trace", b"t"),
        ("flowkit-replay-of", f"{mortal.letters}/0/{second}".encode()),
        ("flowkit-replays", b"2"),
    )
    assert mortal.listed() == []
    assert [it["handled"] for it in mortal.listed("--all")] == [True] * 3


def test_what_is_dropped_is_not_sent_again(mortal: Mortal) -> None:
    mortal.bury(b"0", b"1", b"2")
    asked = mortal.dead("drop", "--offset", "1", stdin="n\n")
    assert asked.code == 1
    assert f"Drop 1 dead letter of {mortal.letters}?" in asked.out
    assert len(mortal.listed()) == 3
    assert mortal.dead("drop", "--dry-run").out == "3 dead letters would be dropped\n"
    assert mortal.dead("drop", "--offset", "1", stdin="y\n").code == 0
    assert mortal.dead("drop", "--offset", "2", "--yes").out == "1 dead letter dropped\n"
    assert [it["origin"]["offset"] for it in mortal.listed()] == [0]
    mortal.dead("replay", "--to", mortal.topic("out"))
    assert [record.value for record in mortal.read("out", 1)] == [b"0"]


def test_a_message_with_neither_key_nor_value_is_no_exception(mortal: Mortal) -> None:
    settings = Settings.load({"name": "t", "kafka": {"hosts": mortal.hosts}}, {})
    with contextlib.ExitStack() as stack:
        producer = Producer(settings)
        stack.callback(producer.close, 5.0)
        delivery = producer.send(mortal.topic("in"), None, None, [("h", b"1")], None)
        producer.flush(30)
        assert producer.outcome(delivery) is None
    mortal.put(1)
    with mortal.start() as process:
        assert mortal.outs(1) == [1]
        assert process.stop() == 0
    assert mortal.dead("replay").code == 0
    again = mortal.read("in", 3)[-1]
    assert (again.key, again.value, again.headers[0]) == (None, None, ("h", b"1"))


def test_what_is_not_this_applications_is_sent_nowhere_unless_a_person_says_where(mortal: Mortal) -> None:
    mortal.bury(b"0", topic="somebody.elses")
    done = mortal.dead("replay")
    assert done.code == 2
    assert "some of these dead letters are from somebody.elses, of which mortal:app has no route" in done.err
    assert "there is no topic 'gone'" in mortal.dead("replay", "--to", "gone").err
    assert mortal.dead("replay", "--to", mortal.topic("out")).code == 0


def test_a_letter_goes_to_the_partition_it_is_from(kafka: Kafka, tmp_path: Path) -> None:
    mortal = Mortal(kafka, tmp_path, partitions=3)
    mortal.bury(b"0", b"1", partition=2)
    mortal.bury(b"2", partition=7)  # there is none
    assert mortal.dead("replay").code == 0
    found = mortal.read("in", 3)
    assert [record.value for record in found if record.partition == 2][:2] == [b"0", b"1"]
    assert {record.value for record in found} == {b"0", b"1", b"2"}


def test_killed_half_way_a_replay_leaves_nothing_out_and_repeats_a_batch_at_most(
    mortal: Mortal, tmp_path: Path, wait_for: WaitFor
) -> None:
    count = 3_000
    mortal.bury(*(b"%d" % number for number in range(count)))
    replay = ["flowkit", "dead", "replay", "mortal:app"]
    with contextlib.closing(KafkaConsumer(bootstrap_servers=mortal.hosts)) as consumer:
        where = TopicPartition(mortal.topic("in"), 0)
        with Process(*replay, env=mortal.env, log=tmp_path / "replay") as process:
            deadline = time.monotonic() + 60
            while consumer.end_offsets([where])[where] < 2 * AT_ONCE:
                assert time.monotonic() < deadline, process.output
            process.kill()
        assert 0 < len(mortal.listed()) <= count - AT_ONCE
        assert mortal.dead("replay").code == 0
        assert mortal.listed() == []
        end = consumer.end_offsets([where])[where]
    times = Counter(int(record.value) for record in mortal.read("in", end))
    assert times.keys() == set(range(count))
    assert sum(times.values()) - count <= AT_ONCE


def test_a_letter_that_is_too_large_with_its_headers_goes_with_few(mortal: Mortal) -> None:
    # Given a message of just the size that a topic takes
    limit = 1_048_588
    value = json.dumps({"n": 1, "bad": True, "x": ""}).encode()
    room = limit - len(value) - 350  # of the batch's own bytes
    large = value.replace(b'""', b'"' + b"x" * room + b'"')
    with contextlib.closing(KafkaProducer(bootstrap_servers=mortal.hosts, max_request_size=2 * limit)) as producer:
        producer.send(mortal.topic("in"), large).get(30)
    mortal.put(2)
    with mortal.start() as process:
        assert mortal.outs(1) == [2]
        assert process.stop() == 0
    (found,) = mortal.read("in.dead", 1)
    assert found.value == large
    assert {name for name, _ in found.headers} == {
        "kafka_dlt-original-topic",
        "kafka_dlt-original-partition",
        "kafka_dlt-original-offset",
        "kafka_dlt-original-consumer-group",
        "flowkit-attempts",
    }


def test_a_letter_that_is_too_large_in_any_case_holds_its_partition_and_says_what_to_do(
    mortal: Mortal, tmp_path: Path
) -> None:
    from kafka.admin import ConfigResource, KafkaAdminClient

    with contextlib.closing(KafkaAdminClient(bootstrap_servers=mortal.hosts)) as admin:
        admin.alter_configs([ConfigResource("TOPIC", mortal.letters, {"max.message.bytes": "2000"})])
    mortal.put(raw=json.dumps({"n": 1, "bad": True, "x": "x" * 5_000}).encode())
    mortal.put(2)
    with mortal.start() as process:
        process.wait_for("raise max.message.bytes of")
        assert f"{mortal.topic('in')}[0]@0 waits, because its dead letter could not be sent" in process.output
        with contextlib.closing(KafkaAdminClient(bootstrap_servers=mortal.hosts)) as admin:
            admin.alter_configs([ConfigResource("TOPIC", mortal.letters, {"max.message.bytes": "20000"})])
        assert mortal.outs(1) == [2]
        assert process.stop() == 0
    assert len(mortal.listed()) == 1


def test_letters_in_transactions_are_read_to_their_end(mortal: Mortal) -> None:
    with contextlib.closing(
        KafkaProducer(bootstrap_servers=mortal.hosts, transactional_id=mortal.prefix, enable_idempotence=True)
    ) as producer:
        producer.init_transactions()
        for end in (producer.commit_transaction, producer.abort_transaction):
            producer.begin_transaction()
            record = PlainRecord(mortal.topic("in"), 0, 5, 0, None, b"0")
            item = letter(mortal.letters, record, "mortal_in", ValueError("no"), 2)
            producer.send(mortal.letters, value=item.value, headers=list(item.headers))
            end()
    assert len(mortal.listed()) == 1


def test_no_topic_yet_is_no_failure(mortal: Mortal) -> None:
    done = mortal.dead("list", "--from", "not.there.yet")
    assert (done.code, done.out) == (0, "sum: 0 dead letters in not.there.yet\n")
    assert "there is no topic 'not.there.yet' on the brokers (yet)" in done.err


def test_no_broker_is_told(mortal: Mortal) -> None:
    done = mortal.dead("list", FLOWKIT_KAFKA_HOSTS="127.0.0.1:1")
    assert done.code == 1
    assert "Traceback" not in done.err
