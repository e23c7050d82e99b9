"""What was sent and is not confirmed yet: which message is to blame for what Kafka refuses."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from support import make_record

from flowkit.errors import DeliveryError
from flowkit.responses import Response
from flowkit.underway import Together, UnderWay

PASSING, FAULT = DeliveryError("ended with another", passing=True), DeliveryError("too large")


def look(*sent: tuple[int, DeliveryError | None]) -> tuple[Counter[str], int | None, DeliveryError | None, int]:
    """Of responses, each to the message of an offset and with an outcome: what is confirmed, who is to blame, what is left."""
    records = {offset: make_record(offset=offset) for offset, _ in sent}
    under_way = UnderWay(SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    for offset, outcome in sent:
        under_way.keep((records[offset], Response("out", offset), outcome))
    client: Any = SimpleNamespace(outcome=lambda outcome: outcome)
    confirmed, refused = under_way.look(client)
    if refused is None:
        return confirmed, None, None, len(under_way.sent)
    (found, _, _), problem = refused
    return confirmed, found.offset, problem, len(under_way.sent)


def test_all_is_confirmed() -> None:
    assert look((1, None), (2, None)) == (Counter(out=2), None, None, 0)


def test_the_first_that_is_refused_is_told() -> None:
    assert look((1, None), (2, FAULT), (3, None), (4, PASSING)) == (Counter(out=1), 2, FAULT, 3)
    assert look((1, None), (2, PASSING), (3, FAULT)) == (Counter(out=1), 2, PASSING, 2)


def test_a_message_one_of_whose_responses_is_the_fault_is_to_blame_though_another_only_ended_with_it() -> None:
    """Else it would be handled again for ever: the first response always ends together with the second."""
    assert look((1, None), (2, PASSING), (2, None), (2, FAULT), (3, None)) == (Counter(out=1), 2, FAULT, 4)


class Late:
    """A client whose delivery ends later."""

    refusal = None

    def __init__(self, count: int) -> None:
        self.count = count
        self.is_done = False

    def __len__(self) -> int:
        return self.count

    def outcome(self, delivery: Any) -> DeliveryError | None:
        return None if delivery.is_done else DeliveryError("not in time", passing=True)

    def confirmed(self, deliveries: Any) -> int:
        return sum(delivery.is_done for delivery in deliveries)


def test_what_is_under_way_together_may_still_come_to_a_good_end() -> None:
    under_way, late = UnderWay(SimpleNamespace(), SimpleNamespace()), Late(2)  # type: ignore[arg-type]
    under_way.keep(Together(range(5, 7), "out", late))

    confirmed, refused = under_way.look(late)  # type: ignore[arg-type]
    assert (confirmed, under_way.offset, under_way.last_offset) == ({}, 5, 6)
    assert refused is not None
    assert (refused[0][0].offset, str(refused[1])) == (5, "not in time")

    late.is_done = True
    assert under_way.let_go(late) == {"out": 2}  # type: ignore[arg-type]
    assert not under_way
