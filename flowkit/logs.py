"""Log lines on stderr: as text for people, or as JSON for programs."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

from .errors import SettingsError
from .settings import Settings

if TYPE_CHECKING:
    from .app import Flowkit

TEXT = "%(asctime)s %(levelname)-7s %(message)s"

OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def log_to_stderr(app: Flowkit, level: str | None = None) -> None:
    """Log lines on stderr as the settings say, unless the application has set up logging itself. ``level`` wins over theirs."""
    try:
        settings = app.settings
    except SettingsError:  # what starts next says so, with every mistake in one list
        settings = Settings()
    number = logging.getLevelNamesMapping()[(level or level_of(settings)).upper()]
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler()
        json = settings.log_format == "json"
        handler.setFormatter(JsonFormatter() if json else logging.Formatter(TEXT, datefmt="%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(number)
    kafka = logging.getLogger("kafka")
    if number > logging.DEBUG and kafka.level == logging.NOTSET:
        kafka.setLevel(logging.CRITICAL)  # flowkit says itself what its clients run into, and once


def level_of(settings: Settings) -> str:
    """The log level of the settings, or that of their environment."""
    return settings.log_level or ("warning" if settings.env == "test" else "info")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message``, what ``extra`` gave, ``error``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({name: value for name, value in vars(record).items() if name not in OWN and name not in line})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        try:
            return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
        except TypeError:  # what orjson refuses: half a surrogate, a number of more than 64 bits, a circle, ...
            return orjson.dumps({_safe(name): _safe(value) for name, value in line.items()}).decode()


def _safe(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else repr(value)
    except Exception:
        text = object.__repr__(value)
    return text.encode(errors="backslashreplace").decode()
