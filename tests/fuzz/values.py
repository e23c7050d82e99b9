"""What may come in from outside, as hypothesis makes it up."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from flowkit.message import PlainRecord

EDGES = [0, 1, -1, 2**31 - 1, 2**31, 2**53, 2**63 - 1, -(2**63)]

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
"""Everything that Python's json writes, NaN and numbers without end among it."""

nested = st.builds(
    lambda depth, left, right: left * depth + right * depth,
    st.sampled_from([1, 5, 200, 1_000, 2_000, 100_000]),
    st.sampled_from([b"[", b'{"id":', b"\x91", b"\x81\xa1a", b"<a>", b"[[{"]),
    st.sampled_from([b"]", b"}", b"", b"</a>"]),
)
"""Deeper than any recursion."""

broken_json = st.builds(
    lambda value, at, put, cut: json.dumps(value).encode()[:at] + put + json.dumps(value).encode()[at + cut :],
    json_values,
    st.integers(0, 60),
    st.binary(max_size=3),
    st.integers(0, 3),
)

anything = st.binary(max_size=300) | nested | broken_json | json_values.map(lambda value: json.dumps(value).encode())
"""The value of a message."""

headers = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
        | st.sampled_from(["trace", "", "kafka_dlt-x"]),
        st.none() | st.binary(max_size=20),
    ),
    max_size=5,
).map(tuple)
"""As a client gives them: a name is text and may repeat, a value is bytes or None."""

offsets = st.integers(0, 2**63 - 1) | st.sampled_from([edge for edge in EDGES if edge >= 0])
numbers = st.integers(0, 2**31 - 1)
timestamps = st.integers(-(2**63), 2**63 - 1) | st.sampled_from(EDGES)

records = st.builds(
    PlainRecord,
    topic=st.just("orders"),
    partition=numbers,
    offset=offsets,
    timestamp=timestamps,
    key=st.none() | st.binary(max_size=30),
    value=st.none() | anything,
    headers=headers,
    received=st.floats(0, 4e9),
)
"""A record as Kafka may have it."""
