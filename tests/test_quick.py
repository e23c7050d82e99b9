"""The short way through a route does what the long one does, and what it sends together comes to its end message by message."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from functools import partial
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import make_app, make_record
from test_consumer import Clock, Loop, stopped_clock

import flowkit.quick
from flowkit import BrokerUnavailable, DeliveryError, Flowkit, Message, ResponseError
from flowkit.dispatch import Until
from flowkit.message import Record
from flowkit.parsers import Json
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

    def together(self, records: Sequence[Record], topic: str, values: Sequence[bytes | None], parser: Any) -> None:
        assert parser is Json
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


def test_answers_are_sent_before_they_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where calls become slow only while answers of short ones wait."""
    clock = stopped_clock(monkeypatch)
    sent_at: list[tuple[int, float]] = []
    answered_at: list[float] = []

    class Timed(Sent):
        def together(
            self, records: Sequence[Record], topic: str, values: Sequence[bytes | None], parser: Any
        ) -> None:
            super().together(records, topic, values, parser)
            sent_at.extend((record.offset, clock.now) for record in records)

    app, until, _ = make_app(), Until(), None
    until.at = float("inf")

    def answer(number: int) -> Any:
        clock.now += 0.000_01 if number < 40 else 0.5
        answered_at.append(clock.now)
        return {"n": number}

    app.add_topic("orders", answer)
    app.add_response(answer, "out")
    records = [make_record(b"%d" % at, offset=at) for at in range(60)]
    assert app.handling("orders").run(records, Timed(), attempt=1, received=1.0, until=until) == (60, None)
    waits = [at - answered_at[offset] for offset, at in sent_at]
    assert len(waits) == 60
    assert max(waits) <= 0.5 + flowkit.quick.UNWATCHED
    assert max(waits[42:]) == 0.0


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
def test_what_ends_python_is_not_hidden_by_what_cannot_be_sent(error: type[BaseException]) -> None:
    app, until = make_app(), Until()
    until.at = float("inf")

    def answer(number: int) -> Any:
        if number == 20:
            raise error
        return {"n": number}

    app.add_topic("orders", answer)
    app.add_response(answer, "out")
    records = [make_record(b"%d" % at, offset=at) for at in range(30)]
    with pytest.raises(error):
        app.handling("orders").run(records, Sent(19), attempt=1, received=1.0, until=until)


# In the loop.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return stopped_clock(monkeypatch)


def answering(clock: Clock) -> tuple[Loop, list[int]]:
    app = make_app()
    handled: list[int] = []

    @app.topic("a", group="g")
    @app.responds_to("out", required=False)
    def answer(number: int) -> Any:
        handled.append(number)
        return {"n": number} if number else None

    return Loop(app, clock), handled


def sent_to(loop: Loop) -> list[int]:
    return [orjson.loads(record.value or b"")["n"] for record in loop.broker.records("out")]


def test_no_answer_is_lost_where_no_client_can_be_made_for_the_first_of_them(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, handled = answering(clock)
    producer, made = loop.consumer.producer, []
    make = producer._make

    def refuse_once(*arguments: Any, **options: Any) -> Any:
        made.append(1)
        if len(made) == 1:
            raise BrokerUnavailable("none answers")
        return make(*arguments, **options)

    monkeypatch.setattr(producer, "_make", refuse_once)
    for number in (0, *range(1, 8)):
        loop.put("a", number)

    loop.turn(10, after=1)

    assert len(made) == 2
    assert sent_to(loop) == [1, 2, 3, 4, 5, 6, 7]
    assert loop.committed("a") == 8
    assert handled[0] == 0


def test_no_answer_is_sent_twice_because_sending_failed_once(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = answering(clock)
    producer, starts = loop.consumer.producer, []
    start = producer.start

    def refuse_third(item: Any, client: Any = None) -> Any:
        starts.append(item)
        if len(starts) == 3:
            raise DeliveryError("not now", passing=True)
        return start(item, client)

    monkeypatch.setattr(producer, "start", refuse_third)
    for number in (1, 2, 3, 4, 0, 5, 6, 7):
        loop.put("a", number)

    loop.turn(10, after=1)

    assert sent_to(loop) == [1, 2, 3, 4, 5, 6, 7]
    assert loop.committed("a") == 8


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("way", ["respond_to", "respond_with"])
def test_what_a_handler_has_left_running_is_told_that_it_is_too_late(clock: Clock, count: int, way: str) -> None:
    """Also of one message alone, which goes the usual way."""
    app = make_app()
    left: list[Context] = []

    @app.responds_to("out")
    def letter(value: int) -> None:
        app.respond_to("out", value)

    @app.topic("a")
    @app.responds_to("out")
    def handle(value: int) -> int:
        left.append(copy_context())
        return value

    loop = Loop(app, clock)
    loop.put("a", *range(count))
    loop.turn()
    late = partial(app.respond_to, "out", 7) if way == "respond_to" else partial(app.respond_with, letter, 7)
    for context in left:
        with pytest.raises(ResponseError, match="has ended, and its responses are on their way"):
            context.run(late)
    loop.put("a", 8)
    loop.turn()
    assert [orjson.loads(record.value) for record in loop.broker.records("out")] == [*range(count), 8]


def test_a_thread_that_a_handler_waits_for_may_respond(clock: Clock) -> None:
    app = make_app()

    @app.topic("a")
    @app.responds_to("out")
    def handle(value: int) -> None:
        with ThreadPoolExecutor(1) as threads:
            threads.submit(copy_context().run, app.respond_to, "out", value).result()

    loop = Loop(app, clock)
    loop.put("a", *range(5))
    loop.turn()
    assert [orjson.loads(record.value) for record in loop.broker.records("out")] == [0, 1, 2, 3, 4]
