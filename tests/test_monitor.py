"""What an application tells of itself."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest

from flowkit import ConfigurationError, Flowkit, Monitor
from flowkit.monitor import LEVELS

LOUD = ["started", "stopped", "rebalanced", "recovered"]
QUIET = ["consumed", "queued", "performed", "responded", "retried", "something of tomorrow"]
WARNING = ["rewound", "dead"]


@pytest.fixture
def monitor(caplog: pytest.LogCaptureFixture) -> Monitor:
    caplog.set_level(logging.DEBUG, "shop")
    return Monitor(logging.getLogger("shop"))


@pytest.mark.parametrize(
    ("event", "level"),
    [
        *((event, logging.INFO) for event in LOUD),
        *((event, logging.DEBUG) for event in QUIET),
        *((event, logging.WARNING) for event in WARNING),
    ],
)
def test_each_event_has_its_level(monitor: Monitor, caplog: pytest.LogCaptureFixture, event: str, level: int) -> None:
    monitor.notice(event, topic="orders", count=7)

    [record] = caplog.records
    assert (record.levelno, record.name) == (level, "shop")
    assert record.getMessage() == f"{event} topic=orders count=7"


def test_what_nobody_wants_to_see_is_not_written(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("shop.quiet")
    logger.setLevel(logging.INFO)

    Monitor(logger).notice("consumed", count=7)

    assert caplog.records == []


def test_details_that_structured_logs_know_are_fields_of_the_record(
    monitor: Monitor, caplog: pytest.LogCaptureFixture
) -> None:
    details = {"topic": "orders", "partition": 2, "offset": 1017, "group": "g", "queue": "q", "count": 1}

    monitor.notice("queued", **details)

    [record] = caplog.records
    assert {name: getattr(record, name) for name in details} == details
    assert record.__dict__["event"] == "queued"


@pytest.mark.parametrize("name", ["message", "name", "args", "asctime", "msg", "levelname", "module", "process"])
def test_a_detail_may_have_any_name(monitor: Monitor, caplog: pytest.LogCaptureFixture, name: str) -> None:
    monitor.notice("stopped", **{name: "x"})
    monitor.notice_error("queue", ValueError("full"), **{name: "x"})

    assert len(caplog.records) == 2


def test_an_error_is_told_with_its_details(monitor: Monitor, caplog: pytest.LogCaptureFixture) -> None:
    monitor.notice_error("delivery", ValueError("full"), topic="orders", partition=2)

    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == "delivery failed topic=orders partition=2: ValueError: full"
    assert record.__dict__["topic"] == "orders"
    assert record.exc_info is None


def test_an_error_may_bring_its_own_words(monitor: Monitor, caplog: pytest.LogCaptureFixture) -> None:
    monitor.notice_error("failed", ValueError("full"), message="100% of orders[2]@7 failed", topic="orders")

    assert caplog.records[0].getMessage() == "100% of orders[2]@7 failed"


def test_an_error_has_its_traceback_where_asked_for(monitor: Monitor, caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("full")
    except ValueError as error:
        monitor.notice_error("failed", error, traceback=True)

    assert "Traceback" in caplog.text
    assert "test_an_error_has_its_traceback" in caplog.text


def test_an_application_tells_the_logger_it_was_given(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mine")
    app = Flowkit("shop", logger=logging.getLogger("mine"))

    app.monitor.notice("started")

    assert [(record.name, record.getMessage()) for record in caplog.records] == [("mine", "started ")]
    assert app.monitor is app.monitor


def test_an_application_tells_the_monitor_it_was_given() -> None:
    class Memory:
        def __init__(self) -> None:
            self.events: list[Any] = []

        def notice(self, event: str, **details: Any) -> None:
            self.events.append((event, details))

        def notice_error(self, event: str, error: BaseException, **details: Any) -> None:
            self.events.append((event, error, details))

    memory = Memory()
    app = Flowkit("shop", monitor=memory)
    error = ValueError()

    app.monitor.notice("queued", count=1)
    app.monitor.notice_error("queue", error)

    assert app.monitor is memory
    assert memory.events == [("queued", {"count": 1}), ("queue", error, {})]


def test_a_monitor_that_fails_itself_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def notice(self, event: str, **details: Any) -> None:
            raise OSError("no network")

        def notice_error(self, event: str, error: BaseException, **details: Any) -> None:
            raise OSError("no network")

    app = Flowkit("shop", monitor=Broken())
    app.events.notice("consumed", count=3)
    app.events.notice_error("failed", ValueError("bad"))
    assert "the monitor failed at notice('consumed')" in caplog.text
    assert "the monitor failed at notice_error('failed', ValueError('bad'))" in caplog.text


class Counting(Monitor):
    """Overrides the methods of three events."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger)
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def consumed(self, **details: Any) -> None:
        self.seen.append(("consumed", details))

    def failed(self, **details: Any) -> None:
        self.seen.append(("failed", details))

    def dead(self, **details: Any) -> None:
        self.seen.append(("dead", details))


def test_a_subclass_has_a_method_an_event(caplog: pytest.LogCaptureFixture) -> None:
    error = ValueError("full")
    monitor = Counting(logging.getLogger("shop"))

    batch = {"topic": "orders", "partition": 2, "count": 7, "group": "g"}
    monitor.notice("consumed", **batch)
    monitor.notice("performed", topic="orders", count=7, failed=0)
    monitor.notice_error("failed", error, message="no", traceback=True, topic="orders", attempt=2, last=False)
    monitor.notice_error("broker", error)

    assert monitor.seen == [
        ("consumed", batch),
        ("failed", {"error": error, "topic": "orders", "attempt": 2, "last": False}),
    ]
    assert caplog.messages == ["no", "broker failed : ValueError: full"]


@pytest.mark.parametrize("event", [*LEVELS, "failed"])
def test_every_event_has_a_method_that_says_what_it_is_told(event: str) -> None:
    method = getattr(Monitor, event)
    names = [name for name in inspect.signature(method).parameters if name not in ("self", "place")]

    assert method.__doc__
    assert method(Monitor(logging.getLogger("shop")), **dict.fromkeys(names)) is None


def test_a_monitor_may_be_given_as_a_class() -> None:
    app = Flowkit("shop", monitor=Counting, logger=logging.getLogger("mine"))

    assert isinstance(app.monitor, Counting)
    assert app.monitor.logger.name == "mine"


def test_functions_subscribe_to_events_beside_the_monitor() -> None:
    app = Flowkit("shop")
    some: list[Any] = []
    every: list[Any] = []
    error = ValueError("full")

    @app.on_event("failed", "dead")
    def count(event: str, **details: Any) -> None:
        some.append((event, details))

    @app.on_event()
    async def note(event: str, **details: Any) -> None:
        every.append(event)

    app.events.notice("consumed", count=1)
    app.events.notice("dead", topic="orders")
    app.events.notice_error("failed", error, message="orders[0]@7 failed", traceback=True, topic="orders")

    assert some == [
        ("dead", {"topic": "orders"}),
        ("failed", {"error": error, "message": "orders[0]@7 failed", "topic": "orders"}),
    ]
    assert every == ["consumed", "dead", "failed"]
    app.stop()


@pytest.mark.parametrize("abort", [False, True], ids=["an error", "abort"])
def test_a_subscriber_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture, abort: bool) -> None:
    app = Flowkit("shop")
    seen: list[str] = []

    @app.on_event("consumed")
    def broken(event: str, **details: Any) -> None:
        if abort:
            app.abort()  # there is no message here that would be in hand
        raise OSError("no network")

    @app.on_event("consumed")
    def after(event: str, **details: Any) -> None:
        seen.append(event)

    app.events.notice("consumed", count=1)

    assert "failed at the event 'consumed'" in caplog.text
    assert seen == ["consumed"]


@pytest.mark.parametrize(
    ("event", "advice"),
    [("comsumed", "did you mean 'consumed'?"), (print, "write @app.on_event() for all events")],
)
def test_an_event_that_does_not_exist_is_refused(event: Any, advice: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Flowkit("shop").on_event(event)

    assert advice in str(caught.value)
