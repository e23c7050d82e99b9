"""Log lines on stderr: their level by setting and environment, as text or JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flowkit import Flowkit
from flowkit.logs import JsonFormatter, level_of, log_to_stderr
from flowkit.settings import Settings


@contextmanager
def new_process() -> Iterator[logging.Logger]:
    """The root logger as a new process has it: pytest adds handlers of its own to each test."""
    root, kafka = logging.getLogger(), logging.getLogger("kafka")
    handlers, levels = root.handlers[:], (root.level, kafka.level)
    root.handlers.clear()
    kafka.setLevel(logging.NOTSET)
    try:
        yield root
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        kafka.setLevel(levels[1])


def line(**fields: Any) -> Any:
    extra = fields.pop("extra", {})
    record = logging.makeLogRecord(
        {"name": "shop", "levelname": "INFO", "msg": "hello", "created": 0.5, **fields, **extra}
    )
    return json.loads(JsonFormatter().format(record))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "info"),
        ({"env": "test"}, "warning"),
        ({"env": "production"}, "info"),
        ({"env": "test", "log_level": "debug"}, "debug"),
        ({"env": "staging"}, "info"),
    ],
    ids=str,
)
def test_the_level_is_the_setting_or_that_of_the_environment(given: dict[str, str], expected: str) -> None:
    assert level_of(Settings(name="shop", **given)) == expected


def test_text_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    with new_process():
        log_to_stderr(Flowkit("shop"))

        logging.getLogger("flowkit").info("started %s", "shop")
        logging.getLogger("flowkit").debug("not this")

        assert capsys.readouterr().err.endswith(" INFO    started shop\n")


def test_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    with new_process():
        log_to_stderr(Flowkit("shop", log_format="json", log_level="debug"))

        logging.getLogger("flowkit").debug("queued", extra={"topic": "orders", "count": 7})

        [written] = capsys.readouterr().err.splitlines()
        assert (
            json.loads(written).items()
            >= {"level": "debug", "message": "queued", "topic": "orders", "count": 7}.items()
        )


def test_the_level_of_the_command_line_wins() -> None:
    with new_process() as root:
        log_to_stderr(Flowkit("shop", log_level="error"), "debug")
        assert root.level == logging.DEBUG


def test_an_application_that_logs_itself_is_left_alone() -> None:
    with new_process() as root:
        mine = logging.NullHandler()
        root.addHandler(mine)

        log_to_stderr(Flowkit("shop", log_format="json"))

        assert root.handlers == [mine]


def test_wrong_settings_are_left_to_the_start() -> None:
    with new_process() as root:
        log_to_stderr(Flowkit("shop", log_level="loud"))
        assert root.level == logging.INFO


def test_the_client_is_quiet_unless_asked() -> None:
    with new_process():
        log_to_stderr(Flowkit("shop"))
        assert logging.getLogger("kafka").level == logging.CRITICAL


def test_a_line_of_json_says_when_where_and_what() -> None:
    assert line() == {"time": "1970-01-01T00:00:00.500+00:00", "level": "info", "logger": "shop", "message": "hello"}


def test_fields_of_a_line_cannot_hide_its_own() -> None:
    assert line(extra={"time": "never", "offset": 7})["time"].startswith("1970")


def test_a_traceback_stays_on_its_line() -> None:
    try:
        raise ValueError("full")
    except ValueError:
        error = sys.exc_info()

    text = line(exc_info=error)["error"]

    assert text.startswith("Traceback")
    assert text.endswith("ValueError: full")


class Mute:
    def __str__(self) -> str:
        raise ValueError


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, b"raw", {7: 8}, float("nan"), 2**70, "\udcff", CIRCLE, Mute()],
    ids=lambda value: type(value).__name__,
)
def test_any_value_can_be_logged(value: Any) -> None:
    found = line(extra={"odd": value})
    assert "odd" in found
    assert found["message"] == "hello"


def test_a_message_that_is_no_text_of_unicode_is_logged_too() -> None:
    assert line(msg="half \udcff")["message"] == r"half \udcff"
