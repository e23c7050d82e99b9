"""What somebody else wrote into Redis, under the worker of flowkit: such a job fails with its reason, and the work goes on."""

from __future__ import annotations

import pickle
import struct
import zlib
from typing import Any

import pytest
from rq.registry import FailedJobRegistry
from test_jobs import Shop, log_runs, own, shop  # noqa: F401 - fixtures

from flowkit import Retry
from flowkit.jobs import OwnJob
from flowkit.queues import MOST_UNPACKED, PERFORM, Envelope


def job(*args: Any) -> bytes:
    return Envelope.dumps((PERFORM, None, args, {}))


HOSTILE: dict[str, tuple[dict[str, bytes], str]] = {
    "no pickle": ({"data": b"\xff\xfe"}, "not written as flowkit's and RQ's are"),
    "nothing": ({"data": b""}, "not written as flowkit's and RQ's are"),
    "a name": ({"data": b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00truetR."}, "a job asks for os.system"),
    "another function": ({"data": pickle.dumps(("os.system", None, ("true",), {}))}, "a job asks for os.system"),
    "an application": (
        {"data": job("os:system", "orders", 1, [("orders", 0, 0, 0, None, b"", (), 0.0)])},
        "belongs to",
    ),
    "a huge claim": ({"data": b"\x80\x04Nr" + struct.pack("<I", 2**29) + b"."}, "MemoryError"),
    "a bomb": ({"data": zlib.compress(b"\0" * (MOST_UNPACKED + 1))}, "when unpacked"),
    "another time-out": ({"timeout": b"soon"}, "what cannot be read"),
    "attempts": ({"meta": Envelope.dumps({"attempt": "many"})}, "what cannot be read"),
}


def two_jobs(own: Shop) -> list[Any]:  # noqa: F811
    """Two messages that have a job each."""
    own.app.routes["orders"].retry = Retry(attempts=1)
    return list(own.enqueue("orders", b"1", b"2"))


@pytest.mark.parametrize("what", HOSTILE)
def test_it_fails_with_its_reason_and_the_next_job_is_done(own: Shop, what: str) -> None:  # noqa: F811
    fields, reason = HOSTILE[what]
    runs = log_runs(own)
    bad, _ = two_jobs(own)
    own.redis.hset(bad.key, mapping={**fields, "retries_left": 0})  # type: ignore[arg-type]

    own.work_by_flowkit()

    assert len(runs) == 1
    assert FailedJobRegistry("default", connection=own.redis).get_job_ids(cleanup=False) == [bad.id]
    result = OwnJob.fetch(
        bad.id, connection=own.redis, serializer=Envelope
    ).latest_result()  # RQ's own cannot read all of them
    assert result is not None
    assert reason in (result.exc_string or "")


def test_a_topic_without_a_route_is_refused(own: Shop) -> None:  # noqa: F811
    log_runs(own)
    (bad,) = own.enqueue("orders", b"1")
    data = job(bad.args[0], "unknown", 1, [("unknown", 0, 0, 0, None, b"1", (), 0.0)])
    own.redis.hset(bad.key, mapping={"data": data, "retries_left": 0})

    own.work_by_flowkit()

    (failed,) = own.failed()
    result = failed.latest_result()
    assert result is not None
    assert "no handler is registered for topic 'unknown'" in (result.exc_string or "")


def test_what_is_left_of_a_deleted_job_is_passed_over(own: Shop) -> None:  # noqa: F811
    runs = log_runs(own)
    gone, _ = two_jobs(own)
    own.redis.delete(gone.key)
    own.redis.hset(gone.key, "last_heartbeat", "x")  # as a worker that stood still may write it

    own.work_by_flowkit()

    assert len(runs) == 1
    assert own.failed() == []
