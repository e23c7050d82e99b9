"""Avro and JSON Schema through confluent-kafka's serializers, against a stand-in of the registry (registry.py)."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.schema_registry import (
    Schema,
    SchemaReference,
    SchemaRegistryClient,
    topic_record_subject_name_strategy,
)
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONDeserializer, JSONSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from registry import Registry
from support import make_app, run, shown

from flowkit import ConfigurationError, ParserError, PayloadError, RegistryUnavailable
from flowkit.errors import is_passing
from flowkit.parsers import registry as registry_module
from flowkit.parsers.registry import Avro, JsonSchema
from flowkit.testing import Client

ORDER = {
    "type": "record",
    "name": "Order",
    "fields": [{"name": "id", "type": "long"}, {"name": "user", "type": "string"}],
}
WIDER = {**ORDER, "fields": [*ORDER["fields"], {"name": "total", "type": "double", "default": 0.5}]}
STRICTER = {**ORDER, "fields": [*ORDER["fields"], {"name": "total", "type": "double"}]}
ORDER_JSON = {
    "title": "Order",
    "type": "object",
    "properties": {"id": {"type": "integer"}, "user": {"type": "string"}},
    "required": ["id"],
}
VALUE = {"id": 7, "user": "ann"}
ON_THE_WIRE = b"\x00\x00\x00\x00\x01\x0e\x06ann"
"""What the format says: a zero, the id of the schema in four bytes, and Avro: 7 as a zigzag, a length, the text."""


@dataclasses.dataclass
class Order:
    id: int
    user: str


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setattr(registry_module, "DEFAULTS", {**registry_module.DEFAULTS, "retries.wait.ms": 10})
    monkeypatch.setattr(registry_module, "QUIET", 0.0)
    with Registry() as server:
        yield server


def context(topic: str = "orders") -> SerializationContext:
    return SerializationContext(topic, MessageField.VALUE)


@pytest.fixture
def theirs(registry: Registry) -> Iterator[SchemaRegistryClient]:
    """The client of another program."""
    with SchemaRegistryClient({"url": registry.url}) as client:
        yield client


def asked(registry: Registry) -> list[str]:
    """What was asked about schemas: newer clients first look up the name of the subject, each serializer by itself."""
    return [line for line in registry.asked if "/associations/" not in line]


class TestOnTheWire:
    def test_avro_is_what_the_format_says(self, registry: Registry) -> None:
        orders = Avro(registry.url, schema=ORDER, topic="orders")

        assert orders.generate(VALUE) == ON_THE_WIRE
        assert orders.parse(ON_THE_WIRE) == VALUE
        assert registry.subjects == {"orders-value": [1]}

    def test_what_their_avro_serializer_writes_is_read_and_the_other_way_round(
        self, registry: Registry, theirs: SchemaRegistryClient
    ) -> None:
        written = AvroSerializer(theirs, json.dumps(ORDER))(VALUE, context())

        assert written is not None
        assert Avro(registry.url, topic="orders").parse(written) == VALUE
        ours = Avro(registry.url, schema=ORDER, topic="orders").generate(Order(8, "bob"))
        assert AvroDeserializer(theirs)(ours, context()) == {"id": 8, "user": "bob"}

    def test_what_their_json_serializer_writes_is_read_and_the_other_way_round(
        self, registry: Registry, theirs: SchemaRegistryClient
    ) -> None:
        written = JSONSerializer(json.dumps(ORDER_JSON), theirs)(VALUE, context())

        assert written is not None
        assert JsonSchema(registry.url, topic="orders").parse(written) == VALUE
        ours = JsonSchema(registry.url, schema=ORDER_JSON, topic="orders").generate(Order(8, "bob"))
        assert ours == struct.pack(">bI", 0, 1) + b'{"id":8,"user":"bob"}'
        read: Any = JSONDeserializer(None, schema_registry_client=theirs)(ours, context())
        assert read == {"id": 8, "user": "bob"}

    def test_values_of_python_programs(self, registry: Registry) -> None:
        class Kind(enum.Enum):
            BIG = "big"

        @dataclasses.dataclass
        class Line:
            kind: Kind
            price: Decimal

        fields = [
            {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
            {"name": "raw", "type": "bytes"},
            {
                "name": "lines",
                "type": {
                    "type": "array",
                    "items": {
                        "type": "record",
                        "name": "Line",
                        "fields": [
                            {"name": "kind", "type": {"type": "enum", "name": "Kind", "symbols": ["big", "small"]}},
                            {
                                "name": "price",
                                "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2},
                            },
                        ],
                    },
                },
            },
        ]
        orders = Avro(registry.url, schema={"type": "record", "name": "Order", "fields": fields}, topic="orders")
        at = datetime.datetime(2026, 1, 2, 3, 4, 5, 6000, datetime.UTC)
        written = orders.generate({"at": at, "raw": bytes(range(256)), "lines": [Line(Kind.BIG, Decimal("1.10"))]})

        assert orders.parse(written) == {
            "at": at,
            "raw": bytes(range(256)),
            "lines": [{"kind": "big", "price": Decimal("1.10")}],
        }


class TestSchemas:
    @pytest.mark.parametrize("kind", ["dict", "text", "path", "Schema"])
    def test_a_schema_may_be_given_as(self, registry: Registry, tmp_path: Path, kind: str) -> None:
        text = json.dumps(ORDER)
        path = tmp_path / "order.avsc"
        path.write_text(text)
        schema = {"dict": ORDER, "text": text, "path": path, "Schema": Schema(text, "AVRO")}[kind]

        assert Avro(registry.url, schema=schema, topic="orders").generate(VALUE) == ON_THE_WIRE

    def test_a_class_has_a_json_schema(self, registry: Registry) -> None:
        orders = JsonSchema(registry.url, schema=Order, topic="orders")

        assert orders.parse(orders.generate(Order(7, "ann"))) == VALUE
        with pytest.raises(
            ParserError, match="dict cannot be written as JsonSchema of topic 'orders': 'x' is not of"
        ):
            orders.generate({"id": "x", "user": "ann"})
        with pytest.raises(
            ParserError, match="JsonSchema of topic 'orders' cannot be read: 'user' is a required prop"
        ):
            orders.parse(b"\0\0\0\0\1{}".replace(b"{}", b'{"id":1}'))

    def test_without_one_values_are_written_by_the_newest_of_the_topic(self, registry: Registry) -> None:
        registry.register("orders-value", ORDER)
        registry.register("orders-value", WIDER)

        orders = Avro(registry.url, topic="orders")

        assert orders.parse(orders.generate({**VALUE, "total": 2.0})) == {**VALUE, "total": 2.0}
        assert registry.subjects == {"orders-value": [1, 2]}
        assert not [line for line in registry.asked if line.startswith("POST")]

    def test_values_are_read_as_the_given_one_says(self, registry: Registry) -> None:
        registry.register("orders-value", ORDER)

        assert Avro(registry.url, topic="orders").parse(ON_THE_WIRE) == VALUE
        assert Avro(registry.url, schema=WIDER, topic="orders").parse(ON_THE_WIRE) == {**VALUE, "total": 0.5}
        assert registry.subjects == {"orders-value": [1]}  # to read is not to register

    def test_the_options_are_theirs(self, registry: Registry) -> None:
        registry.register("orders-value", ORDER)
        careful = {"auto.register.schemas": False}

        known = Avro(registry.url, schema=ORDER, topic="orders", serializer=careful)
        unknown = Avro(registry.url, schema=WIDER, topic="orders", serializer=careful)
        named = Avro(
            registry.url,
            schema=ORDER,
            topic="orders",
            serializer={"subject.name.strategy": topic_record_subject_name_strategy},
        )
        fixed = Avro(registry.url, topic="orders", serializer={"use.schema.id": 1})

        assert known.generate(VALUE) == named.generate(VALUE) == fixed.generate(VALUE) == ON_THE_WIRE
        assert set(registry.subjects) == {"orders-value", "orders-Order"}
        with pytest.raises(ParserError, match="Schema not found"):
            unknown.generate(VALUE)

    def test_a_schema_may_refer_to_others(self, registry: Registry) -> None:
        registry.register("order", ORDER)
        batch = json.dumps({"type": "array", "items": "Order"})
        references = [SchemaReference("Order", "order", 1)]
        before = len(registry.asked)
        registry.trouble = 503

        parser = Avro(registry.url, schema=Schema(batch, "AVRO", references), topic="batches")

        assert len(registry.asked) == before  # nothing is asked before it is needed
        with pytest.raises(RegistryUnavailable):
            parser.parse(ON_THE_WIRE)
        registry.trouble = None
        assert parser.parse(parser.generate([Order(7, "ann"), VALUE])) == [VALUE, VALUE]
        assert registry.subjects == {"order": [1], "batches-value": [2]}

    def test_each_is_asked_for_once(self, registry: Registry) -> None:
        orders = Avro(registry.url, schema=ORDER).for_topic("orders")
        for number in range(50):
            orders.parse(orders.generate({"id": number, "user": "ann"}))

        assert asked(registry) == ["POST /subjects/orders-value/versions"]
        assert len(registry.asked) <= 3

    def test_topics_of_one_parser_share_a_client_and_have_subjects_of_their_own(self, registry: Registry) -> None:
        parser = Avro(registry.url, schema=ORDER)

        assert parser.for_topic("a").generate(VALUE) == parser.for_topic("b").generate(VALUE) == ON_THE_WIRE
        assert registry.subjects == {"a-value": [1], "b-value": [1]}
        assert parser.for_topic("a") is parser.for_topic("a").for_topic("a")
        assert parser.for_topic("a")._client is parser.for_topic("b")._client


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ({"schema": "{nope"}, "Expecting property name enclosed in double quotes"),
            ({"schema": {"type": "recrod"}}, "recrod"),
            (
                {"schema": ORDER, "serializer": {"auto.regsiter.schemas": True}},
                "Unrecognized properties: auto.regsiter",
            ),
            ({"deserializer": {"nope": 1}}, "Unrecognized properties: nope"),
            ({"registry": "registry:8081"}, "Invalid url registry:8081"),
            ({"registry": {"url": "http://127.0.0.1:1", "timeuot": 1}}, "Unrecognized properties: timeuot"),
            ({"registry": {}}, "Missing required configuration property url"),
            ({"schema": Path("/nowhere/order.avsc")}, "No such file or directory: '/nowhere/order.avsc'"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_what_cannot_be_is_refused_when_it_is_made(self, arguments: dict[str, Any], sentence: str) -> None:
        with pytest.raises(ConfigurationError, match=r"^Avro") as caught:
            Avro(**{"registry": "http://127.0.0.1:1", **arguments})
        assert sentence in str(caught.value)

    def test_a_wrong_json_schema_is_refused_too(self) -> None:
        with pytest.raises(ConfigurationError, match=r"^JsonSchema"):
            JsonSchema("http://127.0.0.1:1", schema="{nope")
        with pytest.raises(ConfigurationError, match="'frog' is not valid under any of the given schemas"):
            JsonSchema("http://127.0.0.1:1", schema={"type": "frog"})

    def test_outside_routes_it_must_know_its_topic(self, registry: Registry) -> None:
        with pytest.raises(
            ConfigurationError, match=r"does not know its topic, which names the subject; .*topic=\.\.\."
        ):
            Avro(registry.url, schema=ORDER).generate(VALUE)

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "total data size is 0 bytes"),
            (b'{"id": 7}', "Invalid magic byte"),
            (ON_THE_WIRE[:6], "EOFError"),
            (ON_THE_WIRE[:5] + b"\x0e\xff\xff\xff\xff\x0f", "cannot be read"),
            (b"\0\0\0\0\x63" + ON_THE_WIRE[5:], "Schema 99 not found"),
        ],
        ids=shown,
    )
    def test_a_wrong_payload_or_an_unknown_schema_is_a_parser_error(
        self, registry: Registry, data: bytes, reason: str
    ) -> None:
        registry.register("orders-value", ORDER)

        with pytest.raises(ParserError, match=r"^Avro of topic 'orders' cannot be read: ") as caught:
            Avro(registry.url, topic="orders").parse(data)
        assert reason in str(caught.value)
        assert repr(data) in str(caught.value)
        assert not is_passing(caught.value)

    @pytest.mark.parametrize(
        ("schema", "value", "reason"),
        [
            (ORDER, {"id": "x", "user": "ann"}, "an integer is required on field id"),
            (ORDER, {"id": 1}, "user"),
            (ORDER, object(), "object cannot be written"),
            (STRICTER, {**VALUE, "total": 1.0}, "incompatible with an earlier schema for subject"),
            (None, {**VALUE, "id": None}, "on field id"),
        ],
        ids=shown,
    )
    def test_a_value_that_does_not_fit_or_a_schema_that_is_refused_is_a_parser_error(
        self, registry: Registry, schema: Any, value: Any, reason: str
    ) -> None:
        registry.register("orders-value", ORDER)

        with pytest.raises(ParserError, match="cannot be written as Avro of topic 'orders': ") as caught:
            Avro(registry.url, schema=schema, topic="orders").generate(value)
        assert reason in str(caught.value)

    def test_a_topic_without_a_schema_cannot_be_written_to_by_the_newest(self, registry: Registry) -> None:
        with pytest.raises(ParserError, match="Subject 'orders-value' not found"):
            Avro(registry.url, topic="orders").generate(VALUE)

    def test_none_is_a_tombstone_and_no_value(self, registry: Registry) -> None:
        with pytest.raises(ParserError, match="send None itself, a tombstone"):
            Avro(registry.url, topic="orders").generate(None)


class TestAway:
    """The registry is away: no fault of a message."""

    @pytest.mark.parametrize("trouble", ["gone", 500, 502, 503, 429, 408, 401, 403, 404, "page", "hang"])
    @pytest.mark.parametrize("format", [Avro, JsonSchema])
    def test_no_answer_is_no_parser_error(self, registry: Registry, format: Any, trouble: Any) -> None:
        config = {"url": registry.url, "timeout": 0.2, "max.retries": 0}
        schema = ORDER if format is Avro else ORDER_JSON
        if trouble == "gone":
            registry.stop()
        else:
            registry.trouble = trouble

        with pytest.raises(
            RegistryUnavailable, match=f"the schema registry at {registry.url} gives no ans"
        ) as caught:
            format(config, topic="orders").parse(ON_THE_WIRE)
        assert is_passing(caught.value)
        with pytest.raises(RegistryUnavailable):
            format(config, schema=schema, topic="orders").generate(VALUE)

    def test_it_asks_again_when_it_is_back(self, registry: Registry) -> None:
        orders = Avro(registry.url, schema=ORDER, topic="orders")
        registry.stop()
        with pytest.raises(RegistryUnavailable):
            orders.generate(VALUE)
        registry.start()

        assert orders.generate(VALUE) == ON_THE_WIRE

    def test_what_is_known_needs_no_registry(self, registry: Registry) -> None:
        orders = Avro(registry.url, schema=ORDER, topic="orders")
        orders.parse(orders.generate(VALUE))
        registry.stop()

        assert orders.parse(orders.generate(VALUE)) == VALUE

    def test_a_registry_that_hangs_is_not_asked_by_each_message_of_a_job(
        self, registry: Registry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(registry_module, "QUIET", 30.0)
        registry.trouble = "hang"
        orders = Avro({"url": registry.url, "timeout": 0.3, "max.retries": 0}, topic="orders")
        started = time.monotonic()
        for _ in range(100):
            with pytest.raises(RegistryUnavailable, match="timed out"):
                orders.parse(ON_THE_WIRE)

        assert len(registry.asked) == 1
        assert time.monotonic() - started < 5

    def test_the_wait_for_it_is_bounded_from_the_start(self) -> None:
        assert registry_module.DEFAULTS["timeout"] * (registry_module.DEFAULTS["max.retries"] + 1) <= 15

    def test_a_login_is_sent_and_never_shown(self, registry: Registry) -> None:
        registry.login = "ann:secret"
        registry.register("orders-value", ORDER)
        right = registry.url.replace("http://", "http://ann:secret@")
        wrong = Avro(registry.url.replace("http://", "http://ann:wrong-one@"), topic="orders")

        assert Avro(right, topic="orders").parse(ON_THE_WIRE) == VALUE
        basic = {"url": registry.url, "basic.auth.user.info": "ann:secret"}
        assert Avro(basic, topic="orders").parse(ON_THE_WIRE) == VALUE
        with pytest.raises(RegistryUnavailable, match="Unauthorized") as caught:
            wrong.parse(ON_THE_WIRE)
        assert "wrong-one" not in f"{caught.value}{wrong!r}"

    def test_the_second_address_is_asked_when_the_first_is_away(self, registry: Registry) -> None:
        registry.register("orders-value", ORDER)
        config = {"url": f"http://127.0.0.1:1,{registry.url}", "max.retries": 0}

        assert Avro(config, topic="orders").parse(ON_THE_WIRE) == VALUE


class TestRoutes:
    @pytest.mark.parametrize("inline", [True, False])
    def test_a_route_tells_its_topic_and_that_of_each_response(self, registry: Registry, inline: bool) -> None:
        app = make_app(inline=inline)
        receipt = {"type": "record", "name": "Receipt", "fields": [{"name": "order", "type": "long"}]}

        @app.topic("orders", parser=Avro(registry.url, schema=ORDER))
        @app.responds_to("copies")
        @app.responds_to("receipts", parser=Avro(registry.url, schema=receipt))
        @app.responds_to("json", parser=JsonSchema(registry.url, schema=Order))
        def handle(order: Order) -> None:
            app.respond_to("copies", order)
            app.respond_to("receipts", {"order": order.id})
            app.respond_to("json", order)

        call = Client(app).send("orders", Order(7, "ann"))

        assert [item.value for item in call.responses] == [VALUE, {"order": 7}, VALUE]
        assert registry.subjects == {
            "orders-value": [1],
            "copies-value": [1],
            "receipts-value": [2],
            "json-value": [3],
        }

    @pytest.mark.parametrize("inline", [True, False])
    def test_a_registry_that_is_away_is_no_attempt_and_makes_no_dead_letter(
        self, registry: Registry, inline: bool
    ) -> None:
        app = make_app(inline=inline)
        calls: list[Any] = []

        @app.topic("orders", parser=Avro(registry.url), retry=2, dead_letter="dead")
        def untyped(order: Any) -> None:
            calls.append(order)

        registry.stop()
        call = Client(app).send_raw("orders", ON_THE_WIRE, raise_errors=False)

        assert isinstance(call.error, RegistryUnavailable)
        assert (call.attempts, call.dead_letter, calls) == (1, None, [])

    def test_what_is_wrong_takes_the_ways_of_every_parser(self, registry: Registry) -> None:
        registry.register("orders-value", ORDER)
        app = make_app()
        seen: list[Any] = []
        app.add_topic("untyped", seen.append, parser=Avro(registry.url))

        @app.topic("orders", parser=Avro(registry.url))
        def typed(order: Order) -> None:
            seen.append(order)

        @app.topic("dates", parser=Avro(registry.url))
        def misfit(order: dict[str, datetime.date]) -> None:
            seen.append(order)

        assert run(app, b"{}", topic="untyped")[0] == 1
        assert isinstance(run(app, b"{}")[1], ParserError)
        assert isinstance(run(app, ON_THE_WIRE, topic="dates")[1], PayloadError)
        assert run(app, ON_THE_WIRE)[0] == 1
        assert seen == [{"message": b"{}"}, Order(7, "ann")]

    def test_it_works_on_after_a_fork(self, registry: Registry) -> None:
        program = f"""
import os
from flowkit.parsers.registry import Avro
value = {VALUE!r}
orders = Avro({registry.url!r}, schema={ORDER!r}, topic="orders")
orders.generate(value)
child = os.fork()
if child == 0:
    os._exit(7 if orders.parse(orders.generate(value)) == value else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), orders.parse(orders.generate(value)) == value)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)

        assert done.stdout == "7 True\n", done.stderr
        assert asked(registry) == ["POST /subjects/orders-value/versions"] * 2  # each by a client of its own
