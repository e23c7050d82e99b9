"""How often and how soon."""

from __future__ import annotations

from typing import Any

import pytest

from flowkit import Retry


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
