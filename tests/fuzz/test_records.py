"""Whatever Kafka has in a record: it goes through queue, worker and dead letter byte for byte, and can be read."""

from __future__ import annotations

import json
import struct
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import make_app, make_record

from flowkit import Message, QueueError
from flowkit.dispatch import Handling
from flowkit.interchangers import Base64, Plain, Zlib, Zstd, pack, unpack
from flowkit.message import PlainRecord, place
from flowkit.queues import Envelope, Parcel, make_jobs

from .values import json_values, records


class AsJson:
    """An interchanger that gives something else than bytes."""

    @staticmethod
    def load(value: bytes) -> Any:
        return {"hex": [value.hex(), None, 1.5]}

    @staticmethod
    def parse(data: Any) -> bytes:
        return bytes.fromhex(data["hex"][0])


INTERCHANGERS: list[Any] = [Plain, Base64, Zlib(), Zstd(), AsJson]
names = {"ids": lambda item: getattr(item, "__name__", type(item).__name__)}


def handling_of(interchanger: Any = Plain, **options: Any) -> Handling:
    app = make_app(inline=False, **options)
    app.topic("orders", interchanger=interchanger, dead_letter="orders.dead")(lambda order: None)
    return app.handling("orders")


HANDLINGS = {id(item): handling_of(item) for item in INTERCHANGERS}


@pytest.mark.parametrize("interchanger", INTERCHANGERS, **names)
@given(record=records)
def test_a_record_goes_through_the_queue_byte_for_byte(interchanger: Any, record: PlainRecord) -> None:
    handling = HANDLINGS[id(interchanger)]

    (job,) = make_jobs("shop:app", handling, "default", handling.entries([record], record.received), size=10)

    (entry,) = Parcel.of(Envelope.loads(job.data)[2]).entries
    assert handling.record(entry) == record


@pytest.mark.parametrize("interchanger", INTERCHANGERS, **names)
@given(record=records)
def test_a_record_goes_through_a_custom_worker_byte_for_byte(interchanger: Any, record: PlainRecord) -> None:
    handling = HANDLINGS[id(interchanger)]
    params = handling.params(handling.entry(record, record.received, record.value))

    assert handling.record(handling.entry_of(json.loads(json.dumps(params)))) == record


@pytest.mark.parametrize("interchanger", INTERCHANGERS, **names)
@given(data=st.none() | json_values | st.binary(max_size=99) | st.just({"hex": ["zz"]}))
def test_what_an_interchanger_did_not_load_is_a_queue_error(interchanger: Any, data: Any) -> None:
    handling = HANDLINGS[id(interchanger)]
    its_own = (LookupError, TypeError, AttributeError) if interchanger is AsJson else ()
    try:
        found = handling.record(tuple(make_record(data)))
    except QueueError:
        return
    except its_own:  # of the user's
        return
    assert found.value is None or isinstance(found.value, bytes)


@given(
    params=json_values | st.dictionaries(st.sampled_from(["partition", "offset", "headers", "value"]), json_values)
)
def test_params_of_a_custom_worker_that_flowkit_did_not_make_are_a_queue_error(params: Any) -> None:
    handling = HANDLINGS[id(Plain)]
    whole = handling.params(handling.entry(make_record(), 0.0, b"{}"))
    for given_ in (params, {**whole, **params} if isinstance(params, dict) else whole):
        try:
            handling.record(handling.entry_of(given_))
        except QueueError:
            continue


@given(value=st.none() | st.binary(max_size=200))
def test_bytes_in_json_come_back(value: bytes | None) -> None:
    assert unpack(json.loads(json.dumps(pack(value)))) == value


@given(data=json_values)
def test_what_are_no_bytes_in_json_is_a_queue_error(data: Any) -> None:
    try:
        unpack(data)
    except QueueError:
        return
    assert data is None or isinstance(data, str | dict)


errors = st.text(st.characters(), max_size=3_000).map(ValueError) | st.just(QueueError())


@given(record=records, error=errors, attempts=st.integers(1, 2**31))
def test_a_dead_letter_keeps_key_value_and_headers_and_names_its_origin(
    record: PlainRecord, error: Exception, attempts: int
) -> None:
    letter = HANDLINGS[id(Plain)].dead(record, error, attempts)

    assert (letter.topic, letter.key, letter.value) == ("orders.dead", record.key, record.value)
    assert tuple(letter.headers[: len(record.headers)]) == record.headers
    origin = dict(letter.headers[len(record.headers) :])
    assert struct.unpack(">i", origin["kafka_dlt-original-partition"] or b"") == (record.partition,)
    assert struct.unpack(">q", origin["kafka_dlt-original-offset"] or b"") == (record.offset,)
    assert struct.unpack(">q", origin["kafka_dlt-original-timestamp"] or b"") == (record.timestamp,)
    assert sum(len(value or b"") for value in origin.values()) < 5_000


@given(record=records)
def test_every_part_of_a_message_can_be_read(record: PlainRecord) -> None:
    message: Message = HANDLINGS[id(Plain)].message(record, 1, record.received)

    assert isinstance(message.timestamp, datetime)
    assert isinstance(message.received_at, datetime)
    assert message.timestamp.tzinfo is not None
    assert str(record.offset) in repr(message)
    assert message.headers.pairs == record.headers
    assert place(record).startswith("orders[")


@given(record=records)
def test_a_record_of_an_ordered_route_has_a_shard(record: PlainRecord) -> None:
    app = make_app(inline=False)
    app.topic("orders", ordered=True)(lambda order: None)

    assert app.handling("orders").queue_of(record) in app.handling("orders").shards
