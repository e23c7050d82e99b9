"""examples/quakes.py, tested with the fixtures as its author would."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from flowkit import PayloadError
from flowkit.testing import Client

EXAMPLES = Path(__file__).parents[1] / "examples"
READINGS = [orjson.loads(line) for line in (EXAMPLES / "data" / "quakes.jsonl").read_bytes().splitlines()]


@pytest.fixture
def flowkit_app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop("quakes", None)
    import quakes

    yield quakes.app
    del sys.modules["quakes"]


STRONGEST = max(READINGS, key=lambda reading: float(reading["magnitude"]))
WEAK = READINGS[0]


def test_a_weak_quake_only_counts_for_its_region(flowkit_client: Client) -> None:
    call = flowkit_client.send("readings", WEAK)
    summary = call.sent("regions")
    assert summary.key == WEAK["region"]
    assert (summary.value["quakes"], summary.value["strongest"]) == (1, WEAK["magnitude"])
    assert call.all_sent("alerts") == []


def test_a_strong_quake_raises_an_alert_that_becomes_a_notice(flowkit_client: Client) -> None:
    call = flowkit_client.send("readings", STRONGEST, follow=True)
    assert call.sent("alerts").key == STRONGEST["id"]
    notice = call.sent("notices").value
    assert notice == "Magnitude 6.4, 22km NNE of Hualian, Taiwan, 06 February 2018, 15:50 UTC, 11 km deep"
    assert call.followed[0].queue == "default"


def test_a_week_of_readings_adds_up(flowkit_client: Client) -> None:
    calls = flowkit_client.send_batch("readings", READINGS)
    last = {call.sent("regions").key: call.sent("regions").value for call in calls}
    assert sum(summary["quakes"] for summary in last.values()) == len(READINGS) == 1_679
    assert last["Taiwan"]["strongest"] == STRONGEST["magnitude"]
    assert sum(len(call.all_sent("alerts")) for call in calls) == 39


def test_a_reading_without_a_magnitude_is_refused(flowkit_client: Client) -> None:
    with pytest.raises(PayloadError, match="magnitude"):
        flowkit_client.send("readings", {**WEAK, "magnitude": None})
