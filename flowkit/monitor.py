"""What an application tells of itself. The default writes to the log; any object with the same two methods replaces it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .coroutines import finish
from .message import Abort

logger = logging.getLogger(__name__)

LEVELS = {
    "started": logging.INFO,
    "stopped": logging.INFO,
    "rebalanced": logging.INFO,
    "recovered": logging.INFO,
    "paused": logging.INFO,
    "resumed": logging.INFO,
    "rewound": logging.WARNING,
    "dead": logging.WARNING,
    "consumed": logging.DEBUG,
    "queued": logging.DEBUG,
    "performed": logging.DEBUG,
    "responded": logging.DEBUG,
    "retried": logging.DEBUG,
}
"""The events of ``notice``, and the level of their log lines."""

TROUBLE = ("failed", "skipped", "delivery", "queue", "broker", "topics", "unreadable", "gone", "stop")
"""The events of ``notice_error``."""

EVENTS = (*LEVELS, *TROUBLE)

EXTRA = ("topic", "partition", "offset", "group", "queue", "count", "attempt")
"""The details that log records have as fields, for structured logs."""

Subscriber = Callable[..., Any]


class Monitor:
    """What happens in an application, one method an event: this one logs them.

    A subclass overrides ``notice`` or ``notice_error``, which are told of everything, or the method of an event, which is
    called after the log line; counts are per batch, not per message. End an override in ``**details``: more may come.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger

    def notice(self, event: str, **details: Any) -> None:
        """Something happened: logs it, and calls the method of that name."""
        level = LEVELS.get(event, logging.DEBUG)
        if self.logger.isEnabledFor(level):
            self.logger.log(level, "%s %s", event, _words(details), extra=_extra(event, details))
        if event in LEVELS:
            self._call(event, details)

    def notice_error(self, event: str, error: BaseException, **details: Any) -> None:
        """Something failed: logs it, and calls ``failed`` where it was an attempt of a message, ``skipped`` for one that is.

        Other events are ``delivery`` (Kafka did not take a message), ``queue`` (Redis did not), ``broker``, ``topics`` (one is
        missing), ``unreadable`` (a record is broken), ``gone`` (messages were deleted before they were read) and ``stop``.
        ``message`` is the text of the log line, ``traceback`` whether it has one.
        """
        text = details.pop("message", None) or f"{event} failed {_words(details)}: {type(error).__name__}: {error}"
        traceback = error if details.pop("traceback", False) else None
        self.logger.error(text, exc_info=traceback, extra=_extra(event, details))
        if event in ("failed", "skipped"):
            self._call(event, {"error": error, **details})

    def _call(self, event: str, details: dict[str, Any]) -> None:
        if getattr(type(self), event) is not getattr(Monitor, event):
            getattr(self, event)(**details)

    # One method an event, for subclasses.

    def started(self, *, application: str, groups: str, pid: int) -> None:
        """A process began to consume."""

    def stopped(self, *, application: str, clean: bool) -> None:
        """It ended."""

    def rebalanced(
        self, *, group: str, assigned: str | None = None, revoked: str | None = None, lost: str | None = None
    ) -> None:
        """Partitions came or went: one of the three is there, as ``orders[0],orders[1]``."""

    def consumed(self, *, topic: str, partition: int, count: int, group: str) -> None:
        """Messages of one partition were handled inline, or passed on."""

    def queued(
        self,
        *,
        topic: str,
        count: int,
        group: str,
        queue: str | None = None,
        jobs: int | None = None,
        worker: str | None = None,
    ) -> None:
        """Messages are in Redis (``queue``, ``jobs``), or with a custom ``worker``."""

    def performed(self, *, topic: str, count: int, failed: int) -> None:
        """A job of ``count`` messages was worked on, and ``failed`` of them failed."""

    def responded(self, *, topic: str, count: int) -> None:
        """Kafka confirmed responses that went to ``topic``."""

    def failed(self, *, error: BaseException, topic: str, attempt: int, last: bool, **place: Any) -> None:
        """An attempt of a message failed; ``last``: it is not tried again by itself.

        ``place`` is its ``partition``, ``offset`` and ``group``, where its job could be read.
        """

    def retried(self, *, topic: str, partition: int, offset: int, group: str, attempt: int, delay: float) -> None:
        """A failed message is tried again, as attempt number ``attempt``, after ``delay`` seconds."""

    def dead(
        self, *, topic: str, partition: int, offset: int, group: str, attempt: int, dead_letter: str | None
    ) -> None:
        """A message failed every attempt: it went to the topic ``dead_letter``, or (None) stays in RQ's FailedJobRegistry."""

    def skipped(
        self,
        *,
        error: BaseException,
        topic: str,
        partition: int,
        offset: int,
        group: str,
        attempt: int,
        key: bytes | None,
    ) -> None:
        """A message failed every attempt and was passed over, because its route says ``on_poison="skip"``."""

    def recovered(self, *, message: str, group: str, failures: int | None = None) -> None:
        """What had failed works again."""

    def paused(self, *, group: str, queue: str, messages: int) -> None:
        """So many messages wait in a queue, more than ``max_backlog``: the partitions that fill it wait too."""

    def resumed(self, *, group: str, queue: str, messages: int) -> None:
        """Half of that is worked off, or more: those partitions go on."""

    def rewound(self, *, group: str, partition: str, offset: int | None) -> None:
        """A group was set back on purpose, and its messages are queued again."""


class Guard:
    """A monitor as flowkit calls it, and the functions that subscribed to events. Their own errors are logged and go no
    further: what tells of messages must not stop them.
    """

    def __init__(self, monitor: Any, subscribers: Mapping[str, Sequence[Subscriber]]) -> None:
        self._monitor = monitor
        self._subscribers = subscribers

    def notice(self, event: str, **details: Any) -> None:
        try:
            self._monitor.notice(event, **details)
        except (Exception, Abort):
            logger.exception("the monitor failed at notice(%r)", event)
        self._tell(event, details)

    def notice_error(self, event: str, error: BaseException, **details: Any) -> None:
        try:
            self._monitor.notice_error(event, error, **details)
        except (Exception, Abort):
            logger.exception("the monitor failed at notice_error(%r, %r)", event, error)
        details.pop("traceback", None)
        self._tell(event, {"error": error, **details})

    def _tell(self, event: str, details: dict[str, Any]) -> None:
        for subscriber in self._subscribers.get(event, ()):
            try:
                finish(subscriber(event, **details))
            except (Exception, Abort):
                logger.exception("%r failed at the event %r", subscriber, event)


def _words(details: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in details.items())


def _extra(event: str, details: dict[str, Any]) -> dict[str, Any]:
    """``extra`` for structured logs: only names that a LogRecord does not have of its own, which logging refuses."""
    extra: dict[str, Any] = {"event": event}
    extra.update({name: details[name] for name in EXTRA if name in details})
    return extra
