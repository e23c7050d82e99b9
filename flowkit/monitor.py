"""What an application tells of itself. The default writes to the log; any object with the same two methods replaces it."""

from __future__ import annotations

import logging
from typing import Any

LEVELS = {
    "started": logging.INFO,
    "stopped": logging.INFO,
    "assigned": logging.INFO,
    "revoked": logging.INFO,
    "recovered": logging.INFO,
    "rewound": logging.WARNING,
    "dead_letter": logging.WARNING,
}


logger = logging.getLogger(__name__)

EXTRA = ("topic", "partition", "offset", "group", "job", "count")


class Monitor:
    """Events of one application.

    ``notice(event, **details)`` for what happened: started, stopped, assigned, revoked, rewound, consumed, queued,
    performed, dead_letter. Counts are per batch, not per message. ``notice_error(event, error, **details)`` for
    what failed: handler, delivery, queue, broker.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger

    def notice(self, event: str, **details: Any) -> None:
        level = LEVELS.get(event, logging.DEBUG)
        if self.logger.isEnabledFor(level):
            self.logger.log(level, "%s %s", event, _words(details), extra=_extra(event, details))

    def notice_error(self, event: str, error: BaseException, **details: Any) -> None:
        message = details.pop("message", None) or f"{event} failed {_words(details)}: {type(error).__name__}: {error}"
        traceback = error if details.pop("traceback", False) else None
        self.logger.error(message, exc_info=traceback, extra=_extra(event, details))


class Guard:
    """A monitor whose own errors are logged and go no further: what tells of messages must not stop them."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def notice(self, event: str, **details: Any) -> None:
        try:
            self._monitor.notice(event, **details)
        except Exception:
            logger.exception("the monitor failed at notice(%r)", event)

    def notice_error(self, event: str, error: BaseException, **details: Any) -> None:
        try:
            self._monitor.notice_error(event, error, **details)
        except Exception:
            logger.exception("the monitor failed at notice_error(%r, %r)", event, error)


def _words(details: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in details.items())


def _extra(event: str, details: dict[str, Any]) -> dict[str, Any]:
    """``extra`` for structured logs: only names that a LogRecord does not have of its own, which logging refuses."""
    extra: dict[str, Any] = {"event": event}
    extra.update({name: details[name] for name in EXTRA if name in details})
    return extra
