"""Receiving messages: ``flowkit run`` as a process on a real broker and Redis, with the work inline or in workers."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import NOBODY, flowkit, read_topic
from kafka import KafkaProducer
from processes import Process
from servers import Kafka, MakeTopic

from flowkit import Flowkit, PayloadError
from flowkit.testing import Client
from seed.system import IN, System


@pytest.mark.parametrize("worker", ["rq worker", "flowkit worker"])
def test_every_shape_of_handler_receives_its_messages_inline_or_queued(system: System, worker: str) -> None:
    # Given an application with a handler for a payload, a Message, a typed payload and an async one
    with system.run() as server, system.worker(plain=worker == "rq worker") as queue_worker:
        # When each topic gets messages
        for number, topic in enumerate(IN):
            system.send(topic, {"n": number}, {"n": number + 10})
        answers = system.answers(8)
        # Then each was handled once, by its handler
        assert [answer["by"] for answer in answers] == [*IN, *IN]
        # and in the consumer's own process where the route is inline, elsewhere where it is queued
        inline = {answer["pid"] for answer in answers if answer["by"] in ("payload", "coroutine")}
        queued = {answer["pid"] for answer in answers if answer["by"] in ("message", "typed")}
        assert inline == {server.pid}
        assert server.pid not in queued
        assert queue_worker.stop() == 0
        assert server.stop() == 0
    assert len(system.notes("first")) == 8


def test_what_was_received_is_committed_and_not_received_again(system: System) -> None:
    for sent in ([{"n": 0}, {"n": 1}], [{"n": 2}]):
        with system.run() as server:
            system.send("payload", *sent)
            system.answers(sent[-1]["n"] + 1)
            server.signal(signal.SIGINT)
            assert server.wait() == 0
        assert system.committed(f"{system.name}.shared", "payload") == sent[-1]["n"] + 1
    assert [note["n"] for note in system.notes("payload")] == [0, 1, 2]


def test_an_application_that_is_inline_as_a_whole_needs_no_redis(
    kafka: Kafka, topic: MakeTopic, tmp_path: Path
) -> None:
    given, answered = topic("given"), topic("answered")
    env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts, "RELAY_INLINE": "1", "RELAY_IN": given, "RELAY_OUT": answered}
    with Process("flowkit", "run", "relay:app", env=env, log=tmp_path / "log") as server:
        with contextlib.closing(KafkaProducer(bootstrap_servers=kafka.hosts)) as producer:
            producer.send(given, b"7").get(30)
        [record] = read_topic(kafka.hosts, answered, 1)
        assert record.value == b"7"
        assert server.stop() == 0


def test_a_server_without_brokers_says_so_and_ends() -> None:
    done = flowkit("run", "quick:app", env={"FLOWKIT_REDIS": f"redis://{NOBODY}", "TASKS_IN": "a", "TASKS_OUT": "b"})
    assert done.code == 2
    assert "kafka.hosts" in done.err
    assert "Traceback" not in done.err


# The example, without a broker.


@pytest.fixture
def flowkit_app(example: Callable[[str], Any]) -> Flowkit:
    app: Flowkit = example("receiving").app
    return app


@pytest.mark.parametrize(
    ("topic", "value", "printed", "queue"),
    [
        ("letters", {"to": "ann"}, "to ann\n", "default"),
        ("postcards", {"to": "ann"}, "ann from partition 0 at offset 0 key b'k'\n", None),
        ("parcels", {"to": "ann", "grams": 500}, "ann 0.5 kg\n", "default"),
        ("addresses", None, "forget b'k'\n", None),
        ("telegrams", {"to": "ann"}, "delivering to ann\ndelivering to archive\n", None),
    ],
)
def test_each_shape_of_handler_is_given_what_it_asks_for(
    flowkit_client: Client,
    capsys: pytest.CaptureFixture[str],
    topic: str,
    value: Any,
    printed: str,
    queue: str | None,
) -> None:
    call = flowkit_client.send(topic, value, key="k")
    assert capsys.readouterr().out == printed
    assert call.queue == queue


def test_a_typed_payload_that_does_not_fit_fails_with_what_is_wrong(flowkit_client: Client) -> None:
    call = flowkit_client.send("parcels", {"to": "ann", "grams": "much"}, raise_errors=False)
    assert isinstance(call.error, PayloadError)
    assert "grams: Input should be a valid integer" in str(call.error)
    assert call.dead_letter is not None


def test_an_untyped_one_that_cannot_be_parsed_arrives_raw(flowkit_client: Client) -> None:
    with pytest.raises(KeyError, match="to"):  # what arrived was {"message": b"to: ann"}
        flowkit_client.send_raw("letters", b"to: ann")
