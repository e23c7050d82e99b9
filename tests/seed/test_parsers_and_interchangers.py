"""The seed's "parser" and "interchanger": its examples in Python, its rules, and binary messages through real queues."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from commands import read_topic
from kafka import KafkaProducer
from processes import Process
from redis import Redis
from registry import Registry
from servers import Kafka, WaitFor

from flowkit import Flowkit, ParserError
from flowkit.parsers.msgpack import MessagePack
from flowkit.parsers.registry import Avro, JsonSchema
from flowkit.testing import Client

EXAMPLES = Path(__file__).parents[2] / "examples"
EVERY_BYTE = bytes(range(256))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports an example, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and EXAMPLES in Path(str(sys.modules[name].__file__)).parents:
            del sys.modules[name]


class TestOwnParserAndInterchanger:
    """``class XmlParser`` of the seed: a parser of one's own, whose error descends from ParserError."""

    @pytest.fixture
    def example(self, load: Callable[[str], Any]) -> Any:
        return load("own_formats")

    @pytest.fixture
    def flowkit_app(self, example: Any) -> Flowkit:
        app: Flowkit = example.app
        return app

    def test_it_parses_and_generates(self, flowkit_client: Client) -> None:
        call = flowkit_client.send("orders", {"id": 7, "price": 100})

        assert call.sent("invoices").raw == b"<invoice><order>7</order><total>119.0</total></invoice>"
        assert call.sent("invoices").value == {"order": "7", "total": "119.0"}

    def test_what_is_wrong_fails_with_an_error_of_its_own(self, example: Any, flowkit_client: Client) -> None:
        assert issubclass(example.XmlParser.Mistake, ParserError)
        with pytest.raises(example.XmlParser.Mistake, match="the root is <a>, not <order>"):
            flowkit_client.send_raw("orders", b"<a/>")
        with pytest.raises(example.XmlParser.Mistake, match="not XML"):
            flowkit_client.send_raw("orders", b"<order>")

    def test_the_interchanger_is_what_is_in_the_queue(self, example: Any) -> None:
        handling = example.app.handling("orders")
        written = handling.parser.generate({"id": 7, "price": "1" * 10_000})

        assert example.Lzma.parse(example.Lzma.load(written)) == written
        assert len(example.Lzma.load(written)) < len(written) / 20


class TestFormats:
    """Each parser that ships, as the documentation shows it."""

    @pytest.fixture
    def flowkit_app(self, load: Callable[[str], Any]) -> Flowkit:
        app: Flowkit = load("formats").app
        return app

    def test_text(self, flowkit_client: Client) -> None:
        call = flowkit_client.send_raw("lines", "zwei Wörter".encode())

        assert [item.raw for item in call.all_sent("words")] == [b"zwei", "Wörter".encode()]

    def test_raw_bytes_and_a_response_in_another_format(self, flowkit_client: Client) -> None:
        assert flowkit_client.send("photos", EVERY_BYTE).sent("sizes").raw == b"256"

    def test_json_in_and_messagepack_out(self, flowkit_client: Client) -> None:
        packed = flowkit_client.send("readings", {"sensor": "a", "celsius": 1.5}).sent("readings.packed")

        assert packed.raw == MessagePack.generate({"sensor": "a", "celsius": 1.5})
        assert packed.value == {"sensor": "a", "celsius": 1.5}

    def test_xml(self, flowkit_client: Client) -> None:
        order = ElementTree.fromstring('<order id="7"><item price="1.5"/><item price="2"/></order>')

        receipt = flowkit_client.send("orders.xml", order).sent("receipts.xml")

        assert receipt.raw == b'<receipt order="7"><total>3.5</total></receipt>'

    def test_what_is_not_json_arrives_as_its_bytes(self, flowkit_client: Client) -> None:
        """The seed's rule: "parsing failure won't stop the application flow"."""
        assert flowkit_client.send_raw("letters", b"\xffDear").sent("letters.odd").raw == b"\xffDear"
        assert flowkit_client.send("letters", {"dear": 1}).responses == []


class TestSchemaRegistry:
    def test_the_example(self, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        price = {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}
        order = {
            "type": "record",
            "name": "Order",
            "fields": [{"name": "id", "type": "long"}, {"name": "prices", "type": {"type": "array", "items": price}}],
        }
        with Registry() as registry:
            monkeypatch.setenv("REGISTRY", registry.url)
            app = load("avro_orders").app
            other = Avro(registry.url, schema=order, topic="orders")

            call = Client(app).send_raw(
                "orders", other.generate({"id": 7, "prices": [Decimal("1.10"), Decimal("2.20")]})
            )
            Client(app).send("visits", {"page": "/", "seconds": 2})

            assert call.sent("invoices").value == {"order": 7, "total": Decimal("3.30")}
            assert capsys.readouterr().out == "/: 2.0 s\n"
            assert sorted(registry.subjects) == ["invoices-value", "orders-value", "visits-value"]
            with pytest.raises(ParserError, match="'page' is a required property"):
                JsonSchema(registry.url, topic="visits").generate({"seconds": 1})


class Processes:
    """An application of ``apps/`` with topics of its own, and what other programs send it."""

    def __init__(self, kafka: Kafka, url: str, logs: Path, prefix: str, **env: str) -> None:
        self.kafka = kafka
        self.logs = logs
        self.url = url
        self.prefix = prefix
        self.env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts, "FLOWKIT_REDIS": url, **env}

    def start(self, *command: str, **env: str) -> Process:
        return Process(*command, env={**self.env, **env}, log=self.logs / f"{command[0]}-{command[1]}.log")

    def send(self, **values: bytes) -> None:
        """One message to each topic, named without its prefix; the key is the topic's name too."""
        producer = KafkaProducer(bootstrap_servers=self.kafka.hosts)
        with contextlib.closing(producer):
            for name, value in values.items():
                producer.send(self.prefix + name, value, key=name.encode())
            producer.flush()


def wait_for_failures(process: Process, count: int, wait_for: WaitFor) -> None:
    try:
        wait_for(lambda: process.output.count("gives no answer") >= count, 60)
    except AssertionError as error:
        raise AssertionError(f"{process.command} did not fail {count} times:\n{process.output[-4000:]}") from error


def test_binary_messages_survive_each_interchanger_and_both_workers(
    kafka: Kafka, redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    names = ("plain", "base64", "zlib", "zstd")
    prefix = f"binary-{os.urandom(4).hex()}-"
    for name in (*names, "out"):
        kafka.create_topic(prefix + name)
    processes = Processes(kafka, redis_url, tmp_path, prefix, BINARY=prefix)
    values = [EVERY_BYTE, os.urandom(900_000), b"x" * 900_000, b"", b'{"base64": "AAAA"}', b"\xff"]
    workers = {"rq": ("rq", "worker", "--url", redis_url, "default"), "flowkit": ("flowkit", "worker", "binary:app")}
    with processes.start("flowkit", "run", "binary:app"):
        for number, (worker, command) in enumerate(workers.items(), 1):
            with processes.start(*command, WORKER=worker) as process:
                for value in values:
                    processes.send(**dict.fromkeys(names, value))
                found = read_topic(kafka.hosts, prefix + "out", number * len(names) * len(values), 60)
                assert process.stop() == 0

    got: dict[tuple[str, str], list[bytes]] = {}
    for record in found:
        headers = dict(record.headers)
        assert headers["via"] == record.key
        got.setdefault((headers["worker"].decode(), record.key.decode()), []).append(record.value)
    assert got.keys() == {(worker, name) for worker in workers for name in names}
    for received in got.values():
        assert sorted(received) == sorted(values)


def test_no_message_is_lost_or_put_aside_while_the_registry_is_away(
    kafka: Kafka, redis: Redis, redis_url: str, tmp_path: Path, wait_for: WaitFor
) -> None:
    prefix = f"avro-{os.urandom(4).hex()}-"
    for name in ("inline", "queued", "out", "dead"):
        kafka.create_topic(prefix + name)
    schema = {"type": "record", "name": "Order", "fields": [{"name": "id", "type": "long"}]}
    with Registry() as registry:
        processes = Processes(kafka, redis_url, tmp_path, prefix, AVRO=prefix, REGISTRY=registry.url)
        other = Avro(registry.url, schema=schema, topic="elsewhere")
        written = other.generate({"id": 7})
        registry.stop()
        with (
            processes.start("flowkit", "run", "avro_app:app") as consumer,
            processes.start("flowkit", "worker", "avro_app:app") as worker,
        ):
            processes.send(inline=written, queued=written)
            # more often than the two attempts that a message has
            for process in (consumer, worker):
                wait_for_failures(process, 3, wait_for)
            registry.start()
            answers = [json.loads(record.value) for record in read_topic(kafka.hosts, prefix + "out", 2, 60)]
            cut, unknown = written[:5] + b"\xff", b"\0\0\0\0\x63" + written[5:]
            processes.send(inline=cut, queued=unknown)
            dead = read_topic(kafka.hosts, prefix + "dead", 2, 60)

    assert sorted(answers, key=str) == [{"inline": {"id": 7}}, {"queued": {"id": 7}}]
    # what is really wrong is put aside, and nothing else was
    assert sorted(record.value for record in dead) == sorted([cut, unknown])
    assert {dict(record.headers)["kafka_dlt-exception-fqcn"] for record in dead} == {b"flowkit.errors.ParserError"}
