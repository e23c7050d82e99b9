"""How often and how soon."""

from __future__ import annotations

from typing import Any

import pytest
from support import make_app, shown

from flowkit import FlowkitError, Message, PayloadError, Retry
from flowkit.errors import ParserError
from flowkit.testing import Client


def exact(**options: Any) -> Retry:
    return Retry(**{"jitter": 0, **options})


def waits(retry: Retry, count: int) -> list[float]:
    return [retry.delay(attempt) for attempt in range(1, count + 1)]


def test_the_first_wait_is_first_and_each_next_one_is_longer_by_the_factor() -> None:
    assert waits(exact(first=2, factor=3, cap=1000), 4) == [2, 6, 18, 54]


def test_no_wait_is_longer_than_the_cap() -> None:
    assert waits(exact(first=1, factor=10, cap=50), 5) == [1, 10, 50, 50, 50]


@pytest.mark.parametrize("factor", [1, 1.0, 2.0, 10, 1e6, 1e300, 100_000])
def test_a_message_may_fail_for_weeks_without_an_overflow(factor: float) -> None:
    retry = exact(first=1, factor=factor, cap=60)

    assert retry.delay(1_000_000) == (1 if factor == 1 else 60)


def test_a_first_wait_of_zero_stays_zero() -> None:
    assert exact(first=0, factor=1e6).delay(500) == 0


def test_jitter_shortens_a_wait_by_at_most_its_share() -> None:
    retry = Retry(first=10, factor=1, jitter=0.25)

    drawn = [retry.delay(1) for _ in range(500)]

    assert all(7.5 <= wait <= 10 for wait in drawn)
    assert len(set(drawn)) > 1


def test_it_is_a_value() -> None:
    assert Retry(attempts=3) == Retry(attempts=3) != Retry(attempts=4)
    assert len({Retry(), Retry()}) == 1
    with pytest.raises(AttributeError):
        Retry().attempts = 3  # type: ignore[misc]


def test_its_options_go_by_name() -> None:
    with pytest.raises(TypeError):
        Retry(3)  # type: ignore[misc]


@pytest.mark.parametrize(
    "options",
    [
        {"attempts": 0},
        {"attempts": -1},
        {"attempts": 2.5},
        {"first": -0.1},
        {"first": float("nan")},
        {"factor": 0.99},
        {"factor": float("nan")},
        {"cap": -1},
        {"cap": float("nan")},
        {"jitter": -0.1},
        {"jitter": 1.1},
        {"jitter": float("nan")},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_the_rules(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="attempts is at least 1, first and cap are seconds of at least 0"):
        Retry(**options)


def test_it_reads_as_a_sentence() -> None:
    assert str(Retry()) == "5 attempts, waits from 1 s times 2 up to 60 s"


# Which errors are tried again.


class Away(FlowkitError):
    passing = True


@pytest.mark.parametrize(
    ("options", "error", "ends"),
    [
        ({}, ValueError(), False),
        ({}, ParserError(), True),
        ({}, PayloadError(), True),
        ({"never": ()}, ParserError(), False),
        ({"never": KeyError}, KeyError(), True),
        ({"never": LookupError}, KeyError(), True),
        ({"never": [KeyError]}, ParserError(), True),
        ({"never": [KeyError]}, ValueError(), False),
        ({"on": OSError}, ConnectionError(), False),
        ({"on": OSError}, ValueError(), True),
        ({"on": (OSError, ParserError)}, PayloadError(), False),
        ({"on": OSError, "never": FileNotFoundError}, FileNotFoundError(), True),
        ({"on": OSError, "never": FileNotFoundError}, PermissionError(), False),
        ({"on": OSError}, Away(), False),
        ({"never": Exception}, Away(), False),
        ({"attempts": 1}, Away(), False),
        ({"attempts": 1}, ValueError(), True),
    ],
    ids=shown,
)
def test_the_first_failure_is_the_last_where_trying_again_is_no_use(
    options: dict[str, Any], error: Exception, ends: bool
) -> None:
    assert Retry(**options).ends(1, error) is ends


def test_the_last_attempt_ends_it_in_any_case() -> None:
    retry = Retry(attempts=3, on=ValueError)

    assert [retry.ends(attempt, ValueError()) for attempt in (1, 2, 3, 4)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {"on": "ValueError"},
            "on takes exception classes, not 'ValueError'; write the class itself, without quotes",
        ),
        ({"never": ValueError("x")}, r"never takes exception classes, not ValueError\('x'\); write never=ValueError"),
        ({"on": (OSError, 3)}, "on takes exception classes, not 3"),
        ({"on": KeyboardInterrupt}, "on takes exception classes, not <class 'KeyboardInterrupt'>"),
        ({"on": ()}, r"on=\(\) would try nothing again; write attempts=1 for that"),
        ({"on": KeyError, "never": LookupError}, "on=KeyError is in never= too"),
    ],
    ids=shown,
)
def test_errors_that_cannot_be_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Retry(**options)


def test_it_says_which_errors_it_knows() -> None:
    assert str(Retry(on=OSError)).endswith(", on OSError only")
    assert str(Retry(never=(KeyError, TypeError))).endswith(", never on KeyError, TypeError, ParserError")
    assert str(Retry(never=())).endswith(", also on ParserError")


# The same rule inline, in the queue and in the test client.


@pytest.mark.parametrize("inline", [True, False])
def test_the_client_tries_as_often_as_production(inline: bool) -> None:
    app = make_app(inline=inline, retry=Retry(attempts=4, first=0, never=KeyError), dead_letter="{topic}.dead")
    last: list[bool] = []

    @app.topic("orders")
    def handle(order: str) -> None:
        raise KeyError if order == "bad" else ValueError

    @app.after_failure("orders")
    def report(error: Exception, message: Message) -> None:
        last.append(message.last_attempt)

    client = Client(app)
    assert client.send("orders", "good", raise_errors=False).attempts == 4
    assert last == [False, False, False, True]
    call = client.send("orders", "bad", raise_errors=False)
    assert (call.attempts, last[4:]) == (1, [True])
    assert call.dead_letter is not None
    assert call.dead_letter.topic == "orders.dead"


def test_the_client_says_that_a_message_would_be_skipped() -> None:
    app = make_app(on_poison="skip", retry=1)

    @app.topic("orders")
    def handle(order: str) -> None:
        raise ValueError

    call = Client(app).send("orders", "x", raise_errors=False)
    assert (call.skipped, call.dead_letter) == (True, None)
