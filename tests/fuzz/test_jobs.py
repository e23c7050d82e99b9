"""Whatever is in Redis in the place of a job: flowkit reads data or raises ``QueueError``. It imports and calls nothing, and a
few bytes do not fill the memory.
"""

from __future__ import annotations

import copyreg
import logging
import pickle
import pickletools
import resource
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from redis import Redis
from rq.exceptions import DeserializationError, NoSuchJobError
from support import make_app, make_record

from flowkit import QueueError
from flowkit.brief import brief
from flowkit.jobs import OwnJob
from flowkit.queues import MOST_UNPACKED, PERFORM, Envelope, Parcel, unpacked
from flowkit.web.failed import _read

from .values import headers, json_values, numbers, offsets, records, timestamps

nowhere = Redis(host="127.0.0.1", port=1)  # a job has a connection; none of these tests uses it

entries = st.tuples(
    st.just("orders"),
    numbers,
    offsets,
    timestamps,
    st.none() | st.binary(max_size=9),
    st.none() | st.binary(max_size=20) | json_values,
    headers,
    st.floats(0, 4e9),
)
parcels = st.tuples(st.text(max_size=9), st.just("orders"), st.integers(1, 99), st.lists(entries, max_size=4))
real_jobs = st.builds(
    lambda args, protocol: pickle.dumps((PERFORM, None, args, {}), protocol=protocol), parcels, st.integers(0, 5)
)

CALLS = [b"cos\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"c__builtin__\neval\n", b"cbuiltins\nexec\n"]
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
pieces = (
    st.sampled_from(OPCODES)
    | st.sampled_from([*CALLS, b"(X\x04\x00\x00\x00truetR", b"\x85R", b"\x82\x01", b"ios\nsystem\n", b"0", b"\x94"])
    | st.binary(max_size=5)
)
opcodes = st.lists(pieces, max_size=25).map(lambda found: b"\x80\x04" + b"".join(found) + b".")

mutated = st.builds(
    lambda data, at, put, cut: data[: at % len(data)] + put + data[at % len(data) + cut :],
    real_jobs,
    st.integers(0, 10_000),
    pieces,
    st.integers(0, 6),
)

garbage = st.binary(max_size=200) | opcodes | mutated | real_jobs
"""What may be in the place of a job's data."""


@contextmanager
def nothing_called() -> Iterator[None]:
    """Fails if something is imported, executed or started meanwhile; Python itself reports it, whatever way it is done."""
    watched.append(seen := [])  # type: ignore[var-annotated]
    modules = set(sys.modules)
    try:
        yield
    finally:
        watched.remove(seen)
    assert seen == []
    assert set(sys.modules) == modules


@contextmanager
def no_tracebacks() -> Iterator[None]:
    """RQ logs one for webhooks that it cannot read, for which Python compiles the lines that it points at."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


datetime.strptime("2026", "%Y")  # which imports something when it is first called
watched: list[list[str]] = []
FORBIDDEN = ("import", "exec", "compile", "os.", "subprocess.", "socket.", "shutil.", "pickle.find_class", "ctypes.")


def _note(event: str, arguments: Any) -> None:
    if watched and event.startswith(FORBIDDEN):
        watched[-1].append(event)


sys.addaudithook(_note)


def read(data: bytes) -> Any:
    """What flowkit makes of a job's data, and nothing else happens; None if it refuses it."""
    with nothing_called():
        try:
            value = Envelope.loads(data)
            return Parcel.of(value[2]) if isinstance(value, tuple) else value
        except QueueError as error:
            refused = str(error)
    assert len(refused) < 400
    return None


def test_the_watch_sees_a_call() -> None:
    with pytest.raises(AssertionError, match="exec"), nothing_called():
        exec("1")


@given(data=garbage)
@example(data=b"")
@example(data=b"\x80\x04\x82\x01.")
@example(data=b"\x80\x04N}\x8c\x01a\x8c\x01bsb.")
def test_a_job_is_data_or_a_queue_error(data: bytes) -> None:
    found = read(data)

    if isinstance(found, Parcel):
        for topic, partition, offset, timestamp, *_ in found.entries:
            assert topic == found.topic
            assert type(partition) is type(offset) is type(timestamp) is int


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("then", [b".", b"(X\x04\x00\x00\x00truetR.", b"X\x04\x00\x00\x00true\x85R.", b")\x81."])
def test_a_name_in_a_job_is_never_looked_up(call: bytes, then: bytes) -> None:
    with nothing_called(), pytest.raises(QueueError, match="flowkit's jobs hold data only"):
        Envelope.loads(b"\x80\x04" + call + then)


def test_an_extension_code_is_never_looked_up() -> None:
    copyreg.add_extension("os", "system", 0xF0)
    try:
        with nothing_called(), pytest.raises(QueueError, match=r"a job asks for os\.system"):
            Envelope.loads(b"\x80\x04\x82\xf0X\x04\x00\x00\x00true\x85R.")
    finally:
        copyreg.remove_extension("os", "system", 0xF0)


@given(args=parcels)
def test_what_flowkit_writes_it_reads(args: Any) -> None:
    found = read(Envelope.dumps((PERFORM, None, args, {})))

    assert repr(found) == repr(Parcel(*args))  # NaN is not itself


# Memory and time.

HUGE = {
    "an index": b"\x80\x04Nr" + struct.pack("<I", 2**28) + b".",
    "an index in text": b"\x80\x04Np4000000000\n.",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**34) + b"abc.",
    "a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**34) + b"abc.",
    "a text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", 2**50) + b"abc.",
    "a number": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",
    "dicts": b"\x80\x04](" + b"}" * 20_000_000 + b"e.",
}


@pytest.mark.parametrize("what", HUGE)
def test_a_job_that_asks_for_much_memory_is_refused(what: str) -> None:
    if sys.platform != "linux":
        pytest.skip("memory is bounded on Linux only")
    limit, before = resource.getrlimit(resource.RLIMIT_AS), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(QueueError, match="not written as flowkit's"):
        Envelope.loads(HUGE[what])

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 900 * 1024  # in kilobytes
    assert resource.getrlimit(resource.RLIMIT_AS) == limit


def nested_in_itself() -> Any:
    """A list of 2**100 lists, in a few bytes."""
    found: list[Any] = []
    for _ in range(100):
        found = [found, found]
    return found


@pytest.mark.parametrize(
    "value",
    [
        nested_in_itself(),
        (nested_in_itself(), None, (), {}),
        (PERFORM, None, ("a", "b", 1, nested_in_itself()), {}),
        (PERFORM, None, ("a", "b", 1, [nested_in_itself()]), {}),
        (PERFORM, None, ("a", "b", 1, [("b", 0, 0, 0, nested_in_itself(), None, (), "")]), {}),
        (PERFORM, None, ("a", "b", 10**5000, []), {}),
        (PERFORM, None, ("a", "b", 1, [("b", 10**5000, 0, 0, None, None, (), 0.0)]), {}),
    ],
    ids=range(7),
)
def test_a_job_that_is_nested_in_itself_is_refused_at_once(value: Any) -> None:
    began = time.monotonic()

    read(pickle.dumps(value))

    assert time.monotonic() - began < 1


@pytest.mark.parametrize("part", ["key", "value", "headers", "timestamp"])
def test_a_message_that_is_nested_in_itself_is_refused_at_once(part: str) -> None:
    app = make_app()
    app.topic("orders")(lambda order: None)
    handling = app.handling("orders")
    began = time.monotonic()

    with pytest.raises(QueueError, match="flowkit did not queue"):
        handling.record(tuple(make_record(**{part: nested_in_itself()})))

    assert time.monotonic() - began < 1


@given(value=json_values | st.integers().map(lambda number: 10 ** (abs(number) % 9_000)) | st.binary(max_size=500))
def test_a_value_in_an_error_is_short(value: Any) -> None:
    assert len(brief(value)) <= 120


def test_a_packed_job_is_not_unpacked_beyond_a_bound() -> None:
    bomb = zlib.compress(b"\0" * (MOST_UNPACKED + 1))
    assert len(bomb) < 200_000

    with pytest.raises(QueueError, match="when unpacked"):
        unpacked(bomb)
    assert unpacked(zlib.compress(b"a")) == b"a"
    assert unpacked(zlib.compress(b"abc" * 99)[:-5]) == zlib.compress(b"abc" * 99)[:-5]


# A whole job, as RQ keeps it: a hash.

FIELDS = """
data meta origin timeout status created_at enqueued_at retries_left retry_intervals
exc_info dependency_ids result webhooks result_ttl worker_name success_callback_name last_heartbeat description
"""

fields = st.dictionaries(
    st.sampled_from(FIELDS.split()).map(str.encode),
    garbage | st.sampled_from([b"1", b"[1]", b"queued", b"2026-01-01T00:00:00.000000Z", b"x"]),
)


@given(raw=fields, data=garbage, packed=st.booleans())
def test_any_hash_in_the_place_of_a_job_is_a_job_that_runs_or_fails(
    raw: dict[bytes, bytes], data: bytes, packed: bool
) -> None:
    job = OwnJob("orders-0-0-1-00000000", connection=nowhere, serializer=Envelope)
    with nothing_called(), no_tracebacks():
        job.restore({**raw, b"data": zlib.compress(data) if packed else data})
        try:
            args = job.args
        except DeserializationError:
            return
    assert [type(arg) for arg in args] == [str, str, int, list]
    assert type(job.meta.get("attempt", 1)) is int


@pytest.mark.parametrize(
    "raw",
    [
        {b"data": zlib.compress(b"\0" * (MOST_UNPACKED + 1))},
        {b"data": b"", b"exc_info": zlib.compress(b"\0" * (MOST_UNPACKED + 1))},
        {b"data": b"", b"timeout": b"x", b"origin": b"\xff"},
        {b"data": b"", b"meta": Envelope.dumps({"attempt": "1"})},
        {b"data": b"", b"meta": Envelope.dumps({"attempt": 0})},
        {b"data": b"", b"meta": Envelope.dumps(None)},
        {b"data": b"", b"\xff": b""},
    ],
    ids=range(7),
)
def test_a_job_that_cannot_be_read_fails_when_it_is_run_and_says_why(raw: dict[bytes, bytes]) -> None:
    job = OwnJob("id", connection=nowhere, serializer=Envelope)

    job.restore(raw)

    with pytest.raises(DeserializationError) as caught:
        job.perform()
    assert "what cannot be read" in str(caught.value.__cause__)


def test_a_job_that_was_deleted_is_none() -> None:
    with pytest.raises(NoSuchJobError):
        OwnJob("id", connection=nowhere, serializer=Envelope).restore({b"last_heartbeat": b"1"})


@given(raw=fields, data=garbage, exc=garbage)
def test_the_web_page_reads_any_hash_in_the_place_of_a_failed_job(
    raw: dict[bytes, bytes], data: bytes, exc: bytes
) -> None:
    with nothing_called():
        found = _read("default", "id", {**raw, b"data": data}, [(b"1-0", {b"exc_string": exc})])

    assert found is None or found.topic == "orders"


@given(record=records)
def test_a_message_comes_out_of_its_job_as_it_went_in(record: Any) -> None:
    app = make_app()
    app.topic("orders")(lambda order: None)
    handling = app.handling("orders")

    job = Envelope.dumps((PERFORM, None, ("shop:app", "orders", 1, handling.entries([record], record.received)), {}))

    (entry,) = Parcel.of(Envelope.loads(job)[2]).entries
    assert handling.record(entry) == record
