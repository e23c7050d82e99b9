"""What was sent and is not confirmed yet: which message is to blame for what Kafka refuses."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from support import make_record

from flowkit.errors import DeliveryError
from flowkit.responses import Response
from flowkit.underway import UnderWay

PASSING, FAULT = DeliveryError("ended with another", passing=True), DeliveryError("too large")


def look(*sent: tuple[int, DeliveryError | None]) -> tuple[Counter[str], int | None, DeliveryError | None, int]:
    """Of responses, each to the message of an offset and with an outcome: what is confirmed, who is to blame, what is left."""
    records = {offset: make_record(offset=offset) for offset, _ in sent}
    under_way = UnderWay(SimpleNamespace())  # type: ignore[arg-type]
    for offset, outcome in sent:
        under_way.keep((records[offset], Response("out", offset), outcome))
    client: Any = SimpleNamespace(outcome=lambda outcome: outcome)
    confirmed, refused = under_way.look(client)
    if refused is None:
        return confirmed, None, None, len(under_way)
    (found, _, _), problem = refused
    return confirmed, found.offset, problem, len(under_way)


def test_all_is_confirmed() -> None:
    assert look((1, None), (2, None)) == (Counter(out=2), None, None, 0)


def test_the_first_that_is_refused_is_told() -> None:
    assert look((1, None), (2, FAULT), (3, None), (4, PASSING)) == (Counter(out=1), 2, FAULT, 3)
    assert look((1, None), (2, PASSING), (3, FAULT)) == (Counter(out=1), 2, PASSING, 2)


def test_a_message_one_of_whose_responses_is_the_fault_is_to_blame_though_another_only_ended_with_it() -> None:
    """Else it would be handled again for ever: the first response always ends together with the second."""
    assert look((1, None), (2, PASSING), (2, None), (2, FAULT), (3, None)) == (Counter(out=1), 2, FAULT, 4)
