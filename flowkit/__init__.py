"""flowkit: a decorator microframework for applications made of Kafka messages."""

from __future__ import annotations

from .app import Flowkit
from .errors import (
    AlreadyStarted,
    AppNotFound,
    BrokerUnavailable,
    ConfigurationError,
    DeliveryError,
    DevStackError,
    FlowkitError,
    ParserError,
    PayloadError,
    QueueError,
    RedisUnavailable,
    ResponseError,
    ResponseMissing,
    ResponseRepeated,
    ResponseUnregistered,
    RouteNotFound,
    SettingsError,
)
from .message import Headers, Message
from .monitor import Monitor
from .retry import Retry
from .settings import Settings

__version__ = "0.1.0"

__all__ = [
    "AlreadyStarted",
    "AppNotFound",
    "BrokerUnavailable",
    "ConfigurationError",
    "DeliveryError",
    "DevStackError",
    "Flowkit",
    "FlowkitError",
    "Headers",
    "Message",
    "Monitor",
    "ParserError",
    "PayloadError",
    "QueueError",
    "RedisUnavailable",
    "ResponseError",
    "ResponseMissing",
    "ResponseRepeated",
    "ResponseUnregistered",
    "Retry",
    "RouteNotFound",
    "Settings",
    "SettingsError",
]
