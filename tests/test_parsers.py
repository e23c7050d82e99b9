"""From bytes to a value and back."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import random
import subprocess
import sys
import uuid
from typing import Any
from xml.etree import ElementTree

import msgpack
import msgspec
import pydantic
import pytest
from support import make_app, make_record, run, shown

from flowkit import ConfigurationError, FlowkitError, Message, ParserError, PayloadError
from flowkit.errors import is_passing
from flowkit.parsers import Json, Raw, Text, for_topic, plain
from flowkit.parsers.msgpack import MessagePack
from flowkit.parsers.xml import Xml
from flowkit.responses import Response
from flowkit.testing import Client


@dataclasses.dataclass
class Order:
    id: int
    user: str


class Model(pydantic.BaseModel):
    id: int
    at: datetime.datetime


class Struct(msgspec.Struct):
    id: int
    order: Order


class Colour(enum.Enum):
    RED = "red"


AT = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -1, 2**53, 1.5, "", "ä €", [], [1, [2]], {}, {"a": {"b": [None]}}],
    ids=shown,
)
def test_json_comes_back_as_it_was(value: Any) -> None:
    written = Json.generate(value)

    assert isinstance(written, bytes)
    assert Json.parse(written) == value == json.loads(written)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (Order(7, "ann"), {"id": 7, "user": "ann"}),
        (Model(id=7, at=AT), {"id": 7, "at": "2026-01-02T03:04:05Z"}),
        (Struct(7, Order(1, "ann")), {"id": 7, "order": {"id": 1, "user": "ann"}}),
        ([Model(id=7, at=AT)], [{"id": 7, "at": "2026-01-02T03:04:05Z"}]),
        (AT, "2026-01-02T03:04:05+00:00"),
        (AT.date(), "2026-01-02"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Colour.RED, "red"),
        ({3, 1, 2}, [1, 2, 3]),
        (frozenset("ab"), ["a", "b"]),
        ((1, 2), [1, 2]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_json_writes_what_python_programs_hold(value: Any, written: Any) -> None:
    assert json.loads(Json.generate(value)) == written


@pytest.mark.parametrize(
    "value",
    [object(), decimal.Decimal(1), b"bytes", {"a": object()}, {1: 2}, {1, "a"}, 2**70, "\ud800"],
    ids=shown,
)
def test_what_json_cannot_write_is_a_parser_error(value: Any) -> None:
    with pytest.raises(ParserError, match=f"{type(value).__name__} cannot be written as JSON"):
        Json.generate(value)


@pytest.mark.parametrize("data", [b"", b" ", b"{", b"nope", b"{'a': 1}", b'"\xff"', b"NaN", b"1 2"])
def test_what_is_not_json_is_a_parser_error_that_shows_its_start(data: bytes) -> None:
    with pytest.raises(ParserError, match="not JSON") as caught:
        Json.parse(data)
    assert repr(data[:60]) in str(caught.value)


def test_the_error_of_a_long_value_is_short() -> None:
    with pytest.raises(ParserError) as caught:
        Json.parse(b"x" * 900_000)
    assert len(str(caught.value)) < 300


def test_text_is_utf_8() -> None:
    assert Text.parse("ä €".encode()) == "ä €"
    assert Text.generate("ä €") == "ä €".encode()
    assert Text.generate(7) == b"7"
    with pytest.raises(ParserError, match="not UTF-8"):
        Text.parse(b"\xff")


def test_raw_is_the_bytes_themselves() -> None:
    every_byte = bytes(range(256))

    assert Raw.parse(every_byte) is every_byte
    assert Raw.generate(every_byte) == Raw.generate(bytearray(every_byte)) == every_byte
    assert Raw.generate(memoryview(every_byte)) == every_byte
    with pytest.raises(ParserError, match="the raw parser sends bytes, not dict"):
        Raw.generate({})


class TestMessagePack:
    @pytest.mark.parametrize(
        "value",
        [None, True, -1, 2**63, 1.5, "ä", bytes(range(256)), [1, [2]], {"a": {"b": b"\xff"}}, {1: "one"}, AT],
        ids=lambda value: str(value)[:30],
    )
    def test_it_comes_back_as_it_was(self, value: Any) -> None:
        written = MessagePack.generate(value)

        assert isinstance(written, bytes)
        assert MessagePack.parse(written) == value == msgpack.unpackb(written, timestamp=3, strict_map_key=False)

    @pytest.mark.parametrize(
        ("value", "read"),
        [
            (Order(7, "ann"), {"id": 7, "user": "ann"}),
            (Model(id=7, at=AT), {"id": 7, "at": AT}),
            (Struct(7, Order(1, "ann")), {"id": 7, "order": {"id": 1, "user": "ann"}}),
            ({3, 1, 2}, [1, 2, 3]),
            (Colour.RED, "red"),
            (AT.date(), "2026-01-02"),
            (AT.replace(tzinfo=None), "2026-01-02T03:04:05"),
            (decimal.Decimal("1.10"), "1.10"),
            (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_it_writes_what_python_programs_hold(self, value: Any, read: Any) -> None:
        assert MessagePack.parse(MessagePack.generate(value)) == read

    @pytest.mark.parametrize("value", [object(), 2**70, {"a": object()}, Order, {1, "a"}], ids=shown)
    def test_what_it_cannot_write_is_a_parser_error(self, value: Any) -> None:
        with pytest.raises(ParserError, match=f"{type(value).__name__} cannot be written as MessagePack: "):
            MessagePack.generate(value)

    @pytest.mark.parametrize(
        "data", [b"", b"\x93\x01", b"\x01\x02", b"\xc1", b"\xa2\xff\xff", b"\x81\x90\x01", b"\x91" * 9_999]
    )
    def test_what_is_not_messagepack_is_a_parser_error_that_shows_its_start(self, data: bytes) -> None:
        with pytest.raises(ParserError, match=r"not MessagePack: .+; it starts with") as caught:
            MessagePack.parse(data)
        assert repr(data[:60]) in str(caught.value)

    def test_no_bytes_at_all_bring_another_error(self) -> None:
        chance = random.Random(7)
        good = MessagePack.generate({"a": [1, 2.5, None, AT, b"x"], "b": {"c": "d"}})
        for _ in range(5_000):
            data = bytearray(good)
            for _ in range(3):
                data[chance.randrange(len(data))] = chance.randrange(256)
            try:
                MessagePack.parse(bytes(data))
            except ParserError:
                continue


BOMB = b"""<!DOCTYPE lolz [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]><order>&b;</order>"""


class TestXml:
    def test_it_gives_an_element_and_takes_one(self) -> None:
        root = Xml.parse('<order id="7"><item>ä &amp; b</item></order>'.encode())

        assert isinstance(root, ElementTree.Element)
        assert (root.tag, root.get("id"), root.findtext("item")) == ("order", "7", "ä & b")
        assert Xml.generate(root) == '<order id="7"><item>ä &amp; b</item></order>'.encode()
        assert Xml.generate(ElementTree.ElementTree(root)) == Xml.generate(root)

    def test_text_passes_as_it_is(self) -> None:
        assert Xml.generate("<a/>") == "<a/>"
        assert Xml.generate(b"<a/>") == b"<a/>"

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "iso-8859-1"])
    def test_the_encoding_is_the_one_it_declares(self, encoding: str) -> None:
        assert Xml.parse(f'<?xml version="1.0" encoding="{encoding}"?><a>ä</a>'.encode(encoding)).text == "ä"

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            pytest.param(BOMB, "EntitiesForbidden", id="an entity bomb"),
            pytest.param(
                b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>', "EntitiesForbidden", id="a file"
            ),
            pytest.param(
                b'<!DOCTYPE a [<!ENTITY % x SYSTEM "http://127.0.0.1/">%x;]><a/>', "Forbidden", id="an address"
            ),
            pytest.param(b"", "no element found", id="nothing"),
            pytest.param(b"{}", "not well-formed", id="no XML"),
            pytest.param(b"<a><b></a>", "mismatched tag", id="mismatched"),
            pytest.param(
                b'<?xml version="1.0" encoding="nope"?><a/>', "unknown encoding: nope", id="unknown encoding"
            ),
            pytest.param(
                b'<?xml version="1.0" encoding="cp932"?><a/>', "multi-byte encodings", id="multi-byte encoding"
            ),
        ],
    )
    def test_what_is_not_xml_or_not_safe_is_a_parser_error(self, data: bytes, reason: str) -> None:
        with pytest.raises(ParserError, match="not XML, or not safe: ") as caught:
            Xml.parse(data)
        assert reason in str(caught.value)
        assert repr(data[:60]) in str(caught.value)

    def test_what_cannot_be_written_is_a_parser_error(self) -> None:
        root = ElementTree.Element("a")
        root.text = 7  # type: ignore[assignment]
        deep = Xml.parse(b"<a>" * 20_000 + b"</a>" * 20_000)

        with pytest.raises(ParserError, match="dict cannot be written as XML: give an Element, or text"):
            Xml.generate({})
        with pytest.raises(ParserError, match="the element <a> cannot be written as XML: cannot serialize 7"):
            Xml.generate(root)
        with pytest.raises(ParserError, match="the element <a> cannot be written as XML: maximum recursion depth"):
            Xml.generate(deep)

    @pytest.mark.parametrize("inline", [True, False])
    def test_a_handler_may_ask_for_an_element(self, inline: bool) -> None:
        app = make_app(inline=inline)
        seen: list[Any] = []

        @app.topic("orders", parser=Xml)
        @app.responds_to("receipts")
        def handle(order: ElementTree.Element) -> ElementTree.Element:
            seen.append(order.get("id"))
            return order

        call = Client(app).send("orders", ElementTree.Element("order", id="7"))

        assert seen == ["7"]
        assert call.sent("receipts").raw == b'<order id="7" />'
        assert call.sent("receipts").value.get("id") == "7"
        with pytest.raises(ParserError, match="not XML"):
            Client(app).send_raw("orders", b"{}")

    def test_a_payload_that_a_hook_only_looked_at_reaches_the_worker_byte_for_byte(self) -> None:
        app = make_app(inline=False)
        written = b"<?xml version='1.0'?><order  id = '7'><!-- as it is --></order>"
        seen: list[Any] = []

        @app.before_enqueue("orders")
        def look(order: Any, message: Message) -> None:
            if order.get("id") == "8":
                order.set("id", "9")

        app.add_topic("orders", lambda message: seen.append(message.value), parser=Xml)

        @app.topic("raw", parser=Xml)
        def keep(message: Message) -> None:
            seen.append(message.value)

        entry = app.handling("orders")

        def value_of(data: bytes) -> Any:
            ticket = entry.admit(make_record(data), 1, 0.0)
            assert ticket is not None
            return ticket[1][5]

        assert value_of(written) == written
        assert value_of(b"<order id='8'/>") == b'<order id="9" />'


class Loud:
    """A parser of upper-case texts."""

    @staticmethod
    def parse(data: bytes) -> str:
        return data.decode().lower()

    @staticmethod
    def generate(value: Any) -> str:
        return str(value).upper()


class Named:
    """A parser that depends on its topic."""

    def __init__(self, topic: str = "none") -> None:
        self.topic = topic

    def parse(self, data: bytes) -> str:
        return f"{self.topic} {data.decode()}"

    def generate(self, value: Any) -> str:
        return f"{self.topic}: {value}"

    def for_topic(self, topic: str) -> Named:
        return Named(topic)


class TestResponses:
    """A response may have a parser of its own."""

    @pytest.mark.parametrize("inline", [True, False])
    def test_a_response_is_written_by_the_parser_declared_for_it(self, inline: bool) -> None:
        app = make_app(inline=inline)

        @app.topic("orders")
        @app.responds_to("packed", parser=MessagePack)
        @app.responds_to("loud", parser=Loud)
        @app.responds_to("plain")
        def handle(order: dict[str, Any]) -> None:
            for topic in ("packed", "loud", "plain"):
                app.respond_to(topic, [order["id"]])

        call = Client(app).send("orders", {"id": 7})

        assert [item.raw for item in call.responses] == [MessagePack.generate([7]), b"[7]", b"[7]"]
        assert call.sent("packed").value == [7]
        assert call.sent("loud").value == "[7]"

    def test_a_returned_value_is_written_by_it_too(self) -> None:
        app = make_app()
        app.add_topic("orders", lambda order: order, parser=Loud)
        app.add_response(app.routes["orders"].handler, "packed", parser=MessagePack)

        assert run(app, b"7")[2] == [Response("packed", b"7", parser=MessagePack)]  # a text passes as it is
        assert run(app, b"7")[1] is None

    def test_a_responder_writes_by_its_own_or_else_by_that_of_the_route(self) -> None:
        app = make_app()

        @app.responds_to("packed", parser=MessagePack)
        @app.responds_to("loud")
        def announce(number: int) -> None:
            app.respond_to("packed", number)
            app.respond_to("loud", ["a", number])

        app.add_topic("orders", lambda order: 7, parser=Loud, responder=announce)

        assert [item.raw for item in Client(app).send("orders", "x").responses] == [b"\x07", b"['A', 7]"]

    def test_a_responder_outside_handlers_writes_by_its_own_or_else_json(self) -> None:
        app = make_app()

        @app.responds_to("packed", parser=MessagePack)
        @app.responds_to("json")
        def announce(number: int) -> None:
            app.respond_to("packed", [number])
            app.respond_to("json", [number])

        call = Client(app).respond_with(announce, 7)

        assert [item.raw for item in call.responses] == [b"\x91\x07", b"[7]"]
        assert [item.value for item in call.responses] == [[7], [7]]

    def test_a_parser_that_depends_on_its_topic_is_told_it(self) -> None:
        app = make_app()
        seen: list[Any] = []

        @app.topic("orders", parser=Named())
        @app.responds_to("a")
        @app.responds_to("b", parser=Named("other"))
        def handle(order: Any) -> None:
            seen.append(order)
            app.respond_to("a", 1)
            app.respond_to("b", 2)

        call = Client(app).send("orders", 0)
        with Client(app) as client:
            app.producer.send("c", 3, parser=Named())

        assert seen == ["orders orders: 0"]
        assert [item.raw for item in call.responses] == [b"a: 1", b"b: 2"]
        assert [item.value for item in call.responses] == ["a a: 1", "b b: 2"]
        assert client.sent("c").raw == b"c: 3"
        assert for_topic(Json, "c") is Json

    def test_what_is_no_parser_is_refused_where_it_is_declared(self) -> None:
        app = make_app()

        with pytest.raises(
            ConfigurationError, match=r"response to 'a': parser=7 needs the function\(s\) parse, generate"
        ):
            app.responds_to("a", parser=7)
        with pytest.raises(ConfigurationError, match=r"response to 'a': .*give an instance: Named\(\.\.\.\)"):
            app.add_response(print, "a", parser=Named)
        app.add_response(print, "a", parser=Named())

    def test_the_error_of_the_responses_own_parser_fails_the_message(self) -> None:
        app = make_app()
        app.add_topic("orders", lambda order: {"a": object()})
        app.add_response(app.routes["orders"].handler, "packed", parser=MessagePack)

        done, error, sent = run(app, b"7")

        assert (done, sent) == (0, [])
        assert isinstance(error, ParserError)
        assert "cannot be written as MessagePack" in str(error)


class TestFailures:
    """What becomes of a message that cannot be parsed."""

    @pytest.mark.parametrize("inline", [True, False])
    @pytest.mark.parametrize("parser", [Json, MessagePack, Xml, Text], ids=lambda parser: parser.__name__)
    def test_an_untyped_handler_gets_the_bytes(self, parser: Any, inline: bool) -> None:
        app = make_app(inline=inline)
        seen: list[Any] = []
        app.add_topic("orders", seen.append, parser=parser)

        Client(app).send_raw("orders", b"\xff{")

        assert seen == [{"message": b"\xff{"}]

    @pytest.mark.parametrize("inline", [True, False])
    def test_a_typed_handler_is_not_called_and_the_message_goes_to_its_dead_letter(self, inline: bool) -> None:
        app = make_app(inline=inline)
        failures: list[str] = []

        @app.topic("orders", parser=MessagePack, retry=2, dead_letter="dead")
        def handle(order: Order) -> None:
            raise AssertionError("it was called")

        @app.after_failure
        def report(error: Exception) -> None:
            failures.append(type(error).__name__)

        unreadable = Client(app).send_raw("orders", b"\xc1", raise_errors=False)
        misfit = Client(app).send("orders", {"id": "x", "user": 7}, raise_errors=False)

        assert unreadable.dead_letter is not None
        assert unreadable.dead_letter.raw == b"\xc1"
        assert isinstance(misfit.error, PayloadError)
        assert "id: Input should be a valid integer" in str(misfit.error)
        assert failures == ["ParserError", "PayloadError"]  # neither is tried again

    @pytest.mark.parametrize("inline", [True, False])
    def test_an_error_of_another_kind_fails_the_message_typed_or_not(self, inline: bool) -> None:
        class Careless(Raw):
            @staticmethod
            def parse(data: bytes) -> Any:
                raise KeyError("no")

        app = make_app(inline=inline)
        app.add_topic("orders", print, parser=Careless)

        with pytest.raises(KeyError):
            Client(app).send_raw("orders", b"x")

    @pytest.mark.parametrize("inline", [True, False])
    def test_an_error_that_passes_is_no_attempt_and_makes_no_dead_letter(self, inline: bool) -> None:
        class KeysAway(FlowkitError):
            passing = True

        class Sealed(Raw):
            @staticmethod
            def parse(data: bytes) -> Any:
                raise KeysAway("the key server does not answer")

        app = make_app(inline=inline)
        app.add_topic("orders", print, parser=Sealed, retry=2, dead_letter="dead")

        call = Client(app).send_raw("orders", b"x", raise_errors=False)

        assert is_passing(KeysAway())
        assert not is_passing(ParserError())
        assert isinstance(call.error, KeysAway)
        assert (call.attempts, call.dead_letter) == (1, None)


def test_plain_is_dicts_lists_and_scalars_all_the_way_down() -> None:
    value = {
        "orders": [Order(1, "ann")],
        "colours": {Colour.RED},
        "pair": (Order(2, "bob"), b"x"),
        Colour.RED: Struct(3, Order(4, "c")),
    }

    assert plain({**value, "colours": {"b", "a"}}) == {
        "orders": [{"id": 1, "user": "ann"}],
        "colours": ["a", "b"],
        "pair": ({"id": 2, "user": "bob"}, b"x"),
        "red": {"id": 3, "order": {"id": 4, "user": "c"}},
    }
    assert plain(AT) is AT


@pytest.mark.parametrize(
    ("code", "package", "sentence"),
    [
        (
            "import flowkit.parsers.msgpack",
            "msgpack",
            "flowkit.parsers.msgpack needs the package msgpack: pip install 'flowkit-kafka[msgpack]'",
        ),
        (
            "import flowkit.parsers.xml",
            "defusedxml",
            "flowkit.parsers.xml needs the package defusedxml: pip install 'flowkit-kafka[xml]'",
        ),
        (
            "import flowkit.parsers.registry",
            "confluent_kafka",
            "needs the package confluent-kafka[avro,json,schemaregistry]: pip install 'flowkit-kafka[registry]'",
        ),
        (
            "import flowkit.parsers.registry",
            "fastavro",
            "needs the package confluent-kafka[avro,json,schemaregistry]: pip install 'flowkit-kafka[registry]'",
        ),
        (
            "from flowkit.interchangers import Zstd; Zstd()",
            "zstandard",
            "flowkit.interchangers.Zstd needs the package zstandard: pip install 'flowkit-kafka[zstd]'",
        ),
    ],
)
def test_a_missing_package_is_named_with_its_extra(code: str, package: str, sentence: str) -> None:
    program = f"""
import sys
sys.modules.update({{{package!r}: None, "compression.zstd": None}})
from flowkit import ConfigurationError
try:
    {code}
except ConfigurationError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)

    assert sentence in done.stdout, done.stderr


def test_the_package_of_parsers_loads_none_of_theirs() -> None:
    program = "import sys, flowkit.parsers, flowkit.interchangers; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    for package in ("msgpack", "defusedxml", "confluent_kafka", "zstandard", "xml.etree.ElementTree"):
        assert f"'{package}'" not in done.stdout
