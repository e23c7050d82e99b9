"""A dead letter as bytes: what it is written as, what is read back, and that a replay is the message that it was."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import make_app, make_record

from flowkit import ConfigurationError, DeliveryError, Flowkit
from flowkit.deadletters import FEWEST, WRITTEN, headers_of_message, letter, note, noted, origin, replay, send
from flowkit.message import HeaderPairs, PlainRecord
from flowkit.replay import Found, Handled, Wanted
from flowkit.responses import Response

NAMES = st.one_of(
    st.sampled_from((*WRITTEN, "flowkit-replay-of", "flowkit-replays", "trace", "kafka_dlt-exception-stacktrace")),
    st.text(st.characters(codec="utf-8"), max_size=20),
)
MARKS = ("flowkit-replay-of", "flowkit-replays")


def as_record(item: Response, offset: int = 17) -> PlainRecord:
    """What comes out of Kafka of what was sent."""
    return PlainRecord(item.topic, item.partition or 0, offset, 0, item.key, item.value, item.headers)


@given(
    key=st.none() | st.binary(max_size=50),
    value=st.none() | st.binary(max_size=200),
    headers=st.lists(st.tuples(NAMES, st.none() | st.binary(max_size=50)), max_size=8),
    text=st.text(max_size=3000),
    partition=st.integers(0, 2**31 - 1),
    offset=st.integers(0, 2**63 - 1),
)
def test_a_replay_is_the_message_byte_for_byte(
    key: bytes | None, value: bytes | None, headers: HeaderPairs, text: str, partition: int, offset: int
) -> None:
    record = make_record(value, key=key, headers=tuple(headers), partition=partition, offset=offset)
    dead = as_record(letter("dead", record, "billing", ValueError(text), 3))
    again = replay(dead, "orders", None)

    assert (again.key, again.value) == (key, value)
    assert again.headers[:-2] == tuple(pair for pair in headers if pair[0] not in MARKS)
    assert again.headers[-2] == ("flowkit-replay-of", b"dead/0/17")
    it = origin(dead.headers)
    assert it is not None
    assert (it.topic, it.partition, it.offset, it.timestamp) == ("orders", partition, offset, record.timestamp)
    assert (it.group, it.error, it.attempts) == ("billing", "builtins.ValueError", 3)
    # and once more, after it failed again
    second = replay(as_record(letter("dead", as_record(again), "billing", ValueError(text), 3), 18), "orders", None)
    assert second.headers[:-2] == again.headers[:-2]
    assert int(second.headers[-1][1] or b"") == int(again.headers[-1][1] or b"") + 1


@given(st.lists(st.tuples(NAMES, st.none() | st.binary(max_size=20)), max_size=8))
def test_headers_of_anybody_can_be_read(headers: HeaderPairs) -> None:
    origin(headers)
    noted(headers)
    headers_of_message(headers)


def test_letters_of_spring_are_read_and_only_its_headers_are_taken_off() -> None:
    headers = (
        ("kafka_dlt-original-topic", b"orders"),
        ("trace", b"1"),
        ("kafka_dlt-original-partition", struct.pack(">i", 3)),
        ("kafka_dlt-exception-fqcn", b"org.springframework.kafka.listener.ListenerExecutionFailedException"),
        ("kafka_dlt-exception-cause-fqcn", b"java.lang.IllegalStateException"),
        ("kafka_dlt-exception-stacktrace", b"..."),
    )
    it = origin(headers)
    assert it is not None
    assert (it.place, it.error) == ("orders[3]@?", "java.lang.IllegalStateException")
    assert headers_of_message(headers) == (("trace", b"1"),)


@pytest.mark.parametrize("name", [b"", b"a b", b"../etc", b"\xff", b"x" * 300, None])
def test_an_origin_that_no_topic_can_have_is_none(name: bytes | None) -> None:
    assert origin([("kafka_dlt-original-topic", name)]) is None


# Notes.


@given(st.sets(st.integers(0, 300), min_size=1))
def test_a_note_names_what_it_was_given(offsets: set[int]) -> None:
    item = note("dead", 4, list(offsets), "replayed")
    assert (item.topic, item.partition, item.value) == ("dead", 4, None)
    handled = Handled()
    handled.add(as_record(item, offset=301), noted(item.headers) or [])
    assert {offset for offset in range(400) if ("dead", 4, offset) in handled} == offsets
    assert ("dead", 3, min(offsets)) not in handled


def test_a_note_can_speak_of_what_stands_in_front_of_it_only() -> None:
    handled = Handled()
    handled.add(as_record(note("dead", 0, [*range(100)], "dropped"), offset=50), [range(100)])
    assert ("dead", 0, 49) in handled
    assert ("dead", 0, 50) not in handled


@pytest.mark.parametrize(
    "text", [b"", b"replayed", b"replayed x", b"replayed 1-", b"eaten 1", b"replayed 1,", b"\xff"]
)
def test_what_is_no_note_notes_nothing(text: bytes) -> None:
    assert noted([("flowkit-handled", text)]) is None


# Which are meant.


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [
        (Wanted(), True),
        (Wanted(topic="orders"), True),
        (Wanted(topic="order"), False),
        (Wanted(group="billing"), True),
        (Wanted(group="b"), False),
        (Wanted(error="VALUEERROR: no"), True),
        (Wanted(error="such"), True),
        (Wanted(error="KeyError"), False),
        (Wanted(since=100.0), True),
        (Wanted(since=100.5), False),
        (Wanted(until=100.0), False),
        (Wanted(until=100.5), True),
        (Wanted(key=b"ann"), True),
        (Wanted(key=b"bob"), False),
        (Wanted(partition=2, offset=1017), True),
        (Wanted(partition=3), False),
        (Wanted(offset=1018), False),
        (Wanted(places={("dead", 0, 17)}), True),
        (Wanted(places={("dead", 0, 18)}), False),
    ],
    ids=str,
)
def test_every_filter(wanted: Wanted, meant: bool) -> None:
    it = origin(letter("dead", make_record(), "billing", ValueError("No such user"), 2).headers)
    assert it is not None

    assert wanted.has(Found(("dead", 0, 17), it, b"ann", 100.0)) is meant


# Sending one.


class Refusing:
    """A producer for which everything above a size is too large."""

    def __init__(self, most: int, *, passing: bool = False) -> None:
        self.most, self.passing = most, passing
        self.sent: list[Response] = []
        self.tries = 0

    def send_all(self, items: list[Response]) -> None:
        self.tries += 1
        (item,) = items
        if sum(len(name) + len(value or b"") for name, value in item.headers) > self.most:
            raise DeliveryError("MessageSizeTooLargeError", passing=self.passing)
        self.sent.append(item)


def test_what_is_too_large_with_all_headers_goes_with_the_fewest() -> None:
    producer = Refusing(300)
    send(producer, letter("dead", make_record(), "billing", ValueError("x" * 500), 2))
    (item,) = producer.sent
    assert tuple(name for name, _ in item.headers) == ("trace", "trace", *FEWEST)
    assert headers_of_message(item.headers) == make_record().headers


def test_what_is_too_large_in_any_case_says_what_to_do() -> None:
    with pytest.raises(DeliveryError, match=r"raise max\.message\.bytes of 'dead'") as caught:
        send(Refusing(0), letter("dead", make_record(), "billing", ValueError(), 2))
    assert not caught.value.passing


def test_a_broker_that_is_away_is_no_reason_to_leave_headers_out() -> None:
    producer = Refusing(0, passing=True)
    with pytest.raises(DeliveryError):
        send(producer, letter("dead", make_record(), "billing", ValueError(), 2))
    assert producer.tries == 1


# Where they go.


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        ({"dead_letter": "{topic}.dead"}, {}, ("dead_letter", "orders.dead")),
        ({"dead_letter": "{group}.{topic}.dead"}, {"group": "g"}, ("dead_letter", "g.orders.dead")),
        ({}, {"dead_letter": "{topic}-dlq"}, ("dead_letter", "orders-dlq")),
        ({"dead_letter": "all.dead"}, {"dead_letter": False}, (None, None)),
        ({"dead_letter": "all.dead"}, {"on_poison": "skip"}, ("skip", None)),
        ({"dead_letter": "all.dead"}, {"on_poison": "stop"}, ("stop", None)),
        ({"dead_letter": "all.dead"}, {"on_poison": "dead_letter"}, ("dead_letter", "all.dead")),
        ({"on_poison": "stop"}, {}, ("stop", None)),
        ({"on_poison": "stop"}, {"dead_letter": "d"}, ("dead_letter", "d")),
        ({"on_poison": "stop"}, {"dead_letter": False}, (None, None)),
        ({"on_poison": "dead_letter"}, {"dead_letter": False}, (None, None)),
        ({"on_poison": "stop"}, {"on_poison": "skip"}, ("skip", None)),
    ],
    ids=str,
)
def test_what_the_route_says_comes_first(
    settings: dict[str, object], options: dict[str, object], expected: tuple[str | None, str | None]
) -> None:
    app = make_app(**settings)
    app.add_topic("orders", print, **options)  # type: ignore[arg-type]
    handling = app.handling("orders")
    assert (handling.on_poison, handling.dead_letter) == expected


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dead_letter": "{name}.dead"}, "{topic} and {group} may stand, and no other braces"),
        ({"dead_letter": "{topic"}, "{topic} and {group} may stand, and no other braces"),
        ({"dead_letter": "{topic}"}, "its dead letters cannot go to itself"),
        ({"dead_letter": "a b"}, "'a b' cannot be the name of a topic"),
        ({"dead_letter": "d", "on_poison": "skip"}, "dead_letter='d' and on_poison='skip' say different things"),
        ({"dead_letter": False, "on_poison": "dead_letter"}, "on_poison='dead_letter' needs a topic for them"),
        ({"on_poison": "ignore"}, "on_poison is 'dead_letter', 'stop' or 'skip', not 'ignore'"),
        ({"dead_letter_limit": 0}, "dead_letter_limit is a whole number of at least 1, not 0"),
        ({"dead_letter_limit": True}, "dead_letter_limit is a whole number of at least 1, not True"),
        ({"dead_letter": False, "dead_letter_limit": 3}, "dead_letter_limit counts dead letters, and it has none"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_at_the_decorator(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint.replace("{", r"\{").replace("(", r"\(")):
        make_app().topic("orders", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "options", "complaint"),
    [
        ({}, {"on_poison": "dead_letter"}, "on_poison='dead_letter' needs the name of a topic"),
        ({"on_poison": "dead_letter"}, {}, "on_poison='dead_letter' needs the name of a topic"),
        ({"inline": False}, {"on_poison": "stop"}, "on_poison='stop' is for routes with inline=True"),
        ({}, {"dead_letter_limit": 3}, "dead_letter_limit counts dead letters; name a topic"),
        ({"dead_letter": "orders"}, {}, "its dead letters cannot go to itself, they would come back"),
        ({"dead_letter": "{group}.{topic}" * 10}, {"group": "g" * 100}, "cannot be the name of a topic"),
        ({"dead_letter": "d", "on_poison": "skip"}, {}, "skip and dead_letter=d say different things"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_together_is_refused_at_the_start(
    settings: dict[str, object], options: dict[str, object], complaint: str
) -> None:
    app = make_app(**settings)
    app.add_topic("orders", print, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=complaint):
        app.start(connected=False)


def test_dead_letters_in_a_circle_are_refused() -> None:
    app = Flowkit("shop")
    app.add_topic("a", print, dead_letter="b")
    app.add_topic("b", print, dead_letter="c")
    app.add_topic("c", print, dead_letter="a")
    with pytest.raises(ConfigurationError, match="to itself in the end: a to b to c to a, they would come back"):
        app.start(connected=False)
