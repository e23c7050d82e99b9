"""What an application tells of itself. The default writes to the log; any object with the same two methods replaces it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .coroutines import finish

logger = logging.getLogger(__name__)

LEVELS = {
    "started": logging.INFO,
    "stopped": logging.INFO,
    "rebalanced": logging.INFO,
    "recovered": logging.INFO,
    "rewound": logging.WARNING,
    "dead": logging.WARNING,
    "consumed": logging.DEBUG,
    "queued": logging.DEBUG,
    "performed": logging.DEBUG,
    "responded": logging.DEBUG,
    "retried": logging.DEBUG,
}
"""The events of ``notice``, and the level of their log lines."""

TROUBLE = ("failed", "delivery", "queue", "broker", "topics", "stop")
"""The events of ``notice_error``."""

EVENTS = (*LEVELS, *TROUBLE)

EXTRA = ("topic", "partition", "offset", "group", "queue", "job", "count", "attempt")
"""The details that log records have as fields, for structured logs."""

Subscriber = Callable[..., Any]


class Monitor:
    """What happens in an application, one method an event: this one logs them.

    A subclass overrides ``notice`` or ``notice_error``, which are told of everything, or the method of an event, which is
    called after the log line; counts are per batch, not per message. Details may be added later, so take ``**details``.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger

    def notice(self, event: str, **details: Any) -> None:
        """Something happened: logs it, and calls the method of that name."""
        level = LEVELS.get(event, logging.DEBUG)
        if self.logger.isEnabledFor(level):
            self.logger.log(level, "%s %s", event, _words(details), extra=_extra(event, details))
        if event in LEVELS:
            getattr(self, event)(**details)

    def notice_error(self, event: str, error: BaseException, **details: Any) -> None:
        """Something failed: logs it, and calls ``failed`` where it was an attempt of a message.

        Other events are ``delivery`` (Kafka did not take a message), ``queue`` (Redis did not), ``broker``, ``topics`` (one is
        missing) and ``stop``. ``message`` is the text of the log line, ``traceback`` whether it has one.
        """
        text = details.pop("message", None) or f"{event} failed {_words(details)}: {type(error).__name__}: {error}"
        traceback = error if details.pop("traceback", False) else None
        self.logger.error(text, exc_info=traceback, extra=_extra(event, details))
        if event == "failed":
            self.failed(error=error, **details)

    def started(self, **details: Any) -> None:
        """A process began to consume: ``application``, ``groups``, ``pid``."""

    def stopped(self, **details: Any) -> None:
        """It ended: ``application``, ``clean``."""

    def rebalanced(self, **details: Any) -> None:
        """Partitions came or went: ``group``, and ``assigned``, ``revoked`` or ``lost`` as text, ``orders[0],orders[1]``."""

    def consumed(self, **details: Any) -> None:
        """Messages of one partition were handled inline or passed on: ``topic``, ``partition``, ``count``, ``group``."""

    def queued(self, **details: Any) -> None:
        """Messages went to Redis (``queue``, ``jobs``) or to a custom ``worker``: ``topic``, ``count``, ``group``."""

    def performed(self, **details: Any) -> None:
        """A job was worked on: ``topic``, ``count`` of messages, ``failed`` of these."""

    def responded(self, **details: Any) -> None:
        """Kafka confirmed responses: ``topic`` they went to, ``count``."""

    def failed(self, **details: Any) -> None:
        """An attempt of a message failed: ``error``, ``topic``, ``partition``, ``offset``, ``group``, ``attempt``.

        ``last`` is True where it is not tried again by itself.
        """

    def retried(self, **details: Any) -> None:
        """A failed message is tried again: ``topic``, ``partition``, ``offset``, ``group``, the next ``attempt``.

        ``delay`` is the seconds until then.
        """

    def dead(self, **details: Any) -> None:
        """A message failed every attempt: ``topic``, ``partition``, ``offset``, ``group``, ``attempt``.

        ``dead_letter`` is the topic it went to; None where it stays in RQ's FailedJobRegistry.
        """

    def recovered(self, **details: Any) -> None:
        """What had failed works again: ``message`` says what, ``group``."""

    def rewound(self, **details: Any) -> None:
        """A group was set back on purpose, and its messages are queued again: ``group``, ``partition``, ``offset``."""


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
        except Exception:
            logger.exception("the monitor failed at notice(%r)", event)
        self._tell(event, details)

    def notice_error(self, event: str, error: BaseException, **details: Any) -> None:
        try:
            self._monitor.notice_error(event, error, **details)
        except Exception:
            logger.exception("the monitor failed at notice_error(%r, %r)", event, error)
        details.pop("traceback", None)
        self._tell(event, {"error": error, **details})

    def _tell(self, event: str, details: dict[str, Any]) -> None:
        for subscriber in self._subscribers.get(event, ()):
            try:
                finish(subscriber(event, **details))
            except Exception:
                logger.exception("%r failed at the event %r", subscriber, event)


def _words(details: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in details.items())


def _extra(event: str, details: dict[str, Any]) -> dict[str, Any]:
    """``extra`` for structured logs: only names that a LogRecord does not have of its own, which logging refuses."""
    extra: dict[str, Any] = {"event": event}
    extra.update({name: details[name] for name in EXTRA if name in details})
    return extra
