"""Every message survives the queue byte for byte."""

from __future__ import annotations

import json
import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pytest
import zstandard
from support import make_app, make_record, shown

from flowkit import ConfigurationError, QueueError
from flowkit.interchangers import Base64, Plain, Zlib, Zstd, pack, unpack

VALUES = {
    "empty": b"",
    "text": b'{"id": 7}',
    "umlauts": "äöü € 🎉".encode(),
    "nul": b"\0",
    "every byte": bytes(range(256)),
    "invalid UTF-8": b"abc\xff\xfe",
    "overlong UTF-8": b"\xc0\x80",
    "a surrogate": b"\xed\xa0\x80",
    "cut in a character": "€".encode()[:2],
    "a byte order mark": b"\xef\xbb\xbf{}",
    "900 KB of text": b'"' + b"x" * 900_000 + b'"',
    "900 KB of bytes": bytes(range(256)) * 3600,
    "looks packed": b'{"base64": "AAAA"}',
    "looks packed itself": b"AAAA",
}


class Zip:
    """Gives bytes to the queue, as the contract allows."""

    load = staticmethod(zlib.compress)
    parse = staticmethod(zlib.decompress)


class Hex:
    """Gives an object of its own to the queue."""

    def load(self, value: bytes) -> Any:
        return {"base64": value.hex()}

    def parse(self, data: Any) -> bytes:
        return bytes.fromhex(data["base64"])


class Plaintext:
    """Gives bytes that are text."""

    @staticmethod
    def load(value: bytes) -> bytes:
        return value.hex().encode()

    @staticmethod
    def parse(data: bytes) -> bytes:
        assert isinstance(data, bytes)
        return bytes.fromhex(data.decode())


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("interchanger", [Base64, Base64()], ids=shown)
def test_a_value_comes_back_through_json(interchanger: Any, value: bytes) -> None:
    assert interchanger.parse(json.loads(json.dumps(interchanger.load(value)))) == value


@pytest.mark.parametrize("byte", range(256))
def test_each_single_byte_comes_back(byte: int) -> None:
    value = bytes([byte])

    assert unpack(json.loads(json.dumps(pack(value)))) == value


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize(
    "interchanger", [None, Base64, Zlib(), Zlib(9), Zstd(), Zstd(19), Zip, Hex(), Plaintext], ids=shown
)
def test_a_message_comes_back_from_its_queue_entry(interchanger: Any, value: bytes) -> None:
    app = make_app(inline=False)
    app.add_topic("orders", print, **({"interchanger": interchanger} if interchanger else {}))
    handling = app.handling("orders")
    record = make_record(value, key=value, headers=(("h", value), ("h", None), ("ä", b"")))

    entry = handling.entry(record, 1.5, record.value)

    assert handling.record(pickle.loads(pickle.dumps(entry))) == record._replace(received=1.5)
    assert handling.entry_of(orjson.loads(orjson.dumps(handling.params(entry)))) == entry


def test_the_default_leaves_the_bytes_as_they_are() -> None:
    assert Plain.load(b"\xff") == b"\xff"
    assert Plain.parse(b"\xff") == b"\xff"


def test_a_missing_key_or_header_stays_missing() -> None:
    assert pack(None) is None
    assert unpack(None) is None


@pytest.mark.parametrize(
    "data",
    [7, [], {}, {"base64": 1}, {"base64": "not base64!"}, {"base64": "A"}, {"base64": "AAAA!"}, {"other": ""}, True],
    ids=shown,
)
def test_what_flowkit_did_not_queue_is_refused(data: Any) -> None:
    with pytest.raises(QueueError, match="this is not what flowkit put into the queue"):
        unpack(data)


def test_compressed_values_are_those_of_the_formats() -> None:
    value = b"order " * 1000

    assert zlib.decompress(Zlib().load(value)) == value
    assert zstandard.decompress(Zstd().load(value)) == value
    assert len(Zlib().load(value)) < len(value) / 50
    assert len(Zstd().load(value)) < len(value) / 50
    assert Zlib(1).load(value) != Zlib(9).load(value)


@pytest.mark.parametrize("interchanger", [Base64, Zlib(), Zstd()], ids=shown)
@pytest.mark.parametrize("data", [b"order", b"\x78\x9c", b"\x28\xb5\x2f\xfd\x00", "{}", {"a": 1}, None], ids=shown)
def test_what_it_did_not_write_is_a_queue_error(interchanger: Any, data: Any) -> None:
    with pytest.raises(
        QueueError, match=r"Was the route's interchanger changed while messages were queued\?"
    ) as caught:
        interchanger.parse(data)
    assert str(data)[:60] in str(caught.value)


@pytest.mark.parametrize("interchanger", [Zlib(), Zstd()], ids=shown)
def test_one_interchanger_serves_many_threads(interchanger: Any) -> None:
    values = [bytes([number]) * 10_000 for number in range(200)]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda value: interchanger.parse(interchanger.load(value)), values)) == values


@pytest.mark.parametrize("interchanger", [Zlib, Zstd])
def test_a_class_that_needs_an_instance_is_refused_at_registration(interchanger: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"give an instance: {interchanger.__name__}\(\.\.\.\)"):
        make_app().topic("orders", interchanger=interchanger)
