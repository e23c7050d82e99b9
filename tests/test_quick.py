"""The short way through a route does what the long one does, and what it sends together comes to its end message by message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import make_app, make_record

from flowkit import DeliveryError, Flowkit, Message
from flowkit.dispatch import Until
from flowkit.message import Record
from flowkit.quick import MOST_UNWATCHED, NotTaken
from flowkit.responses import Response


class Boom(Exception):
    pass


class Sent:
    """A ``Send`` that takes answers together, from the offset ``refused`` on none."""

    def __init__(self, refused: int | None = None) -> None:
        self.refused = refused
        self.found: list[tuple[int, str, bytes | None]] = []
        self.at_once: list[int] = []

    def __call__(self, record: Record, responses: Sequence[Response]) -> None:
        if record.offset == self.refused:
            raise DeliveryError("refused")
        self.found += [(record.offset, response.topic, response.value) for response in responses]

    def together(self, records: Sequence[Record], topic: str, values: Sequence[bytes | None]) -> None:
        self.at_once.append(len(records))
        for at, (record, value) in enumerate(zip(records, values, strict=True)):
            if record.offset == self.refused:
                raise NotTaken(at, DeliveryError("refused"))
            self.found.append((record.offset, topic, value))


ACTIONS = (
    "answer",
    "text",
    "nothing",
    "say",
    "say twice",
    "say and answer",
    "fail",
    "exit",
    "abort",
    "unwritable",
    "stop",
)


def act(app: Flowkit, action: Any, until: Until) -> Any:
    """What the handler of a message does that says so."""
    match action:
        case "text":
            return "a text"
        case "nothing" | None:
            return None
        case "say" | "say twice" | "say and answer":
            app.respond_to("out", "said")
            if action == "say twice":
                app.respond_to("out", "said again")
            return {"n": 1} if action == "say and answer" else None
        case "fail":
            raise Boom
        case "exit":
            raise SystemExit(3)
        case "abort":
            app.abort()
        case "unwritable":
            return {"n": object()}
        case "stop":
            until.at = 0.0
    return {"n": [action]}


def make(declared: dict[str, Any] | None, *, takes_message: bool) -> tuple[Flowkit, Until, list[Any]]:
    app, until, seen = make_app(), Until(), []  # type: ignore[var-annotated]
    until.at = float("inf")

    def alone(action: Any) -> Any:
        seen.append(action)
        return act(app, action, until)

    def both(action: Any, message: Message) -> Any:
        assert message.payload is action
        seen.append((action, message.offset, message.attempt, message.value))
        return act(app, action, until)

    handler = both if takes_message else alone
    app.add_topic("orders", handler)
    if declared is not None:
        app.add_response(handler, "out", **declared)
    return app, until, seen


@pytest.mark.parametrize(
    "declared", [None, {}, {"required": False}, {"required": False, "multiple_usage": True}], ids=str
)
@pytest.mark.parametrize("takes_message", [False, True], ids=["payload", "payload-and-message"])
@given(
    actions=st.lists(
        st.sampled_from([*ACTIONS[:6] * 3, *ACTIONS, "not JSON", "tombstone"]), max_size=3 * MOST_UNWATCHED
    ),
    attempt=st.integers(1, 3),
)
def test_it_comes_to_the_same(
    declared: dict[str, Any] | None, takes_message: bool, actions: list[str], attempt: int
) -> None:
    values = {"not JSON": b"{", "tombstone": None}
    records = [
        make_record(values[action] if action in values else b'"%s"' % action.encode(), offset=at)
        for at, action in enumerate(actions)
    ]
    outcomes = []
    for way in ("short", "long"):
        app, until, seen = make(declared, takes_message=takes_message)
        handling = app.handling("orders")
        send = Sent()
        done, error = handling.run(
            records, send, attempt=attempt, received=1.0, until=until, call=handling.call if way == "long" else None
        )
        assert (way == "long") or handling._quick is not None
        outcomes.append((done, type(error), str(error), send.found, seen))
        assert handling.idle.responses == []
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("refused", [0, 7, 31, 32, 90])
def test_where_answers_are_refused_those_before_are_done(refused: int) -> None:
    app, until, _ = make({}, takes_message=False)
    send = Sent(refused)
    records = [make_record(b"1", offset=at) for at in range(100)]

    done, error = app.handling("orders").run(records, send, attempt=1, received=1.0, until=until)

    assert (done, str(error)) == (refused, "refused")
    assert [offset for offset, _, _ in send.found] == list(range(refused))


def test_answers_of_short_calls_go_together_in_order() -> None:
    app, until, _ = make({"required": False}, takes_message=False)
    send = Sent()
    actions = [b'"nothing"' if at % 50 == 49 else b"%d" % at for at in range(200)]
    records = [make_record(value, offset=at) for at, value in enumerate(actions)]

    assert app.handling("orders").run(records, send, attempt=1, received=1.0, until=until) == (200, None)

    assert [offset for offset, _, _ in send.found] == [at for at in range(200) if at % 50 != 49]
    assert max(send.at_once) > 8
    assert max(send.at_once) <= MOST_UNWATCHED
