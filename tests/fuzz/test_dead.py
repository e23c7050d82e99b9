"""Dead letters of any record come back as what they were, and whatever is in a dead-letter topic can be looked at."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import make_app

from flowkit.cli.dead import _as_json, _row, _show
from flowkit.deadletters import (
    FEWEST,
    REPLAY_OF,
    REPLAYS,
    WRITTEN,
    headers_of_message,
    letter,
    note,
    noted,
    origin,
    replay,
)
from flowkit.message import PlainRecord
from flowkit.replay import Found

from .values import headers, records

errors = st.text(st.characters(), max_size=2_500).map(ValueError)
names = st.sampled_from(
    [*WRITTEN, *FEWEST, REPLAY_OF, REPLAYS, "flowkit-handled", "kafka_dlt-exception-cause-fqcn", "trace"]
)
strange = st.lists(st.tuples(names, st.none() | st.binary(max_size=30) | st.just(b"orders")), max_size=12).map(tuple)
"""Headers that somebody else wrote with the names of ours."""

app = make_app()
app.topic("orders")(lambda order: None)


@given(record=records, more=strange, error=errors, attempts=st.integers(1, 10**6))
def test_a_dead_letter_comes_back_as_what_it_was(record: Any, more: Any, error: Exception, attempts: int) -> None:
    record = record._replace(headers=(*record.headers, *more))

    written = letter("orders.dead", record, "group", error, attempts)
    dead = PlainRecord("orders.dead", 3, 7, 0, written.key, written.value, written.headers)
    again = replay(dead, "orders", None)

    assert (written.key, written.value) == (again.key, again.value) == (record.key, record.value)
    assert tuple(written.headers[: len(record.headers)]) == record.headers
    assert headers_of_message(written.headers) == record.headers
    assert [pair for pair in again.headers if pair[0] not in (REPLAY_OF, REPLAYS)] == [
        pair for pair in record.headers if pair[0] not in (REPLAY_OF, REPLAYS)
    ]
    assert dict(again.headers)[REPLAY_OF] == b"orders.dead/3/7"
    found = origin(written.headers)
    assert found is not None
    assert (found.topic, found.partition, found.offset) == ("orders", record.partition, record.offset)
    assert (found.timestamp, found.attempts, found.group) == (record.timestamp, attempts, "group")


@given(record=records, pairs=strange | headers)
@example(
    record=PlainRecord("orders.dead", 0, 0, 2**63 - 1, b"\x1b[2J", b"\x1b[2J"),
    pairs=(("kafka_dlt-original-topic", b"orders"), ("kafka_dlt-exception-message", b"\x1b]0;x\x07\xff")),
)
@example(
    record=PlainRecord("orders.dead", 0, 0, 0, None, None),
    pairs=(("kafka_dlt-original-topic", b"orders"), ("kafka_dlt-original-timestamp", b"\x7f" + b"\xff" * 7)),
)
@example(
    record=PlainRecord("orders.dead", 0, 0, 0, None, None),
    pairs=(("kafka_dlt-original-topic", b"orders"), ("flowkit-failed-at", b"0001-01-01T00:00:00Z")),
)
def test_whatever_is_in_a_dead_letter_topic_can_be_shown_and_moves_no_cursor(record: Any, pairs: Any) -> None:
    record = record._replace(headers=pairs)
    noted(pairs)
    found = origin(pairs)
    replay(record, "orders", None)
    if found is None:
        return
    one = Found(("orders.dead", 0, 1), found, record.key, found.failed_at or record.timestamp / 1000)
    json.dumps(_as_json(one))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        _show(app, record, one, found.text)
    for text in (out.getvalue(), *_row(app, one).values()):
        assert "\x1b" not in text
        assert "\x07" not in text


@given(offsets=st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 30), min_size=1, max_size=40, unique=True))
def test_a_note_names_its_offsets(offsets: list[int]) -> None:
    ranges = noted(note("orders.dead", 0, offsets, "replayed").headers)

    assert ranges is not None
    assert all(any(offset in found for found in ranges) for offset in offsets)
    assert sum(found.stop - found.start for found in ranges) == len(set(offsets))


@pytest.mark.parametrize("text", [b"replayed 1-", b"replayed", b"dropped 1,,2", b"dropped -1", b"\xff", b"", None])
def test_what_is_no_note_is_none(text: bytes | None) -> None:
    assert noted((("flowkit-handled", text),)) is None
